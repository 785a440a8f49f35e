"""The shape of one call of attention, as commands take it from flags or a model's name, and the arithmetic that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import numpy as np

from rawattn import reference
from rawattn.arrays import Array, contiguous_strides
from rawattn.attention import AttentionCall
from rawattn.spec import DTYPES, KernelSpec
from rawattn.tiles import cache_spec

from .models import GEOMETRIES

DTYPE_OF = {short: dtype for dtype, short in DTYPES.items()}
COLUMNS = 2048  # query columns, heads * D, where no heads are given: those of FlashAttention's published benchmarks

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Shape:
    """One call: dtype is "fp16" or "bf16", window (left, right) with None for unbounded, the rest as in rawattn.attention.

    With a `cache` it is attention_with_kvcache, on a cache in pages of page_size keys unless that is 0.
    """

    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    cache: bool = False
    page_size: int = 0

    @property
    def mask(self) -> str:
        left, right = self.window or (None, None)
        return "window" if left is not None else "causal" if self.causal or right is not None else "full"

    @property
    def spec(self) -> KernelSpec:
        """The variant that serves this call. Raises ValueError for a head size that no kernel has."""
        dtype, ratio = DTYPE_OF[self.dtype], self.heads // self.kv_heads
        if self.cache:
            return cache_spec(dtype, self.head_dim, self.head_dim_v, ratio, self.kv_heads, self.mask, self.seqlen_q, self.page_size)

        def absent(rows: int, heads: int, dim: int) -> Array:
            shape = (self.batch, rows, heads, dim)
            return Array(None, "numpy", 0, shape, contiguous_strides(shape, 2), dtype, None)

        q, k = absent(self.seqlen_q, self.heads, self.head_dim), absent(self.seqlen_k, self.kv_heads, self.head_dim)
        v = absent(self.seqlen_k, self.kv_heads, self.head_dim_v)
        return AttentionCall({"q": q, "k": k, "v": v}, self.causal, self.window, None).spec

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Query i sees the keys first[i] <= key < last[i]."""
        return reference.visible_keys(self.seqlen_q, self.seqlen_k, self.causal, self.window)

    @property
    def flops(self) -> int:
        """Of Q K^T and P V, over the pairs of query and key that the mask lets through.

        >>> Shape("bf16", 1, 1024, 1024, 1, 1, 128, 128).flops == 4 * 1024**2 * 128
        True
        """
        first, last = self.bounds()
        return 2 * (self.head_dim + self.head_dim_v) * self.heads * self.batch * int(np.maximum(last - first, 0).sum())

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that some query sees."""
        first, last = self.bounds()
        keys = max(int(last.max()) - int(first.min()), 0)
        return 2 * self.batch * self.kv_heads * keys * (self.head_dim + self.head_dim_v)

    @property
    def bytes(self) -> int:
        """The least that a call can move: Q, K and V read once, the output written once."""
        return self.kv_bytes + 2 * self.batch * self.heads * self.seqlen_q * (self.head_dim + self.head_dim_v)

    @property
    def text(self) -> str:
        """
        >>> Shape("bf16", 2, 512, 512, 32, 8, 128, 128, causal=True).text
        'bf16 32/8 D128 B2 S512 causal'
        """
        dim = f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        lengths = f"S{self.seqlen_k}" if self.seqlen_q == self.seqlen_k else f"S{self.seqlen_q}/{self.seqlen_k}"
        cache = f" pages of {self.page_size}" if self.page_size else " cache" if self.cache else ""
        return f"{self.dtype} {self.heads}/{self.kv_heads} {dim} B{self.batch} {lengths} {self.mask}{cache}"


class _Heads(click.ParamType):
    """Hq/Hkv, as in 32/8."""

    name = "HQ/HKV"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            heads, kv_heads = (int(x) for x in value.split("/"))
        except ValueError:
            self.fail(f"{value!r} is not query heads/key-value heads; needed: two integers, as in 32/8", param, ctx)
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            self.fail(f"{value!r} has {heads} query heads for {kv_heads} key-value heads; needed: a multiple of them", param, ctx)
        return heads, kv_heads


class _Window(click.ParamType):
    """LEFT,RIGHT; -1 is unbounded."""

    name = "LEFT,RIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, int | None]:
        if isinstance(value, tuple):
            return value
        try:
            left, right = (int(x) for x in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not LEFT,RIGHT; needed: two integers, as in 1024,0", param, ctx)
        if min(left, right) < -1:
            self.fail(f"{value!r} is below -1; needed: integers from 0 up, or -1 for unbounded", param, ctx)
        return (None if left == -1 else left), (None if right == -1 else right)


HEADS, WINDOW = _Heads(), _Window()


def geometry_options(command: Command) -> Command:
    """--model, or --head-dim, --head-dim-v and --heads; geometry() turns them into numbers."""
    for option in (
        click.option("--heads", type=HEADS, metavar="HQ/HKV", help=f"Query/key-value heads.  [default: {COLUMNS}/D of each]"),
        click.option("--head-dim-v", type=int, metavar="DV", help="Dv of v and the output.  [default: D]"),
        click.option("--head-dim", type=int, metavar="D", help="D of q and k."),
        click.option("--model", type=click.Choice([*GEOMETRIES]), metavar="NAME", help=f"A model's geometry: {', '.join(GEOMETRIES)}."),
    ):
        command = option(command)
    return command


def geometry(
    model: str | None, head_dim: int | None, head_dim_v: int | None, heads: tuple[int, int] | None
) -> tuple[int, int, int, int] | None:
    """(heads, kv_heads, D, Dv), or None where no flag was given. Raises click.UsageError."""
    if model is not None:
        if (head_dim, head_dim_v, heads) != (None, None, None):
            raise click.UsageError("Give --model, or --head-dim and --heads.")
        known = GEOMETRIES[model]
        return known.heads, known.kv_heads, known.head_dim, known.head_dim
    if head_dim is None:
        if (head_dim_v, heads) != (None, None):
            raise click.UsageError("Give --head-dim, or --model.")
        return None
    if head_dim < 1:
        raise click.UsageError(f"--head-dim is {head_dim}; needed: a multiple of 8 from 8 to 256.")
    number, kv_number = heads or (max(1, COLUMNS // head_dim),) * 2
    return number, kv_number, head_dim, head_dim if head_dim_v is None else head_dim_v


def checked(shape: Shape) -> Shape:
    """`shape`, if some kernel serves it. Raises click.UsageError."""
    try:
        _ = shape.spec
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    return shape
