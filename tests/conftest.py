"""Tests marked gpu are skipped, with the reason, where no Hopper GPU can be used; and a cache folder with a compiler that costs nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rawattn import compiler
from rawattn.compiler import CompileReport
from rawattn.spec import KernelSpec

# JAX takes three quarters of the GPU's memory at its first use unless told not to; CuPy and torch run in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def no_gpu_reason() -> str | None:
    """Why the gpu tests cannot run here, or None if they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "no GPU is visible"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable NVIDIA driver or GPU: {error}"
    capability = cupy.cuda.Device().compute_capability
    return None if capability == "90" else f"the GPU has compute capability {capability}, not Hopper's 90"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which does not exist yet; switches are off."""
    monkeypatch.setenv("RAWATTN_CACHE_DIR", str(tmp_path / "cache"))
    for switch in ("RAWATTN_NO_JIT", "RAWATTN_VERBOSE"):
        monkeypatch.delenv(switch, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """NVRTC 12.9 replaced by a stand-in; the list of what it compiled."""
    done: list[KernelSpec] = []

    def compile_cubin(spec: KernelSpec) -> tuple[bytes, CompileReport]:
        done.append(spec)
        return b"\x7fELF " + spec.name.encode() * 100, CompileReport(1.234, 168, 16, 0, (), "")

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
    return done
