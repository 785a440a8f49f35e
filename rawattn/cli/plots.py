"""Drawings of benchmarks with matplotlib: bars, and a roofline, as .png, .svg or .html."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg", ".html")
LABELS = {
    "rawattn": "rawattn",
    "cudnn": "cuDNN",
    "fa2": "FlashAttention-2",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "flashinfer": "FlashInfer",
    "jax": "JAX",
}
COLOURS = dict(zip(LABELS, ("#76b900", "#4c566a", "#c9b458", "#8fa6c4", "#b07aa1", "#d08770", "#5e9ea0"), strict=True))
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s of keys and values"}


def check(path: Path) -> None:
    """Raise ValueError unless a drawing can be saved under this name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; needed: {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed; needed to draw: pip install 'rawattn[plot]'")


def save(figure: Any, path: Path) -> None:
    """Write the figure; the same run gives the same bytes of .svg. An .html page holds the .svg."""
    import matplotlib

    metadata = {"Date": None} if path.suffix != ".png" else None
    with matplotlib.rc_context({"svg.hashsalt": "rawattn", "svg.fonttype": "path"}):
        if path.suffix != ".html":
            figure.savefig(path, dpi=150, metadata=metadata)
            return
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata=metadata)
    svg = page.getvalue()
    svg = svg[svg.index("<svg") :]  # a page has no XML declaration inside
    path.write_text(f'<!doctype html>\n<meta charset="utf-8">\n<title>rawattn bench</title>\n{svg}', encoding="utf-8")


def rate(figures: dict[str, Any]) -> float:
    """TFLOP/s or GB/s of one implementation's figures."""
    return float(figures["tflops" if "tflops" in figures else "gbps"])


def benchmark(report: dict[str, Any]) -> Any:
    """A figure of a report of `rawattn bench`."""
    if report["benchmark"] in ("overhead", "coldstart"):
        return _times(report)
    cases = [case for case in report["cases"] if any("us" in x for x in case.values() if isinstance(x, dict))]
    names = implementations(cases)
    figure, (left, right) = _figure(1, 2, width=max(12.0, 5 + 0.12 * len(cases) * (len(names) + 2)), height=5.5)
    _bars(left, cases, names, [case["shape"].partition(" ")[2] for case in cases], rotation=90)
    ceilings = report["ceilings"]
    unit = _unit(cases)
    ceiling = ceilings["matmul_tflops" if unit == "tflops" else "read_gbps"]
    if ceiling:
        left.axhline(ceiling, color="black", linewidth=0.8, linestyle="--", label="ceiling")
    left.set_ylabel(UNITS[unit])
    left.legend(fontsize=8, ncols=len(names) + 1, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    _roofline(right, cases, names, ceilings)
    figure.suptitle(f"{report['benchmark']} on {report['machine']['gpu']['name']}, {report['date'][:10]}")
    return figure


def panels(cases: list[dict[str, Any]], columns: str, rows: str, title: str) -> Any:
    """Bars by sequence length, a panel for each value of the keys `columns` and `rows` of the cases."""
    names, unit = implementations(cases), _unit(cases)
    across, down = (sorted({case[key] for case in cases}) for key in (columns, rows))
    figure, axes = _figure(len(down), len(across), width=1.2 + 3.6 * len(across), height=0.9 + 2.2 * len(down))
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            axis = axes[i * len(across) + j]
            shown = sorted((x for x in cases if (x[rows], x[columns]) == (row, column)), key=lambda x: x["seqlen"])
            _bars(axis, shown, names, [_length(case["seqlen"]) for case in shown])
            axis.set_title(f"{_value(columns, column)}, {_value(rows, row)}", fontsize=9)
            if j == 0:
                axis.set_ylabel(UNITS[unit], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def implementations(cases: list[dict[str, Any]]) -> list[str]:
    """Those that have figures in some case, in the order of LABELS."""
    return [name for name in LABELS if any("us" in case.get(name, {}) for case in cases)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _bars(axis: Any, cases: list[dict[str, Any]], names: list[str], ticks: list[str], rotation: float = 0) -> None:
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [rate(case[name]) if "us" in case.get(name, {}) else math.nan for case in cases]
        offset = (i - (len(names) - 1) / 2) * width
        axis.bar([x + offset for x in range(len(cases))], heights, width, label=LABELS[name], color=COLOURS[name])
    axis.set_xticks(range(len(cases)), ticks, rotation=rotation)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis: Any, cases: list[dict[str, Any]], names: list[str], ceilings: dict[str, Any]) -> None:
    """TFLOP/s over FLOPs a byte, under the two ceilings of the run."""
    intensities = [case["flops"] / case["bytes"] for case in cases]
    low, high = min(intensities) / 2, max(intensities) * 2
    memory, matmul = ceilings["read_gbps"] / 1e3, ceilings["matmul_tflops"] or math.inf
    if math.isfinite(matmul):
        high = max(high, 2 * matmul / memory)
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axis.plot(xs, [min(x * memory, matmul) for x in xs], color="black", linewidth=1, label="roofline")
    for name in names:
        points = [
            (x, case["flops"] / case[name]["us"] / 1e6) for x, case in zip(intensities, cases, strict=True) if "us" in case.get(name, {})
        ]
        axis.scatter(*zip(*points, strict=True), s=14, color=COLOURS[name], label=LABELS[name])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs a byte that must move")
    axis.set_ylabel("TFLOP/s")
    axis.grid(which="major", linewidth=0.4, alpha=0.5)
    axis.legend(fontsize=8)


def _times(report: dict[str, Any]) -> Any:
    cases = report["cases"]
    figure, (axis,) = _figure(1, 1, width=8, height=1 + 0.4 * len(cases))
    scale, unit = (1, "host us a call") if report["benchmark"] == "overhead" else (1e-3, "ms")
    names = [LABELS.get(case["what"], case["what"]) for case in cases]
    bars = axis.barh(names, [case["us"] * scale for case in cases], color=COLOURS["rawattn"])
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['benchmark']} on {report['machine']['gpu']['name']}, {report['date'][:10]}")
    return figure


def _unit(cases: list[dict[str, Any]]) -> str:
    return "tflops" if any("tflops" in x for case in cases for x in case.values() if isinstance(x, dict)) else "gbps"


def _length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _value(key: str, value: Any) -> str:
    if key == "causal":
        return "causal" if value else "full"
    return f"{ {'head_dim': 'D', 'batch': 'batch', 'heads_q': 'query heads'}.get(key, key) } = {value}"
