"""The command line, on the reference path, and the rule by which `rawattn check` judges."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import rawattn
from rawattn import compiler
from rawattn.cli import check, main

attention = rawattn.attention
with_cache = rawattn.attention_with_kvcache


@pytest.fixture
def no_gpu(monkeypatch):
    def refuse():
        raise compiler.UnsupportedEnvironment("No GPU in this test")

    monkeypatch.setattr(compiler, "current_device", refuse)


def run(*arguments):
    return CliRunner().invoke(main, [str(x) for x in arguments])


# ---- the rule


@pytest.mark.parametrize(("dtype", "limit"), [(np.float16, 4.9e-4), (ml_dtypes.bfloat16, 3.9e-3)])
def test_rounding_itself_passes_with_the_limits_of_the_dtype(dtype, limit):
    expected = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 40, 2, 64))
    figures = check.judge("x", expected.astype(dtype), expected)
    assert figures.passed
    assert figures.max_limit == limit
    assert figures.rel_l2_limit == pytest.approx(1.5 * figures.rel_l2)


def test_larger_numbers_may_err_by_a_quarter_more_than_rounding():
    expected = np.random.default_rng(1).normal(0, 100, (1, 40, 2, 64))
    figures = check.judge("x", expected.astype(np.float16), expected)
    assert figures.max_limit == pytest.approx(1.25 * figures.max_error) and figures.max_limit > 0.01


@pytest.mark.parametrize(("wrong_way", "passes"), [(150, True), (160, False)])
def test_relative_l2_may_be_half_more_than_rounding(wrong_way, passes):
    """Numbers a quarter ulp above a float16: with a share f rounded up, the relative L2 error is sqrt(1 + 8 f) times that of rounding."""
    steps = np.arange(1024, 2024).reshape(1, 1000, 1, 1)
    expected = (steps + 0.25) * 2**-20  # far below the limit of the largest difference
    out = (steps + (np.arange(1000) < wrong_way).reshape(steps.shape)) * 2**-20
    assert check.judge("x", out.astype(np.float16), expected).passed is passes


def test_one_element_far_off_fails_though_the_l2_error_is_small():
    expected = np.random.default_rng(3).uniform(1, 1.9, (1, 1000, 8, 64))
    out = expected.astype(np.float16)
    out[0, 500, 3, 7] += 0.01
    figures = check.judge("x", out, expected)
    assert figures.rel_l2 < figures.rel_l2_limit and not figures.passed


def test_where_rounding_is_exact_so_must_the_output_be():
    expected = np.random.default_rng(4).standard_normal((1, 1, 4, 64)).astype(np.float16).astype(np.float64)
    out = expected.astype(np.float16)
    assert check.judge("x", out, expected).passed
    out[0, 0, 0, 0] = np.nextafter(out[0, 0, 0, 0], np.float16(9))
    assert not check.judge("x", out, expected).passed


def test_nan_fails_and_another_shape_is_an_error():
    expected = np.zeros((1, 2, 3, 8))
    out = expected.astype(np.float16)
    with pytest.raises(ValueError, match=r"x: the output has shape \(1, 2, 1, 8\)"):
        check.judge("x", out[:, :, :1], expected)
    out[0, 0, 0, 0] = math.nan
    assert not check.judge("x", out, expected).passed


# ---- rawattn check


def test_every_scenario_but_the_timed_one_passes_on_the_reference(no_gpu):
    result = run("check", *check.SCENARIOS, "qwen-2.5-7b")
    assert result.exit_code == 0, result.output
    assert "No GPU in this test" in result.output and "Checking the NumPy reference instead" in result.output
    assert "14 of 15 scenarios passed (1 skipped), 1 of 1 model geometries passed" in result.output
    assert result.output.count("skipped timing needs a GPU") == 2


def test_the_scenarios_of_the_issue():
    assert len(check.SCENARIOS) == 15
    assert check.GQA_RATIOS == ((32, 32), (32, 16), (32, 8), (32, 4), (32, 1), (28, 4))
    assert check.HEADS == (8, 16, 28, 32, 64, 96, 128)


def test_json_has_every_figure(no_gpu, tmp_path):
    file = tmp_path / "check.json"
    result = run("check", "s-32", "gqa-memory", "--seed", 3, "--json", file)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert (report["passed"], report["computed_by"], report["seed"]) == (True, "reference", 3)
    assert report["machine"]["rawattn"] == rawattn.__version__ and report["machine"]["numpy"] == np.__version__
    assert [(x["scenario"], x["dtype"]) for x in report["scenarios"]] == [
        (name, dtype) for name in ("s-32", "gqa-memory") for dtype in ("fp16", "bf16")
    ]
    first = report["scenarios"][0]
    assert [x["case"] for x in first["cases"]] == ["full", "causal"]
    assert all(0 < x["rel_l2"] < x["rel_l2_limit"] and 0 < x["max_error"] < x["max_limit"] for x in first["cases"])
    assert report["scenarios"][2]["note"] == "K/V 1,048,576 bytes at 32/8, 4,194,304 at 32/32"


def test_inputs_depend_on_the_seed_and_not_on_the_selection(no_gpu, tmp_path):
    def figures(*arguments):
        file = tmp_path / "check.json"
        run("check", *arguments, "--json", file)
        return next(x["cases"] for x in json.loads(file.read_text())["scenarios"] if x["scenario"] == "s-32")

    assert figures("s-32") == figures("cache-256", "s-32")
    assert figures("s-32") != figures("s-32", "--seed", 1)


def leak_the_next_key(q, k, v, causal=False):
    """A mask that is off by one: row i sees key i + 1 as well."""
    return attention(q, k, v, window=(-1, 1)) if causal else attention(q, k, v)


def write_one_row_too_many(q, k_cache, v_cache, k, v, cache_seqlens):
    v_cache[:, cache_seqlens[0] + k.shape[1]] = 0
    return with_cache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)


WRONG: dict[str, tuple[Any, str]] = {
    "a percent off": (lambda q, k, v, **kw: (attention(q, k, v, **kw) * q.dtype.type(1.01)).astype(q.dtype), "s-32"),
    "truncated, not rounded": (lambda q, k, v, **kw: (attention(q, k, v, **kw).view(np.uint16) & 0xFFFE).view(q.dtype), "s-32"),
    "NaN": (lambda q, k, v, **kw: attention(q, k, v, **kw) * q.dtype.type(math.nan), "s-32"),
    "an off-by-one mask": (leak_the_next_key, "causal-structure"),
    "no mask": (lambda q, k, v, causal=False: attention(q, k, v), "causal-full"),
    "the wrong head of a group": (lambda q, k, v, **kw: attention(q[:, :, ::-1], k, v, **kw)[:, :, ::-1], "gqa-broadcast"),
}
WRONG_WITH_CACHE: dict[str, tuple[Any, str]] = {
    "no mask among the new tokens": (lambda *arrays, **kw: with_cache(*arrays, **kw, causal=False), "cache-causal"),
    "nothing is appended": (lambda q, k_cache, v_cache, k, v, **kw: with_cache(q, k_cache, v_cache, **kw), "cache-steps"),
    "one row too many": (write_one_row_too_many, "cache-256"),
}


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_WITH_CACHE])
def test_a_wrong_result_fails(no_gpu, monkeypatch, tmp_path, wrong):
    function, scenario = WRONG[wrong] if wrong in WRONG else WRONG_WITH_CACHE[wrong]
    monkeypatch.setattr(rawattn, "attention" if wrong in WRONG else "attention_with_kvcache", function)
    file = tmp_path / "check.json"
    result = run("check", scenario, "--json", file)
    assert result.exit_code == 1, result.output
    assert "FAIL" in result.output and "0 of 1 scenarios passed" in result.output
    report = json.loads(file.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert not report["passed"] and report["scenarios"][0]["result"] == "FAIL"


def test_a_second_call_with_other_bits_fails(no_gpu, monkeypatch):
    calls = []

    def unsteady(q, k, v, **kw):
        calls.append(attention(q, k, v, **kw))
        if len(calls) % 2 == 0:
            calls[-1].view(np.uint16)[0, 0, 0, 0] ^= 1
        return calls[-1]

    monkeypatch.setattr(rawattn, "attention", unsteady)
    result = run("check", "first-call")
    assert result.exit_code == 1 and "the second call differs from the first" in result.output


def test_an_error_in_one_scenario_does_not_hide_the_others(no_gpu, monkeypatch):
    def refuse_dim_72(q, k, v, **kw):
        if q.shape[3] == 72:
            raise compiler.CompileError("no such kernel")
        return attention(q, k, v, **kw)

    monkeypatch.setattr(rawattn, "attention", refuse_dim_72)
    result = run("check", "first-call", "s-32")
    assert result.exit_code == 1
    assert "CompileError: no such kernel" in result.output and "1 of 2 scenarios passed" in result.output


@pytest.mark.parametrize("arguments", [["nonsense"], ["--json", "/nonexistent/folder/x.json"], ["--seed", "-1"], ["--frob"]])
def test_usage_errors(arguments):
    assert run("check", *arguments).exit_code == 2


def test_the_first_call_leaves_the_environment_alone(no_gpu, monkeypatch, tmp_path):
    folders = []

    def watched(*arguments):
        folders.append(compiler.cache_dir())
        return attention(*arguments)

    monkeypatch.setattr(rawattn, "attention", watched)
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(tmp_path))
    assert run("check", "first-call").exit_code == 0
    assert folders[0] != tmp_path and folders[1] == tmp_path == compiler.cache_dir()


@pytest.mark.parametrize("command", [[], ["check"], ["info"]])
def test_help_fits_a_screen(command):
    lines = run(*command, "-h").output.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.gpu
def test_check_passes_on_the_gpu():
    result = run("check")
    assert result.exit_code == 0, result.output
    assert "15 of 15 scenarios passed, 4 of 4 model geometries passed" in result.output


# ---- rawattn info


def test_version():
    assert run("--version").output == f"rawattn, version {rawattn.__version__}\n"


def test_info_counts_the_cache(monkeypatch, tmp_path):
    (tmp_path / "a.cubin").write_bytes(bytes(1000))
    (tmp_path / "b.cubin").write_bytes(bytes(500))
    (tmp_path / "b.cubin.tmp").write_bytes(bytes(7))
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(tmp_path))
    assert f"{tmp_path}: 2 cubins, 1,500 bytes" in run("info").output
    assert json.loads(run("info", "--json").output)["cache"] == {"folder": str(tmp_path), "cubins": 2, "bytes": 1500}


def test_info_of_a_folder_that_does_not_exist_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(tmp_path / "none"))
    assert "none: 0 cubins, 0 bytes" in run("info").output


def test_info_says_what_is_missing(no_gpu, monkeypatch):
    def missing():
        raise compiler.UnsupportedEnvironment("The NVRTC library cannot be loaded")

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    result = run("info")
    assert result.exit_code == 0
    assert "GPU      none: No GPU in this test\n" in result.output
    assert "NVRTC    none: The NVRTC library cannot be loaded\n" in result.output
    facts = json.loads(run("info", "--json").output)
    assert facts["gpu"] is None and facts["problems"]["gpu"] == "No GPU in this test"
