"""attention_with_kvcache() and KVCache without a GPU: the host path against a loop over rows, and every wrong argument by name."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_support import given_as, read
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import rawattn
from rawattn import KVCache, attention, attention_with_kvcache

D, DV, KV_HEADS, RATIO = 32, 24, 2, 3


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float16") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# ---- the definition, a row at a time, in float64


def turned(row: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, dtype: Any) -> np.ndarray:
    """(D,) rotated as complex numbers, and rounded to dtype."""
    row, half = row.copy(), len(cos)
    real, imaginary = (np.arange(half) * 2, np.arange(half) * 2 + 1) if interleaved else (np.arange(half), np.arange(half) + half)
    z = (row[real] + 1j * row[imaginary]) * (cos + 1j * sin)
    row[real], row[imaginary] = z.real, z.imag
    return row.astype(dtype).astype(np.float64)


def loop(call: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, LSE, and the caches afterwards, all float64."""
    dtype = call["q"].dtype
    wide = {name: x.astype(np.float64) for name, x in call.items() if isinstance(x, np.ndarray) and x.dtype != np.int32}
    k_cache, v_cache = wide["k_cache"], wide["v_cache"]
    cos, sin = (wide.get(name) for name in ("rotary_cos", "rotary_sin"))
    lengths, table = call["cache_seqlens"], call.get("page_table")
    window = [math.inf if side in (None, -1) else side for side in call.get("window") or (None, None)]
    causal = call.get("causal", True)
    if "cu_seqlens_q" in call:
        ends = call["cu_seqlens_q"].tolist()
        places: list[list[tuple[int, ...]]] = [[(i,) for i in range(ends[b], ends[b + 1])] for b in range(len(ends) - 1)]
    else:
        places = [[(b, i) for i in range(call["q"].shape[1])] for b in range(call["q"].shape[0])]

    def place(b: int, position: int) -> tuple[int, int]:
        if table is not None:
            size = k_cache.shape[1]
            return int(table[b, position // size]), position % size
        return int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b, position

    out = np.zeros((*call["q"].shape[:-1], v_cache.shape[-1]))
    lse = np.full(call["q"].shape[:-1], -math.inf)  # (B, Sq, Hq) or (Tq, Hq); transposed at the end
    for b, rows in enumerate(places):
        length = int(lengths[b])
        for i, row in enumerate(rows if "k" in call else []):
            for h in range(k_cache.shape[2]):
                key = wide["k"][row][h]
                k_cache[place(b, length + i) + (h,)] = (
                    key if cos is None or sin is None else turned(key, cos[length + i], sin[length + i], call["rotary_interleaved"], dtype)
                )
                v_cache[place(b, length + i) + (h,)] = wide["v"][row][h]
        keys = length + (len(rows) if "k" in call else 0)
        for i, row in enumerate(rows):
            diagonal = i + keys - len(rows)
            right = min(window[1], 0) if causal else window[1]
            first = int(call["cache_leftpad"][b]) if "cache_leftpad" in call else 0
            seen = [place(b, j) for j in range(first, keys) if diagonal - window[0] <= j <= diagonal + right]
            for h in range(call["q"].shape[-2] if seen else 0):
                query = wide["q"][row][h]
                if cos is not None and sin is not None:
                    at = length + (i if causal or window != [math.inf, math.inf] else 0)
                    query = turned(query, cos[at], sin[at], call["rotary_interleaved"], dtype)
                scores = np.array([k_cache[p][h // RATIO] @ query for p in seen]) * call.get("scale", 1 / math.sqrt(D))
                weights = np.exp(scores - scores.max())
                out[row][h] = sum(w * v_cache[p][h // RATIO] for w, p in zip(weights / weights.sum(), seen, strict=True))
                lse[row][h] = scores.max() + math.log(weights.sum())
    return out, lse.swapaxes(-1, -2), k_cache, v_cache


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": (2, -1)},
    {"causal": False, "window": (3, 1)},
    {"causal": False, "window": (None, 2)},
]
OPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["float16", "bfloat16"]),
        "lengths": st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=3),  # of the cache, and of q if ragged
        "rows": st.integers(0, 4),
        "page_size": st.sampled_from([None, None, 1, 3, 4]),
        "ragged": st.booleans(),
        "append": st.booleans(),
        "rotary": st.sampled_from([None, 16, 32]),
        "interleaved": st.booleans(),
        "leftpad": st.booleans(),
        "batch_idx": st.booleans(),
        "mask": st.sampled_from(MASKS),
        "seed": st.integers(0, 99),
    }
)
PLAIN: dict[str, Any] = {
    "dtype": "float16", "lengths": [(5, 2), (0, 0), (9, 3)], "rows": 2, "page_size": None, "ragged": False, "append": True, "rotary": 16,
    "interleaved": False, "leftpad": False, "batch_idx": False, "mask": {}, "seed": 0,
}  # fmt: skip


def make(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a call: NaN in the caches where there is no key, nonsense in the page table where no page is used."""
    rng = np.random.default_rng(options["seed"])
    dtype, page_size, batch = options["dtype"], options["page_size"], len(options["lengths"])
    lengths = np.array([length for length, _ in options["lengths"]], np.int32)
    rows = [new for _, new in options["lengths"]] if options["ragged"] else [options["rows"]] * batch
    call: dict[str, Any] = {"cache_seqlens": lengths, **options["mask"]}
    capacity = 13
    if page_size is None:
        k_cache, v_cache = (np.full((batch + 2, capacity, KV_HEADS, d), np.nan, dtype) for d in (D, DV))
        index = rng.permutation(batch + 2)[:batch]
        if options["batch_idx"]:
            call["cache_batch_idx"] = index.astype(np.int32)
        else:
            k_cache, v_cache, index = k_cache[:batch], v_cache[:batch], np.arange(batch)
        if options["leftpad"]:
            call["cache_leftpad"] = rng.integers(0, 4, batch).astype(np.int32)
        places = [[(index[b], j) for j in range(capacity)] for b in range(batch)]
    else:
        columns = -(-capacity // page_size)
        capacity = columns * page_size
        pages = rng.permutation(batch * columns + 1)
        k_cache, v_cache = (np.full((len(pages), page_size, KV_HEADS, d), np.nan, dtype) for d in (D, DV))
        table = pages[: batch * columns].reshape(batch, columns).astype(np.int32)
        places = [[(int(table[b, j // page_size]), j % page_size) for j in range(capacity)] for b in range(batch)]
        ends = lengths + (np.array(rows, int) if options["append"] else 0)
        for b in range(batch):
            table[b, -(-ends[b] // page_size) :] = 2**31 - 1 - b
        call["page_table"] = table
    for b, length in enumerate(lengths):
        for j in range(call["cache_leftpad"][b] if "cache_leftpad" in call else 0, length):
            for cache in (k_cache, v_cache):
                cache[places[b][j]] = normal(rng, cache.shape[2:], dtype)
    shape: tuple[int, ...] = (batch, options["rows"])
    if options["ragged"]:
        call["cu_seqlens_q"] = np.cumsum([0, *rows], dtype=np.int32)
        shape = (sum(rows) + 1,)  # a row that belongs to no sequence
    call |= {"q": normal(rng, (*shape, KV_HEADS * RATIO, D), dtype), "k_cache": k_cache, "v_cache": v_cache}
    if options["append"]:
        call |= {"k": normal(rng, (*shape, KV_HEADS, D), dtype), "v": normal(rng, (*shape, KV_HEADS, DV), dtype)}
        if options["rotary"]:
            angles = rng.uniform(0, 6, (capacity + 2, options["rotary"] // 2))
            call |= {"rotary_cos": np.cos(angles).astype(dtype), "rotary_sin": np.sin(angles).astype(dtype)}
            call["rotary_interleaved"] = options["interleaved"]
    return call


def check(framework: str, call: dict[str, Any]) -> None:
    inputs = {name: given_as(framework, x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    out, lse = attention_with_kvcache(**inputs, return_lse=True)
    assert type(out) is type(lse) is type(inputs["q"]) and out.dtype == inputs["q"].dtype
    before = {name: np.array(x) for name, x in call.items() if isinstance(x, np.ndarray)}
    expected, expected_lse, k_cache, v_cache = loop(call | before)
    ulp = 1e-3 if call["q"].dtype == np.float16 else 8e-3  # with rotary, an input may have been rounded the other way
    kept = slice(0, call["cu_seqlens_q"][-1] if "cu_seqlens_q" in call else None)
    np.testing.assert_allclose(read(out)[kept], expected[kept], rtol=ulp, atol=4 * ulp)
    np.testing.assert_allclose(
        read(lse)[..., kept] if "cu_seqlens_q" in call else read(lse),
        expected_lse[..., kept] if "cu_seqlens_q" in call else expected_lse,
        rtol=ulp,
        atol=4 * ulp,
    )
    np.testing.assert_allclose(read(inputs["k_cache"]), k_cache, rtol=ulp, atol=1e-6)
    np.testing.assert_array_equal(read(inputs["v_cache"]), v_cache)


@settings(deadline=None, max_examples=200)
@given(OPTIONS)
def test_any_batch_is_a_loop_over_rows(options: dict[str, Any]) -> None:
    check("numpy", make(options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [None, 4])
def test_torch_caches_are_written_in_place(page_size: int | None, dtype: str) -> None:
    check("torch", make(PLAIN | {"dtype": dtype, "page_size": page_size}))


def test_jax_caches_are_read_and_never_written() -> None:
    call = make(PLAIN | {"append": False, "rotary": None})
    check("jax", call)
    inputs = {name: given_as("jax", x) for name, x in make(PLAIN | {"rotary": None}).items() if name != "rotary_interleaved"}
    assert_refused(lambda: attention_with_kvcache(**inputs), TypeError, "k_cache is a jax.Array, which nothing may write to", "no k and v")


def test_strided_caches() -> None:
    """Keys and values side by side in one array, as one allocation of a cache has them."""
    plain = make(PLAIN)
    both = np.full((3, 13, 2, KV_HEADS, D), np.nan, np.float16)
    call = plain | {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1, :, :DV]}
    call["k_cache"][...], call["v_cache"][...] = plain["k_cache"], plain["v_cache"]
    np.testing.assert_array_equal(attention_with_kvcache(**call), attention_with_kvcache(**plain))
    np.testing.assert_array_equal(both[:, :, 0], plain["k_cache"])
    assert np.isnan(both[:, :, 1, :, DV:]).all()


def test_one_length_for_all() -> None:
    options = PLAIN | {"lengths": [(7, 0), (7, 0)]}
    one, other = make(options), make(options)
    for length in (7, np.int64(7)):
        np.testing.assert_array_equal(attention_with_kvcache(**(one | {"cache_seqlens": length})), attention_with_kvcache(**other))
        np.testing.assert_array_equal(one["k_cache"], other["k_cache"])


def test_out_and_lse() -> None:
    expected, expected_lse = attention_with_kvcache(**make(PLAIN), return_lse=True)
    target = np.full((3, 2, 6, DV), 7, np.float16)
    out, lse = attention_with_kvcache(**make(PLAIN), out=target, return_lse=True)
    assert out is target and lse.dtype == np.float32 and lse.shape == (3, 6, 2)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("empty", ["q", "keys", "batch", "capacity", "pages", "columns"])
def test_nothing_there(empty: str) -> None:
    sizes = {name: 0 if name == empty else n for name, n in (("batch", 2), ("q", 3), ("capacity", 5))}
    q = np.ones((sizes["batch"], sizes["q"], 4, 16), np.float16)
    pages, columns = (0 if name == empty else 4 for name in ("pages", "columns"))
    call: dict[str, Any] = {"cache_seqlens": np.zeros(sizes["batch"], np.int32)}
    cache_shape = (sizes["batch"], sizes["capacity"], 2, 16)
    if empty in ("pages", "columns"):
        call["page_table"] = np.zeros((sizes["batch"], columns), np.int32)
        cache_shape = (pages, 8, 2, 16)
    caches = np.zeros(cache_shape, np.float16)
    out, lse = attention_with_kvcache(q, caches, caches, return_lse=True, **call)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (len(q), 4, q.shape[1]) and (lse == -math.inf).all()


# ---- wrong arguments: what differs from a right call, the error, what its one sentence says was given, and part of what it says is needed


def assert_refused(call: Callable[[], Any], error: type[Exception], said: str, needed: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(said) and "\n" not in message, message
    assert "needed: " in message and needed in message.split("needed: ", 1)[1], message


def int32(*numbers: Any) -> np.ndarray:
    return np.array(numbers, np.int32)


CONTIGUOUS = PLAIN
PAGED = PLAIN | {"page_size": 4}
RAGGED = PLAIN | {"ragged": True}
Wrong = tuple[dict[str, Any], dict[str, Any], type[Exception], str, str]
WRONG: list[Wrong] = [
    *[
        (CONTIGUOUS, {name: [1.0]}, TypeError, f"{name} is a list", "a NumPy, CuPy, torch")
        for name in ("q", "k_cache", "v_cache", "k", "v")
    ],
    *[(PAGED, {name: [1]}, TypeError, f"{name} is a list", "a NumPy") for name in ("cache_seqlens", "page_table", "rotary_cos")],
    (CONTIGUOUS, {"cache_seqlens": None}, TypeError, "cache_seqlens is a NoneType", "a NumPy"),
    (CONTIGUOUS, {"cache_seqlens": True}, TypeError, "cache_seqlens is a bool", "a NumPy"),
    (CONTIGUOUS, {"cache_seqlens": 2.0}, TypeError, "cache_seqlens is a float", "a NumPy"),
    *[
        (CONTIGUOUS, {name: lambda x: x.astype(ml_dtypes.bfloat16)}, TypeError, f"{name} has dtype bfloat16", "float16, as q has")
        for name in ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")
    ],
    (CONTIGUOUS, {"q": lambda x: x.astype(np.float32)}, TypeError, "q has dtype float32", "float16 or bfloat16"),
    (CONTIGUOUS, {"k": None}, ValueError, "k is None but v is given", "both or neither"),
    (CONTIGUOUS, {"v": None}, ValueError, "v is None but k is given", "both or neither"),
    (CONTIGUOUS, {"rotary_sin": None}, ValueError, "rotary_sin is None but rotary_cos is given", "both or neither"),
    (CONTIGUOUS, {"rotary_cos": None}, ValueError, "rotary_cos is None but rotary_sin is given", "both or neither"),
    (CONTIGUOUS, {"k": None, "v": None}, ValueError, "rotary_cos is given but k is None", "k and v with it"),
    (PAGED, {"cache_batch_idx": int32(0, 1, 2)}, ValueError, "cache_batch_idx is given beside page_table", "one of them"),
    (PAGED, {"cache_leftpad": int32(0, 1, 2)}, ValueError, "cache_leftpad is given beside page_table", "one of them"),
    (CONTIGUOUS, {"q": lambda x: x[0]}, ValueError, "q has shape (2, 6, 32)", "(B, Sq, Hq, D)"),
    (RAGGED, {"q": lambda x: x[None]}, ValueError, "q has shape (1, 6, 6, 32)", "(Tq, Hq, D)"),
    (CONTIGUOUS, {"k_cache": lambda x: x[0]}, ValueError, "k_cache has shape (13, 2, 32)", "(B_cache, S_max, Hkv, D)"),
    (PAGED, {"v_cache": lambda x: x[0]}, ValueError, "v_cache has shape (4, 2, 24)", "(pages, page_size, Hkv, Dv)"),
    (CONTIGUOUS, {"k_cache": lambda x: x[..., :16]}, ValueError, "k_cache has head_dim 16", "32, as q has"),
    (CONTIGUOUS, {"v_cache": lambda x: x[..., :20]}, ValueError, "v_cache has head_dim 20", "a multiple of 8"),
    (CONTIGUOUS, {"v_cache": lambda x: x[:, :12]}, ValueError, "v_cache has 12 rows of 2 heads", "13 rows of 2 heads, as k_cache has"),
    (CONTIGUOUS, {"v_cache": lambda x: x[:2]}, ValueError, "v_cache has shape (2, 13, 2, 24)", "3 on its first axis"),
    (CONTIGUOUS, {"q": lambda x: x[:, :, :5]}, ValueError, "q has 5 heads and k_cache has 2", "a multiple of k_cache's heads"),
    (CONTIGUOUS, {"q": lambda x: x[:, :, :0]}, ValueError, "q has 0 heads and k_cache has 2", "1 or more times"),
    (CONTIGUOUS, {"k": lambda x: x[:, :1]}, ValueError, "k has shape (3, 1, 2, 32)", "(3, 2, 2, 32), as many rows as q"),
    (CONTIGUOUS, {"v": lambda x: x[:, :, :1]}, ValueError, "v has shape (3, 2, 1, 24)", "(3, 2, 2, 24), as many rows as q"),
    (CONTIGUOUS, {"v": lambda x: x[..., :16]}, ValueError, "v has shape (3, 2, 2, 16)", "(3, 2, 2, 24)"),
    (RAGGED, {"k": lambda x: x[:5]}, ValueError, "k has shape (5, 2, 32)", "(6, 2, 32)"),
    (
        CONTIGUOUS,
        {"k_cache": lambda x: x[:2], "v_cache": lambda x: x[:2]},
        ValueError,
        "k_cache has batch 2",
        "3, as q has, or cache_batch",
    ),
    (CONTIGUOUS, {"k_cache": lambda x: np.broadcast_to(x[:1], x.shape)}, ValueError, "k_cache is read-only", "an array to write to"),
    (CONTIGUOUS, {"v_cache": lambda x: as_strided(x, strides=(0, *x.strides[1:]))}, ValueError, "v_cache has byte strides (0,", "no two"),
    *[
        (CONTIGUOUS, {name: value}, error, f"{name} {what}", needed)
        for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad")
        for value, error, what, needed in (
            (np.array([0, 1, 2]), TypeError, "has dtype int64", "int32"),
            (int32([0, 1, 2]), ValueError, "has shape (1, 3) and byte strides (12, 4)", "(B,), contiguous"),
            (int32(0, 9, 1, 9, 2, 9)[::2], ValueError, "has shape (3,) and byte strides (8,)", "(B,), contiguous"),
            (int32(0, 1), ValueError, "has 2 entries", "3, one for each sequence"),
        )
    ],
    (CONTIGUOUS, {"cache_seqlens": int32(5, -1, 9)}, ValueError, "cache_seqlens is [5, -1, 9]", "lengths from 0 to 13"),
    (CONTIGUOUS, {"cache_seqlens": int32(14, 0, 0)}, ValueError, "cache_seqlens is [14, 0, 0]", "lengths from 0 to 13"),
    (CONTIGUOUS, {"cache_seqlens": int32(5, 0, 12)}, ValueError, "k has 2 rows for sequence 2, which has 12 of 13 keys", "room for them"),
    (CONTIGUOUS, {"cache_seqlens": -1}, ValueError, "cache_seqlens is -1", "a length from 0 to 13"),
    (CONTIGUOUS, {"cache_seqlens": 14}, ValueError, "cache_seqlens is 14", "a length from 0 to 13"),
    (CONTIGUOUS, {"cache_seqlens": 12}, ValueError, "cache_seqlens is 12 and k has 2 new rows", "at most 13 in all"),
    (RAGGED, {"cache_seqlens": 11}, ValueError, "k has 3 rows for sequence 2, which has 11 of 13 keys", "room for them"),
    (CONTIGUOUS, {"cache_leftpad": int32(0, -1, 0)}, ValueError, "cache_leftpad is [0, -1, 0]", "0 or more"),
    (CONTIGUOUS, {"cache_batch_idx": int32(0, 3, 1)}, ValueError, "cache_batch_idx is [0, 3, 1]", "from 0 to 2"),
    (CONTIGUOUS, {"cache_batch_idx": int32(0, -1, 1)}, ValueError, "cache_batch_idx is [0, -1, 1]", "from 0 to 2"),
    (CONTIGUOUS, {"cache_batch_idx": int32(0, 1, 1)}, ValueError, "cache_batch_idx is [0, 1, 1] and k is given", "each row once"),
    (PAGED, {"page_table": lambda x: x.astype(np.int64)}, TypeError, "page_table has dtype int64", "int32"),
    (PAGED, {"page_table": lambda x: x[:2]}, ValueError, "page_table has shape (2, 4)", "(3, max_pages)"),
    (PAGED, {"page_table": lambda x: x[0]}, ValueError, "page_table has shape (4,)", "(3, max_pages)"),
    (PAGED, {"page_table": lambda x: x[:, ::2]}, ValueError, "page_table has a byte stride of 8 on its last axis", "4, contiguous"),
    (PAGED, {"page_table": lambda x: x[::-1]}, ValueError, "page_table has byte strides (-16, 4)", "a multiple of 4 from 0 up"),
    (PAGED, {"page_table": lambda x: x * 0 + 13}, ValueError, "page_table[0] begins with [13, 13]", "from 0 to 12"),
    (PAGED, {"page_table": lambda x: x * 0 - 1}, ValueError, "page_table[0] begins with [-1, -1]", "from 0 to 12"),
    (RAGGED, {"cu_seqlens_q": int32(0, 4, 3, 5)}, ValueError, "cu_seqlens_q is [0, 4, 3, 5]", "ascending from 0 to at most 6"),
    (RAGGED, {"cu_seqlens_q": int32(0, 2, 3, 7)}, ValueError, "cu_seqlens_q is [0, 2, 3, 7]", "ascending from 0 to at most 6"),
    (RAGGED, {"cu_seqlens_q": lambda x: x[:0]}, ValueError, "cu_seqlens_q has shape (0,)", "(B + 1,)"),
    (RAGGED, {"cu_seqlens_q": lambda x: x[:3]}, ValueError, "cache_seqlens has 3 entries", "2, one for each sequence"),
    *[
        (CONTIGUOUS, {name: change}, ValueError, f"{name} {said}", needed)
        for name in ("rotary_cos", "rotary_sin")
        for change, said, needed in (
            (lambda x: x[:, 0], "has shape (15,)", "(positions, rotary_dim / 2)"),
            (lambda x: x[:, :4], "has shape (15, 4)", "a multiple of 16 up to 32"),
            (lambda x: np.repeat(x, 3, axis=1), "has shape (15, 24)", "a multiple of 16 up to 32"),
            (lambda x: x[:12], "has 12 positions", "13 or more"),
            (lambda x: np.repeat(x, 2, axis=1)[:, ::2], "has byte strides (32, 4)", "(16, 2), contiguous"),
        )
    ],
    (CONTIGUOUS, {"rotary_sin": lambda x: x[:14]}, ValueError, "rotary_sin has shape (14, 8)", "(15, 8), as rotary_cos has"),
    *[(CONTIGUOUS, {"causal": x}, ValueError, f"causal is {x!r}", "False or True") for x in (None, 1, "top-left")],
    (CONTIGUOUS, {"window": (-2, 0)}, ValueError, "window is (-2, 0)", "from 0 up"),
    (CONTIGUOUS, {"scale": -1}, ValueError, "scale is -1", "above 0"),
    (CONTIGUOUS, {"out": np.ones((3, 2, 6, 32), np.float16)}, ValueError, "out has shape (3, 2, 6, 32)", "(3, 2, 6, 24)"),
    (CONTIGUOUS, {"out": np.ones((3, 2, 6, 24))}, TypeError, "out has dtype float64", "float16, as q has"),
]


@pytest.mark.parametrize(("options", "changes", "error", "said", "needed"), [pytest.param(*x, id=f"{x[3]}, not {x[4]}") for x in WRONG])
def test_wrong_argument(options: dict[str, Any], changes: dict[str, Any], error: type[Exception], said: str, needed: str) -> None:
    call = make(options)
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    before = {name: np.array(call[name]) for name in ("k_cache", "v_cache") if isinstance(call[name], np.ndarray)}
    assert_refused(lambda: attention_with_kvcache(**call), error, said, needed)
    for name, x in before.items():
        np.testing.assert_array_equal(read(call[name]), read(x), f"{name} was changed")


@pytest.mark.parametrize("name", ["k_cache", "v", "cache_seqlens", "page_table", "rotary_sin"])
def test_frameworks_do_not_mix(name: str) -> None:
    call = make(PAGED)
    call[name] = given_as("torch", call[name])
    said = f"{name} is a torch array in host memory but q is a numpy array in host memory"
    assert_refused(lambda: attention_with_kvcache(**call), ValueError, said, "one framework and one device")


# ---- wrong arrays on a GPU: CuPy arrays over addresses that nobody reads, for the refusal comes before the GPU


def on_gpu(shape: tuple[int, ...], dtype: str = "float16", strides: tuple[int, ...] | None = None, offset: int = 0) -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    memory = cupy.cuda.UnownedMemory(0x30000, 1 << 20, None, 0)
    return cupy.ndarray(shape, np.dtype(dtype), cupy.cuda.MemoryPointer(memory, offset), strides)


@pytest.mark.parametrize(
    ("changes", "said", "needed"),
    [
        ({"k_cache": dict(offset=8)}, "k_cache starts at address 0x30008", "a multiple of 16 bytes"),
        ({"v": dict(offset=2)}, "v starts at address 0x30002", "a multiple of 16 bytes"),
        ({"cache_seqlens": dict(offset=2)}, "cache_seqlens starts at address 0x30002", "a multiple of 4 bytes"),
        ({"k_cache": dict(strides=(1024, 72, 32, 2))}, "k_cache has byte strides (1024, 72, 32, 2)", "multiples of 16"),
        ({"v_cache": dict(strides=(0, 64, 32, 2))}, "v_cache has byte strides (0, 64, 32, 2)", "no two elements in one place"),
        ({"k": dict(strides=(128, 64, 32, 4))}, "k has a byte stride of 4 on its last axis", "2, contiguous"),
    ],
)
def test_wrong_gpu_array(changes: dict[str, dict[str, Any]], said: str, needed: str) -> None:
    right: dict[str, dict[str, Any]] = {name: dict(shape=(2, 2, 2, 16)) for name in "qkv"}
    right |= {name: dict(shape=(2, 16, 2, 16)) for name in ("k_cache", "v_cache")} | {"cache_seqlens": dict(shape=(2,), dtype="int32")}
    call = {name: on_gpu(**(x | changes.get(name, {}))) for name, x in right.items()}
    assert_refused(lambda: attention_with_kvcache(**call), ValueError, said, needed)


def test_the_host_refuses_a_number_that_does_not_fit_on_a_gpu() -> None:
    q, cache = on_gpu((2, 2, 2, 16)), on_gpu((2, 16, 2, 16))
    assert_refused(lambda: attention_with_kvcache(q, cache, cache, cache_seqlens=17), ValueError, "cache_seqlens is 17", "from 0 to 16")
    refused = "cache_seqlens is 15 and k has 2 new rows"
    assert_refused(lambda: attention_with_kvcache(q, cache, cache, q, q, cache_seqlens=15), ValueError, refused, "at most 16")


# ---- KVCache


def tokens(rng: np.random.Generator, batch: int, rows: int, dtype: str = "float16") -> list[np.ndarray]:
    return [normal(rng, (batch, rows, heads, d), dtype) for heads, d in ((4, 16), (2, 16), (2, 24))]


def new_cache(batch: int = 2, max_seqlen: int = 20, **options: Any) -> KVCache:
    return KVCache(batch, max_seqlen, 2, 16, head_dim_v=24, **({"like": np.zeros(0, np.float16)} | options))


PAGES = [None, 1, 4, 7, 64]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("page_size", PAGES)
def test_steps_are_one_causal_call(page_size: int | None, framework: str) -> None:
    q, k, v = (given_as(framework, x) for x in tokens(np.random.default_rng(0), 2, 20))
    cache = new_cache(like=q, page_size=page_size)
    outs, done = [], 0
    for rows in (6, 1, 1, 8, 0, 4):
        new = slice(done, done + rows)
        outs.append(read(cache.attend(q[:, new], k[:, new], v[:, new])))
        done += rows
        assert cache.lengths == (done, done) and read(cache.cache_seqlens).tolist() == [done, done]
    np.testing.assert_array_equal(np.concatenate(outs, axis=1), read(attention(q, k, v, causal=True)))
    assert type(cache.k_cache) is type(q)


@pytest.mark.parametrize("page_size", PAGES)
def test_append_is_attend_without_queries(page_size: int | None) -> None:
    q, k, v = tokens(np.random.default_rng(1), 2, 9, "bfloat16")
    one, other = (new_cache(like=q, page_size=page_size) for _ in range(2))
    for new in (slice(0, 5), slice(5, 9)):
        one.append(k[:, new], v[:, new])
        other.attend(q[:, new], k[:, new], v[:, new])
    assert one.lengths == other.lengths == (9, 9)
    np.testing.assert_array_equal(one.attend(q, causal=False), attention(q, k, v))
    np.testing.assert_array_equal(other.attend(q), attention(q, k, v, causal=True))
    assert one.lengths == (9, 9)


@pytest.mark.parametrize("page_size", PAGES)
def test_options_reach_the_call(page_size: int | None) -> None:
    call = make(PLAIN | {"rows": 3, "lengths": [(0, 0)] * 2, "interleaved": True})
    expected, expected_lse = attention_with_kvcache(**call, window=(1, 0), scale=0.3, return_lse=True)
    cache = KVCache(2, 13, KV_HEADS, D, head_dim_v=DV, like=call["q"], page_size=page_size)
    options = {name: x for name, x in call.items() if name.startswith("rotary")}
    out = np.empty_like(expected)
    options |= {name: np.resize(options[name], (64, 8)) for name in ("rotary_cos", "rotary_sin")}  # whole pages of any size
    result, lse = cache.attend(call["q"], call["k"], call["v"], window=(1, 0), scale=0.3, out=out, return_lse=True, **options)
    assert result is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)


@pytest.mark.parametrize("page_size", PAGES)
@settings(deadline=None, max_examples=30)
@given(prompt=st.integers(0, 15), rows=st.lists(st.integers(0, 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_forks_go_their_own_ways(page_size: int | None, prompt: int, rows: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = tokens(rng, 2, prompt + 5)
    cache = new_cache(page_size=page_size, pages=None if page_size is None else 6 * -(-20 // page_size))
    cache.append(k[:, :prompt], v[:, :prompt])
    fork = cache.fork(rows)
    assert fork.lengths == tuple(prompt for _ in rows)
    fork_q, fork_k, fork_v = tokens(rng, len(rows), 5)
    outs = [[], []]  # type: list[list[np.ndarray]]
    for i in range(5):  # turn by turn, so that each would overwrite what the other has just written
        new, own = slice(prompt + i, prompt + i + 1), slice(i, i + 1)
        outs[0].append(cache.attend(q[:, new], k[:, new], v[:, new]))
        outs[1].append(fork.attend(fork_q[:, own], fork_k[:, own], fork_v[:, own]))
    np.testing.assert_array_equal(np.concatenate(outs[0], axis=1), attention(q, k, v, causal=True)[:, prompt:])
    whole_k, whole_v = (np.concatenate([x[rows, :prompt], y], axis=1) for x, y in ((k, fork_k), (v, fork_v)))
    np.testing.assert_array_equal(np.concatenate(outs[1], axis=1), attention(fork_q, whole_k, whole_v, causal=True))


def test_pages_are_shared_and_come_back() -> None:
    rng = np.random.default_rng(3)
    _, k, v = tokens(rng, 1, 10)
    cache = new_cache(1, page_size=4, pages=6)
    cache.append(k, v)  # pages 0, 1 and half of 2
    fork = cache.fork([0, 0, 0])  # three copies of page 2: nothing is free
    tables = np.vstack([cache.page_table, fork.page_table])[:, :3]
    assert (tables[:, :2] == [0, 1]).all() and sorted(tables[:, 2].tolist()) == [2, 3, 4, 5]
    assert_refused(lambda: cache.fork([0]), ValueError, "pages is 6, of which 0 are free", "1 free ones")
    before = cache.k_cache.copy(), fork.page_table.copy()
    assert_refused(lambda: fork.append(*([np.repeat(x[:, :3], 3, axis=0) for x in (k, v)])), ValueError, "pages is 6, of which 0", "3 free")
    np.testing.assert_array_equal(cache.k_cache, before[0])
    np.testing.assert_array_equal(fork.page_table, before[1])
    assert fork.lengths == (10, 10, 10)

    fork.reset([1])
    assert fork.lengths == (10, 0, 10) and read(fork.cache_seqlens).tolist() == [10, 0, 10]
    cache.append(k[:, :3], v[:, :3])  # takes the page that came back
    assert cache.page_table[0, 3] == tables[2, 2]
    fork.reset([0])
    fork_of_fork = fork.fork([2])
    assert_refused(lambda: fork_of_fork.fork([0, 0]), ValueError, "pages is 6", "2 free ones")
    fork = fork_of_fork = cache
    gc.collect()
    cache.append(k[:, :7], v[:, :7])  # and one of the pages of a cache that is gone
    cache.reset()
    cache.append(np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
    assert cache.lengths == (20,)


@pytest.mark.parametrize("page_size", PAGES)
def test_a_step_past_the_capacity_changes_nothing(page_size: int | None) -> None:
    q, k, v = tokens(np.random.default_rng(4), 2, 20)
    cache = new_cache(page_size=page_size)
    cache.append(k[:, :18], v[:, :18])
    before = [np.array(x) for x in (cache.k_cache, cache.v_cache, cache.cache_seqlens)]
    said = "k has 3 new rows and sequence 0 has 18 of 20"
    assert_refused(lambda: cache.append(k[:, :3], v[:, :3]), ValueError, said, "room for them")
    assert_refused(lambda: cache.attend(q[:, :3], k[:, :3], v[:, :3]), ValueError, said, "room for them")
    assert_refused(lambda: cache.advance(3), ValueError, said, "room for them")
    assert_refused(lambda: cache.attend(q[:, :2], k[:, :2], v[:, :1]), ValueError, "v has shape (2, 1, 2, 24)", "(2, 2, 2, 24)")
    for x, y in zip((cache.k_cache, cache.v_cache, cache.cache_seqlens), before, strict=True):
        np.testing.assert_array_equal(x, y)
    assert cache.lengths == (18, 18)
    np.testing.assert_array_equal(cache.attend(q[:, 18:], k[:, 18:], v[:, 18:]), attention(q, k, v, causal=True)[:, 18:])


def test_reset_of_some_sequences() -> None:
    q, k, v = tokens(np.random.default_rng(5), 2, 8)
    cache = new_cache(page_size=3)
    cache.append(k[:, :5], v[:, :5])
    cache.reset([0])
    assert cache.lengths == (0, 5)
    out = cache.attend(q[:, 5:], k[:, 5:], v[:, 5:])
    assert cache.lengths == (3, 8)
    np.testing.assert_array_equal(out[:1], attention(q[:1, 5:], k[:1, 5:], v[:1, 5:], causal=True))
    np.testing.assert_array_equal(out[1:], attention(q[1:], k[1:], v[1:], causal=True)[:, 5:])


def test_bytes() -> None:
    assert new_cache(2, 20).bytes == 2 * 20 * 2 * (16 + 24) * 2 + 2 * 4
    assert new_cache(2, 20, page_size=8, pages=5).bytes == 5 * 8 * 2 * (16 + 24) * 2 + 2 * 4 + 2 * 3 * 4
    assert new_cache(2, 20, dtype="bfloat16").k_cache.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "said", "needed"),
    [
        ({"batch": 0}, ValueError, "batch is 0", "an integer from 1 up"),
        ({"max_seqlen": 2.5}, ValueError, "max_seqlen is 2.5", "an integer from 1 up"),
        ({"heads": True}, ValueError, "heads is True", "an integer from 1 up"),
        ({"head_dim": 12}, ValueError, "head_dim is 12", "a multiple of 8 from 8 to 256"),
        ({"head_dim_v": 264}, ValueError, "head_dim_v is 264", "a multiple of 8 from 8 to 256"),
        ({"page_size": 0}, ValueError, "page_size is 0", "an integer from 1 up"),
        ({"pages": 3}, ValueError, "pages is 3 but page_size is None", "both or neither"),
        ({"dtype": "float32"}, TypeError, "dtype is float32", "float16 or bfloat16"),
        ({"like": np.zeros(3)}, TypeError, "like has dtype float64", "float16 or bfloat16"),
        ({"like": "cuda"}, TypeError, "like is a str", "a NumPy, CuPy, torch"),
    ],
)
def test_wrong_cache(options: dict[str, Any], error: type[Exception], said: str, needed: str) -> None:
    right: dict[str, Any] = {"batch": 2, "max_seqlen": 8, "heads": 2, "head_dim": 16, "like": np.zeros(0, np.float16)}
    assert_refused(lambda: KVCache(**(right | options)), error, said, needed)


def test_a_jax_cache_is_refused() -> None:
    like = given_as("jax", np.zeros(3, np.float16))
    assert_refused(lambda: new_cache(like=like), TypeError, "like is a jax.Array, which nothing may write to", "NumPy, CuPy or torch")


def test_wrong_use_of_a_cache() -> None:
    q, k, v = tokens(np.random.default_rng(6), 2, 3)
    cache = new_cache()
    assert_refused(lambda: cache.append(k[0], v[0]), ValueError, "k has shape (3, 2, 16)", "(B, Sq, Hkv, D)")
    assert_refused(lambda: cache.append(k, v[:, :2]), ValueError, "v has shape (2, 2, 2, 24)", "(2, 3, 2, 24)")
    assert_refused(lambda: cache.append(k, v.astype(np.float32)), TypeError, "v has dtype float32", "float16, as the cache has")
    assert_refused(lambda: cache.append(k, given_as("torch", v)), ValueError, "v is a torch array", "one framework and one device")
    for rows in ([], [2], [-1], [0.0], ["0"]):
        said = re.escape(f"rows is {rows!r}").replace("\\", "")
        assert_refused(lambda rows=rows: cache.fork(rows), ValueError, said, "from 0 to 1")  # type: ignore[misc]
        assert_refused(lambda rows=rows: cache.reset(rows), ValueError, said, "from 0 to 1")  # type: ignore[misc]
    assert cache.lengths == (0, 0)
    assert not rawattn.KVCache(1, 1, 1, 8, like=q).attend(np.ones((1, 1, 1, 8), np.float16)).any()
