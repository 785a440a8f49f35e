"""attention(), attention_varlen(), attention_with_kvcache() and prepare(): check -> spec -> kernel -> launch."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from . import arrays, checks, launch, reference
from .arrays import Array
from .checks import Window
from .compiler import check_gpu, current_device
from .prepared import Launcher, Prepared, access
from .spec import KernelSpec
from .tiles import is_short, split_rows

PLANS_KEPT = 4096
FEW_QUERIES = 4  # attention() splits the keys where there are so many times as many of them as queries
LENGTHS_MADE = 1024  # arrays for a cache_seqlens that is a number are made so many at a time


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
    call of a kind (few sequences and many are two), which is to be made before a CUDA graph captures one. Two runs give the same bits, and
    a sequence's result does not depend on the batch around it. Where there are four times as many keys as queries or more, the keys may be
    split among the GPU's multiprocessors, by the shapes of one sequence alone; attention_varlen() does not split, and may differ in the
    last bit. The method is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608).

    >>> import numpy as np, rawattn
    >>> q = np.ones((1, 4, 8, 64), np.float16)
    >>> k = v = np.ones((1, 4, 2, 64), np.float16)
    >>> rawattn.attention(q, k, v, causal=True).shape
    (1, 4, 8, 64)
    """
    inputs = {"q": q, "k": k, "v": v}
    if out is not None:
        inputs["out"] = out
    return _attend(AttentionCall, inputs, checks.checked_options(causal, window, scale), return_lse)


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
    views = _views({"q": q, "k": k, "v": v})
    call = AttentionCall(views, *checks.checked_options(causal, window, scale))
    if call.device is not None:
        call.check_device()
    out = arrays.empty(views["q"], call.out_shape, views["q"].dtype)
    launcher, fast = None, access(type(q))
    if fast is not None and call.device is not None and not any(0 in a.shape for a in (*views.values(), out)):
        import cupy

        with cupy.cuda.Device(call.device):
            call.plan = call.make_plan(views, out)
        launcher = Launcher(fast, call, views, return_lse)
    return Prepared(views | {"out": out}, options, launcher, attention)


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
    if out is not None:
        inputs["out"] = out
    return _attend(AttentionCall, inputs, checks.checked_options(causal, window, scale), return_lse)


def attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    cache_seqlens: Any,
    page_table: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    cu_seqlens_q: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: Window | None = None,
    scale: float | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """attention() of new queries to the keys in a cache, to which new keys may be appended first.

    Args:
        q: queries (B, Sq, Hq, D), or (Tq, Hq, D) of sequences packed one after the other, with cu_seqlens_q.
        k_cache: keys (B, S_max, Hkv, D), or pages of them (pages, page_size, Hkv, D) with page_table; any page size from 1 up.
        v_cache: values (B, S_max, Hkv, Dv), or pages of them, likewise.
        k, v: rows to append, (B, Sq, Hkv, D) and (B, Sq, Hkv, Dv), or packed: as many as q has. They are written into k_cache and v_cache,
            in place, from position cache_seqlens[b] on, and seen by the queries. Without them the cache is only read. Where sequences share
            rows or pages, none may see among its cached keys what another one of the call appends.
        cache_seqlens: (B,) int32, how many keys each sequence has in the cache, without the new ones; or one int for all. An array on a GPU
            is never read by the host, so that a captured CUDA graph replays with new lengths (page_table and the others below likewise).
        page_table: (B, max_pages) int32: position p of sequence b is row p % page_size of page page_table[b, p // page_size]. Entries past
            the pages that are used may be anything.
        cache_batch_idx: (B,) int32, the row of the caches that each sequence has, b by default. Not with page_table.
        cache_leftpad: (B,) int32, the position of each sequence's first key: those before it are not seen. Not with page_table.
        cu_seqlens_q: (B + 1,) int32: sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q, k and v.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2) of q's dtype, contiguous, with at least as many positions as the cache holds;
            rotary_dim is a multiple of 16 up to D. The first rotary_dim columns of new key i are rotated at position cache_seqlens[b] + i
            before they are written, those of query i likewise (with neither causal nor window, all queries at cache_seqlens[b]); in
            float32, rounded once. Needs k and v.
        rotary_interleaved: rotate columns 0 and 1, 2 and 3, ... together, instead of column j and j + rotary_dim / 2.
        causal: hides from query i of Sq the keys after i + Sk - Sq, where Sk counts the sequence's keys, the new ones included.
        window, scale, out, return_lse: as for attention(); out is (B, Sq, Hq, Dv) or (Tq, Hq, Dv), the LSE (B, Hq, Sq) or (Hq, Tq).

    Returns:
        out, or (out, lse), of the kind that q is. A query that sees no key has output 0 and LSE -inf.

    Raises:
        As attention(); nothing was written. What does not fit into the cache is refused where the host knows the lengths (an int, or arrays
        in host memory); on a GPU, rows that do not fit are not written, and Sk ends with the capacity.

    The arguments are those of FlashAttention-3's flash_attn_with_kvcache, except that
        - causal is True and rotary_interleaved is False by default;
        - window_size, softmax_scale and return_softmax_lse are called window, scale and return_lse, as in attention();
        - cache_seqlens must be given; for a full cache it is its capacity;
        - k and v have as many rows as q, so there is no cu_seqlens_k_new; max_seqlen_q, rotary_seqlens, scheduler_metadata, num_splits,
          pack_gqa and sm_margin are not needed;
        - qv, descales, attention_chunk and softcap are not there;
        - rows past the capacity are not written, and a row's bits do not depend on the batch, the lengths in it, or the pages (a packed q
          is served by another kernel than a (B, Sq, Hq, D) one, and may differ in the last bit).

    What attention() says of streams, graphs and bits holds here too. The host path writes appended rows into the caller's NumPy arrays or
    CPU tensors; a JAX array cannot be written to, so caches of JAX are only read.

    >>> import numpy as np, rawattn
    >>> k_cache, v_cache = np.zeros((2, 16, 2, 64), np.float16), np.zeros((2, 16, 2, 64), np.float16)
    >>> q, k, v = np.ones((2, 1, 8, 64), np.float16), np.ones((2, 1, 2, 64), np.float16), np.full((2, 1, 2, 64), 6, np.float16)
    >>> lengths = np.array([0, 2], np.int32)
    >>> rawattn.attention_with_kvcache(0 * q, k_cache, v_cache, k, v, cache_seqlens=lengths)[:, 0, 0, 0]
    array([6., 2.], dtype=float16)
    >>> v_cache[:, :4, 0, 0]
    array([[6., 0., 0., 0.],
           [0., 0., 6., 0.]], dtype=float16)
    """
    if not isinstance(causal, (bool, np.bool_)):
        raise ValueError(f"causal is {causal!r}; needed: False or True")
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    optional = {
        "k": k, "v": v, "page_table": page_table, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad,
        "cu_seqlens_q": cu_seqlens_q, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "out": out,
    }  # fmt: skip
    given = {name: x for name, x in optional.items() if x is not None}
    options = (*checks.checked_options(causal, window, scale), bool(rotary_interleaved))
    if isinstance(cache_seqlens, (int, np.integer)) and not isinstance(cache_seqlens, bool):
        views = _views(inputs | given)
        call = _checked_call(CacheCall, views, options)
        return call(call.with_length(views, cache_seqlens), return_lse)
    return _attend(CacheCall, inputs | {"cache_seqlens": cache_seqlens} | given, options, return_lse)


_lengths_made: dict[tuple[int, int, int], Any] = {}  # never emptied, for captured graphs read them


class _Local(threading.local):
    """What each thread keeps for itself: plans fill their argument block in place."""

    def __init__(self) -> None:
        self.launchers: dict[tuple, Launcher] = {}
        self.plans: dict[tuple, Call] = {}


_local = _Local()


def _attend(kind: Callable[..., Any], inputs: dict[str, Any], options: tuple, return_lse: bool) -> Any:
    """The result of a call of that kind. Where arrays of this geometry have been found right before, it is launched at once."""
    q = inputs["q"]
    fast = access(type(q))
    geometry: list[Any] = []
    if fast is not None:
        addresses, geometry = fast.read(inputs.values())
        key = (kind, options, return_lse, *inputs, *geometry)
        launcher = _local.launchers.get(key)
        if launcher is not None:
            result = launcher.launch(q, addresses, inputs.get("out"))
            if result is not None:
                return result
    views = _views(inputs)
    call = _checked_call(kind, views, options)
    result = call(views, return_lse)
    if fast is not None and geometry and call.plan is not None:
        if len(_local.launchers) >= PLANS_KEPT:
            _local.launchers.clear()
        _local.launchers[key] = Launcher(fast, call, views, return_lse)
    return result


def _views(inputs: dict[str, Any]) -> dict[str, Array]:
    return {name: arrays.view(name, x) for name, x in inputs.items()}


def _checked_call(kind: Callable[..., Any], views: dict[str, Array], options: tuple) -> Any:
    """The call of that kind on arrays of this geometry: one that was found right before, or else a new one."""
    key = (kind, options, *views, *[(a.shape, a.strides, a.dtype, a.device, a.framework) for a in views.values()])
    call = _local.plans.get(key)
    if call is None:
        call = kind(views, *options)
        if call.device is not None:
            if len(_local.plans) >= PLANS_KEPT:
                _local.plans.clear()
            _local.plans[key] = call
    return call


class Call(ABC):
    """A call whose arguments have been found right. It is kept for the next call on arrays of the same geometry, and keeps no array."""

    def __init__(self, q: Array, v: Array, batch: int, causal: bool | str, window: Window | None, scale: float | None):
        packed = len(q.shape) == 3
        self.device, self.batch = q.device, batch
        self.out_shape = (*q.shape[:-1], v.shape[-1])
        self.lse_shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
        self.left, self.right = checks.window_bounds(causal, window)
        self.scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.masks: dict[str, Any] = {"causal": causal, "window": window, "scale": self.scale}
        self.plan: Any = None
        self.has_no_keys: bool

    def __call__(self, views: dict[str, Array], return_lse: bool) -> Any:
        return self.on_host(views, return_lse) if self.device is None else self.on_device(views, return_lse)

    def on_host(self, views: dict[str, Array], return_lse: bool) -> Any:
        q = views["q"]
        inputs = {name: arrays.to_numpy(a) for name, a in views.items() if name != "out"}
        out, lse = self._compute(inputs)
        out = out.astype(inputs["q"].dtype)
        if "out" in views:
            np.copyto(arrays.to_numpy(views["out"]), out)
            result = views["out"].owner
        else:
            result = arrays.from_numpy(out, q)
        return (result, arrays.from_numpy(lse.astype(np.float32), q)) if return_lse else result

    def on_device(self, views: dict[str, Array], return_lse: bool) -> Any:
        q = views["q"]
        for name, array in views.items():
            alignment = 4 if array.dtype == "int32" else 16
            if array.pointer % alignment:
                raise ValueError(f"{name} starts at address {array.pointer:#x}; needed: a multiple of {alignment} bytes")
        if self.plan is None:
            self.check_device()
        inputs = {name: a for name, a in views.items() if name != "out"}
        out = views.get("out") or arrays.empty(q, self.out_shape, q.dtype)
        lse = arrays.empty(q, self.lse_shape, "float32") if return_lse else None
        import cupy

        stream = arrays.current_stream(q)
        if cupy.cuda.runtime.getDevice() == q.device:
            self.launch(inputs, out, lse, stream)
        else:
            with cupy.cuda.Device(q.device):
                self.launch(inputs, out, lse, stream)
        read = tuple(inputs.values())
        result = arrays.hand_back(out, q, read)
        return (result, arrays.hand_back(lse, q, read)) if lse is not None else result

    def check_device(self) -> None:
        current_device()  # says what is missing where there is no driver
        assert self.device is not None
        check_gpu(self.device)

    def launch(self, inputs: dict[str, Array], out: Array, lse: Array | None, stream: Any) -> None:
        """On the current device: the work, queued on `stream`."""
        if 0 in out.shape or self.batch == 0:
            return
        if self.has_no_keys:
            _fill_without_keys(out, lse, stream)
            return
        if self.plan is None:
            self.plan = self.make_plan(inputs, out)
        self.plan.launch(stream.ptr, out.pointer, lse.pointer if lse else 0, [a.pointer for a in inputs.values()])

    @abstractmethod
    def make_plan(self, inputs: dict[str, Array], out: Array) -> Any:
        """What launches the kernel, compiled or loaded on the current device: launch(stream, out, lse, addresses of the inputs)."""

    @abstractmethod
    def _compute(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """On the host: out and LSE in float64."""


class AttentionCall(Call):
    def __init__(self, views: dict[str, Array], causal: bool | str, window: Window | None, scale: float | None):
        q, k, v = views["q"], views["k"], views["v"]
        self.varlen = "cu_seqlens_q" in views
        checks.check_attention(views, self.varlen)
        super().__init__(q, v, checks.batch_of(views), causal, window, scale)
        self.has_no_keys = 0 in k.shape
        ratio = q.shape[-2] // k.shape[-2] if k.shape[-2] else 1
        self.spec = KernelSpec(q.dtype, q.shape[-1], v.shape[-1], ratio, checks.mask_kind(self.left, self.right), self.varlen)
        if not self.varlen and FEW_QUERIES * q.shape[1] <= k.shape[1]:
            split = split_rows(q.shape[-1], v.shape[-1], ratio, k.shape[-2], q.shape[1])
            self.spec = replace(self.spec, varlen=split > 0, split_rows=split)
        self.spec = replace(self.spec, short=is_short(self.spec, q.shape[1]))
        self.bottom_right = causal != "top-left"

    def _compute(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        compute = reference.attention_varlen if self.varlen else reference.attention
        return compute(**inputs, **self.masks, return_lse=True)

    def make_plan(self, inputs: dict[str, Array], out: Array) -> launch.Plan:
        return launch.Plan(
            self.spec, inputs["q"], inputs["k"], inputs["v"], out,
            batch=self.batch, left=self.left, right=self.right, bottom_right=self.bottom_right, scale=self.scale,
            lengths=list(inputs)[3:],
        )  # fmt: skip


class CacheCall(Call):
    def __init__(self, views: dict[str, Array], causal: bool, window: Window | None, scale: float | None, interleaved: bool):
        checks.check_cache(views)
        super().__init__(views["q"], views["v_cache"], checks.batch_of(views), causal, window, scale)
        self.capacity = checks.capacity_of(views)
        self.has_no_keys = self.capacity == 0 or 0 in views["k_cache"].shape
        self.new_rows = views["q"].shape[1] if "k" in views and "cu_seqlens_q" not in views else 0
        self.interleaved = interleaved

    def with_length(self, views: dict[str, Array], length: int) -> dict[str, Array]:
        """`views` with a cache_seqlens that says `length` for each sequence."""
        length = checks.checked_length(length, self.new_rows, self.capacity)
        return views | {"cache_seqlens": _equal_lengths(length, self.batch, views["q"])}

    def _compute(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        checks.check_cache_contents(inputs)
        result = reference.attention_with_kvcache(**inputs, **self.masks, rotary_interleaved=self.interleaved, return_lse=True)
        if "k" in inputs:
            written = {name: x for name, x in inputs.items() if name not in ("q", "cache_leftpad")}
            reference.append_to_cache(**written, rotary_interleaved=self.interleaved)
        return result

    def make_plan(self, inputs: dict[str, Array], out: Array) -> launch.CachePlan:
        return launch.CachePlan(inputs, out, left=self.left, right=self.right, scale=self.scale, interleaved=self.interleaved)


def _equal_lengths(length: int, batch: int, q: Array) -> Array:
    """(batch,) int32, each of them `length`, on the device of `q`."""
    if q.device is None:
        return arrays.view("cache_seqlens", np.full(batch, length, np.int32))
    chunk, index = divmod(length, LENGTHS_MADE)
    key = (chunk, batch, q.device)
    made = _lengths_made.get(key)
    if made is None:
        current_device()
        check_gpu(q.device)
        if arrays.is_capturing(arrays.current_stream(q)):
            raise ValueError(
                f"cache_seqlens is {length} for the first time inside a CUDA graph; needed: an array, or a call before the capture"
            )
        import cupy

        with cupy.cuda.Device(q.device):
            lengths = np.arange(chunk * LENGTHS_MADE, (chunk + 1) * LENGTHS_MADE, dtype=np.int32)
            made = _lengths_made[key] = cupy.asarray(np.repeat(lengths[:, None], batch, axis=1))
            cupy.cuda.get_current_stream().synchronize()  # once, for whatever streams come to read it
    return arrays.view("cache_seqlens", made[index])


def _fill_without_keys(out: Array, lse: Array | None, stream: Any) -> None:
    """No key at all: outputs 0 and LSE -inf, without a kernel (a tensor map cannot be empty)."""
    with stream:
        arrays.as_cupy(out)[...] = 0
        if lse is not None:
            arrays.as_cupy(lse)[...] = -math.inf
