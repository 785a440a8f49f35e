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
    window: Window = None,
    scale: float | None = None,
    return_lse: bool = False,
    compute_dtype: str = "float64",
) -> Any:
    """`rawattn.attention_with_kvcache` over arrays of any float dtype, except that the caches stay as they are: see append_to_cache.

    The arguments are those of that function, which checks them; a row past the capacity is left out, and positions past the rotary tables
    are taken for the last one there. Returns out (B, Sq, Hq, Dv) or (Tq, Hq, Dv), or with return_lse also the LSE (B, Hq, Sq) or (Hq, Tq).

    >>> import numpy as np
    >>> q, v_cache = np.zeros((1, 1, 1, 8)), np.arange(4.0).reshape(1, 4, 1, 1)
    >>> attention_with_kvcache(q, np.zeros((1, 4, 1, 8)), v_cache, cache_seqlens=3).ravel()
    array([1.])
    """
    xp = _namespace(q)
    if k is not None:
        k_cache, v_cache = k_cache.copy(), v_cache.copy()
        append_to_cache(
            k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, page_table=page_table, cache_batch_idx=cache_batch_idx,
            cu_seqlens_q=cu_seqlens_q, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        )  # fmt: skip
    heads, rows = q.shape[-2], q.shape[-3]
    out = xp.zeros((*q.shape[:-1], v_cache.shape[-1]), compute_dtype)
    lse = xp.full((heads, rows) if cu_seqlens_q is not None else (len(q), heads, rows), -math.inf, compute_dtype)
    queries, outs = _sequences(q, cu_seqlens_q), _sequences(out, cu_seqlens_q)
    lses = list(lse) if cu_seqlens_q is None else [part.T for part in _sequences(lse.T, cu_seqlens_q)]
    lengths, pads = (_integers(x, len(queries)) for x in (cache_seqlens, 0 if cache_leftpad is None else cache_leftpad))
    rows_have_positions = causal or any(side is not None and side >= 0 for side in window or ())
    for b, queries_b in enumerate(queries):
        new = 0 if k is None else len(queries_b)
        last = min(lengths[b] + new, _capacity(k_cache, page_table))
        if rotary_cos is not None:
            positions = lengths[b] + (xp.arange(new) if rows_have_positions else xp.zeros(new, int))
            queries_b = rotate(queries_b, rotary_cos, rotary_sin, positions, rotary_interleaved)
        places = _places(xp, b, min(pads[b], last), last, k_cache, page_table, cache_batch_idx)
        _attend(xp, queries_b, k_cache[places], v_cache[places], outs[b], lses[b], causal, window, scale)
    return (out, lse) if return_lse else out


def append_to_cache(
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    *,
    cache_seqlens: Any,
    page_table: Any = None,
    cache_batch_idx: Any = None,
    cu_seqlens_q: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
) -> None:
    """What `rawattn.attention_with_kvcache` does to the caches: the rows of k, rotated, and of v are written from cache_seqlens[b] on.

    >>> import numpy as np
    >>> k_cache, v_cache = np.zeros((2, 1, 1, 4)), np.zeros((2, 1, 1, 4))  # two pages of one row
    >>> rows = np.ones((1, 2, 1, 4))
    >>> append_to_cache(k_cache, v_cache, rows, rows, cache_seqlens=1, page_table=np.array([[1, 0]]))
    >>> v_cache[:, 0, 0, 0]
    array([1., 0.])
    """
    xp = _namespace(k)
    sequences = list(zip(_sequences(k, cu_seqlens_q), _sequences(v, cu_seqlens_q), strict=True))
    for b, (start, (keys, values)) in enumerate(zip(_integers(cache_seqlens, len(sequences)), sequences, strict=True)):
        if rotary_cos is not None:
            keys = rotate(keys, rotary_cos, rotary_sin, start + xp.arange(len(keys)), rotary_interleaved)
        fit = max(0, min(len(keys), _capacity(k_cache, page_table) - start))
        places = _places(xp, b, start, start + fit, k_cache, page_table, cache_batch_idx)
        k_cache[places], v_cache[places] = keys[:fit], values[:fit]


def rotate(x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool = False) -> Any:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the rows x (S, H, D), in float32 at least, rounded once to the dtype of x.

    cos, sin: (P, r / 2), the angles at each position. positions: (S,) integers; past P - 1 they are taken for it.
    interleaved: the pairs are columns (0, 1), (2, 3), ... (r - 2, r - 1), or else (j, j + r / 2). Columns from r on stay as they are.

    >>> import numpy as np
    >>> quarter_turns = [np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])]
    >>> rotate(np.array([[[3.0, 4.0, 5.0]]] * 2), *quarter_turns, np.arange(2))[:, 0]
    array([[ 3.,  4.,  5.],
           [-4.,  3.,  5.]])
    """
    half = cos.shape[1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    wide = np.promote_types(x.dtype, np.float32)
    cos, sin = (table.astype(wide)[positions.clip(0, len(table) - 1), None] for table in (cos, sin))
    a, b = x[..., first].astype(wide), x[..., second].astype(wide)
    rotated = x.copy()
    rotated[..., first] = (a * cos - b * sin).astype(x.dtype)
    rotated[..., second] = (a * sin + b * cos).astype(x.dtype)
    return rotated


def _sequences(x: Any, cu_seqlens: Any) -> list[Any]:
    """Views of each sequence's rows: x (B, S, ...), or (T, ...) with cu_seqlens."""
    return list(x) if cu_seqlens is None else [x[start:end] for start, end in itertools.pairwise(cu_seqlens.tolist())]


def _integers(x: Any, batch: int) -> list[int]:
    """An integer for each sequence, from an array or one integer for all."""
    return x.tolist() if hasattr(x, "shape") and x.shape else [int(x)] * batch


def _capacity(cache: Any, page_table: Any) -> int:
    return cache.shape[1] * (1 if page_table is None else page_table.shape[1])


def _places(xp: Any, b: int, first: int, last: int, cache: Any, page_table: Any, cache_batch_idx: Any) -> Any:
    """Index of positions first to last of sequence b in the first two axes of a cache."""
    if page_table is None:
        return b if cache_batch_idx is None else int(cache_batch_idx[b]), slice(first, last)
    position = xp.arange(first, last)
    return page_table[b, position // cache.shape[1]], position % cache.shape[1]


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
