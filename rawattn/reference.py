"""Attention in float64 or float32 with NumPy or CuPy, straight from the definition: what every kernel is judged against.

A block of query rows meets all the keys that it sees at once, so the softmax is the plain two-pass one and a row's result does not depend
on how its keys are cut. Memory beyond the inputs and outputs is one key/value head and a few blocks of BLOCK_SCORES scores, at any length.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any

import numpy as np

BLOCK_SCORES = 1 << 22  # 32 MiB in float64: large enough to keep a GPU busy, small enough for any host

Window = tuple[int | None, int | None] | None


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: str = "float64",
) -> Any:
    """Attention of `rawattn.attention` (which checks its arguments; this trusts them) over arrays of any float dtype.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv): NumPy or CuPy arrays, Hq a multiple of Hkv.
    causal: False, True (bottom-right: query i sees keys up to i + Sk - Sq) or "top-left" (keys up to i).
    window: (left, right), keys around the diagonal that a query sees; None or -1 is unbounded.
    scale: of the scores, 1/sqrt(D) by default.
    Returns out (B, Sq, Hq, Dv), or with return_lse also the natural log-sum-exp (B, Hq, Sq), both of `compute_dtype`.
    Each row is what its own visible keys give, NaN and inf included; a row that sees no key has output 0 and LSE -inf.

    >>> import numpy as np
    >>> q, k, v = np.zeros((1, 1, 2, 8)), np.zeros((1, 4, 1, 8)), np.arange(4.0).reshape(1, 4, 1, 1)
    >>> out, lse = attention(q, k, v, return_lse=True)
    >>> out.ravel(), lse.ravel()
    (array([1.5, 1.5]), array([1.38629436, 1.38629436]))
    """
    batch, sq, heads, _ = q.shape
    xp = _namespace(q)
    out = xp.zeros((batch, sq, heads, v.shape[3]), compute_dtype)
    lse = xp.full((batch, heads, sq), -math.inf, compute_dtype)
    for b in range(batch):
        _attend(xp, q[b], k[b], v[b], out[b], lse[b], causal, window, scale)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    causal: bool | str = False,
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: str = "float64",
) -> Any:
    """`attention` over packed sequences: q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), cu_seqlens (B + 1,) integers.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; rows of no sequence have output 0 and LSE -inf. Returns out (Tq, Hq, Dv), or with
    return_lse also the LSE (Hq, Tq).

    >>> import numpy as np
    >>> q, v = np.zeros((3, 1, 8)), np.array([5.0, 1.0, 2.0]).reshape(3, 1, 1)
    >>> attention_varlen(q, q, v, np.array([0, 1, 3]), np.array([0, 1, 3])).ravel()
    array([5. , 1.5, 1.5])
    """
    rows, heads, _ = q.shape
    xp = _namespace(q)
    out = xp.zeros((rows, heads, v.shape[2]), compute_dtype)
    lse = xp.full((heads, rows), -math.inf, compute_dtype)
    bounds_q, bounds_k = (itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(bounds_q, bounds_k, strict=True):
        _attend(xp, q[q0:q1], k[k0:k1], v[k0:k1], out[q0:q1], lse[:, q0:q1], causal, window, scale)
    return (out, lse) if return_lse else out


def visible_keys(sq: int, sk: int, causal: bool | str, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Row i of sq sees the keys first[i] <= key < last[i]; both rise with i.

    >>> visible_keys(3, 4, causal=True, window=(1, None))
    (array([0, 1, 2]), array([2, 3, 4]))
    """
    left, right = (None if side is None or side < 0 else side for side in window or (None, None))
    if causal:
        right = 0
    diagonal = np.arange(sq) + (0 if causal == "top-left" else sk - sq)
    first = np.zeros(sq, int) if left is None else np.clip(diagonal - left, 0, sk)
    last = np.full(sq, sk) if right is None else np.clip(diagonal + right + 1, 0, sk)
    return first, last


def _attend(xp: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool | str, window: Window, scale: float | None) -> None:
    """One sequence: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv) into out (Sq, Hq, Dv) zeros and lse (Hq, Sq) of -inf."""
    sq, query_heads, dim = q.shape
    sk, kv_heads, _ = k.shape
    ratio = query_heads // max(1, kv_heads)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    first, last = visible_keys(sq, sk, causal, window)
    block = max(1, BLOCK_SCORES // max(1, ratio * sk))

    for h in range(kv_heads):
        keys, values = k[:, h].astype(out.dtype), v[:, h].astype(out.dtype)
        group = slice(h * ratio, (h + 1) * ratio)  # the query heads of key/value head h
        for start in range(0, sq, block):
            rows = slice(start, min(start + block, sq))
            seen_by_some = slice(int(first[rows][0]), int(last[rows][-1]))
            if seen_by_some.start >= seen_by_some.stop:
                continue
            seen = None
            if first[rows][-1] > seen_by_some.start or last[rows][0] < seen_by_some.stop:
                key = xp.arange(seen_by_some.start, seen_by_some.stop)
                seen = (key >= xp.asarray(first[rows, None])) & (key < xp.asarray(last[rows, None]))
            queries = q[rows, group].astype(out.dtype) * scale
            out[rows, group], lse[group, rows] = _softmax(xp, queries, keys[seen_by_some], values[seen_by_some], seen)


@np.errstate(divide="ignore", invalid="ignore")  # log(0) of an empty row and inf - inf of an infinite score are answers here
def _softmax(xp: Any, q: Any, k: Any, v: Any, seen: Any) -> tuple[Any, Any]:
    """q (rows, ratio, D) scaled, k (keys, D), v (keys, Dv) -> out (rows, ratio, Dv), lse (ratio, rows).

    seen (rows, keys) says which keys a row sees; None is all of them.
    """
    scores = _matmul(xp, q, k.T)
    if seen is not None:
        scores = xp.where(seen[:, None], scores, -math.inf)
    top = scores.max(axis=2, keepdims=True)
    top = xp.where(top == -math.inf, 0, top)
    weights = xp.exp(xp.subtract(scores, top, out=scores), out=scores)
    total = weights.sum(axis=2, keepdims=True)
    out = xp.where(total == 0, 0, _weighted_sum(xp, weights, v, seen) / total)
    return out, (top + xp.log(total))[..., 0].T


def _weighted_sum(xp: Any, weights: Any, v: Any, seen: Any) -> Any:
    """weights @ v, but an infinity or NaN in v reaches only the rows that see its key (0 * NaN would carry it to the others)."""
    finite = xp.isfinite(v)
    if seen is None or finite.all():
        return _matmul(xp, weights, v)
    out = _matmul(xp, weights, xp.where(finite, v, 0))
    for key in xp.flatnonzero(~finite.all(axis=1)).tolist():
        stray = xp.where(finite[key], 0, v[key])
        out += xp.where(seen[:, None, key, None], weights[:, :, key, None] * stray, 0)
    return out


def _matmul(xp: Any, a: Any, b: Any) -> Any:
    """a (rows, ratio, n) @ b (n, m) -> (rows, ratio, m)."""
    rows, ratio, n = a.shape
    if xp is np:
        return (a.reshape(rows * ratio, n) @ b).reshape(rows, ratio, -1)
    out = xp.empty((rows, ratio, b.shape[1]), a.dtype)
    return _cupy_matmul()(xp.ascontiguousarray(a), xp.ascontiguousarray(b), n, b.shape[1], out)


@functools.cache
def _cupy_matmul() -> Any:
    """A matrix product that needs no cuBLAS, which is larger than everything that rawattn installs together."""
    import cupy

    return cupy.ElementwiseKernel(
        "raw T a, raw T b, int64 inner, int64 columns",
        "T c",
        """T sum = 0;
        for (long long j = 0; j < inner; ++j) sum += a[i / columns * inner + j] * b[j * columns + i % columns];
        c = sum;""",
        "rawattn_reference_matmul",
    )


def _namespace(array: Any) -> Any:
    """cupy for a CuPy array, whose owner has imported it, and numpy for everything else."""
    return sys.modules["cupy"] if type(array).__module__.startswith("cupy") else np
