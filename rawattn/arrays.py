"""The bridge: any framework's array in, the same framework's array out, with no copy.

view() reads where an array lies, empty() and hand_back() make the result, current_stream() says where the work goes. Host memory
(NumPy arrays, CPU tensors of torch and JAX) goes through to_numpy() and from_numpy(). A framework is imported only once the caller
has passed one of its arrays, and CuPy only for arrays on a GPU.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn

import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") valid, and CuPy able to read it
import numpy as np


@dataclass(slots=True)
class Array:
    """Where an array lies and what it holds."""

    owner: Any = field(repr=False)  # keeps the memory alive: the caller's array, or a CuPy view of it (JAX on a GPU, other CUDA arrays)
    framework: str  # "numpy", "cupy", "torch" or "jax"
    pointer: int  # address of the first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str  # "float16", "bfloat16", "int32", "float8_e4m3fn", ...
    device: int | None  # CUDA ordinal; None is host memory


Viewer = Callable[[str, Any], Array]
_viewers: dict[type, Viewer] = {}


def view(name: str, x: Any) -> Array:
    """Look at the array `x` without copying it; errors call it `name`.

    Raises TypeError for what is no array on one device (a list, a sparse tensor, a JAX tracer, ...) and ValueError for a tensor
    that requires grad or an array where no kernel can reach it.

    >>> view("q", np.zeros((2, 3), np.float16)).strides
    (6, 2)
    >>> view("q", [1.0, 2.0])
    Traceback (most recent call last):
    TypeError: q is a list; needed: a NumPy, CuPy, torch or JAX array, or another CUDA array with __dlpack__
    """
    kind = type(x)
    viewer = _viewers.get(kind)
    if viewer is None:
        viewer = _viewers[kind] = _viewer_for(kind)
    return viewer(name, x)


def check_together(arrays: Mapping[str, Array]) -> None:
    """Raise ValueError unless all the named arrays belong to one framework and lie on one device, those of the first.

    >>> check_together({name: view(name, np.zeros(3)) for name in "qkv"})
    """
    (first, like), *others = arrays.items()
    for name, array in others:
        if array.device != like.device or array.framework != like.framework:
            raise ValueError(f"{name} is {_where(array)} but {first} is {_where(like)}; needed: one framework and one device for all")


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialised C-contiguous array on the device of `like`, allocated by its framework (for JAX: by CuPy or NumPy)."""
    if like.framework == "torch":
        import torch

        torch_dtype = getattr(torch, dtype)
        x = torch.empty(shape, dtype=torch_dtype, device="cpu" if like.device is None else like.device)
        return Array(x, "torch", x.data_ptr(), shape, contiguous_strides(shape, torch_dtype.itemsize), dtype, like.device)
    if like.device is None:
        return _view_numpy("out", np.empty(shape, dtype))
    import cupy

    with cupy.cuda.Device(like.device):
        return _view_cupy("out", cupy.empty(shape, dtype))


def hand_back(array: Array, like: Array, inputs: Iterable[Array] = ()) -> Any:
    """What the caller gets for an array of empty(): the framework's own object, for JAX a jax.Array over the same memory.

    To be called after the launch, on the stream of the launch. `inputs` are the arrays that the launched work reads.
    """
    if like.framework != "jax":
        return array.owner
    if like.device is None:
        return from_numpy(array.owner, like)
    import cupy
    import jax

    # XLA reuses freed memory in the order of its own streams, not ours: the result keeps what the kernel still reads.
    alive = (array.owner, *(x.owner for x in inputs))
    memory = cupy.cuda.UnownedMemory(array.pointer, array.owner.nbytes, alive, array.device)
    with cupy.cuda.Device(array.device):  # the export orders JAX after this device's current stream
        return jax.dlpack.from_dlpack(cupy.ndarray(array.shape, array.owner.dtype, cupy.cuda.MemoryPointer(memory, 0)))


def current_stream(like: Array) -> Any:
    """The stream for work on `like`, as a CuPy stream: torch's current one of that device, or else CuPy's."""
    if like.framework == "torch":
        return foreign_stream(torch_stream_pointer()(like.device), like.device)
    import cupy

    return cupy.cuda.get_current_stream(like.device)


def is_capturing(stream: Any) -> bool:
    """Whether work on the CuPy stream goes into a CUDA graph instead of running."""
    import cupy

    return bool(stream.ptr and cupy.cuda.runtime.streamIsCapturing(stream.ptr))


def as_cupy(array: Array) -> Any:
    """A CuPy array over the same GPU memory."""
    if array.framework != "torch":
        return array.owner
    import cupy

    dtype = np.dtype(array.dtype)
    size = max(0, dtype.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)))
    memory = cupy.cuda.UnownedMemory(array.pointer, size, array.owner, array.device)
    return cupy.ndarray(array.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), array.strides)


def to_numpy(array: Array) -> np.ndarray:
    """A NumPy array over the same host memory; bfloat16 is ml_dtypes.bfloat16. What belongs to JAX is read-only."""
    if array.framework != "torch":
        return np.asarray(array.owner)
    if array.dtype != "bfloat16":
        return array.owner.numpy(force=True)
    import torch

    return array.owner.view(torch.int16).numpy(force=True).view("bfloat16")


def from_numpy(x: np.ndarray, like: Array) -> Any:
    """`x` as an array of the framework of `like`, in host memory; torch shares the memory of `x`, JAX may."""
    if like.framework == "torch":
        import torch

        if x.dtype != "bfloat16":
            return torch.from_numpy(x)
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    if like.framework == "jax":
        import jax

        return jax.device_put(x, like.owner.sharding)
    return x


def _viewer_for(kind: type) -> Viewer:
    def is_a(module: str, name: str) -> bool:  # a module that nobody has imported has made no array
        return issubclass(kind, getattr(sys.modules.get(module), name, ()))

    if is_a("numpy", "ndarray"):
        return _view_numpy
    if is_a("torch", "Tensor"):
        return _torch_viewer()
    if is_a("jax.core", "Tracer"):
        return _refuse_tracer
    if is_a("jax", "Array"):
        return _view_jax
    if is_a("cupy", "ndarray"):
        return _view_cupy
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _view_dlpack
    return _refuse


def _view_numpy(name: str, x: Any) -> Array:
    return Array(x, "numpy", x.ctypes.data, x.shape, x.strides, dtype_name(x.dtype), None)


def _view_cupy(name: str, x: Any, framework: str = "cupy") -> Array:
    memory = x.data
    return Array(x, framework, memory.ptr, x.shape, x.strides, dtype_name(x.dtype), memory.device_id)


@functools.cache
def _torch_viewer() -> Viewer:
    import torch

    dtypes = {x: (str(x).removeprefix("torch."), x.itemsize) for x in vars(torch).values() if isinstance(x, torch.dtype)}
    grad_enabled = torch.is_grad_enabled

    def view_torch(name: str, x: torch.Tensor) -> Array:
        if x.requires_grad and grad_enabled():
            raise ValueError(f"{name} requires grad; rawattn computes no gradients: pass {name}.detach() or use torch.no_grad()")
        if x.is_cuda:
            device = x.get_device()
        elif x.is_cpu:
            device = None
        else:
            raise ValueError(f"{name} is a torch tensor on {x.device}; needed: one on a CUDA GPU or the CPU")
        dtype, itemsize = dtypes[x.dtype]
        try:
            pointer, shape = x.data_ptr(), tuple(x.shape)
            strides = tuple([stride * itemsize for stride in x.stride()])
        except RuntimeError:  # sparse and nested tensors, tensors inside torch.func
            pointer, shape, strides = 0, (1,), (1,)
        if not pointer and 0 not in shape:  # these, fake tensors and wrapper subclasses
            raise TypeError(f"{name} is a torch {type(x).__name__} ({x.layout}) that is no block of memory; needed: a plain dense tensor")
        return Array(x, "torch", pointer, shape, strides, dtype, device)

    return view_torch


def _view_jax(name: str, x: Any) -> Array:
    devices = x.devices()
    if len(devices) > 1:
        raise ValueError(f"{name} is a jax.Array over {len(devices)} devices; needed: one on a single device")
    if next(iter(devices)).platform == "cpu":
        host = np.asarray(x)
        return Array(x, "jax", host.ctypes.data, host.shape, host.strides, dtype_name(host.dtype), None)
    return _view_dlpack(name, x, "jax")


def _view_dlpack(name: str, x: Any, framework: str = "cupy") -> Array:
    """Through a CuPy view; DLPack orders CuPy's current stream after the work that produces `x`."""
    import cupy

    try:
        if x.__dlpack_device__()[0] not in (2, 13):  # kDLCUDA, kDLCUDAManaged
            raise BufferError("it is not on a CUDA GPU")
        owner = cupy.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = getattr(x, "dtype", "unknown dtype")
        raise TypeError(f"{name} is a {type(x).__name__} of {dtype} that CuPy cannot read: {error}") from error
    return _view_cupy(name, owner, framework)


def _refuse_tracer(name: str, x: Any) -> NoReturn:
    raise TypeError(
        f"{name} is a JAX tracer; attention() works on concrete arrays: call it outside jax.jit, jax.vmap and jax.grad, or call "
        "rawattn.jax.attention(), which jax.jit and jax.vmap take"
    )


def _refuse(name: str, x: Any) -> NoReturn:
    raise TypeError(f"{name} is a {type(x).__name__}; needed: a NumPy, CuPy, torch or JAX array, or another CUDA array with __dlpack__")


def _where(array: Array) -> str:
    return f"a {array.framework} array {'in host memory' if array.device is None else f'on GPU {array.device}'}"


@functools.cache
def dtype_name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy builds the string anew each time, in 2 us


@functools.lru_cache(1024)
def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


@functools.cache
def torch_stream_pointer() -> Callable[[int | None], int]:
    """The function that gives the handle of torch's current stream on a device."""
    import torch

    # torch's own generated code calls the private function: it spares building a Stream object.
    return getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def foreign_stream(pointer: int, device: int | None) -> Any:
    """A stream that another framework made, as a CuPy stream."""
    import cupy

    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, pointer)))
