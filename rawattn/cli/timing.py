"""Times on the GPU: calls queued behind a kernel that holds it, CUDA graphs with a cold L2, ceilings measured in the same run, SM clocks.

Only CuPy and three small kernels. Everything runs on the default stream, where CuPy and torch meet.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .check import DTYPES
from .shapes import Shape

HOLD_PER_CALL = 140_000  # cycles, about 80 us: more than any peer's host time for a call
LONGEST_HOLD = 14_000_000
BURST = 150  # the launch queue holds about 1000 entries, and a call may launch several kernels
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
READ_BYTES = 2 << 30
MATMUL = 8192
CLOCK_CYCLES = 200_000
CHUNK = 1 << 26

_SOURCE = r"""
extern "C" __global__ void hold(long long cycles, unsigned long long* elapsed) {
    unsigned long long begin_ns, end_ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin_ns));
    long long begin = clock64();
    while (clock64() - begin < cycles) {}
    long long end = clock64();
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end_ns));
    elapsed[0] = end - begin;
    elapsed[1] = end_ns - begin_ns;
}

extern "C" __global__ void nothing() {}

extern "C" __global__ void read_all(const uint4* data, long long size, unsigned* never_written) {
    uint4 mix = {0, 0, 0, 0};
    const long long stride = (long long)gridDim.x * blockDim.x;
#pragma unroll 8
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) {
        const uint4 x = data[i];
        mix.x ^= x.x; mix.y ^= x.y; mix.z ^= x.z; mix.w ^= x.w;
    }
    if ((mix.x ^ mix.y ^ mix.z ^ mix.w) == 0x9E3779B9) *never_written = 1;  // or the compiler would drop the loads
}
"""


class Kernels:
    """The three kernels and the memory that they use, on one device."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        module = cupy.RawModule(code=_SOURCE)
        self._hold, self._nothing, self._read = (module.get_function(name) for name in ("hold", "nothing", "read_all"))
        self._elapsed = cupy.zeros(2, cupy.uint64)
        self._sink = cupy.zeros(1, cupy.uint32)
        self._flushed = cupy.zeros(2 * FLUSH_BYTES, cupy.uint8)
        self._blocks = 4 * cupy.cuda.Device().attributes["MultiProcessorCount"]

    def hold(self, cycles: int) -> None:
        self._hold((1,), (1,), (self.cupy.int64(cycles), self._elapsed))

    def nothing(self) -> None:
        self._nothing((1,), (1,), ())

    def read(self, data: Any) -> None:
        self._read((self._blocks,), (512,), (data, self.cupy.int64(data.nbytes // 16), self._sink))

    def flush(self) -> None:
        """Empties L2: a write, then a read, or L2 would be full of dirty lines whose write-back is charged to the next kernel."""
        self._flushed.data.memset_async(1, FLUSH_BYTES)
        self.read(self._flushed[FLUSH_BYTES:])

    def sm_mhz(self) -> float:
        """The SM clock now, from the GPU's own two counters."""
        self.hold(CLOCK_CYCLES)
        cycles, nanoseconds = self._elapsed.tolist()
        return 1e3 * cycles / max(nanoseconds, 1)


@functools.cache
def kernels() -> Kernels:
    return Kernels()


def inputs(shape: Shape) -> tuple[Any, Any, Any]:
    """q, k, v of N(0, 1) on the GPU, the same for the same shape."""
    return (
        normal((shape.batch, shape.seqlen_q, shape.heads, shape.head_dim), shape.dtype, 1),
        normal((shape.batch, shape.seqlen_k, shape.kv_heads, shape.head_dim), shape.dtype, 2),
        normal((shape.batch, shape.seqlen_k, shape.kv_heads, shape.head_dim_v), shape.dtype, 3),
    )


def full_lengths(cache: Any) -> Any:
    """cache_seqlens on the GPU for a cache (B, S, Hkv, D) that is full."""
    import cupy

    return cupy.full(cache.shape[0], cache.shape[1], cupy.int32)


def normal(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """N(0, 1) numbers made on the GPU without cuRAND, by Box and Muller over SplitMix64."""
    import cupy

    out = cupy.empty(math.prod(shape), DTYPES[dtype])
    for start in range(0, out.size, CHUNK):
        part = cupy.empty(min(CHUNK, out.size - start), cupy.float32)
        _normal_kernel()(cupy.uint64(seed << 40), cupy.uint64(start), part)
        out[start : start + part.size] = part.astype(out.dtype)
    return out.reshape(shape)


@functools.cache
def _normal_kernel() -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "uint64 seed, uint64 start",
        "float32 x",
        """unsigned long long z = (seed + start + (unsigned long long)i) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        x = sqrtf(-2.0f * logf(((unsigned)(z >> 40) + 1) * 0x1p-24f)) * cospif((unsigned)(z & 0xFFFFFF) * 0x1p-23f);""",
        "rawattn_bench_normal",
    )


def release() -> None:
    """Gives memory that CuPy and torch keep for themselves back to the GPU, where the other may take it."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def burst(call: Callable[[], Any], count: int) -> list[float]:
    """GPU microseconds of `count` calls, back to back. The GPU is held while they are queued, so that host time stays out."""
    import cupy

    events = [cupy.cuda.Event() for _ in range(count + 1)]
    kernels().hold(min(count * HOLD_PER_CALL, LONGEST_HOLD))
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [1e3 * cupy.cuda.get_elapsed_time(a, b) for a, b in zip(events, events[1:], strict=False)]


def wall_clock(call: Callable[[], Any], wait: Callable[[Any], Any], count: int) -> list[float]:
    """Microseconds of each of `count` calls on streams that are not ours: their mean, host time included where that is longer."""
    start = time.perf_counter()
    result = None
    for _ in range(count):
        result = call()
    wait(result)
    return [1e6 * (time.perf_counter() - start) / count]


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, which works on CuPy's current stream, as a CUDA graph: returns what replays it on the current stream."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        call()  # compiles, and allocates what a capture must not
        stream.synchronize()
        stream.begin_capture()
        call()
        graph = stream.end_capture()
    return graph.launch


def cold(replay: Callable[[], Any], count: int) -> list[float]:
    """GPU microseconds of `count` replays, L2 emptied before each."""
    import cupy

    replay()
    pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(count)]
    for start, stop in pairs:
        kernels().flush()
        start.record()
        replay()
        stop.record()
    pairs[-1][1].synchronize()
    return [1e3 * cupy.cuda.get_elapsed_time(start, stop) for start, stop in pairs]


def host_floor(like: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What the host pays at least: calls that allocate an array as `like`, and that launch a kernel which does nothing."""
    import cupy

    return (lambda: cupy.empty(like.shape, like.dtype)), kernels().nothing


def host(call: Callable[[], Any], count: int = 100, bursts: int = 15, warm_up: float = 0.2) -> list[float]:
    """Host microseconds to issue one call, a figure for each burst; the GPU is idle before each, so its queue never fills.

    Bursts of the first `warm_up` seconds, in which the host's clock rises, do not count.
    """
    import cupy

    def one_burst() -> float:
        cupy.cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (time.perf_counter() - start) / count

    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + warm_up
        while time.perf_counter() < end:
            one_burst()
        samples = [one_burst() for _ in range(bursts)]
    finally:
        if collects:
            gc.enable()
    cupy.cuda.runtime.deviceSynchronize()
    return samples


def ceilings() -> dict[str, Any]:
    """What this GPU does at most, now: TFLOP/s of cuBLAS (float16, 8192^3), GB/s of reading, microseconds of a graph that does nothing.

    Where CuPy finds no cuBLAS, "matmul_tflops" is None and "problem" says why.
    """
    import cupy

    found: dict[str, Any] = {"matmul_tflops": None}
    times = burst(partial(kernels().read, cupy.zeros(READ_BYTES, cupy.uint8)), 30)
    found["read_gbps"] = READ_BYTES / statistics.median(times) / 1e3
    a, b = (normal((MATMUL, MATMUL), "fp16", seed) for seed in (4, 5))
    out = cupy.empty_like(a)
    try:
        for _ in range(5):
            cupy.matmul(a, b, out=out)
        times = burst(lambda: cupy.matmul(a, b, out=out), 60)
        found["matmul_tflops"] = 2 * MATMUL**3 / statistics.median(times) / 1e6
    except Exception as error:  # CuPy's wheels come without cuBLAS, and each release says so in its own way
        found["problem"] = f"no cuBLAS ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    found["null_graph_us"] = statistics.median(cold(capture(kernels().nothing), 50))
    return found


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, quartiles and minimum of microseconds.

    >>> summary([4.0, 1.0, 3.0, 2.0, 5.0])
    {'us': 3.0, 'us_q1': 2.0, 'us_q3': 4.0, 'us_min': 1.0, 'samples': 5}
    """
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {
        "us": round(median, 3),
        "us_q1": round(q1, 3),
        "us_q3": round(q3, 3),
        "us_min": round(min(samples), 3),
        "samples": len(samples),
    }


def spread(figures: dict[str, Any]) -> float:
    """Half the distance between the quartiles, as a share of the median.

    >>> spread({"us": 100.0, "us_q1": 99.0, "us_q3": 101.0})
    0.01
    """
    return (figures["us_q3"] - figures["us_q1"]) / 2 / figures["us"]


def geometric_mean(ratios: list[float]) -> float:
    """
    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(statistics.fmean(map(math.log, ratios)))
