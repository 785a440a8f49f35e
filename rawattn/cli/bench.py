"""`rawattn bench`: speed beside the ceilings of this GPU and beside other libraries, host time, and cold start."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

import rawattn
from rawattn import compiler, reference

from . import peers, plots, timing
from .check import judge, progress
from .info import machine
from .shapes import DTYPE_OF, WINDOW, Command, Shape, checked, geometry, geometry_options

PREFILL_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PREFILL_TOKENS = 16384
DECODE_LENGTHS = (512, 2048, 8192, 32768)
DECODE_BATCHES = (1, 8, 32, 128)
Piece = tuple[str, Callable[[], dict[str, Any]]]  # a label, and what measures one case

ROUNDS = 3  # of each implementation in turn, so that all meet the same clocks
ROUND_US = 10_000
CHECKED_ROWS = 32
PEER_ERROR = 1e-2  # relative L2 error above which a peer has computed something else
INTERRUPTED = 130
PLOT_HELP = f"Draw bars and a roofline to {', '.join(plots.SUFFIXES)}; needs matplotlib."

METHODS = {
    "prefill": "calls back to back between CUDA events, the GPU held while they are queued; JAX by the wall clock; median with quartiles, "
    f"{ROUNDS} rounds of each implementation in turn; FLOPs are those that the mask lets through; ratio = peer time / rawattn time",
    "decode": "one call captured in a CUDA graph, L2 emptied before each replay; median with quartiles; GB/s of keys and values; the times "
    "include the launch of a graph (null_graph_us); ratio = peer time / rawattn time",
    "overhead": "host microseconds to issue one call, bursts of 100 on an idle GPU; one causal sequence of 64 rows, 4 heads of 128, bf16",
    "coldstart": "each sample a process of its own, with CUDA_CACHE_DISABLE=1: neither the driver nor NVRTC keeps what they compiled; "
    "the first call is timed after the CUDA context and the arrays are there, until the GPU is done",
}

# Microseconds that a call from an idle host, an import and a first call should stay below.
TARGETS_US = {
    "rawattn.attention, CuPy": 15,
    "rawattn.attention, torch": 20,
    "rawattn.prepare, CuPy, out=": 9,
    "import rawattn": 300_000,
    "first call, empty cache": 2_000_000,
    "first call, filled cache": 50_000,
}


class Outputs(NamedTuple):
    json: Any
    csv: Any
    plot: Path | None


@click.group()
def bench() -> None:
    """Measure attention on this machine's GPU.

    Exit status of each: 0 if all was measured, 1 if rawattn failed, was wrong,
    or no Hopper GPU is here, 2 for a usage error, 130 after Ctrl-C, which still
    prints and writes what was measured.

    \b
    Example:
        rawattn bench prefill --model llama-3.1-8b --peers none
    """


def output_options(command: Command) -> Command:
    for option in (
        click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), callback=_checked_plot, metavar="FILE", help=PLOT_HELP),
        click.option("--csv", "csv_file", type=click.File("w", lazy=False), metavar="FILE", help="Write a row for each figure."),
        click.option("--json", "json_file", type=click.File("w", lazy=False), metavar="FILE", help="Write machine, ceilings and figures."),
    ):
        command = option(command)
    return command


def peers_option(command: Command) -> Command:
    text = f"all, none, or some of {','.join(peers.PEERS)}; those not installed are left out."
    return click.option("--peers", "names", default="all", callback=_checked_peers, metavar="LIST", show_default=True, help=text)(command)


def _checked_plot(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        try:
            plots.check(path)
        except ValueError as error:
            raise click.BadParameter(f"{error}.", context, parameter) from error
    return path


def _checked_peers(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    if text in ("all", "none"):
        return [*peers.PEERS] if text == "all" else []
    names = text.split(",")
    for name in names:
        if name not in peers.PEERS:
            raise click.BadParameter(f"{name!r} is no peer; needed: all, none, or some of {', '.join(peers.PEERS)}.", context, parameter)
    return names


dtype_option = click.option(
    "--dtype", "dtypes", multiple=True, default=("bf16",), show_default=True, type=click.Choice([*DTYPE_OF]), help="Repeatable."
)
positive = click.IntRange(min=1)


@bench.command()
@geometry_options
@click.option("--seqlen", "lengths", multiple=True, type=positive, metavar="S", help="Repeatable.  [default: 512, 1024, ... 16384]")
@click.option("--batch", type=positive, metavar="B", help=f"[default: {PREFILL_TOKENS} / S]")
@click.option("--causal/--full", default=None, help="[default: both]")
@dtype_option
@peers_option
@output_options
def prefill(
    model: str | None,
    head_dim: int | None,
    head_dim_v: int | None,
    heads: tuple[int, int] | None,
    lengths: tuple[int, ...],
    batch: int | None,
    causal: bool | None,
    dtypes: tuple[str, ...],
    names: list[str],
    json_file: Any,
    csv_file: Any,
    plot: Path | None,
) -> None:
    """Time attention() over whole sequences.

    Each result is checked against float64 before it is timed. The default is
    16384 tokens in all, heads of 128. The ceiling is cuBLAS, fp16, 8192^3.

    \b
    Example:
        rawattn bench prefill --head-dim 64 --seqlen 4096 --plot prefill.svg
    """
    q_heads, kv_heads, d, dv = geometry(model, head_dim, head_dim_v, heads) or (16, 16, 128, 128)
    shapes = [
        checked(Shape(dtype, batch or max(1, PREFILL_TOKENS // length), length, length, q_heads, kv_heads, d, dv, mask))
        for dtype, mask, length in itertools.product(dtypes, (False, True) if causal is None else (causal,), lengths or PREFILL_LENGTHS)
    ]
    _compare("prefill", shapes, names, Outputs(json_file, csv_file, plot))


@bench.command()
@geometry_options
@click.option("--seqlen", "lengths", multiple=True, type=positive, metavar="S", help="Cached keys; repeatable.  [default: 512 ... 32768]")
@click.option("--batch", "batches", multiple=True, type=positive, metavar="B", help="Repeatable.  [default: 1, 8, 32, 128]")
@dtype_option
@peers_option
@output_options
def decode(
    model: str | None,
    head_dim: int | None,
    head_dim_v: int | None,
    heads: tuple[int, int] | None,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    names: list[str],
    json_file: Any,
    csv_file: Any,
    plot: Path | None,
) -> None:
    """Time one new query for each sequence on a full key/value cache.

    One call is captured in a CUDA graph and replayed with L2 emptied. The
    default is 32/8 heads of 128. The ceiling is the rate of reading memory.

    \b
    Example:
        rawattn bench decode --model qwen-2.5-7b --batch 8 --json decode.json
    """
    q_heads, kv_heads, d, dv = geometry(model, head_dim, head_dim_v, heads) or (32, 8, 128, 128)
    shapes = [
        checked(Shape(dtype, batch, 1, length, q_heads, kv_heads, d, dv, cache=True))
        for dtype, batch, length in itertools.product(dtypes, batches or DECODE_BATCHES, lengths or DECODE_LENGTHS)
    ]
    _compare("decode", shapes, names, Outputs(json_file, csv_file, plot))


@bench.command()
@peers_option
@output_options
def overhead(names: list[str], json_file: Any, csv_file: Any, plot: Path | None) -> None:
    """Time what one call costs the host, in microseconds.

    From CuPy, prepared, and from torch where a torch peer is compared, beside
    an empty CuPy launch and cupy.empty. The shape is tiny.

    \b
    Example:
        rawattn bench overhead --peers none
    """
    report = _report("overhead")

    def measure() -> None:
        implementations = _load(names, report)
        _take(report, _host_calls(implementations), _show_time)

    _run(report, measure, Outputs(json_file, csv_file, plot))


@bench.command()
@geometry_options
@click.option("--causal/--full", default=True, show_default=True)
@click.option("--window", type=WINDOW, help="Keys seen to both sides of the diagonal; -1 is unbounded.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice([*DTYPE_OF]))
@click.option("--repeats", default=5, show_default=True, type=positive, metavar="N", help="Processes for each figure.")
@output_options
def coldstart(
    model: str | None,
    head_dim: int | None,
    head_dim_v: int | None,
    heads: tuple[int, int] | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    dtype: str,
    repeats: int,
    json_file: Any,
    csv_file: Any,
    plot: Path | None,
) -> None:
    """Time `import rawattn` and the first call in fresh processes.

    The first call with an empty cache of kernels, and with a filled one, after
    the CUDA context exists. Your own cache is left alone.

    \b
    Examples, the second of a kernel that takes longest to compile:
        rawattn bench coldstart --model llama-3.1-8b
        rawattn bench coldstart --head-dim 256 --window 64,0
    """
    q_heads, kv_heads, d, dv = geometry(model, head_dim, head_dim_v, heads) or (32, 8, 128, 128)
    shape = checked(Shape(dtype, 1, 512, 512, q_heads, kv_heads, d, dv, causal, window))
    report = _report("coldstart") | {"variant": shape.spec.name}
    _run(report, lambda: _take(report, _cold_starts(shape, repeats), _show_time), Outputs(json_file, csv_file, plot))


# ---- prefill and decode


def _compare(kind: str, shapes: list[Shape], names: list[str], outputs: Outputs) -> None:
    report = _report(kind)

    def measure() -> None:
        implementations = _load(names, report)
        progress("measuring the ceilings")
        report["ceilings"] = timing.ceilings()
        progress("")
        _show_ceilings(report["ceilings"])
        _take(report, ((shape.text, partial(_case, kind, shape, implementations, report["ceilings"])) for shape in shapes), _show_case)

    _run(report, measure, outputs)


def _load(names: list[str], report: dict[str, Any]) -> list[peers.Implementation]:
    progress("importing the peers")
    others, report["missing_peers"] = peers.load(names)
    progress("")
    report["peers"] = {peer.name: peer.version for peer in others}
    for name, version in report["peers"].items():
        click.echo(f"{name}: {version}")
    for name, reason in report["missing_peers"].items():
        click.echo(f"{name}: not compared, {reason}")
    return [peers.Implementation(), *others]


def _case(kind: str, shape: Shape, implementations: list[peers.Implementation], ceilings: dict[str, Any]) -> dict[str, Any]:
    """One shape: each implementation checked, then timed. What fails or is wrong has an "error" in place of figures."""
    record: dict[str, Any] = {
        "shape": shape.text,
        "dtype": shape.dtype,
        "heads_q": shape.heads,
        "heads_k": shape.kv_heads,
        "head_dim": shape.head_dim,
        "head_dim_v": shape.head_dim_v,
        "batch": shape.batch,
        "seqlen_q": shape.seqlen_q,
        "seqlen": shape.seqlen_k,
        "causal": shape.causal,
        "flops": shape.flops,
        "bytes": shape.bytes,
    }
    replays: dict[str, Callable[[], Any]] = {}
    samples: dict[str, list[float]] = {}
    clocks: list[float] = []
    timing.release()
    try:
        q, k, v = timing.inputs(shape)
        slices = list(_slices(shape, q, k, v))
    except Exception as error:  # no memory for it, say; the next shape may fit
        return record | {"rawattn": {"error": peers.sentence(error)}}
    for each in implementations:
        try:
            with each.context():
                call = each.prefill(q, k, v, shape.causal) if kind == "prefill" else each.decode(q, k, v)
                record[each.name] = _check(each, shape, each.to_cupy(call()), slices)
                replays[each.name] = call if kind == "prefill" else each.capture(call)
        except Exception as error:  # a peer that refuses a shape must not end the comparison
            record[each.name] = {"error": peers.sentence(error)}
    for _ in range(ROUNDS):
        for each in implementations:
            if (replay := replays.get(each.name)) is None:
                continue
            try:
                with each.context():
                    samples.setdefault(each.name, []).extend(_samples(kind, each, replay))
                if each.name == "rawattn":
                    clocks.append(timing.kernels().sm_mhz())
            except Exception as error:
                record[each.name] = {"error": peers.sentence(error)}
                del replays[each.name]
    for name in replays:
        record[name] |= _figures(kind, shape, samples[name], ceilings)
    if clocks:
        record["sm_mhz"] = round(sorted(clocks)[len(clocks) // 2])
    timed = {name: record[name]["us"] for name in replays}
    if "rawattn" in timed and len(timed) > 1:
        own = timed.pop("rawattn")
        record["best_peer"] = min(timed, key=timed.__getitem__)
        record["ratio"] = round(timed[record["best_peer"]] / own, 3)
        for name, us in timed.items():
            record[name]["ratio"] = round(us / own, 3)
    return record


def _samples(kind: str, implementation: peers.Implementation, replay: Callable[[], Any]) -> list[float]:
    if kind == "decode":
        return timing.cold(replay, 20)
    us = min(implementation.burst(replay, 3))
    return implementation.burst(replay, min(max(math.ceil(ROUND_US / us), 4), timing.BURST))


def _figures(kind: str, shape: Shape, samples: list[float], ceilings: dict[str, Any]) -> dict[str, Any]:
    figures = timing.summary(samples)
    if kind == "prefill":
        rate, unit, ceiling = shape.flops / figures["us"] / 1e6, "tflops", ceilings["matmul_tflops"]
    else:
        rate, unit, ceiling = shape.kv_bytes / figures["us"] / 1e3, "gbps", ceilings["read_gbps"]
    return figures | {unit: round(rate, 1), "of_ceiling": round(rate / ceiling, 3) if ceiling else None}


def _slices(shape: Shape, q: Any, k: Any, v: Any) -> Iterator[tuple[Any, Any]]:
    """Parts of the output, as (index, expected): the first and the last queries of the last sequence, or the last sequences of a decode."""
    batch = slice(-1, None) if shape.seqlen_q > 1 else slice(-4, None)
    begin = max(0, shape.seqlen_q - CHECKED_ROWS)
    for rows in dict.fromkeys([(0, min(CHECKED_ROWS, shape.seqlen_q)), (begin, shape.seqlen_q)]):
        # Query i of the whole sees keys up to i + Sk - Sq: as the last of its part, over the keys that the part's last query sees.
        keys = slice(None, rows[1] + shape.seqlen_k - shape.seqlen_q) if shape.causal else slice(None)
        index = (batch, slice(*rows))
        yield index, reference.attention(q[index], k[batch, keys], v[batch, keys], causal=shape.causal)


def _check(implementation: peers.Implementation, shape: Shape, out: Any, slices: list[tuple[Any, Any]]) -> dict[str, float]:
    """The largest errors against float64. Raises AssertionError where the result is wrong: rawattn by the rule of `rawattn check`."""
    figures = [judge(shape.text, out[index], expected) for index, expected in slices]
    worst = max(figures, key=lambda x: math.inf if math.isnan(x.rel_l2) else x.rel_l2)
    right = all(x.passed for x in figures) if implementation.name == "rawattn" else worst.rel_l2 <= PEER_ERROR
    if not right:
        raise AssertionError(f"wrong result: relative L2 error {worst.rel_l2:.2e}, largest error {max(x.max_error for x in figures):.2e}")
    return {"rel_l2": float(f"{worst.rel_l2:.3g}")}


# ---- overhead and coldstart


def _host_calls(implementations: list[peers.Implementation]) -> Iterator[Piece]:
    shape = Shape("bf16", 1, 64, 64, 4, 4, 128, 128, causal=True)
    arrays = q, k, v = timing.inputs(shape)
    empty, launch = timing.host_floor(q)
    calls: dict[str, Callable[[], Any]] = {
        "cupy.empty": empty,
        "an empty CuPy launch": launch,
        "rawattn.attention, CuPy": partial(rawattn.attention, q, k, v, causal=True),
        "rawattn.attention, CuPy, out=": partial(rawattn.attention, q, k, v, causal=True, out=rawattn.attention(q, k, v, causal=True)),
        "rawattn.prepare, CuPy, out=": partial(rawattn.prepare(q, k, v, causal=True), q, k, v, out=rawattn.attention(q, k, v, causal=True)),
    }
    contexts = {}
    for each in implementations[1:]:
        if isinstance(each, peers.Torch) and "rawattn.attention, torch" not in calls:
            calls["rawattn.attention, torch"] = partial(rawattn.attention, *each.tensors(*arrays), causal=True)
        try:
            with each.context():
                call = each.prefill(q, k, v, True)
                call()
        except Exception:  # it does not take part in this comparison
            continue
        calls[each.name], contexts[each.name] = call, each.context

    def measure(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        with contexts.get(name, nullcontext)():
            return _time(name, timing.host(call))

    return ((name, partial(measure, name, call)) for name, call in calls.items())


def _time(what: str, samples: list[float]) -> dict[str, Any]:
    target = {"target_us": TARGETS_US[what]} if what in TARGETS_US else {}
    return {"what": what, **timing.summary(samples), **target}


_IMPORT = "import time; start = time.perf_counter(); import rawattn; print(time.perf_counter() - start)"
_FIRST_CALL = """
import json, sys, time
import cupy, ml_dtypes, numpy, rawattn
dtype, causal, window, shapes = json.loads(sys.argv[1])
q, k, v = (cupy.asarray(numpy.ones(shape, dtype)) for shape in shapes)
cupy.cuda.runtime.deviceSynchronize()
start = time.perf_counter()
rawattn.attention(q, k, v, causal=causal, window=tuple(window) if window else None)
cupy.cuda.runtime.deviceSynchronize()
print(time.perf_counter() - start)
"""


def _cold_starts(shape: Shape, repeats: int) -> Iterator[Piece]:
    heads = ((shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim), (shape.kv_heads, shape.head_dim_v))
    arguments = json.dumps([DTYPE_OF[shape.dtype], shape.causal, shape.window, [(1, shape.seqlen_q, *x) for x in heads]])

    def measure(what: str, code: str, filled: bool) -> dict[str, Any]:
        samples = []
        with tempfile.TemporaryDirectory() as folder:
            if filled:
                child_seconds(code, arguments, folder)
            for i in range(repeats):
                samples.append(1e6 * child_seconds(code, arguments, folder if filled else os.path.join(folder, str(i))))
        return _time(what, samples)

    yield "import rawattn", partial(measure, "import rawattn", _IMPORT, True)  # once before, for the .pyc files
    yield "first call, empty cache", partial(measure, "first call, empty cache", _FIRST_CALL, False)
    yield "first call, filled cache", partial(measure, "first call, filled cache", _FIRST_CALL, True)


def child_seconds(code: str, arguments: str, cache: str) -> float:
    """What `code`, run in a process of its own with that cache of kernels, prints: seconds. Raises click.ClickException if it fails."""
    path = os.pathsep.join(filter(None, [str(Path(rawattn.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "RAWATTN_CACHE_DIR": cache, "CUDA_CACHE_DISABLE": "1", "RAWATTN_NO_JIT": ""}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # an installed package has its .pyc files
    result = subprocess.run([sys.executable, "-c", code, arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise click.ClickException(f"a process of its own failed: {(result.stderr.strip() or 'no output').splitlines()[-1]}")
    return float(result.stdout)


# ---- running, showing, writing


def _report(kind: str) -> dict[str, Any]:
    compiler.check_gpu(compiler.current_device())
    return {
        "benchmark": kind,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "method": METHODS[kind],
        "interrupted": False,
        "cases": [],
    }


def _run(report: dict[str, Any], measure: Callable[[], None], outputs: Outputs) -> None:
    """Measures until done or Ctrl-C, then sums up, writes the files and sets the exit status."""
    click.echo(f"rawattn {rawattn.__version__} on {report['machine']['gpu']['name']}")
    try:
        measure()
    except KeyboardInterrupt:
        report["interrupted"] = True
        progress("")
    cases = report["cases"]
    if ratios := [case["ratio"] for case in cases if "ratio" in case]:
        report |= {
            "geomean": round(timing.geometric_mean(ratios), 3),
            "minimum": min(ratios),
            "ahead": sum(ratio >= 1 for ratio in ratios),
        }
        text = f"best peer's time / rawattn's over {len(ratios)} shapes: geometric mean {report['geomean']:.3f}, minimum {min(ratios):.3f}"
        click.echo(f"{text}, {report['ahead']} at 1 or more")
    for problem in dict.fromkeys(_problems(cases)):
        click.echo(problem)
    if report["interrupted"]:
        click.echo(f"Interrupted: {len(cases)} measured.")
    _write(report, outputs)
    failed = any("error" in case.get("rawattn", {}) for case in cases)
    click.get_current_context().exit(INTERRUPTED if report["interrupted"] else 1 if failed else 0)


def _take(report: dict[str, Any], pieces: Iterable[Piece], show: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    for label, measure in pieces:
        progress(f"{len(report['cases']) + 1}: {label}")
        record = measure()
        progress("")
        report["cases"].append(record)
        show(record, report)


def _show_ceilings(ceilings: dict[str, Any]) -> None:
    matmul = ceilings["matmul_tflops"]
    text = f"cuBLAS fp16 8192^3 {matmul:.0f} TFLOP/s" if matmul else f"no matmul ceiling, {ceilings['problem']}"
    click.echo(f"ceilings: {text}; reading {ceilings['read_gbps']:.0f} GB/s; an empty graph {ceilings['null_graph_us']:.1f} us")


def _show_case(record: dict[str, Any], report: dict[str, Any]) -> None:
    own = record["rawattn"]
    line = f"{record['shape']:<34}"
    if "error" in own:
        click.echo(f"{line} FAILED")
        return
    unit = "GB/s" if "gbps" in own else "TFLOP/s"
    share = f"{own['of_ceiling']:>4.0%}" if own["of_ceiling"] else "   -"
    line += f"{own['us']:>9.1f} us ±{timing.spread(own):<5.1%}{plots.rate(own):>6.0f} {unit} {share} {record['sm_mhz']:>5} MHz"
    for name in report["peers"]:
        peer = record[name]
        line += f"  {name} -" if "error" in peer else f"  {name} {plots.rate(peer):.0f} ({peer['ratio']:.2f})"
    click.echo(line)


def _show_time(record: dict[str, Any], report: dict[str, Any]) -> None:
    scale, unit = (1, "us") if report["benchmark"] == "overhead" else (1e-3, "ms")
    target = f"   target {record['target_us'] * scale:.0f} {unit}" if "target_us" in record else ""
    click.echo(f"{record['what']:<32}{record['us'] * scale:>10.1f} {unit} ±{timing.spread(record):<5.1%}{target}".rstrip())


def _problems(cases: list[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        for name, figures in case.items():
            if isinstance(figures, dict) and "error" in figures:
                yield f"{case['shape']}, {name}: {figures['error']}"


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat row for each case and implementation."""
    rows = []
    for case in report["cases"]:
        shape = {key: value for key, value in case.items() if not isinstance(value, dict) and key not in ("best_peer", "ratio")}
        implementations = {key: value for key, value in case.items() if isinstance(value, dict)}
        rows += [shape | {"implementation": name} | figures for name, figures in implementations.items()] or [shape]
    return rows


def _write(report: dict[str, Any], outputs: Outputs) -> None:
    if outputs.json:
        json.dump(report, outputs.json, indent=2)
        outputs.json.write("\n")
    rows = _rows(report)
    if outputs.csv:
        writer = csv.DictWriter(outputs.csv, fieldnames=[*dict.fromkeys(key for row in rows for key in row)])
        writer.writeheader()
        writer.writerows(rows)
    if outputs.plot and any("us" in row for row in rows):
        plots.save(plots.benchmark(report), outputs.plot)
