"""prepare(): the checks of attention() made once, for calls that cost the host little more than the launch.

attention() and its kin keep a Launcher themselves for each geometry of CuPy arrays and torch tensors that they have met.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import Array

if TYPE_CHECKING:
    from .attention import Call


Reader = Callable[[Collection[Any]], tuple[list[int], list[Any]]]
Matcher = Callable[[Collection[Any]], "list[int] | None"]


class Access(NamedTuple):
    """How to reach the arrays of one framework on GPUs, in as few Python operations as it takes."""

    # Addresses and geometry: arrays of equal geometry are laid out alike on one device. Both are empty where one is of another type, or
    # one that attention() refuses.
    read: Reader
    # From examples: what gives the addresses of arrays that are laid out like them, and None for others.
    matcher: Callable[[Collection[Any]], Matcher]
    address: Callable[[Any], int]
    # From a view of q, a shape and a dtype: what allocates such an array beside any q like that.
    allocator: Callable[[Array, tuple[int, ...], str], Callable[[Any], Any]]
    stream: Callable[[int], int]  # handle of the current stream of a device


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

    def read(xs: Collection[Any]) -> tuple[list[int], list[Any]]:
        addresses: list[int] = []
        geometry: list[Any] = []
        for x in xs:
            if type(x) is not ndarray:
                return [], []
            memory = x.data
            addresses.append(memory.ptr)
            # The private flag, which CuPy's own Python code reads, is there at once; strides become a new tuple each time.
            geometry.append((x.shape, getattr(x, "_c_contiguous", False) or x.strides, x.dtype, memory.device_id))
        return addresses, geometry

    def allocator(q: Array, shape: tuple[int, ...], name: str) -> Callable[[Any], Any]:
        dtype = np.dtype(name)
        return lambda q: ndarray(shape, dtype)

    return Access(read, functools.partial(_matcher, read), attrgetter("data.ptr"), allocator, lambda device: current_stream(device).ptr)


def _torch_access() -> Access:
    import torch

    tensor, grad_enabled, address = torch.Tensor, torch.is_grad_enabled, torch.Tensor.data_ptr

    def read(xs: Collection[Any]) -> tuple[list[int], list[Any]]:
        addresses: list[int] = []
        geometry: list[Any] = []
        computes_gradients = grad_enabled()
        try:
            for x in xs:
                if type(x) is not tensor or (computes_gradients and x.requires_grad):
                    return [], []
                addresses.append(x.data_ptr())
                geometry.append((x.shape, x.stride(), x.dtype, x.get_device()))
        except RuntimeError:  # sparse and nested tensors, tensors inside torch.func
            return [], []
        return addresses, geometry

    def matcher(examples: Collection[Any]) -> Matcher:
        others = _matcher(read, examples)
        try:
            # What torch.compile looks at before each call, in a fifth of the time: type, dtype, device, sizes, strides, requires_grad,
            # dispatch keys. A private class, which may be gone; and it says no to some that are alike, in inference_mode() for one.
            guards = torch._C._dynamo.guards.TensorGuards(
                *[x.detach() for x in examples], dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
        except Exception:
            return others
        are_alike = guards.check

        def match(xs: Collection[Any]) -> list[int] | None:
            return [*map(address, xs)] if are_alike(*xs) else others(xs)

        return match

    def allocator(q: Array, shape: tuple[int, ...], name: str) -> Callable[[Any], Any]:
        if (shape, name) == (q.shape, q.dtype):
            return functools.partial(torch.empty_like, memory_format=torch.contiguous_format)  # in half the time
        dtype = getattr(torch, name)
        return lambda q: q.new_empty(shape, dtype=dtype)

    return Access(read, matcher, address, allocator, arrays.torch_stream_pointer())


def _matcher(read: Reader, examples: Collection[Any]) -> Matcher:
    _, wanted = read(examples)

    def match(xs: Collection[Any]) -> list[int] | None:
        addresses, geometry = read(xs)
        return addresses if wanted and geometry == wanted else None

    return match


class Launcher:
    """Launches a plan again on other arrays of its geometry. Keeps no array; not thread-safe, as the plan."""

    def __init__(self, access: Access, call: Call, views: dict[str, Array], return_lse: bool):
        import cupy

        q = views["q"]
        assert q.device is not None
        self.plan, self.device = call.plan, q.device
        self._launch, self._stream, self._address = call.plan.launch, access.stream, access.address
        self._new_out = access.allocator(q, call.out_shape, q.dtype)
        self._new_lse = access.allocator(q, call.lse_shape, "float32") if return_lse else None
        self._low_bits = [3 if a.dtype == "int32" else 15 for name, a in views.items() if name != "out"] + [15]
        self._current_device = cupy.cuda.runtime.getDevice if cupy.cuda.runtime.getDeviceCount() > 1 else None

    def launch(self, q: Any, addresses: list[int], out: Any) -> Any:
        """out or (out, lse); None, and nothing launched, where an address is null or not aligned.

        `addresses` are those of the call's arrays in their order, that of `out` the last if it is given.
        """
        if self._current_device is not None and self._current_device() != self.device:
            import cupy

            with cupy.cuda.Device(self.device):
                return self.launch(q, addresses, out)
        if out is None:
            out = self._new_out(q)
            addresses.append(self._address(out))
        set_bits = 0
        for address in addresses:
            set_bits |= address
        if 0 in addresses or (set_bits & 15 and not self._are_aligned(addresses)):
            return None
        out_address = addresses.pop()
        if self._new_lse is None:
            self._launch(self._stream(self.device), out_address, 0, addresses)
            return out
        lse = self._new_lse(q)
        self._launch(self._stream(self.device), out_address, self._address(lse), addresses)
        return out, lse

    def _are_aligned(self, addresses: list[int]) -> bool:
        return not any(address & bits for address, bits in zip(addresses, self._low_bits, strict=True))


class Prepared:
    """What prepare() returns: op(q, k, v, *, out=None), attention() for arrays laid out as those prepared. Threads may share it."""

    def __init__(self, views: dict[str, Array], options: dict[str, Any], launcher: Launcher | None, attention: Callable[..., Any]):
        self._options, self._attention = options, attention
        self._layouts = {name: (a.framework, a.device, a.dtype, a.shape, a.strides) for name, a in views.items()}
        self._lock = threading.Lock()  # a plan's argument block is filled in place
        self._launcher, found = launcher, access(type(views["q"].owner))
        if launcher is not None and found is not None:
            examples = [a.owner for a in views.values()]
            self._match, self._match_with_out = found.matcher(examples[:3]), found.matcher(examples)

    def __call__(self, q: Any, k: Any, v: Any, *, out: Any = None) -> Any:
        """As attention(q, k, v, ..., out=out) with the arguments given to prepare().

        Raises ValueError for q, k or v that differ from those prepared in shape, strides, dtype, framework or device, for an out that
        is not a contiguous (B, Sq, Hq, Dv) beside them, and for an address that is not a multiple of 16 bytes. Nothing was launched then.
        """
        launcher = self._launcher
        if launcher is not None:
            addresses = self._match((q, k, v)) if out is None else self._match_with_out((q, k, v, out))
            if addresses is not None:
                with self._lock:
                    result = launcher.launch(q, addresses, out)
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
