"""attention() and attention_varlen(): check -> spec -> kernel -> launch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arrays, reference
from .arrays import Array
from .compiler import check_gpu, current_device
from .launch import Plan
from .prepared import Launcher, Prepared, access
from .spec import DTYPES, KernelSpec

UNBOUNDED = 1 << 30  # a window this wide hides nothing; positions stay within int32
LONGEST = (1 << 29) - 1
PLANS_KEPT = 4096

Window = tuple[int | None, int | None]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention: softmax(scale * q k^T + mask) v, for each sequence and head.

    Args:
        q: queries (B, Sq, Hq, D), float16 or bfloat16: a CuPy, torch or JAX array on a Hopper GPU, or a NumPy array or CPU tensor, which
            the float64 reference computes. The last axis is contiguous, other strides are any multiples of 16 bytes. D is a multiple of 8
            up to 256.
        k: keys (B, Sk, Hkv, D); Hq is a multiple of Hkv (grouped-query attention).
        v: values (B, Sk, Hkv, Dv); Dv is a multiple of 8 up to 256.
        causal: True hides from query i the keys after i + Sk - Sq (the diagonal ends bottom right); "top-left" those after i.
        window: (left, right), how many keys to each side of its diagonal a query sees; None or -1 is unbounded.
        scale: multiplies the scores, 1/sqrt(D) by default.
        out: where to write the result (B, Sq, Hq, Dv); a new array by default.
        return_lse: also return the natural log of the sum of exp of the scaled scores, (B, Hq, Sq) float32.

    Returns:
        out, or (out, lse): arrays of the kind that q is. A query that sees no key has output 0 and LSE -inf.

    Raises:
        TypeError, ValueError: names the argument, what it was and what is needed; nothing was launched.
        UnsupportedEnvironment: no usable GPU, driver or compiler for arrays on a GPU.

    The work is queued on the stream that is current for the arrays' framework; the host waits for nothing but the compiler, at the first
    call of a kind, which is to be made before a CUDA graph captures one. Two runs give the same bits, and a sequence's result does not
    depend on the batch around it. The method is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608).

    >>> import numpy as np, rawattn
    >>> q = np.ones((1, 4, 8, 64), np.float16)
    >>> k = v = np.ones((1, 4, 2, 64), np.float16)
    >>> rawattn.attention(q, k, v, causal=True).shape
    (1, 4, 8, 64)
    """
    inputs = {"q": q, "k": k, "v": v}
    fast = access(kind := type(q))
    if fast is None or type(k) is not kind or type(v) is not kind or not (out is None or type(out) is kind):
        return _attend(inputs, causal, window, scale, out, return_lse)
    q_pointer, q_geometry = fast.read(q)
    k_pointer, k_geometry = fast.read(k)
    v_pointer, v_geometry = fast.read(v)
    # With its types, or 1 would pass for True once True has been found right.
    options = (causal, type(causal), None if window is None else str(window), scale, return_lse)
    key = (kind, q_geometry, k_geometry, v_geometry, None if out is None else fast.read(out)[1], options)
    launchers = _local.__dict__.setdefault("launchers", {})
    launcher = launchers.get(key)
    if launcher is not None:
        result = launcher(q, q_pointer, k_pointer, v_pointer, out)
        if result is not None:
            return result
    call, views = _checked_call(inputs, causal, window, scale, out, return_lse)
    result = call(views, causal, window, return_lse)
    if call.plan is not None:
        if len(launchers) >= PLANS_KEPT:
            launchers.clear()
        launchers[key] = Launcher(fast, call.plan, views["q"], call.out_shape, call.lse_shape if return_lse else None)
    return result


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Prepared:
    """attention() with its checks made now: `op = prepare(q, k, v, causal=True)`, then `op(q, k, v, out=out)` as often as wanted.

    Args:
        q, k, v, causal, window, scale, return_lse: as for attention(). The arrays are examples: neither read nor kept.

    Returns:
        op(q, k, v, *, out=None), for any arrays with the shapes, strides, dtypes, framework and device of the examples; out is contiguous.
        It compares these, looks whether addresses are multiples of 16 bytes, and encodes a tensor map anew only where an address
        changed. What differs is a ValueError. Threads may share it.

    Raises:
        As attention(). On a GPU the kernel is compiled and loaded here, not at the first call.

    >>> import numpy as np, rawattn
    >>> q = k = v = np.ones((1, 4, 8, 64), np.float16)
    >>> op = rawattn.prepare(q, k, v, causal=True)
    >>> op(q, k, v).shape
    (1, 4, 8, 64)
    >>> op(q, k[:, :3], v)
    Traceback (most recent call last):
    ValueError: k has shape (1, 3, 8, 64); needed: (1, 4, 8, 64), as prepared
    """
    options = {"causal": causal, "window": window, "scale": scale, "return_lse": return_lse}
    views = {name: arrays.view(name, x) for name, x in {"q": q, "k": k, "v": v}.items()}
    call = Call(views, *checked_options(causal, window, scale))
    if call.device is not None:
        call.check_device()
    views["out"] = arrays.empty(views["q"], call.out_shape, views["q"].dtype)
    launcher, fast = None, access(type(q))
    if fast is not None and call.device is not None and not any(0 in a.shape for a in views.values()):
        import cupy

        with cupy.cuda.Device(call.device):
            plan = call.make_plan(views, views["out"])
        launcher = Launcher(fast, plan, views["q"], call.out_shape, call.lse_shape if return_lse else None)
    return Prepared(views, options, launcher, attention)


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    scale: float | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """attention() over sequences of different lengths packed one after the other.

    Args:
        q: queries (Tq, Hq, D) of all sequences; k: keys (Tk, Hkv, D); v: values (Tk, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32: sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q. Ascending, from 0 to at most Tq;
            lengths may be zero. On a GPU it stays there: the host never reads it, so that a captured CUDA graph replays with new lengths.
        cu_seqlens_k: (B + 1,) int32, likewise for k and v.
        causal, window, scale, out, return_lse: as for attention(), for each sequence; out is (Tq, Hq, Dv), the LSE (Hq, Tq).
            Rows of out and LSE that belong to no sequence are undefined.

    Returns:
        out, or (out, lse), of the kind that q is.

    Raises:
        As attention().

    >>> import numpy as np, rawattn
    >>> q = k = v = np.ones((7, 2, 64), np.float16)
    >>> lengths = np.array([0, 3, 3, 7], np.int32)
    >>> rawattn.attention_varlen(q, k, v, lengths, lengths).shape
    (7, 2, 64)
    """
    inputs = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _attend(inputs, causal, window, scale, out, return_lse)


_local = threading.local()  # plans fill their argument block in place, so each thread has its own


def _attend(inputs: dict[str, Any], causal: bool | str, window: Window | None, scale: float | None, out: Any, return_lse: bool) -> Any:
    call, views = _checked_call(inputs, causal, window, scale, out, return_lse)
    return call(views, causal, window, return_lse)


def _checked_call(
    inputs: dict[str, Any], causal: bool | str, window: Window | None, scale: float | None, out: Any, return_lse: bool
) -> tuple[Call, dict[str, Array]]:
    views = {name: arrays.view(name, x) for name, x in inputs.items()}
    if out is not None:
        views["out"] = arrays.view("out", out)
    causal, window, scale = checked_options(causal, window, scale)
    key = (causal, window, scale, return_lse, *[(a.shape, a.strides, a.dtype, a.device, a.framework) for a in views.values()])
    plans = _local.__dict__.setdefault("plans", {})
    call = plans.get(key)
    if call is None:
        call = Call(views, causal, window, scale)
        if call.device is not None:
            if len(plans) >= PLANS_KEPT:
                plans.clear()
            plans[key] = call
    return call, views


class Call:
    """A call whose arguments have been found right. It is kept for the next call on arrays of the same geometry, and keeps no array."""

    def __init__(self, views: dict[str, Array], causal: bool | str, window: Window | None, scale: float | None):
        q, k, v = views["q"], views["k"], views["v"]
        varlen = "cu_seqlens_q" in views
        _check_arrays(views, varlen)
        left, right = _window_bounds(causal, window)
        if left < UNBOUNDED:
            mask = "window"
        elif right < UNBOUNDED:
            mask = "causal"
        else:
            mask = "full"
        self.device, self.varlen = q.device, varlen
        self.scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.spec = KernelSpec(q.dtype, q.shape[-1], v.shape[-1], q.shape[-2] // k.shape[-2] if k.shape[-2] else 1, mask, varlen)
        self.out_shape = (*q.shape[:-1], v.shape[-1])
        self.lse_shape = (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])
        self.left, self.right, self.bottom_right = left, right, causal != "top-left"
        self.batch = views["cu_seqlens_q"].shape[0] - 1 if varlen else q.shape[0]
        self.plan: Plan | None = None

    def __call__(self, views: dict[str, Array], causal: bool | str, window: Window | None, return_lse: bool) -> Any:
        return self.on_host(views, causal, window, return_lse) if self.device is None else self.on_device(views, return_lse)

    def on_host(self, views: dict[str, Array], causal: bool | str, window: Window | None, return_lse: bool) -> Any:
        q = views["q"]
        inputs = [arrays.to_numpy(a) for name, a in views.items() if name != "out"]
        compute = reference.attention_varlen if self.varlen else reference.attention
        out, lse = compute(*inputs, causal=causal, window=window, scale=self.scale, return_lse=True)
        out = out.astype(inputs[0].dtype)
        if "out" in views:
            np.copyto(arrays.to_numpy(views["out"]), out)
            result = views["out"].owner
        else:
            result = arrays.from_numpy(out, q)
        return (result, arrays.from_numpy(lse.astype(np.float32), q)) if return_lse else result

    def on_device(self, views: dict[str, Array], return_lse: bool) -> Any:
        q = views["q"]
        for name, array in views.items():
            if array.pointer % 16 and not name.startswith("cu_"):
                raise ValueError(f"{name} starts at address {array.pointer:#x}; needed: a multiple of 16 bytes")
        if self.plan is None:
            self.check_device()
        out = views.get("out") or arrays.empty(q, self.out_shape, q.dtype)
        lse = arrays.empty(q, self.lse_shape, "float32") if return_lse else None
        import cupy

        stream = arrays.current_stream(q)
        if cupy.cuda.runtime.getDevice() == q.device:
            self.launch(views, out, lse, stream)
        else:
            with cupy.cuda.Device(q.device):
                self.launch(views, out, lse, stream)
        inputs = tuple(views.values())
        result = arrays.hand_back(out, q, inputs)
        return (result, arrays.hand_back(lse, q, inputs)) if lse is not None else result

    def check_device(self) -> None:
        current_device()  # says what is missing where there is no driver
        assert self.device is not None
        check_gpu(self.device)

    def make_plan(self, views: dict[str, Array], out: Array) -> Plan:
        """Compiles or loads the kernel. On the current device."""
        arguments = views["q"], views["k"], views["v"], out, self.batch, self.left, self.right, self.bottom_right, self.scale
        self.plan = Plan(self.spec, *arguments)
        return self.plan

    def launch(self, views: dict[str, Array], out: Array, lse: Array | None, stream: Any) -> None:
        """On the current device, on `stream`."""
        q, k, v = views["q"], views["k"], views["v"]
        if 0 in out.shape:
            return
        if 0 in k.shape or self.batch == 0:
            _fill_without_keys(out, lse, stream, wanted=self.batch > 0)
            return
        plan = self.plan or self.make_plan(views, out)
        cu_q, cu_k = (views["cu_seqlens_q"].pointer, views["cu_seqlens_k"].pointer) if self.varlen else (0, 0)
        plan.launch(q.pointer, k.pointer, v.pointer, out.pointer, lse.pointer if lse else 0, cu_q, cu_k, stream)


def _check_arrays(views: dict[str, Array], varlen: bool) -> None:
    q, k, v = views["q"], views["k"], views["v"]
    form = (
        {"q": "(Tq, Hq, D)", "k": "(Tk, Hkv, D)", "v": "(Tk, Hkv, Dv)"}
        if varlen
        else {"q": "(B, Sq, Hq, D)", "k": "(B, Sk, Hkv, D)", "v": "(B, Sk, Hkv, Dv)"}
    )
    arrays.check_together(views)
    for name, layout in form.items():
        array = views[name]
        if len(array.shape) != len(form["q"].split(",")):
            raise ValueError(f"{name} has shape {array.shape}; needed: {layout}")
        if array.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {array.dtype}; needed: {' or '.join(DTYPES)}")
        if array.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; needed: {q.dtype}, as q has")
        if not (8 <= array.shape[-1] <= 256 and array.shape[-1] % 8 == 0):
            raise ValueError(f"{name} has head_dim {array.shape[-1]}; needed: a multiple of 8 from 8 to 256")
        if array.shape[-3] > LONGEST:
            raise ValueError(f"{name} has {array.shape[-3]} rows; needed: at most {LONGEST}")
        _check_strides(name, array)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head_dim {k.shape[-1]}; needed: {q.shape[-1]}, as q has")
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(f"v has {v.shape[-3]} rows of {v.shape[-2]} heads; needed: {k.shape[-3]} rows of {k.shape[-2]} heads, as k has")
    if not varlen:
        for name in ("k", "v"):
            if views[name].shape[0] != q.shape[0]:
                raise ValueError(f"{name} has batch {views[name].shape[0]}; needed: {q.shape[0]}, as q has")
    if (k.shape[-2] == 0 and q.shape[-2] > 0) or (k.shape[-2] > 0 and q.shape[-2] % k.shape[-2]):
        raise ValueError(f"q has {q.shape[-2]} heads and k has {k.shape[-2]}; needed: a multiple of k's heads in q")
    for name in ("cu_seqlens_q", "cu_seqlens_k") if varlen else ():
        array = views[name]
        if array.dtype != "int32":
            raise TypeError(f"{name} has dtype {array.dtype}; needed: int32")
        if len(array.shape) != 1 or array.shape[0] < 1 or (array.shape[0] > 1 and array.strides[0] != 4):
            raise ValueError(f"{name} has shape {array.shape} and byte strides {array.strides}; needed: (B + 1,), contiguous")
        if array.shape != views["cu_seqlens_q"].shape:
            raise ValueError(f"{name} has {array.shape[0]} entries; needed: {views['cu_seqlens_q'].shape[0]}, as cu_seqlens_q has")
        if array.device is None:
            _check_lengths(name, arrays.to_numpy(array), views["q" if name == "cu_seqlens_q" else "k"].shape[0])
    if "out" in views:
        out, shape = views["out"], (*q.shape[:-1], v.shape[-1])
        if out.framework == "jax":
            raise TypeError("out is a jax.Array, which nothing may write to; needed: no out")
        if out.shape != shape:
            raise ValueError(f"out has shape {out.shape}; needed: {shape}")
        if out.dtype != q.dtype:
            raise TypeError(f"out has dtype {out.dtype}; needed: {q.dtype}, as q has")
        if out.framework == "numpy" and not out.owner.flags.writeable:
            raise ValueError("out is read-only; needed: an array to write to")
        _check_strides("out", out)
        if 0 not in shape and any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)):
            raise ValueError(f"out has byte strides {out.strides}; needed: no two elements in one place")


def _check_strides(name: str, array: Array) -> None:
    *outer, last = array.strides
    if 0 in array.shape or array.device is None:
        return
    if last != 2 and array.shape[-1] > 1:
        raise ValueError(f"{name} has a byte stride of {last} on its last axis; needed: 2, contiguous")
    for size, stride in zip(array.shape[:-1], outer, strict=True):
        if size > 1 and (stride % 16 or not 0 <= stride < 1 << 40):
            raise ValueError(f"{name} has byte strides {array.strides}; needed: multiples of 16 from 0 to 2**40 on every axis but the last")


def _check_lengths(name: str, cu_seqlens: np.ndarray, rows: int) -> None:
    if cu_seqlens[0] != 0 or (np.diff(cu_seqlens) < 0).any() or cu_seqlens[-1] > rows:
        raise ValueError(f"{name} is {cu_seqlens.tolist()}; needed: ascending from 0 to at most {rows}")


def checked_options(causal: bool | str, window: Window | None, scale: float | None) -> tuple[bool | str, Window | None, float | None]:
    if not isinstance(causal, (bool, np.bool_)) and causal != "top-left":
        raise ValueError(f"causal is {causal!r}; needed: False, True or 'top-left'")
    return causal, None if window is None else _checked_window(window), None if scale is None else _checked_scale(scale)


def _checked_scale(scale: float) -> float:
    if not isinstance(scale, (int, float, np.integer, np.floating)):
        raise TypeError(f"scale is {scale!r}; needed: a finite number above 0")
    if not 1e-37 <= scale <= 1e38:  # float32 holds it times log2(e); NaN fails
        raise ValueError(f"scale is {scale!r}; needed: a finite number above 0 that float32 holds, from 1e-37 to 1e38")
    return float(scale)


def _checked_window(window: Window) -> Window:
    if not isinstance(window, Sequence) or len(window) != 2:
        raise ValueError(f"window is {window!r}; needed: (left, right)")
    for side in window:
        if side is not None and (not isinstance(side, (int, np.integer)) or side < -1):
            raise ValueError(f"window is {window!r}; needed: two integers from 0 up, None or -1 for unbounded")
    return window[0], window[1]


def _window_bounds(causal: bool | str, window: Window | None) -> tuple[int, int]:
    """Keys that a query sees to the left and to the right of its diagonal."""
    bounds = [UNBOUNDED if side is None or side == -1 else min(int(side), UNBOUNDED) for side in window or (None, None)]
    if causal:
        bounds[1] = min(bounds[1], 0)
    return bounds[0], bounds[1]


def _fill_without_keys(out: Array, lse: Array | None, stream: Any, wanted: bool) -> None:
    """No key at all: outputs 0 and LSE -inf, without a kernel (a tensor map cannot be empty)."""
    if not wanted:
        return
    with stream:
        arrays.as_cupy(out)[...] = 0
        if lse is not None:
            arrays.as_cupy(lse)[...] = -math.inf
