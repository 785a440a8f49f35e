"""KernelSpec: everything that is fixed when a kernel is compiled."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
MASKS = ("full", "causal", "window")
ROWS_OF_SPLIT_TILES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class AppendSpec:
    """One compiled variant of the kernel that appends to a KV cache; dtype: "float16" or "bfloat16"."""

    dtype: str

    @property
    def name(self) -> str:
        """A readable name for file names, logs and error messages."""
        return f"append_kv_{DTYPES[self.dtype]}"


@dataclass(frozen=True)
class KernelSpec:
    """One compiled variant of the attention kernels.

    dtype:      "float16" or "bfloat16", of q, k, v and the output.
    head_dim:   D of q and k, a multiple of 8 up to 256.
    head_dim_v: Dv of v and the output, likewise.
    gqa_ratio:  query heads for each key/value head.
    mask:       "full", "causal" (keys bounded on the right by the diagonal) or "window" (bounded on both sides).
    varlen:     the sequences' bounds are read on the device: packed (T, H, D) arrays, or a KV cache.
    split_rows: where keys are split among CTAs, the rows of a tile (ROWS_OF_SPLIT_TILES), which the query heads of a KV head share; else 0.
    page_rows:  where K and V lie in pages, how many rows of a page are loaded at once; else 0.
    short:      whether the sequences have so few queries that another tile serves them better (tiles.is_short).
    cluster:    where keys are split, whether the CTAs that have a tile's splits are one cluster (tiles.cluster_sizes).
    alone:      where keys are split, whether a CTA has an SM to itself, though two would fit (tiles.launch_variant).

    >>> KernelSpec("bfloat16", 128, 128, 4, "causal").name
    'attn_fwd_bf16_d128_gqa4_causal'
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    gqa_ratio: int
    mask: str
    varlen: bool = False
    split_rows: int = 0
    page_rows: int = 0
    short: bool = False
    cluster: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; needed: {' or '.join(DTYPES)}")
        for name, dim in (("head_dim", self.head_dim), ("head_dim_v", self.head_dim_v)):
            if not (8 <= dim <= 256 and dim % 8 == 0):
                raise ValueError(f"{name} is {dim}; needed: a multiple of 8 from 8 to 256")
        if self.gqa_ratio < 1:
            raise ValueError(f"gqa_ratio is {self.gqa_ratio}; needed: 1 or more query heads for each key/value head")
        if self.mask not in MASKS:
            raise ValueError(f"mask is {self.mask!r}; needed: one of {', '.join(MASKS)}")
        if self.split_rows not in (0, *ROWS_OF_SPLIT_TILES):
            raise ValueError(f"split_rows is {self.split_rows}; needed: 0 or one of {', '.join(map(str, ROWS_OF_SPLIT_TILES))}")
        if (self.split_rows or self.page_rows) and not self.varlen:
            raise ValueError(f"varlen is {self.varlen}; needed: True where keys are split or lie in pages")
        for name in ("cluster", "alone"):
            if getattr(self, name) and not self.split_rows:
                raise ValueError(f"{name} is {getattr(self, name)}; needed: False where keys are not split")

    @property
    def pack(self) -> int:
        """Query heads of one KV head that share a tile's rows: where keys are split, so that K and V are read once for all of them."""
        return max((n for n in range(1, self.split_rows + 1) if self.gqa_ratio % n == 0), default=1)

    @property
    def name(self) -> str:
        """A readable name for file names, logs and error messages."""
        parts = ["attn_fwd", DTYPES[self.dtype], f"d{self.head_dim}"]
        if self.head_dim_v != self.head_dim:
            parts.append(f"dv{self.head_dim_v}")
        parts += [f"gqa{self.gqa_ratio}", self.mask] + (["varlen"] if self.varlen else [])
        parts += [f"split{self.split_rows}"] if self.split_rows else []
        parts += [f"page{self.page_rows}"] if self.page_rows else []
        parts += ["short"] if self.short else []
        parts += ["cluster"] if self.cluster else []
        parts += ["alone"] if self.alone else []
        return "_".join(parts)
