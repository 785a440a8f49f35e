"""`rawattn warmup` and `rawattn cache`: what they compile, carry and remove, and what they refuse."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rawattn import compiler
from rawattn.cli import explain, main, models, warmup
from rawattn.cli.shapes import Shape
from rawattn.compiler import CompileError, UnsupportedEnvironment
from rawattn.spec import AppendSpec, KernelSpec

SPEC = KernelSpec("bfloat16", 128, 128, 4, "causal")
OTHER = KernelSpec("float16", 64, 64, 1, "full", varlen=True)


def run(*arguments: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(x) for x in arguments], **kwargs)


@pytest.fixture
def compiles(compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """As everywhere, and processes replaced by threads, which see the stand-in."""
    monkeypatch.setattr(warmup, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    return compiles


# ---- warmup


def test_a_model_is_its_geometry_in_both_dtypes_masks_and_all_layouts(compiles: list[KernelSpec], folder: Path) -> None:
    result = run("warmup", "--model", "qwen-2.5-7b")
    assert result.exit_code == 0, result.output
    ways: tuple[dict[str, bool], ...] = ({}, {"cluster": True}, {"alone": True}, {"cluster": True, "alone": True})
    split = [(True, rows, how) for rows, of_rows in ((8, ways), (16, ways), (32, ways[:2]), (64, ways[:2])) for how in of_rows]
    expected = {
        KernelSpec(dtype, 128, 128, 7, mask, varlen, rows, **how)
        for dtype in ("float16", "bfloat16")
        for mask in ("causal", "full")
        for varlen, rows, how in ((False, 0, {}), (True, 0, {}), *split, (True, 128, {}))
    } | {AppendSpec("float16"), AppendSpec("bfloat16")}
    assert set(compiles) == expected and len(compiles) == 62
    assert f"62 compiled, 0 cached; {folder}\n" in result.stdout
    for spec in expected:
        assert any(line.split()[0] == spec.name and line.endswith(" s") for line in result.stdout.splitlines()[:62])


def test_a_page_size_adds_the_kernels_that_look_pages_up(compiles: list[KernelSpec]) -> None:
    assert run("warmup", "--head-dim", 192, "--head-dim-v", 128, "--gqa", 2, "--dtype", "bf16", "--mask", "causal").exit_code == 0
    del compiles[:]
    arguments = "warmup --head-dim 192 --head-dim-v 128 --gqa 2 --dtype bf16 --mask causal --page-size 96".split()
    result = run(*arguments)
    assert result.exit_code == 0 and "10 compiled, 12 cached" in result.stdout
    variants = [
        *(("causal", rows, False) for rows in (0, 8, 16, 32, 64)),
        *(("causal", rows, True) for rows in (8, 16, 32)),
        *(("full", 8, cluster) for cluster in (False, True)),
    ]  # 96 rows are cut into pieces that blocks of 128 or of 64 keys consist of
    assert set(compiles) == {KernelSpec("bfloat16", 192, 128, 2, mask, True, rows, 32, cluster=cluster) for mask, rows, cluster in variants}


def test_models_that_share_a_geometry_share_kernels(compiles: list[KernelSpec]) -> None:
    arguments = [x for name in models.GEOMETRIES for x in ("--model", name)]
    assert run("warmup", *arguments).exit_code == 0
    assert len(compiles) == len(set(compiles)) == 60 + 60 + 44 + 2  # a pack of 12 heads has no tile of 8 rows
    assert {spec.gqa_ratio for spec in compiles if isinstance(spec, KernelSpec)} == {4, 7, 12}


def test_options_choose_one_variant_and_the_second_time_it_is_cached(compiles: list[KernelSpec]) -> None:
    arguments = "warmup --head-dim 192 --head-dim-v 128 --gqa 1 --dtype bf16 --mask window --varlen".split()
    assert "1 compiled, 0 cached" in run(*arguments).stdout
    result = run(*arguments)
    assert result.exit_code == 0 and "0 compiled, 1 cached" in result.stdout
    assert result.stdout.splitlines()[0].split() == ["attn_fwd_bf16_d192_dv128_gqa1_window_varlen", "cached"]
    assert compiles == [KernelSpec("bfloat16", 192, 128, 1, "window", varlen=True)]


def test_one_that_fails_is_named_and_the_others_are_kept(compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_bf16(spec: KernelSpec, good: Callable[[KernelSpec], Any] = compiler.compile_cubin) -> Any:
        if spec.dtype == "bfloat16":
            raise CompileError(f"NVRTC 12.9 cannot compile {spec.name}: no")
        return good(spec)

    monkeypatch.setattr(compiler, "compile_cubin", fail_on_bf16)
    result = run("warmup", "--head-dim", 128, "--gqa", 4, "--mask", "causal", "--dense")
    assert result.exit_code == 1
    assert f"{SPEC.name:<52}   FAILED\n" in result.stdout
    assert "14 compiled, 0 cached, 14 failed;" in result.stdout
    assert "Error: NVRTC 12.9 cannot compile attn_fwd_bf16_d128_gqa4_causal: no\n" in result.stderr
    assert compiler.is_cached(KernelSpec("float16", 128, 128, 4, "causal"))


def test_no_jit_proves_that_nothing_is_missing(compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "warmup --head-dim 128 --gqa 4 --dtype bf16 --dense --mask causal".split()
    assert run(*arguments).exit_code == 0
    monkeypatch.setenv("RAWATTN_NO_JIT", "1")
    built = [*compiles]
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--mask", "full")
    assert result.exit_code == 1 and "attn_fwd_bf16_d128_gqa4_full is not in" in result.stderr and "RAWATTN_NO_JIT=1" in result.stderr
    assert compiles == built


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("mask", ["causal", "full", "window"])
def test_attention_of_any_length_finds_its_kernel(compiles: list[KernelSpec], head_dim: int, mask: str) -> None:
    assert run("warmup", "--head-dim", head_dim, "--gqa", 4, "--dtype", "fp16", "--mask", mask, "--dense").exit_code == 0
    causal, window = mask == "causal", (7, 0) if mask == "window" else None
    lengths = [(rows, keys) for rows in (1, 3, 7, 12, 20, 100, 1024, 1025, 5000) for keys in (1, 100, 5000, 50000)]
    shapes = [Shape("fp16", batch, *length, 8, 2, head_dim, head_dim, causal, window) for batch in (2, 7, 64, 70) for length in lengths]
    used = {explain.launched(shape, 132)[0] for shape in shapes}
    assert used == set(compiles)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "Give --model, or --head-dim and --gqa."),
        ("--head-dim 128", "Give --model, or --head-dim and --gqa."),
        ("--model mistral-7b --gqa 4", "Give --model, or --head-dim and --gqa."),
        ("--head-dim 100 --gqa 4", "head_dim is 100; needed: a multiple of 8 from 8 to 256."),
        ("--head-dim 128 --gqa 0", "gqa_ratio is 0; needed: 1 or more"),
        ("--model gpt-9", "'gpt-9' is not one of"),
        ("--model mistral-7b --mask tree", "'tree' is not one of"),
        ("--model mistral-7b --page-size 0", "0 is not in the range x>=1"),
        ("--model mistral-7b --page-size 16 --dense", "Give --page-size without --varlen and --dense"),
    ],
)
def test_usage_errors(compiles: list[KernelSpec], arguments: str, sentence: str) -> None:
    result = run("warmup", *arguments.split())
    assert result.exit_code == 2 and sentence in result.stderr and compiles == []


def test_an_environment_that_lacks_something_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UnsupportedEnvironment("The NVRTC library cannot be loaded")

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    result = run("warmup", "--model", "mistral-7b")
    assert result.exit_code == 1 and result.stderr == "Error: The NVRTC library cannot be loaded\n"


def test_a_real_kernel_in_a_real_process(folder: Path) -> None:
    try:
        compiler.nvrtc_version()
    except UnsupportedEnvironment as error:
        pytest.skip(str(error))
    result = run("warmup", "--head-dim", 64, "--gqa", 1, "--dtype", "bf16", "--mask", "full", "--varlen")
    assert result.exit_code == 0, result.output
    assert "1 compiled, 0 cached" in result.stdout and "keeps it for the next time" not in result.stderr
    (path,) = folder.iterdir()
    assert compiler.is_cache_file(path) and path.read_bytes().startswith(b"\x7fELF")
    assert compiler.is_cached(KernelSpec("bfloat16", 64, 64, 1, "full", varlen=True))


# ---- list and clear


@pytest.fixture
def mixed(compiles: list[KernelSpec], folder: Path) -> dict[str, Path]:
    """A cache with a valid cubin, a damaged one, what a killed process leaves, and things that are not rawattn's."""
    good, damaged = compiler.build(SPEC), compiler.build(OTHER)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    unfinished = Path(f"{good}ab_cd012.tmp")
    unfinished.write_bytes(b"half")
    foreign = {name: folder / name for name in ("notes.txt", "mine.cubin", "mine.tmp", good.name.replace("gqa4", "gqa5"), "a_folder")}
    for name in ("notes.txt", "mine.cubin", "mine.tmp"):
        foreign[name].write_bytes(b"keep me")
    foreign[good.name.replace("gqa4", "gqa5")].symlink_to(good)
    foreign["a_folder"].mkdir()
    return {"good": good, "damaged": damaged, "unfinished": unfinished, **foreign}


def test_temporary_names_are_recognised(compiles: list[KernelSpec], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that mkstemp makes are those that `clear` looks for."""
    seen: list[bool] = []

    def replace(source: str, target: Path) -> None:
        seen.append(compiler.is_cache_file(Path(source)))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    compiler.build(SPEC)
    assert seen == [True]


def test_list_marks_what_is_not_a_valid_cubin(mixed: dict[str, Path], folder: Path) -> None:
    os.utime(mixed["good"], (0, mixed["good"].stat().st_mtime - 7200))
    result = run("cache", "list")
    assert result.exit_code == 0
    size = mixed["good"].stat().st_size
    lines = {line.split()[0]: line.split(maxsplit=4)[1:] for line in result.stdout.splitlines()[:-1]}
    assert lines[mixed["good"].name] == [f"{size:,}", "2", "h"]
    marks = {key: lines[path.name][3:] for key, path in mixed.items()}
    assert marks["good"] == [] and marks["damaged"] == ["damaged"] and marks["unfinished"] == ["unfinished"]
    assert all(marks[key] == ["not rawattn's"] for key in marks if key not in ("good", "damaged", "unfinished"))
    assert result.stdout.endswith(f"\n1 cubins, {size:,} bytes in {folder}\n")


def test_clear_removes_ours_and_leaves_the_rest(mixed: dict[str, Path]) -> None:
    ours = {key: mixed[key] for key in ("good", "damaged", "unfinished")}
    total = sum(path.stat().st_size for path in ours.values())
    result = run("cache", "clear", "--yes")
    assert result.exit_code == 0 and f"removed 3 files, {total:,} bytes" in result.stdout
    for key, path in mixed.items():
        assert os.path.lexists(path) is (key not in ours), key


@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("", 1), ("y\n", 0)])
def test_clear_asks(compiles: list[KernelSpec], answer: str, status: int) -> None:
    path = compiler.build(SPEC)
    result = run("cache", "clear", input=answer)
    assert "Remove 1 files" in result.stdout and result.exit_code == status and path.exists() is bool(status)


def test_an_empty_cache(folder: Path, tmp_path: Path) -> None:
    assert run("cache", "list").stdout == f"0 cubins, 0 bytes in {folder}\n"
    assert run("cache", "clear").stdout == f"removed 0 files, 0 bytes, from {folder}\n"
    result = run("cache", "export", tmp_path / "kernels.tar")
    assert result.exit_code == 1 and "holds no valid cubins to export: run rawattn warmup first" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_can_write_to_is_refused(compiles: list[KernelSpec], folder: Path, tmp_path: Path) -> None:
    path = compiler.build(SPEC)
    assert run("cache", "export", tmp_path / "kernels.tar").exit_code == 0
    path.unlink()
    folder.chmod(0o777)
    for arguments in (("list",), ("export", tmp_path / "x.tar"), ("import", tmp_path / "kernels.tar"), ("clear", "--yes")):
        result = run("cache", *arguments)
        assert result.exit_code == 1 and "can be written by others: chmod 700 it" in result.stderr
    assert not path.exists() and not (tmp_path / "x.tar").exists()


# ---- export and import


def test_round_trip_of_what_is_valid(mixed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "kernels.tar"
    assert "exported 1 cubins" in run("cache", "export", tar).stderr
    with tarfile.open(tar) as archive:
        assert archive.getnames() == [mixed["good"].name]
    elsewhere = tmp_path / "elsewhere" / "cache"
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(elsewhere))
    result = run("cache", "import", tar)
    assert result.exit_code == 0 and "imported 1 cubins" in result.stdout
    (path,) = elsewhere.iterdir()
    assert path.name == mixed["good"].name and path.read_bytes() == mixed["good"].read_bytes()
    assert elsewhere.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("RAWATTN_NO_JIT", "1")
    assert compiler.build(SPEC) == path


def test_the_same_kernels_give_the_same_bytes_also_through_a_pipe(compiles: list[KernelSpec], folder: Path, tmp_path: Path) -> None:
    files = [compiler.build(SPEC), compiler.build(OTHER)]
    piped = run("cache", "export", "-").stdout_bytes
    for path in files:
        os.utime(path, (0, 0))
    run("cache", "export", tmp_path / "kernels.tar")
    assert (tmp_path / "kernels.tar").read_bytes() == piped
    run("cache", "clear", "--yes")
    assert "imported 2 cubins" in run("cache", "import", "-", input=piped).stdout
    assert all(path.exists() for path in files)


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def sealed(name: str) -> bytes:
    cubin = b"\x7fELF hostile"
    return cubin + compiler._seal(Path(name), cubin)


KEY = "0123456789abcdef0123"
NAME = f"attn_fwd_bf16_d64_gqa1_full.{KEY}.cubin"
HOSTILE = {
    "path traversal": (member(f"../{NAME}", sealed(NAME)), "does not have the name of a cubin"),
    "absolute path": (member(f"/tmp/{NAME}", sealed(NAME)), "does not have the name of a cubin"),
    "folder": (member(NAME, type=tarfile.DIRTYPE), "is not a plain file"),
    "symlink": (member(NAME, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain file"),
    "hard link": (member(NAME, type=tarfile.LNKTYPE, linkname=f"a.{KEY}.cubin"), "is not a plain file"),
    "device": (member(NAME, type=tarfile.CHRTYPE), "is not a plain file"),
    "foreign file": (member("setup.py", sealed("setup.py")), "does not have the name of a cubin"),
    "temporary file": (member(f"{NAME}ab_cd012.tmp", sealed(f"{NAME}ab_cd012.tmp")), "does not have the name of a cubin"),
    "escape sequence": (member(f"\x1b[2J.{KEY}.cubin"), r"The member '\x1b[2J."),
    "no seal": (member(NAME, b"\x7fELF" * 100), "is damaged, or no cubin of rawattn"),
    "another's seal": (member(NAME, sealed(f"a.{KEY}.cubin")), "is damaged, or no cubin of rawattn"),
    "empty": (member(NAME), "is damaged, or no cubin of rawattn"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_member_is_refused_and_nothing_is_written(folder: Path, tmp_path: Path, hostile: str) -> None:
    (info, data), sentence = HOSTILE[hostile]
    good = member(f"a.{KEY}.cubin", sealed(f"a.{KEY}.cubin"))
    with tarfile.open(tmp_path / "kernels.tar", "w") as tar:
        for each, content in (good, (info, data)):
            tar.addfile(each, io.BytesIO(content))
    result = run("cache", "import", tmp_path / "kernels.tar")
    assert result.exit_code == 1 and sentence in result.stderr and "\x1b" not in result.stderr
    assert result.stderr.endswith("; nothing is imported\n") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.tar"]


def test_a_tar_of_good_members_is_not_refused() -> None:
    """The stand-ins of the hostile test differ from this one in one thing each."""
    assert compiler.is_cubin_name(NAME) and compiler.is_sealed(NAME, sealed(NAME))


def test_what_is_no_tar_is_refused(compiles: list[KernelSpec], folder: Path, tmp_path: Path) -> None:
    compiler.build(SPEC)
    tar = tmp_path / "kernels.tar"
    run("cache", "export", tar)
    run("cache", "clear", "--yes")
    for content in (b"", b"x" * 5000, tar.read_bytes()[:700]):
        tar.write_bytes(content)
        result = run("cache", "import", tar)
        assert result.exit_code == 1 and "is not an uncompressed tar archive" in result.stderr
        assert list(folder.iterdir()) == []
    assert run("cache", "import", tmp_path / "none.tar").exit_code == 2


def test_an_export_that_cannot_be_written_is_one_sentence(compiles: list[KernelSpec], tmp_path: Path) -> None:
    compiler.build(SPEC)
    for target, reason in (("/dev/full", "No space left on device"), (tmp_path / "none" / "x.tar", "No such file or directory")):
        result = run("cache", "export", target)
        assert result.exit_code == 1 and reason in result.stderr and "Traceback" not in result.output


# ---- help


@pytest.mark.parametrize("command", ["warmup", "cache", "cache list", "cache clear", "cache export", "cache import"])
def test_help_fits_a_screen_and_has_an_example(command: str) -> None:
    lines = run(*command.split(), "-h").output.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert any(line.strip().startswith(f"rawattn {command}") for line in lines)
