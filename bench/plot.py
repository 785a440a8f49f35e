"""Draws the plots of the README from the committed runs: bench/results/prefill.svg, and decode.svg where a decode run is committed.

    python3 -m bench.plot

Needs matplotlib (the extra `plot`). A run is a report of `rawattn bench --json`, or JSON lines with a peer's time on one shape in each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rawattn.cli import plots

RESULTS = Path(__file__).parent / "results"
NAMES = {"fa3b": "fa3", "finfer": "flashinfer"}  # other builds and short names of the peers


def keep_faster(case: dict[str, Any], peer: str, times: dict[str, float]) -> None:
    """Of two builds of a peer the faster."""
    name = NAMES.get(peer, peer)
    if name not in case or times["us"] < case[name]["us"]:
        case[name] = times


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The cases of a committed run, of two builds of a peer the faster, and where and when it ran."""
    text = path.read_text(encoding="utf-8")
    try:
        report = json.loads(text)
    except json.JSONDecodeError:  # more than one line of JSON
        return from_lines([json.loads(line) for line in text.splitlines() if line.strip()])
    for case in report["cases"]:
        for build in NAMES.keys() & case:
            keep_faster(case, build, case.pop(build))
    return report["cases"], f"{report['machine']['gpu']['name']}, {report['date'][:10]}"


def from_lines(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Cases out of one line for each shape and peer; of two builds of a peer the faster counts."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    device = ""
    for line in lines:
        device = line.get("device", device)
        if line.get("section") not in ("prefill", "decode") or "us" not in line:
            continue
        key = {
            "dtype": line["dt"],
            "heads_q": line["Hq"],
            "heads_k": line["Hk"],
            "head_dim": line["D"],
            "batch": line["B"],
            "seqlen": line["S"],
            "causal": line["causal"],
        }
        case = cases.setdefault(tuple(key.values()), key)
        keep_faster(case, line["peer"], {unit: line[unit] for unit in ("us", "tflops", "gbps") if unit in line})
    return list(cases.values()), device


def prefill(path: Path) -> Any:
    cases, where = read(path)
    shown = [case for case in cases if case["dtype"] == "bf16" and case["heads_q"] == case["heads_k"]]
    return plots.panels(shown, "head_dim", "causal", f"Prefill by sequence length, bf16, 16384 tokens, 2048 query columns: {where}")


def decode(path: Path) -> Any:
    cases, where = read(path)
    shown = [case for case in cases if (case["dtype"], case["heads_q"], case["heads_k"]) == ("bf16", 32, 8)]
    return plots.panels(shown, "batch", "heads_q", f"Decode by length of the cache, bf16, 32/8 heads of 128, L2 cold: {where}")


def main() -> None:
    for name, draw in (("prefill", prefill), ("decode", decode)):
        run = RESULTS / f"{name}_beside_peers.json"
        if run.exists():
            plots.save(draw(run), RESULTS / f"{name}.svg")
            print(RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
