"""`rawattn bench` on the NumPy reference with a stand-in for the GPU's clock, and `rawattn explain` against numbers counted by hand."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import rawattn
from bench import plot as bench_plot
from rawattn import compiler, launch
from rawattn.arrays import view
from rawattn.checks import window_bounds
from rawattn.cli import bench, check, explain, main, peers, plots, timing
from rawattn.cli.shapes import Shape
from rawattn.spec import KernelSpec
from rawattn.tiles import splits_of_a_tile, tile_for

CEILINGS = {"matmul_tflops": 1e-3, "read_gbps": 2.0, "null_graph_us": 2.5}
COMMANDS = (["bench", "prefill"], ["bench", "decode"], ["bench", "overhead"], ["bench", "coldstart"], ["explain"])


def run(*arguments: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(x) for x in arguments], **kwargs)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise compiler.UnsupportedEnvironment("No GPU in this test")

    monkeypatch.setattr(compiler, "current_device", refuse)


class Peer(peers.Implementation):
    """A library that is right, and takes as long as `us` says."""

    version = "Peer 1.0"

    def __init__(self, name: str, us: float):
        self.name, self.us = name, us

    def decode(self, q: Any, k: Any, v: Any) -> peers.Call:
        return lambda: rawattn.attention(q, k, v)

    def burst(self, call: peers.Call, count: int) -> list[float]:
        return [self.us] * count


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """NumPy arrays in place of CuPy's, 90, 100, 100 and 140 us for every four calls, and no peers unless a test adds some."""
    state = SimpleNamespace(peers=[], missing={}, times=[90.0, 100.0, 100.0, 140.0])

    def inputs(shape: Shape) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(0)
        q = (shape.batch, shape.seqlen_q, shape.heads, shape.head_dim)
        k, v = ((shape.batch, shape.seqlen_k, shape.kv_heads, dim) for dim in (shape.head_dim, shape.head_dim_v))
        return tuple(random.standard_normal(x).astype(check.DTYPES[shape.dtype]) for x in (q, k, v))

    monkeypatch.setattr(compiler, "current_device", lambda: 0)
    monkeypatch.setattr(compiler, "check_gpu", lambda device: None)
    monkeypatch.setattr(bench, "machine", lambda: {"gpu": {"name": "Stand-in"}})
    monkeypatch.setattr(peers, "load", lambda names: (state.peers, state.missing))
    monkeypatch.setattr(timing, "inputs", inputs)
    monkeypatch.setattr(timing, "release", lambda: None)
    monkeypatch.setattr(timing, "ceilings", lambda: dict(CEILINGS))
    monkeypatch.setattr(timing, "full_lengths", lambda cache: np.full(len(cache), cache.shape[1], np.int32))
    monkeypatch.setattr(timing, "kernels", lambda: SimpleNamespace(sm_mhz=lambda: 1755.4))
    monkeypatch.setattr(timing, "burst", lambda call, count: state.times)
    monkeypatch.setattr(timing, "capture", lambda call: call)
    monkeypatch.setattr(timing, "cold", lambda replay, count: state.times)
    monkeypatch.setattr(timing, "host", lambda call: call() is not None and [10.0, 12.0, 11.0])
    monkeypatch.setattr(timing, "host_floor", lambda like: (lambda: 0, lambda: 0))
    return state


# ---- help and errors


@pytest.mark.parametrize("command", [["bench"], *COMMANDS])
def test_help_fits_a_screen_and_has_an_example(command: list[str]) -> None:
    lines = run(*command, "-h").output.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "Example" in text and f"rawattn {command[0]}" in text
    assert command != ["bench"] or "130 after Ctrl-C" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    script = CliRunner().invoke(main, [], env={"_RAWATTN_COMPLETE": f"{shell}_source"}, prog_name="rawattn")
    assert script.exit_code == 0 and "_RAWATTN_COMPLETE" in script.output
    words = {"COMP_WORDS": "rawattn bench ", "COMP_CWORD": "" if shell == "fish" else "2"}
    completed = CliRunner().invoke(main, [], env=words | {"_RAWATTN_COMPLETE": f"{shell}_complete"}, prog_name="rawattn").output
    for name in ("prefill", "decode", "overhead", "coldstart"):
        assert name in completed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prefill --model llama-3.1-8b --head-dim 64", "Give --model, or --head-dim and --heads."),
        ("prefill --heads 32/8", "Give --head-dim, or --model."),
        ("prefill --head-dim 64 --heads 32", "'32' is not query heads/key-value heads; needed: two integers, as in 32/8"),
        ("decode --head-dim 64 --heads 32/5", "'32/5' has 32 query heads for 5 key-value heads; needed: a multiple of them"),
        ("prefill --head-dim 60", "q has head_dim 60; needed: a multiple of 8 from 8 to 256."),
        ("prefill --head-dim 0", "--head-dim is 0; needed: a multiple of 8 from 8 to 256."),
        ("decode --head-dim 64 --head-dim-v 512", "head_dim_v is 512; needed: a multiple of 8 from 8 to 256."),
        ("prefill --seqlen 0", "0 is not in the range x>=1."),
        ("prefill --peers fa3,fa9", "'fa9' is no peer; needed: all, none, or some of cudnn, fa2, fa3, fa4, flashinfer, jax."),
        ("overhead --plot x.pdf", "x.pdf ends in '.pdf'; needed: .png, .svg, .html."),
        ("coldstart --json /nonexistent/x.json", "No such file or directory"),
    ],
)
def test_usage_errors_are_one_sentence(arguments: str, message: str) -> None:
    result = run("bench", *arguments.split())
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(message)


def test_a_missing_matplotlib_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    result = run("bench", "prefill", "--plot", "x.svg")
    assert result.exit_code == 2
    assert "matplotlib is not installed; needed to draw: pip install 'rawattn[plot]'." in result.stderr


@pytest.mark.parametrize("command", ["prefill", "decode", "overhead", "coldstart"])
def test_without_a_gpu_it_is_one_sentence(no_gpu: None, command: str) -> None:
    result = run("bench", command)
    assert result.exit_code == 1 and result.output == "Error: No GPU in this test\n"


# ---- arithmetic


def test_flops_and_bytes_are_those_of_the_pairs_that_the_mask_lets_through() -> None:
    full = Shape("bf16", 2, 3, 5, 4, 2, 16, 8)
    assert full.flops == 2 * 4 * (3 * 5) * 2 * (16 + 8)
    assert full.kv_bytes == 2 * 2 * 5 * (16 + 8) * 2  # batch, kv heads, keys, columns, bytes
    assert full.bytes == full.kv_bytes + 2 * 4 * 3 * (16 + 8) * 2
    causal = Shape("bf16", 1, 3, 5, 1, 1, 8, 8, causal=True)
    assert causal.flops == (3 + 4 + 5) * 4 * 8
    window = Shape("bf16", 1, 1, 1000, 1, 1, 8, 8, window=(99, 0))
    assert window.flops == 100 * 4 * 8 and window.kv_bytes == 100 * 2 * 8 * 2
    assert Shape("fp16", 1, 10, 2, 1, 1, 8, 8, causal=True).flops == (1 + 2) * 4 * 8  # the first eight queries see no key


@pytest.mark.parametrize(
    ("causal", "window", "mask"),
    [
        (False, None, "full"),
        (True, None, "causal"),
        (False, (None, 0), "causal"),
        (False, (None, None), "full"),
        (True, (64, None), "window"),
        (False, (0, 5), "window"),
    ],
)
def test_the_spec_is_the_one_that_attention_would_use(causal: bool, window: Any, mask: str) -> None:
    assert Shape("fp16", 1, 64, 64, 8, 2, 128, 32, causal, window).spec == KernelSpec("float16", 128, 32, 4, mask)


def test_statistics() -> None:
    assert timing.summary([7.0]) == {"us": 7.0, "us_q1": 7.0, "us_q3": 7.0, "us_min": 7.0, "samples": 1}
    figures = timing.summary([float(x) for x in range(1, 102)])
    assert (figures["us"], figures["us_q1"], figures["us_q3"], figures["us_min"]) == (51, 26, 76, 1)
    assert timing.spread(figures) == pytest.approx(25 / 51)
    assert timing.geometric_mean([0.5, 1.0, 4.0]) == pytest.approx(2 ** (1 / 3))


def test_wall_clock_waits_for_the_last_result() -> None:
    waited: list[int] = []
    calls = iter(range(5))
    (us,) = timing.wall_clock(lambda: next(calls), waited.append, 5)
    assert waited == [4] and us > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "parts"), [(1, 70, 1), (20, 20, 1), (100, 100, 2), (40, 90, 2)])
def test_checked_slices_are_slices_of_the_whole_result(seqlen_q: int, seqlen_k: int, parts: int, causal: bool) -> None:
    shape = Shape("fp16", 5, seqlen_q, seqlen_k, 4, 2, 16, 8, causal)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(x) for x in ((5, seqlen_q, 4, 16), (5, seqlen_k, 2, 16), (5, seqlen_k, 2, 8)))
    whole = rawattn.reference.attention(q, k, v, causal=causal)
    slices = list(bench._slices(shape, q, k, v))
    assert len(slices) == parts
    for index, expected in slices:
        np.testing.assert_allclose(whole[index], expected, rtol=1e-12)


# ---- prefill and decode


def test_prefill_report(lab: SimpleNamespace, tmp_path: Path) -> None:
    lab.peers = [Peer("cudnn", 50.0), Peer("fa3", 150.0)]
    lab.missing = {"fa4": "flash_attn.cute is not installed"}
    file = tmp_path / "x.json"
    result = run(
        "bench", "prefill", "--head-dim", 16, "--heads", "4/2", "--seqlen", 40, "--seqlen", 8, "--batch", 2, "--causal", "--json", file
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["benchmark"] == "prefill" and not report["interrupted"]
    assert report["peers"] == {"cudnn": "Peer 1.0", "fa3": "Peer 1.0"} and report["missing_peers"] == lab.missing
    assert report["ceilings"] == CEILINGS
    first, second = report["cases"]
    assert (first["shape"], second["shape"]) == ("bf16 4/2 D16 B2 S40 causal", "bf16 4/2 D16 B2 S8 causal")
    own = first["rawattn"]
    flops = 2 * 4 * (40 * 41 // 2) * 4 * 16
    assert first["flops"] == flops and first["sm_mhz"] == 1755
    assert (own["us"], own["us_q1"], own["us_q3"], own["us_min"], own["samples"]) == (100, 97.5, 110, 90, 3 * 4)
    assert own["of_ceiling"] == pytest.approx(flops / 100 / 1e6 / 1e-3, abs=1e-3)
    assert 0 < own["rel_l2"] < 4e-3
    assert (first["best_peer"], first["ratio"], first["cudnn"]["ratio"], first["fa3"]["ratio"]) == ("cudnn", 0.5, 0.5, 1.5)
    assert (report["geomean"], report["minimum"], report["ahead"]) == (0.5, 0.5, 0)
    assert "fa4: not compared, flash_attn.cute is not installed" in result.stdout
    line = next(x for x in result.stdout.splitlines() if x.startswith(first["shape"]))
    assert "100.0 us ±6.2%" in line and "1755 MHz" in line and "(0.50)" in line and "(1.50)" in line


def test_prefill_shapes_of_a_model_and_by_default(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[Shape]]] = []
    monkeypatch.setattr(bench, "_compare", lambda kind, shapes, names, outputs: seen.append((kind, shapes)))
    run("bench", "prefill")
    run("bench", "prefill", "--model", "qwen-2.5-7b", "--dtype", "fp16", "--dtype", "bf16", "--full", "--seqlen", 2048)
    run("bench", "prefill", "--head-dim", 64, "--causal", "--seqlen", 100000)
    run("bench", "decode")
    (_, default), (_, model), (_, long), (kind, decode) = seen
    assert len(default) == 12 and {x.batch * x.seqlen_q for x in default} == {16384} and {x.causal for x in default} == {False, True}
    assert model == [Shape(dtype, 8, 2048, 2048, 28, 4, 128, 128) for dtype in ("fp16", "bf16")]
    assert long == [Shape("bf16", 1, 100000, 100000, 32, 32, 64, 64, causal=True)]
    assert kind == "decode" and len(decode) == 16 and {x.seqlen_q for x in decode} == {1}
    assert max(x.batch * x.seqlen_k for x in decode) == 128 * 32768 and {(x.heads, x.kv_heads) for x in decode} == {(32, 8)}


def test_decode_report_counts_the_bytes_of_keys_and_values(lab: SimpleNamespace, tmp_path: Path) -> None:
    lab.peers = [Peer("fa3", 1.0)]
    file = tmp_path / "x.json"
    result = run("bench", "decode", "--head-dim", 64, "--head-dim-v", 32, "--heads", "8/2", "--seqlen", 300, "--batch", 3, "--json", file)
    assert result.exit_code == 0, result.output
    (case,) = json.loads(file.read_text())["cases"]
    assert case["rawattn"]["gbps"] == round(3 * 300 * 2 * (64 + 32) * 2 / 100 / 1e3, 1)
    assert case["rawattn"]["of_ceiling"] == pytest.approx(3 * 300 * 2 * 96 * 2 / 100 / 1e3 / 2.0, abs=1e-3)
    assert (case["seqlen_q"], case["seqlen"]) == (1, 300)
    assert case["ratio"] == 1.0  # replays of all are timed alike


def test_csv_has_a_row_for_each_shape_and_implementation(lab: SimpleNamespace, tmp_path: Path) -> None:
    lab.peers = [Peer("fa3", 50.0)]
    file = tmp_path / "x.csv"
    assert run("bench", "prefill", "--head-dim", 16, "--seqlen", 8, "--seqlen", 16, "--batch", 1, "--full", "--csv", file).exit_code == 0
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [(x["seqlen"], x["implementation"], x["us"]) for x in rows] == [
        (seqlen, name, us) for seqlen in ("8", "16") for name, us in (("rawattn", "100.0"), ("fa3", "50.0"))
    ]
    assert [x["ratio"] for x in rows] == ["", "0.5", "", "0.5"] and rows[0]["us_q1"] == "97.5"


def test_a_wrong_result_of_rawattn_is_not_timed_and_fails(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = rawattn.attention
    monkeypatch.setattr(rawattn, "attention", lambda q, k, v, **kw: (good(q, k, v, **kw) * q.dtype.type(1.01)).astype(q.dtype))
    file = tmp_path / "x.json"
    result = run("bench", "prefill", "--head-dim", 16, "--heads", "16/16", "--seqlen", 64, "--batch", 1, "--full", "--json", file)
    assert result.exit_code == 1
    assert "bf16 16/16 D16 B1 S64 full         FAILED" in result.stdout
    assert "rawattn: wrong result: relative L2 error " in result.stdout
    (case,) = json.loads(file.read_text())["cases"]
    assert "us" not in case["rawattn"] and "ratio" not in case


@pytest.mark.parametrize("value", [1.02, math.nan])
def test_a_wrong_peer_is_left_out_of_the_ratios(lab: SimpleNamespace, tmp_path: Path, value: float) -> None:
    class Wrong(Peer):
        def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> peers.Call:
            return lambda: rawattn.attention(q, k, v, causal=causal) * q.dtype.type(value)

    lab.peers = [Wrong("fa3", 1.0), Peer("cudnn", 200.0)]
    file = tmp_path / "x.json"
    result = run("bench", "prefill", "--head-dim", 16, "--seqlen", 64, "--batch", 1, "--full", "--json", file)
    assert result.exit_code == 0, result.output
    assert "fa3: wrong result" in result.stdout and "fa3 -" in result.stdout
    (case,) = json.loads(file.read_text(), parse_constant=pytest.fail)["cases"]
    assert case["ratio"] == 2.0 and case["best_peer"] == "cudnn" and list(case["fa3"]) == ["error"]


def test_a_peer_that_refuses_a_shape_does_not_end_the_run(lab: SimpleNamespace) -> None:
    class Refusing(Peer):
        def prefill(self, q: Any, k: Any, v: Any, causal: bool) -> peers.Call:
            raise RuntimeError("head size not supported\nlong story")

    lab.peers = [Refusing("fa3", 1.0)]
    result = run("bench", "prefill", "--head-dim", 16, "--seqlen", 8, "--batch", 1)
    assert result.exit_code == 0
    assert "S8 full, fa3: head size not supported\n" in result.stdout and "long story" not in result.stdout


def test_ctrl_c_prints_and_writes_what_there_is(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good: Callable[[Shape], Any] = timing.inputs

    def interrupted(shape: Shape) -> Any:
        if shape.seqlen_q == 16:
            raise KeyboardInterrupt
        return good(shape)

    monkeypatch.setattr(timing, "inputs", interrupted)
    lab.peers = [Peer("fa3", 150.0)]
    file = tmp_path / "x.json"
    arguments = ["--head-dim", 16, "--batch", 1, "--full", "--seqlen", 8, "--seqlen", 16, "--seqlen", 32]
    result = run("bench", "prefill", *arguments, "--json", file, "--csv", tmp_path / "x.csv")
    assert result.exit_code == 130
    assert "Interrupted: 1 measured." in result.stdout and "geometric mean 1.500" in result.stdout
    report = json.loads(file.read_text())
    assert report["interrupted"] and len(report["cases"]) == 1 and report["geomean"] == 1.5
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3


# ---- overhead and coldstart


def test_overhead_times_the_calls_that_exist(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepared = []

    def prepare(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        prepared.append(causal)
        return lambda q, k, v, out: rawattn.attention(q, k, v, causal=causal, out=out)

    monkeypatch.setattr(rawattn, "prepare", prepare, raising=False)
    lab.peers = [Peer("fa3", 1.0)]
    file = tmp_path / "x.json"
    result = run("bench", "overhead", "--json", file)
    assert result.exit_code == 0, result.output
    cases = json.loads(file.read_text())["cases"]
    assert [x["what"] for x in cases] == [
        "cupy.empty",
        "an empty CuPy launch",
        "rawattn.attention, CuPy",
        "rawattn.attention, CuPy, out=",
        "rawattn.prepare, CuPy, out=",
        "fa3",
    ]
    assert all(x["us"] == 11 for x in cases) and prepared == [True]
    assert "rawattn.attention, CuPy" in result.stdout and "11.0 us" in result.stdout


def test_cold_starts_have_an_empty_folder_each_or_one_that_was_filled(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[bool, str]] = []

    def child(code: str, arguments: str, cache: str) -> float:
        calls.append(("cupy" in code, cache))
        return 0.25

    monkeypatch.setattr(bench, "child_seconds", child)
    file = tmp_path / "x.json"
    result = run("bench", "coldstart", "--model", "llama-3.1-8b", "--repeats", 3, "--json", file)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["variant"] == "attn_fwd_bf16_d128_gqa4_causal" and "CUDA_CACHE_DISABLE=1" in report["method"]
    assert [(x["what"], x["us"], x["samples"]) for x in report["cases"]] == [
        ("import rawattn", 250000, 3),
        ("first call, empty cache", 250000, 3),
        ("first call, filled cache", 250000, 3),
    ]
    assert [uses_gpu for uses_gpu, _ in calls] == [False] * 4 + [True] * 7
    empty, filled = calls[4:7], calls[7:]
    assert len({folder for _, folder in empty}) == 3 and len({folder for _, folder in filled}) == 1
    assert "250.0 ms" in result.stdout and "target 2000 ms" in result.stdout
    assert [x["target_us"] for x in report["cases"]] == [300_000, 2_000_000, 50_000]


def test_a_child_has_the_cache_and_the_rawattn_that_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, rawattn; print(len(os.environ['RAWATTN_CACHE_DIR']) + 100 * (os.environ['CUDA_CACHE_DISABLE'] == '1'))"
    monkeypatch.chdir(tmp_path)
    assert bench.child_seconds(code, "", "four") == 104
    with pytest.raises(bench.click.ClickException, match="a process of its own failed: ZeroDivisionError"):
        bench.child_seconds("1 / 0", "", "")


def test_import_is_measured_in_a_child() -> None:
    assert 0 < bench.child_seconds(bench._IMPORT, "", "") < 60
    compile(bench._FIRST_CALL, "first call", "exec")


# ---- peers


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    loaded, missing = peers.load(["fa3", "jax"])
    assert loaded == [] and missing == {"fa3": "torch is not installed", "jax": "jax is not installed"}


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "jax", None)
    loaded, missing = peers.load(["jax"])
    assert loaded == [] and "jax" in missing["jax"]


def test_every_peer_has_a_label_and_a_colour() -> None:
    assert set(plots.LABELS) == {"rawattn", *peers.PEERS} == set(plots.COLOURS)
    assert all(name == peer.name for name, peer in peers.PEERS.items())


# ---- plots


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
@pytest.mark.parametrize("command", ["prefill", "decode", "overhead"])
def test_plots_are_drawn(lab: SimpleNamespace, tmp_path: Path, command: str, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[plot]'")
    lab.peers = [Peer("fa3", 50.0)]
    file = tmp_path / f"x.{suffix}"
    shapes = [] if command == "overhead" else ["--head-dim", 16, "--seqlen", 8, "--seqlen", 16, "--batch", 2]
    result = run("bench", command, *shapes, "--plot", file)
    assert result.exit_code == 0, result.output
    content = file.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[suffix])
    if suffix == "html":
        assert content.count(b"<svg") == 1 and b"<?xml" not in content


def test_where_nothing_was_measured_nothing_is_drawn(lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[plot]'")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(timing, "inputs", refuse)
    file = tmp_path / "x.svg"
    result = run("bench", "prefill", "--head-dim", 16, "--seqlen", 8, "--full", "--plot", file)
    assert result.exit_code == 1 and not file.exists() and "rawattn: no memory" in result.stdout


def test_the_committed_plot_is_of_the_committed_run(tmp_path: Path) -> None:
    cases, where = bench_plot.read(bench_plot.RESULTS / "prefill_beside_peers.json")
    assert where.startswith("NVIDIA H100") and plots.implementations(cases) == ["rawattn", "cudnn", "fa3", "fa4"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[plot]'")
    figure = bench_plot.prefill(bench_plot.RESULTS / "prefill_beside_peers.json")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"D = {d}, {mask}" for mask in ("full", "causal") for d in (64, 128, 256)]
    heights = [bar.get_height() for bar in figure.axes[1].containers[0]]
    assert heights == [
        case["rawattn"]["tflops"]
        for case in sorted(cases, key=lambda x: x["seqlen"])
        if (case["dtype"], case["head_dim"], case["causal"]) == ("bf16", 128, False) and case["heads_q"] == case["heads_k"]
    ]
    for name in ("a.svg", "b.svg"):
        plots.save(bench_plot.prefill(bench_plot.RESULTS / "prefill_beside_peers.json"), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_json_lines_of_a_decode_run_are_read() -> None:
    shape: dict[str, Any] = {"section": "decode", "dt": "bf16", "B": 8, "Hq": 32, "Hk": 8, "S": 512, "D": 128, "causal": False}
    lines: list[dict[str, Any]] = [
        {"section": "meta", "device": "NVIDIA H100"},
        shape | {"peer": "rawattn", "us": 10.0, "gbps": 800.0},
        shape | {"peer": "fa3", "us": 20.0, "gbps": 400.0},
        shape | {"peer": "fa3b", "us": 16.0, "gbps": 500.0},
        shape | {"peer": "finfer", "error": "no"},
        shape | {"peer": "cudnn", "us": 16.0, "gbps": 500.0, "S": 2048},
    ]
    (first, second), where = bench_plot.from_lines(lines)
    assert where == "NVIDIA H100"
    assert first["rawattn"] == {"us": 10.0, "gbps": 800.0} and first["fa3"]["us"] == 16.0 and "flashinfer" not in first
    assert (second["seqlen"], second["batch"], second["cudnn"]["gbps"]) == (2048, 8, 500.0)


# ---- explain


def test_work_of_one_block_is_that_of_the_roofline_in_contributing() -> None:
    """128 x 128 scores at D = 128: 2048 cycles of MMA, 1024 of exponentials, on one SM."""
    shape = Shape("bf16", 1, 128, 128, 1, 1, 128, 128, causal=True)
    work = explain.work(shape, shape.spec)
    seconds = work.seconds(shape, 132)
    assert (work.tiles, work.pairs) == (1, 128 * 128)
    assert seconds["tensor cores"] * explain.HERTZ == pytest.approx(2048)
    assert seconds["exponential unit"] * explain.HERTZ == pytest.approx(1024)
    assert seconds["memory"] == pytest.approx(4 * 128 * 128 * 2 / 3.35e12)


def test_work_counts_the_blocks_that_a_mask_leaves() -> None:
    causal = Shape("bf16", 2, 1024, 1024, 3, 1, 128, 128, causal=True)  # tiles of 128 x 128: 1 + 2 + ... + 8 blocks
    assert explain.work(causal, causal.spec).pairs == 2 * 3 * 36 * 128 * 128
    window = Shape("bf16", 1, 1024, 1024, 1, 1, 128, 128, window=(127, 0))  # each tile sees its own block and the one before
    assert explain.work(window, window.spec).pairs == (1 + 7 * 2) * 128 * 128
    unseen = Shape("bf16", 1, 256, 128, 1, 1, 128, 128, causal=True)  # the first 128 queries see no key
    assert explain.work(unseen, unseen.spec).pairs == 128 * 128


def test_the_memory_bounds_what_has_few_flops_a_byte() -> None:
    shape = Shape("bf16", 32, 512, 512, 16, 16, 128, 128, causal=True)
    seconds = explain.work(shape, shape.spec).seconds(shape, 132)
    assert max(seconds, key=seconds.__getitem__) == "memory"  # as CONTRIBUTING says of 16384 tokens at S = 512


def test_explain_prints_the_variant_and_its_figures(no_gpu: None, compiles: list[KernelSpec]) -> None:
    result = run("explain", "--model", "llama-3.1-8b", "--causal", "--seqlen-q", 8192)
    assert result.exit_code == 0, result.output
    lines = {line[:18].strip(): line[18:] for line in result.stdout.splitlines()}
    spec = KernelSpec("bfloat16", 128, 128, 4, "causal")
    tile = tile_for(spec)
    assert compiles == [spec] and lines["variant"] == spec.name and lines["call"] == "bf16 32/8 D128 B1 S8192 causal"
    assert lines["tile"] == f"{tile.tile_m} queries x {tile.tile_n} keys: {tile.reason}"
    assert lines["shared memory"].startswith(f"{tile.shared_memory_bytes(spec):,} of 232,448")
    assert "168 at launch, 16 bytes spilled" in lines["registers"] and f"{tile.registers[1]} of a consumer" in lines["registers"]
    tiles = -(-8192 // tile.tile_m) * 32
    assert lines["grid"].startswith("132 CTAs on 132 SMs") and f"{tiles:,} tiles, {tiles / 132:.1f} for each" in lines["grid"]
    assert lines["FLOPs"].startswith(f"{4 * 128 * 32 * 8192 * 8193 / 2 / 1e9:,.2f} G")
    assert lines["bytes"].startswith(f"{2 * 8192 * 128 * 2 * (32 + 8) / 1e6:,.2f} MB")
    assert lines["predicted bound"].startswith("tensor cores, ")


def test_explain_of_few_queries_has_a_cta_for_each_tile(no_gpu: None, compiles: list[KernelSpec]) -> None:
    result = run("explain", "--head-dim", 64, "--gqa", 4, "--seqlen-q", 7, "--seqlen-k", 100, "--window", "64,-1", "--dtype", "fp16")
    assert "fp16 4/1 D64 B1 S7/100 window" in result.stdout and "split32" in result.stdout  # 7 queries of 4 heads
    result = run("explain", "--head-dim", 64, "--gqa", 4, "--seqlen-q", 100, "--causal")
    assert "fp16" not in result.stdout and "_short" in result.stdout and "4 CTAs on 132 SMs" in result.stdout


def test_explain_of_a_paged_decode_shows_packed_heads_and_splits(no_gpu: None, compiles: list[KernelSpec]) -> None:
    result = run("explain", "--model", "llama-3.1-8b", "--page-size", 48, "--batch", 2)
    assert result.exit_code == 0, result.output
    lines = {line[:18].strip(): line[18:] for line in result.stdout.splitlines()}
    spec = KernelSpec("bfloat16", 128, 128, 4, "full", True, 8, page_rows=16, cluster=True)  # the only query sees all keys
    tile = tile_for(spec)
    assert compiles == [spec] and lines["call"] == "bf16 32/8 D128 B2 S1/4096 causal pages of 48"
    assert lines["tile"].startswith(f"8 rows, 2 queries of 4 heads each, x {tile.tile_n} keys")
    splits = splits_of_a_tile(tile, 8, 4096 // tile.tile_n)  # a tile for each KV head
    assert lines["splits"].startswith(f"of {4096 // splits} keys") and lines["pages"] == "of 48 keys, 16 loaded at a time"
    assert lines["grid"].startswith("128 CTAs, 8 a cluster, on 132 SMs")
    assert f"16 tiles of {splits} splits" in lines["grid"]
    assert lines["predicted bound"].startswith("memory, 3,350 GB/s")


def test_explain_of_many_sequences_has_no_cluster(no_gpu: None, compiles: list[KernelSpec]) -> None:
    result = run("explain", "--model", "llama-3.1-8b", "--kv-cache", "--batch", 64)
    assert compiles == [KernelSpec("bfloat16", 128, 128, 4, "full", True, 8)]
    assert "264 CTAs on 132 SMs" in result.stdout and "cluster" not in result.stdout


def test_a_cache_in_pages_holds_whole_ones() -> None:
    shape = Shape("bf16", 1, 1, 300, 8, 8, 128, 128, causal=True, cache=True)
    (spec, size), (paged, size_of_paged) = (explain.launched(replace(shape, page_size=n), 132) for n in (0, 4096))
    assert size == 4 < size_of_paged and (spec.page_rows, paged.page_rows) == (0, 64)


@pytest.mark.parametrize(("rows_q", "page_size", "mask"), [(1, 0, "causal"), (1, 48, "causal"), (3, 16, "window"), (4000, 16, "full")])
def test_a_cache_is_served_by_the_variant_that_explain_shows(
    monkeypatch: pytest.MonkeyPatch, rows_q: int, page_size: int, mask: str
) -> None:
    used: list[KernelSpec] = []
    monkeypatch.setattr(launch, "Plan", lambda spec, *arrays, **options: used.append(spec))
    causal, window = mask == "causal", (7, 0) if mask == "window" else None
    shape = Shape("fp16", 2, rows_q, 4800, 8, 2, 128, 64, causal, window, cache=True, page_size=page_size)
    k, v = (np.zeros((200, page_size or 4800, 2, dim), np.float16) for dim in (128, 64))
    views = {"q": np.zeros((2, rows_q, 8, 128), np.float16), "k_cache": k, "v_cache": v, "cache_seqlens": np.zeros(2, np.int32)}
    if page_size:
        views["page_table"] = np.zeros((2, 4800 // page_size), np.int32)
    left, right = window_bounds(causal, window)
    arrays = {name: view(name, x) for name, x in views.items()}
    launch.CachePlan(arrays, arrays["q"], left=left, right=right, scale=1.0, interleaved=False)
    assert used == [shape.spec]


def test_explain_without_nvrtc_says_so_and_goes_on(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: KernelSpec) -> Any:
        raise compiler.UnsupportedEnvironment("The NVRTC library cannot be loaded")

    monkeypatch.setattr(compiler, "compile_cubin", missing)
    result = run("explain", "--head-dim", 64)
    assert result.exit_code == 0
    assert "not compiled: The NVRTC library cannot be loaded" in result.stdout and "predicted bound" in result.stdout


def test_source_is_that_of_the_compiler() -> None:
    result = run("explain", "--head-dim", 64, "--gqa", 4, "--source")
    assert result.stdout == compiler.source(KernelSpec("bfloat16", 64, 64, 4, "full")) + "\n"
    result = run("explain", "--head-dim", 64, "--gqa", 4, "--kv-cache", "--source")
    assert result.stdout == compiler.source(KernelSpec("bfloat16", 64, 64, 4, "full", True, 8, cluster=True, alone=True)) + "\n"


def test_sass_comes_from_the_disassembler(compiles: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "cuobjdump"
    tool.write_text('#!/bin/sh\n[ "$1" = --dump-sass ] && head -c 16 "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(explain, "_find", {"cuobjdump": str(tool)}.get)
    result = run("explain", "--head-dim", 64, "--sass")
    assert result.exit_code == 0 and "ELF attn_fwd" in result.output
    monkeypatch.setattr(explain, "_find", lambda name: None)
    result = run("explain", "--head-dim", 64, "--sass")
    assert result.exit_code == 1 and "No disassembler is installed (nvdisasm, cuobjdump)" in result.stderr


def test_a_disassembler_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvdisasm"
    tool.touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert explain._find("nvdisasm") == str(tool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Give --head-dim, or --model."),
        ("--gqa 4", "Give --head-dim, or --model."),
        ("--head-dim 64 --gqa 4 --heads 8/2", "Give --heads or --gqa, not both."),
        ("--head-dim 64 --source --sass", "Give --source or --sass, not both."),
        ("--head-dim 64 --window 3", "'3' is not LEFT,RIGHT; needed: two integers, as in 1024,0"),
        ("--head-dim 64 --window -2,0", "'-2,0' is below -1; needed: integers from 0 up, or -1 for unbounded"),
    ],
)
def test_explain_usage_errors(arguments: str, message: str) -> None:
    result = run("explain", *arguments.split())
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].endswith(message)
