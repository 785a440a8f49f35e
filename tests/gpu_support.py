"""What the tests on a GPU share: arrays in poisoned memory, the rule that results are judged by, and the frameworks."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rawattn import compiler, reference
from rawattn.spec import KernelSpec

cp = pytest.importorskip("cupy")

DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
POISON = 0xFFFF  # the bits of a NaN in float16 and in bfloat16
GUARD = 4096  # poisoned elements before and after every array


# ---- arrays in poisoned memory


@functools.cache
def _normal_kernel() -> Any:
    # Box-Muller over SplitMix64, so that the tests need neither cuRAND nor a copy from the host.
    return cp.ElementwiseKernel(
        "uint64 seed",
        "float32 x",
        """unsigned long long z = ((seed << 32) + (unsigned long long)i) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        x = sqrtf(-2.0f * logf(((unsigned)(z >> 40) + 1) * 0x1p-24f)) * cospif((unsigned)(z & 0xFFFFFF) * 0x1p-23f);""",
        "rawattn_test_normal",
    )


_seeds = itertools.count()


def seed(test: str) -> None:
    """Each test has the same numbers whether it runs alone or among the others."""
    global _seeds
    _seeds = itertools.count(zlib.crc32(test.encode()) // 2)


def normal(shape: tuple[int, ...], dtype: str) -> Any:
    """N(0, 1) numbers, in each call of a test other ones."""
    x = cp.empty(shape, np.float32)
    if x.size:
        _normal_kernel()(next(_seeds), x)
    return x.astype(DTYPES[dtype])


def strides_of(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a (B, S, H, D) array."""
    b, s, h, d = shape
    if layout == "contiguous":
        return s * h * d, h * d, d, 1
    if layout == "bhsd":  # a transposed (B, H, S, D) array
        return h * s * d, d, s * d, 1
    if layout == "sbhd":  # a transposed (S, B, H, D) array
        return h * d, b * h * d, d, 1
    if layout == "padded":  # every row, head and sequence is followed by memory that belongs to nobody
        head = d + 8
        row = h * head + 16
        return s * row + 24, row, head, 1
    if layout == "every other sequence":
        return 2 * s * h * d, h * d, d, 1
    raise AssertionError(layout)


LAYOUTS = ("contiguous", "bhsd", "sbhd", "padded", "every other sequence")


def poisoned(shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]) -> tuple[Any, Any]:
    """An array of NaNs with `strides` (in elements), and the buffer of NaNs around it."""
    extent = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    buffer = cp.full(GUARD + extent + GUARD, POISON, np.uint16)
    view = cp.lib.stride_tricks.as_strided(buffer[GUARD:].view(DTYPES[dtype]), shape, tuple(2 * stride for stride in strides))
    return view, buffer


def poison(x: Any) -> None:
    x.view(np.uint16)[...] = POISON


def strided(values: Any, layout: str) -> Any:
    """A copy of `values` in the given layout, with NaNs in all the memory around it."""
    view, _ = poisoned(values.shape, values.dtype.name, strides_of(layout, values.shape))
    view[...] = values
    return view


def packed_qkv(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Copies of q, k and v as slices of one array whose rows hold the heads of q, k and v, then eight NaNs."""
    batch, rows = q.shape[:2]
    widths = [x.shape[2] * x.shape[3] for x in (q, k, v)]
    row = sum(widths) + 8
    whole, _ = poisoned((batch, rows, row), q.dtype.name, (rows * row, row, 1))
    views, start = [], 0
    for x, width in zip((q, k, v), widths, strict=True):
        head_dim = x.shape[3]
        shape, strides = x.shape, (2 * rows * row, 2 * row, 2 * head_dim, 2)
        views.append(cp.lib.stride_tricks.as_strided(whole[:, :, start : start + width], shape, strides))
        views[-1][...] = x
        start += width
    return views[0], views[1], views[2]


def untouched_outside(view: Any, buffer: Any) -> bool:
    """Whether `buffer` still holds nothing but poison outside of `view`, which this overwrites."""
    poison(view)
    return bool((buffer == POISON).all())


def same_bits(a: Any, b: Any) -> bool:
    kind = np.dtype(f"u{a.dtype.itemsize}")
    return a.shape == b.shape and bool((cp.ascontiguousarray(a).view(kind) == cp.ascontiguousarray(b).view(kind)).all())


# ---- the rule


MAX_ERROR = {"float16": 4.9e-4, "bfloat16": 3.9e-3}
FEW_KEYS = 64
ENOUGH_ELEMENTS = 8192


def assert_close(out: Any, expected: Any, few_keys: bool = False, l2_factor: float = 1.5) -> None:
    """Relative L2 error at most 1.5 times that of rounding `expected` (float64) to the dtype; max error at most MAX_ERROR or 1.25 times it.

    Where rounding costs nothing, as with one key, no error is allowed. Where a window leaves rows few keys, few weights are rounded and the
    luck of one of them shows: with `few_keys` the max error may be 2.5 times that of the rounding (simulated rows reached 1.9). Other masks
    need no such leave, for the kernel does not round the weights of a sequence's first keys where a row sees few others.
    """
    assert out.shape == expected.shape
    if out.size == 0:
        return
    dtype = out.dtype.name
    error = cp.abs(out.astype(np.float64) - expected)
    error[cp.isnan(error)] = math.inf
    rounding = cp.abs(expected.astype(out.dtype).astype(np.float64) - expected)
    norm = math.sqrt(float((expected * expected).sum())) or 1.0
    l2, l2_rounding = (math.sqrt(float((e * e).sum())) / norm for e in (error, rounding))
    worst, worst_rounding = float(error.max()), float(rounding.max())
    l2_limit = l2_factor * l2_rounding
    max_limit = max(MAX_ERROR[dtype], (2.5 if few_keys else 1.25) * worst_rounding) if l2_rounding else 0.0
    if not (l2 <= l2_limit and worst <= max_limit):
        at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        wrong = error > max_limit
        raise AssertionError(
            f"relative L2 error {l2:.3g} (limit {l2_limit:.3g}, rounding {l2_rounding:.3g}); "
            f"max error {worst:.3g} (limit {max_limit:.3g}, rounding {worst_rounding:.3g}) at {at} of {out.shape}: "
            f"{float(out[at]):.6g}, expected {float(expected[at]):.6g}; {int(wrong.sum())} elements over the limit, "
            f"{int(cp.isnan(out.astype(np.float64)).sum())} NaN"
        )


def assert_lse_close(lse: Any, expected: Any) -> None:
    """-inf at the same places, and elsewhere an error of at most 2e-5, relative above 1."""
    assert lse.dtype == np.float32 and lse.shape == expected.shape
    if lse.size == 0:
        return
    empty = expected == -math.inf
    error = cp.where(empty, 0, cp.abs(lse.astype(np.float64) - cp.where(empty, 0, expected)))
    error = error / cp.maximum(1, cp.abs(cp.where(empty, 0, expected)))
    error[cp.isnan(error) | (empty != (lse == -math.inf))] = math.inf
    if float(error.max()) > 2e-5:
        at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        raise AssertionError(
            f"LSE error {float(error.max()):.3g} (limit 2e-5) at {at} of {lse.shape}: {float(lse[at]):.8g}, "
            f"expected {float(expected[at]):.8g}; {int((error > 2e-5).sum())} elements over the limit"
        )


def assert_right(out: Any, lse: Any, q: Any, k: Any, v: Any, masks: dict[str, Any]) -> None:
    """`out` and `lse` of dense q, k and v by the rule; the L2 limit is wider where too few elements are rounded for it to be certain."""
    expected, expected_lse = reference.attention(q, k, v, **masks, return_lse=True)
    causal, window = masks.get("causal", False), masks.get("window")
    first, last = reference.visible_keys(q.shape[1], k.shape[1], causal, window)
    seen = last - first
    bounded_left = window is not None and window[0] not in (None, -1)
    few_keys = bounded_left and bool(((seen > 1) & (seen < FEW_KEYS)).any())
    rounded_elements = int((seen > 1).sum()) * q.shape[0] * q.shape[2] * v.shape[3]
    try:
        assert_close(out, expected, few_keys, l2_factor=1.5 if rounded_elements >= ENOUGH_ELEMENTS else 2.5)
        assert_lse_close(lse, expected_lse)
    except AssertionError as error:
        raise AssertionError(f"q {q.shape}, k {k.shape}, v {v.shape}: {error}") from None


# ---- variants


def compile_in_parallel(variants: list[KernelSpec], config: pytest.Config) -> None:
    """In processes, showing how far it is. One that fails fails again, with its log, in its own test."""
    specs = list(dict.fromkeys(variants))
    capture = config.pluginmanager.getplugin("capturemanager")
    workers = min(os.cpu_count() or 1, len(specs))
    with capture.global_and_fixture_disabled(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failed = 0
        for done, future in enumerate(as_completed([pool.submit(compiler.build, spec) for spec in specs]), start=1):
            failed += future.exception() is not None
            if done % 20 == 0 or done == len(specs):
                print(f"\n{done} of {len(specs)} variants compiled, {failed} failed", end="", flush=True)


# ---- frameworks


def torch_on_gpu() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch


def jax_on_gpu() -> Any:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX sees no GPU: {error}")
    return jax
