"""`rawattn warmup`: compile kernels ahead of the calls that need them, with or without a GPU."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace

import click

from rawattn import compiler
from rawattn.spec import MASKS, ROWS_OF_SPLIT_TILES, AppendSpec, KernelSpec
from rawattn.tiles import is_short, launch_variants, split_rows, tile_for

from .models import GEOMETRIES
from .shapes import DTYPE_OF

Spec = KernelSpec | AppendSpec


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice([*GEOMETRIES]), help="A model's geometry; repeatable.")
@click.option("--head-dim", type=int, metavar="D", help="D of q and k.")
@click.option("--head-dim-v", type=int, metavar="DV", help="Dv of v and the output.  [default: D]")
@click.option("--gqa", type=int, metavar="N", help="Query heads for each key/value head.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice([*DTYPE_OF]), help="Repeatable.  [default: both]")
@click.option("--mask", "masks", multiple=True, default=("causal", "full"), show_default=True, type=click.Choice(MASKS), help="Repeatable.")
@click.option("--varlen/--dense", default=None, help="attention_varlen or attention.  [default: both]")
@click.option("--page-size", type=click.IntRange(1), metavar="N", help="Also for caches in pages of N keys.")
@click.pass_context
def warmup(
    context: click.Context,
    models: tuple[str, ...],
    head_dim: int | None,
    head_dim_v: int | None,
    gqa: int | None,
    dtypes: tuple[str, ...],
    masks: tuple[str, ...],
    varlen: bool | None,
    page_size: int | None,
) -> None:
    """Compile kernels into the cache, in parallel; no GPU is needed.

    Takes --model, or --head-dim and --gqa. Without --varlen and --dense that is
    for attention_with_kvcache too. Exit status: 0 if all are there, 1 if one
    could not be compiled, 2 for a usage error.

    \b
    Examples:
        rawattn warmup --model llama-3.1-8b --dtype bf16 --page-size 16
        rawattn warmup --head-dim 128 --gqa 4 --mask window --dense
    """
    if page_size is not None and varlen is not None:
        raise click.UsageError("Give --page-size without --varlen and --dense, which leave the KV cache out.")
    if models:
        if (head_dim, head_dim_v, gqa) != (None, None, None):
            raise click.UsageError("Give --model, or --head-dim and --gqa.")
        geometries = [(x.head_dim, x.head_dim, x.heads // x.kv_heads) for x in map(GEOMETRIES.__getitem__, models)]
    else:
        if head_dim is None or gqa is None:
            raise click.UsageError("Give --model, or --head-dim and --gqa.")
        geometries = [(head_dim, head_dim if head_dim_v is None else head_dim_v, gqa)]
    try:
        specs: list[Spec] = []
        for geometry, dtype in itertools.product(geometries, dtypes or DTYPE_OF):
            for mask in masks:
                specs += [] if varlen else _for_attention(KernelSpec(DTYPE_OF[dtype], *geometry, mask))
                specs += [] if varlen is False else [KernelSpec(DTYPE_OF[dtype], *geometry, mask, varlen=True)]
            if varlen is None:
                specs += _for_cache(*geometry, DTYPE_OF[dtype], masks, page_size)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    specs = list(dict.fromkeys(specs))  # models share geometries

    missing = [spec for spec in specs if not compiler.is_cached(spec)]
    results = _compile(missing)
    for spec in specs:
        result = results.get(spec, "cached")
        text = result if isinstance(result, str) else "FAILED" if isinstance(result, BaseException) else f"{result:.2f} s"
        click.echo(f"{spec.name:<52} {text:>8}")
    errors = [result for result in results.values() if isinstance(result, BaseException)]
    for message in dict.fromkeys(str(error) or type(error).__name__ for error in errors):  # a killed process fails all alike
        click.echo(f"Error: {message}", err=True)
    click.echo(
        f"{len(missing) - len(errors)} compiled, {len(specs) - len(missing)} cached"
        + (f", {len(errors)} failed" if errors else "")
        + f"; {compiler.cache_dir()}"
    )
    context.exit(1 if errors else 0)


def _for_attention(spec: KernelSpec) -> Iterator[KernelSpec]:
    """What attention() needs for sequences of any length."""
    yield spec
    if is_short(spec, 1):
        yield replace(spec, short=True)
    for rows in _rows_of_split_tiles(spec.head_dim, spec.head_dim_v, spec.gqa_ratio):  # few queries, many keys
        yield from launch_variants(replace(spec, varlen=True, split_rows=rows))


def _rows_of_split_tiles(d: int, dv: int, ratio: int) -> list[int]:
    """KernelSpec.split_rows for all numbers of queries, from one up."""
    one, chunk = split_rows(d, dv, ratio, 1, 1), split_rows(d, dv, ratio, 1, None)
    return [rows for rows in ROWS_OF_SPLIT_TILES if one <= rows <= chunk]


def _for_cache(d: int, dv: int, ratio: int, dtype: str, masks: tuple[str, ...], page_size: int | None) -> Iterator[Spec]:
    """What attention_with_kvcache needs beyond attention_varlen's kernels."""
    yield AppendSpec(dtype)
    each = _rows_of_split_tiles(d, dv, ratio)
    variants = [(mask, rows) for mask in masks for rows in each]
    if "causal" in masks:
        variants.append(("full", each[0]))  # one query sees all keys
    for mask, rows in variants:
        yield from launch_variants(KernelSpec(dtype, d, dv, ratio, mask, True, rows))
    if page_size is not None:
        for mask, rows in [*variants, *[(mask, 0) for mask in masks]]:
            spec = KernelSpec(dtype, d, dv, ratio, mask, True, rows)
            yield from launch_variants(replace(spec, page_rows=math.gcd(page_size, tile_for(spec).tile_n)))


def _compile(specs: list[Spec]) -> dict[Spec, float | BaseException]:
    """Build the specs in as many processes as there are cores for: the seconds of each, or why it failed."""
    if not specs:
        return {}
    workers = min(len(specs), len(os.sched_getaffinity(0)))
    results: dict[Spec, float | BaseException] = {}
    # spawn: a fork would share whatever threads and CUDA state the caller has.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        futures: dict[Future[float], Spec] = {pool.submit(_build, spec): spec for spec in specs}
        try:
            with click.progressbar(length=len(specs), label=f"compiling {len(specs)} kernels on {workers} cores", file=sys.stderr) as bar:
                for future in as_completed(futures):
                    results[futures[future]] = future.exception() or future.result()
                    bar.update(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C waits for what runs, not for what is queued
            raise
    return results


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    compiler.SLOW_COMPILE_SECONDS = threading.TIMEOUT_MAX  # the progress bar says that it takes time


def _build(spec: Spec) -> float:
    compiler.nvrtc_version()  # imports CuPy, which is not this variant's time
    start = time.perf_counter()
    compiler.build(spec)
    return time.perf_counter() - start
