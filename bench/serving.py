"""What a serving loop asks of attention beyond one shape at a time, on a Hopper GPU, each figure beside its target.

    python3 -m bench.serving --build                 # compiles all variants in parallel and exits; needs no GPU
    python3 -m bench.serving [--json FILE] [SECTION ...]

Sections: ragged, pages, append, chunks, speculative, prompts, dims, window; all by default. Each call is first checked against float64 on
some rows. Steps on a cache are captured in a CUDA graph and replayed with L2 emptied, so they include the launch of a graph; what computes
is timed in bursts behind a kernel that holds the GPU. The calls that are compared take turns; figures are medians. bfloat16, 32/8 heads of
128 and causal unless a line says otherwise. With torch, cuDNN stands beside the prompts. Exit status 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rawattn
from rawattn import compiler, reference
from rawattn.checks import Window
from rawattn.cli import peers, timing
from rawattn.cli.check import judge
from rawattn.cli.info import machine
from rawattn.cli.shapes import Shape
from rawattn.spec import AppendSpec, KernelSpec
from rawattn.tiles import launch_variants

HEADS, KV_HEADS, DIM = 32, 8, 128
SEQUENCES, LONGEST = 64, 32768
CACHE_SHAPE = (SEQUENCES, LONGEST, KV_HEADS, DIM)
PAGE_SIZES = (1, 16, 64, 256)
CHUNKS = (128, 512)
SPECULATED = (1, 2, 4, 8, 16)
PROMPTS = (16, 4096)  # shortest, longest
DIMS = {(80, 80): 128, (96, 96): 128, (112, 112): 128, (192, 128): 256}  # with the next larger head of 64, 128, 256
WINDOW = (1024, 0)

STEP_ROUNDS, STEPS = 8, 10  # turns of each call, and replays in a turn
BURST_ROUNDS, BURST_US = 3, 10_000
CHECKED_ROWS = 8

Call = Callable[[], Any]
Row = dict[str, Any]


# ---- shapes and their variants


def chunk(rows: int, batch: int, cache: bool) -> Shape:
    return Shape("bf16", batch, rows, LONGEST, HEADS, KV_HEADS, DIM, DIM, causal=True, cache=cache)


def prompts(batch: int, seqlen: int) -> Shape:
    return Shape("bf16", batch, seqlen, seqlen, HEADS, KV_HEADS, DIM, DIM, causal=True)


def prefill(head_dim: int, head_dim_v: int, causal: bool, seqlen: int = 4096, window: Window | None = None) -> Shape:
    """16384 tokens, 16 heads with keys of their own."""
    return Shape("bf16", 16384 // seqlen, seqlen, seqlen, 16, 16, head_dim, head_dim_v, causal, window)


def variants() -> list[KernelSpec | AppendSpec]:
    """All kernels that the sections launch."""
    shapes = [replace(chunk(1, 1, cache=True), page_size=page_size) for page_size in (0, *PAGE_SIZES)]
    shapes += [chunk(rows, 1, cache=True) for rows in SPECULATED]
    shapes += [chunk(rows, 1, cache) for rows in CHUNKS for cache in (True, False)]
    shapes += [prefill(*dims, causal) for pair, larger in DIMS.items() for dims in (pair, (larger, larger)) for causal in (True, False)]
    shapes += [prefill(DIM, DIM, True, 16384, WINDOW), prompts(1, PROMPTS[1])]
    packed = replace(prompts(1, PROMPTS[1]).spec, varlen=True)
    return list(dict.fromkeys([*(spec for shape in shapes for spec in launch_variants(shape.spec)), packed, AppendSpec("bfloat16")]))


def build() -> None:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for path in pool.map(compiler.build, variants()):
            print(path.name)


# ---- timing and checking


def in_turns(calls: dict[str, Call], rounds: int, times: Callable[[Call], list[float]]) -> dict[str, float]:
    """Median microseconds of each call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += times(call)
    return {name: statistics.median(each) for name, each in samples.items()}


def steps(calls: dict[str, Call]) -> dict[str, float]:
    replays = {name: timing.capture(call) for name, call in calls.items()}
    return in_turns(replays, STEP_ROUNDS, lambda replay: timing.cold(replay, STEPS))


def bursts(calls: dict[str, Call]) -> dict[str, float]:
    def times(call: Call) -> list[float]:
        us = min(timing.burst(call, 3))
        return timing.burst(call, min(max(math.ceil(BURST_US / us), 4), timing.BURST))

    return in_turns(calls, BURST_ROUNDS, times)


def tflops(calls: dict[str, tuple[Call, float]]) -> dict[str, float]:
    """Of calls given with their FLOPs."""
    times = bursts({name: call for name, (call, _) in calls.items()})
    return {name: flops / times[name] / 1e6 for name, (_, flops) in calls.items()}


def check(what: str, out: Any, expected: Any) -> None:
    figures = judge(what, out, expected)
    if not figures.passed:
        raise AssertionError(f"wrong result of {what}: relative L2 error {figures.rel_l2:.2e}, largest error {figures.max_error:.2e}")


def check_last_rows(what: str, out: Any, q: Any, k: Any, v: Any, window: Window | None = None, causal: bool = True) -> None:
    """The last queries of sequences (B, S, H, D), of which the first and the last count."""
    for b in {0, len(q) - 1}:
        one = slice(b, b + 1), slice(-CHECKED_ROWS, None)
        check(what, out[one], reference.attention(q[one], k[b : b + 1], v[b : b + 1], causal=causal, window=window))


def same_bits(a: Any, b: Any) -> bool:
    return bool((a.view(np.uint16) == b.view(np.uint16)).all())


def row(what: str, value: float, unit: str = "", at_least: float | None = None, at_most: float | None = None, **details: float) -> Row:
    target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
    met = bool(value >= at_least) if at_least is not None else bool(value <= at_most) if at_most is not None else None
    rounded = {name: round(x, 2) for name, x in details.items()}
    return {"what": what, "value": round(value, 3), "unit": unit, "target": target, "met": met, **rounded}


# ---- a cache that the sections share


@functools.cache
def cache() -> tuple[Any, Any]:
    """K and V of CACHE_SHAPE, 4.3 GB each."""
    return timing.normal(CACHE_SHAPE, "bf16", 2), timing.normal(CACHE_SHAPE, "bf16", 3)


def part(batch: int, seqlen: int) -> tuple[Any, Any]:
    k, v = cache()
    return k[:batch, :seqlen], v[:batch, :seqlen]


def queries(batch: int, rows: int = 1) -> Any:
    return timing.normal((batch, rows, HEADS, DIM), "bf16", 1)


def lengths_of(values: Any) -> Any:
    import cupy

    return cupy.asarray(np.asarray(values, np.int32))


def step(q: Any, k_cache: Any, v_cache: Any, lengths: Any, **more: Any) -> Call:
    """A call whose output is there already, for a captured call must not allocate; it returns the output."""
    import cupy

    out = cupy.empty_like(q)
    return partial(rawattn.attention_with_kvcache, q, k_cache, v_cache, cache_seqlens=lengths_of(lengths), out=out, **more)


def log_uniform(shortest: int, longest: int, count: int) -> np.ndarray:
    """The same integers each time, as many between 100 and 200 as between 1000 and 2000."""
    return np.exp(np.random.default_rng(0).uniform(math.log(shortest), math.log(longest + 1), count)).astype(int).clip(shortest, longest)


# ---- sections


def ragged() -> Iterator[Row]:
    lengths = log_uniform(100, LONGEST, SEQUENCES)
    equal = np.full(SEQUENCES, round(lengths.mean()))
    k, v = cache()
    q = queries(SEQUENCES)
    calls = {name: step(q, k, v, x) for name, x in (("ragged", lengths), ("equal", equal))}
    for name, x in (("ragged", lengths), ("equal", equal)):
        out = calls[name]()
        for b in (int(x.argmin()), int(x.argmax())):
            one = slice(b, b + 1)
            check(f"{name} lengths", out[one], reference.attention(q[one], k[one, : x[b]], v[one, : x[b]]))
    us = steps(calls)
    gbps = {name: 4 * KV_HEADS * DIM * int(x.sum()) / us[name] / 1e3 for name, x in (("ragged", lengths), ("equal", equal))}
    what = f"{SEQUENCES} lengths from {lengths.min()} to {lengths.max()}: GB/s over that of {equal[0]} each"
    yield row(what, gbps["ragged"] / gbps["equal"], at_least=0.9, ragged_gbps=gbps["ragged"], equal_gbps=gbps["equal"])


def pages() -> Iterator[Row]:
    import cupy

    for batch, seqlen in ((32, 2048), (8, 8192)):
        k, v = part(batch, seqlen)
        q = queries(batch)
        calls = {"contiguous": step(q, k, v, [seqlen] * batch)}
        expected = calls["contiguous"]().copy()
        check_last_rows("a contiguous cache", expected, q, k, v)
        for size in PAGE_SIZES:
            table = np.random.default_rng(size).permutation(batch * seqlen // size).astype(np.int32).reshape(batch, -1)
            paged = []
            for x in (k, v):
                paged.append(cupy.empty((table.size, size, KV_HEADS, DIM), x.dtype))
                paged[-1][cupy.asarray(table.ravel())] = x.reshape(table.size, size, KV_HEADS, DIM)
            calls[f"pages of {size}"] = step(q, paged[0], paged[1], [seqlen] * batch, page_table=cupy.asarray(table))
            assert same_bits(calls[f"pages of {size}"](), expected), f"pages of {size} changed bits"
        us = steps(calls)
        for size in PAGE_SIZES:
            mine = us[f"pages of {size}"]
            what = f"B{batch} S{seqlen}, pages of {size}: time over that without pages"
            yield row(what, mine / us["contiguous"], at_most=1.05 if size == 16 else None, us=mine, contiguous_us=us["contiguous"])


def append() -> Iterator[Row]:
    import cupy

    seqlen = 2048
    angles = cupy.arange(seqlen)[:, None] / 10000.0 ** (cupy.arange(DIM // 2) / (DIM // 2))
    for batch in (1, 32):
        k_cache, v_cache = part(batch, seqlen)
        q = queries(batch)
        new = {name: timing.normal((batch, 1, KV_HEADS, DIM), "bf16", seed) for name, seed in (("k", 4), ("v", 5))}
        rotary = {"rotary_cos": cupy.cos(angles).astype(q.dtype), "rotary_sin": cupy.sin(angles).astype(q.dtype)}
        arguments: dict[str, dict[str, Any]] = {"": {}, "append": new, "append and rotary": new | rotary}
        calls = {}
        for name, more in arguments.items():
            length = seqlen - bool(more)  # the attention has the same keys
            last = {key: x[-1:] if key in new else x for key, x in more.items()}
            expected = reference.attention_with_kvcache(q[-1:], k_cache[-1:], v_cache[-1:], **last, cache_seqlens=length)
            calls[name] = step(q, k_cache, v_cache, [length] * batch, **more)
            check(name or "a step", calls[name]()[-1:], expected)
        us = steps(calls)
        for name in ("append", "append and rotary"):
            what = f"B{batch} S{seqlen}, {name}: time beyond that without"
            yield row(what, us[name] - us[""], "us", at_most=1, us=us[name], without_us=us[""])


def chunks() -> Iterator[Row]:
    import cupy

    for rows in CHUNKS:
        for name in ("attention_with_kvcache()", "attention()"):
            calls: dict[str, tuple[Call, float]] = {}
            for batch in (1, 16):
                k, v = part(batch, LONGEST)
                q = queries(batch, rows)
                if name == "attention()":
                    call: Call = partial(rawattn.attention, q, k, v, causal=True, out=cupy.empty_like(q))
                else:
                    call = step(q, k, v, [LONGEST] * batch)
                check_last_rows(name, call(), q, k, v)
                calls[f"B{batch}"] = call, chunk(rows, batch, False).flops
            found = tflops(calls)
            what = f"{rows} new tokens on {LONGEST} keys, {name}: TFLOP/s at B1 over B16"
            yield row(what, found["B1"] / found["B16"], at_least=0.85, tflops_b1=found["B1"], tflops_b16=found["B16"])


def speculative() -> Iterator[Row]:
    seqlen = 4096
    for batch in (1, 16):
        k, v = part(batch, seqlen)
        calls = {}
        for rows in SPECULATED:
            q = queries(batch, rows)
            calls[str(rows)] = step(q, k, v, [seqlen] * batch)
            check_last_rows(f"{rows} new tokens", calls[str(rows)](), q, k, v)
        us = steps(calls)
        for rows in SPECULATED[1:]:
            what = f"B{batch} S{seqlen}, {rows} new tokens: time over that of one"
            yield row(what, us[str(rows)] / us["1"], at_most=1.1, us=us[str(rows)], one_us=us["1"])


def long_prompts() -> Iterator[Row]:
    import cupy

    lengths = log_uniform(*PROMPTS, SEQUENCES)
    ends = np.cumsum([0, *lengths])
    q = timing.normal((int(ends[-1]), HEADS, DIM), "bf16", 1)
    k, v = (timing.normal((int(ends[-1]), KV_HEADS, DIM), "bf16", seed) for seed in (2, 3))
    bounds = lengths_of(ends)
    packed: Call = partial(rawattn.attention_varlen, q, k, v, bounds, bounds, causal=True, out=cupy.empty_like(q))
    out = packed()
    for b in (int(lengths.argmin()), int(lengths.argmax())):
        one = slice(int(ends[b]), int(ends[b + 1]))
        check_last_rows("attention_varlen()", out[None, one], q[None, one], k[None, one], v[None, one])
    flops = sum(prompts(1, int(length)).flops for length in lengths)
    same = prompts(SEQUENCES, round(math.sqrt(np.mean(lengths**2))))
    inputs = timing.inputs(same)
    calls: dict[str, tuple[Call, float]] = {
        "packed": (packed, flops),
        "equal": (partial(rawattn.attention, *inputs, causal=True, out=cupy.empty_like(inputs[0])), same.flops),
    }
    mix = f"{SEQUENCES} prompts of {lengths.min()} to {lengths.max()}: TFLOP/s"
    found = tflops(calls)
    what = f"{mix} over attention() of {same.seqlen_q} each"
    yield row(what, found["packed"] / found["equal"], packed=found["packed"], equal=found["equal"])
    del inputs, calls["equal"]
    padded = timing.inputs(prompts(SEQUENCES, int(lengths.max())))
    try:
        cudnn = peers.CuDNN()
        with cudnn.context():
            calls["cudnn"] = cudnn.prefill(*padded, True), flops
            found = tflops(calls)
    except Exception as error:  # torch is not there, or refuses; it is only to stand beside
        print(f"cuDNN is left out: {peers.sentence(error)}")
        return
    yield row(f"{mix} over cuDNN's, padded", found["packed"] / found["cudnn"], at_least=1, packed=found["packed"], cudnn=found["cudnn"])


def plain(shape: Shape) -> tuple[Call, float]:
    """attention() of that shape, checked, with its FLOPs."""
    import cupy

    q, k, v = timing.inputs(shape)
    out = cupy.empty((*q.shape[:3], shape.head_dim_v), q.dtype)
    call = partial(rawattn.attention, q, k, v, causal=shape.causal, window=shape.window, out=out)
    check_last_rows(shape.text, call(), q, k, v, shape.window, shape.causal)
    return call, shape.flops


def dims() -> Iterator[Row]:
    for causal in (True, False):
        calls = {str(larger): plain(prefill(larger, larger, causal)) for larger in dict.fromkeys(DIMS.values())}
        calls |= {f"{d}/{dv}": plain(prefill(d, dv, causal)) for d, dv in DIMS}
        found = tflops(calls)
        for (d, dv), larger in DIMS.items():
            mine, other = found[f"{d}/{dv}"], found[str(larger)]
            what = f"{'causal' if causal else 'full'} S4096 16/16 heads, D{d}{f'/{dv}' if dv != d else ''}: TFLOP/s over those of D{larger}"
            yield row(what, mine / other, at_least=0.9, tflops=mine, larger_tflops=other)


def window() -> Iterator[Row]:
    shapes = {name: prefill(DIM, DIM, True, 16384, bounds) for name, bounds in (("window", WINDOW), ("causal", None))}
    us = bursts({name: plain(shape)[0] for name, shape in shapes.items()})
    ideal = us["causal"] * shapes["window"].flops / shapes["causal"].flops
    what = "S16384 16/16 heads, window of 1024: time over its share of causal's"
    yield row(what, us["window"] / ideal, at_most=1.3, us=us["window"], ideal_us=ideal)


SECTIONS: dict[str, Callable[[], Iterable[Row]]] = {
    "ragged": ragged,
    "pages": pages,
    "append": append,
    "chunks": chunks,
    "speculative": speculative,
    "prompts": long_prompts,
    "dims": dims,
    "window": window,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], metavar="SECTION")
    parser.add_argument("--json", type=Path, help="written after each figure, so that a run which is cut off keeps what it has")
    parser.add_argument("--build", action="store_true", help="compile and exit")
    options = parser.parse_args()
    if options.build:
        build()
        return
    compiler.check_gpu(compiler.current_device())
    rows: list[Row] = []
    report = {"benchmark": "serving", "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "cases": rows}
    wrong = False
    for name in options.sections or SECTIONS:
        start = time.perf_counter()
        try:
            for each in SECTIONS[name]():
                rows.append({"section": name, **each})
                show(each)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except Exception as error:  # the other sections can still be measured
            wrong = True
            rows.append({"section": name, "error": peers.sentence(error)})
            print(f"{name} failed: {peers.sentence(error)}")
        timing.release()
        print(f"  ({name}: {time.perf_counter() - start:.1f} s)")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(wrong)


def show(each: Row) -> None:
    verdict = {True: "met", False: "MISSED", None: ""}[each["met"]]
    known = ("what", "value", "unit", "target", "met")
    details = ", ".join(f"{name} {x:g}" for name, x in each.items() if name not in known)
    print(f"{each['what']:86} {each['value']:7.3f} {each['unit']:2} {each['target']:>7} {verdict:6} {details}", flush=True)


if __name__ == "__main__":
    main()
