"""Where each microsecond of host time of a call goes, for CuPy, torch and prepared calls, on a GPU.

    python3 -m bench.host_time [--json FILE]

Below the ways to call stand the steps that they take, each timed alone in the same process. The shape is tiny, and queues are emptied
between samples, so that the host never waits for the GPU. Prints the median and the quartiles of the samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

import rawattn
from rawattn.prepared import access

SAMPLES, CALLS = 40, 100  # fewer calls than the launch queue takes
TARGETS = {"cupy attention()": 15.0, "torch attention()": 20.0, "cupy prepared, out given": 9.0, "torch prepared, out given": 9.0}


def microseconds(call: Callable[[], Any]) -> list[float]:
    """Host time of one call in each of SAMPLES samples, sorted."""
    samples = []
    for _ in range(SAMPLES + 3):
        cupy.cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return sorted(samples[3:])


def steps(framework: str, q: Any, k: Any, v: Any, out: Any) -> dict[str, Callable[[], Any]]:
    found = access(type(q))
    assert found is not None
    op = rawattn.prepare(q, k, v, causal=True)
    launcher: Any = op._launcher
    plan, device = launcher.call.plan, launcher.device
    stream = found.stream(device)
    pointers = [found.read(x)[0] for x in (q, k, v, out)]
    copy = q + 0
    moved = found.read(copy)[0]

    def with_q_moved_twice() -> None:
        assert copy is not None  # keeps its memory
        plan.launch(stream, moved, *pointers[1:])
        plan.launch(stream, *pointers)

    assert moved != pointers[0]
    key = tuple(found.read(x)[1] for x in (q, k, v))
    table = {key: 1}
    return {
        f"{framework} attention()": lambda: rawattn.attention(q, k, v, causal=True),
        f"{framework} attention(), out given": lambda: rawattn.attention(q, k, v, causal=True, out=out),
        f"{framework} prepared": lambda: op(q, k, v),
        f"{framework} prepared, out given": lambda: op(q, k, v, out=out),
        "  read q, k, v": lambda: (found.read(q), found.read(k), found.read(v)),
        "  find their launcher": lambda: table.get(key),
        "  allocate the output": lambda: found.empty(q, out.shape, out.dtype),
        "  current stream": lambda: found.stream(device),
        "  plan.launch": lambda: plan.launch(stream, *pointers),
        "  two plan.launch, q moved before each": with_q_moved_twice,
        "    of it CuPy and the driver": lambda: plan._kernel(
            plan._grid, plan._block, plan._arguments, shared_mem=plan._shared_memory, stream=stream
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, 128, heads, 128)).astype(np.float16)) for heads in (8, 2, 2))
    rows = steps("cupy", q, k, v, cupy.empty_like(q))
    figures = {name: microseconds(call) for name, call in rows.items()}
    show(figures)
    try:
        import torch
    except ImportError:
        print("torch is not installed: left out")
    else:
        tensors = [torch.from_dlpack(x) for x in (q, k, v)]
        transposed = [x.transpose(1, 2) for x in tensors]
        more = steps("torch", tensors[0], tensors[1], tensors[2], torch.empty_like(tensors[0]))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        more["torch's own SDPA"] = lambda: sdpa(*transposed, is_causal=True, enable_gqa=True)
        timed = {name: microseconds(call) for name, call in more.items()}
        show(timed)
        figures |= {name if name.startswith("torch") else f"torch{name}": samples for name, samples in timed.items()}
    if options.json:
        medians = {name.strip(): statistics.median(samples) for name, samples in figures.items()}
        options.json.write_text(json.dumps({"microseconds": medians, "targets": TARGETS}, indent=1) + "\n", encoding="utf-8")


def show(figures: dict[str, list[float]]) -> None:
    for name, samples in figures.items():
        target = f"   target {TARGETS[name]:.0f}" if name in TARGETS else ""
        low, _, high = statistics.quantiles(samples, n=4)
        print(f"{name:44} {statistics.median(samples):6.2f} us  ({low:.2f} to {high:.2f}){target}")
    print()


if __name__ == "__main__":
    main()
