"""A/B of tiles and kernel sources on a Hopper GPU, interleaved in one process: the lab's way to decide, as clocks and power drift.

    python3 -m bench.compare --head-dim 128 --causal --tile 128,160,2,2,40,232,1 --source /tmp/changed_cuda_src --fa3 /tmp/site/fa3_xf

The table's own tile is the first row. --tile is tile_m,tile_n,q_stages,stages,producer registers,consumer registers,ping_pong; --source is
a changed copy of rawattn/cuda_src; both may be repeated. --fa3 is a folder with FlashAttention-3's torch library _C.so (and
libcudart.so.12). Needs torch. Prints TFLOP/s for 16384 tokens of 2048 query columns, "=" behind it where the result has the bits of the
first row's; then the errors against float64 at lengths where rounding shows, on N(0, 1) and with queries of four times that, whose rows
one key dominates: the largest as a share of what CONTRIBUTING allows, and the L2 error as a multiple of the rounding's (at most 1.5).

--build compiles and exits: it needs no GPU, and several of it may run beside each other before the runs that time.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rawattn
from rawattn import compiler, tiles
from rawattn.attention import _local
from rawattn.spec import KernelSpec

TOKENS, COLUMNS = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
ROUNDS = 3
ERROR_CASES = tuple((seqlen, gain) for gain in (1, 4) for seqlen in (64, 138, 200, 500, 1000))
MAX_ERROR = {"bfloat16": 3.9e-3, "float16": 4.9e-4}

Inputs = tuple[Any, Any, Any]
Variant = tuple[str, tiles.Tile | None, Path | None]


@contextmanager
def selected(variant: Variant, head_dim: int, mask: str) -> Iterator[None]:
    """Compiles from the variant's tile and source meanwhile."""
    _, tile, source = variant
    table, folder = tiles.TABLE, compiler.CUDA_SRC
    if tile is not None:
        tiles.TABLE = ((head_dim, head_dim, (mask,), tile), *table)
    if source is not None:
        compiler.CUDA_SRC = source
    try:
        yield
    finally:
        tiles.TABLE, compiler.CUDA_SRC = table, folder


def kernel(inputs: Inputs, causal: bool, variant: Variant) -> tuple[Callable[[], Any], Any]:
    """A call that launches the kernel of `variant` on `inputs`, and the output that it writes."""
    q, k, v = inputs
    compiler._load.cache_clear()
    _local.launchers.clear()  # or those of the kernel before would serve
    _local.plans.clear()
    with selected(variant, q.shape[-1], "causal" if causal else "full"):
        out = rawattn.attention(q, k, v, causal=causal)
    (call,) = _local.plans.values()
    pointers = [x.data_ptr() for x in inputs]
    return lambda: call.plan.launch(0, out.data_ptr(), 0, pointers), out


def normal(shape: tuple[int, ...], dtype: str, gain: int = 1) -> Inputs:
    q, k, v = (torch.randn(shape, device="cuda") for _ in range(3))
    q, k, v = (x.to(getattr(torch, dtype)) for x in (gain * q, k, v))
    return q, k, v


def errors(out: Any, inputs: Inputs, causal: bool, dtype: str) -> str:
    """The largest error over its limit, and the L2 error over that of rounding the float64 result."""
    q, k, v = (x.double().transpose(1, 2) for x in inputs)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu_(1), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    error, rounding = (x.double() - expected for x in (out, expected.to(out.dtype)))
    limit = max(MAX_ERROR[dtype], 1.25 * float(rounding.abs().max()))
    return f"{float(error.abs().max()) / limit:.2f}/{float(error.norm() / rounding.norm()):.2f}"


def flash_attention_3(folder: Path) -> Callable[[Inputs, bool], Any]:
    ctypes.CDLL(str(folder / "libcudart.so.12"))
    torch.ops.load_library(str(folder / "_C.so"))
    forward = torch.ops.flash_attn_3.fwd.default
    return lambda inputs, causal: forward(*inputs, softmax_scale=inputs[0].shape[-1] ** -0.5, is_causal=causal, num_splits=1)[0]


def microseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    call()
    torch.cuda._sleep(1_000_000)  # the queue fills behind it, so that host time stays out
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def parse_tile(text: str) -> tiles.Tile:
    m, n, q_stages, stages, producer, consumer, ping_pong = map(int, text.split(","))
    return tiles.Tile(m, n, q_stages, stages, (producer, consumer), bool(ping_pong), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tile", type=parse_tile, action="append", default=[])
    parser.add_argument("--source", type=Path, action="append", default=[])
    parser.add_argument("--fa3", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each kernel at each length; many make the card hot")
    parser.add_argument("--build", action="store_true", help="compile and exit")
    options = parser.parse_args()

    variants: list[Variant] = [("table", None, None)]
    variants += [(tile.reason, tile, None) for tile in options.tile] + [(str(source), None, source) for source in options.source]
    if options.build:
        mask = "causal" if options.causal else "full"
        for variant in variants:
            with selected(variant, options.head_dim, mask):
                compiler.build(KernelSpec(options.dtype, options.head_dim, options.head_dim, 1, mask))
        return

    peer = flash_attention_3(options.fa3) if options.fa3 else None
    cells: dict[str, list[str]] = {name: [] for name, *_ in variants}
    for seqlen in SEQLENS:
        batch, heads = TOKENS // seqlen, COLUMNS // options.head_dim
        shape = (batch, seqlen, heads, options.head_dim)
        inputs = normal(shape, options.dtype)
        calls: dict[str, Callable[[], Any]] = {}
        marks: dict[str, str] = {}
        expected = None
        for variant in variants:
            name = variant[0]
            calls[name], out = kernel(inputs, options.causal, variant)
            expected = out if expected is None else expected
            marks[name] = "=" if torch.equal(out, expected) else ""
        if peer:
            calls["fa3"] = partial(peer, inputs, options.causal)
        flops = 4 * seqlen**2 * options.head_dim * heads * batch / (2 if options.causal else 1)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in random.sample(list(calls.items()), len(calls)):  # whoever follows a slow one finds a cooler card
                times[name] += microseconds(call, max(3, min(10, int(2.4e12 / flops))))
        for name, samples in times.items():
            cells.setdefault(name, []).append(f"{flops / statistics.median(samples) / 1e6:.0f}{marks.get(name, '')}")
    print("TFLOP/s".ljust(40), *(str(seqlen).rjust(6) for seqlen in SEQLENS))
    for name, row in cells.items():
        print(name[-40:].ljust(40), *(cell.rjust(6) for cell in row))

    print("\nErrors".ljust(41), *(f"{seqlen} x{gain}".rjust(9) for seqlen, gain in ERROR_CASES))
    judged: dict[str, list[str]] = {name: [] for name, *_ in variants}
    for seqlen, gain in ERROR_CASES:
        inputs = normal((16, seqlen, 8, options.head_dim), options.dtype, gain)
        for variant in variants:
            _, out = kernel(inputs, options.causal, variant)
            judged[variant[0]].append(errors(out, inputs, options.causal, options.dtype))
    for name, row in judged.items():
        print(name[-40:].ljust(40), *(cell.rjust(9) for cell in row))


if __name__ == "__main__":
    main()
