"""KVCache: keys and values of several sequences, with their lengths and pages looked after."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import arrays, reference
from .arrays import Array
from .attention import attention_with_kvcache
from .checks import Window
from .spec import DTYPES


class KVCache:
    """The keys and values of `batch` sequences of up to `max_seqlen` tokens, allocated once and filled step by step.

    Args:
        batch, max_seqlen, heads, head_dim: sequences, tokens that each may have, key/value heads, D.
        like: any array of the framework and on the device that the cache is for: CuPy or torch on a GPU, NumPy or a CPU tensor of torch.
        head_dim_v: Dv, head_dim by default.
        dtype: "float16" or "bfloat16", that of `like` by default.
        page_size: tokens of a page, 1 or more; by default the cache is contiguous, with room for max_seqlen tokens of each sequence.
        pages: how many pages there are in all, for this cache and its forks; by default enough for `batch` sequences of max_seqlen.

    Attributes:
        k_cache, v_cache, cache_seqlens, page_table: the arrays, as attention_with_kvcache() takes them (page_table is None without pages).
        lengths: tokens that each sequence has, as the host counts them; cache_seqlens says the same on the device.
        bytes: size of these arrays. Forks of a paged cache share k_cache and v_cache with it.

    Raises:
        TypeError, ValueError: names the argument, what it was and what is needed. What does not fit is refused before anything is written.

    A step can be captured in a CUDA graph: call attend() with arrays of these shapes once before, for it compiles, and capture attend()
    with q, k and v in memory that stays. The captured step moves the lengths on the device; advance() does the host's part of it, so call
    that before each replay, on the same stream. reset() keeps all arrays where they are, so the graph stays good.

    >>> import numpy as np, rawattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 5, heads, 64)).astype(np.float16) for heads in (8, 2, 2))
    >>> cache = rawattn.KVCache(2, 100, 2, 64, like=q, page_size=16)
    >>> steps = [cache.attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(5)]
    >>> cache.lengths
    (5, 5)
    >>> bool((np.concatenate(steps, axis=1) == rawattn.attention(q, k, v, causal=True)).all())
    True
    """

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
        heads: int,
        head_dim: int,
        *,
        like: Any,
        head_dim_v: int | None = None,
        dtype: str | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ):
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "max_seqlen": max_seqlen, "heads": heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
        optional = {"page_size": page_size, "pages": pages}
        for name, size in (sizes | {name: size for name, size in optional.items() if size is not None}).items():
            if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} is {size!r}; needed: an integer from 1 up")
            if name.startswith("head_dim") and (size % 8 or size > 256):
                raise ValueError(f"{name} is {size}; needed: a multiple of 8 from 8 to 256")
        if pages is not None and page_size is None:
            raise ValueError(f"pages is {pages} but page_size is None; needed: both or neither")
        self._like = arrays.view("like", like)
        if self._like.framework == "jax":
            raise TypeError("like is a jax.Array, which nothing may write to; needed: an array of NumPy, CuPy or torch")
        self._dtype = self._like.dtype if dtype is None else dtype
        if self._dtype not in DTYPES:
            raise TypeError(f"{'like has dtype' if dtype is None else 'dtype is'} {self._dtype}; needed: {' or '.join(DTYPES)}")
        self._like = arrays.empty(self._like, (0,), self._dtype)  # the caller's array is let go
        self.max_seqlen, self._heads, self._dims = max_seqlen, heads, (head_dim, head_dim_v)

        self._pool: _Pages | None = None
        if page_size is not None:
            count = batch * -(-max_seqlen // page_size) if pages is None else pages
            self._pool = _Pages(count, page_size)
            self._allocate(count, page_size)
        self._begin(batch)

    def append(self, k: Any, v: Any) -> None:
        """Append k (batch, S, heads, head_dim) and v (batch, S, heads, head_dim_v), as they are, without attending to anything.

        >>> k, v = np.ones((1, 3, 2, 64), np.float16), np.full((1, 3, 2, 64), 7, np.float16)
        >>> cache = KVCache(1, 16, 2, 64, like=k)
        >>> cache.append(k, v)
        >>> cache.v_cache[0, :3, 0, 0]
        array([7., 7., 7.], dtype=float16)
        """
        views = {"k": arrays.view("k", k), "v": arrays.view("v", v)}
        rows = self._new_rows(k)
        arrays.check_together({"k_cache": self._k} | views)
        for view, (name, cache) in zip(views.values(), {"k": self._k, "v": self._v}.items(), strict=True):
            shape = (len(self._lengths), rows, *cache.shape[2:])
            if view.shape != shape:
                raise ValueError(f"{name} has shape {view.shape}; needed: {shape}")
            if view.dtype != self._dtype:
                raise TypeError(f"{name} has dtype {view.dtype}; needed: {self._dtype}, as the cache has")
        self._make_room(rows)
        with self._current_stream():
            table = None if self._table is None else _as_xp(self._table)
            targets = (_as_xp(x) for x in (self._k, self._v, *views.values()))
            reference.append_to_cache(*targets, cache_seqlens=self._lengths, page_table=table)
        self._count(rows)

    def attend(
        self,
        q: Any,
        k: Any = None,
        v: Any = None,
        *,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        rotary_interleaved: bool = False,
        causal: bool = True,
        window: Window | None = None,
        scale: float | None = None,
        out: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """Append k and v, if given, and return the attention of q to all that each sequence has.

        q (batch, Sq, Hq, head_dim), k (batch, Sq, heads, head_dim), v (batch, Sq, heads, head_dim_v), and the options of
        attention_with_kvcache().

        >>> q, k = np.ones((1, 3, 8, 64), np.float16), np.ones((1, 3, 2, 64), np.float16)
        >>> cache = KVCache(1, 16, 2, 64, like=q)
        >>> out, lse = cache.attend(q, k, k, return_lse=True)
        >>> out.shape, lse.shape, cache.lengths
        ((1, 3, 8, 64), (1, 8, 3), (3,))
        """
        rows = 0 if k is None else self._new_rows(k)
        captured = self._is_capturing()
        if not captured:
            self._make_room(rows)
        result = attention_with_kvcache(
            q, self.k_cache, self.v_cache, k, v, cache_seqlens=self.cache_seqlens, page_table=self.page_table,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
            causal=causal, window=window, scale=scale, out=out, return_lse=return_lse,
        )  # fmt: skip
        self._count(rows, on_host=not captured)
        return result

    def advance(self, rows: int = 1) -> None:
        """The host's part of a captured step, before its replay: make room for `rows` more tokens of each sequence, and count them.

        >>> cache = KVCache(2, 16, 2, 64, like=np.empty(0, np.float16), page_size=16)
        >>> cache.advance()
        >>> cache.lengths, cache.cache_seqlens.tolist()  # the step itself counts on the device
        ((1, 1), [0, 0])
        """
        self._make_room(rows)
        self._lengths += rows

    def fork(self, rows: Sequence[int]) -> KVCache:
        """A cache of len(rows) sequences, of which sequence i begins with what sequence rows[i] of this one has.

        From there on both go their own ways. A paged cache and its forks share its pages: full ones are held in common, and the last, if
        partly filled, is copied. A page is free again when no sequence holds it: after reset(), or when the cache is gone. A contiguous
        cache is copied.

        >>> prompt = np.ones((1, 20, 2, 64), np.float16)
        >>> cache = KVCache(1, 64, 2, 64, like=prompt, page_size=16, pages=12)
        >>> cache.append(prompt, prompt)
        >>> samples = cache.fork([0] * 4)  # page 0 is shared, page 1 is copied four times
        >>> samples.lengths, samples.page_table[:, 0].tolist()
        ((20, 20, 20, 20), [0, 0, 0, 0])
        """
        rows = self._checked_rows(rows)
        lengths = self._lengths[rows]
        fork = copy.copy(self)
        if self._pool is None:
            fork._begin(len(rows))
            longest = int(lengths.max(initial=0))
            with self._current_stream():
                for source, target in ((self._k, fork._k), (self._v, fork._v)):
                    for i, row in enumerate(rows):
                        _as_xp(target)[i, :longest] = _as_xp(source)[row, :longest]
        else:
            partial = np.flatnonzero(lengths % self._pool.page_size).tolist()
            copies = self._pool.take(len(partial))
            fork._begin(len(rows))
            for held, row, length in zip(fork._pages, rows, lengths.tolist(), strict=True):
                shared = self._pages[row][: length // self._pool.page_size]
                self._pool.hold(shared)
                held += shared
            originals = [self._pages[rows[i]][len(fork._pages[i])] for i in partial]
            for i, page in zip(partial, copies, strict=True):
                fork._pages[i].append(page)
            with self._current_stream():
                for original, page in zip(originals, copies, strict=True):
                    for cache in (self._k, self._v):
                        _as_xp(cache)[page] = _as_xp(cache)[original]
            fork._write_table([(i, column, page) for i, held in enumerate(fork._pages) for column, page in enumerate(held)])
        fork._lengths += lengths
        fork._write_lengths()
        return fork

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty the sequences `rows`, by default all of them; their pages are free for others.

        >>> k = np.ones((2, 3, 2, 64), np.float16)
        >>> cache = KVCache(2, 16, 2, 64, like=k)
        >>> cache.append(k, k)
        >>> cache.reset([1])
        >>> cache.lengths
        (3, 0)
        """
        for row in range(len(self._lengths)) if rows is None else self._checked_rows(rows):
            self._lengths[row] = 0
            if self._pool is not None:
                self._pool.release(self._pages[row])
                self._pages[row].clear()
        self._write_lengths()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence has, as the host counts them.

        >>> KVCache(2, 16, 2, 64, like=np.empty(0, np.float16)).lengths
        (0, 0)
        """
        return tuple(self._lengths.tolist())

    @property
    def bytes(self) -> int:
        """Size of the arrays, on the device.

        >>> KVCache(2, 16, 2, 64, like=np.empty(0, np.float16)).bytes - 2 * 2 * 16 * 2 * 64 * 2  # the lengths
        8
        """
        held = [self._k, self._v, self._seqlens] + ([] if self._table is None else [self._table])
        return sum(x.strides[0] * x.shape[0] for x in held)

    def _allocate(self, first: int, second: int) -> None:
        self._k, self._v = (arrays.empty(self._like, (first, second, self._heads, dim), self._dtype) for dim in self._dims)
        self.k_cache, self.v_cache = self._k.owner, self._v.owner

    def _begin(self, batch: int) -> None:
        """What each cache has for itself, forks too: `batch` empty sequences."""
        self._lengths = np.zeros(batch, np.int64)
        self._seqlens = arrays.empty(self._like, (batch,), "int32")
        self._table: Array | None = None
        if self._pool is None:
            self._allocate(batch, self.max_seqlen)
        else:
            self._table = arrays.empty(self._like, (batch, -(-self.max_seqlen // self._pool.page_size)), "int32")
            self._pages: list[list[int]] = [[] for _ in range(batch)]
            weakref.finalize(self, self._pool.release_all, self._pages).atexit = False
        self.cache_seqlens = self._seqlens.owner
        self.page_table: Any = None if self._table is None else self._table.owner
        self._write_lengths()

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        count = len(self._lengths)
        if len(rows) == 0 or any(not isinstance(row, (int, np.integer)) or not 0 <= row < count for row in rows):
            raise ValueError(f"rows is {rows!r}; needed: one or more numbers of sequences, from 0 to {count - 1}")
        return [int(row) for row in rows]

    def _new_rows(self, k: Any) -> int:
        shape = arrays.view("k", k).shape
        if len(shape) != 4:
            raise ValueError(f"k has shape {shape}; needed: (B, Sq, Hkv, D)")
        return shape[1]

    def _make_room(self, rows: int) -> None:
        """For `rows` more tokens of each sequence, or an error before anything has changed."""
        ends = self._lengths + rows
        longest = int(ends.argmax())
        if ends[longest] > self.max_seqlen:
            raise ValueError(
                f"k has {rows} new rows and sequence {longest} has {self._lengths[longest]} of {self.max_seqlen}; needed: room for them"
            )
        if self._pool is None:
            return
        missing = [(b, column) for b, end in enumerate(-(-ends // self._pool.page_size)) for column in range(len(self._pages[b]), end)]
        if missing:
            pages = self._pool.take(len(missing))
            for (b, _), page in zip(missing, pages, strict=True):
                self._pages[b].append(page)
            self._write_table([(b, column, page) for (b, column), page in zip(missing, pages, strict=True)])

    def _count(self, rows: int, on_host: bool = True) -> None:
        if rows:
            with self._current_stream():
                seqlens = _as_xp(self._seqlens)
                seqlens += rows
            if on_host:
                self._lengths += rows

    def _write_lengths(self) -> None:
        with self._current_stream() as xp:
            _as_xp(self._seqlens)[...] = xp.asarray(self._lengths.astype(np.int32))

    def _write_table(self, entries: list[tuple[int, int, int]]) -> None:
        """Entries (sequence, column, page) of the page table."""
        assert self._table is not None
        with self._current_stream() as xp:
            sequence, column, page = xp.asarray(np.array(entries, np.int32).reshape(-1, 3).T)
            _as_xp(self._table)[sequence, column] = page

    def _is_capturing(self) -> bool:
        return self._like.device is not None and arrays.is_capturing(arrays.current_stream(self._like))

    @contextmanager
    def _current_stream(self) -> Iterator[Any]:
        """NumPy, or CuPy on the device and current stream of the cache's framework."""
        if self._like.device is None:
            yield np
            return
        import cupy

        with cupy.cuda.Device(self._like.device), arrays.current_stream(self._like):
            yield cupy


class _Pages:
    """Which pages are free, and how many sequences hold each of the others."""

    def __init__(self, count: int, page_size: int):
        self.page_size = page_size
        self._holders = [0] * count
        self._free = list(range(count))[::-1]

    def take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise ValueError(f"pages is {len(self._holders)}, of which {len(self._free)} are free; needed: {count} free ones")
        taken = [self._free.pop() for _ in range(count)]
        self.hold(taken)
        return taken

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def release_all(self, pages: list[list[int]]) -> None:
        for each in pages:
            self.release(each)


def _as_xp(array: Array) -> Any:
    return arrays.to_numpy(array) if array.device is None else arrays.as_cupy(array)
