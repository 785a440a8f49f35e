"""A few small calls over every row of the tile table, for NVIDIA's compute-sanitizer; no pytest, no reference, no assertion of results.

compute-sanitizer --tool memcheck python3 -m tests.sanitize     (likewise synccheck and racecheck)

Compile first, outside of the sanitizer, which slows the host down: python3 -m tests.sanitize --build
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np

import rawattn
from rawattn import compiler
from rawattn.spec import KernelSpec
from rawattn.tiles import TABLE, tile_for

MASKS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "window": {"window": (70, 9)}}
DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def specs() -> Iterator[KernelSpec]:
    """Each row of the tile table with each mask that it serves, dense and packed, at its widest and eight columns below."""
    dtypes = itertools.cycle(DTYPES)
    for (head_dim, head_dim_v, masks, _), varlen in itertools.product(TABLE, (False, True)):
        for narrower, mask in zip((0, 8, 0), masks, strict=False):
            yield KernelSpec(next(dtypes), head_dim - narrower, head_dim_v - narrower, 2, mask, varlen)


def array(rows: int, heads: int, head_dim: int, dtype: str) -> Any:
    values = np.random.default_rng(rows).standard_normal((1, rows, heads, head_dim)).astype(DTYPES[dtype])
    return cp.asarray(values)


def call(spec: KernelSpec) -> None:
    tile = tile_for(spec)
    masks = MASKS[spec.mask]
    # One row, a tile and a bit, and keys that end inside a block, on its edge and past the ring of stages.
    for rows_q, rows_k in [(1, 1), (tile.tile_m + 3, tile.tile_n), (77, (tile.stages + 1) * tile.tile_n + 5)]:
        q = array(rows_q, 4, spec.head_dim, spec.dtype)
        k, v = array(rows_k, 2, spec.head_dim, spec.dtype), array(rows_k, 2, spec.head_dim_v, spec.dtype)
        if spec.varlen:
            ends_q = cp.asarray([0, 0, rows_q // 2, rows_q], np.int32)
            ends_k = cp.asarray([0, rows_k // 3, rows_k // 3, rows_k], np.int32)
            out, lse = rawattn.attention_varlen(q[0], k[0], v[0], ends_q, ends_k, **masks, return_lse=True)
        else:
            out, lse = rawattn.attention(q, k, v, **masks, return_lse=True)
        cp.cuda.Device().synchronize()
        print(
            f"{spec.name} Sq {rows_q} Sk {rows_k}: |out| {math.sqrt(float((cp.asnumpy(out).astype(np.float64) ** 2).sum())):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    for spec in specs():
        if sys.argv[1:] == ["--build"]:
            print(compiler.build(spec))
        else:
            call(spec)
