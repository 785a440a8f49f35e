"""`rawattn info`: what rawattn finds on this machine."""

from __future__ import annotations

import ctypes
import json
import platform
from importlib import metadata
from typing import Any

import click

import rawattn
from rawattn import compiler


def machine() -> dict[str, Any]:
    """What is here, None for what is not, and under "problems" why not."""
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, ask in {
        "rawattn": lambda: rawattn.__version__,
        "python": platform.python_version,
        "gpu": _gpu,
        "driver": _driver,
        "cuda": _cuda,
        "cupy": _cupy,
        "nvrtc": lambda: "{}.{}".format(*compiler.nvrtc_version()),
        "numpy": lambda: metadata.version("numpy"),
        "cache": _cache,
    }.items():
        try:
            facts[name] = ask()
        except Exception as error:  # each missing library has its own; the point is to go on and say it
            facts[name] = None
            problems[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return {**facts, "problems": problems}


def _gpu() -> dict[str, str]:
    device = compiler.current_device()
    import cupy

    major, minor = divmod(int(cupy.cuda.Device(device).compute_capability), 10)
    return {"name": cupy.cuda.runtime.getDeviceProperties(device)["name"].decode(), "compute_capability": f"{major}.{minor}"}


def _driver() -> str:
    """The driver's own version, which only NVML tells."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise RuntimeError("No NVIDIA driver is installed (no libnvidia-ml.so.1)") from error
    version = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
        raise RuntimeError("The NVIDIA driver is installed but does not answer: check nvidia-smi")
    return version.value.decode()


def _cuda() -> str:
    """The newest CUDA that the driver serves."""
    import cupy

    version = cupy.cuda.runtime.driverGetVersion()
    if version == 0:
        raise RuntimeError("No NVIDIA driver is loaded")
    return f"{version // 1000}.{version % 1000 // 10}"


def _cupy() -> str:
    import cupy

    return str(cupy.__version__)


def _cache() -> dict[str, Any]:
    folder = compiler.cache_dir()
    sizes = [path.stat().st_size for path in folder.glob("*.cubin")]
    return {"folder": str(folder), "cubins": len(sizes), "bytes": sum(sizes)}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show the versions, the GPU and the cache of compiled kernels.

    \b
    Example:
        rawattn info --json
    """
    facts = machine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    shown = dict(facts)
    if gpu := facts["gpu"]:
        shown["gpu"] = f"{gpu['name']}, compute capability {gpu['compute_capability']}"
        shown["gpu"] += "" if gpu["compute_capability"] == "9.0" else " (the kernels need a Hopper, 9.0)"
    if cache := facts["cache"]:
        shown["cache"] = f"{cache['folder']}: {cache['cubins']} cubins, {cache['bytes']:,} bytes"
    for name, label in LABELS.items():
        click.echo(f"{label:<8} {shown[name] or 'none: ' + facts['problems'][name]}")


LABELS = {
    "rawattn": "rawattn",
    "gpu": "GPU",
    "driver": "driver",
    "cuda": "CUDA",
    "cupy": "CuPy",
    "nvrtc": "NVRTC",
    "python": "Python",
    "numpy": "NumPy",
    "cache": "cache",
}
