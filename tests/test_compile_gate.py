"""The compile gate: every row of the tile tables, with every mask and dtype that it serves, compiles for sm_90a without a blemish.

`pytest -s tests/test_compile_gate.py` prints a line for each variant; `python -m tests.test_compile_gate` prints them as one table.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rawattn.compiler import CompileReport, UnsupportedEnvironment, compile_cubin, nvrtc_version
from rawattn.spec import DTYPES, MASKS, AppendSpec, KernelSpec
from rawattn.tiles import SHARED_MEMORY_OF_SM, SPLIT_TABLE, TABLE, is_short, launch_variants, tile_for

# The largest dims of each row in every variant; dims that fill no slab of 64 columns, with a ratio that is no power of two; pages.
PLAIN = [
    KernelSpec(dtype, head_dim, head_dim_v, 4, mask, varlen)
    for head_dim, head_dim_v, masks, _ in TABLE
    for mask, dtype, varlen in itertools.product(masks, DTYPES, (False, True))
]
PLAIN += [KernelSpec("bfloat16", head_dim - 8, head_dim_v - 8, 7, masks[-1]) for head_dim, head_dim_v, masks, _ in TABLE]
PLAIN += [KernelSpec("bfloat16", head_dim, head_dim_v, 4, masks[-1], True, page_rows=16) for head_dim, head_dim_v, masks, _ in TABLE]
PLAIN += [replace(spec, short=True) for spec in PLAIN if is_short(spec, 1)]
PLAIN += [KernelSpec(dtype, dim, dim, 4, "causal") for dtype, dim in zip(DTYPES, (88, 112), strict=True)]  # they share the tile of 128


def split_specs() -> Iterator[KernelSpec]:
    """Each row, mask and dtype: in turn, one dtype without pages and the other with pages of one row, 16 rows or a block."""
    turn = itertools.count()
    for (head_dim, head_dim_v, tile), mask in itertools.product(SPLIT_TABLE, MASKS):
        number = next(turn)
        page_rows = (1, 16, tile.tile_n)[(number + number // 3) % 3]  # not always the same for a mask
        for dtype, rows in zip(DTYPES, (0, page_rows) if number % 2 else (page_rows, 0), strict=True):
            yield KernelSpec(dtype, head_dim, head_dim_v, 4, mask, True, tile.tile_m, rows)


def launch_specs() -> Iterator[KernelSpec]:
    """Each row that may have clusters, or CTAs with an SM to themselves: masks in turn, one dtype without pages and the other with some."""
    rows = [row for row in SPLIT_TABLE if row[-1].few_rows]
    for number, ((head_dim, head_dim_v, tile), mask) in enumerate(zip(rows, itertools.cycle(MASKS), strict=False)):
        for dtype, page_rows in zip(DTYPES, (0, 16) if number % 2 else (16, 0), strict=True):
            spec = KernelSpec(dtype, head_dim, head_dim_v, 4, mask, True, tile.tile_m, page_rows)
            yield from (variant for variant in launch_variants(spec)[1:] if variant.split_rows == spec.split_rows)


SPECS = [*PLAIN, *split_specs(), *launch_specs()]


def register_limit(spec: KernelSpec) -> int:
    """What a thread may have when the CTA starts: registers come in eights, and the CTAs of an SM share the file of 65536."""
    tile = tile_for(spec)
    return 65536 // (tile.threads * tile.ctas_per_sm) // 8 * 8


def shared_memory_limit(spec: KernelSpec) -> int:
    """Bytes that a CTA may ask for where the tile's number of them fit an SM: each takes 1024 more."""
    return SHARED_MEMORY_OF_SM // tile_for(spec).ctas_per_sm - 1024


def row(spec: KernelSpec, report: CompileReport) -> str:
    tile = tile_for(spec)
    return (
        f"{spec.name:60} {tile.tile_m:4}x{tile.tile_n:<4} {tile.stages:6} {report.registers:5}/{register_limit(spec):<5} "
        f"{report.spill_bytes:6} {report.stack_bytes:6} {tile.shared_memory_bytes(spec):7} {len(report.warnings):9} {report.seconds:7.2f}"
    )


HEADER = f"{'variant':60} {'tile':9} stages registers    spill  stack  shared  warnings seconds"


def test_every_row_of_the_table_is_reached() -> None:
    short = [(tile.short,) for *_, tile in TABLE if tile.short]
    of_table = {id(tile_for(spec)) for spec in SPECS if not (spec.cluster or spec.alone)}
    assert of_table == {id(tile) for *_, tile in (*TABLE, *SPLIT_TABLE, *short)}
    for cluster, alone in ((True, False), (False, True), (True, True)):
        reached = {(spec.head_dim, spec.head_dim_v, spec.split_rows) for spec in SPECS if (spec.cluster, spec.alone) == (cluster, alone)}
        wanted = [row for row in SPLIT_TABLE if row[-1].few_rows >= cluster and (row[-1].ctas_per_sm > 1) >= alone]
        assert reached == {(head_dim, head_dim_v, tile.tile_m) for head_dim, head_dim_v, tile in wanted}
    assert len(set(SPECS)) == len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_without_a_blemish(spec: KernelSpec) -> None:
    report = compiled_without_a_blemish(spec)
    print(row(spec, report))
    assert 0 < report.registers <= register_limit(spec)
    assert tile_for(spec).shared_memory_bytes(spec) <= shared_memory_limit(spec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_that_appends_compiles_without_a_blemish(dtype: str) -> None:
    assert 0 < compiled_without_a_blemish(AppendSpec(dtype)).registers <= 255


def compiled_without_a_blemish(spec: KernelSpec | AppendSpec) -> CompileReport:
    try:
        nvrtc_version()
    except UnsupportedEnvironment as error:
        pytest.skip(str(error))
    cubin, report = compile_cubin(spec)
    assert cubin.startswith(b"\x7fELF")
    assert report.warnings == ()
    assert report.spill_bytes == 0 and report.stack_bytes == 0
    return report


if __name__ == "__main__":
    print(f"NVRTC {'.'.join(map(str, nvrtc_version()))}\n{HEADER}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs without the GIL
        for spec, (_, report) in zip(SPECS, pool.map(compile_cubin, SPECS), strict=True):
            print(row(spec, report), flush=True)
            for warning in report.warnings:
                print("   ", warning)
