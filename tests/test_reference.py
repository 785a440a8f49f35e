"""The reference against a softmax written out row by row, over exactly the keys that each row sees."""

from __future__ import annotations

import math
import tracemalloc
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawattn import reference

CAUSAL = (False, True, "top-left")
SIDES = st.one_of(st.none(), st.integers(-1, 6))
WINDOWS = st.one_of(st.none(), st.tuples(SIDES, SIDES))


def naive(q, k, v, causal=False, window=None, scale=None):
    batch, sq, heads, dim = q.shape
    sk, ratio = k.shape[1], heads // max(1, k.shape[2])
    left, right = (math.inf if side is None or side == -1 else side for side in window or (None, None))
    right = min(right, 0) if causal else right
    out, lse = np.zeros((batch, sq, heads, v.shape[3])), np.full((batch, heads, sq), -math.inf)
    for b, i, h in np.ndindex(batch, sq, heads):
        diagonal = i if causal == "top-left" else i + sk - sq
        seen = [j for j in range(sk) if diagonal - left <= j <= diagonal + right]
        with np.errstate(invalid="ignore"):
            scores = k[b, seen, h // ratio] @ q[b, i, h] * (dim**-0.5 if scale is None else scale)
            top = scores.max(initial=-math.inf)
            if top == -math.inf:
                continue
            weights = np.exp(scores - top)
            out[b, i, h] = weights @ v[b, seen, h // ratio] / weights.sum()
            lse[b, h, i] = top + np.log(weights.sum())
    return out, lse


def draw_inputs(data, max_len=9):
    """Random q, k, v in float64, with lengths and heads of zero too."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    batch, sq, sk = data.draw(st.tuples(st.integers(0, 2), st.integers(0, max_len), st.integers(0, max_len)), "B, Sq, Sk")
    kv_heads, ratio = data.draw(st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 4, 7])), "Hkv, ratio")
    dim, dim_v = data.draw(st.tuples(st.sampled_from([8, 16]), st.sampled_from([8, 24])), "D, Dv")
    shapes = [(batch, sq, kv_heads * ratio, dim), (batch, sk, kv_heads, dim), (batch, sk, kv_heads, dim_v)]
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@given(st.data(), st.sampled_from(CAUSAL), WINDOWS, st.sampled_from([None, 0.3]), st.sampled_from([1, 30, reference.BLOCK_SCORES]))
def test_every_shape_and_mask(data, causal, window, scale, block_scores):
    q, k, v = draw_inputs(data)
    with mock.patch.object(reference, "BLOCK_SCORES", block_scores):
        got = reference.attention(q, k, v, causal=causal, window=window, scale=scale, return_lse=True)
    assert_close(got, naive(q, k, v, causal, window, scale))


@given(st.data(), st.sampled_from(CAUSAL), WINDOWS, st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_a_bad_key_or_value_reaches_the_rows_that_see_it_and_no_other(data, causal, window, bad, in_value):
    q, k, v = draw_inputs(data)
    target = v if in_value else k
    if target.size:
        target.flat[data.draw(st.integers(0, target.size - 1))] = bad
    got = reference.attention(q, k, v, causal=causal, window=window, return_lse=True)
    assert_close(got, naive(q, k, v, causal, window))


def test_all_hidden_keys_may_be_nan():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 12, 2, 8))
    clean = reference.attention(q, k, v, causal=True, window=(3, 0))
    k[:, 8:], v[:, 8:] = math.nan, math.inf
    poisoned = reference.attention(q, k, v, causal=True, window=(3, 0))
    assert np.array_equal(poisoned[:, :8], clean[:, :8])
    assert np.isnan(poisoned[:, 8:]).all()


def test_a_row_that_sees_no_key_is_zero_whatever_its_query():
    q, k, v = np.full((1, 3, 1, 8), math.nan), np.ones((1, 1, 1, 8)), np.ones((1, 1, 1, 8))
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[0, :2] == 0).all() and (lse[..., :2] == -math.inf).all()
    assert np.isnan(out[0, 2]).all() and np.isnan(lse[..., 2]).all()


def test_scores_of_minus_infinity_alone_are_no_key():
    q, k, v = np.ones((1, 1, 1, 8)), np.full((1, 2, 1, 8), -math.inf), np.full((1, 2, 1, 8), math.inf)
    out, lse = reference.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and lse.item() == -math.inf


@given(st.data(), st.sampled_from(CAUSAL), WINDOWS)
def test_varlen_is_a_loop(data, causal, window):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4))
    cu_q, cu_k = (np.cumsum([0, *(pair[side] for pair in lengths)], dtype=np.int32) for side in (0, 1))
    spare = data.draw(st.integers(0, 2), "rows behind the last sequence")
    q = rng.standard_normal((cu_q[-1] + spare, 4, 8))
    k, v = rng.standard_normal((cu_k[-1] + spare, 2, 8)), rng.standard_normal((cu_k[-1] + spare, 2, 16))
    out, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, causal=causal, window=window, return_lse=True)
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = reference.attention(q[None, rows], k[None, keys], v[None, keys], causal=causal, window=window, return_lse=True)
        assert np.array_equal(out[rows], alone[0][0]) and np.array_equal(lse[:, rows], alone[1][0])
    assert (out[cu_q[-1] :] == 0).all() and (lse[:, cu_q[-1] :] == -math.inf).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_inputs_are_computed_in_float64(dtype):
    rng = np.random.default_rng(1)
    q, k, v = (x.astype(dtype) for x in rng.standard_normal((3, 2, 33, 4, 16)))
    out = reference.attention(q, k, v, causal=True)
    assert out.dtype == np.float64
    assert np.array_equal(out, reference.attention(*(x.astype(np.float64) for x in (q, k, v)), causal=True))


def test_float32():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 1, 50, 4, 16))
    got = reference.attention(q, k, v, window=(9, 4), return_lse=True, compute_dtype="float32")
    assert all(x.dtype == np.float32 for x in got)
    assert_close(got, naive(q, k, v, window=(9, 4)), tolerance=1e-5)


def test_any_strides():
    rng = np.random.default_rng(3)
    packed = rng.standard_normal((2, 4, 3, 20, 8))  # (B, H, 3, S, D)
    q, k, v = packed.transpose(2, 0, 3, 1, 4)
    assert_close(reference.attention(q, k, v, return_lse=True), naive(q, k, v))


def test_memory_does_not_grow_with_the_square_of_the_length():
    q, k = np.zeros((1, 2048, 8, 8), np.float16), np.zeros((1, 2048, 1, 8), np.float16)
    with mock.patch.object(reference, "BLOCK_SCORES", 1 << 16):  # 0.5 MiB; all scores of a head are 32 MiB
        tracemalloc.start()
        out = reference.attention(q, k, k, causal=True)
        peak = tracemalloc.get_traced_memory()[1] - out.nbytes
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("window", [None, (40, 5)])
def test_cupy_agrees_with_numpy(causal, window):
    import cupy

    rng = np.random.default_rng(4)
    q = rng.standard_normal((2, 70, 6, 16)).astype(ml_dtypes.bfloat16)
    k, v = rng.standard_normal((2, 2, 90, 2, 16)).astype(ml_dtypes.bfloat16)
    k[0, 33, 0, 0], v[1, 88, 1, :] = math.nan, math.inf
    expected = reference.attention(q, k, v, causal=causal, window=window, return_lse=True)
    got = reference.attention(*(cupy.asarray(x) for x in (q, k, v)), causal=causal, window=window, return_lse=True)
    assert_close([x.get() for x in got], expected)
    lengths = np.array([0, 30, 30, 70], np.int32)
    expected = reference.attention_varlen(q[0], k[1], v[1], lengths, lengths, causal=causal, window=window, return_lse=True)
    on_gpu = [cupy.asarray(x) for x in (q[0], k[1], v[1], lengths, lengths)]
    got = reference.attention_varlen(*on_gpu, causal=causal, window=window, return_lse=True)
    assert_close([x.get() for x in got], expected)
