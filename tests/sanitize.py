"""A few small calls over every row of the tile tables, for NVIDIA's compute-sanitizer; no pytest, no reference, no assertion of results.

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
from rawattn.spec import AppendSpec, KernelSpec
from rawattn.tiles import SPLIT_TABLE, TABLE, launch_variant, launch_variants, split_rows, tile_for

MASKS: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "window": {"window": (70, 9)}}
DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
HEADS, KV_HEADS = 4, 2
QUERIES = {8: 3, 16: 7, 32: 12, 64: 30, 128: 40}  # with which split_rows gives a tile of so many rows
LENGTHS, CAPACITY, LARGE = (0, 1, 65, 500), 592, 4736  # keys in the cache, and for how many it has room
# As many sequences of each length: a cluster's CTA has one split, two, or all four where an SM has two CTAs; then a list has them.
FEW, FULL, NEARLY, MANY = (1, 7), 24, 16, 34


def specs() -> Iterator[KernelSpec]:
    """Each row of the tile table with each mask that it serves, dense and packed, at its widest and eight columns below."""
    dtypes = itertools.cycle(DTYPES)
    for (head_dim, head_dim_v, masks, _), varlen in itertools.product(TABLE, (False, True)):
        for narrower, mask in zip((0, 8, 0), masks, strict=False):
            yield KernelSpec(next(dtypes), head_dim - narrower, head_dim_v - narrower, HEADS // KV_HEADS, mask, varlen)


def split_specs() -> Iterator[KernelSpec]:
    """Each row of the table for keys that are split, with a mask for each of no pages, pages of 16 rows and pages of one."""
    dtypes, masks = itertools.cycle(DTYPES), list(MASKS)
    for number, ((head_dim, head_dim_v, tile), page_rows) in enumerate(itertools.product(SPLIT_TABLE, (0, 16, 1))):
        assert split_rows(head_dim, head_dim_v, HEADS // KV_HEADS, KV_HEADS, QUERIES[tile.tile_m]) == tile.tile_m
        mask = masks[(number + number // 3) % 3]
        yield KernelSpec(next(dtypes), head_dim, head_dim_v, HEADS // KV_HEADS, mask, True, tile.tile_m, page_rows)


def normal(rows: int, heads: int, head_dim: int, dtype: str, batch: int = 1) -> Any:
    return np.random.default_rng(rows).standard_normal((batch, rows, heads, head_dim)).astype(DTYPES[dtype])


def array(rows: int, heads: int, head_dim: int, dtype: str, batch: int = 1) -> Any:
    return cp.asarray(normal(rows, heads, head_dim, dtype, batch))


def report(text: str, out: Any) -> None:
    cp.cuda.Device().synchronize()
    print(f"{text}: |out| {math.sqrt(float((cp.asnumpy(out).astype(np.float64) ** 2).sum())):.4f}", flush=True)


def call(spec: KernelSpec) -> None:
    tile = tile_for(spec)
    masks = MASKS[spec.mask]
    # One row, a tile and a bit, and keys that end inside a block, on its edge and past the ring of stages.
    for rows_q, rows_k in [(1, 1), (tile.tile_m + 3, tile.tile_n), (77, (tile.stages + 1) * tile.tile_n + 5)]:
        q = array(rows_q, HEADS, spec.head_dim, spec.dtype)
        k, v = array(rows_k, KV_HEADS, spec.head_dim, spec.dtype), array(rows_k, KV_HEADS, spec.head_dim_v, spec.dtype)
        if spec.varlen:
            ends_q = cp.asarray([0, 0, rows_q // 2, rows_q], np.int32)
            ends_k = cp.asarray([0, rows_k // 3, rows_k // 3, rows_k], np.int32)
            out, _ = rawattn.attention_varlen(q[0], k[0], v[0], ends_q, ends_k, **masks, return_lse=True)
        else:
            out, _ = rawattn.attention(q, k, v, **masks, return_lse=True)
        report(f"{spec.name} Sq {rows_q} Sk {rows_k}", out)


def split_call(spec: KernelSpec) -> None:
    """Few queries to many keys, to a cache that is read, and to one that rotated keys are appended to, also packed where it serves that."""
    rows, batch, dims = QUERIES[spec.split_rows], len(LENGTHS), (spec.head_dim, spec.head_dim_v)
    q = array(rows, HEADS, spec.head_dim, spec.dtype, batch)
    masks: dict[str, Any] = {"causal": False} | MASKS[spec.mask]
    if spec.page_rows == 0:
        k, v = (array(500, KV_HEADS, dim, spec.dtype, batch) for dim in dims)
        report(f"{spec.name} Sq {rows} Sk 500", rawattn.attention(q, k, v, **masks, return_lse=True)[0])
    ways = [(times, CAPACITY) for times in (*FEW, FULL, MANY)] + [(NEARLY, LARGE)]  # the last has a tile for nearly each SM
    for times, capacity in ways if tile_for(spec).few_rows else ways[:1]:
        variant, clusters = launch_variant(spec, times * batch, rows, HEADS, capacity, cp.cuda.Device().attributes["MultiProcessorCount"])
        if tile_for(spec).few_rows:
            assert (clusters > 1, clusters == 1) == (times in FEW, times == FULL and tile_for(spec).ctas_per_sm > 1)
        many = cp.concatenate([q] * times)
        out, _ = rawattn.attention_with_kvcache(many, **repeated(cache(spec, capacity), times), **masks, return_lse=True)
        report(f"{variant.name} read by {len(many)}, {clusters} CTAs a cluster", out)
    k, v = (array(rows, KV_HEADS, dim, spec.dtype, batch) for dim in dims)
    cos_sin = array(CAPACITY, 1, 16, spec.dtype, 2)
    masks |= {"rotary_cos": cos_sin[0, :, 0], "rotary_sin": cos_sin[1, :, 0]}
    report(f"{spec.name} append", rawattn.attention_with_kvcache(q, k=k, v=v, **cache(spec), **masks, return_lse=True)[0])
    if split_rows(*dims, HEADS // KV_HEADS, KV_HEADS, None) == spec.split_rows:
        q, k, v = (x.reshape(batch * rows, *x.shape[2:]) for x in (q, k, v))
        masks |= {"cu_seqlens_q": cp.asarray([0, 1, 1, 2 * rows, 4 * rows], np.int32), "rotary_interleaved": True}
        report(f"{spec.name} packed", rawattn.attention_with_kvcache(q, k=k, v=v, **cache(spec), **masks, return_lse=True)[0])


def cache(spec: KernelSpec, capacity: int = CAPACITY) -> dict[str, Any]:
    """A cache of LENGTHS, in memory that is NaN wherever it holds no key; the pages of all sequences lie backwards."""
    batch = len(LENGTHS)
    arguments: dict[str, Any] = {"cache_seqlens": cp.asarray(LENGTHS, np.int32)}
    if spec.page_rows:
        table = np.arange(batch * capacity // spec.page_rows, dtype=np.int32)[::-1].reshape(batch, -1)
        arguments["page_table"] = cp.asarray(np.ascontiguousarray(table))
    for name, dim in (("k_cache", spec.head_dim), ("v_cache", spec.head_dim_v)):
        rows = normal(capacity, KV_HEADS, dim, spec.dtype, batch)
        for b, length in enumerate(LENGTHS):
            rows[b, length:] = math.nan
        if spec.page_rows:
            rows = np.ascontiguousarray(rows.reshape(-1, spec.page_rows, KV_HEADS, dim)[::-1])
        arguments[name] = cp.asarray(rows)
    return arguments


def repeated(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """`times` as many sequences that read the same rows or pages."""
    if "page_table" not in arguments:
        arguments["cache_batch_idx"] = cp.arange(len(LENGTHS), dtype=np.int32)
    return {name: x if name in ("k_cache", "v_cache") else cp.concatenate([x] * times) for name, x in arguments.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["--build"]:
        variants: list[KernelSpec | AppendSpec] = [*specs(), *map(AppendSpec, DTYPES)]
        for spec in split_specs():
            variants += launch_variants(spec)
        for variant in variants:
            print(compiler.build(variant))
    else:
        for spec in specs():
            call(spec)
        for spec in split_specs():
            split_call(spec)
