"""Tests marked gpu are skipped, with the reason, where no Hopper GPU can be used."""

from __future__ import annotations

import os

import pytest

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
