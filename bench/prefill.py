"""Times rawattn.attention() on a Hopper GPU over the prefill shapes of FlashAttention-3's paper, and writes bench/results/prefill.json.

    python3 -m bench.prefill [--json FILE] [--dtype float16]

Each shape has 16384 tokens in all and 2048 query columns (heads * head_dim). A sample of its rows is held against the float64 reference
before it is timed. FLOPs are 4 * S * S * D * heads * batch, halved with the causal mask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import cupy as cp
import ml_dtypes
import numpy as np

import rawattn
from rawattn import reference
from rawattn.cli.info import machine

TOKENS, COLUMNS = 16384, 2048
DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
LIMIT = {"bfloat16": 3.5e-3, "float16": 4.4e-4}  # relative L2: 1.5 times and more of what rounding costs, so that only faults are caught


class Shape(NamedTuple):
    head_dim: int
    heads_q: int
    heads_k: int
    seqlen: int
    causal: bool


def shapes() -> list[Shape]:
    square = [
        Shape(d, COLUMNS // d, COLUMNS // d, s, causal)
        for d in (64, 128, 256)
        for causal in (False, True)
        for s in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    return square + [Shape(128, hq, hk, s, True) for hq, hk in ((32, 8), (28, 4)) for s in (2048, 8192)]


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> Any:
    """N(0, 1) numbers from the host, repeated over the batch, so that no cuRAND is needed."""
    one = np.random.default_rng(seed).standard_normal(shape[1:], dtype=np.float32)
    return cp.broadcast_to(cp.asarray(one).astype(DTYPES[dtype]), shape).copy()


def check(shape: Shape, dtype: str, q: Any, k: Any, v: Any, out: Any) -> float:
    """Relative L2 error of the last 64 rows of the first head, which end at the diagonal's end."""
    rows = slice(shape.seqlen - 64, shape.seqlen)
    expected = reference.attention(q[:1, rows, :1], k[:1, :, :1], v[:1, :, :1], causal=shape.causal)
    difference = out[:1, rows, :1].astype(np.float64) - expected
    error = float(cp.sqrt((difference**2).sum() / (expected**2).sum()))
    if not error <= LIMIT[dtype]:
        raise SystemExit(f"{shape} in {dtype} is wrong: relative L2 error {error:.2e}, limit {LIMIT[dtype]:.2e}")
    return error


def microseconds(call: Any, repeats: int) -> float:
    """Median over `repeats` calls queued one after the other, by CUDA events."""
    for _ in range(3):
        call()
    events = [(cp.cuda.Event(), cp.cuda.Event()) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    cp.cuda.Device().synchronize()
    return statistics.median(1e3 * cp.cuda.get_elapsed_time(start, end) for start, end in events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/prefill.json"))
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    options = parser.parse_args()

    results = []
    for shape in shapes():
        batch = TOKENS // shape.seqlen
        q = normal(1, (batch, shape.seqlen, shape.heads_q, shape.head_dim), options.dtype)
        k, v = (normal(seed, (batch, shape.seqlen, shape.heads_k, shape.head_dim), options.dtype) for seed in (2, 3))
        out = cp.empty_like(q)
        rawattn.attention(q, k, v, causal=shape.causal, out=out)
        error = check(shape, options.dtype, q, k, v, out)
        us = microseconds(lambda q=q, k=k, v=v, out=out, causal=shape.causal: rawattn.attention(q, k, v, causal=causal, out=out), 20)
        flops = 4 * shape.seqlen**2 * shape.head_dim * shape.heads_q * batch / (2 if shape.causal else 1)
        results.append({**shape._asdict(), "batch": batch, "us": round(us, 1), "tflops": round(flops / us / 1e6, 1), "relative_l2": error})
        print(f"{shape}  {us:8.1f} us  {flops / us / 1e6:6.1f} TFLOP/s", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {"machine": machine(), "commit": commit, "dtype": options.dtype, "results": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
