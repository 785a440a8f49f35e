"""What attention() and attention_varlen() promise without a GPU: every wrong argument by name, and the host path from end to end."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_support import given_as, read
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from rawattn import attention, attention_varlen, reference

FRAMEWORKS = ("numpy", "torch", "jax")
DTYPES = ("float16", "bfloat16")
SIDES = st.one_of(st.none(), st.integers(-1, 6))
MASKS = st.fixed_dictionaries(
    {"causal": st.sampled_from([False, True, "top-left"]), "window": st.one_of(st.none(), st.tuples(SIDES, SIDES))}
)


def normal(shape: tuple[int, ...], dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def dense(batch: int = 2, sq: int = 5, sk: int = 7, kv_heads: int = 2, dtype: str = "float16", seed: int = 0, ratio: int = 2) -> list[Any]:
    """q, k and v with D = 16 and Dv = 24."""
    shapes = [(batch, sq, kv_heads * ratio, 16), (batch, sk, kv_heads, 16), (batch, sk, kv_heads, 24)]
    return [normal(shape, dtype, seed) for shape in shapes]


def cumulated(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def assert_is(got: Any, expected: np.ndarray, kind: Any, dtype: str) -> None:
    """`got` is an array of `kind` and `dtype`, and `expected` (float64) rounded to it."""
    assert type(got) is kind
    assert str(got.dtype).removeprefix("torch.") == dtype
    np.testing.assert_array_equal(read(got), expected.astype(dtype).astype(np.float64), strict=True)


# ---- wrong arguments: what differs from a right call, the error, what its one sentence says was given, and part of what it says is needed

Wrong = tuple[dict[str, Any], type[Exception], str, str]

WRONG_ANYWHERE: list[Wrong] = [
    *[
        ({name: lambda x, dtype=dtype: x.astype(dtype)}, TypeError, f"{name} has dtype {np.dtype(dtype).name}", "float16")
        for name, dtypes in (
            ("q", (np.float32, np.float64, np.int16, np.int32, np.bool_, ml_dtypes.float8_e4m3fn)),
            ("k", (np.float32, ml_dtypes.bfloat16)),
            ("v", (np.float32, ml_dtypes.bfloat16)),
            ("out", (np.float32, ml_dtypes.bfloat16)),
        )
        for dtype in dtypes
    ],
    ({"q": lambda x: x.astype(ml_dtypes.bfloat16)}, TypeError, "k has dtype float16", "bfloat16, as q has"),
    *[
        ({name: value}, TypeError, f"{name} is a {type(value).__name__}", "a NumPy, CuPy, torch or JAX array")
        for name in ("q", "k", "v")
        for value in (None, [1.0, 2.0], "x")
    ],
    ({"out": [1.0]}, TypeError, "out is a list", "a NumPy, CuPy, torch or JAX array"),
    *[
        ({"q": lambda x, d=d: np.resize(x, (*x.shape[:-1], d))}, ValueError, f"q has head_dim {d}", "a multiple of 8 from 8 to 256")
        for d in (0, 1, 4, 20, 264)
    ],
    ({"k": lambda x: x[..., :12]}, ValueError, "k has head_dim 12", "a multiple of 8 from 8 to 256"),
    ({"v": lambda x: x[..., :20]}, ValueError, "v has head_dim 20", "a multiple of 8 from 8 to 256"),
    ({"v": lambda x: np.resize(x, (*x.shape[:-1], 264))}, ValueError, "v has head_dim 264", "a multiple of 8 from 8 to 256"),
    ({"k": lambda x: x[..., :8]}, ValueError, "k has head_dim 8", "16, as q has"),
    ({"q": lambda x: x[..., :3, :]}, ValueError, "q has 3 heads and k has 2", "a multiple of k's heads"),
    ({"q": lambda x: x[..., :1, :]}, ValueError, "q has 1 heads and k has 2", "a multiple of k's heads"),
    ({"k": lambda x: x[..., :0, :], "v": lambda x: x[..., :0, :]}, ValueError, "q has 4 heads and k has 0", "a multiple of k's heads"),
    *[
        ({"causal": causal}, ValueError, f"causal is {causal!r}", "False, True or 'top-left'")
        for causal in (None, 0, 1, 1.0, "top_left", "bottom-right", ["top-left"])
    ],
    *[({"window": window}, ValueError, f"window is {window!r}", "(left, right)") for window in (3, -1, (), (1,), (1, 2, 3), {1, 2}, 2.5)],
    *[
        ({"window": window}, ValueError, f"window is {window!r}", "from 0 up, None or -1")
        for window in ((-2, 0), (0, -2), (1.0, 0), (0, math.nan), "ab", (None, "1"), ([1], 1))
    ],
    *[
        ({"scale": scale}, ValueError, f"scale is {scale}", "a finite number above 0")
        for scale in (0, 0.0, -1, math.nan, math.inf, -math.inf)
    ],
    *[({"scale": scale}, TypeError, f"scale is {scale!r}", "a finite number above 0") for scale in ("0.1", [0.1], 1j, np.ones(2))],
    ({"out": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)}, ValueError, "out is read-only", "an array to write to"),
]

WRONG_DENSE: list[Wrong] = [
    *[({name: lambda x: x[0]}, ValueError, f"{name} has shape {shape}", "(B, S") for name, shape in (("q", (5, 4, 16)), ("k", (7, 2, 16)))],
    ({"v": lambda x: x[None]}, ValueError, "v has shape (1, 2, 7, 2, 24)", "(B, Sk, Hkv, Dv)"),
    ({"q": np.ones((), np.float16)}, ValueError, "q has shape ()", "(B, Sq, Hq, D)"),
    ({"k": lambda x: x[:1], "v": lambda x: x[:1]}, ValueError, "k has batch 1", "2, as q has"),
    ({"v": lambda x: x[:1]}, ValueError, "v has batch 1", "2, as q has"),
    ({"v": lambda x: x[:, :6]}, ValueError, "v has 6 rows of 2 heads", "7 rows of 2 heads, as k has"),
    ({"v": lambda x: x[:, :, :1]}, ValueError, "v has 7 rows of 1 heads", "7 rows of 2 heads, as k has"),
    ({"out": lambda x: x[:1]}, ValueError, "out has shape (1, 5, 4, 24)", "(2, 5, 4, 24)"),
    ({"out": lambda x: x[:, :, :1]}, ValueError, "out has shape (2, 5, 1, 24)", "(2, 5, 4, 24)"),
    ({"out": lambda x: x[..., :16]}, ValueError, "out has shape (2, 5, 4, 16)", "(2, 5, 4, 24)"),
    ({"out": lambda x: x[0]}, ValueError, "out has shape (5, 4, 24)", "(2, 5, 4, 24)"),
    ({"out": lambda x: x.swapaxes(1, 2)}, ValueError, "out has shape (2, 4, 5, 24)", "(2, 5, 4, 24)"),
    ({"out": lambda x: as_strided(x, strides=(0, 48, 48, 2))}, ValueError, "out has byte strides (0, 48, 48, 2)", "no two elements"),
]

WRONG_VARLEN: list[Wrong] = [
    ({"q": lambda x: x[None]}, ValueError, "q has shape (1, 10, 4, 16)", "(Tq, Hq, D)"),
    ({"k": lambda x: x[0]}, ValueError, "k has shape (2, 16)", "(Tk, Hkv, D)"),
    ({"v": lambda x: x[None]}, ValueError, "v has shape (1, 14, 2, 24)", "(Tk, Hkv, Dv)"),
    ({"v": lambda x: x[:13]}, ValueError, "v has 13 rows of 2 heads", "14 rows of 2 heads, as k has"),
    ({"out": lambda x: x[:9]}, ValueError, "out has shape (9, 4, 24)", "(10, 4, 24)"),
    ({"out": lambda x: x[:, :, :16]}, ValueError, "out has shape (10, 4, 16)", "(10, 4, 24)"),
    ({"out": lambda x: as_strided(x, strides=(192, 0, 2))}, ValueError, "out has byte strides (192, 0, 2)", "no two elements"),
    ({"cu_seqlens_q": None, "cu_seqlens_k": None}, TypeError, "cu_seqlens_q is a NoneType", "a NumPy"),
    ({"cu_seqlens_q": lambda x: x[:2]}, ValueError, "cu_seqlens_k has 3 entries", "2, as cu_seqlens_q has"),
    *[
        ({name: value}, error, f"{name} {what}", needed)
        for name, rows in (("cu_seqlens_q", 10), ("cu_seqlens_k", 14))
        for value, error, what, needed in (
            (None, TypeError, "is a NoneType", "a NumPy"),
            ([0, 5, 10], TypeError, "is a list", "a NumPy"),
            (np.array([0, 5, 10]), TypeError, "has dtype int64", "int32"),
            (np.array([0, 5, 10], np.uint32), TypeError, "has dtype uint32", "int32"),
            (np.array([0.0, 5, 10]), TypeError, "has dtype float64", "int32"),
            (np.array([[0, 5, 10]], np.int32), ValueError, "has shape (1, 3) and byte strides (12, 4)", "(B + 1,)"),
            (np.array(0, np.int32), ValueError, "has shape () and byte strides ()", "(B + 1,)"),
            (np.array([0], np.int32)[:0], ValueError, "has shape (0,) and byte strides (4,)", "(B + 1,)"),
            (np.array([0, 9, 5, 9, 10, 9], np.int32)[::2], ValueError, "has shape (3,) and byte strides (8,)", "contiguous"),
            (np.array([1, 5, 10], np.int32), ValueError, "is [1, 5, 10]", f"ascending from 0 to at most {rows}"),
            (np.array([-1, 5, 10], np.int32), ValueError, "is [-1, 5, 10]", f"ascending from 0 to at most {rows}"),
            (np.array([0, 8, 5], np.int32), ValueError, "is [0, 8, 5]", f"ascending from 0 to at most {rows}"),
            (np.array([0, 5, rows + 1], np.int32), ValueError, f"is [0, 5, {rows + 1}]", f"ascending from 0 to at most {rows}"),
        )
    ],
]


def right_call(varlen: bool, dtype: str = "float16") -> dict[str, Any]:
    q, k, v = dense(dtype=dtype)
    call = {"q": q, "k": k, "v": v, "out": np.full((2, 5, 4, 24), 7, dtype)}
    if not varlen:
        return call
    packed = {name: x.reshape(-1, *x.shape[2:]) for name, x in call.items()}
    return packed | {"cu_seqlens_q": cumulated([5, 5]), "cu_seqlens_k": cumulated([7, 7])}


def function(varlen: bool) -> Callable[..., Any]:
    return attention_varlen if varlen else attention


def assert_refused(call: Callable[[], Any], error: type[Exception], said: str, needed: str) -> None:
    with pytest.raises(error) as caught:
        call()
    before, _, remedy = str(caught.value).partition("; needed: ")
    assert (type(caught.value), before) == (error, said)
    assert needed in remedy and "\n" not in remedy


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_the_call_that_the_wrong_ones_differ_from_is_right(varlen: bool) -> None:
    call = right_call(varlen)
    assert function(varlen)(**call) is call["out"] and (call["out"] != 7).all()


@pytest.mark.parametrize(
    ("varlen", "changes", "error", "said", "needed"),
    [
        pytest.param(varlen, *wrong, id=f"{'varlen' if varlen else 'dense'}-{wrong[2]}")
        for varlen, wrongs in ((False, WRONG_ANYWHERE + WRONG_DENSE), (True, WRONG_ANYWHERE + WRONG_VARLEN))
        for wrong in wrongs
    ],
)
def test_wrong_argument(varlen: bool, changes: dict[str, Any], error: type[Exception], said: str, needed: str) -> None:
    call = right_call(varlen)
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    before = np.array(call["out"])
    assert_refused(lambda: function(varlen)(**call), error, said, needed)
    np.testing.assert_array_equal(call["out"], before)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", ["q", "v", "out", "cu_seqlens_q"])
def test_frameworks_do_not_mix(framework: str, name: str) -> None:
    call = right_call(varlen=True)
    out, call[name] = call["out"], given_as(framework, call[name])
    odd, kind, of_q = ("k", "numpy", framework) if name == "q" else (name, framework, "numpy")
    said = f"{odd} is a {kind} array in host memory but q is a {of_q} array in host memory"
    assert_refused(lambda: attention_varlen(**call), ValueError, said, "one framework and one device")
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_tensor_that_requires_grad_is_refused(name: str) -> None:
    call = {key: given_as("torch", x) for key, x in right_call(varlen=False).items()}
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} requires grad; .*: pass {name}\.detach\(\) or use torch\.no_grad\(\)$"):
        attention(**call)
    assert (call["out"] == 7).all()


def test_a_broadcast_torch_out_is_refused() -> None:
    call = {key: given_as("torch", x) for key, x in right_call(varlen=False).items()}
    call["out"] = call["out"][:, :, :1].expand(2, 5, 4, 24)
    assert_refused(lambda: attention(**call), ValueError, "out has byte strides (960, 192, 0, 2)", "no two elements in one place")
    assert (call["out"] == 7).all()


def test_a_jax_out_is_refused() -> None:
    call = {key: given_as("jax", x) for key, x in right_call(varlen=False).items()}
    assert_refused(lambda: attention(**call), TypeError, "out is a jax.Array, which nothing may write to", "no out")
    assert (read(call["out"]) == 7).all()


def test_a_jax_tracer_is_refused() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v = (given_as("jax", x) for x in dense())
    with pytest.raises(TypeError, match=r"^k is a JAX tracer; .*: call it outside jax\.jit, jax\.vmap and jax\.grad"):
        jax.jit(lambda k: attention(q, k, v))(k)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_wrong_call_after_a_right_one_of_the_same_geometry(framework: str) -> None:
    call = {name: given_as(framework, x) for name, x in right_call(varlen=True).items() if name != "out"}
    first = read(attention_varlen(**call))
    wrong = call | {"cu_seqlens_q": given_as(framework, np.array([0, 11, 10], np.int32))}
    assert_refused(lambda: attention_varlen(**wrong), ValueError, "cu_seqlens_q is [0, 11, 10]", "ascending")
    assert_refused(lambda: attention_varlen(**call, scale=-1), ValueError, "scale is -1", "above 0")
    np.testing.assert_array_equal(read(attention_varlen(**call)), first)


# ---- wrong arrays on a GPU: CuPy arrays over addresses that nobody reads, for the refusal comes before the GPU


SHAPE = (2, 4, 2, 16)


def on_gpu(
    shape: tuple[int, ...] = SHAPE, strides: tuple[int, ...] | None = None, offset: int = 0, device: int = 0, dtype: Any = np.float16
) -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    memory = cupy.cuda.UnownedMemory(0x30000, 1 << 20, None, device)
    return cupy.ndarray(shape, np.dtype(dtype), cupy.cuda.MemoryPointer(memory, offset), strides)


@pytest.mark.parametrize(
    ("name", "array", "error", "said", "needed"),
    [
        ("k", dict(strides=(512, 128, 64, 4)), ValueError, "k has a byte stride of 4 on its last axis", "2, contiguous"),
        ("q", dict(strides=(320, 80, 40, 2)), ValueError, "q has byte strides (320, 80, 40, 2)", "multiples of 16"),
        ("v", dict(strides=(256, -64, 32, 2), offset=192), ValueError, "v has byte strides (256, -64, 32, 2)", "multiples of 16 from 0"),
        ("out", dict(strides=(264, 64, 32, 2)), ValueError, "out has byte strides (264, 64, 32, 2)", "multiples of 16"),
        ("out", dict(strides=(256, 64, 0, 2)), ValueError, "out has byte strides (256, 64, 0, 2)", "no two elements in one place"),
        *[(name, dict(offset=8), ValueError, f"{name} starts at address 0x30008", "a multiple of 16") for name in ("q", "k", "v", "out")],
        ("k", dict(dtype=ml_dtypes.bfloat16), TypeError, "k has dtype bfloat16", "float16, as q has"),
        ("v", dict(shape=(1, 4, 2, 16)), ValueError, "v has batch 1", "2, as q has"),
        ("v", dict(device=1), ValueError, "v is a cupy array on GPU 1 but q is a cupy array on GPU 0", "one device"),
        ("k", None, ValueError, "k is a numpy array in host memory but q is a cupy array on GPU 0", "one device"),
        ("out", None, ValueError, "out is a numpy array in host memory but q is a cupy array on GPU 0", "one device"),
    ],
)
def test_wrong_gpu_array(name: str, array: dict[str, Any] | None, error: type[Exception], said: str, needed: str) -> None:
    call = {key: on_gpu() for key in ("q", "k", "v", "out")}
    with pytest.raises(ValueError, match="^q starts at"):  # the plan of the right geometry is kept, and must not serve the wrong one
        attention(**call | {"q": on_gpu(offset=8)})
    call[name] = np.zeros(SHAPE, np.float16) if array is None else on_gpu(**array)
    assert_refused(lambda: attention(**call), error, said, needed)


def test_gpu_arrays_where_no_gpu_can_be_used() -> None:
    """In a process that sees no GPU, whatever the machine has."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    code = """
import cupy, numpy as np, rawattn
memory = cupy.cuda.UnownedMemory(0x30000, 1 << 20, None, 0)
for shape in (2, 4, 2, 16), (2, 0, 2, 16):
    x = cupy.ndarray(shape, np.float16, cupy.cuda.MemoryPointer(memory, 0))
    for out in (None, x):
        try:
            rawattn.attention(x, x, x, out=out)
        except rawattn.UnsupportedEnvironment as error:
            print(error)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.fullmatch(r"(.*NVIDIA driver .*: .*\n){4}", done.stdout), done.stdout + done.stderr


# ---- the host path: the reference in float64, rounded


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_result_is_of_the_callers_kind(framework: str, dtype: str, varlen: bool) -> None:
    call = right_call(varlen, dtype)
    del call["out"]
    wide = [x if x.dtype == np.int32 else x.astype(np.float64) for x in call.values()]
    expected, expected_lse = (reference.attention_varlen if varlen else reference.attention)(*wide, causal=True, return_lse=True)
    inputs = {name: given_as(framework, x) for name, x in call.items()}
    kind = type(inputs["q"])
    alone = function(varlen)(**inputs, causal=True)
    out, lse = function(varlen)(**inputs, causal=True, return_lse=True)
    assert_is(alone, expected, kind, dtype)
    assert_is(out, expected, kind, dtype)
    assert_is(lse, expected_lse, kind, "float32")
    assert getattr(out, "device", None) == getattr(inputs["q"], "device", None)
    for name, x in call.items():
        np.testing.assert_array_equal(read(inputs[name]), x.astype(np.float64), f"{name} was changed")


@settings(deadline=None)
@given(st.data(), MASKS, st.sampled_from(DTYPES), st.sampled_from([None, 0.3, 2]))
def test_every_row_is_full_attention_to_the_keys_it_sees(data: Any, masks: dict[str, Any], dtype: str, scale: float | None) -> None:
    sq, sk, batch, kv_heads = (data.draw(st.integers(0, most), name) for most, name in ((7, "Sq"), (7, "Sk"), (2, "B"), (2, "Hkv")))
    q, k, v = dense(batch, sq, sk, kv_heads, dtype, data.draw(st.integers(0, 99), "seed"), data.draw(st.sampled_from([1, 2, 7]), "ratio"))
    out, lse = attention(q, k, v, **masks, scale=scale, return_lse=True)
    assert (out.dtype, out.shape) == (q.dtype, (*q.shape[:3], v.shape[3]))
    assert (lse.dtype, lse.shape) == (np.float32, (batch, q.shape[2], sq))
    left, right = (math.inf if side in (None, -1) else side for side in masks["window"] or (None, None))
    for i in range(sq):
        diagonal = i if masks["causal"] == "top-left" else i + sk - sq
        seen = [j for j in range(sk) if diagonal - left <= j <= diagonal + (min(right, 0) if masks["causal"] else right)]
        row, row_lse = out[:, i], lse[:, :, i]
        if seen:
            expected, expected_lse = attention(q[:, i : i + 1], k[:, seen], v[:, seen], scale=scale, return_lse=True)
            np.testing.assert_array_equal(row, expected[:, 0])
            np.testing.assert_allclose(row_lse, expected_lse[:, :, 0], rtol=1e-6, atol=1e-6)  # a sum in another order may round otherwise
        else:
            assert (row == 0).all() and (row_lse == -math.inf).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"window": (None, 0)}, {"causal": True}),
        ({"window": (-1, 0)}, {"causal": True}),
        ({"window": (-1, -1)}, {}),
        ({"window": (None, -1)}, {}),
        ({"window": (10**12, 10**12)}, {}),
        ({"causal": True, "window": (2, 3)}, {"window": (2, 0)}),
        ({"causal": True, "window": (2, 0)}, {"window": (2, 0)}),
        ({"causal": True, "window": (2, None)}, {"window": (2, 0)}),
        ({"causal": "top-left", "window": (2, 3)}, {"causal": "top-left", "window": (2, -1)}),
        ({"causal": np.bool_(True)}, {"causal": True}),
        ({"window": [np.int64(2), np.int8(1)]}, {"window": (2, 1)}),
        ({"scale": 0.25}, {}),  # D is 16
        ({"scale": np.float32(0.5)}, {"scale": 0.5}),
        ({"scale": 1}, {"scale": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (4, 9), (9, 4)])
def test_two_ways_to_say_the_same(sq: int, sk: int, one: dict[str, Any], other: dict[str, Any]) -> None:
    q, k, v = dense(sq=sq, sk=sk)
    for a, b in zip(attention(q, k, v, **one, return_lse=True), attention(q, k, v, **other, return_lse=True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (4, 9), (9, 4)])
def test_top_left_ends_at_key_sq(sq: int, sk: int) -> None:
    q, k, v = dense(sq=sq, sk=sk)
    out = attention(q, k, v, causal="top-left")
    n = min(sq, sk)
    np.testing.assert_array_equal(out[:, :n], attention(q[:, :n], k[:, :n], v[:, :n], causal=True))
    np.testing.assert_array_equal(out[:, n:], attention(q[:, n:], k, v))
    assert np.array_equal(out, attention(q, k, v, causal=True)) == (sq == sk)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("batch", "sq", "sk"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
def test_no_rows_or_no_keys(framework: str, batch: int, sq: int, sk: int) -> None:
    inputs = [given_as(framework, x) for x in dense(batch, sq, sk)]
    out, lse = attention(*inputs, causal=True, return_lse=True)
    assert_is(out, np.zeros((batch, sq, 4, 24)), type(inputs[0]), "float16")
    assert_is(lse, np.full((batch, 4, sq), -math.inf), type(inputs[0]), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_any_strides_with_no_change_of_a_bit(framework: str, dtype: str) -> None:
    """Transposed (B, H, S, D) arrays, slices of a packed QKV array, steps: the numbers of a contiguous copy; `out` likewise."""
    bhsd = given_as(framework, normal((2, 4, 10, 24), dtype))
    packed = given_as(framework, normal((2, 9, 3, 2, 24), dtype))
    q = bhsd.swapaxes(1, 2)[:, 1::2, :, 8:]
    k, v = packed[:, 2:, 1, :, :16], packed[:, 2:, 2]
    copies = [given_as(framework, np.ascontiguousarray(read(x).astype(dtype))) for x in (q, k, v)]
    expected, expected_lse = attention(*copies, causal=True, return_lse=True)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(read(out), read(expected))
    np.testing.assert_array_equal(read(lse), read(expected_lse))

    around = given_as(framework, np.full((2, 4, 7, 32), 7, dtype))
    target = around.swapaxes(1, 2)[:, 1:6, :, 4:28]
    assert attention(q, k, v, causal=True, out=target) is target
    np.testing.assert_array_equal(read(target), read(expected))
    target[...] = 7
    assert (read(around) == 7).all()


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_out_is_written_and_returned(framework: str, dtype: str, varlen: bool) -> None:
    call = {name: given_as(framework, x) for name, x in right_call(varlen, dtype).items()}
    out = call.pop("out")
    expected, expected_lse = function(varlen)(**call, return_lse=True)
    assert function(varlen)(**call, out=out) is out
    np.testing.assert_array_equal(read(out), read(expected))
    out[...] = 7
    returned, lse = function(varlen)(**call, out=out, return_lse=True)
    assert returned is out
    np.testing.assert_array_equal(read(out), read(expected))
    np.testing.assert_array_equal(read(lse), read(expected_lse))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@settings(max_examples=40, deadline=None)  # the first example imports the framework
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4), st.integers(0, 2), MASKS, st.sampled_from(DTYPES))
def test_varlen_is_a_loop(framework: str, lengths: list[tuple[int, int]], spare: int, masks: dict[str, Any], dtype: str) -> None:
    """Of attention() over the sequences; zero lengths, no sequence at all, and rows behind the last one are legal."""
    cu_q, cu_k = (cumulated([pair[side] for pair in lengths]) for side in (0, 1))
    q, k, v = (x[0] for x in dense(1, int(cu_q[-1]) + spare, int(cu_k[-1]) + spare, dtype=dtype))
    inputs = [given_as(framework, x) for x in (q, k, v, cu_q, cu_k)]
    out, lse = attention_varlen(*inputs, **masks, scale=0.3, return_lse=True)
    assert type(out) is type(lse) is type(inputs[0]) and out.dtype == inputs[0].dtype
    assert out.shape == (len(q), 4, 24) and lse.shape == (4, len(q))
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        alone, alone_lse = attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], **masks, scale=0.3, return_lse=True)
        np.testing.assert_array_equal(read(out)[q0:q1], read(alone[0]))
        np.testing.assert_array_equal(read(lse)[:, q0:q1], read(alone_lse[0]))
