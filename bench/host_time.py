"""Where each microsecond of host time of a call goes, for CuPy, torch and prepared calls, on a GPU.

    python3 -m bench.host_time [--json FILE]

Below the ways to call stand the steps that they take, each timed alone in the same process. The shape is tiny, and a burst of calls starts
with an empty queue and ends long before it is full, so that the host never waits for the GPU. Each round times a burst of everything, so
that what slows the host for a while, a cold clock above all, slows all alike. Prints the median and the quartiles of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import cupy
import numpy as np

import rawattn
from rawattn.prepared import access

ROUNDS, WARM_UP = 100, 30
CALLS = 100  # the launch queue takes about 1000
TARGETS = {"cupy attention()": 15.0, "torch attention()": 20.0, "cupy prepared, out given": 9.0, "torch prepared, out given": 9.0}

Row = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]  # what is timed, and the stream on which it is


def measure(rows: dict[str, Row]) -> dict[str, list[float]]:
    """Host microseconds of a call in each round, sorted."""
    samples: dict[str, list[float]] = {name: [] for name in rows}
    gc.collect()
    gc.disable()
    for _ in range(WARM_UP + ROUNDS):
        for name, (call, stream) in rows.items():
            with stream():
                cupy.cuda.runtime.deviceSynchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
    gc.enable()
    return {name: sorted(each[WARM_UP:]) for name, each in samples.items()}


def steps(framework: str, q: Any, k: Any, v: Any, out: Any, own_stream: Callable[[], AbstractContextManager[Any]]) -> dict[str, Row]:
    """The ways to call from `framework`, on the default stream and on one of its own, and the steps of a call."""
    found = access(type(q))
    assert found is not None
    op = rawattn.prepare(q, k, v, causal=True)
    launcher: Any = op._launcher
    plan, device, allocate = launcher.plan, launcher.device, launcher._new_out
    inputs, geometry = found.read((q, k, v))
    table = {tuple(geometry): launcher}
    to, copy = found.address(out), q + 0
    moved = found.address(copy)
    assert moved != inputs[0]

    def with_q_moved_twice(keep: Any = copy) -> None:
        plan.launch(0, to, 0, [moved, *inputs[1:]])
        plan.launch(0, to, 0, inputs)

    calls = {
        "attention()": lambda: rawattn.attention(q, k, v, causal=True),
        "attention(), out given": lambda: rawattn.attention(q, k, v, causal=True, out=out),
        "prepared": lambda: op(q, k, v),
        "prepared, out given": lambda: op(q, k, v, out=out),
    }
    parts = {
        "read q, k, v": lambda: found.read((q, k, v)),
        "read q, k, v, out as prepared": lambda: op._match_with_out((q, k, v, out)),
        "find their launcher": lambda: table.get(tuple(geometry)),
        "allocate the output": lambda: allocate(q),
        "current stream": lambda: found.stream(device),
        "plan.launch": lambda: plan.launch(0, to, 0, inputs),
        "two plan.launch, q moved before each": with_q_moved_twice,
        "plan.launch, of it the driver": lambda: plan._kernel.launch(0),
    }
    return {
        **{f"{framework} {name}": (call, nullcontext) for name, call in calls.items()},
        **{f"{framework} {name}, own stream": (call, own_stream) for name, call in calls.items()},
        **{f"  {framework} {name}": (call, nullcontext) for name, call in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, 128, heads, 128)).astype(np.float16)) for heads in (8, 2, 2))
    cupy_stream = cupy.cuda.Stream(non_blocking=True)
    rows = steps("cupy", q, k, v, cupy.empty_like(q), lambda: cupy_stream)
    try:
        import torch
    except ImportError:
        print("torch is not installed: left out")
    else:
        a, b, c = (torch.from_dlpack(x) for x in (q, k, v))
        transposed = [x.transpose(1, 2) for x in (a, b, c)]
        torch_stream = torch.cuda.Stream()
        rows |= steps("torch", a, b, c, torch.empty_like(a), lambda: torch.cuda.stream(torch_stream))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        rows["torch's own SDPA"] = (lambda: sdpa(*transposed, is_causal=True, enable_gqa=True), nullcontext)
    figures = measure(rows)
    for name, samples in figures.items():
        target = f"   target {TARGETS[name]:.0f}" if name in TARGETS else ""
        low, _, high = statistics.quantiles(samples, n=4)
        print(f"{name:46} {statistics.median(samples):6.2f} us  ({low:.2f} to {high:.2f}){target}")
    if options.json:
        medians = {name.strip(): round(statistics.median(samples), 2) for name, samples in figures.items()}
        options.json.write_text(json.dumps({"microseconds": medians, "targets": TARGETS}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
