"""merge_states: attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawattn import merge_states, reference


def whole_and_parts(rng, cuts, sk=20, varlen=False):
    """(out, lse) over all keys and over each part of them, in float32."""
    q, k, v = rng.standard_normal((2, 5, 4, 8)), rng.standard_normal((2, sk, 2, 8)), rng.standard_normal((2, sk, 2, 16))
    bounds = [0, *sorted(cuts), sk]
    results = [reference.attention(q, k, v, return_lse=True)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        results.append(reference.attention(q, k[:, start:stop], v[:, start:stop], return_lse=True))
    results = [(out.astype(np.float32), lse.astype(np.float32)) for out, lse in results]
    return [(out[0], lse[0]) for out, lse in results] if varlen else results


def assert_close(got, expected, tolerance=1e-6):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 20), max_size=5), st.booleans())
def test_parts_merge_into_the_whole(seed, cuts, varlen):
    whole, *parts = whole_and_parts(np.random.default_rng(seed), cuts, varlen=varlen)
    outs, lses = zip(*parts, strict=True)
    assert_close(merge_states(outs, lses), whole)


def test_far_apart_lses_neither_overflow_nor_vanish():
    outs = [np.full((1, 1, 1), x, np.float32) for x in (1, 2, 3)]
    lses = [np.full((1, 1), x, np.float32) for x in (-3e4, 3e4, 3e4 - math.log(3))]
    out, lse = merge_states(outs, lses)
    assert out.item() == pytest.approx(2.25, abs=2e-3)  # an LSE of 3e4 has float32 steps of 2e-3
    assert lse.item() == pytest.approx(3e4 + math.log(4 / 3), abs=2e-3)


def test_one_part_is_itself():
    whole, *_ = whole_and_parts(np.random.default_rng(0), [])
    out, lse = merge_states([whole[0]], [whole[1]])
    assert np.array_equal(out, whole[0]) and np.array_equal(lse, whole[1])


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("unused", [0.0, math.nan, math.inf])
def test_a_part_without_keys_changes_nothing(position, unused):
    _, *parts = whole_and_parts(np.random.default_rng(1), [7])
    expected = merge_states(*zip(*parts, strict=True))
    parts.insert(position, (np.full_like(parts[0][0], unused), np.full_like(parts[0][1], -math.inf)))
    got = merge_states(*zip(*parts, strict=True))
    assert np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1])


def test_no_keys_in_any_part():
    out, lse = merge_states([np.zeros((1, 2, 3, 8), np.float16)] * 2, [np.full((1, 3, 2), -math.inf, np.float32)] * 2)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_nan_stays_in_its_row():
    _, *parts = whole_and_parts(np.random.default_rng(2), [7])
    clean = merge_states(*zip(*parts, strict=True))
    parts[1][0][0, 3, 2, 5] = math.nan  # one element of an output
    parts[0][1][1, 1, 4] = math.nan  # the LSE of head 1, row 4
    out, lse = merge_states(*zip(*parts, strict=True))
    assert np.isnan(out[0, 3, 2, 5]) and np.isnan(out[1, 4, 1]).all() and np.isnan(lse[1, 1, 4])
    assert np.isnan(out).sum() == 1 + out.shape[-1] and np.isnan(lse).sum() == 1
    assert np.array_equal(out[~np.isnan(out)], clean[0][~np.isnan(out)])


def test_bits_depend_on_neither_run_nor_batch():
    _, *parts = whole_and_parts(np.random.default_rng(3), [4, 11, 16])
    outs, lses = zip(*parts, strict=True)
    both = merge_states(outs, lses)
    again = merge_states(outs, lses)
    second = merge_states([x[1:] for x in outs], [x[1:] for x in lses])
    for a, b, c in zip(both, again, second, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a[1:], c)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_the_result_is_of_the_callers_kind(framework, dtype):
    _, *parts = whole_and_parts(np.random.default_rng(4), [7, 12])
    outs = [out.astype(getattr(ml_dtypes, dtype, dtype)) for out, _ in parts]
    lses = [lse for _, lse in parts]
    expected = merge_states(outs, lses)
    assert (expected[0].dtype.name, expected[1].dtype.name) == (dtype, "float32")
    if framework == "torch":
        torch = pytest.importorskip("torch")
        narrow = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in outs]  # exact: every value is a `dtype`
        got = merge_states(narrow, [torch.from_numpy(x) for x in lses])
        assert all(isinstance(x, torch.Tensor) for x in got)
        assert (got[0].dtype, got[1].dtype) == (getattr(torch, dtype), torch.float32)
        got = tuple(x.float().numpy() for x in got)
    elif framework == "jax":
        jax = pytest.importorskip("jax")
        cpu = jax.devices("cpu")[0]
        got = merge_states([jax.device_put(x, cpu) for x in outs], [jax.device_put(x, cpu) for x in lses])
        assert all(isinstance(x, jax.Array) for x in got)
        assert (got[0].dtype.name, got[1].dtype.name) == (dtype, "float32")
    else:
        got = merge_states(outs, lses)
    for a, b in zip(got, expected, strict=True):
        assert np.array_equal(np.asarray(a, np.float32), b.astype(np.float32))


OUT, LSE = np.zeros((2, 5, 4, 8), np.float16), np.zeros((2, 4, 5), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs is empty; needed: one partial result or more"),
        ([OUT, OUT], [LSE], ValueError, "lses has 1 arrays and outs has 2"),
        ([OUT[0, 0]], [LSE], ValueError, r"outs\[0\] has shape \(4, 8\); needed: \(B, S, H, Dv\)"),
        ([OUT.astype(np.float64)], [LSE], TypeError, r"outs\[0\] has dtype float64; needed: float16, bfloat16 or float32"),
        ([OUT, OUT.astype(np.float32)], [LSE, LSE], TypeError, r"outs\[1\] has dtype float32; needed: float16, as outs\[0\] has"),
        ([OUT, OUT[:1]], [LSE, LSE], ValueError, r"outs\[1\] has shape \(1, 5, 4, 8\); needed: \(2, 5, 4, 8\)"),
        ([OUT, OUT], [LSE, LSE.astype(np.float64)], TypeError, r"lses\[1\] has dtype float64; needed: float32"),
        ([OUT], [LSE.swapaxes(1, 2)], ValueError, r"lses\[0\] has shape \(2, 5, 4\); needed: \(2, 4, 5\)"),
        ([OUT, [1.0]], [LSE, LSE], TypeError, r"outs\[1\] is a list"),
    ],
)
def test_wrong_arguments_are_named(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_states(outs, lses)


def test_frameworks_do_not_mix():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"lses\[0\] is a torch array in host memory but outs\[0\] is a numpy array"):
        merge_states([OUT], [torch.from_numpy(LSE)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_gpu_arrays(framework, dtype):
    import cupy

    _, *parts = whole_and_parts(np.random.default_rng(5), [7, 12])
    parts.append((np.full_like(parts[0][0], math.nan), np.full_like(parts[0][1], -math.inf)))
    outs = [out.astype(getattr(ml_dtypes, dtype, dtype)) for out, _ in parts]
    lses = [lse for _, lse in parts]
    expected = merge_states(outs, lses)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        on_gpu = [[torch.from_numpy(x.astype(np.float32)).cuda() for x in arrays] for arrays in (outs, lses)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            got = merge_states([x.to(getattr(torch, dtype)) for x in on_gpu[0]], on_gpu[1])
        torch.cuda.synchronize()
        assert all(x.is_cuda for x in got)
        got = tuple(x.float().cpu().numpy() for x in got)
    elif framework == "jax":
        jax = pytest.importorskip("jax")
        got = merge_states([jax.device_put(x) for x in outs], [jax.device_put(x) for x in lses])
        assert all(isinstance(x, jax.Array) for x in got)
    else:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            got = merge_states([cupy.asarray(x) for x in outs], [cupy.asarray(x) for x in lses])
            got = tuple(x.get() for x in got)
            stream.synchronize()
    assert_close([np.asarray(x).astype(np.float32) for x in got], [x.astype(np.float32) for x in expected], tolerance=1e-2)
