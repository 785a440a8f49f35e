"""`rawattn check`: the validation, 15 scenarios and four model geometries in float16 and bfloat16, each against float64.

`rawattn check --model` is in check_model.py.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

import rawattn
from rawattn import compiler, reference

from .check_model import check_model
from .info import machine
from .models import GEOMETRIES, Geometry

DTYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
GQA_RATIOS = ((32, 32), (32, 16), (32, 8), (32, 4), (32, 1), (28, 4))
HEADS = (8, 16, 28, 32, 64, 96, 128)
TIMED_CALLS = 30


@dataclass(frozen=True)
class Figures:
    """How far one output lies from float64, and how far it may."""

    case: str
    max_error: float
    max_limit: float
    rel_l2: float
    rel_l2_limit: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.max_limit and self.rel_l2 <= self.rel_l2_limit  # NaN fails


def judge(case: str, out: Any, expected: Any) -> Figures:
    """The rule: `out`, in float16 or bfloat16, against `expected` in float64.

    No kernel can be nearer than `expected` rounded to the dtype. The largest difference may be 4.9e-4 (bf16: 3.9e-3), half an ulp of
    numbers from 1 to 2, or 1.25 times that of the rounding where this is more. The relative L2 error may be 1.5 times that of the
    rounding: the best kernels stand at 1.25 to 1.35, for they round the probabilities too. Where rounding is exact, as with one key, so
    must the output be.
    """
    if out.shape != expected.shape:
        raise ValueError(f"{case}: the output has shape {out.shape}; needed: {expected.shape}")

    def norm(x: Any) -> float:
        return math.sqrt(float((x * x).sum()))

    error = out.astype(np.float64) - expected
    rounding = expected.astype(out.dtype).astype(np.float64) - expected
    smallest_limit = 4.9e-4 if out.dtype == np.float16 else 3.9e-3
    size = norm(expected) or 1.0
    return Figures(
        case,
        max_error=float(abs(error).max()),
        max_limit=max(smallest_limit, 1.25 * float(abs(rounding).max())),
        rel_l2=norm(error) / size,
        rel_l2_limit=1.5 * norm(rounding) / size,
    )


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """Softmax attention in float64 as a textbook writes it, independent of rawattn.reference; every row sees a key."""
    sq, sk, ratio = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, h] @ k[b, :, h // ratio].T / math.sqrt(q.shape[3])
        if causal:
            scores[np.arange(sk) > np.arange(sq)[:, None] + sk - sq] = -math.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, h] = weights @ v[b, :, h // ratio] / weights.sum(axis=1, keepdims=True)
    return out


@dataclass
class Trial:
    """One scenario in one dtype: what it needs to run, and what came out."""

    scenario: str
    dtype: str
    on_gpu: bool
    seed: tuple[int, ...]
    figures: list[Figures] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # exact claims that did not hold, and errors
    note: str = ""
    skipped: str = ""  # why the point of the scenario could not be tried

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        if self.on_gpu:
            import cupy

            self.xp: Any = cupy
        else:
            self.xp = np

    @property
    def result(self) -> str:
        if self.broken or not all(x.passed for x in self.figures):
            return "FAIL"
        return "skipped" if self.skipped else "pass"

    def pick(self, gpu: Any, cpu: Any) -> Any:
        """The reference is slow: it gets a smaller shape."""
        return gpu if self.on_gpu else cpu

    def array(self, host: np.ndarray) -> Any:
        return self.xp.asarray(host).astype(DTYPES[self.dtype])

    def inputs(self, length: int, heads: int = 32, kv_heads: int = 8, *, dim: int = 128, batch: int = 1) -> tuple[Any, Any, Any]:
        """q, k, v of N(0, 1), drawn on the host: the same on every machine, and no need of cuRAND."""
        shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (self.array(self._random.standard_normal(shape, np.float32)) for shape in shapes)
        return q, k, v

    def expected(self, q: Any, k: Any, v: Any, causal: bool) -> Any:
        return reference.attention(q, k, v, causal=causal) if self.on_gpu else naive(q, k, v, causal)

    def check(self, case: str, q: Any, k: Any, v: Any, *, causal: bool = False) -> Any:
        """Judge attention(q, k, v) against float64, and return it."""
        out = rawattn.attention(q, k, v, causal=causal)
        self.figures.append(judge(case, out, self.expected(q, k, v, causal)))
        return out

    def check_generation(self, chunks: list[int], heads: int, kv_heads: int) -> None:
        """Judge chunks of new tokens, each appended to the cache of all before it; the unused part of the cache is NaN."""
        total = sum(chunks)
        q, k, v = self.inputs(total, heads, kv_heads, batch=2)
        k_cache, v_cache = (self.array(np.full((2, total + 64, kv_heads, 128), np.nan, np.float32)) for _ in range(2))
        done = 0
        for chunk in chunks:
            new, keys = slice(done, done + chunk), slice(done + chunk)
            lengths = self.xp.full(2, done, np.int32)
            out = rawattn.attention_with_kvcache(q[:, new], k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=lengths)
            expected = self.expected(q[:, new], k[:, keys], v[:, keys], causal=True)
            self.figures.append(judge(f"{heads}/{kv_heads}, {chunk} on {done} cached", out, expected))
            done += chunk
        for name, cache, rows in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
            self.claim(same_bits(cache[:, :total], rows), f"{name} does not hold the rows that were appended")
            self.claim(bool(self.xp.isnan(cache[:, total:].astype(np.float32)).all()), f"{name} was written past the last row")

    def claim(self, holds: bool, text: str) -> None:
        if not holds:
            self.broken.append(text)


def same_bits(a: Any, b: Any) -> bool:
    return bool((a.view(np.uint16) == b.view(np.uint16)).all())


# ---- the scenarios


def prefill(trial: Trial) -> None:
    trial.check("a prompt, causal", *trial.inputs(trial.pick(2048, 256)), causal=True)


def first_call(trial: Trial) -> None:
    """With an empty cache, in a head size that nothing else here uses: the kernel is compiled, unless NVRTC finds it in its own cache."""
    q, k, v = trial.inputs(256, dim=72)
    with _empty_cache():
        start = time.perf_counter()
        first = rawattn.attention(q, k, v)
        if trial.on_gpu:
            trial.xp.cuda.get_current_stream().synchronize()
            trial.note = f"{time.perf_counter() - start:.2f} s with rawattn's cache empty"
    trial.figures.append(judge("the first call", first, trial.expected(q, k, v, causal=False)))
    trial.claim(same_bits(first, rawattn.attention(q, k, v)), "the second call differs from the first")


def cache_steps(trial: Trial) -> None:
    trial.check_generation([trial.pick(512, 64)] + [1] * 10, heads=32, kv_heads=32)


def cache_256(trial: Trial) -> None:
    trial.check_generation([256, 1], heads=32, kv_heads=32)


def cache_gqa(trial: Trial) -> None:
    trial.check_generation([trial.pick(512, 64)] + [1] * 4, heads=32, kv_heads=8)
    trial.check_generation([trial.pick(512, 64)] + [1] * 4, heads=28, kv_heads=4)


def cache_causal(trial: Trial) -> None:
    trial.check_generation([96, 33, 64, 2], heads=32, kv_heads=8)


def length_32(trial: Trial) -> None:
    for causal in (False, True):
        trial.check("causal" if causal else "full", *trial.inputs(32), causal=causal)


def lengths_to_64(trial: Trial) -> None:
    for length in range(1, 65):
        q, k, v = trial.inputs(length)
        for causal in (False, True):
            trial.check(f"S={length}, {'causal' if causal else 'full'}", q, k, v, causal=causal)


def gqa_broadcast(trial: Trial) -> None:
    q, k, v = trial.inputs(trial.pick(512, 128))
    wide_k, wide_v = (trial.xp.repeat(x, 4, axis=2) for x in (k, v))
    broadcast = trial.check("K and V repeated to 32/32 by hand", q, wide_k, wide_v)
    grouped = rawattn.attention(q, k, v)
    trial.figures.append(judge("32/8 against float64 of the repeated", grouped, trial.expected(q, wide_k, wide_v, causal=False)))
    difference = float(abs(grouped.astype(np.float64) - broadcast.astype(np.float64)).max())
    trial.note = f"largest difference between the two {difference:.1e}"


def gqa_ratios(trial: Trial) -> None:
    for heads, kv_heads in GQA_RATIOS:
        trial.check(f"{heads}/{kv_heads}", *trial.inputs(trial.pick(512, 128), heads, kv_heads), causal=True)


def gqa_memory(trial: Trial) -> None:
    """K and V take a quarter of the memory, and the call does not repeat them behind the user's back."""
    q, k, v = trial.inputs(trial.pick(4096, 256))
    grouped, wide = k.nbytes + v.nbytes, (k.nbytes + v.nbytes) * 32 // 8
    trial.note = f"K/V {grouped:,} bytes at 32/8, {wide:,} at 32/32"
    trial.check("32/8", q, k, v)
    if trial.on_gpu:
        pool = trial.xp.cuda.MemoryPool()
        with trial.xp.cuda.using_allocator(pool.malloc):
            out = rawattn.attention(q, k, v)
        taken = pool.total_bytes() - out.nbytes
        trial.claim(taken < grouped, f"the call takes {taken:,} bytes beside its output, as much as K and V")


def causal_full(trial: Trial) -> None:
    """Row i of a causal result is full attention over the keys up to i."""
    length = trial.pick(512, 64)
    q, k, v = trial.inputs(length)
    trial.check("causal", q, k, v, causal=True)
    trial.check("full", q, k, v)
    expected = trial.expected(q, k, v, causal=True)
    for i in range(0, length, 13):
        row = slice(i, i + 1)
        prefix = rawattn.attention(q[:, row], k[:, : i + 1], v[:, : i + 1])
        trial.figures.append(judge(f"full over the keys up to {i} as row {i} of causal", prefix, expected[:, row]))


def causal_structure(trial: Trial) -> None:
    """Keys are exchanged from the last one back: rows before the exchanged ones keep their bits, and the first of these changes."""
    length = trial.pick(320, 24)
    q, k, v = trial.inputs(length, heads=8, kv_heads=2)
    _, other_k, other_v = trial.inputs(length, heads=8, kv_heads=2)
    out = trial.check("causal", q, k, v, causal=True)
    trial.claim(same_bits(out[:, 0], trial.xp.repeat(v[:, 0], 4, axis=1)), "row 0, which sees key 0 alone, is not v[0]")
    for i in reversed(range(length)):
        k[:, i], v[:, i] = other_k[:, i], other_v[:, i]
        changed = rawattn.attention(q, k, v, causal=True)
        trial.claim(same_bits(changed[:, :i], out[:, :i]), f"rows before {i} depend on the keys from {i} on")
        trial.claim(not same_bits(changed[:, i], out[:, i]), f"row {i} does not see its own key")
    trial.note = f"{length} positions"


def causal_speed(trial: Trial) -> None:
    q, k, v = trial.inputs(trial.pick(4096, 128))
    trial.check("causal", q, k, v, causal=True)
    trial.check("full", q, k, v)
    if not trial.on_gpu:
        trial.skipped = "timing needs a GPU"
        return
    causal, full = (_median_ms(partial(rawattn.attention, q, k, v, causal=x)) for x in (True, False))
    trial.note = f"causal {causal:.3f} ms, full {full:.3f} ms"
    trial.claim(causal <= full, f"causal takes {causal:.3f} ms and full {full:.3f} ms")


def heads(trial: Trial) -> None:
    for n in HEADS:
        trial.check(f"{n} heads", *trial.inputs(trial.pick(512, 64), n, n), causal=True)


def model(geometry: Geometry) -> Callable[[Trial], None]:
    heads, kv_heads, dim = geometry

    def run(trial: Trial) -> None:
        lengths = (1, 17, 512, 4096)
        for length in lengths if trial.on_gpu else lengths[:-1]:
            trial.check(f"S={length}", *trial.inputs(length, heads, kv_heads, dim=dim), causal=True)
        trial.note = f"{heads}/{kv_heads} heads of {dim}"

    return run


SCENARIOS: dict[str, Callable[[Trial], None]] = {
    "prefill": prefill,
    "first-call": first_call,
    "cache-steps": cache_steps,
    "cache-256": cache_256,
    "cache-gqa": cache_gqa,
    "cache-causal": cache_causal,
    "s-32": length_32,
    "s-1-to-64": lengths_to_64,
    "gqa-broadcast": gqa_broadcast,
    "gqa-ratios": gqa_ratios,
    "gqa-memory": gqa_memory,
    "causal-full": causal_full,
    "causal-structure": causal_structure,
    "causal-speed": causal_speed,
    "heads": heads,
}
MODELS = {name: model(geometry) for name, geometry in GEOMETRIES.items()}


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get("RAWATTN_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAWATTN_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["RAWATTN_CACHE_DIR"]
            if before is not None:
                os.environ["RAWATTN_CACHE_DIR"] = before


def _median_ms(call: Callable[[], Any]) -> float:
    import cupy

    times = []
    for _ in range(TIMED_CALLS + 3):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop))
    return statistics.median(times[3:])


# ---- the command


@click.command(epilog="Scenarios: " + ", ".join([*SCENARIOS, *MODELS]) + ".")
@click.argument("scenarios", nargs=-1, metavar="[SCENARIO]...", type=click.Choice([*SCENARIOS, *MODELS]))
@click.option("--model", "model_file", type=click.Path(exists=True, path_type=Path), help="A model's file, to validate instead.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the N(0, 1) inputs.")
@click.option("--json", "json_file", type=click.File("w", lazy=False), metavar="FILE", help="Write machine, versions and figures to FILE.")
@click.pass_context
def check(context: click.Context, scenarios: tuple[str, ...], model_file: Path | None, seed: int, json_file: Any) -> None:
    """Validate attention against float64 on this machine's GPU.

    Runs all scenarios, or those named, in fp16 and bf16. With no Hopper GPU it
    checks the NumPy reference instead, at smaller shapes. With --model, runs a
    language model with rawattn and in float32 with the reference, and compares.
    Exit status: 0 if all passed, 1 if not, 2 for a usage error.

    \b
    Example:
        rawattn check prefill llama-3.1-8b --json check.json
    """
    if model_file and scenarios:
        raise click.UsageError("Give scenarios or --model.")
    start = time.perf_counter()
    facts = machine()
    try:
        compiler.check_gpu(compiler.current_device())
        on_gpu = True
        against = f"{model_file.name} against itself in float32" if model_file else f"against float64, inputs N(0, 1), seed {seed}"
        click.echo(f"rawattn {rawattn.__version__} on {facts['gpu']['name']}, {against}")
    except compiler.UnsupportedEnvironment as problem:
        on_gpu = False
        how = "slowly" if model_file else f"at smaller shapes, against a naive float64 softmax, seed {seed}"
        click.echo(f"{problem}.\nChecking the NumPy reference instead, {how}")

    if model_file:
        try:
            claims = check_model(model_file, on_gpu, progress)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{error}; pip install 'rawattn[examples]'") from error
        except (FileNotFoundError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        progress("")
        for claim in claims:
            click.echo(f"{'pass' if claim.holds else 'FAIL'}  {claim.name:<14} {claim.text}")
        passed, seconds = all(claim.holds for claim in claims), time.perf_counter() - start
        click.echo(f"{sum(claim.holds for claim in claims)} of {len(claims)} passed, {seconds:.0f} s")
        if json_file:
            report = _about(facts, on_gpu, seconds, passed) | {"model": model_file.name, "claims": [asdict(claim) for claim in claims]}
            json.dump(report, json_file, indent=2)
            json_file.write("\n")
        context.exit(0 if passed else 1)

    every = {**SCENARIOS, **MODELS}
    chosen = [(i, name) for i, name in enumerate(every) if name in (scenarios or every)]
    trials = [Trial(name, dtype, on_gpu, (seed, i, j)) for i, name in chosen for j, dtype in enumerate(DTYPES)]
    for done, trial in enumerate(trials):
        progress(f"{done}/{len(trials)} {trial.scenario} {trial.dtype}")
        try:
            every[trial.scenario](trial)
        except Exception as error:  # one broken scenario must not hide the others
            trial.broken.append(f"{type(error).__name__}: {error}")
    progress("")

    _print_table(trials)
    seconds = time.perf_counter() - start
    click.echo(f"{_count(trials, SCENARIOS, 'scenarios')}{_count(trials, MODELS, 'model geometries')}in fp16 and bf16, {seconds:.0f} s")
    passed = all(trial.result != "FAIL" for trial in trials)
    if json_file:
        json.dump(_report(trials, facts, on_gpu, seed, seconds, passed), json_file, indent=2)
        json_file.write("\n")
    context.exit(0 if passed else 1)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


def _excess(error: float, limit: float) -> float:
    """How much of its limit an error takes; more than 1 fails."""
    if error == 0:
        return 0.0
    return math.inf if limit == 0 or math.isnan(error) else error / limit


def _print_table(trials: list[Trial]) -> None:
    """One line a scenario and dtype, with the cases nearest to their limits."""
    click.echo(f"{'scenario':<17} dtype {'max error':>9} {'limit':>8} {'rel L2':>9} {'limit':>8}  result")
    for trial in trials:
        line = f"{trial.scenario:<17} {trial.dtype:<5} "
        if trial.figures:
            by_max = max(trial.figures, key=lambda x: _excess(x.max_error, x.max_limit))
            by_l2 = max(trial.figures, key=lambda x: _excess(x.rel_l2, x.rel_l2_limit))
            line += f"{by_max.max_error:>9.2e} {by_max.max_limit:>8.1e} {by_l2.rel_l2:>9.2e} {by_l2.rel_l2_limit:>8.1e}"
        else:
            line += " " * 37
        colour = {"pass": "green", "skipped": "yellow", "FAIL": "red"}[trial.result]
        click.echo(f"{line}  {click.style(f'{trial.result:<7}', fg=colour)} {trial.skipped or trial.note}".rstrip())
        failures = [f"{x.case}: max error {x.max_error:.2e}, rel L2 {x.rel_l2:.2e}" for x in trial.figures if not x.passed] + trial.broken
        for failure in failures[:3]:
            click.echo(f"    {failure}")
        if len(failures) > 3:
            click.echo(f"    and {len(failures) - 3} more")


def _count(trials: list[Trial], group: dict[str, Any], noun: str) -> str:
    """A scenario counts as passed when both of its dtypes are."""
    results: dict[str, set[str]] = {}
    for trial in trials:
        if trial.scenario in group:
            results.setdefault(trial.scenario, set()).add(trial.result)
    if not results:
        return ""
    passed = sum(each == {"pass"} for each in results.values())
    skipped = sum("skipped" in each and "FAIL" not in each for each in results.values())
    return f"{passed} of {len(results)} {noun} passed" + (f" ({skipped} skipped)" if skipped else "") + ", "


def _report(trials: list[Trial], facts: dict[str, Any], on_gpu: bool, seed: int, seconds: float, passed: bool) -> dict[str, Any]:
    def number(x: Any) -> Any:
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x  # JSON knows no NaN

    return _about(facts, on_gpu, seconds, passed) | {
        "seed": seed,
        "scenarios": [
            {
                "scenario": trial.scenario,
                "dtype": trial.dtype,
                "result": trial.result,
                "skipped": trial.skipped,
                "note": trial.note,
                "broken": trial.broken,
                "cases": [{name: number(value) for name, value in asdict(x).items()} | {"passed": x.passed} for x in trial.figures],
            }
            for trial in trials
        ],
    }


def _about(facts: dict[str, Any], on_gpu: bool, seconds: float, passed: bool) -> dict[str, Any]:
    return {
        "passed": passed,
        "computed_by": "gpu" if on_gpu else "reference",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "machine": facts,
    }
