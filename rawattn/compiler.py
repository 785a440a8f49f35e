"""The JIT: KernelSpec -> source -> NVRTC -> cubin on disk -> loaded kernel.

Everything up to the cubin needs neither a GPU nor a driver, so a machine without one can fill the cache with `build`. CuPy, and what it
imports anyway, is imported inside functions: `import rawattn` stays light.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .spec import AppendSpec, KernelSpec
from .tiles import CONTROL_BYTES, MAX_SPLITS, SPLITS_OF_A_SEQUENCE, tile_for

CUDA_SRC = Path(__file__).parent / "cuda_src"
ARCHITECTURE = "sm_90a"  # the "a" unlocks WGMMA and setmaxnreg; such a cubin runs on compute capability 9.0 alone
OPTIONS = (
    f"-arch={ARCHITECTURE}",
    "-std=c++17",
    "-default-device",  # a function without a qualifier is a __device__ one
    "--ptxas-options=-v",  # registers and spills in the log, for CompileReport
)
OLDEST_NVRTC = (12, 3)
SLOW_COMPILE_SECONDS = 0.5
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # of enum CUfunction_attribute in cuda.h, which CuPy does not name
MOST_STEPS = 8  # of Q K^T in one statement: there are uniform registers for the descriptors of no more
CUBIN_NAME = re.compile(r"\w+\.[0-9a-f]{20}\.cubin", re.ASCII)
TEMPORARY_NAME = re.compile(CUBIN_NAME.pattern + r"\w{8}\.tmp", re.ASCII)


class CompileError(RuntimeError):
    """A kernel could not be compiled: NVRTC refused it, or RAWATTN_NO_JIT=1 forbids it. The message names the variant."""


class UnsupportedEnvironment(RuntimeError):
    """The machine lacks something that rawattn needs. The message is one sentence with the remedy."""


@dataclass(frozen=True)
class CompileReport:
    """What NVRTC and ptxas said about one compile."""

    seconds: float
    registers: int  # a thread, at launch; setmaxnreg moves them between warpgroups later
    spill_bytes: int  # stored plus loaded
    stack_bytes: int
    warnings: tuple[str, ...]  # the front end's and ptxas's, and its C75xx remarks: WGMMA serialized, setmaxnreg ignored
    log: str


# ---- spec -> source


def source(spec: KernelSpec | AppendSpec) -> str:
    """The CUDA source of `spec`, self-contained: constants and WGMMA wrappers, then cuda_src with its includes inlined.

    >>> source(KernelSpec("bfloat16", 128, 128, 4, "causal")).splitlines()[0]
    'constexpr int HEAD_DIM = 128;'
    """
    if isinstance(spec, AppendSpec):
        return "\n".join([_constants({"BF16": spec.dtype == "bfloat16"}), _inlined(main_file(spec), set())])
    tile = tile_for(spec)
    producer_registers, consumer_registers = tile.registers
    constants: dict[str, int | bool] = {
        "HEAD_DIM": spec.head_dim,
        "HEAD_DIM_V": spec.head_dim_v,
        "GQA_RATIO": spec.gqa_ratio,
        "TILE_M": tile.tile_m,
        "TILE_N": tile.tile_n,
        "Q_STAGES": tile.q_stages_of(spec),
        "STAGES": tile.stages,
        "CONTROL_BYTES": CONTROL_BYTES,
        "CONSUMER_WARPGROUPS": tile.consumer_warpgroups,
        "CTAS_PER_SM": tile.ctas_per_sm,
        "PRODUCER_REGISTERS": producer_registers,
        "CONSUMER_REGISTERS": consumer_registers,
        "PACK": spec.pack,
        "SPLIT": spec.split_rows > 0,
        "CLUSTER": spec.cluster,
        "SPLITS_OF_A_SEQUENCE": SPLITS_OF_A_SEQUENCE,
        "FEWEST_SPLITS": tile.fewest_splits,
        "LEAST_BLOCKS": tile.least_blocks,
        "MAX_SPLITS": MAX_SPLITS,
        "PAGE_ROWS": spec.page_rows,
        "FEW_ROWS": tile.few_rows,
        "SHARES_KEYS": tile.shares_keys,
        "BOUND_LEFT": spec.mask == "window",
        "BOUND_RIGHT": spec.mask in ("causal", "window"),
        "VARLEN": spec.varlen,
        "BF16": spec.dtype == "bfloat16",
    }
    if tile.few_rows:
        constants["RESULTS_OF_CTA"] = tile.results_of_cta(spec)
    else:
        constants["PING_PONG"] = tile.ping_pong
    element = "bf16" if spec.dtype == "bfloat16" else "f16"
    qk_steps, pv_steps = -(-spec.head_dim // 16), tile.tile_n // 16
    if qk_steps > MOST_STEPS and not spec.split_rows:  # where keys are split, memory is the limit
        qk_steps = 1
    if not tile.shares_keys:  # where all are at once
        constants["QK_STEPS_AT_ONCE"] = qk_steps
    if tile.few_rows and not tile.shares_keys:
        rows = tile.tile_m // tile.consumer_warpgroups
        scores = _wgmma("wgmma_scores", rows, qk_steps, element, "1, 1, 0, 0")
        output = _wgmma("wgmma_output", rows, pv_steps, element, "1, 1, 1, 0")
    else:
        scores = _wgmma("wgmma_scores", tile.tile_n, qk_steps, element, "1, 1, 0, 0")
        output = _wgmma("wgmma_output", spec.head_dim_v, pv_steps, element, "1, 1, 1", a_in_registers=True)
    return "\n".join([_constants(constants), scores, output, _inlined(main_file(spec), set())])


def main_file(spec: KernelSpec | AppendSpec) -> str:
    """The file of cuda_src with the kernel, whose entry point has the name of the file."""
    if isinstance(spec, AppendSpec):
        return "append_kv.cu"
    tile = tile_for(spec)
    return "attention_decode64.cu" if tile.shares_keys else "attention_decode.cu" if tile.few_rows else "attention_forward.cu"


def _constants(constants: Mapping[str, int | bool]) -> str:
    return "\n".join(f"constexpr {type(value).__name__} {name} = {str(value).lower()};" for name, value in constants.items())


def _wgmma(name: str, n: int, steps: int, element: str, flags: str, a_in_registers: bool = False) -> str:
    """A C++ wrapper of `steps` m64n{n}k16 WGMMAs: d = a @ b, plus d where `accumulate`. Generated, because d is n/2 operands.

    One statement for all steps: each returns all of d, which costs the compiler time. `flags` are scale-a, scale-b, then one transpose
    flag (1 = MN-major) for each operand in shared memory.
    """
    size, words = n // 2, 4 if a_in_registers else 1  # of d, and of a for each step
    constraint, kind = ("r", "unsigned") if a_in_registers else ("l", "unsigned long long")
    d = ", ".join(f"%{i}" for i in range(size))
    instructions = []
    for step in range(steps):
        a = ", ".join(f"%{size + words * step + i}" for i in range(words))
        predicate = "first" if step == 0 else "later"
        operands = [f"{{{d}}}", f"{{{a}}}" if a_in_registers else a, f"%{size + words * steps + step}", predicate]
        instructions.append(f'"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} {", ".join(operands)}, {flags};\\n"')
    text = "\n                 ".join(instructions)
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(size))
    inputs = ", ".join(
        [f'"{constraint}"(a[{i}])' for i in range(words * steps)] + [f'"l"(b[{i}])' for i in range(steps)] + ['"r"(accumulate)']
    )
    parameters = f"float (&d)[{size}], const {kind} (&a)[{words * steps}], const unsigned long long (&b)[{steps}], int accumulate"
    return f"""
__device__ __forceinline__ void {name}({parameters}) {{
    asm volatile("{{.reg .pred first, later; setp.ne.b32 first, %{size + (words + 1) * steps}, 0; setp.eq.b32 later, 0, 0;\\n"
                 {text}
                 "}}"
                 : {outputs}
                 : {inputs});
}}
"""


def _inlined(name: str, done: set[str]) -> str:
    """The text of cuda_src/{name}, each `#include "x.cuh"` replaced by that file the first time; #line keeps the log's lines true."""
    if name in done:
        return ""
    done.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((CUDA_SRC / name).read_text(encoding="utf-8").splitlines(), start=1):
        if include := re.match(r'\s*#include "(.+)"', line):
            lines += [_inlined(include[1], done), f'#line {number + 1} "{name}"']
        else:
            lines.append("" if line.strip() == "#pragma once" else line)
    return "\n".join(lines)


# ---- source -> cubin


def compile_cubin(spec: KernelSpec | AppendSpec) -> tuple[bytes, CompileReport]:
    """Compile `spec` with NVRTC: the cubin and what the compiler said. No GPU, no cache.

    Raises UnsupportedEnvironment where CuPy or NVRTC is missing, CompileError where NVRTC refuses the source.
    """
    version = nvrtc_version()
    nvrtc = _cupy().cuda.nvrtc
    start = time.perf_counter()
    program = nvrtc.createProgram(source(spec), f"{spec.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, OPTIONS)
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy cuts the last byte, a NUL, as if it ended a string
        log = nvrtc.getProgramLog(program).rstrip("\0\n")
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).rstrip("\0\n")
        raise CompileError(f"NVRTC {version[0]}.{version[1]} cannot compile {spec.name}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    return cubin, _report(log, time.perf_counter() - start)


def _report(log: str, seconds: float) -> CompileReport:
    functions = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return CompileReport(
        seconds=seconds,
        registers=max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in functions),
        stack_bytes=sum(int(stack) for stack, _, _ in functions),
        warnings=tuple(re.findall(r".*(?:warning *[#:]|C75\d\d).*", log)),
        log=log,
    )


def _compile_on_miss(spec: KernelSpec | AppendSpec) -> bytes:
    """compile_cubin under the user's switches, telling stderr what takes its time."""
    if _switch("RAWATTN_NO_JIT"):
        raise CompileError(
            f"{spec.name} is not in {cache_dir()} and RAWATTN_NO_JIT=1 forbids compiling it: unset it, or run rawattn warmup first"
        )
    verbose = _switch("RAWATTN_VERBOSE")
    # A timer, so that the line comes while the user waits: NVRTC runs without the GIL.
    notice = threading.Timer(SLOW_COMPILE_SECONDS, _say, (f"compiling {spec.name}; {cache_dir()} keeps it for the next time",))
    notice.daemon = True
    if not verbose:  # the verbose line says it, with the seconds
        notice.start()
    try:
        cubin, report = compile_cubin(spec)
    finally:
        notice.cancel()
    if verbose:
        _say(f"compiled {spec.name} in {report.seconds:.2f} s, {report.registers} registers, {report.spill_bytes} bytes spilled")
    return cubin


def _switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _say(text: str) -> None:
    print(f"rawattn: {text}", file=sys.stderr, flush=True)


# ---- cubin <-> disk: the cubin, then a SHA-256 of file name and cubin, so that a file cut short, replaced or renamed is a miss


def cache_dir() -> Path:
    """The folder of compiled kernels: $RAWATTN_CACHE_DIR, else rawattn in $XDG_CACHE_HOME or ~/.cache. It need not exist yet."""
    if folder := os.environ.get("RAWATTN_CACHE_DIR"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "rawattn")
    try:
        return Path.home() / ".cache" / "rawattn"
    except RuntimeError as error:
        raise UnsupportedEnvironment("This user has no home folder to keep compiled kernels in: set RAWATTN_CACHE_DIR") from error


def build(spec: KernelSpec | AppendSpec) -> Path:
    """The cubin of `spec` on disk, compiled if it is missing. Needs no GPU, so it can warm the cache of a machine image.

    Raises CompileError, or UnsupportedEnvironment where NVRTC is missing or the cache folder is unsafe or cannot be written.
    """
    path = _cache_path(spec)
    if _read(path) is None:
        _write(path, _compile_on_miss(spec))
    return path


def _cubin(spec: KernelSpec | AppendSpec) -> bytes:
    """The cubin of `spec`, from disk where it can be; a folder that cannot be written costs a warning, not the call."""
    path = _cache_path(spec)
    cubin = _read(path)
    if cubin is None:
        cubin = _compile_on_miss(spec)
        try:
            _write(path, cubin)
        except UnsupportedEnvironment as error:
            warnings.warn(f"{error}; until then every process compiles its kernels anew", RuntimeWarning, stacklevel=1)
    return cubin


def _cache_path(spec: KernelSpec | AppendSpec) -> Path:
    folder = cache_dir()
    _check_folder(folder)
    return folder / f"{spec.name}.{_key(source(spec), OPTIONS, nvrtc_version())}.cubin"


def _key(text: str, options: tuple[str, ...], version: tuple[int, int]) -> str:
    """A hash of all that decides a cubin: the source, the options (the architecture is one) and the NVRTC version."""
    import hashlib

    return hashlib.sha256(repr((text, options, version)).encode()).hexdigest()[:20]


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which someone else could plant code that we would run on the GPU."""
    try:
        status = folder.stat()
    except OSError:
        return  # nothing there to read yet
    if status.st_uid != os.getuid():
        raise UnsupportedEnvironment(
            f"The cache folder {folder} belongs to user {status.st_uid}: set RAWATTN_CACHE_DIR to a folder of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsupportedEnvironment(
            f"The cache folder {folder} can be written by others: chmod 700 it, or set RAWATTN_CACHE_DIR to another"
        )


def _seal(path: Path, cubin: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(path.name.encode() + cubin).digest()


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[:-32] if is_sealed(path.name, data) else None


def _write(path: Path, cubin: bytes) -> None:
    """Write under a temporary name and rename, so that readers, racing writers and a kill see the whole file or none."""
    import tempfile

    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(folder)  # again: another process may have made it
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=folder)
        try:
            with open(handle, "wb") as file:
                file.write(cubin + _seal(path, cubin))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UnsupportedEnvironment(
            f"The cache folder {folder} cannot be written ({error.strerror}): set RAWATTN_CACHE_DIR to a folder that you can write to"
        ) from error


def is_cached(spec: KernelSpec | AppendSpec) -> bool:
    """Whether `build` would find `spec` on disk. Raises UnsupportedEnvironment as it does."""
    return _read(_cache_path(spec)) is not None


def cache_files() -> list[Path]:
    """Everything in the cache folder, by name, a stranger's files too. Raises UnsupportedEnvironment where the folder is unsafe."""
    folder = cache_dir()
    _check_folder(folder)
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnsupportedEnvironment(
            f"The cache folder {folder} cannot be read ({error.strerror}): set RAWATTN_CACHE_DIR to a folder of your own"
        ) from error


def is_cubin_name(name: str) -> bool:
    """Whether `name` is one that `build` gives its files: variant, key, cubin."""
    return CUBIN_NAME.fullmatch(name) is not None


def is_cache_file(path: Path) -> bool:
    """Whether `path` is a plain file under a name that `build` gives: a cubin, whole or damaged, or a temporary file."""
    name = TEMPORARY_NAME.fullmatch(path.name) or CUBIN_NAME.fullmatch(path.name)
    return name is not None and not path.is_symlink() and path.is_file()


def is_sealed(name: str, data: bytes) -> bool:
    """Whether `data` is the whole content of a cache file written under `name`. It shows damage; anyone can make a seal."""
    return data[-32:] == _seal(Path(name), data[:-32])


def store(name: str, data: bytes) -> None:
    """Put a file for which is_cubin_name and is_sealed hold into the cache folder, as `build` writes its own."""
    _write(cache_dir() / name, data[:-32])


# ---- cubin -> kernel


def load(spec: KernelSpec | AppendSpec) -> Any:
    """The kernel of `spec` on the current device, a cupy.cuda.function.Function ready for its dynamic shared memory.

    Call it as kernel(grid, block, args, shared_mem=tile_for(spec).shared_memory_bytes(spec)). A second call is a dictionary look-up.
    Raises UnsupportedEnvironment, with the remedy, or CompileError.
    """
    return _load(spec, current_device())


@functools.cache
def _load(spec: KernelSpec | AppendSpec, device: int) -> Any:
    check_gpu(device)
    cupy = _cupy()
    driver, module = cupy.cuda.driver, cupy.cuda.function.Module()
    cubin = _cubin(spec)
    try:
        module.load(cubin)
    except driver.CUDADriverError as error:
        newest = cupy.cuda.runtime.driverGetVersion()
        if nvrtc_version() <= (newest // 1000, newest % 1000 // 10):
            raise
        raise UnsupportedEnvironment(
            f"The NVIDIA driver knows CUDA {newest // 1000}.{newest % 1000 // 10} and cannot load a kernel of NVRTC "
            f"{'.'.join(map(str, nvrtc_version()))} ({error}): update the driver or install an NVRTC no newer than it"
        ) from error
    kernel = module.get_function(Path(main_file(spec)).stem)
    if isinstance(spec, KernelSpec):
        size = tile_for(spec).shared_memory_bytes(spec)
        driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, size)
        if spec.cluster:
            driver.funcSetAttribute(kernel.ptr, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    return kernel


# ---- the environment


@functools.cache
def _cupy() -> Any:
    """CuPy, imported by the first call that needs it."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedEnvironment(
            f"CuPy cannot be imported ({error.__cause__ or error}): pip install cupy-cuda12x, or cupy-cuda13x for a driver of CUDA 13"
        ) from error
    return cupy


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library that CuPy finds. Raises UnsupportedEnvironment where there is none or it is too old."""
    remedy = "pip install nvidia-cuda-nvrtc-cu12, or nvidia-cuda-nvrtc beside cupy-cuda13x"
    cupy = _cupy()
    try:
        version: tuple[int, int] = cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # each release of CuPy has its own way to say that the library is not there
        raise UnsupportedEnvironment(f"The NVRTC library cannot be loaded ({str(error).splitlines()[0]}): {remedy}") from error
    if version < OLDEST_NVRTC:
        raise UnsupportedEnvironment(f"NVRTC is {version[0]}.{version[1]}; needed: {OLDEST_NVRTC[0]}.{OLDEST_NVRTC[1]} or newer: {remedy}")
    return version


def current_device() -> int:
    """The CUDA ordinal of the calling thread's device. Raises UnsupportedEnvironment where there is no driver or no GPU."""
    runtime = _cupy().cuda.runtime
    try:
        device: int = runtime.getDevice()
    except runtime.CUDARuntimeError as error:
        if runtime.driverGetVersion() == 0:
            problem = "No NVIDIA driver is loaded: install one, or start the container with its GPUs (docker run --gpus all)"
        elif "cudaErrorInsufficientDriver" in str(error):
            problem = "The NVIDIA driver is older than this CuPy needs: update it, or replace cupy-cuda13x by cupy-cuda12x"
        elif "cudaErrorNoDevice" in str(error):
            problem = "The NVIDIA driver shows no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"
        else:
            problem = f"The NVIDIA driver does not answer ({error}): check nvidia-smi"
        raise UnsupportedEnvironment(problem) from error
    return device


def check_gpu(device: int) -> None:
    """Raise UnsupportedEnvironment unless the GPU is a Hopper."""
    cupy = _cupy()
    capability = cupy.cuda.Device(device).compute_capability
    if capability != "90":
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
        raise UnsupportedEnvironment(
            f"GPU {device} is a {name} of compute capability {capability[:-1]}.{capability[-1]}; needed: a Hopper (9.0): H100, H200, GH200"
        )
