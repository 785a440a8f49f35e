"""`rawattn bench` and `rawattn explain` on a Hopper GPU, at shapes of a second or less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import rawattn
from rawattn import compiler, launch
from rawattn.cli import explain, main, timing
from rawattn.cli.shapes import Shape
from rawattn.spec import KernelSpec

cp = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MATMUL", 2048)
    monkeypatch.setattr(timing, "READ_BYTES", 256 << 20)


def report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "x.json"
    result = CliRunner().invoke(main, ["bench", *arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_bench_measures_something_possible(tmp_path: Path, kind: str) -> None:
    shape = ["--head-dim", "128", "--heads", "32/8", "--seqlen", "512", "--batch", "8", "--peers", "none"]
    found = report(tmp_path, kind, *shape, *(["--causal"] if kind == "prefill" else []))
    assert 1000 < found["ceilings"]["read_gbps"] < 6000 and 0 < found["ceilings"]["null_graph_us"] < 100
    (case,) = found["cases"]
    own = case["rawattn"]
    assert 0 < own["us_min"] <= own["us_q1"] <= own["us"] <= own["us_q3"] and own["samples"] > 4
    assert 300 < case["sm_mhz"] < 2200
    assert 0 < own.get("tflops", own.get("gbps")) < (1000 if kind == "prefill" else 4000)


def test_bench_compares_with_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    for kind in ("prefill", "decode"):
        shape = ["--head-dim", "128", "--heads", "8/2", "--seqlen", "512", "--batch", "2", "--peers", "fa2"]
        found = report(tmp_path, kind, *shape, *(["--full"] if kind == "prefill" else []))
        (case,) = found["cases"]
        assert "error" not in case["fa2"], case["fa2"]
        assert case["best_peer"] == "fa2" and 0.01 < case["ratio"] < 100


def test_overhead_and_coldstart(tmp_path: Path) -> None:
    rows = {row["what"]: row["us"] for row in report(tmp_path, "overhead", "--peers", "none")["cases"]}
    assert 0 < rows["cupy.empty"] < rows["rawattn.attention, CuPy"] < 1000
    rows = {row["what"]: row["us"] for row in report(tmp_path, "coldstart", "--head-dim", "64", "--repeats", "1")["cases"]}
    assert 0 < rows["first call, filled cache"] < rows["first call, empty cache"]


def test_inputs_are_normal_and_the_same_each_time() -> None:
    shape = Shape("fp16", 1, 1 << 14, 1 << 14, 16, 16, 128, 128)
    first, second = (timing.inputs(shape)[0] for _ in range(2))
    assert bool((first.view(np.uint16) == second.view(np.uint16)).all())
    values = first.astype(np.float32)
    assert abs(float(values.mean())) < 2e-3 and abs(float(values.std()) - 1) < 2e-3
    assert float((abs(values) < 1).mean()) == pytest.approx(0.6827, abs=2e-3)
    k = timing.inputs(shape)[1].astype(np.float32)
    assert abs(float((values * k).mean())) < 2e-3  # of another stream of numbers


@pytest.mark.parametrize("how", ["cluster", "alone", "list"])
def test_explain_shows_the_variant_that_is_launched(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    multiprocessors = cp.cuda.Device().attributes["MultiProcessorCount"]
    batch, keys = {"cluster": (1, 777), "alone": (multiprocessors // 2, 4777), "list": (2 * multiprocessors, 777)}[how]
    loaded: list[KernelSpec] = []

    def recorded(spec: KernelSpec) -> Any:
        loaded.append(spec)
        return compiler.load(spec)

    monkeypatch.setattr(launch, "load", recorded)
    shape = Shape("fp16", batch, 1, keys, 8, 2, 128, 128, causal=True, cache=True)
    q, k, v = (cp.zeros((batch, rows, heads, 128), np.float16) for rows, heads in ((1, 8), (keys, 2), (keys, 2)))
    rawattn.attention_with_kvcache(q, k, v, cache_seqlens=cp.full(batch, 700, np.int32))
    spec, cluster = explain.launched(shape, multiprocessors)
    assert set(loaded) == {spec} and (cluster > 0) == (how == "cluster") and spec.alone == (how != "list")


def test_explain_counts_the_sms_of_this_gpu() -> None:
    assert "(this GPU)" in CliRunner().invoke(main, ["explain", "--head-dim", "64"]).stdout
