"""attention_with_kvcache() and KVCache on a Hopper GPU: any batch against float64, bits, appended rows, poison, streams and graphs."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gpu_support
import numpy as np
import pytest
from gpu_support import (
    ENOUGH_ELEMENTS,
    assert_close,
    assert_lse_close,
    compile_in_parallel,
    normal,
    poison,
    poisoned,
    same_bits,
    strides_of,
    torch_on_gpu,
    untouched_outside,
)

import rawattn
from rawattn import reference
from rawattn.spec import KernelSpec
from rawattn.tiles import cache_spec, launch_variant, launch_variants

cp = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu

# All that a kernel may be compiled for: dtype, D, Dv, query heads for each of KV_HEADS; everything here is one of them.
GEOMETRIES = {
    "64": ("float16", 64, 64, 4),
    "80": ("bfloat16", 80, 80, 1),
    "128": ("bfloat16", 128, 128, 4),
    "128, 7 to 1": ("bfloat16", 128, 128, 7),
    "128, 32 to 1": ("float16", 128, 128, 32),
    "192/128": ("bfloat16", 192, 128, 1),
    "256": ("float16", 256, 256, 8),
}
KV_HEADS = 2
CAPACITY = 640
LENGTHS = (0, 1, 63, 64, 65, 127, 129, 500, CAPACITY)
SOME, MANY = 8, 15  # times LENGTHS: tiles that may have clusters of one or two CTAs, and more than can have any
NO_PAGE = 2**31 - 1

# The same, and as many queries as make tiles of 8, 16, 32 and 64 rows.
DECODES = {
    "64, 8 rows": (("float16", 64, 64, 4), 1),
    "64, 16 rows": (("bfloat16", 64, 64, 8), 2),
    "64, 32 rows": (("bfloat16", 64, 64, 1), 17),
    "64, 64 rows": (("float16", 64, 64, 32), 2),
    "128, 8 rows, 1 to 1": (("bfloat16", 128, 128, 1), 1),
    "128, 8 rows, 4 to 1": (("bfloat16", 128, 128, 4), 2),
    "128, 8 rows, 7 to 1": (("float16", 128, 128, 7), 1),
    "128, 16 rows": (("float16", 128, 128, 7), 2),
    "128, 32 rows": (("float16", 128, 128, 32), 1),
    "128, 64 rows": (("bfloat16", 128, 128, 8), 8),
    "256, 8 rows": (("float16", 256, 256, 8), 1),
    "256, 16 rows": (("bfloat16", 256, 256, 4), 4),
    "256, 32 rows": (("bfloat16", 256, 256, 7), 4),
}
GEOMETRY_OF = GEOMETRIES | {name: geometry for name, (geometry, _) in DECODES.items()}
DECODE_LENGTHS = (0, 1, 64, 129, 500, 512, 2047, 8192)
EVERYONE = list(range(len(DECODE_LENGTHS)))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    gpu_support.seed(request.node.name)


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """What the decode steps call for."""
    variants: list[KernelSpec] = []
    for (dtype, dim, dim_v, ratio), rows in DECODES.values():
        for page_size in (0, 16):
            variants += launch_variants(cache_spec(dtype, dim, dim_v, ratio, KV_HEADS, "causal", rows, page_size))
    compile_in_parallel(variants, request.config)


# ---- calls


def device_ints(x: Any) -> Any:
    return cp.asarray(np.asarray(x, np.int32))


def make(
    geometry: str,
    lengths: list[int],
    rows: int | list[int],
    *,
    append: bool = True,
    page_size: int | None = None,
    batch_idx: bool = False,
    leftpad: list[int] | None = None,
    rotary: int | None = None,
    interleaved: bool = False,
    capacity: int = CAPACITY,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call. `lengths` are of the cache; `rows` of q, a list if they are ragged.

    All memory of the caches that holds no key is NaN, and so is that around them; table entries of pages that are not used are huge.
    """
    dtype, dim, dim_v, ratio = GEOMETRY_OF[geometry]
    rng, batch = np.random.default_rng(seed), len(lengths)
    call: dict[str, Any] = {"cache_seqlens": device_ints(lengths)}
    new = np.array([rows] * batch if isinstance(rows, int) else rows)
    if page_size is None:
        shape = (batch + 2 * batch_idx, capacity)
        index = rng.permutation(shape[0])[:batch] if batch_idx else np.arange(batch)
        if batch_idx:
            call["cache_batch_idx"] = device_ints(index)
    else:
        columns = capacity // page_size + 1
        ends = -(-(np.array(lengths) + new * append) // page_size)
        shape = (int(ends.sum()) + 3, page_size)
        pages, table = rng.permutation(shape[0]), np.full((batch, columns), NO_PAGE, np.int32)
        for b, end in enumerate(ends):
            table[b, :end], pages = pages[:end], pages[end:]
        call["page_table"] = device_ints(table)
    shapes = [(*shape, KV_HEADS, d) for d in (dim, dim_v)]
    call["k_cache"], call["v_cache"] = (poisoned(x, dtype, strides_of("padded", x))[0] for x in shapes)
    if leftpad is not None:
        call["cache_leftpad"] = device_ints(leftpad)
    for b, length in enumerate(lengths):
        first = 0 if leftpad is None else leftpad[b]
        if first < length:
            held = {"k_cache": normal((length - first, KV_HEADS, dim), dtype), "v_cache": normal((length - first, KV_HEADS, dim_v), dtype)}
            for name, values in held.items():
                call[name][places(call, b, first, length)] = values
    if isinstance(rows, int):
        of_q: tuple[int, ...] = (batch, rows)
    else:
        of_q = (sum(rows),)
        call["cu_seqlens_q"] = device_ints(np.cumsum([0, *rows]))
    call["q"] = normal((*of_q, KV_HEADS * ratio, dim), dtype)
    if append:
        call |= {"k": normal((*of_q, KV_HEADS, dim), dtype), "v": normal((*of_q, KV_HEADS, dim_v), dtype)}
    if rotary is not None:
        angles = cp.arange(2 * CAPACITY)[:, None] / 10000.0 ** (cp.arange(rotary // 2) / (rotary // 2))
        call |= {"rotary_cos": cp.cos(angles).astype(call["q"].dtype), "rotary_sin": cp.sin(angles).astype(call["q"].dtype)}
        call["rotary_interleaved"] = interleaved
    return call


def places(call: dict[str, Any], b: int, first: int, last: int) -> Any:
    """Index of positions first to last of sequence b in the caches of `call`."""
    if "page_table" not in call:
        return int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b, slice(first, last)
    position, page_size = cp.arange(first, last), call["k_cache"].shape[1]
    return call["page_table"][b][position // page_size], position % page_size


def clusters(call: dict[str, Any]) -> int:
    """CTAs of each cluster that the call is launched in; 0 if the splits of all sequences are shared out as a list."""
    (batch, rows, heads, dim), (_, size, heads_k, dim_v) = call["q"].shape, call["v_cache"].shape
    page_size = size if "page_table" in call else 0
    capacity = page_size * call["page_table"].shape[1] if page_size else size
    spec = cache_spec(call["q"].dtype.name, dim, dim_v, heads // heads_k, heads_k, "causal", rows, page_size)
    multiprocessors = cp.cuda.Device().attributes["MultiProcessorCount"]
    return launch_variant(spec, batch, rows, heads, capacity, multiprocessors)[1]


def fresh(call: dict[str, Any]) -> dict[str, Any]:
    """The same call on copies of the caches."""
    return call | {name: call[name].copy() for name in ("k_cache", "v_cache")}


def appended(call: dict[str, Any]) -> tuple[Any, Any]:
    """The caches as they should be after the call."""
    after = fresh(call)
    if "k" in call:
        options = {name: x for name, x in after.items() if name not in ("q", "cache_leftpad", "causal", "window", "scale")}
        reference.append_to_cache(**options)
    return after["k_cache"], after["v_cache"]


def assert_right(call: dict[str, Any], few_keys: bool = False) -> tuple[Any, Any]:
    """out and LSE of the call by the rule of test_gpu.py, and the caches afterwards, to the bit (a rotated key to the last place)."""
    expected, expected_lse = reference.attention_with_kvcache(**call, return_lse=True)
    k_cache, v_cache = appended(call)
    out, lse = rawattn.attention_with_kvcache(**call, return_lse=True)
    assert_close(out, expected, few_keys, l2_factor=1.5 if out.size >= ENOUGH_ELEMENTS else 2.5)
    assert_lse_close(lse, expected_lse)
    assert same_bits(call["v_cache"], v_cache), "v_cache"
    if "rotary_cos" in call:
        off = cp.abs(call["k_cache"].astype(np.float32) - k_cache.astype(np.float32))
        limit = 2.0 ** (-7 if k_cache.dtype.name == "bfloat16" else -10) * cp.maximum(cp.abs(k_cache.astype(np.float32)), 1e-3)
        nan = cp.isnan(k_cache.astype(np.float32))
        assert bool((nan == cp.isnan(call["k_cache"].astype(np.float32))).all()) and not bool(((off > limit) & ~nan).any()), "k_cache"
    else:
        assert same_bits(call["k_cache"], k_cache), "k_cache"
    return out, lse


def lengths_before(rows: int) -> list[int]:
    return [min(length, CAPACITY - rows) for length in LENGTHS]


# ---- accuracy


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_any_length(geometry: str, page_size: int | None) -> None:
    for rows in (1, 2, 5, 16, 100, 300):
        for append in (False, True):
            lengths = lengths_before(rows) if append else list(LENGTHS)
            assert_right(make(geometry, lengths, rows, append=append, page_size=page_size))


@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_any_length_of_many_sequences(geometry: str, page_size: int | None) -> None:
    for rows, times in ((1, SOME), (1, MANY), (2, MANY), (5, SOME), (16, MANY)):
        for append in (False, True):
            lengths = lengths_before(rows) if append else list(LENGTHS)
            call = make(geometry, times * lengths, rows, append=append, page_size=page_size)
            assert clusters(call) <= (times == SOME)
            assert_right(call)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128, 256])
def test_any_page_size_and_appending_across_a_page_border(page_size: int) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size - 1, 255, 300]
    for rows in (1, 3, 70):
        assert_right(make("128", lengths, rows, page_size=page_size))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("geometry, rotary", [("64", 64), ("128", 128), ("128", 32), ("80", 16)])
def test_rotary(geometry: str, rotary: int, interleaved: bool) -> None:
    for rows, masks in ((1, {}), (5, {}), (100, {}), (5, {"causal": False}), (5, {"causal": False, "window": (200, 1)})):
        for page_size, times in itertools.product((None, 16), (1, MANY)):
            call = make(geometry, times * lengths_before(rows), rows, rotary=rotary, interleaved=interleaved, page_size=page_size)
            assert_right(call | masks)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_leftpad_and_batch_idx(rows: int) -> None:
    leftpad = [0, 1, 5, 64, 65, 7, 100, 499, 3]
    assert_right(make("128", lengths_before(rows), rows, leftpad=leftpad, batch_idx=True))
    assert_right(make("128", lengths_before(rows), rows, append=False, leftpad=leftpad))


@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_ragged(page_size: int | None) -> None:
    for append in (False, True):
        assert_right(make("128", [0, 65, 500, 129, 300, 64], [3, 1, 0, 130, 64, 1], append=append, page_size=page_size))


@pytest.mark.parametrize(
    "masks", [{"causal": False}, {"window": (100, -1)}, {"causal": False, "window": (37, 5)}, {"scale": 0.05}], ids=str
)
def test_masks(masks: dict[str, Any]) -> None:
    for rows in (1, 16, 100):
        assert_right(make("128", lengths_before(rows), rows, page_size=64) | masks, few_keys="window" in masks)
        assert_right(make("128", lengths_before(rows), rows) | masks, few_keys="window" in masks)


def test_a_thousand_steps_are_one_causal_call() -> None:
    dtype, dim, dim_v, ratio = GEOMETRIES["128"]
    q, k, v = (normal((1, 1000, heads, dim), dtype) for heads in (KV_HEADS * ratio, KV_HEADS, KV_HEADS))
    cache = rawattn.KVCache(1, 1000, KV_HEADS, dim, head_dim_v=dim_v, like=q, page_size=16)
    outs = [cache.attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(1000)]
    assert_close(cp.concatenate(outs, axis=1), reference.attention(q, k, v, causal=True))
    assert cache.lengths == (1000,) and cache.cache_seqlens.tolist() == [1000]


# ---- what must not be written, and what must not be read


@pytest.mark.parametrize("page_size", [None, 64])
def test_rows_that_do_not_fit_are_not_written(page_size: int | None) -> None:
    call = make("128", [630, 640, 100], 16)
    if page_size is not None:
        shape = (3 * CAPACITY // page_size, page_size)
        call |= {name: call[name].reshape(*shape, *call[name].shape[2:]) for name in ("k_cache", "v_cache")}
        call["page_table"] = cp.arange(shape[0], dtype=np.int32).reshape(3, -1)
    assert_right(call)


def test_a_neighbours_nan_stays_with_it() -> None:
    call = make("128", [300, 200, 500], 2)
    clean, clean_lse = rawattn.attention_with_kvcache(**fresh(call), return_lse=True)
    call["k_cache"][1] = call["v_cache"][1] = math.nan
    out, lse = rawattn.attention_with_kvcache(**call, return_lse=True)
    for b in (0, 2):
        assert same_bits(out[b], clean[b]) and same_bits(lse[b], clean_lse[b])


# ---- bits


def alone(call: dict[str, Any], b: int, page_size: int | None, seed: int) -> dict[str, Any]:
    """Sequence b of a dense call, in caches of its own with another layout."""
    length = int(call["cache_seqlens"][b])
    (_, _, heads, dim), dim_v = call["k_cache"].shape, call["v_cache"].shape[-1]
    one: dict[str, Any] = {name: call[name][b : b + 1].copy() for name in ("q", "k", "v")} | {"cache_seqlens": device_ints([length])}
    columns = 1 if page_size is None else -(-CAPACITY // page_size)
    shape = (1, CAPACITY) if page_size is None else (columns + 2, page_size)
    for name, d in (("k_cache", dim), ("v_cache", dim_v)):
        one[name] = poisoned((*shape, heads, d), call["q"].dtype.name, strides_of("contiguous", (*shape, heads, d)))[0]
    if page_size is not None:
        one["page_table"] = device_ints(np.random.default_rng(seed).permutation(shape[0])[None, :columns])
    for name in ("k_cache", "v_cache"):
        one[name][places(one, 0, 0, length)] = call[name][places(call, b, 0, length)]
    return one


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_sequence_does_not_depend_on_its_batch_or_its_pages(geometry: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    for seed, page_size in enumerate((None, 16, 64)):
        lengths = rng.integers(0, CAPACITY - rows, 7).tolist()
        call = make(geometry, lengths, rows, page_size=page_size, seed=seed)
        before = fresh(call)
        out, lse = rawattn.attention_with_kvcache(**call, return_lse=True)
        for b in rng.permutation(7)[:3].tolist():
            for other in (None, 1, 7, 64):
                one, one_lse = rawattn.attention_with_kvcache(**alone(before, b, other, seed), return_lse=True)
                assert same_bits(one[0], out[b]) and same_bits(one_lse[0], lse[b]), (lengths, b, page_size, other)


def decode_step(decode: str, page_size: int | None) -> dict[str, Any]:
    rows = DECODES[decode][1]
    return make(decode, list(DECODE_LENGTHS), rows, append=False, page_size=page_size, capacity=max(DECODE_LENGTHS))


def selected(call: dict[str, Any], sequences: list[int], capacity: int | None = None, copied: bool = False) -> dict[str, Any]:
    """The call of some of its sequences, which may repeat, on the same or copied rows, or pages; of no more than `capacity` keys each."""
    index = device_ints(sequences)
    some = call | {name: call[name][index] for name in ("q", "cache_seqlens")}
    if "page_table" in call:
        columns = None if capacity is None else -(-capacity // call["k_cache"].shape[1])
        return some | {"page_table": cp.ascontiguousarray(call["page_table"][index, :columns])}
    if copied:
        return some | {name: call[name][index, :capacity] for name in ("k_cache", "v_cache")}
    return some | {"cache_batch_idx": index} | {name: call[name][:, :capacity] for name in ("k_cache", "v_cache")}


def poisoned_out(call: dict[str, Any]) -> tuple[Any, Any]:
    shape = (*call["q"].shape[:3], call["v_cache"].shape[3])
    return poisoned(shape, call["q"].dtype.name, strides_of("padded", shape))


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("decode", DECODES)
def test_a_row_has_the_same_bits_in_a_cluster_and_in_the_list(decode: str, page_size: int | None) -> None:
    """Ten times each, in a cache with room for the longest and in one that just holds its own; copied rows are loaded before the length."""
    call = decode_step(decode, page_size)
    right, right_lse = assert_right(call)
    alone, few, many = [[b] for b in EVERYONE], [[b, (b + 3) % 8, (b + 5) % 8] for b in EVERYONE], [8 * EVERYONE, 9 * EVERYONE]
    short = [3 * EVERYONE[:7], 10 * EVERYONE[:6], 22 * EVERYONE[:6]]  # four splits for a CTA, two CTAs for an SM, all splits in one CTA
    assert all(clusters(selected(call, sequences)) > 0 for sequences in alone + few)
    assert all(clusters(selected(call, sequences)) == 0 for sequences in many)
    assert clusters(selected(call, short[0], DECODE_LENGTHS[6])) == 2
    for sequences in [*alone, *few, *short, *many]:
        longest = max(DECODE_LENGTHS[b] for b in sequences)
        ways = (False, True) if page_size is None and len(sequences) < 8 else (False,)
        for capacity, copied in itertools.product((None, max(1, longest)), ways):
            some = selected(call, sequences, capacity, copied)
            results = []
            for _ in range(10):
                out, memory = poisoned_out(some)
                results.append((out, memory, rawattn.attention_with_kvcache(**some, out=out, return_lse=True)[1]))
            for out, memory, lse in results:
                assert same_bits(out, right[sequences]) and same_bits(lse, right_lse[sequences]), (sequences, capacity)
                assert untouched_outside(out, memory)


def test_sequences_may_share_one_row_of_a_page_table() -> None:
    """Whose stride is 0."""
    call = selected(decode_step("128, 8 rows, 4 to 1", 16), [7, 7, 7])
    shared = call | {"page_table": cp.broadcast_to(call["page_table"][:1], call["page_table"].shape)}
    assert clusters(shared) > 0 and shared["page_table"].strides[0] == 0
    expected, out = rawattn.attention_with_kvcache(**call), rawattn.attention_with_kvcache(**shared)
    assert same_bits(out, expected)


@pytest.mark.parametrize("rotary", [None, 128])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_keys_that_are_loaded_while_others_are_appended_change_no_bit(rows: int, rotary: int | None) -> None:
    """Ten times in clusters, which load the first keys before they know the length, beside the list."""
    call = make("128", [0, 1, 61, 62, 63, 64, 125, 126, 127, 500], rows, rotary=rotary)
    arrays = [name for name, x in call.items() if isinstance(x, cp.ndarray) and not name.startswith("rotary")]
    many = call | {name: cp.concatenate([call[name]] * 14) for name in arrays}
    assert clusters(call) > 0 and clusters(many) == 0
    right, right_lse = rawattn.attention_with_kvcache(**many, return_lse=True)
    for _ in range(10):
        some = fresh(call)
        out, lse = rawattn.attention_with_kvcache(**some, return_lse=True)
        assert same_bits(out, right[:10]) and same_bits(lse, right_lse[:10])
        assert same_bits(some["k_cache"], many["k_cache"][:10]) and same_bits(some["v_cache"], many["v_cache"][:10])


@pytest.mark.parametrize(
    "rows, heads, heads_k, dims", [(16, 32, 8, (128, 128)), (9, 28, 4, (128, 72)), (5, 64, 8, (64, 64)), (7, 8, 1, (72, 48))]
)
@pytest.mark.parametrize("lengths", [[4000], [9001], [60], [129, 700]])
def test_more_than_32_rows_have_the_same_bits_in_a_cluster_and_in_the_list(
    rows: int, heads: int, heads_k: int, dims: tuple[int, int], lengths: list[int]
) -> None:
    """Ten times, of one split or many, whose blocks two warpgroups share."""
    batch, capacity = len(lengths), 9216
    caches = {name: normal((batch, capacity, heads_k, dim), "bfloat16") for name, dim in zip(("k_cache", "v_cache"), dims, strict=True)}
    call = caches | {"q": normal((batch, rows, heads, dims[0]), "bfloat16"), "cache_seqlens": device_ints(lengths)}
    assert clusters(call) > 0
    right, right_lse = assert_right(call)
    times = 32 // batch
    many = {
        "q": cp.concatenate([call["q"]] * times),
        "cache_seqlens": device_ints(lengths * times),
        "cache_batch_idx": device_ints([*range(batch)] * times),
    }
    assert clusters(caches | many) == 0
    for some, count in ((call, 1), (caches | many, times)):
        for _ in range(10):
            out, lse = rawattn.attention_with_kvcache(**some, return_lse=True)
            assert all(same_bits(out[b], right[b % batch]) and same_bits(lse[b], right_lse[b % batch]) for b in range(count * batch))


def test_a_row_of_many_is_the_row_of_one_step() -> None:
    """Ten times over, with or without LSE, ragged sequences together or alone: the same bits."""
    call = make("128", [500, 65, 0, 300], 2)
    first, first_lse = rawattn.attention_with_kvcache(**fresh(call), return_lse=True)
    for _ in range(9):
        out, lse = rawattn.attention_with_kvcache(**fresh(call), return_lse=True)
        assert same_bits(out, first) and same_bits(lse, first_lse)
    assert same_bits(rawattn.attention_with_kvcache(**fresh(call)), first)
    packed = {name: call[name].reshape(-1, *call[name].shape[2:]) for name in ("q", "k", "v")}
    ragged = rawattn.attention_with_kvcache(**(fresh(call) | packed | {"cu_seqlens_q": device_ints([0, 2, 4, 6, 8])}))
    for b in range(4):
        rows = {name: x[2 * b : 2 * b + 2] for name, x in packed.items()}
        own = {name: call[name][b : b + 1].copy() for name in ("k_cache", "v_cache", "cache_seqlens")}
        alone = rawattn.attention_with_kvcache(**(fresh(call) | rows | own | {"cu_seqlens_q": device_ints([0, 2])}))
        assert same_bits(alone, ragged[2 * b : 2 * b + 2])


def test_one_length_for_all() -> None:
    call = make("128", [129, 129], 1)
    expected = rawattn.attention_with_kvcache(**fresh(call))
    assert same_bits(rawattn.attention_with_kvcache(**(call | {"cache_seqlens": 129})), expected)


# ---- CUDA graphs


REPLAYS = ([500, 65, 0], [0, 0, 1], [600, 630, 64], [1, 300, 639])


@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_graph_replays_with_new_lengths(framework: str, page_size: int | None) -> None:
    calls = [make("128", lengths, 1, page_size=page_size, seed=i) for i, lengths in enumerate(REPLAYS)]
    expected = [rawattn.attention_with_kvcache(**fresh(call)) for call in calls]
    if page_size is not None:  # one pool that holds the pages of any of them
        most = max(len(call["k_cache"]) for call in calls)
        for call in calls:
            for name in ("k_cache", "v_cache"):
                call[name] = cp.concatenate([call[name], call[name][:1].repeat(most - len(call[name]), axis=0)])
    fixed = {name: cp.ascontiguousarray(x).copy() for name, x in calls[0].items()}
    cp.cuda.Device().synchronize()
    if framework == "torch":
        torch = torch_on_gpu()
        inputs = {name: torch.from_dlpack(x) for name, x in fixed.items()}
        rawattn.attention_with_kvcache(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = rawattn.attention_with_kvcache(**inputs)
        out = cp.from_dlpack(result)
        replay = graph.replay
    else:
        stream = cp.cuda.Stream(non_blocking=True)
        rawattn.attention_with_kvcache(**fixed)
        cp.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            out = rawattn.attention_with_kvcache(**fixed)
            captured = stream.end_capture()

        def replay() -> None:
            captured.launch(stream)

    for call, right in zip(calls, expected, strict=True):
        for name, x in fixed.items():
            x[...] = call[name]
        cp.cuda.Device().synchronize()
        replay()
        cp.cuda.Device().synchronize()
        assert same_bits(out, right)
        for name, after in zip(("k_cache", "v_cache"), appended(call), strict=True):
            assert same_bits(fixed[name], after), name


@pytest.mark.parametrize("batch", [1, 3, 64, 72])  # at 64, tiles of up to 16 rows have an SM each
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("decode", DECODES)
def test_a_graph_of_a_decode_step_replays_with_any_lengths(decode: str, page_size: int | None, batch: int) -> None:
    call = decode_step(decode, page_size)
    right, right_lse = rawattn.attention_with_kvcache(**call, return_lse=True)
    turns = [[(first + 3 * i) % len(EVERYONE) for i in range(batch)] for first in EVERYONE]
    fixed = selected(call, turns[0])
    assert (clusters(fixed) > 0) == (batch <= 3)
    out, memory = poisoned_out(fixed)
    rawattn.attention_with_kvcache(**fixed, out=out, return_lse=True)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        _, lse = rawattn.attention_with_kvcache(**fixed, out=out, return_lse=True)
        graph = stream.end_capture()
    for sequences in turns:
        for name, x in selected(call, sequences).items():
            if name not in ("k_cache", "v_cache"):
                fixed[name][...] = x
        for _ in range(10):
            poison(out)
            lse[...] = math.nan
            cp.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            assert same_bits(out, right[sequences]) and same_bits(lse, right_lse[sequences]), sequences
    assert untouched_outside(out, memory)


@pytest.mark.parametrize("stream", ["default", "own", "captured"])
@pytest.mark.parametrize("rows, rotary, page_size, times", [(1, None, None, 1), (1, 128, 16, 1), (1, 128, 16, 17), (100, 128, None, 1)])
def test_each_of_many_steps_sees_what_it_appends_itself(
    rows: int, rotary: int | None, page_size: int | None, times: int, stream: str
) -> None:
    """Steps that overwrite one another's rows, nobody waiting between them: a row read too early would be that of the step before."""
    lengths = [0, 300, 64, CAPACITY - rows] * times
    call = make("128", lengths, rows, rotary=rotary, page_size=page_size)
    count = 200 if rows == 1 else 20
    new = {name: normal((count, *call[name].shape), call[name].dtype.name) for name in ("q", "k", "v")}
    expected, outs = (cp.zeros_like(new["q"]) for _ in range(2))

    def step(i: int, out: Any) -> None:
        rawattn.attention_with_kvcache(**(call | {name: x[i] for name, x in new.items()}), out=out[i])

    for i in range(count):
        step(i, expected)
        cp.cuda.Device().synchronize()
    alone = new["v"][:, 0, 0].repeat(GEOMETRIES["128"][3], axis=1)  # the first query of a sequence that had no keys sees its own
    assert same_bits(expected[:, 0, 0], alone)
    assert_close(expected[-1], reference.attention_with_kvcache(**(call | {name: x[-1] for name, x in new.items()})), l2_factor=2.5)

    own = cp.cuda.Stream.null if stream == "default" else cp.cuda.Stream(non_blocking=True)
    with own:
        for turn in range(2 if stream == "captured" else 1):  # the first compiles and allocates
            if turn == 1:
                own.begin_capture()
            for i in range(count):
                step(i, outs)
        if stream == "captured":
            graph = own.end_capture()
            others = [cp.full(call["q"].shape, 7, np.uint16) for _ in range(8)]  # may get what a call gave back
            outs[...] = 0
            for _ in range(3):
                graph.launch(own)
            assert all(bool((x == 7).all()) for x in others)
    own.synchronize()
    assert same_bits(outs, expected)


def test_threads_that_share_a_stream() -> None:
    """One appends and rotates, which uses a workspace in two kernels; one decodes in a larger one. Each has the bits of its calls alone."""
    calls = [make("128", [0, 300], 100, rotary=128), make("128, 32 to 1", [500] * 7, 3, append=False)]
    expected = [rawattn.attention_with_kvcache(**fresh(call)) for call in calls]

    def repeated(call: dict[str, Any]) -> list[Any]:
        return [rawattn.attention_with_kvcache(**call) for _ in range(100)]  # appending again writes the same rows

    cp.cuda.Device().synchronize()
    with ThreadPoolExecutor(2) as pool:
        for outs, alone in zip(pool.map(repeated, calls), expected, strict=True):
            assert all(same_bits(out, alone) for out in outs)


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_captured_step_of_a_cache(page_size: int | None) -> None:
    torch = torch_on_gpu()
    q, k, v = (torch.randn(2, 60, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (KV_HEADS * 4, KV_HEADS, KV_HEADS))
    pages = None if page_size is None else 16  # forks need pages of their own
    plain, cache = (rawattn.KVCache(2, 64, KV_HEADS, 128, like=q, page_size=page_size, pages=pages) for _ in range(2))
    step = [x[:, :1].clone() for x in (q, k, v)]
    for each in (plain, cache):
        each.append(k[:, :30], v[:, :30])
    cache.attend(*step)  # compiles
    cache.reset()
    cache.append(k[:, :30], v[:, :30])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(*step)
    assert cache.lengths == (30, 30)
    for i in range(30, 60):
        for x, source in zip(step, (q, k, v), strict=True):
            x.copy_(source[:, i : i + 1])
        cache.advance()
        graph.replay()
        assert torch.equal(out, plain.attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1])), i
    assert cache.lengths == plain.lengths == (60, 60) and cache.cache_seqlens.tolist() == [60, 60]
    forks = [each.fork([1, 0, 1]) for each in (cache, plain)]
    again = [x[[1, 0, 1], :1] for x in (q, k, v)]
    assert torch.equal(*(each.attend(*again) for each in forks))
