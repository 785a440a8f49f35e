"""The JIT without a GPU: cache key, cache files under races, kills and strangers, switches, environment errors; and how arguments lie."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from rawattn import compiler
from rawattn.compiler import CompileError, CompileReport, UnsupportedEnvironment
from rawattn.launch import APPEND_ARGUMENTS, ARGUMENTS
from rawattn.spec import KernelSpec

SPEC = KernelSpec("bfloat16", 128, 128, 4, "causal")
OTHER = KernelSpec("float16", 64, 64, 1, "full")

# A process that builds SPEC with a stand-in for NVRTC, which returns bytes that tell this process from the others.
CHILD = """
import os, sys, time
from rawattn import compiler
from rawattn.spec import KernelSpec
compiler.nvrtc_version = lambda: (12, 9)
compiler.compile_cubin = lambda spec: (os.getpid().to_bytes(4, "little") * 250_000, compiler.CompileReport(0.1, 168, 0, 0, (), ""))
{before}
compiler.build(KernelSpec("bfloat16", 128, 128, 4, "causal"))
"""


def child(before: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD.format(before=before)], stdout=subprocess.PIPE, text=True)


# ---- source and key


def test_source_is_self_contained_and_includes_each_header_once() -> None:
    headers = {path.name for path in compiler.CUDA_SRC.glob("*.cuh")}
    few_rows = [(KernelSpec("bfloat16", 128, 128, 4, "full", True, rows), others) for rows, others in ((8, {"rows.cuh"}), (64, set()))]
    for spec, others in ((SPEC, {"cluster.cuh", "decode.cuh", "queries.cuh"}), *few_rows):
        text = compiler.source(spec)
        assert "#include" not in text and "#pragma once" not in text
        assert all(text.count(f'#line 1 "{name}"') == (name not in others) for name in headers)
        assert re.search(rf'extern "C" __global__.*\b{Path(compiler.main_file(spec)).stem}\(', text)


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize("n, steps", [(8, 16), (176, 1), (256, 5)])
def test_wgmma_wrapper_counts_its_operands(n: int, steps: int, a_in_registers: bool) -> None:
    text = compiler._wgmma("f", n, steps, "bf16", "1, 1, 0, 0", a_in_registers)
    assert text.count('"+f"') == n // 2
    assert text.count(f"m64n{n}k16.f32.bf16.bf16") == steps
    last = n // 2 + steps * (5 if a_in_registers else 2)
    operands = [int(i) for i in re.findall(r"%(\d+)", text)]
    assert f"setp.ne.b32 first, %{last}, 0" in text
    assert [operands.count(i) for i in range(max(operands) + 1)] == n // 2 * [steps] + (last + 1 - n // 2) * [1]
    assert text.count(", first, ") == 1 and text.count(", later, ") == steps - 1


def test_key_changes_with_source_options_and_nvrtc_version() -> None:
    assert any("sm_90a" in option for option in compiler.OPTIONS)
    key = compiler._key
    keys = {key("a", ("x",), (12, 9)), key("b", ("x",), (12, 9)), key("a", ("y",), (12, 9)), key("a", ("x",), (13, 0))}
    assert len(keys) == 4
    assert key("a", ("x",), (12, 9)) in keys


def test_file_name_follows_spec_and_nvrtc_version(compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = compiler.build(SPEC), compiler.build(OTHER)
    assert first.name.startswith(SPEC.name + ".") and other.name.startswith(OTHER.name + ".")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    assert compiler.build(SPEC) != first
    assert compiles == [SPEC, OTHER, SPEC]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RAWATTN_CACHE_DIR", raising=False)
    assert compiler.cache_dir() == Path("/home/ada/.cache/rawattn")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert compiler.cache_dir() == Path("/var/xdg/rawattn")
    monkeypatch.setenv("RAWATTN_CACHE_DIR", "/srv/kernels")
    assert compiler.cache_dir() == Path("/srv/kernels")


# ---- files


def test_a_second_build_compiles_nothing(compiles: list[KernelSpec]) -> None:
    path = compiler.build(SPEC)
    assert compiler.build(SPEC) == path
    assert compiler._cubin(SPEC) == b"\x7fELF " + SPEC.name.encode() * 100
    assert compiles == [SPEC]


def test_cache_folder_is_private(compiles: list[KernelSpec], tmp_path: Path) -> None:
    folder = compiler.build(SPEC).parent
    assert folder == tmp_path / "cache" and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "foreign", "another variant", "a bare cubin"])
def test_damaged_file_is_rebuilt(compiles: list[KernelSpec], damage: str) -> None:
    path = compiler.build(SPEC)
    good = path.read_bytes()
    path.write_bytes(
        {
            "truncated": good[:-1],
            "one bit": bytes([good[0] ^ 1]) + good[1:],
            "empty": b"",
            "foreign": b"#!/bin/sh\n" * 100,
            "another variant": compiler.build(OTHER).read_bytes(),
            "a bare cubin": good[:-32],
        }[damage]
    )
    compiles.clear()
    assert compiler.build(SPEC) == path
    assert compiles == [SPEC] and path.read_bytes() == good


def test_eight_processes_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(folder))
    go = tmp_path / "go"
    # Each reports that it stands at the line, and all find the folder missing when they are let go.
    racers = [child(f"print('ready', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(0.001)") for _ in range(8)]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    go.touch()
    assert [racer.wait(timeout=60) for racer in racers] == [0] * 8
    (path,) = folder.iterdir()  # one file, and no temporary one
    cubin = compiler._read(path)
    assert cubin is not None and cubin[:4] * 250_000 == cubin  # whole, and of one process


@pytest.mark.parametrize("moment", ["os.replace", "os.mkdir", "tempfile.mkstemp"])
def test_a_killed_process_leaves_nothing_harmful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(folder))
    module, function = moment.split(".")
    victim = child(
        f"""
import {module}
def stop(*args, **kwargs):
    print("stopped", flush=True)
    time.sleep(60)
{module}.{function} = stop"""
    )
    assert victim.stdout is not None and victim.stdout.readline() == "stopped\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list(folder.glob("*.cubin"))
    heir = child("")
    assert heir.wait(timeout=60) == 0
    (path,) = folder.glob("*.cubin")
    assert compiler._read(path) is not None


def test_a_file_under_the_temporary_name_is_removed_when_writing_fails(
    compiles: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UnsupportedEnvironment, match=r"cannot be written \(No space left on device\)"):
        compiler.build(SPEC)
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_folder_warns_once_and_the_kernel_is_used(
    compiles: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # root may write anywhere but under a file
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert SPEC.name.encode() in compiler._cubin(SPEC)
        assert OTHER.name.encode() in compiler._cubin(OTHER)
    assert [str(w.message) for w in caught] == [
        f"The cache folder {tmp_path}/file/cache cannot be written (Not a directory): "
        "set RAWATTN_CACHE_DIR to a folder that you can write to; until then every process compiles its kernels anew"
    ]
    with pytest.raises(UnsupportedEnvironment, match="set RAWATTN_CACHE_DIR"):  # build promises a file
        compiler.build(SPEC)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_folder_that_others_can_write_to_is_refused(compiles: list[KernelSpec], tmp_path: Path, mode: int) -> None:
    compiler.build(SPEC)
    (tmp_path / "cache").chmod(mode)
    for call in (compiler.build, compiler._cubin):
        with pytest.raises(UnsupportedEnvironment, match=f"The cache folder {tmp_path}/cache can be written by others: chmod 700"):
            call(SPEC)
    (tmp_path / "cache").chmod(0o755)  # others may read
    compiler.build(SPEC)
    assert compiles == [SPEC]


def test_folder_of_another_user_is_refused(compiles: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.build(SPEC)
    owner = (tmp_path / "cache").stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(UnsupportedEnvironment, match=f"cache folder {tmp_path}/cache belongs to user {owner}: set RAWATTN_CACHE_DIR"):
        compiler.build(SPEC)


# ---- switches and stderr


def test_no_jit_names_the_variant_that_is_missing(compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler.build(SPEC)
    monkeypatch.setenv("RAWATTN_NO_JIT", "1")
    assert compiler.build(SPEC) == path
    with pytest.raises(CompileError, match=f"{OTHER.name} is not in .* and RAWATTN_NO_JIT=1"):
        compiler.build(OTHER)
    assert compiles == [SPEC]
    monkeypatch.setenv("RAWATTN_NO_JIT", "0")
    compiler.build(OTHER)


def test_verbose_is_one_line_a_compile(
    compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAWATTN_VERBOSE", "1")
    compiler.build(SPEC)
    compiler.build(SPEC)
    assert capsys.readouterr().err == f"rawattn: compiled {SPEC.name} in 1.23 s, 168 registers, 16 bytes spilled\n"


def test_a_slow_compile_says_so_once_while_it_runs(
    compiles: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "SLOW_COMPILE_SECONDS", 60)
    compiler.build(OTHER)
    assert capsys.readouterr().err == ""
    said: list[str] = []

    def slow_compile(spec: KernelSpec) -> tuple[bytes, CompileReport]:
        deadline = time.monotonic() + 30
        while not (text := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
        said.append(text)
        return b"cubin", CompileReport(1.0, 168, 0, 0, (), "")

    monkeypatch.setattr(compiler, "SLOW_COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(compiler, "compile_cubin", slow_compile)
    compiler.build(SPEC)
    assert said == [f"rawattn: compiling {SPEC.name}; {tmp_path}/cache keeps it for the next time\n"]
    assert capsys.readouterr().err == ""


def test_verbose_and_slow_is_still_one_line(
    compiles: list[KernelSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = CompileReport(2.0, 168, 0, 0, (), "")
    monkeypatch.setenv("RAWATTN_VERBOSE", "1")
    monkeypatch.setattr(compiler, "SLOW_COMPILE_SECONDS", 0.001)

    def slow_compile(spec: KernelSpec) -> tuple[bytes, CompileReport]:
        time.sleep(0.1)
        return b"cubin", report

    monkeypatch.setattr(compiler, "compile_cubin", slow_compile)
    compiler.build(SPEC)
    assert capsys.readouterr().err == f"rawattn: compiled {SPEC.name} in 2.00 s, 168 registers, 0 bytes spilled\n"


# ---- what NVRTC says

LOG = """\
attention_forward.cu(7): warning #177-D: variable "X" was declared but never referenced
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a function call
ptxas info    : 115 bytes gmem
ptxas info    : Compiling entry function 'attention_forward' for 'sm_90a'
ptxas info    : Function properties for attention_forward
ptxas         .     256 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 499.878 ms"""


def test_report_reads_the_log() -> None:
    report = compiler._report(LOG, 1.5)
    assert (report.seconds, report.registers, report.spill_bytes, report.stack_bytes) == (1.5, 168, 32, 256)
    assert report.warnings == tuple(LOG.splitlines()[:2])


def test_compile_error_carries_the_log_with_true_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_nvrtc()
    line = 1 + len((compiler.CUDA_SRC / compiler.main_file(SPEC)).read_text().splitlines())
    good = compiler.source
    monkeypatch.setattr(compiler, "source", lambda spec: good(spec) + "\nint broken = undefined_name;")
    with pytest.raises(CompileError) as caught:
        compiler.compile_cubin(SPEC)
    assert SPEC.name in str(caught.value)
    assert f'{compiler.main_file(SPEC)}({line}): error: identifier "undefined_name" is undefined' in str(caught.value)


def skip_without_nvrtc() -> None:
    try:
        compiler.nvrtc_version()
    except UnsupportedEnvironment as error:
        pytest.skip(str(error))


# ---- the environment, played by a stand-in for CuPy


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class FakeModule:
    loads: ClassVar[list[bytes]] = []

    def load(self, cubin: bytes) -> None:
        self.loads.append(cubin)

    def get_function(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(ptr=7, name=name)


def fake_cupy(device: object = 0, capability: str = "90", driver: int = 12080, nvrtc: object = (12, 9)) -> SimpleNamespace:
    """What compiler.py uses of CuPy; an exception in place of a value is raised by the call that would return it."""

    def answer(value: object) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    attributes: list[tuple[int, int, int]] = []
    return SimpleNamespace(
        attributes=attributes,
        cuda=SimpleNamespace(
            nvrtc=SimpleNamespace(getVersion=lambda: answer(nvrtc)),
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDevice=lambda: answer(device),
                driverGetVersion=lambda: driver,
                getDeviceProperties=lambda device: {"name": b"NVIDIA GeForce RTX 4090"},
            ),
            driver=SimpleNamespace(
                CUDADriverError=CUDADriverError,
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                funcSetAttribute=lambda *arguments: attributes.append(arguments),
            ),
            Device=lambda device: SimpleNamespace(compute_capability=capability),
            function=SimpleNamespace(Module=FakeModule),
        ),
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(**faults): play a machine with these faults. load() forgets its kernels before and after."""
    compiler._load.cache_clear()

    def play(**faults: Any) -> SimpleNamespace:
        cupy = fake_cupy(**faults)
        monkeypatch.setattr(compiler, "_cupy", lambda: cupy)
        return cupy

    yield play
    compiler._load.cache_clear()


def test_load_compiles_once_for_each_device(compiles: list[KernelSpec], machine: Any) -> None:
    FakeModule.loads.clear()
    cupy = machine()
    kernel = compiler.load(SPEC)
    assert compiler.load(KernelSpec("bfloat16", 128, 128, 4, "causal")) is kernel
    assert FakeModule.loads == [b"\x7fELF " + SPEC.name.encode() * 100]  # the cubin without its seal
    assert cupy.attributes == [(7, 8, compiler.tile_for(SPEC).shared_memory_bytes(SPEC))]
    machine(device=1)
    assert compiler.load(SPEC) is not kernel
    assert compiles == [SPEC]


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        ({"device": CUDARuntimeError("cudaErrorInsufficientDriver: ..."), "driver": 0}, "No NVIDIA driver is loaded: install one"),
        ({"device": CUDARuntimeError("cudaErrorInsufficientDriver: ..."), "driver": 11040}, "The NVIDIA driver is older .*: update it"),
        (
            {"device": CUDARuntimeError("cudaErrorNoDevice: ...")},
            "The NVIDIA driver shows no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
        ),
        ({"device": CUDARuntimeError("cudaErrorUnknown: unknown")}, r"does not answer \(cudaErrorUnknown: unknown\): check nvidia-smi"),
        ({"capability": "89"}, "GPU 0 is a NVIDIA GeForce RTX 4090 of compute capability 8.9; needed: a Hopper"),
        ({"capability": "120"}, "compute capability 12.0; needed: a Hopper"),
    ],
)
def test_gpu_faults(compiles: list[KernelSpec], machine: Any, faults: dict[str, Any], sentence: str) -> None:
    machine(**faults)
    with pytest.raises(UnsupportedEnvironment, match=sentence) as caught:
        compiler.load(SPEC)
    assert "\n" not in str(caught.value)
    assert compiles == []


@pytest.mark.parametrize(
    ("nvrtc", "sentence"),
    [
        (
            RuntimeError('Failure finding "libnvrtc.so.12"\nmore'),
            'NVRTC library cannot be loaded .*"libnvrtc.so.12".: pip install nvidia-cuda',
        ),
        ((12, 2), "NVRTC is 12.2; needed: 12.3 or newer: pip install nvidia-cuda-nvrtc-cu12"),
    ],
)
def test_nvrtc_faults(machine: Any, nvrtc: object, sentence: str) -> None:
    machine(nvrtc=nvrtc)
    for call in (compiler.build, compiler.compile_cubin, compiler.load):
        with pytest.raises(UnsupportedEnvironment, match=sentence) as caught:
            call(SPEC)
        assert "\n" not in str(caught.value)


def test_driver_older_than_nvrtc(compiles: list[KernelSpec], machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeModule, cubin: bytes) -> None:
        raise CUDADriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(FakeModule, "load", refuse)
    machine(driver=12040)
    with pytest.raises(UnsupportedEnvironment, match=r"knows CUDA 12.4 and cannot load a kernel of NVRTC 12.9 .*update the driver"):
        compiler.load(SPEC)
    machine(driver=13000)  # then it is something else, and the driver's own word stands
    with pytest.raises(CUDADriverError):
        compiler.load(SPEC)


def test_missing_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler._cupy.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    try:
        with pytest.raises(UnsupportedEnvironment, match=r"CuPy cannot be imported .*: pip install cupy-cuda12x"):
            compiler.load(SPEC)
    finally:
        compiler._cupy.cache_clear()


def test_import_leaves_cupy_alone() -> None:
    code = "import sys, rawattn.compiler; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def struct_layout(text: str, name: str = "Arguments") -> tuple[list[tuple[int, int]], int]:
    """(offset, size) of the members of a kernel's struct, and its size, by the rules of C; those of Rows are kept together."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.S)
    assert body
    declared = re.findall(r"^    ((?:const )?(?:long long|\w+)\*?) ([\w, ]+);", body[1], re.MULTILINE)
    sizes = {"TensorMap": (128, 64), "Rows": (32, 8), "long long": (8, 8), "int": (4, 4), "unsigned": (4, 4), "float": (4, 4)}
    members, end, largest = [], 0, 1
    for kind, names in declared:
        inner: list[tuple[int, int]] = []
        if kind.endswith("*"):
            size, alignment = 8, 8
        elif kind in sizes:
            size, alignment = sizes[kind]
        else:
            inner, size = struct_layout(text, kind)
            alignment = 8
        largest = max(largest, alignment)
        for _ in names.split(","):
            end = -(-end // alignment) * alignment
            members += [(end + offset, of_member) for offset, of_member in inner] or [(end, size)]
            end += size
    return members, -(-end // largest) * largest


def starts(dtype: np.dtype) -> list[int]:
    """Offsets of the fields, those of rows kept together."""
    assert dtype.fields is not None
    found: list[int] = []
    for field, offset, *_ in dtype.fields.values():
        if field.fields is not None and "data" not in field.fields:
            found += [offset + start for start in starts(field)]
        elif field.fields is None and field.shape:  # an array of what are members of their own in the struct
            found += range(offset, offset + field.itemsize, field.base.itemsize)
        else:
            found.append(offset)
    return sorted(found)


@pytest.mark.parametrize("file, dtype", [("append_kv.cu", APPEND_ARGUMENTS), ("pipeline.cuh", ARGUMENTS)], ids=["append_kv", "attention"])
def test_the_host_lays_arguments_out_as_the_kernel_reads_them(file: str, dtype: np.dtype) -> None:
    text = re.sub(r"//.*", "", (compiler.CUDA_SRC / "append.cuh").read_text() + (compiler.CUDA_SRC / file).read_text())
    members, size = struct_layout(text)
    assert dtype.names is not None
    kept = [offset for offset, size in members if size != 128]  # the tensor maps are one field
    assert starts(dtype)[dtype.names[0] == "maps" :] == kept
    assert dtype.itemsize == size
    assert size % 8 == 0  # the host reaches pointers as 64-bit words
