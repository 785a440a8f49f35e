"""rawattn inside JAX programs: under jax.jit, jax.vmap and jax.shard_map, on XLA's stream, into XLA's buffers.

XLA calls Python with the addresses of its buffers (jax.experimental.buffer_callback), and that launches the kernel: nothing is copied and
the host waits for nothing. On a CPU the same call runs the float64 reference.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.buffer_callback import buffer_callback

from rawattn import arrays
from rawattn.arrays import Array
from rawattn.attention import PLANS_KEPT, AttentionCall
from rawattn.checks import Window, checked_options

Options = tuple[bool | str, Window | None, float | None, bool]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """rawattn.attention() of JAX arrays, traced or not.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), float16 or bfloat16 -> out (B, Sq, Hq, Dv), or (out, lse (B, Hq, Sq) float32).
    Options are those of rawattn.attention(). jax.vmap adds to the batch; jax.shard_map may split batch and heads (Hq and Hkv alike).

    Raises:
        TypeError, ValueError: as rawattn.attention(), while JAX traces. Gradients are not computed: JAX says so.

    >>> import jax, rawattn.jax
    >>> q = k = v = jax.numpy.ones((1, 4, 8, 64), jax.numpy.float16)
    >>> jax.jit(rawattn.jax.attention)(q, k, v).shape
    (1, 4, 8, 64)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array):
            raise TypeError(f"{name} is a {type(x).__name__}; needed: a jax.Array")
    options = (*checked_options(causal, window, scale), bool(return_lse))
    views = {name: _abstract(x.shape, x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    AttentionCall(views, *options[:3])  # raises what is wrong
    return _batched(options)(q, k, v)


@functools.lru_cache(1024)
def _batched(options: Options) -> Any:
    """One function for each set of options, so that JAX sees the same one at each trace."""

    @custom_vmap
    def call(q: Any, k: Any, v: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)]
        if options[3]:
            shapes.append(jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32))
        if 0 in q.shape or 0 in k.shape:  # nothing to compute, so nothing to call
            results = [jnp.full(x.shape, value, x.dtype) for x, value in zip(shapes, (0, -jnp.inf), strict=False)]
        else:
            results = buffer_callback(functools.partial(_run, options), shapes)(q, k, v)
        return tuple(results) if options[3] else results[0]

    @call.def_vmap
    def fold(size: int, batched: Any, *inputs: Any) -> Any:
        """The mapped axis becomes part of the batch."""
        whole = [x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(inputs, batched, strict=True)]
        results = call(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        unfolded = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, unfolded)

    return call


_local = threading.local()  # XLA calls from a thread for each device


def _run(options: Options, context: Any, outputs: Any, *inputs: Any) -> None:
    """Called by XLA with its buffers, in place of a kernel of its own."""
    kind, device = outputs[0].__dlpack_device__()
    views = {name: _view(x, device) for name, x in zip(("q", "k", "v"), inputs, strict=True)}
    out, *lse = (_view(x, device) for x in outputs)
    if kind == 1:  # kDLCPU
        _on_host(options, outputs, inputs)
        return
    import cupy

    calls = _local.__dict__.setdefault("calls", {})
    key = (options, device, *[(x.shape, x.dtype) for x in views.values()])
    with cupy.cuda.Device(device):
        call = calls.get(key)
        if call is None:
            if len(calls) >= PLANS_KEPT:
                calls.clear()
            call = calls[key] = AttentionCall(views, *options[:3])
            call.check_device()
        call.launch(views, out, lse[0] if lse else None, arrays.foreign_stream(context.stream, device))


def _on_host(options: Options, outputs: Any, inputs: Any) -> None:
    from rawattn import attention

    causal, window, scale, _ = options
    results = attention(*map(np.asarray, inputs), causal=causal, window=window, scale=scale, return_lse=True)
    for buffer, result in zip(outputs, results, strict=False):
        np.asarray(buffer)[...] = result


def _abstract(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that is not there yet: row by row, in host memory as far as the checks are concerned."""
    return Array(None, "jax", 0, shape, arrays.contiguous_strides(shape, dtype.itemsize), dtype.name, None)


def _view(buffer: Any, device: int) -> Array:
    """XLA hands buffers over row by row. `buffer` has no address but in its DLPack capsule, whose struct begins with it."""
    struct = ctypes.c_void_p.from_address(_capsule_pointer()(buffer.__dlpack__(), b"dltensor"))
    dtype = buffer.dtype
    strides = arrays.contiguous_strides(buffer.shape, dtype.itemsize)
    return Array(buffer, "jax", struct.value or 0, buffer.shape, strides, arrays.dtype_name(dtype), device)


@functools.cache
def _capsule_pointer() -> Any:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return get
