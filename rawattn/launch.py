"""Plan: what stays the same between calls on arrays of one geometry. A launch fills in pointers and starts the kernel."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays import Array
from .compiler import UnsupportedEnvironment, load
from .spec import KernelSpec
from .tiles import SLAB, tile_for

# struct Arguments of cuda_src/attention_forward.cu
ARGUMENTS = np.dtype(
    {
        "names": ["q_map", "k_map", "v_map", "pointers", "out_strides", "lse_batch_stride", "sizes", "mask_and_group", "scale_log2"],
        "formats": ["V128", "V128", "V128", "5u8", "3i8", "i8", "4i4", "4i4", "f4"],
        "offsets": [0, 128, 256, 384, 424, 448, 456, 472, 488],
        "itemsize": 512,
    }
)
# K and V that tiles in flight share should stay in L2 (50 MB on an H100). Short sequences get half: their Q and output pass as fast.
L2_BUDGET = 32 << 20
SHORT = 1024

# CUtensorMap enums of cuda.h
_TENSOR_MAP_DTYPE = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _OUT_OF_BOUNDS_ZEROS = 0, 3, 2, 0


@functools.cache
def _encode_tiled() -> Any:
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise UnsupportedEnvironment(f"The NVIDIA driver has no cuTensorMapEncodeTiled ({error}); install driver 525 or newer.") from None
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4]
    return encode


class _TensorMap:
    """Writes one tensor map into an argument block: 64-column, `box_rows`-row boxes of a (B, S, H, D) or packed (T, H, D) array.

    The map's dimensions are column, row, row offset, head, batch. A packed array's map ends at its last row, and begins as many rows
    before its first as it has: the offset dimension slides it so that one sequence's end falls on the map's end, and TMA clips there.
    """

    def __init__(self, address: int, array: Array, box_rows: int):
        *batch, rows, heads, columns = array.shape
        *batch_stride, row_stride, head_stride, _ = array.strides
        packed = not batch
        if rows == 1:
            row_stride = 16  # frameworks leave anything in a stride that is not used
        offsets = rows + 1 if packed else 1
        self.origin = -rows * row_stride if packed else 0
        extents = (columns, rows, offsets, heads, 1 if packed else batch[0])
        # The stride of a dimension of one element is never used, but must be a legal one.
        strides = [
            stride if extent > 1 else 16
            for stride, extent in zip((row_stride, row_stride, head_stride, *(batch_stride or [16])), extents[1:], strict=True)
        ]
        self._address = address
        self._dtype = _TENSOR_MAP_DTYPE[array.dtype]
        self._extents = (ctypes.c_uint64 * 5)(*extents)
        self._strides = (ctypes.c_uint64 * 4)(*strides)
        self._box = (ctypes.c_uint32 * 5)(SLAB, box_rows, 1, 1, 1)
        self._element_strides = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)
        self._pointer: int | None = None

    def point_to(self, pointer: int) -> None:
        """Encodes the map anew only where the pointer changed."""
        if pointer == self._pointer:
            return
        status = _encode_tiled()(
            self._address, self._dtype, 5, pointer + self.origin, self._extents, self._strides, self._box, self._element_strides,
            _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _OUT_OF_BOUNDS_ZEROS,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled failed with CUDA error {status}: extents {list(self._extents)}, byte strides {list(self._strides)}"
            )
        self._pointer = pointer


class _TileCounters:
    """Zeroed counters on one device, from which the CTAs of a launch are dealt their tiles; a launch leaves its counter zero again.

    Launches that may run at the same time need counters of their own, or each would miss the tiles that the other was dealt. So each
    stream, whose launches follow one another, has one, and each captured launch, which may be replayed at any time. (A graph instantiated
    twice and replayed by both at once would share its counters, as it shares its outputs.)
    """

    STREAMS, CAPTURED = 1 << 12, 1 << 20
    PER_THREAD = 2  # cudaStreamPerThread: one handle, a stream for each thread

    def __init__(self) -> None:
        import cupy

        size = 4 * (self.STREAMS + self.CAPTURED)
        self._memory = cupy.cuda.Memory(size)  # not from the pool, whose memory is ordered with one stream
        cupy.cuda.runtime.memset(self._memory.ptr, 0, size)
        cupy.cuda.runtime.streamSynchronize(0)
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self._of_stream: dict[tuple[int, int], int] = {}
        self._unused, self._uncaptured = itertools.count(), itertools.count(self.STREAMS)

    def address(self, stream: int) -> int:
        if stream and self._is_capturing(stream):
            index = self._take(self._uncaptured, self.STREAMS + self.CAPTURED, f"captured {self.CAPTURED} attention calls in CUDA graphs")
            return self._memory.ptr + 4 * index
        key = (stream, threading.get_ident() if stream == self.PER_THREAD else 0)
        address = self._of_stream.get(key)
        if address is None:
            index = self._take(self._unused, self.STREAMS, f"used {self.STREAMS} streams")
            address = self._of_stream[key] = self._memory.ptr + 4 * index
        return address

    @staticmethod
    def _take(indices: Iterator[int], end: int, used: str) -> int:
        index = next(indices)
        if index >= end:
            raise RuntimeError(f"This process has {used} on one GPU, which is all that rawattn has counters for")
        return index


@functools.cache
def _tile_counters(device: int) -> _TileCounters:
    return _TileCounters()


class Plan:
    """A compiled kernel with the argument block of one geometry. Not thread-safe: the argument block is filled in place."""

    def __init__(
        self,
        spec: KernelSpec,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        batch: int,
        left: int,
        right: int,
        bottom_right: bool,
        scale: float,
    ):
        import cupy

        tile = tile_for(spec)
        self._kernel = load(spec)
        self._counters = _tile_counters(cupy.cuda.runtime.getDevice())
        self._shared_memory = tile.shared_memory_bytes(spec)
        self._block = (tile.threads,)

        # cuTensorMapEncodeTiled wants its maps on 64 bytes (128 from CUDA 13 on).
        storage = np.zeros(ARGUMENTS.itemsize + 128, np.uint8)
        start = -storage.ctypes.data % 128
        block = storage[start : start + ARGUMENTS.itemsize]
        self._arguments = (block.view(f"V{ARGUMENTS.itemsize}"),)  # CuPy passes a one-element NumPy array by value
        self._pointers = block[384:424].view(np.uint64)
        address = block.ctypes.data
        self._maps = (
            _TensorMap(address, q, tile.tile_m),
            _TensorMap(address + 128, k, tile.tile_n),
            _TensorMap(address + 256, v, tile.tile_n),
        )

        rows_q, heads, _ = q.shape[-3:]
        rows_k = k.shape[-3]
        multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        if spec.varlen:
            tiles = (-(-rows_q // tile.tile_m) + batch) * heads  # an upper bound: the lengths are known on the device only
        else:
            tiles = -(-rows_q // tile.tile_m) * heads * batch
        if tiles + multiprocessors >= 1 << 31:
            raise ValueError(f"q has shape {q.shape}, {tiles} tiles of {tile.tile_m} rows; needed: fewer than 2**31")
        self._grid = (min(multiprocessors, tiles),)

        # Equal tiles of one head run side by side; with a diagonal, the longest tiles of all the heads that L2 holds come first.
        heads_per_group = 1
        if spec.mask == "causal":
            budget = L2_BUDGET // 2 if rows_k <= SHORT else L2_BUDGET
            heads_per_group = max(1, budget // (2 * rows_k * (spec.head_dim + spec.head_dim_v))) * spec.gqa_ratio

        fields = block.view(ARGUMENTS)[0]
        batch_stride = 0 if spec.varlen else out.strides[0]
        fields["out_strides"] = (batch_stride, out.strides[-3], out.strides[-2])
        fields["lse_batch_stride"] = 0 if spec.varlen else heads * rows_q
        fields["sizes"] = (batch, heads, rows_q, rows_k)
        fields["mask_and_group"] = (left, right, bottom_right, min(heads_per_group, batch * heads))
        fields["scale_log2"] = scale * math.log2(math.e)

    def launch(self, q: int, k: int, v: int, out: int, lse: int, cu_seqlens_q: int, cu_seqlens_k: int, stream: Any) -> None:
        """Starts the kernel on `stream`; the arguments are device pointers, 0 for none."""
        q_map, k_map, v_map = self._maps
        q_map.point_to(q)
        k_map.point_to(k)
        v_map.point_to(v)
        self._pointers[:] = (out, lse, self._counters.address(stream.ptr), cu_seqlens_q, cu_seqlens_k)
        self._kernel(self._grid, self._block, self._arguments, shared_mem=self._shared_memory, stream=stream)
