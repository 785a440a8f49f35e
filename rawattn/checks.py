"""What the arguments of a call must be. Each error is one sentence: the argument, what it was and what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import arrays
from .arrays import Array
from .spec import DTYPES

UNBOUNDED = 1 << 30  # a window this wide hides nothing; positions stay within int32
LONGEST = (1 << 29) - 1

Window = tuple[int | None, int | None]


def check_attention(views: dict[str, Array], varlen: bool) -> None:
    """The arrays of attention() and attention_varlen()."""
    q, k, v = views["q"], views["k"], views["v"]
    form = (
        {"q": "(Tq, Hq, D)", "k": "(Tk, Hkv, D)", "v": "(Tk, Hkv, Dv)"}
        if varlen
        else {"q": "(B, Sq, Hq, D)", "k": "(B, Sk, Hkv, D)", "v": "(B, Sk, Hkv, Dv)"}
    )
    arrays.check_together(views)
    for name, layout in form.items():
        _check_rows(name, views[name], layout, q)
    _check_keys("k", k, "v", v, q)
    if not varlen:
        for name in ("k", "v"):
            if views[name].shape[0] != q.shape[0]:
                raise ValueError(f"{name} has batch {views[name].shape[0]}; needed: {q.shape[0]}, as q has")
    for name in ("cu_seqlens_q", "cu_seqlens_k") if varlen else ():
        array = views[name]
        _check_bounds(name, array)
        if array.shape != views["cu_seqlens_q"].shape:
            raise ValueError(f"{name} has {array.shape[0]} entries; needed: {views['cu_seqlens_q'].shape[0]}, as cu_seqlens_q has")
        if array.device is None:
            _check_ascending(name, arrays.to_numpy(array), views["q" if name == "cu_seqlens_q" else "k"].shape[0])
    if "out" in views:
        _check_out(views["out"], q, v)


def check_cache(views: dict[str, Array]) -> None:
    """The arrays of attention_with_kvcache(), of which all but q, k_cache and v_cache may be absent."""
    for one, other in (("k", "v"), ("rotary_cos", "rotary_sin")):
        for given, absent in ((one, other), (other, one)):
            if given in views and absent not in views:
                raise ValueError(f"{absent} is None but {given} is given; needed: both or neither")
    if "rotary_cos" in views and "k" not in views:
        raise ValueError("rotary_cos is given but k is None; needed: k and v with it, for keys in the cache stay as they are")
    for name in ("cache_batch_idx", "cache_leftpad"):
        if name in views and "page_table" in views:
            raise ValueError(f"{name} is given beside page_table; needed: one of them")
    q, k_cache, v_cache = views["q"], views["k_cache"], views["v_cache"]
    arrays.check_together(views)

    ragged, paged = "cu_seqlens_q" in views, "page_table" in views
    rows, cache = "(Tq, " if ragged else "(B, Sq, ", "(pages, page_size, " if paged else "(B_cache, S_max, "
    form = {
        "q": rows + "Hq, D)",
        "k_cache": cache + "Hkv, D)",
        "v_cache": cache + "Hkv, Dv)",
        "k": rows + "Hkv, D)",
        "v": rows + "Hkv, Dv)",
    }
    for name, layout in form.items():
        if name in views:
            _check_rows(name, views[name], layout, q)
    _check_keys("k_cache", k_cache, "v_cache", v_cache, q)
    if q.shape[-2] == 0 and k_cache.shape[-2] > 0:
        raise ValueError(f"q has 0 heads and k_cache has {k_cache.shape[-2]}; needed: 1 or more times k_cache's heads in q")
    if v_cache.shape[0] != k_cache.shape[0]:
        raise ValueError(f"v_cache has shape {v_cache.shape}; needed: {k_cache.shape[0]} on its first axis, as k_cache has")
    if "k" in views:
        for name, target in (("k", k_cache), ("v", v_cache)):
            shape = (*q.shape[:-2], *target.shape[-2:])
            if views[name].shape != shape:
                raise ValueError(f"{name} has shape {views[name].shape}; needed: {shape}, as many rows as q and the heads of {name}_cache")
            check_writable(f"{name}_cache", target, "no k and v")

    if ragged:
        _check_bounds("cu_seqlens_q", views["cu_seqlens_q"])
    batch = batch_of(views)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        if name in views:
            _check_int32(name, views[name], "(B,)")
            if views[name].shape[0] != batch:
                raise ValueError(f"{name} has {views[name].shape[0]} entries; needed: {batch}, one for each sequence")
    if paged:
        table = views["page_table"]
        if table.dtype != "int32":
            raise TypeError(f"page_table has dtype {table.dtype}; needed: int32")
        if len(table.shape) != 2 or table.shape[0] != batch:
            raise ValueError(f"page_table has shape {table.shape}; needed: ({batch}, max_pages), one row for each sequence")
        if table.shape[0] > 0 and table.shape[1] > 1 and table.strides[1] != 4:
            raise ValueError(f"page_table has a byte stride of {table.strides[1]} on its last axis; needed: 4, contiguous")
        if table.shape[0] > 1 and table.shape[1] > 0 and (table.strides[0] % 4 or table.strides[0] < 0):
            raise ValueError(f"page_table has byte strides {table.strides}; needed: a multiple of 4 from 0 up on its first axis")
    elif "cache_batch_idx" not in views and k_cache.shape[0] != batch:
        raise ValueError(f"k_cache has batch {k_cache.shape[0]}; needed: {batch}, as q has, or cache_batch_idx")
    capacity = capacity_of(views)
    if capacity > LONGEST:
        raise ValueError(f"page_table and k_cache hold {capacity} keys for each sequence; needed: at most {LONGEST}")
    for name in ("rotary_cos", "rotary_sin") if "rotary_cos" in views else ():
        _check_rotary(name, views[name], views["rotary_cos"], q, capacity)
    if "out" in views:
        _check_out(views["out"], q, v_cache)


def check_cache_contents(host: dict[str, np.ndarray]) -> None:
    """The numbers in the integer arrays of attention_with_kvcache(), where they lie in host memory and can be looked at."""
    k_cache, lengths = host["k_cache"], host["cache_seqlens"]
    paged = "page_table" in host
    capacity = k_cache.shape[1] * (host["page_table"].shape[1] if paged else 1)
    if "cu_seqlens_q" in host:
        _check_ascending("cu_seqlens_q", host["cu_seqlens_q"], host["q"].shape[0])
    if len(lengths) == 0:
        return
    if lengths.min() < 0 or lengths.max() > capacity:
        raise ValueError(f"cache_seqlens is {lengths.tolist()}; needed: lengths from 0 to {capacity}, the capacity of the cache")
    ends = lengths.astype(np.int64)
    if "k" in host:
        ends = ends + (np.diff(host["cu_seqlens_q"]) if "cu_seqlens_q" in host else host["k"].shape[1])
        if ends.max() > capacity:
            b = int(ends.argmax())
            raise ValueError(
                f"k has {ends[b] - lengths[b]} rows for sequence {b}, which has {lengths[b]} of {capacity} keys; needed: room for them"
            )
    if "cache_leftpad" in host and host["cache_leftpad"].min() < 0:
        raise ValueError(f"cache_leftpad is {host['cache_leftpad'].tolist()}; needed: 0 or more")
    if "cache_batch_idx" in host:
        index = host["cache_batch_idx"]
        if index.min() < 0 or index.max() >= k_cache.shape[0]:
            raise ValueError(f"cache_batch_idx is {index.tolist()}; needed: rows of k_cache, from 0 to {k_cache.shape[0] - 1}")
        if "k" in host and len(np.unique(index)) < len(index):
            raise ValueError(f"cache_batch_idx is {index.tolist()} and k is given; needed: each row once, for k is written there")
    for b, end in enumerate(ends.tolist()) if paged else ():
        used = host["page_table"][b, : -(-end // k_cache.shape[1])]
        if ((used < 0) | (used >= k_cache.shape[0])).any():
            raise ValueError(f"page_table[{b}] begins with {used.tolist()}; needed: pages of k_cache, from 0 to {k_cache.shape[0] - 1}")


def batch_of(views: dict[str, Array]) -> int:
    """The number of sequences, packed or not."""
    return views["cu_seqlens_q"].shape[0] - 1 if "cu_seqlens_q" in views else views["q"].shape[0]


def capacity_of(views: dict[str, Array]) -> int:
    """How many keys a sequence can have in the cache."""
    pages = views["page_table"].shape[1] if "page_table" in views else 1
    return pages * views["k_cache"].shape[1]


def checked_length(length: int, new_rows: int, capacity: int) -> int:
    """A cache_seqlens that is one number for all sequences."""
    if not 0 <= length <= capacity:
        raise ValueError(f"cache_seqlens is {length}; needed: a length from 0 to {capacity}, the capacity of the cache")
    if length + new_rows > capacity:
        raise ValueError(
            f"cache_seqlens is {length} and k has {new_rows} new rows; needed: at most {capacity} in all, the capacity of the cache"
        )
    return int(length)


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


def window_bounds(causal: bool | str, window: Window | None) -> tuple[int, int]:
    """Keys that a query sees to the left and to the right of its diagonal."""
    bounds = [UNBOUNDED if side is None or side == -1 else min(int(side), UNBOUNDED) for side in window or (None, None)]
    if causal:
        bounds[1] = min(bounds[1], 0)
    return bounds[0], bounds[1]


def mask_kind(left: int, right: int) -> str:
    """KernelSpec.mask for these bounds."""
    return "window" if left < UNBOUNDED else "causal" if right < UNBOUNDED else "full"


def _check_rows(name: str, array: Array, layout: str, q: Array) -> None:
    """Rows of heads: queries, keys or values."""
    if len(array.shape) != len(layout.split(",")):
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


def _check_keys(k_name: str, k: Array, v_name: str, v: Array, q: Array) -> None:
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{k_name} has head_dim {k.shape[-1]}; needed: {q.shape[-1]}, as q has")
    if v.shape[-3:-1] != k.shape[-3:-1]:
        raise ValueError(
            f"{v_name} has {v.shape[-3]} rows of {v.shape[-2]} heads; needed: {k.shape[-3]} rows of {k.shape[-2]} heads, as {k_name} has"
        )
    if (k.shape[-2] == 0 and q.shape[-2] > 0) or (k.shape[-2] > 0 and q.shape[-2] % k.shape[-2]):
        raise ValueError(f"q has {q.shape[-2]} heads and {k_name} has {k.shape[-2]}; needed: a multiple of {k_name}'s heads in q")


def _check_out(out: Array, q: Array, v: Array) -> None:
    shape = (*q.shape[:-1], v.shape[-1])
    check_writable("out", out, "no out")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; needed: {shape}")
    if out.dtype != q.dtype:
        raise TypeError(f"out has dtype {out.dtype}; needed: {q.dtype}, as q has")
    _check_strides("out", out)


def check_writable(name: str, array: Array, instead: str) -> None:
    if array.framework == "jax":
        raise TypeError(f"{name} is a jax.Array, which nothing may write to; needed: {instead}")
    if array.framework == "numpy" and not array.owner.flags.writeable:
        raise ValueError(f"{name} is read-only; needed: an array to write to")
    if 0 not in array.shape and any(stride == 0 and size > 1 for stride, size in zip(array.strides, array.shape, strict=True)):
        raise ValueError(f"{name} has byte strides {array.strides}; needed: no two elements in one place")


def _check_strides(name: str, array: Array) -> None:
    *outer, last = array.strides
    if 0 in array.shape or array.device is None:
        return
    if last != 2 and array.shape[-1] > 1:
        raise ValueError(f"{name} has a byte stride of {last} on its last axis; needed: 2, contiguous")
    for size, stride in zip(array.shape[:-1], outer, strict=True):
        if size > 1 and (stride % 16 or not 0 <= stride < 1 << 40):
            raise ValueError(f"{name} has byte strides {array.strides}; needed: multiples of 16 from 0 to 2**40 on every axis but the last")


def _check_int32(name: str, array: Array, layout: str) -> None:
    if array.dtype != "int32":
        raise TypeError(f"{name} has dtype {array.dtype}; needed: int32")
    if len(array.shape) != 1 or (array.shape[0] > 1 and array.strides[0] != 4):
        raise ValueError(f"{name} has shape {array.shape} and byte strides {array.strides}; needed: {layout}, contiguous")


def _check_bounds(name: str, cu_seqlens: Array) -> None:
    _check_int32(name, cu_seqlens, "(B + 1,)")
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {cu_seqlens.shape} and byte strides {cu_seqlens.strides}; needed: (B + 1,), contiguous")


def _check_ascending(name: str, cu_seqlens: np.ndarray, rows: int) -> None:
    if cu_seqlens[0] != 0 or (np.diff(cu_seqlens) < 0).any() or cu_seqlens[-1] > rows:
        raise ValueError(f"{name} is {cu_seqlens.tolist()}; needed: ascending from 0 to at most {rows}")


def _check_rotary(name: str, table: Array, cos: Array, q: Array, capacity: int) -> None:
    if table.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {table.dtype}; needed: {q.dtype}, as q has")
    if len(table.shape) != 2 or table.shape[1] % 8 or not 8 <= table.shape[1] <= q.shape[-1] // 2:
        raise ValueError(
            f"{name} has shape {table.shape}; needed: (positions, rotary_dim / 2), rotary_dim a multiple of 16 up to {q.shape[-1]}"
        )
    if table.shape[0] < capacity:
        raise ValueError(f"{name} has {table.shape[0]} positions; needed: {capacity} or more, the capacity of the cache")
    if table.shape != cos.shape:
        raise ValueError(f"{name} has shape {table.shape}; needed: {cos.shape}, as rotary_cos has")
    if table.strides != (2 * table.shape[1], 2):
        raise ValueError(f"{name} has byte strides {table.strides}; needed: {(2 * table.shape[1], 2)}, contiguous")
