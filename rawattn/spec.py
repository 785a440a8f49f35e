"""KernelSpec: everything that is fixed when a kernel is compiled."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
MASKS = ("full", "causal", "window")


@dataclass(frozen=True)
class KernelSpec:
    """One compiled variant of the forward kernel.

    dtype:      "float16" or "bfloat16", of q, k, v and the output.
    head_dim:   D of q and k, a multiple of 8 up to 256.
    head_dim_v: Dv of v and the output, likewise.
    gqa_ratio:  query heads for each key/value head.
    mask:       "full", "causal" (keys bounded on the right by the diagonal) or "window" (bounded on both sides).
    varlen:     packed (T, H, D) sequences whose bounds are read from cu_seqlens on the device.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    gqa_ratio: int
    mask: str
    varlen: bool = False

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

    @property
    def name(self) -> str:
        """A readable name for file names, logs and error messages."""
        parts = ["attn_fwd", DTYPES[self.dtype], f"d{self.head_dim}"]
        if self.head_dim_v != self.head_dim:
            parts.append(f"dv{self.head_dim_v}")
        parts += [f"gqa{self.gqa_ratio}", self.mask] + (["varlen"] if self.varlen else [])
        return "_".join(parts)
