"""Tiles, their order and their key blocks as pure functions: tiles.py, and the scheduler.cuh and mask.cuh of the kernel on the host."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rawattn.checks import LONGEST, window_bounds
from rawattn.compiler import CUDA_SRC, source
from rawattn.reference import Window, visible_keys
from rawattn.spec import DTYPES, MASKS, KernelSpec
from rawattn.tiles import SHARED_MEMORY_LIMIT, TABLE, tile_for

# Every row of the tile table with every mask that it serves.
SPECS = [KernelSpec("bfloat16", head_dim, head_dim_v, 4, mask) for head_dim, head_dim_v, masks, _ in TABLE for mask in masks]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
examples = settings(deadline=None)

# The constants that the kernel has from its generated prologue are template parameters here, so that one build holds every variant.
PROLOGUE = """
#include <algorithm>
using std::max, std::min;
#define __device__
#define __forceinline__ inline
constexpr int SPLITS_OF_A_SEQUENCE = 128, MAX_SPLITS = 32;
#include "scheduler.cuh"

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

    _fields_ = [(name, ctypes.c_int) for name in ("begin", "end", "full_begin", "full_end")]
    begin: int
    end: int
    full_begin: int
    full_end: int


class DeviceCode:
    """The kernel's functions in a shared library of the host."""

    def __init__(self, library: ctypes.CDLL):
        self.compiled = library

    def place_tiles(self, m_blocks: int, heads: int, heads_per_group: int) -> np.ndarray:
        """(m_block, head) of every index, in order."""
        places = np.empty((m_blocks * heads, 2), np.intc)
        self.compiled["place_tiles"](m_blocks, heads, heads_per_group, places.ctypes.data_as(ctypes.c_void_p))
        return places

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
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++) is on the PATH")
    text = PROLOGUE
    for spec in SPECS:
        constants = dict(re.findall(r"^constexpr \w+ (\w+) = (\w+);$", source(spec), re.MULTILINE))
        text += VARIANT.format(name=spec.name, **constants)
    library = tmp_path_factory.mktemp("device_code") / "device_code.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", str(CUDA_SRC), "-x", "c++", "-", "-o", str(library)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return DeviceCode(ctypes.CDLL(str(library)))


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
        if len(own) == 64:  # none is masked without need
            assert list(full) == whole


def test_every_spec_has_a_tile_that_fits_the_multiprocessor() -> None:
    dims = range(8, 257, 8)
    for spec in itertools.starmap(KernelSpec, itertools.product(DTYPES, dims, dims, (1, 7), MASKS, (False, True))):
        tile = tile_for(spec)
        assert tile.tile_m % 64 == 0, spec  # a consumer warpgroup's rows
        assert tile.tile_n % 16 == 0 and tile.tile_n <= 256, spec  # the K of P V's WGMMA, and the largest N of Q K^T's
        assert tile.shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT, spec
        producer, consumer = tile.registers
        assert all(24 <= registers <= 256 and registers % 8 == 0 for registers in tile.registers), spec  # what setmaxnreg takes
        assert 128 * (producer + tile.consumer_warpgroups * consumer) <= 65536, spec
        assert tile.tile_n // 2 + tile.tile_n // 4 + spec.head_dim_v // 2 < consumer, spec  # scores, P and output
