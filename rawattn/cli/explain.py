"""`rawattn explain`: the variant that a call would use, what it takes, and what bounds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from rawattn import compiler
from rawattn.spec import KernelSpec
from rawattn.tiles import (
    SHARED_MEMORY_LIMIT,
    SLAB,
    grid,
    launch_variant,
    slabs,
    splits_of_a_tile,
    tile_for,
    tiles_of_sequence,
)

from .shapes import DTYPE_OF, WINDOW, Shape, checked, geometry, geometry_options

# An H100 SXM at the clock at which its 989 TFLOP/s are meant; what a Hopper's SM does in a cycle.
MULTIPROCESSORS = 132
HERTZ = 1.83e9
BYTES_PER_SECOND = 3.35e12
MMA_FLOPS_PER_CYCLE = 4096
EXPONENTIALS_PER_CYCLE = 16
LENGTH = 4096  # of the keys, where no length is given


@dataclass(frozen=True)
class Work:
    """What the kernel computes for one call: whole blocks, so more than what the mask lets through."""

    tiles: int
    splits: int  # of the keys of each tile
    split_blocks: int  # of keys that each has at most
    pairs: int  # of query and key, in the blocks that are visited
    mma_flops: int

    def seconds(self, shape: Shape, multiprocessors: int) -> dict[str, float]:
        """The least that each unit needs, on as many multiprocessors as have work."""
        cycles_per_second = min(multiprocessors, self.tiles * self.splits) * HERTZ
        return {
            "tensor cores": self.mma_flops / MMA_FLOPS_PER_CYCLE / cycles_per_second,
            "exponential unit": self.pairs / EXPONENTIALS_PER_CYCLE / cycles_per_second,
            "memory": shape.bytes / BYTES_PER_SECOND,
        }


def work(shape: Shape, spec: KernelSpec) -> Work:
    """Each tile visits the blocks of tile_n keys from the first that a row of it sees to the last; packed query heads share its rows."""
    tile = tile_for(spec)
    first, last = shape.bounds()
    queries = tile.tile_m // spec.pack
    begin = np.arange(0, shape.seqlen_q, queries)
    end = np.minimum(begin + queries, shape.seqlen_q) - 1
    blocks = np.maximum(-(-last[end] // tile.tile_n) - first[begin] // tile.tile_n, 0)
    heads = shape.heads // spec.pack
    pairs = int(blocks.sum()) * tile.tile_m * tile.tile_n * shape.batch * heads
    depth = -(-shape.head_dim // 16) * 16  # an MMA takes 16 columns of Q and K at a time
    splits, of_all = 1, max(-(-int(last.max()) // tile.tile_n) - int(first.min()) // tile.tile_n, 0)
    split_blocks = of_all
    if spec.split_rows:
        splits = splits_of_a_tile(tile, tiles_of_sequence(spec, shape.seqlen_q, shape.heads), of_all)
        split_blocks = -(-of_all // splits)
    in_slabs = tile.few_rows and not tile.shares_keys
    width = SLAB * slabs(shape.head_dim_v) if in_slabs else shape.head_dim_v  # of the output, in whole MMAs
    return Work(len(begin) * shape.batch * heads, splits, split_blocks, pairs, 2 * pairs * (depth + width))


def launched(shape: Shape, multiprocessors: int) -> tuple[KernelSpec, int]:
    """The variant that a launch takes, and the CTAs of each cluster, or 0."""
    spec = shape.spec
    capacity = -(-shape.seqlen_k // shape.page_size) * shape.page_size if shape.page_size else shape.seqlen_k
    return launch_variant(spec, shape.batch, shape.seqlen_q, shape.heads, capacity, multiprocessors)


@click.command()
@geometry_options
@click.option("--gqa", type=click.IntRange(min=1), metavar="N", help="Query heads for one key-value head, in place of --heads.")
@click.option("--causal/--full", default=None, help="Hide the keys after the diagonal, bottom right.  [default: with a cache]")
@click.option("--window", type=WINDOW, help="Keys seen to both sides of the diagonal; -1 is unbounded.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice([*DTYPE_OF]))
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), metavar="B")
@click.option("--seqlen-q", type=click.IntRange(min=1), metavar="SQ", help="[default: 4096, with a cache 1]")
@click.option("--seqlen-k", type=click.IntRange(min=1), metavar="SK", help="[default: SQ, with a cache 4096]")
@click.option("--kv-cache", is_flag=True, help="attention_with_kvcache in place of attention.")
@click.option("--page-size", type=click.IntRange(min=1), metavar="N", help="The same, with a cache in pages of N keys.")
@click.option("--source", is_flag=True, help="Print the generated CUDA instead.")
@click.option("--sass", is_flag=True, help="Print the disassembly instead; needs nvdisasm or cuobjdump.")
def explain(
    model: str | None,
    head_dim: int | None,
    head_dim_v: int | None,
    heads: tuple[int, int] | None,
    gqa: int | None,
    causal: bool | None,
    window: tuple[int | None, int | None] | None,
    dtype: str,
    batch: int,
    seqlen_q: int | None,
    seqlen_k: int | None,
    kv_cache: bool,
    page_size: int | None,
    source: bool,
    sass: bool,
) -> None:
    """Show the kernel that a call would use, and what bounds it; no GPU is needed.

    Exit status: 0 if done, 1 if it cannot be compiled or disassembled, 2 for a
    usage error.

    \b
    Examples:
        rawattn explain --model llama-3.1-8b --causal --seqlen-q 8192
        rawattn explain --model llama-3.1-8b --page-size 16 --batch 8
        rawattn explain --head-dim 64 --gqa 4 --source
    """
    if gqa and heads:
        raise click.UsageError("Give --heads or --gqa, not both.")
    if source and sass:
        raise click.UsageError("Give --source or --sass, not both.")
    found = geometry(model, head_dim, head_dim_v, (gqa, 1) if gqa else heads)
    if found is None:
        raise click.UsageError("Give --head-dim, or --model.")
    q_heads, kv_heads, d, dv = found
    cache = kv_cache or page_size is not None
    seqlen_q = seqlen_q or (1 if cache else LENGTH)
    seqlen_k = seqlen_k or (LENGTH if cache else seqlen_q)
    causal = cache if causal is None else causal  # as the functions have it
    shape = checked(Shape(dtype, batch, seqlen_q, seqlen_k, q_heads, kv_heads, d, dv, causal, window, cache, page_size or 0))
    multiprocessors, where = _multiprocessors()
    if source:
        click.echo(compiler.source(launched(shape, multiprocessors)[0]))
    elif sass:
        click.echo(disassembly(launched(shape, multiprocessors)[0]))
    else:
        for label, text in _lines(shape, multiprocessors, where):
            click.echo(f"{label:<18}{text}")


def _lines(shape: Shape, multiprocessors: int, where: str) -> list[tuple[str, str]]:
    spec, cluster = launched(shape, multiprocessors)
    tile = tile_for(spec)
    todo = work(shape, spec)
    ctas = todo.tiles * cluster or grid(spec, shape.batch, todo.tiles, multiprocessors)
    seconds = todo.seconds(shape, multiprocessors)
    bound = max(seconds, key=seconds.__getitem__)
    computed = todo.pairs * 2 * (shape.head_dim + shape.head_dim_v)
    producer, consumer = tile.registers
    moved = f"{producer} a thread of the producer, {consumer} of a consumer; " if producer else ""
    rows = f"rows, {tile.tile_m // spec.pack} queries of {spec.pack} heads each," if spec.pack > 1 else "queries"
    consumers = f"{tile.consumer_warpgroups} consumer{'s' if tile.consumer_warpgroups > 1 else ''}{' in turns' if tile.ping_pong else ''}"
    clusters = f", {cluster} a cluster," if cluster else ""
    pieces = f"{todo.tiles:,} tiles" + (f" of {todo.splits} splits" if spec.split_rows else "")
    lines = [
        ("call", shape.text),
        ("variant", spec.name),
        ("tile", f"{tile.tile_m} {rows} x {tile.tile_n} keys: {tile.reason}"),
        ("stages", f"{tile.q_stages_of(spec)} of Q, {tile.stages} of K and of V"),
        ("warpgroups", f"1 producer, {consumers}, {tile.threads} threads"),
        ("registers", f"{moved}{_compiled(spec)}"),
        ("shared memory", f"{tile.shared_memory_bytes(spec):,} of {SHARED_MEMORY_LIMIT:,} bytes"),
        ("grid", f"{ctas} CTAs{clusters} on {multiprocessors} SMs ({where}), {pieces}, {todo.tiles * todo.splits / ctas:.1f} for each"),
    ]
    if spec.split_rows:
        lines.append(("splits", f"of {todo.split_blocks * tile.tile_n} keys, {todo.split_blocks} blocks"))
    if spec.page_rows:
        lines.append(("pages", f"of {shape.page_size} keys, {spec.page_rows} loaded at a time"))
    return lines + [
        ("FLOPs", f"{shape.flops / 1e9:,.2f} G that the mask lets through, {shape.flops / computed:.0%} of those in the blocks visited"),
        ("bytes", f"{shape.bytes / 1e6:,.2f} MB at least, {shape.kv_bytes / 1e6:,.2f} MB of them keys and values"),
        ("intensity", f"{shape.flops / shape.bytes:,.1f} FLOPs a byte"),
        *((name, f"{1e6 * value:,.1f} us at least") for name, value in seconds.items()),
        ("predicted bound", f"{bound}, {_rate(shape, seconds[bound], bound)} at most, at {HERTZ / 1e9:.2f} GHz"),
    ]


def _rate(shape: Shape, seconds: float, bound: str) -> str:
    return f"{shape.bytes / seconds / 1e9:,.0f} GB/s" if bound == "memory" else f"{shape.flops / seconds / 1e12:,.0f} TFLOP/s"


def _multiprocessors() -> tuple[int, str]:
    """How many this machine's GPU has, or those of an H100 SXM."""
    try:
        device = compiler.current_device()
        compiler.check_gpu(device)
    except compiler.UnsupportedEnvironment:
        return MULTIPROCESSORS, "an H100 SXM; no Hopper GPU is here"
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"]), "this GPU"


def _compiled(spec: KernelSpec) -> str:
    try:
        _, report = compiler.compile_cubin(spec)
    except compiler.UnsupportedEnvironment as error:
        return f"not compiled: {error}"
    except compiler.CompileError as error:
        raise click.ClickException(str(error)) from error
    return f"{report.registers} at launch, {report.spill_bytes} bytes spilled, compiled in {report.seconds:.1f} s"


# ---- the disassembly


DISASSEMBLERS = {"nvdisasm": ("--print-code",), "cuobjdump": ("--dump-sass",)}


def disassembly(spec: KernelSpec) -> str:
    """The SASS of `spec`. Raises click.ClickException where there is no disassembler, or the kernel cannot be compiled."""
    found = [(path, options) for name, options in DISASSEMBLERS.items() if (path := _find(name))]
    if not found:
        raise click.ClickException("No disassembler is installed (nvdisasm, cuobjdump): pip install nvidia-cuda-nvdisasm")
    path, options = found[0]
    try:
        cubin, _ = compiler.compile_cubin(spec)
    except compiler.CompileError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{spec.name}.cubin")
        file.write_bytes(cubin)
        result = subprocess.run([path, *options, str(file)], capture_output=True, text=True)
    if result.returncode:
        raise click.ClickException(f"{path} failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def _find(tool: str) -> str | None:
    """On the PATH, in a CUDA toolkit, or in NVIDIA's wheel of the tool."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", os.defpath), *(os.path.join(folder, "bin") for folder in toolkits if folder)]
    if path := shutil.which(tool, path=os.pathsep.join(folders)):
        return path
    try:
        files: Any = metadata.files(f"nvidia-cuda-{tool}") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == tool), None)
