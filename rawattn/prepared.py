"""prepare(): the checks of attention() made once, for calls that cost the host little more than the launch.

attention() and its kin keep a Launcher themselves for each geometry of CuPy arrays and torch tensors that they have met.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import Array

if TYPE_CHECKING:
    from .attention import Call


class Access(NamedTuple):
    """How to reach the arrays of one framework on GPUs, in as few Python operations as it takes."""

    read: Callable[[Any], tuple[int, tuple]]  # address and geometry: arrays of equal geometry are laid out alike on one device
    empty: Callable[[Any, tuple[int, ...], Any], Any]  # from an array on the same device, a shape and a dtype of the framework's
    dtype: Callable[[str], Any]
    stream: Callable[[int], Any]  # the current stream of a device


NO_GEOMETRY: tuple[int, tuple] = (0, ())  # of what attention() refuses; nothing that it took has it


_accesses: dict[type, Access | None] = {}


def access(kind: type) -> Access | None:
    """For arrays of exactly this type; None for those that attention() looks at in full each time: NumPy's, JAX's, subclasses, others."""
    if kind not in _accesses:
        found = (kind.__module__.partition(".")[0], kind.__name__)
        _accesses[kind] = _cupy_access() if found == ("cupy", "ndarray") else _torch_access() if found == ("torch", "Tensor") else None
    return _accesses[kind]


def _cupy_access() -> Access:
    import cupy

    ndarray, current_stream = cupy.ndarray, cupy.cuda.get_current_stream

    def read(x: Any) -> tuple[int, tuple]:
        memory = x.data
        return memory.ptr, (x.shape, x.strides, x.dtype, memory.device_id)

    def empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return ndarray(shape, dtype)

    return Access(read, empty, np.dtype, current_stream)


def _torch_access() -> Access:
    import torch

    grad_enabled, stream_pointer, streams = torch.is_grad_enabled, arrays.torch_stream_pointer(), arrays.foreign_stream

    def read(x: Any) -> tuple[int, tuple]:
        if x.requires_grad and grad_enabled():
            return NO_GEOMETRY
        try:
            return x.data_ptr(), (x.shape, x.stride(), x.dtype, x.get_device())
        except RuntimeError:  # sparse and nested tensors, tensors inside torch.func
            return NO_GEOMETRY

    def empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return like.new_empty(shape, dtype=dtype)

    def stream(device: int) -> Any:
        return streams(stream_pointer(device), device)

    return Access(read, empty, functools.partial(getattr, torch), stream)


class Launcher:
    """Launches a call again on other arrays of its geometry, at addresses read from them. Keeps no array; not thread-safe, as the plan."""

    def __init__(self, access: Access, call: Call, views: dict[str, Array], return_lse: bool):
        import cupy

        self._read, self._empty, dtype, self._stream = access
        q = views["q"]
        assert q.device is not None
        self.call, self.device = call, q.device
        self._dtype, self._float32 = dtype(q.dtype), dtype("float32")
        self._inputs = {name: replace(a, owner=None) for name, a in views.items()}
        self._out = self._inputs.pop("out") if "out" in views else _contiguous(q, call.out_shape, q.dtype)
        self._lse = _contiguous(q, call.lse_shape, "float32") if return_lse else None
        self._arrays = [(a, 3 if a.dtype == "int32" else 15) for a in (*self._inputs.values(), self._out)]
        self._current_device = cupy.cuda.runtime.getDevice if cupy.cuda.runtime.getDeviceCount() > 1 else None
        self._switch = cupy.cuda.Device

    def __call__(self, q: Any, pointers: list[int], out: Any) -> Any:
        """out or (out, lse); None, and nothing launched, where an address is null or not aligned.

        `pointers` are the addresses of the call's arrays in their order, that of `out` the last if it is given.
        """
        if self._current_device is not None and self._current_device() != self.device:
            with self._switch(self.device):
                return self(q, pointers, out)
        if out is None:
            out = self._empty(q, self._out.shape, self._dtype)
            pointers.append(self._read(out)[0])
        for (array, low_bits), pointer in zip(self._arrays, pointers, strict=True):
            if pointer & low_bits or not pointer:
                return None
            array.pointer = pointer
        lse = None
        if self._lse is not None:
            lse = self._empty(q, self._lse.shape, self._float32)
            self._lse.pointer = self._read(lse)[0]
        self.call.launch(self._inputs, self._out, self._lse, self._stream(self.device))
        return out if lse is None else (out, lse)


def _contiguous(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An array beside `like` whose address is not known yet."""
    return Array(None, like.framework, 0, shape, arrays.contiguous_strides(shape, np.dtype(dtype).itemsize), dtype, like.device)


class Prepared:
    """What prepare() returns: op(q, k, v, *, out=None), attention() for arrays laid out as those prepared. Threads may share it."""

    def __init__(self, views: dict[str, Array], options: dict[str, Any], launcher: Launcher | None, attention: Callable[..., Any]):
        q = views["q"]
        self._kind = type(q.owner)
        self._options, self._attention, self._launcher = options, attention, launcher
        self._lock = threading.Lock()  # a plan's argument block is filled in place
        self._layouts = {name: (a.framework, a.device, a.dtype, a.shape, a.strides) for name, a in views.items()}
        found = access(self._kind)
        self._read: Any = found and found.read
        self._geometries = [found.read(a.owner)[1] for a in views.values()] if found else []

    def __call__(self, q: Any, k: Any, v: Any, *, out: Any = None) -> Any:
        """As attention(q, k, v, ..., out=out) with the arguments given to prepare().

        Raises ValueError for q, k or v that differ from those prepared in shape, strides, dtype, framework or device, for an out that
        is not a contiguous (B, Sq, Hq, Dv) beside them, and for an address that is not a multiple of 16 bytes. Nothing was launched then.
        """
        kind, launcher = self._kind, self._launcher
        if launcher is not None and type(q) is kind and type(k) is kind and type(v) is kind and (out is None or type(out) is kind):
            read = self._read
            found = [read(q), read(k), read(v)] if out is None else [read(q), read(k), read(v), read(out)]
            if [geometry for _, geometry in found] == self._geometries[: len(found)]:
                with self._lock:
                    result = launcher(q, [pointer for pointer, _ in found], out)
                if result is not None:
                    return result
        self._refuse_others({"q": q, "k": k, "v": v} | ({} if out is None else {"out": out}))
        return self._attention(q, k, v, **self._options, out=out)

    def _refuse_others(self, given: dict[str, Any]) -> None:
        for name, x in given.items():
            a, wanted = arrays.view(name, x), self._layouts[name]
            found = (a.framework, a.device, a.dtype, a.shape, a.strides)
            for what, value, expected in zip(("framework", "device", "dtype", "shape", "byte strides"), found, wanted, strict=True):
                if value != expected:
                    raise ValueError(f"{name} has {what} {value}; needed: {expected}, as prepared")
