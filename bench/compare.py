"""A/B of tiles and kernel sources on a Hopper GPU, interleaved in one process: the lab's way to decide, as clocks and power drift.

    python3 -m bench.compare --head-dim 128 --causal --tile 128,160,2,2,40,232,1 --source /tmp/changed_cuda_src --fa3 /tmp/site/fa3_xf

The table's own tile is the first row. --tile is tile_m,tile_n,q_stages,stages,producer registers,consumer registers,ping_pong; --source is
a changed copy of rawattn/cuda_src; both may be repeated. --fa3 is a folder with FlashAttention-3's torch library _C.so (and
libcudart.so.12). Needs torch. Prints TFLOP/s for 16384 tokens of 2048 query columns; "!" marks a result that differs from the first row's.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import torch

import rawattn
from rawattn import compiler, tiles
from rawattn.attention import _local

TOKENS, COLUMNS = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
ROUNDS = 3

Inputs = tuple[Any, Any, Any]


def kernel(inputs: Inputs, causal: bool, tile: tiles.Tile | None, source: Path | None) -> tuple[Callable[[], Any], Any]:
    """A call that launches the kernel of `tile` and `source` on `inputs`, and the output that it writes."""
    q, k, v = inputs
    table, folder = tiles.TABLE, compiler.CUDA_SRC
    if tile is not None:
        tiles.TABLE = ((q.shape[-1], v.shape[-1], ("causal" if causal else "full",), tile), *table)
    if source is not None:
        compiler.CUDA_SRC = source
    compiler._load.cache_clear()
    _local.__dict__.clear()  # or the plan of the kernel before would serve
    try:
        out = rawattn.attention(q, k, v, causal=causal)
        (call,) = _local.plans.values()
    finally:
        tiles.TABLE, compiler.CUDA_SRC = table, folder
    pointers = [x.data_ptr() for x in (q, k, v, out)]
    return lambda: call.plan.launch(*pointers, 0, 0, 0, cupy.cuda.Stream.null), out


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
    options = parser.parse_args()

    peer = flash_attention_3(options.fa3) if options.fa3 else None
    variants: list[tuple[str, tiles.Tile | None, Path | None]] = [("table", None, None)]
    variants += [(tile.reason, tile, None) for tile in options.tile] + [(str(source), None, source) for source in options.source]
    cells: dict[str, list[str]] = {name: [] for name, *_ in variants}
    for seqlen in SEQLENS:
        batch, heads = TOKENS // seqlen, COLUMNS // options.head_dim
        shape = (batch, seqlen, heads, options.head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=getattr(torch, options.dtype)) for _ in range(3))
        calls: dict[str, Callable[[], Any]] = {}
        marks: dict[str, str] = {}
        expected = None
        for name, tile, source in variants:
            calls[name], out = kernel((q, k, v), options.causal, tile, source)
            expected = out.float() if expected is None else expected
            marks[name] = "" if (out.float() - expected).abs().max() < 3e-2 else "!"
        if peer:
            calls["fa3"] = partial(peer, (q, k, v), options.causal)
        flops = 4 * seqlen**2 * options.head_dim * heads * batch / (2 if options.causal else 1)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name] += microseconds(call, max(3, min(10, int(2.4e12 / flops))))
        for name, samples in times.items():
            cells.setdefault(name, []).append(f"{flops / statistics.median(samples) / 1e6:.0f}{marks.get(name, '')}")
    print("TFLOP/s".ljust(40), *(str(seqlen).rjust(6) for seqlen in SEQLENS))
    for name, row in cells.items():
        print(name[-40:].ljust(40), *(cell.rjust(6) for cell in row))


if __name__ == "__main__":
    main()
