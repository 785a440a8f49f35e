"""Plan: what stays the same between calls on arrays of one geometry. A launch fills in pointers and starts the kernel."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import arrays, checks
from .arrays import Array
from .compiler import UnsupportedEnvironment, load
from .spec import AppendSpec, KernelSpec
from .tiles import (
    MAX_SPLITS,
    SLAB,
    cache_spec,
    grid,
    heads_per_group,
    launch_variant,
    lists_of_splits,
    tile_for,
    tile_rows,
    tiles_of_sequence,
)


def _offset(arguments: np.dtype, field: str) -> int:
    assert arguments.fields is not None
    return arguments.fields[field][1]


# struct Append of cuda_src/append.cuh
_CACHED_ROWS, _TABLES = ("k", "v", "k_cache", "v_cache"), ("rotary_cos", "rotary_sin")
_ROWS = np.dtype([("data", "u8"), ("strides", "3i8")])
APPEND = np.dtype(
    [
        *((name, _ROWS) for name in _CACHED_ROWS),
        *((name, "u8") for name in _TABLES),
        *((name, "i4") for name in ("rotary_dim", "max_position", "interleaved", "query_advances")),
    ]
)
_APPEND_ADDRESSES = [(_offset(APPEND, name) // 8, name) for name in (*_CACHED_ROWS, *_TABLES)]
# struct Arguments of cuda_src/pipeline.cuh
POINTERS = (
    "out", "lse", "next_tile", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "page_table",
    "arrivals", "partial_out", "partial_state",
)  # fmt: skip
ARGUMENTS = np.dtype(
    {
        "names": ["maps", *POINTERS, "out_strides", "lse_batch_stride", "page_table_stride", "sizes", "new_keys", "mask", "heads_per_group",
                  "page_size", "partial_rows", "most_splits", "scale_log2", "loads_ahead", "append"],
        "formats": ["V384", *["u8"] * len(POINTERS), "3i8", "i8", "i8", "4i4", "i4", "3i4", "i4", "i4", "i4", "i4", "f4", "i4", APPEND],
        "offsets": [0, *range(384, 480, 8), 480, 504, 512, 520, 536, 540, 552, 556, 560, 564, 568, 572, 576],
        "itemsize": 768,
    }
)  # fmt: skip
PLACES_LIMIT, QUOTIENT_LIMIT = 1 << 30, 1 << 21  # of the list of tiles: what int and divide() of cuda_src/scheduler.cuh are right for
ARRIVALS_BYTES = 4096  # at the start of a workspace: up to two counters for each of up to 512 CTAs

OVERLAP_DRIVER = 12030  # the first CUDA whose graphs keep that a kernel may start while the one before it runs

# Enums of cuda.h
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_TENSOR_MAP_DTYPE = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_128B, _L2_PROMOTION_256B, _OUT_OF_BOUNDS_ZEROS = 0, 3, 2, 3, 0


def _append_of(block: np.ndarray, arguments: np.dtype) -> np.ndarray:
    """The record of new keys, (1,) of APPEND, in the bytes of a kernel's arguments."""
    return block[_offset(arguments, "append") :][: APPEND.itemsize].view(APPEND)


@functools.cache
def _driver(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL("libcuda.so.1"), function)
    except (OSError, AttributeError) as error:
        raise UnsupportedEnvironment(f"The NVIDIA driver has no {function} ({error}); install driver 525 or newer.") from None


_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used the GPU yet


def _make_context_current() -> None:
    """Gives the calling thread the context of its device, as the CUDA runtime does by itself and the driver does not."""
    from cupy.cuda import runtime

    runtime.setDevice(runtime.getDevice())


Grid = tuple[int, int, int]  # CTAs


class _BoundKernel:
    """A kernel with all that a launch needs but the stream. Its argument is a struct in host memory, taken as it is at the launch.

    CuPy's own call of a kernel ends in the same function of the driver, after it has looked at each argument anew. One that `overlaps` may
    start while the kernel before it on the stream runs: it waits itself before it reads what that one writes. The CTAs are
    in clusters of `cluster`, unless that is 0.
    """

    def __init__(
        self, kernel: Any, grid: Grid, threads: int, shared_memory: int, argument: np.ndarray, overlaps: bool = False, cluster: int = 0
    ):
        from cupy.cuda import driver, runtime

        self._kept = kernel, argument
        self._parameters = (ctypes.c_void_p * 1)(argument.ctypes.data)
        self._address = ctypes.addressof(self._parameters)
        attributes: list[tuple[int, ...]] = [(_CLUSTER_DIMENSION, cluster, 1, 1)] if cluster else []
        if overlaps and runtime.driverGetVersion() >= OVERLAP_DRIVER:
            attributes.append((_PROGRAMMATIC_STREAM_SERIALIZATION, 1))
        if attributes:
            self._launch = _launch_with(attributes, kernel.ptr, grid, threads, shared_memory)
        else:
            self._launch = functools.partial(driver.launchKernel, kernel.ptr, *grid, threads, 1, 1, shared_memory)
        self._error = driver.CUDADriverError

    def launch(self, stream: int) -> None:
        try:
            self._launch(stream, self._address, 0)
        except self._error as error:
            if error.status != _INVALID_CONTEXT:
                raise
            _make_context_current()
            self._launch(stream, self._address, 0)


_LaunchAttribute = ctypes.c_uint32 * 18  # CUlaunchAttribute of cuda.h: its id, 4 bytes of padding, a value of 64 bytes


class _LaunchConfig(ctypes.Structure):
    _fields_ = [  # CUlaunchConfig of cuda.h
        ("sizes", ctypes.c_uint32 * 7),  # grid, block, bytes of shared memory
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    ]


def _launch_config(attributes: list[tuple[int, ...]], grid: Grid, threads: int, shared_memory: int) -> tuple[_LaunchConfig, Any]:
    """A launch with attributes, each an id and its value's words; and what must live as long."""
    kept = (_LaunchAttribute * len(attributes))(*[_LaunchAttribute(number, 0, *value) for number, *value in attributes])
    return _LaunchConfig((*grid, threads, 1, 1, shared_memory), None, ctypes.addressof(kept), len(kept)), kept


def _launch_with(
    attributes: list[tuple[int, ...]], function: int, grid: Grid, threads: int, shared_memory: int
) -> Callable[[int, int, int], None]:
    """driver.launchKernel with these and with launch attributes, which CuPy has no function for."""
    from cupy.cuda import driver

    launch = _driver("cuLaunchKernelEx")
    config, kept = _launch_config(attributes, grid, threads, shared_memory)
    at, kernel = ctypes.byref(config), ctypes.c_void_p(function)

    def start(stream: int, parameters: int, extra: int, kept: Any = kept) -> None:
        config.stream = stream
        status = launch(at, kernel, ctypes.c_void_p(parameters), ctypes.c_void_p(extra))
        if status != 0:
            raise driver.CUDADriverError(status)

    return start


def _are_at_once(spec: KernelSpec, tiles: int, cluster: int) -> bool:
    """Whether the GPU, or a part of one that MIG made, has room for clusters of so many CTAs for all tiles; no GPC may have so many SMs."""
    function, tile = load(spec).ptr, tile_for(spec)
    _make_context_current()  # for the query, as for a launch
    number = ctypes.c_int()
    config, _kept = _launch_config([(_CLUSTER_DIMENSION, cluster, 1, 1)], (cluster, 1, 1), tile.threads, tile.shared_memory_bytes(spec))
    _driver("cuOccupancyMaxActiveClusters")(ctypes.byref(number), ctypes.c_void_p(function), ctypes.byref(config))
    return tiles <= number.value


@functools.cache
def _encode_tiled() -> Any:
    encode = _driver("cuTensorMapEncodeTiled")
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4]
    return encode


@functools.cache
def _replace_address() -> Any:
    replace_address = _driver("cuTensorMapReplaceAddress")
    replace_address.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return replace_address


class _TensorMap:
    """Writes one tensor map into an argument block: five dimensions, boxes of 64 columns."""

    def __init__(self, address: int, dtype: str, extents: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], origin: int = 0):
        self.origin = origin
        # The stride of a dimension of one element is never used, but must be a legal one: frameworks leave anything there.
        strides = tuple(stride if extent > 1 else 16 for stride, extent in zip(strides, extents[1:], strict=True))
        self._address = address
        self._dtype = _TENSOR_MAP_DTYPE[dtype]
        self._promotion = _L2_PROMOTION_256B if extents[0] > SLAB else _L2_PROMOTION_128B  # a row's next slab is asked for next
        self._extents = (ctypes.c_uint64 * 5)(*extents)
        self._strides = (ctypes.c_uint64 * 4)(*strides)
        self._box = (ctypes.c_uint32 * 5)(SLAB, *box)
        self._element_strides = (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1)
        self._pointer: int | None = None

    @classmethod
    def of_rows(cls, address: int, array: Array, box_rows: int, slides: bool) -> _TensorMap:
        """Boxes of `box_rows` rows of a (B, S, H, D) or packed (T, H, D) array: column, row, row offset, head, batch.

        Where it `slides`, the map ends at the last row and begins as many rows before the first as there are: the offset dimension moves it
        so that one sequence's end falls on the map's end, and TMA clips there.
        """
        *batch, rows, heads, columns = array.shape
        *batch_stride, row_stride, head_stride, _ = array.strides
        if rows == 1:
            row_stride = 16  # the offset dimension has two elements, so it is used
        extents = (columns, rows, rows + 1 if slides else 1, heads, *(batch or [1]))
        strides = (row_stride, row_stride, head_stride, *(batch_stride or [16]))
        return cls(address, array.dtype, extents, strides, (box_rows, 1, 1, 1), -rows * row_stride if slides else 0)

    @classmethod
    def of_packed_heads(cls, address: int, array: Array, pack: int, box_queries: int) -> _TensorMap:
        """Boxes of the `pack` heads of `box_queries` rows of a (B, S, H, D) or packed (T, H, D) array: column, head, row, pack, batch."""
        *batch, rows, heads, columns = array.shape
        *batch_stride, row_stride, head_stride, _ = array.strides
        extents = (columns, pack, rows, heads // pack, *(batch or [1]))
        strides = (head_stride, row_stride, pack * head_stride, *(batch_stride or [16]))
        return cls(address, array.dtype, extents, strides, (pack, box_queries, 1, 1))

    def point_to(self, pointer: int) -> None:
        """Does nothing where the pointer is the one of the last time."""
        if pointer == self._pointer:
            return
        status = self._write(pointer + self.origin)
        if status == _INVALID_CONTEXT:
            _make_context_current()
            status = self._write(pointer + self.origin)
        if status != 0:
            raise RuntimeError(
                f"Encoding a tensor map failed with CUDA error {status}: extents {list(self._extents)}, byte strides {list(self._strides)}"
            )
        self._pointer = pointer

    def _write(self, start: int) -> int:
        status: int
        if self._pointer is None:
            status = _encode_tiled()(
                self._address, self._dtype, 5, start, self._extents, self._strides, self._box, self._element_strides,
                _INTERLEAVE_NONE, _SWIZZLE_128B, self._promotion, _OUT_OF_BOUNDS_ZEROS,
            )  # fmt: skip
        else:
            status = _replace_address()(self._address, start)
        return status


def _stream_key(stream: int) -> Any:
    """Tells streams apart whose launches do not follow one another: cudaStreamPerThread is one handle, and a stream for each thread."""
    return (stream, threading.get_ident()) if stream == 2 else stream


class _TileCounters:
    """Zeroed counters on one device, from which the CTAs of a launch are dealt their tiles; a launch leaves its counter zero again.

    Launches that may run at the same time need counters of their own, or each would miss the tiles that the other was dealt. So each
    stream, whose launches follow one another, has one, and each captured launch, which may be replayed at any time. (A graph instantiated
    twice and replayed by both at once would share its counters, as it shares its outputs.)
    """

    STREAMS, CAPTURED = 1 << 12, 1 << 20

    def __init__(self) -> None:
        import cupy

        size = 4 * (self.STREAMS + self.CAPTURED)
        self._memory = cupy.cuda.Memory(size)  # not from the pool, whose memory is ordered with one stream
        cupy.cuda.runtime.memset(self._memory.ptr, 0, size)
        cupy.cuda.runtime.streamSynchronize(0)
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        self._of_stream: dict[Any, int] = {}
        self._unused, self._uncaptured = itertools.count(), itertools.count(self.STREAMS)

    def address(self, stream: int) -> int:
        if stream and self._is_capturing(stream):
            index = self._take(self._uncaptured, self.STREAMS + self.CAPTURED, f"captured {self.CAPTURED} attention calls in CUDA graphs")
            return self._memory.ptr + 4 * index
        key = _stream_key(stream)
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


class _Workspaces:
    """Where splits wait for the others of their tile, on one device: zeroed counters of arrivals, then the results.

    Each stream has one, which grows, and so has each stream of each capture, since a captured graph may be replayed at any time. They are
    never given back. Threads may share a stream: whoever asks for an address holds the lock until all that uses it is on the stream.
    """

    def __init__(self) -> None:
        import cupy

        self.lock = threading.RLock()
        self._runtime = cupy.cuda.runtime
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._of_stream: dict[Any, Any] = {}
        self._outgrown: list[Any] = []

    def address(self, stream: int, size: int) -> int:
        if stream and self._runtime.streamIsCapturing(stream):
            key = (stream, -_capture_id(stream))
        else:
            key = _stream_key(stream)
        memory = self._of_stream.get(key)
        if memory is None or memory.size < size:
            if memory is not None:
                self._outgrown.append(memory)  # kernels on their way may use it
            memory = self._of_stream[key] = self._allocate(size)
        address: int = memory.ptr
        return address

    def _allocate(self, size: int) -> Any:
        import cupy

        # In relaxed mode, which is the calling thread's own, allocating does not break a capture.
        mode = ctypes.c_int(self._runtime.streamCaptureModeRelaxed)
        exchange = _driver("cuThreadExchangeStreamCaptureMode")
        exchange(ctypes.byref(mode))
        try:
            memory = cupy.cuda.Memory(size)
            self._runtime.memsetAsync(memory.ptr, 0, ARRIVALS_BYTES, self._stream.ptr)
            self._stream.synchronize()
        finally:
            exchange(ctypes.byref(mode))
        return memory


def _capture_id(stream: int) -> int:
    status, number = ctypes.c_int(), ctypes.c_uint64()
    _driver("cuStreamGetCaptureInfo_v2")(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value


@functools.cache
def _workspaces(device: int) -> _Workspaces:
    return _Workspaces()


def loads_ahead(spec: KernelSpec, lengths: Sequence[str]) -> bool:
    """Whether the CTAs of a cluster load before they know the length: where nothing else on the device says where the first keys are."""
    return not (spec.page_rows or spec.mask == "window" or {"cache_batch_idx", "cache_leftpad"} & set(lengths))


class Plan:
    """A compiled attention kernel with the argument block of one geometry. Not thread-safe: the argument block is filled in place.

    q is (B, Sq, Hq, D) or packed; k and v are like it or, where the keys are a cache, (B_cache, S_max, Hkv, D) or pages (N, page_size,
    Hkv, D). Of a cache a sequence has at most `capacity` keys: `new_keys` more than cache_seqlens says, -1 being as many as it has queries.
    `lengths` names the arrays that launch() is given after q, k and v, among POINTERS. It `overlaps` the append_kv that is launched right
    before it. `append` is the kernel's record of new keys, for which there may be none.
    """

    def __init__(
        self, spec: KernelSpec, q: Array, k: Array, v: Array, out: Array, *,
        batch: int, left: int, right: int, bottom_right: bool, scale: float,
        lengths: Sequence[str] = (), capacity: int | None = None, new_keys: int = 0, page_table_stride: int = 0, overlaps: bool = False,
    ):  # fmt: skip
        import cupy

        device = cupy.cuda.Device()
        multiprocessors = device.attributes["MultiProcessorCount"]
        rows_q, heads, _ = q.shape[-3:]
        rows_k = k.shape[-3] if capacity is None else capacity
        spec, cluster = launch_variant(spec, batch, rows_q, heads, rows_k, multiprocessors, _are_at_once)
        tile = tile_for(spec)

        # cuTensorMapEncodeTiled wants its maps on 64 bytes (128 from CUDA 13 on).
        storage = np.zeros(ARGUMENTS.itemsize + 128, np.uint8)
        start = -storage.ctypes.data % 128
        block = storage[start : start + ARGUMENTS.itemsize]
        self._pointers = (ctypes.c_uint64 * len(POINTERS)).from_buffer(block.data, 384)
        address = block.ctypes.data
        ragged = len(q.shape) == 3
        if spec.split_rows:
            q_map = _TensorMap.of_packed_heads(address, q, spec.pack, tile_rows(spec) // spec.pack)
        else:
            q_map = _TensorMap.of_rows(address, q, tile.tile_m, slides=ragged)
        box_rows = spec.page_rows or tile.tile_n
        self._maps = (
            q_map,
            _TensorMap.of_rows(address + 128, k, box_rows, slides=spec.varlen),
            _TensorMap.of_rows(address + 256, v, box_rows, slides=spec.varlen),
        )
        self._mapped: list[int] = []

        of_a_sequence, packs = tiles_of_sequence(spec, rows_q, heads), heads // spec.pack
        # Where only the device knows the lengths, an upper bound.
        tiles = of_a_sequence + batch * packs if ragged else of_a_sequence * batch
        ctas = tiles * cluster or grid(spec, batch, tiles, multiprocessors)
        places, share, largest = tiles + multiprocessors, 0, of_a_sequence
        if spec.split_rows:
            places, largest = tiles * (-(-rows_k // tile.tile_n) + MAX_SPLITS), of_a_sequence * MAX_SPLITS
            share = -(-places // max(ctas, 1))
        if places >= PLACES_LIMIT or (spec.varlen and max(largest, share) >= QUOTIENT_LIMIT):
            raise ValueError(f"q has shape {q.shape}, {tiles} tiles of {tile_rows(spec)} rows, and k {rows_k} rows; needed: fewer")
        lists = lists_of_splits(spec, packs, tiles, ctas)
        of_kernel = (cluster, packs, batch) if cluster else (lists, ctas // lists, 1) if spec.split_rows else (ctas, 1, 1)
        self._kernel = _BoundKernel(load(spec), of_kernel, tile.threads, tile.shared_memory_bytes(spec), block, overlaps, cluster)

        fields = block.view(ARGUMENTS)[0]
        fields["out_strides"] = (0 if ragged else out.strides[0], out.strides[-3], out.strides[-2])
        fields["lse_batch_stride"] = 0 if ragged else heads * rows_q
        fields["page_table_stride"] = page_table_stride
        fields["sizes"] = (batch, packs, rows_q, rows_k)
        fields["new_keys"] = new_keys
        fields["mask"] = (left, right, bottom_right)
        fields["heads_per_group"] = packs // lists if spec.split_rows else heads_per_group(spec, batch, k.shape[-2], rows_k)
        fields["page_size"] = k.shape[-3]
        fields["scale_log2"] = scale * math.log2(math.e)
        fields["loads_ahead"] = loads_ahead(spec, lengths)
        self.append = _append_of(block, ARGUMENTS)

        self._lengths = [POINTERS.index(name) for name in lengths]
        self._workspaces: _Workspaces | None = None
        self._counters: _TileCounters | None = None
        self.workspace_bytes = 0
        fields["most_splits"] = most_splits = tile.most_splits(of_a_sequence if tile.few_rows else packs)
        if cluster:
            return  # splits meet in shared memory
        if spec.split_rows:
            partial_rows = min(tile_rows(spec), rows_q * spec.pack)
            fields["partial_rows"] = partial_rows
            states = ctas * most_splits * partial_rows
            self._outs_offset = ARRIVALS_BYTES + 32 * states
            self.workspace_bytes = self._outs_offset + 4 * spec.head_dim_v * states
            self._workspaces = _workspaces(device.id)
        else:
            self._counters = _tile_counters(device.id)

    def launch(self, stream: int, out: int, lse: int, addresses: list[int]) -> None:
        """Starts the kernel on the stream of that handle. `addresses` are those of q, k, v and `lengths`; lse is 0 for none."""
        rows = addresses[:3]
        if rows != self._mapped:
            for tensor_map, address in zip(self._maps, rows, strict=True):
                tensor_map.point_to(address)
            self._mapped = rows
        pointers = self._pointers
        pointers[0], pointers[1] = out, lse
        if self._lengths:
            for place, address in zip(self._lengths, addresses[3:], strict=True):
                pointers[place] = address
        if self._workspaces is None:
            if self._counters is not None:
                pointers[2] = self._counters.address(stream)
            self._kernel.launch(stream)
            return
        with self._workspaces.lock:
            arrivals = self._workspaces.address(stream, self.workspace_bytes)
            pointers[9:] = [arrivals, arrivals + self._outs_offset, arrivals + ARRIVALS_BYTES]
            self._kernel.launch(stream)


# struct Arguments of cuda_src/append_kv.cu
_APPEND_POINTERS = ("cu_seqlens_q", "cache_seqlens", "cache_batch_idx", "page_table")
_APPEND_SIZES = ("batch", "seqlen_q", "q_heads", "kv_heads", "head_dim", "head_dim_v", "capacity", "page_size", "lanes")
APPEND_ARGUMENTS = np.dtype(
    [
        *((name, _ROWS) for name in ("q", "rotated_q")),
        ("append", APPEND),
        *((name, "u8") for name in _APPEND_POINTERS),
        ("page_table_stride", "i8"),
        *((name, "i4") for name in _APPEND_SIZES),
    ],
    align=True,
)
APPEND_THREADS = 128


class _NewRows:
    """A kernel's record of the new keys and values that it appends, (1,) of APPEND."""

    def __init__(self, record: np.ndarray, views: dict[str, Array], interleaved: bool, query_advances: bool):
        cos = views.get("rotary_cos")
        fields = record[0]
        for name in _CACHED_ROWS:
            fields[name]["strides"] = _strides(views[name])
        if cos:
            fields["rotary_dim"], fields["max_position"] = 2 * cos.shape[1], cos.shape[0]
        fields["interleaved"], fields["query_advances"] = interleaved, query_advances
        self._words = (ctypes.c_uint64 * (APPEND.itemsize // 8)).from_buffer(record.view(np.uint8).data)

    def point_to(self, at: dict[str, int]) -> None:
        for word, name in _APPEND_ADDRESSES:
            self._words[word] = at.get(name, 0)


def _strides(rows: Array) -> tuple[int, ...]:
    """Bytes from batch to batch (0 where sequences are packed), row to row and head to head."""
    *batch_stride, row_stride, head_stride, _ = rows.strides
    return (*(batch_stride or [0]), row_stride, head_stride)


class _AppendKernel:
    """append_kv on one geometry: for an attention that does not append by itself."""

    def __init__(
        self, views: dict[str, Array], rotated_q: Array | None, *, page_table_stride: int, interleaved: bool, query_advances: bool
    ):
        q, k, v = views["q"], views["k_cache"], views["v_cache"]
        block = np.zeros(1, APPEND_ARGUMENTS)
        fields = block[0]
        for name, rows in (("q", q), ("rotated_q", rotated_q)):
            fields[name]["strides"] = (0, 0, 0) if rows is None else _strides(rows)
        self._new_rows = _NewRows(_append_of(block.view(np.uint8), APPEND_ARGUMENTS), views, interleaved, query_advances)
        self._rotates = rotated_q is not None
        words = block.view(np.uint64)
        self._q = words[:8:4]
        self._pointers = words[_offset(APPEND_ARGUMENTS, _APPEND_POINTERS[0]) // 8 :][: len(_APPEND_POINTERS)]
        lanes = 1 << (max(q.shape[-1], v.shape[-1]) // 8 - 1).bit_length()
        batch = checks.batch_of(views)
        sizes = dict(
            batch=batch, seqlen_q=q.shape[-3], q_heads=q.shape[-2], kv_heads=k.shape[-2], head_dim=q.shape[-1], head_dim_v=v.shape[-1],
            capacity=checks.capacity_of(views), page_size=k.shape[1], lanes=lanes,
        )  # fmt: skip
        for name, size in sizes.items():
            fields[name] = size
        fields["page_table_stride"] = page_table_stride
        tokens = q.shape[-3] * (1 if len(q.shape) == 3 else batch)
        tasks = tokens * (2 * k.shape[-2] + (q.shape[-2] if self._rotates else 0))
        if tasks >= 1 << 32:
            raise ValueError(f"k has shape {views['k'].shape}: {tasks} heads to write, with those of q; needed: under 2^32")
        self._kernel = _BoundKernel(load(AppendSpec(q.dtype)), (-(-tasks * lanes // APPEND_THREADS), 1, 1), APPEND_THREADS, 0, block)

    def launch(self, stream: int, at: dict[str, int]) -> None:
        self._q[:] = at["q"], at.get("rotated_q", 0)
        self._new_rows.point_to(at)
        self._pointers[:] = [at.get(name, 0) for name in _APPEND_POINTERS]
        self._kernel.launch(stream)


class CachePlan:
    """attention_with_kvcache on one geometry. The kernel of few queries appends and rotates by itself, before others append_kv does.

    `views` are the arrays that the call was given, by the names of its arguments; launch() takes their addresses in the same order.
    """

    def __init__(self, views: dict[str, Array], out: Array, *, left: int, right: int, scale: float, interleaved: bool):
        q, k, v = views["q"], views["k_cache"], views["v_cache"]
        page_table = views.get("page_table")
        batch, capacity = checks.batch_of(views), checks.capacity_of(views)
        ragged, appends = len(q.shape) == 3, "k" in views
        page_table_stride = page_table.strides[0] // 4 if page_table else 0
        ratio = q.shape[-2] // k.shape[-2]
        mask = checks.mask_kind(left, right)
        rows_q = None if ragged else q.shape[1]
        page_size = k.shape[1] if page_table else 0
        spec = cache_spec(q.dtype, q.shape[-1], v.shape[-1], ratio, k.shape[-2], mask, rows_q, page_size)
        needs_kernel = appends and not tile_for(spec).few_rows
        rotated_q: Array | None = None
        if needs_kernel and "rotary_cos" in views:
            q = rotated_q = replace(q, owner=None, strides=arrays.contiguous_strides(q.shape, 2))
        self._names = tuple(views)
        self._lengths = [name for name in POINTERS if name in views]
        self._attention = Plan(
            spec, q, k, v, out, batch=batch, left=left, right=right, bottom_right=True, scale=scale,
            lengths=self._lengths, capacity=capacity, new_keys=0 if not appends else -1 if ragged else q.shape[1],
            page_table_stride=page_table_stride, overlaps=needs_kernel,
        )  # fmt: skip
        self._append: _AppendKernel | None = None
        self._new_rows: _NewRows | None = None
        self._rotated_q_offset = 0
        query_advances = mask != "full" or rows_q == 1
        if needs_kernel:
            import cupy

            self._append = _AppendKernel(
                views, rotated_q, page_table_stride=page_table_stride, interleaved=interleaved, query_advances=query_advances
            )
            self._workspaces = _workspaces(cupy.cuda.Device().id)
            if rotated_q:  # in the stream's workspace, behind what the attention has there: a captured graph needs it for as long
                self._rotated_q_offset = -(-max(self._attention.workspace_bytes, ARRIVALS_BYTES) // 128) * 128
                self._workspace_bytes = self._rotated_q_offset + 2 * math.prod(q.shape)
        elif appends:
            self._new_rows = _NewRows(self._attention.append, views, interleaved, query_advances)

    def launch(self, stream: int, out: int, lse: int, addresses: list[int]) -> None:
        at = dict(zip(self._names, addresses, strict=True))
        if self._append is None:
            if self._new_rows is not None:
                self._new_rows.point_to(at)
            self._attend(stream, out, lse, at)
            return
        with self._workspaces.lock:
            if self._rotated_q_offset:
                # Asked for before the attention asks for less, since one that grows moves.
                at["rotated_q"] = self._workspaces.address(stream, self._workspace_bytes) + self._rotated_q_offset
            self._append.launch(stream, at)
            self._attend(stream, out, lse, at)

    def _attend(self, stream: int, out: int, lse: int, at: dict[str, int]) -> None:
        q = at.get("rotated_q", at["q"])
        self._attention.launch(stream, out, lse, [q, at["k_cache"], at["v_cache"], *[at[name] for name in self._lengths]])
