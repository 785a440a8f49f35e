"""Tiles, their order, their key blocks and their splits as pure functions: tiles.py, and the kernel's part, on the host."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rawattn.checks import LONGEST, window_bounds
from rawattn.compiler import CUDA_SRC, source
from rawattn.launch import PLACES_LIMIT, loads_ahead
from rawattn.reference import Window, visible_keys
from rawattn.spec import DTYPES, MASKS, KernelSpec
from rawattn.tiles import (
    BUSY_CTAS,
    FEW_BLOCKS,
    FEW_KEYS,
    GROUP_BYTES,
    MAX_SPLITS,
    SHARED_MEMORY_LIMIT,
    SHARED_MEMORY_OF_SM,
    SLAB,
    SPLIT_TABLE,
    SPLITS_OF_A_SEQUENCE,
    TABLE,
    Tile,
    cluster_sizes,
    grid,
    heads_per_group,
    is_alone,
    launch_variant,
    launch_variants,
    lists_of_splits,
    slabs,
    split_rows,
    splits_of_a_tile,
    tile_for,
    tile_rows,
    tiles_of_sequence,
)

# Every row of the tile table with every mask that it serves.
SPECS = [KernelSpec("bfloat16", head_dim, head_dim_v, 4, mask) for head_dim, head_dim_v, masks, _ in TABLE for mask in masks]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
examples = settings(deadline=None)

# The constants that the kernel has from its generated prologue are template parameters here, so that one build holds every variant.
HOST = """
#include <algorithm>
#include <cmath>
using std::max, std::min;
#define __device__
#define __forceinline__ inline
static float reciprocal_approx(float x) { return std::nextafter(1 / x, x > 5 ? 0.0f : 2.0f); }  // an ulp off, as it may be
"""
PROLOGUE = f"""
{HOST}
constexpr int SPLITS_OF_A_SEQUENCE = {SPLITS_OF_A_SEQUENCE}, MAX_SPLITS = {MAX_SPLITS};
#include "scheduler.cuh"
"""
FUNCTIONS = """
extern "C" Places split(int m_blocks, int heads, int begin, int end, int fewest) {
    Places places{m_blocks, heads};
    places.split(begin, end, m_blocks * heads, fewest);
    return places;
}

extern "C" Places deal(int begin, int end, int most, int least_blocks) {
    Places places{1, 1};
    places.deal(begin, end, most, least_blocks);
    return places;
}

extern "C" int quotient(int n, int divisor) { return divide(n, divisor); }
extern "C" int items(Places places) { return places.items(); }
extern "C" int count(Places places) { return places.count(); }
extern "C" int at_or_after(Places places, int place) { return places.at_or_after(place); }

template <int TILE_N, bool BOUND_LEFT, bool BOUND_RIGHT>
struct Variant {
    static constexpr int PACK = 1;
#include "mask.cuh"
};

extern "C" void place_tiles(int m_blocks, int heads, int heads_per_group, TilePlace* places) {
    for (int index = 0; index < m_blocks * heads; ++index) places[index] = tile_place(index, m_blocks, heads, heads_per_group);
}
"""
VARIANT = """
using {name} = Variant<{TILE_N}, {BOUND_LEFT}, {BOUND_RIGHT}>;

extern "C" void row_bounds_{name}({name}::Mask mask, int first_row, int rows, int* begin, int* end) {{
    for (int i = 0; i < rows; ++i) begin[i] = mask.begin(first_row + i), end[i] = mask.end(first_row + i);
}}

extern "C" {name}::KeyBlocks key_blocks_{name}({name}::Mask mask, int first_row, int last_row, int own_first, int own_last) {{
    return {name}{{}}.key_blocks(mask, first_row, last_row, own_first, own_last);
}}
"""


class Mask(ctypes.Structure):
    """struct Mask of mask.cuh"""

    _fields_ = [(name, ctypes.c_int) for name in ("keys", "diagonal", "left", "right")]

    @classmethod
    def of(cls, sq: int, sk: int, causal: bool | str, window: Window) -> Mask:
        return cls(sk, 0 if causal == "top-left" else sk - sq, *window_bounds(causal, window))


class KeyBlocks(ctypes.Structure):
    """struct KeyBlocks of mask.cuh"""

    _fields_ = [(name, ctypes.c_int) for name in ("begin", "end", "rest", "full_begin", "full_end", "own_end")]
    begin: int
    end: int
    full_begin: int
    full_end: int
    own_end: int


class Places(ctypes.Structure):
    """struct Places of scheduler.cuh"""

    _fields_ = [(name, ctypes.c_int) for name in ("m_blocks", "heads", "first_block", "blocks", "splits", "cost")]
    first_block: int
    blocks: int
    splits: int
    cost: int


class DeviceCode:
    """The kernel's functions in a shared library of the host."""

    def __init__(self, library: ctypes.CDLL):
        self.compiled = library

    def place_tiles(self, m_blocks: int, heads: int, heads_per_group: int) -> np.ndarray:
        """(m_block, head) of every index, in order."""
        places = np.empty((m_blocks * heads, 2), np.intc)
        self.compiled["place_tiles"](m_blocks, heads, heads_per_group, places.ctypes.data_as(ctypes.c_void_p))
        return places

    def split(self, m_blocks: int, heads: int, begin: int, end: int, fewest: int) -> Places:
        function = self.compiled["split"]
        function.restype = Places
        return function(m_blocks, heads, begin, end, fewest)

    def deal(self, begin: int, end: int, most: int, least_blocks: int) -> Places:
        function = self.compiled["deal"]
        function.restype = Places
        return function(begin, end, most, least_blocks)

    def row_bounds(self, spec: KernelSpec, mask: Mask, first_row: int, rows: int) -> np.ndarray:
        """mask.begin and mask.end of each row."""
        bounds = np.empty((2, rows), np.intc)
        self.compiled[f"row_bounds_{spec.name}"](mask, first_row, rows, *[x.ctypes.data_as(ctypes.c_void_p) for x in bounds])
        return bounds

    def key_blocks(self, spec: KernelSpec, mask: Mask, first_row: int, last_row: int, own_first: int, own_last: int) -> KeyBlocks:
        function = self.compiled[f"key_blocks_{spec.name}"]
        function.restype = KeyBlocks
        return function(mask, first_row, last_row, own_first, own_last)


@pytest.fixture(scope="module")
def device_code(tmp_path_factory: pytest.TempPathFactory) -> DeviceCode:
    text = PROLOGUE + FUNCTIONS
    for spec in SPECS:
        constants = dict(re.findall(r"^constexpr \w+ (\w+) = (\w+);$", source(spec), re.MULTILINE))
        text += VARIANT.format(name=spec.name, **constants)
    return DeviceCode(compiled_for_the_host(text, tmp_path_factory.mktemp("device_code") / "device_code.so"))


def compiled_for_the_host(text: str, library: Path) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++) is on the PATH")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", str(CUDA_SRC), "-x", "c++", "-", "-o", str(library)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def lengths(block: int) -> st.SearchStrategy[int]:
    """Few or many rows or keys, or whole blocks and one more or less."""
    return st.one_of(st.integers(0, 300), st.integers(0, 4200), around(st.integers(0, 12).map(lambda blocks: blocks * block)))


def around(length: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return st.builds(lambda n, more: max(0, n + more), length, st.integers(-1, 1))


def masks(mask: str, bounded: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[bool | str, Window]]:
    """The (causal, window) that the kernels of `mask` serve."""
    unbounded = st.sampled_from([None, -1])
    side = st.one_of(unbounded, bounded)
    if mask == "full":
        return st.tuples(st.just(False), st.one_of(st.none(), st.tuples(unbounded, unbounded)))
    if mask == "causal":
        right = st.tuples(st.just(False), st.tuples(unbounded, bounded))
        return st.one_of(right, st.tuples(st.sampled_from([True, "top-left"]), st.one_of(st.none(), st.tuples(unbounded, side))))
    return st.tuples(st.sampled_from([False, True, "top-left"]), st.tuples(bounded, side))


@examples
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 70))
def test_every_tile_is_visited_once_and_the_longest_of_a_group_first(
    device_code: DeviceCode, m_blocks: int, heads: int, heads_per_group: int
) -> None:
    places = device_code.place_tiles(m_blocks, heads, heads_per_group)
    assert sorted(map(tuple, places.tolist())) == list(itertools.product(range(m_blocks), range(heads)))
    step = np.diff(np.column_stack([places[:, 0], places[:, 1] // heads_per_group]), axis=0)
    m_block_step, group_step = step.T
    assert (group_step >= 0).all()  # one group after the other
    assert (m_block_step[group_step == 0] <= 0).all()


@pytest.mark.parametrize(
    "head_dim, batch, kv_heads, gqa_ratio, keys, heads",
    [
        (128, 32, 16, 1, 512, 32),  # 8 MB of K and V: two sequences
        (128, 16, 16, 1, 1024, 32),
        (128, 4, 16, 1, 4096, 16),  # 32 MB
        (128, 1, 16, 1, 16384, 4),  # a quarter of a sequence
        (256, 32, 8, 1, 512, 16),
        (64, 2, 71, 1, 4096, 29),  # of 142 heads: nothing divides them
        (128, 1, 40, 1, 5000, 10),  # 13 would leave a group of one
        (128, 23, 16, 1, 700, 16),  # 23 sequences do not go in pairs
        (128, 1, 2, 1, 1 << 20, 1),
        (128, 4, 8, 4, 2048, 32),  # as many query heads as without GQA
        (128, 1, 1, 64, 1 << 20, 64),  # but all of a KV head
    ],
)
def test_heads_that_share_l2(head_dim: int, batch: int, kv_heads: int, gqa_ratio: int, keys: int, heads: int) -> None:
    assert heads_per_group(KernelSpec("bfloat16", head_dim, head_dim, gqa_ratio, "causal"), batch, kv_heads, keys) == heads
    assert heads_per_group(KernelSpec("bfloat16", head_dim, head_dim, gqa_ratio, "full"), batch, kv_heads, keys) == 1


@examples
@given(st.sampled_from([64, 128, 256]), st.integers(1, 64), st.integers(1, 128), st.integers(1, 1 << 20))
def test_heads_that_share_l2_fit_in_it(head_dim: int, batch: int, kv_heads: int, keys: int) -> None:
    heads, total = heads_per_group(KernelSpec("bfloat16", head_dim, head_dim, 1, "causal"), batch, kv_heads, keys), batch * kv_heads
    assert 1 <= heads <= total
    assert heads == 1 or heads * 4 * keys * head_dim <= GROUP_BYTES[1]
    groups = -(-total // heads)
    assert groups * heads - total < groups  # the last has less than one head for each group too few


@each_spec
@examples
@given(data=st.data())
def test_rows_see_the_keys_that_the_reference_sees(device_code: DeviceCode, spec: KernelSpec, data: st.DataObject) -> None:
    near = lengths(64)
    far = st.one_of(near, near.map(lambda n: LONGEST - n))  # up to where positions come near the end of int32
    rows, sk = data.draw(near, "rows"), data.draw(far, "Sk")
    causal, window = data.draw(masks(spec.mask, far), "causal, window")
    # The last rows of a sequence see the same keys whatever comes before them, unless positions count from the first.
    sq = rows if causal == "top-left" else data.draw(st.sampled_from([rows, LONGEST]), "Sq")
    begin, end = device_code.row_bounds(spec, Mask.of(sq, sk, causal, window), sq - rows, rows)
    first, last = visible_keys(rows, sk, causal, window)
    assert (begin >= 0).all() and (end <= sk).all()
    np.testing.assert_array_equal(np.minimum(begin, sk), first)
    np.testing.assert_array_equal(np.maximum(end, 0), last)


@each_spec
@examples
@given(data=st.data())
def test_key_blocks_are_those_that_the_tile_sees(device_code: DeviceCode, spec: KernelSpec, data: st.DataObject) -> None:
    tile = tile_for(spec)
    sq, sk = max(1, data.draw(lengths(tile.tile_m), "Sq")), data.draw(lengths(tile.tile_n), "Sk")
    first_row = tile.tile_m * data.draw(st.integers(0, (sq - 1) // tile.tile_m), "m_block")
    last_row = min(first_row + tile.tile_m, sq) - 1
    # Bounds with which the tile's first or last row just reaches the first or last key.
    corners = [abs(row - key) for row in (first_row, last_row, sq - first_row, sq - last_row) for key in (0, sk)]
    causal, window = data.draw(masks(spec.mask, st.one_of(lengths(tile.tile_n), around(st.sampled_from(corners)))), "causal, window")

    first, last = (bounds[first_row : last_row + 1, None] for bounds in visible_keys(sq, sk, causal, window))
    key = np.arange(-(-sk // tile.tile_n) * tile.tile_n)  # to the end of the last block, past the last key
    seen = ((first <= key) & (key < last)).reshape(last_row + 1 - first_row, -1, tile.tile_n)  # (row, block, key)
    needed = np.flatnonzero(seen.any(axis=(0, 2))).tolist()

    mask = Mask.of(sq, sk, causal, window)
    loaded = device_code.key_blocks(spec, mask, first_row, last_row, first_row, last_row)  # as the producer asks
    assert loaded.end - loaded.begin == len(needed)  # 0 exactly when no row sees a key
    assert list(range(loaded.begin, loaded.end)) == needed
    for own_first in range(first_row, first_row + tile.tile_m, 64):
        blocks = device_code.key_blocks(spec, mask, first_row, last_row, own_first, own_first + 63)
        assert (blocks.begin, blocks.end) == (loaded.begin, loaded.end)
        # On a side without a bound the kernel masks no block but the last.
        assert spec.mask == "window" or blocks.full_begin == 0
        assert spec.mask != "full" or blocks.full_end >= blocks.end - 1
        full = range(max(blocks.begin, blocks.full_begin), min(blocks.end, blocks.full_end))
        own = seen[own_first - first_row :][:64]
        whole = np.flatnonzero(own.all(axis=(0, 2))).tolist()
        assert set(full) <= set(whole)
        seen_keys = np.flatnonzero(own.any(axis=0).ravel())
        assert (seen_keys < blocks.own_end).all()
        if len(own) == 64:  # none is masked without need, or computed that nobody sees
            assert list(full) == whole
            assert not seen_keys.size or blocks.own_end == seen_keys[-1] + 1


def test_every_spec_has_a_tile_that_fits_the_multiprocessor() -> None:
    dims = range(8, 257, 8)
    for spec in itertools.starmap(KernelSpec, itertools.product(DTYPES, dims, dims, (1, 7), MASKS, (False, True))):
        tile = tile_for(spec)
        assert tile.tile_m % 64 == 0, spec  # a consumer warpgroup's rows
        assert tile.tile_n % 16 == 0 and tile.tile_n <= 256, spec  # the K of P V's WGMMA, two of Q K^T's smallest N, and its largest
        assert tile.shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT, spec
        producer, consumer = tile.registers
        assert all(24 <= registers <= 256 and registers % 8 == 0 for registers in tile.registers), spec  # what setmaxnreg takes
        assert 128 * (producer + tile.consumer_warpgroups * consumer) <= 65536, spec
        assert tile.tile_n // 2 + tile.tile_n // 4 + spec.head_dim_v // 2 < consumer, spec  # scores, P and output


def test_every_spec_whose_keys_are_split_has_a_tile_of_its_own_that_fits_the_multiprocessor() -> None:
    dims = range(8, 257, 8)
    reached = set()
    for dtype, head_dim, head_dim_v, ratio, rows_q in itertools.product(DTYPES, dims, dims, (1, 7, 12, 32, 64, 67), (None, 0, 1, 9, 100)):
        rows = split_rows(head_dim, head_dim_v, ratio, 2, rows_q)
        if rows == 0:
            continue
        spec = KernelSpec(dtype, head_dim, head_dim_v, ratio, "causal", True, rows)
        tile = tile_for(spec)
        reached.add(id(tile))
        assert id(tile) in {id(row) for *_, row in SPLIT_TABLE}, spec
        assert tile.tile_m == rows and ratio % spec.pack == 0 and spec.pack <= rows, spec
        assert tile.tile_n % (64 if tile.few_rows else 16) == 0 and tile.tile_n <= 256, spec
        assert tile.shared_memory_bytes(spec) <= SHARED_MEMORY_OF_SM // tile.ctas_per_sm - 1024, spec
        if tile.few_rows:
            for in_cluster in [variant for variant in launch_variants(spec) if variant.cluster]:
                of_cluster = tile_for(in_cluster)
                assert (of_cluster.tile_m, of_cluster.tile_n) == (tile.tile_m, tile.tile_n)
                assert of_cluster.shared_memory_bytes(in_cluster) <= SHARED_MEMORY_OF_SM // of_cluster.ctas_per_sm - 1024, spec
                q_and_p = rows * (slabs(head_dim) + (0 if tile.shares_keys else 2 * slabs(tile.tile_n)))
                operands = 2 * SLAB * (q_and_p + of_cluster.stages * tile.tile_n * (slabs(head_dim) + slabs(head_dim_v)))
                # To a CTA: that many splits' worth of columns, and all states; or of rows, besides what two warpgroups exchange.
                results = of_cluster.results_of_cta(in_cluster)
                sent = results * SLAB * slabs(head_dim_v) + 2 * MAX_SPLITS
                if tile.shares_keys:
                    sent = (results + 1) * head_dim_v + 4 + 2 * results
                assert operands + 4 * rows * sent <= of_cluster.shared_memory_bytes(in_cluster), spec
                for used in range(1, rows + 1):  # a result has as many rows as there are, rounded up
                    kept = used + used % 2 if rows == 8 else rows
                    assert 2 <= results <= of_cluster.splits_of_cta(in_cluster, used) <= min(4, results * rows // kept)
        if tile.ctas_per_sm > 1:
            alone = replace(spec, alone=True)
            assert tile_for(alone).ctas_per_sm == 1 and tile_for(alone).stages >= tile.stages
            assert tile_for(alone).shared_memory_bytes(alone) <= SHARED_MEMORY_LIMIT, spec
        producer, consumer = tile.registers
        assert tile.registers == (0, 0) or all(24 <= registers <= 256 and registers % 8 == 0 for registers in tile.registers), spec
        assert 128 * tile.ctas_per_sm * (producer + tile.consumer_warpgroups * consumer) <= 65536, spec
    assert reached == {id(tile) for *_, tile in SPLIT_TABLE}


@examples
@given(st.sampled_from([64, 128, 192, 256]), st.sampled_from([1, 4, 7, 8, 32, 67]), st.integers(1, 64), st.integers(1, 5000))
def test_keys_are_split_where_a_sequence_alone_would_leave_half_of_the_gpu_idle(
    head_dim: int, ratio: int, kv_heads: int, rows_q: int
) -> None:
    rows = split_rows(head_dim, head_dim, ratio, kv_heads, rows_q)
    if rows_q * ratio <= 64:
        assert rows_q * ratio <= rows <= max(8, 2 * rows_q * ratio)  # whatever the batch, so that one token's bits are its own
    else:
        chunk = split_rows(head_dim, head_dim, ratio, kv_heads, None)
        tiles = -(-rows_q * ratio // chunk) * kv_heads
        assert rows == (chunk if 2 * tiles <= SPLITS_OF_A_SEQUENCE else 0)


# ---- splits

few = st.integers(1, 300)


def test_the_kernel_takes_as_many_keys_for_few() -> None:
    assert f"constexpr int FEW_KEYS = {FEW_KEYS};" in source(KernelSpec("float16", 64, 64, 1, "full"))


@examples
@given(st.integers(0, 2**21 - 1), st.integers(1, 2**20), st.sampled_from([-1, 0, 1]))
def test_quotients_are_exact_though_reciprocals_are_not(device_code: DeviceCode, quotient: int, divisor: int, more: int) -> None:
    n = min(max(0, quotient * divisor + more), 2**30)
    assert device_code.compiled["quotient"](n, divisor) == n // divisor


@examples
@given(few, few, st.integers(0, 1000), st.integers(-2, 40000), st.integers(0, 4))
def test_splits_are_equal_and_cover_the_keys(
    device_code: DeviceCode, m_blocks: int, heads: int, begin: int, total: int, fewest: int
) -> None:
    assume(m_blocks * heads * (max(0, total) + MAX_SPLITS) < PLACES_LIMIT)  # the host refuses longer lists
    places = device_code.split(m_blocks, heads, begin, begin + total, fewest)
    total = max(0, total)
    assert places.first_block == begin and places.cost == places.blocks + 1
    assert 1 <= places.splits <= MAX_SPLITS // 2
    # All have `blocks` blocks but the last, which has the rest; a tile that sees nothing has one split of nothing.
    sizes = [min(places.blocks, total - split * places.blocks) for split in range(places.splits)]
    assert sum(sizes) == total and (total == 0 or min(sizes) > 0)
    # Up to `fewest` blocks, which hold FEW_KEYS, have a split each. Of more there are as many splits, where that is no more than 2: beyond,
    # rounding up to whole blocks may leave fewer.
    assert total > fewest or places.splits == max(1, total)
    assert fewest > 2 or places.splits >= min(fewest, total)
    # As many as one sequence needs to fill a GPU, less what is lost to rounding a split up to whole blocks.
    wanted = max(1, fewest, min(SPLITS_OF_A_SEQUENCE // (m_blocks * heads), MAX_SPLITS // 2))
    assert places.blocks == max(1, -(-total // wanted))
    for _, _, tile in SPLIT_TABLE:
        if not tile.few_rows and tile.fewest_splits == fewest:
            assert places.splits == splits_of_a_tile(tile, m_blocks * heads, total)
    compiled = device_code.compiled
    assert compiled["items"](places) == m_blocks * heads * places.splits
    assert compiled["count"](places) == m_blocks * heads * places.splits * (places.blocks + 1)


@examples
@given(st.sampled_from([tile for _, _, tile in SPLIT_TABLE if tile.few_rows]), few, st.integers(0, 1000), st.integers(-2, 40000))
def test_each_split_is_dealt_a_block_and_an_equal_run(device_code: DeviceCode, tile: Tile, tiles: int, begin: int, total: int) -> None:
    places = device_code.deal(begin, begin + total, tile.most_splits(tiles), tile.least_blocks)
    total = max(0, total)
    assert places.first_block == begin and places.splits == splits_of_a_tile(tile, tiles, total) <= MAX_SPLITS
    assert places.splits <= max(1, total)  # so each has a block
    assert places.blocks == max(1, -(-total // places.splits)) and places.cost == places.blocks + 1


@examples
@given(few, few, st.integers(0, 4000), st.data())
def test_the_split_at_or_after_a_place(device_code: DeviceCode, m_blocks: int, heads: int, total: int, data: st.DataObject) -> None:
    places = device_code.split(m_blocks, heads, 0, total, 1)
    place = data.draw(st.integers(-5, device_code.compiled["count"](places)), "place")
    item = device_code.compiled["at_or_after"](places, place)
    assert item * places.cost >= max(0, place) > (item - 1) * places.cost


FEW_ROWS = [(head_dim, head_dim_v, tile) for head_dim, head_dim_v, tile in SPLIT_TABLE if tile.few_rows]


def spec_of_row(head_dim: int, head_dim_v: int, rows: int) -> KernelSpec:
    return KernelSpec("bfloat16", head_dim, head_dim_v, 1, "causal", True, rows)


@examples
@example(FEW_ROWS[0], 2, 60, 1000, 132, 8)  # nearly a tile for each SM
@example(FEW_ROWS[3], 8, 32, 500, 132, 8)
@given(
    st.sampled_from(FEW_ROWS),
    st.integers(1, 160),
    st.integers(1, 140),
    st.integers(0, 100000),
    st.sampled_from([78, 114, 132]),
    st.integers(1, 64),
)
def test_clusters_hold_all_splits_and_are_on_the_gpu_at_once(
    row: tuple[int, int, Tile], heads: int, batch: int, keys: int, multiprocessors: int, rows: int
) -> None:
    head_dim, head_dim_v, tile = row
    tiles, rows = batch * heads, min(rows, tile.tile_m)
    spec = replace(spec_of_row(head_dim, head_dim_v, tile.tile_m), cluster=True)
    sizes = cluster_sizes(spec, rows, tiles, heads, keys, multiprocessors)
    assert set(sizes) <= {1, 2, 4, 8, 16} and sizes == sorted(sizes, reverse=True)
    blocks = -(-keys // tile.tile_n)
    most = max((splits_of_a_tile(tile, heads, fewer) for fewer in range(1, blocks + 1)), default=1)

    def is_good(size: int) -> bool:
        at_once = tiles * size <= multiprocessors * (tile.ctas_per_sm if size <= 2 else 1)
        splits = -(-most // size)
        waits = heads * size < BUSY_CTAS and splits * -(-blocks // most) > FEW_BLOCKS
        return at_once and splits <= tile_for(spec).splits_of_cta(spec, rows) and not waits

    assert all(is_good(size) for size in sizes)
    assert tile.ctas_per_sm > 1 or 1 not in sizes
    assert sizes or not any(is_good(size) for size in (1, 2, 4, 8, 16)[tile.ctas_per_sm == 1 :] if size <= most)


@pytest.mark.parametrize("rows, heads, tiles, ctas, lists", [
    (8, 8, 1024, 264, 8),
    (8, 8, 264, 264, 1),  # a tile for each CTA
    (8, 5, 1000, 264, 1),
    (64, 4, 512, 132, 4),
    (64, 8, 512, 132, 1),
    (128, 4, 512, 132, 1),  # chunks
])  # fmt: skip
def test_heads_have_lists_of_their_own_where_ctas_have_several_tiles(rows: int, heads: int, tiles: int, ctas: int, lists: int) -> None:
    assert lists_of_splits(spec_of_row(128, 128, rows), heads, tiles, ctas) == lists


@pytest.mark.parametrize(
    "rows, tiles, alone", [(8, 115, False), (8, 116, True), (8, 132, True), (8, 133, False), (32, 128, False), (128, 128, False)]
)
def test_where_nearly_each_sm_has_a_tile_it_has_one_cta(rows: int, tiles: int, alone: bool) -> None:
    spec = spec_of_row(128, 128, rows)
    assert is_alone(spec, tiles, 132) == alone
    assert launch_variant(spec, tiles, 1, 1, 8192, 132)[0].alone == alone
    if alone:
        assert grid(replace(spec, alone=True), 32, tiles, 132) == tiles


@examples
@given(st.sampled_from([row for row in SPLIT_TABLE if row not in FEW_ROWS]), st.integers(1, 140), st.integers(0, 100000))
def test_only_tiles_of_few_rows_have_clusters(row: tuple[int, int, Tile], tiles: int, keys: int) -> None:
    head_dim, head_dim_v, tile = row
    spec = spec_of_row(head_dim, head_dim_v, tile.tile_m)
    assert launch_variant(spec, tiles, 1, 1, keys, 132) == (spec, 0)


@pytest.mark.parametrize("batch, rows, heads, keys, largest, expected", [
    (1, 32, 8, 4096, 16, (8, False)),
    (1, 64, 8, 4096, 16, (8, False)),
    (2, 64, 8, 4096, 16, (8, False)),
    (2, 64, 8, 4096, 4, (4, False)),  # no GPC has room for eight
    (2, 64, 8, 4096, 1, (0, False)),
    (16, 64, 8, 32768, 16, (0, False)),
    (1, 8, 8, 8192, 16, (8, True)),  # few CTAs, each with an SM
    (8, 8, 8, 2048, 16, (2, False)),
    (32, 8, 4, 512, 16, (2, False)),  # two CTAs an SM
    (32, 8, 8, 512, 16, (1, False)),
    (32, 8, 4, 512, 0, (0, True)),  # nearly a tile for each SM
    (8, 8, 4, 8192, 16, (4, False)),
    (8, 8, 4, 16384, 16, (0, False)),  # a long sequence among short ones would wait for its 16 CTAs
    (1, 8, 8, 32768, 16, (8, True)),
])  # fmt: skip
def test_tiles_have_clusters_where_all_are_on_the_gpu_at_once(
    batch: int, rows: int, heads: int, keys: int, largest: int, expected: tuple[int, bool]
) -> None:
    spec, (cluster, alone) = spec_of_row(128, 128, rows), expected
    variant = launch_variant(spec, batch, rows, heads, keys, 132, lambda spec, tiles, size: size <= largest)
    assert variant == (replace(spec, cluster=cluster > 0, alone=alone), cluster)
    assert variant[0] in launch_variants(spec)


@pytest.mark.parametrize("spec, lengths, expected", [
    (spec_of_row(128, 128, 8), ["cache_seqlens"], True),
    (spec_of_row(128, 128, 8), [], True),
    (replace(spec_of_row(128, 128, 8), page_rows=16), ["cache_seqlens", "page_table"], False),
    (replace(spec_of_row(128, 128, 8), mask="window"), ["cache_seqlens"], False),
    (spec_of_row(128, 128, 8), ["cache_seqlens", "cache_batch_idx"], False),
    (spec_of_row(128, 128, 8), ["cache_seqlens", "cache_leftpad"], False),
])  # fmt: skip
def test_keys_are_loaded_before_the_length_where_nothing_else_says_where_they_are(
    spec: KernelSpec, lengths: list[str], expected: bool
) -> None:
    assert loads_ahead(spec, lengths) == expected


# ---- shares: TileList and the splits of a cluster's CTAs, read by a warp of 32 contexts that take turns and meet in each intrinsic

WARP = """
#include <cstdint>
#include <ucontext.h>

struct float2 { float x, y; };
struct alignas(64) TensorMap { char bytes[128]; };
struct Append {};

struct Place { int x, y, z; };

static Place blockIdx, gridDim, threadIdx;
static int rank, ranks;
int cluster_rank() { return rank; }
int cluster_size() { return ranks; }
void prefetch_global(const void*) {}
static ucontext_t lanes[32], caller;

// Every lane calls it with its value; returns those of all. Two sets in turn, for a lane writes the next before the last has read these.
const int* meet(int value) {
    static int sets[2][32], times[32];
    const int lane = threadIdx.x;
    int* values = sets[times[lane]++ % 2];
    values[lane] = value;
    swapcontext(&lanes[lane], &lanes[(lane + 1) % 32]);
    threadIdx.x = lane;
    return values;
}
int __ffs(unsigned bits) { return __builtin_ffs(bits); }
void __syncwarp() { meet(0); }
int __shfl_sync(unsigned, int value, int lane) { return meet(value)[lane]; }
int __shfl_up_sync(unsigned, int value, int distance) {
    const int lane = threadIdx.x;
    const int* values = meet(value);
    return values[lane < distance ? lane : lane - distance];
}
uint32_t __ballot_sync(unsigned, bool value) {
    const int* values = meet(value);
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(values[lane]) << lane;
    return bits;
}
"""
SHARES = """
static const Arguments* arguments;
static WorkTile slots[TILE_SLOTS], *written;
static int room, found;

static void take(int lane, const WorkTile& tile) {
    if (lane == 0) {
        if (found < room) written[found] = tile;
        ++found;
    }
}

// As produce() walks it.
static void walk_list(int lane) {
    threadIdx.x = lane;
    static int parts[CTA_WARPS];
    TileList list;
    for (int warp = CTA_WARPS; warp-- > 0;) {
        list = {};
        list.prepare(*arguments, parts, warp);
    }
    __syncwarp();
    int place = list.begin(*arguments, parts), slot = 0;
    while (true) {
        place = list.find(*arguments, place, slots[(slot + TILE_SLOTS - 1) % TILE_SLOTS], slots[slot]);
        __syncwarp();
        const WorkTile& tile = slots[slot];
        if (tile.first_row < 0) return;
        take(lane, tile);
        const KeyBlocks blocks = tile_blocks(*arguments, tile, tile.first_row);
        if (blocks.begin < blocks.end || tile.splits > 1) slot = (slot + 1) % TILE_SLOTS;
        __syncwarp();
    }
}

// As produce_splits() does.
static void walk_cluster(int lane) {
    WorkTile tile = first_split(*arguments, cached_keys(*arguments, blockIdx.z));
    for (; tile.split < tile.splits; go_to_next_split(tile)) take(lane, tile);
}

extern "C" bool new_keys_in(const WorkTile* tile, int new_keys) {
    Arguments args{};
    args.new_keys = new_keys;
    return has_new_keys(args, *tile);
}

extern "C" int words_of_a_tile() { return sizeof(WorkTile) / sizeof(int); }

// The splits that a CTA takes, in its order; returns how many there are. It is number `cta` of a grid of `ctas` or, if `of_cluster`,
// of the cluster of tile (b, head). Heads have `lists` lists.
extern "C" int share(bool of_cluster, int b, int head, int cta, int ctas, int lists, int most_splits, int batch, int heads, int seqlen_q,
                     int seqlen_k, const int* cu_seqlens_q, const int* cu_seqlens_k, const int* cache_seqlens, int left, int right,
                     int size, WorkTile* tiles) {
    static char stacks[32][1 << 16];
    Arguments args{};
    args.batch = batch, args.heads = heads, args.heads_per_group = heads / lists, args.seqlen_q = seqlen_q, args.seqlen_k = seqlen_k;
    args.cu_seqlens_q = cu_seqlens_q, args.cu_seqlens_k = cu_seqlens_k, args.cache_seqlens = cache_seqlens;
    args.left = left, args.right = right, args.bottom_right = 1, args.most_splits = most_splits;
    arguments = &args, gridDim = {lists, ctas / lists, 1}, ranks = ctas, rank = cta;
    blockIdx = of_cluster ? Place{cta, head, b} : Place{cta % lists, cta / lists, 0};
    written = tiles, room = size, found = 0;
    for (size_t i = 0; i < sizeof slots / sizeof(int); ++i) reinterpret_cast<int*>(slots)[i] = 1000 * i;  // what another kernel left there
    for (int lane = 0; lane < 32; ++lane) {
        getcontext(&lanes[lane]);
        lanes[lane].uc_stack.ss_sp = stacks[lane], lanes[lane].uc_stack.ss_size = sizeof stacks[lane];
        lanes[lane].uc_link = lane < 31 ? &lanes[lane + 1] : &caller;
        makecontext(&lanes[lane], reinterpret_cast<void (*)()>(of_cluster ? walk_cluster : walk_list), 1, lane);
    }
    swapcontext(&caller, &lanes[0]);
    return found;
}
"""
SPLIT_SPECS = [
    KernelSpec("bfloat16", 128, 128, 4, "full", True, 8),
    KernelSpec("bfloat16", 128, 128, 7, "causal", True, 128),
    KernelSpec("bfloat16", 64, 64, 3, "window", True, 32),
    KernelSpec("bfloat16", 64, 64, 3, "window", True, 64),
]
CLUSTER_SPECS = [replace(SPLIT_SPECS[number], cluster=True) for number in (0, 2)]
# struct WorkTile of pipeline.cuh
WORK_TILE = (
    "first_row", "head", "batch", "q_start", "q_length", "q_row", "q_offset", "q_batch", "k_length", "k_row", "k_offset", "k_batch",
    "first_block", "rest_block", "end_block", "split", "splits", "run_begin", "run_end", "first_splits", "slot",
)  # fmt: skip
Split = dict[str, int]


@pytest.fixture(scope="module")
def tile_lists(tmp_path_factory: pytest.TempPathFactory) -> dict[KernelSpec, ctypes.CDLL]:
    """pipeline.cuh up to what one tile is and cluster.cuh up to what a CTA loads, for each spec."""
    kernel, _ = (CUDA_SRC / "pipeline.cuh").read_text(encoding="utf-8").split("// Where row `tile_row` of a tile goes", 1)
    kernel += (CUDA_SRC / "cluster.cuh").read_text(encoding="utf-8").split("// ---- the first keys ----", 1)[0]
    kernel = re.sub(r'#include "(ptx|append|softmax).cuh"', "", kernel)  # what they declare needs a GPU
    folder, libraries = tmp_path_factory.mktemp("tile_lists"), {}
    for spec in SPLIT_SPECS + CLUSTER_SPECS:
        constants = "\n".join(re.findall(r"^constexpr \w+ \w+ = \w+;$", source(spec), re.MULTILINE))
        libraries[spec] = compiled_for_the_host(HOST + constants + WARP + kernel + SHARES, folder / f"{spec.name}.so")
        assert libraries[spec]["words_of_a_tile"]() == len(WORK_TILE)
    return libraries


def shares(
    library: ctypes.CDLL,
    spec: KernelSpec,
    ctas: int,
    heads: int,
    q_lengths: list[int],
    k_lengths: list[int],
    window: Window,
    cluster: tuple[int, int] | None = None,
    lists: int = 1,
) -> list[list[Split]]:
    """The splits that each of `ctas` CTAs takes, in its order: those of the grid, or of the cluster of tile (b, head)."""
    if tile_for(spec).few_rows:  # a cache, and as many queries for each sequence
        (seqlen_q,) = set(q_lengths)
        lengths = [None, None, np.array(k_lengths, np.intc)]
    else:
        seqlen_q = sum(q_lengths)
        lengths = [*(np.cumsum([0, *x], dtype=np.intc) for x in (q_lengths, k_lengths)), None]
    buffer = np.empty((1 << 13, len(WORK_TILE)), np.intc)
    *pointers, tiles = [None if x is None else x.ctypes.data_as(ctypes.c_void_p) for x in (*lengths, buffer)]
    counted = tiles_of_sequence(spec, seqlen_q, heads * spec.pack) if tile_for(spec).few_rows else heads
    most = tile_for(spec).most_splits(counted)
    sizes = most, len(q_lengths), heads, seqlen_q, max(k_lengths)
    of, result = (cluster is not None, *(cluster or (0, 0))), []
    for cta in range(ctas):
        found = library["share"](*of, cta, ctas, lists, *sizes, *pointers, *window_bounds(False, window), len(buffer), tiles)
        assert found <= len(buffer)
        result.append([dict(zip(WORK_TILE, row, strict=True)) for row in buffer[:found].tolist()])
    return result


def draw_lengths(data: st.DataObject, spec: KernelSpec, sequences: st.SearchStrategy[list[tuple[int, int]]]) -> tuple[list[int], list[int]]:
    """Lengths of q and k; where rows are few all sequences have as many queries, of one tile."""
    q_lengths, k_lengths = map(list, zip(*data.draw(sequences, "sequences"), strict=True))
    if tile_for(spec).few_rows:
        q_lengths = [data.draw(st.integers(1, spec.split_rows // spec.pack), "queries")] * len(k_lengths)
    return q_lengths, k_lengths


def by_tile(shares: list[list[Split]]) -> dict[tuple[int, ...], list[tuple[int, Split]]]:
    """(batch, head, first_row) -> its splits, each with the CTA that has it, in the order of the CTAs."""
    tiles: dict[tuple[int, ...], list[tuple[int, Split]]] = {}
    for cta, share in enumerate(shares):
        for split in share:
            tiles.setdefault((split["batch"], split["head"], split["first_row"]), []).append((cta, split))
    return tiles


def cost(spec: KernelSpec, split: Split) -> int:
    """Its blocks and one more; where rows are few, one block comes before the rest."""
    return split["end_block"] - split["rest_block"] + 2 if tile_for(spec).few_rows else split["end_block"] - split["first_block"] + 1


def blocks_of(spec: KernelSpec, split: Split) -> list[int]:
    if tile_for(spec).few_rows:
        return [split["first_block"], *range(split["rest_block"], split["end_block"])]
    return list(range(split["first_block"], split["end_block"]))


@pytest.mark.parametrize("spec", SPLIT_SPECS, ids=lambda spec: spec.name)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_split_is_in_one_share_and_all_who_have_part_of_a_tile_agree(
    tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec, data: st.DataObject
) -> None:
    sequence = st.tuples(st.integers(0, 3), st.one_of(st.integers(0, 200), st.integers(0, 20000)))
    long = st.tuples(st.integers(0, 70), st.integers(0, 3000))
    batches = st.one_of(  # a warp looks at 32 sequences at a time
        st.lists(sequence, min_size=1, max_size=32), st.lists(sequence, min_size=33, max_size=70), st.lists(long, min_size=1, max_size=5)
    )
    q_lengths, k_lengths = draw_lengths(data, spec, batches)
    heads = data.draw(st.sampled_from([1, 2, 8]), "heads")
    lists = data.draw(st.sampled_from([1, heads]), "lists")
    ctas = lists * data.draw(st.integers(1, 140 // lists), "CTAs of a list")
    window: Window = {"full": (None, None), "causal": (None, 0), "window": (data.draw(st.integers(0, 3000), "left"), 0)}[spec.mask]
    taken = shares(tile_lists[spec], spec, ctas, heads, q_lengths, k_lengths, window, lists=lists)

    tiles = by_tile(taken)
    tile_n = tile_for(spec).tile_n
    expected = [range(0, q_length * spec.pack, tile_rows(spec)) for q_length in q_lengths]
    assert set(tiles) == {(b, head, row) for b, rows in enumerate(expected) for row in rows for head in range(heads)}
    shared_slots = []
    for (b, _, _), splits in tiles.items():
        holders, parts = [cta for cta, _ in splits], [split for _, split in splits]
        # Each split once, in order, from CTA to CTA; those of one CTA are its run.
        assert [split["split"] for split in parts] == list(range(parts[0]["splits"])) and holders == sorted(holders)
        for cta in set(holders):
            run = [split for holder, split in splits if holder == cta]
            for split in run:
                assert (split["run_begin"], split["run_end"]) == (run[0]["split"], run[-1]["split"] + 1)
                assert split["splits"] == len(parts)
                # What the CTAs must agree on, since they meet there.
                assert split["slot"] == holders[0] and split["first_splits"] == holders.count(holders[0])
        if holders[0] != holders[-1]:
            shared_slots.append(parts[0]["slot"])
        # Together they cover what any query of the sequence sees, whatever else is in the batch and whoever takes them.
        blocks = sorted(block for split in parts for block in blocks_of(spec, split))
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        if tile_for(spec).few_rows:  # where a split begins needs no length, if the first key is seen
            assert [split["first_block"] for split in parts] == list(range(blocks[0], blocks[0] + len(parts)))
        first, last = visible_keys(q_lengths[b], k_lengths[b], False, window)
        if (last > first).any():
            seen = last > first
            assert blocks[0] * tile_n <= first[seen].min() and last[seen].max() <= (blocks[-1] + 1) * tile_n
    assert len(set(shared_slots)) == len(shared_slots)  # no two tiles wait in the same part of the workspace

    # One CTA has a tile's splits one after the other, and no share is longer than an equal one by more than a split and, of equal tiles, a
    # sixteenth.
    total = sum(cost(spec, split) for share in taken for split in share)
    of_first = sum(cost(spec, split) for share in taken for split in share if split["batch"] == 0)
    limit = -(-total // ctas)
    if of_first * len(q_lengths) == total:
        limit += limit // 16
    for share in taken:
        order = [(split["batch"], split["head"], split["first_row"]) for split in share]
        assert len([tile for tile, _ in itertools.groupby(order)]) == len(set(order))
        assert not share or sum(cost(spec, split) for split in share) < limit + cost(spec, share[-1])


@pytest.mark.parametrize(("batch", "ctas", "parts"), [(16, 32, 1), (16, 33, 1), (64, 33, 1), (16, 66, 2), (8, 66, 4)])
def test_shares_of_equal_tiles_end_where_these_do_or_at_equal_parts(
    tile_lists: dict[KernelSpec, ctypes.CDLL], batch: int, ctas: int, parts: int
) -> None:
    spec = SPLIT_SPECS[0]
    tiles = by_tile(shares(tile_lists[spec], spec, ctas, 2, [1] * batch, [5000] * batch, (None, None)))
    assert len(tiles) == 2 * batch
    for splits in tiles.values():
        holders = [cta for cta, _ in splits]
        assert [holders.count(cta) for cta in sorted(set(holders))] == [len(splits) // parts] * parts


@pytest.mark.parametrize("batch", [256, 257, 600])
@pytest.mark.parametrize("spec", SPLIT_SPECS[:2], ids=lambda spec: spec.name)
def test_each_warp_reads_its_part_of_many_lengths(tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec, batch: int) -> None:
    random = np.random.default_rng(batch)
    q_lengths, k_lengths = random.integers(0, 2, batch).tolist(), random.integers(0, 2000, batch).tolist()
    if tile_for(spec).few_rows:
        q_lengths = [1] * batch
    for ctas in (1, 7):
        tiles = by_tile(shares(tile_lists[spec], spec, ctas, 2, q_lengths, k_lengths, (None, None)))
        assert set(tiles) == {(b, head, 0) for b, length in enumerate(q_lengths) if length for head in range(2)}
        for splits in tiles.values():
            assert [split["split"] for _, split in splits] == list(range(splits[0][1]["splits"]))


@pytest.mark.parametrize("spec", SPLIT_SPECS, ids=lambda spec: spec.name)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_how_keys_are_split_depends_on_the_sequence_alone(
    tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec, data: st.DataObject
) -> None:
    sequence = st.tuples(st.integers(1, 40), st.integers(0, 20000))
    q_lengths, k_lengths = draw_lengths(data, spec, st.lists(sequence, min_size=2, max_size=40))
    heads, b = data.draw(st.integers(1, 4), "heads"), data.draw(st.integers(0, len(k_lengths) - 1), "which")
    window: Window = {"full": (None, None), "causal": (None, 0), "window": (1000, 0)}[spec.mask]

    def bounds(taken: list[list[Split]], which: int) -> dict[tuple[int, ...], list[list[int]]]:
        tiles = by_tile(taken).items()
        return {key[1:]: [blocks_of(spec, x) for _, x in splits] for key, splits in tiles if key[0] == which}

    with_others = shares(tile_lists[spec], spec, data.draw(st.integers(1, 140), "CTAs"), heads, q_lengths, k_lengths, window)
    alone = shares(tile_lists[spec], spec, data.draw(st.integers(1, 140), "CTAs alone"), heads, [q_lengths[b]], [k_lengths[b]], window)
    assert bounds(with_others, b) == bounds(alone, 0)


@pytest.mark.parametrize("spec", [spec for spec in SPLIT_SPECS if tile_for(spec).few_rows], ids=lambda spec: spec.name)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_split_has_new_keys_if_one_of_its_blocks_has(
    tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec, data: st.DataObject
) -> None:
    new = data.draw(st.integers(1, spec.split_rows // spec.pack), "new")
    keys = data.draw(st.one_of(st.integers(new, 300), st.integers(new, 20000)), "keys")
    window: Window = (data.draw(st.integers(0, 3000), "left") if spec.mask == "window" else None, None if spec.mask == "full" else 0)
    size, library = tile_for(spec).tile_n, tile_lists[spec]
    (splits,) = shares(library, spec, 1, data.draw(st.sampled_from([1, 2, 8]), "heads"), [new], [keys], window)
    assert splits
    for split in splits:
        has = any(size * block < keys < size * (block + 1) + new for block in blocks_of(spec, split))
        words = np.array([split[name] for name in WORK_TILE], np.intc)
        assert library["new_keys_in"](words.ctypes.data_as(ctypes.c_void_p), new) % 256 == has


@pytest.mark.parametrize("spec", CLUSTER_SPECS, ids=lambda spec: spec.name)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_cluster_of_any_size_has_the_splits_of_its_tile_that_the_list_has(
    tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec, data: st.DataObject
) -> None:
    keys = st.one_of(st.integers(1, 200), st.integers(1, 20000))
    q_lengths, k_lengths = draw_lengths(data, spec, st.lists(st.tuples(st.just(1), keys), min_size=1, max_size=3))
    heads = data.draw(st.sampled_from([1, 2, 8]), "heads")
    left = data.draw(st.one_of(st.none(), st.integers(0, 3000)) if spec.mask == "window" else st.none(), "left")
    window: Window = (left, None if spec.mask == "full" else 0)
    of_list = replace(spec, cluster=False)
    listed = by_tile(shares(tile_lists[of_list], of_list, data.draw(st.integers(1, 140), "CTAs"), heads, q_lengths, k_lengths, window))
    assert len(listed) == len(k_lengths) * heads
    same = set(WORK_TILE) - {"run_begin", "run_end", "first_splits", "slot"}  # all but who has it
    for b, head in itertools.product(range(len(k_lengths)), range(heads)):
        expected = [split for _, split in listed[b, head, 0]]
        size = data.draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if 4 * n >= len(expected)]), "size")
        ranks = shares(tile_lists[spec], spec, size, heads, q_lengths, k_lengths, window, cluster=(b, head))
        for rank, of_rank in enumerate(ranks):  # dealt in turn
            assert [split["split"] for split in of_rank] == list(range(rank, len(expected), size))
            assert all(split["run_begin"] == rank for split in of_rank)  # for which Q is loaded
        splits = sorted((split for of_rank in ranks for split in of_rank), key=lambda split: split["split"])
        assert [{name: split[name] for name in same} for split in splits] == [{name: split[name] for name in same} for split in expected]


@pytest.mark.parametrize("spec", CLUSTER_SPECS, ids=lambda spec: spec.name)
def test_of_a_sequence_without_keys_the_first_cta_of_a_cluster_has_the_only_split(
    tile_lists: dict[KernelSpec, ctypes.CDLL], spec: KernelSpec
) -> None:
    first, *others = shares(tile_lists[spec], spec, 8, 2, [1, 1], [0, 5000], (None, 0), cluster=(0, 1))
    assert [(x["batch"], x["head"], x["split"], x["splits"], x["first_block"]) for x in first] == [(0, 1, 0, 1, 0)]
    assert others == [[]] * 7
