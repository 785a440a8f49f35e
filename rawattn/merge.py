"""merge_states: attention over disjoint sets of keys, from its results over each set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arrays

OUT_DTYPES = ("float16", "bfloat16", "float32")


def merge_states(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """Combine partial attention results over disjoint sets of keys into the result over all of them.

    outs: (B, S, H, Dv), or (T, H, Dv) of packed sequences, float16, bfloat16 or float32, all of one shape and dtype.
    lses: (B, H, S), or (H, T), float32: the natural log-sum-exp that came with each of them.
    Arrays of NumPy, CuPy, torch or JAX, all on one device; GPU work goes to the current stream of their owner.

    Returns (out, lse), out in the dtype of outs and lse in float32. The sum is taken in float32 in the order given, so the same parts in
    the same order give the same bits. A row that sees no key of a part has LSE -inf there and takes nothing from it, whatever its out
    holds; with LSE -inf in every part it has output 0 and LSE -inf. NaN stays NaN. Raises ValueError or TypeError that names the argument.

    >>> import numpy as np
    >>> outs = [np.full((1, 1, 1), x, np.float32) for x in (1, 4)]
    >>> lses = [np.log(np.full((1, 1), n, np.float32)) for n in (2, 1)]
    >>> out, lse = merge_states(outs, lses)
    >>> float(out.item()), round(float(np.exp(lse).item()), 6)
    (2.0, 3.0)
    """
    parts, weights = _checked(outs, lses)
    like = parts[0]
    out, lse = arrays.empty(like, like.shape, like.dtype), arrays.empty(like, weights[0].shape, "float32")
    if like.device is None:
        _merge(np, *([arrays.to_numpy(x) for x in each] for each in (parts, weights, (out, lse))))
    else:
        import cupy

        with cupy.cuda.Device(like.device), arrays.current_stream(like):
            _merge(cupy, *([arrays.as_cupy(x) for x in each] for each in (parts, weights, (out, lse))))
    inputs = (*parts, *weights)
    return arrays.hand_back(out, like, inputs), arrays.hand_back(lse, like, inputs)


def _merge(xp: Any, outs: list[Any], lses: list[Any], merged: list[Any]) -> None:
    """Fill merged = [out, lse]: weights exp(lse - max lse), as Flash-Decoding combines its splits (Dao et al., 2023)."""
    top = lses[0]
    for lse in lses[1:]:
        top = xp.maximum(top, lse)
    top = xp.where(top == -np.inf, np.float32(0), top)
    total = xp.zeros_like(top)
    out_sum = xp.zeros(outs[0].shape, np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # log(0) of an empty row; infinities in a part
        for out, lse in zip(outs, lses, strict=True):
            weight = xp.exp(lse - top)
            total += weight
            out_sum += xp.where(_per_row(lse) == -np.inf, np.float32(0), _per_row(weight) * out.astype(np.float32))
        merged[0][...] = xp.where(_per_row(total) == 0, np.float32(0), out_sum / _per_row(total))
        merged[1][...] = top + xp.log(total)


def _per_row(lse: Any) -> Any:
    """(B, H, S) or (H, T) as (B, S, H, 1) or (T, H, 1), to go with the outputs."""
    return lse.swapaxes(-1, -2)[..., None]


def _checked(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[list[arrays.Array], list[arrays.Array]]:
    if len(outs) == 0:
        raise ValueError("outs is empty; needed: one partial result or more")
    if len(lses) != len(outs):
        raise ValueError(f"lses has {len(lses)} arrays and outs has {len(outs)}; needed: one LSE for each partial output")
    parts = {f"outs[{i}]": arrays.view(f"outs[{i}]", out) for i, out in enumerate(outs)}
    weights = {f"lses[{i}]": arrays.view(f"lses[{i}]", lse) for i, lse in enumerate(lses)}
    arrays.check_together(parts | weights)
    like = parts["outs[0]"]
    if len(like.shape) not in (3, 4):
        raise ValueError(f"outs[0] has shape {like.shape}; needed: (B, S, H, Dv) or (T, H, Dv)")
    if like.dtype not in OUT_DTYPES:
        raise TypeError(f"outs[0] has dtype {like.dtype}; needed: {', '.join(OUT_DTYPES[:-1])} or {OUT_DTYPES[-1]}")
    *batch, rows, heads, _ = like.shape
    for name, array in (parts | weights).items():
        dtype, shape = (like.dtype, like.shape) if name in parts else ("float32", (*batch, heads, rows))
        if array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; needed: {dtype}" + (", as outs[0] has" if name in parts else ""))
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; needed: {shape}, to go with outs[0] of shape {like.shape}")
    return list(parts.values()), list(weights.values())
