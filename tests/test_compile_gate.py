"""The compile gate: every row of the tile table, with every mask and dtype that it serves, compiles for sm_90a without a blemish.

`pytest -s tests/test_compile_gate.py` prints a line for each variant; `python -m tests.test_compile_gate` prints them as one table.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rawattn.compiler import CompileReport, UnsupportedEnvironment, compile_cubin, nvrtc_version
from rawattn.spec import DTYPES, KernelSpec
from rawattn.tiles import SHARED_MEMORY_LIMIT, TABLE, tile_for

# The largest dims of each row in every variant, then dims that fill no slab of 64 columns, with a ratio that is no power of two.
SPECS = [
    KernelSpec(dtype, head_dim, head_dim_v, 4, mask, varlen)
    for head_dim, head_dim_v, masks, _ in TABLE
    for mask, dtype, varlen in itertools.product(masks, DTYPES, (False, True))
] + [KernelSpec("bfloat16", head_dim - 8, head_dim_v - 8, 7, masks[-1]) for head_dim, head_dim_v, masks, _ in TABLE]


def register_limit(spec: KernelSpec) -> int:
    """What a thread may have when the CTA starts: registers come in eights, and one CTA takes the whole file of 65536."""
    return 65536 // tile_for(spec).threads // 8 * 8


def row(spec: KernelSpec, report: CompileReport) -> str:
    tile = tile_for(spec)
    return (
        f"{spec.name:44} {tile.tile_m:4}x{tile.tile_n:<4} {tile.stages:6} {report.registers:5}/{register_limit(spec):<5} "
        f"{report.spill_bytes:6} {report.stack_bytes:6} {tile.shared_memory_bytes(spec):7} {len(report.warnings):9} {report.seconds:7.2f}"
    )


HEADER = f"{'variant':44} {'tile':9} stages registers    spill  stack  shared  warnings seconds"


def test_every_row_of_the_table_is_reached() -> None:
    assert {id(tile_for(spec)) for spec in SPECS} == {id(tile) for *_, tile in TABLE}
    assert len(set(SPECS)) == len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_without_a_blemish(spec: KernelSpec) -> None:
    try:
        nvrtc_version()
    except UnsupportedEnvironment as error:
        pytest.skip(str(error))
    cubin, report = compile_cubin(spec)
    print(row(spec, report))
    assert cubin.startswith(b"\x7fELF")
    assert report.warnings == ()
    assert report.spill_bytes == 0 and report.stack_bytes == 0
    assert 0 < report.registers <= register_limit(spec)
    assert tile_for(spec).shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT


if __name__ == "__main__":
    print(f"NVRTC {'.'.join(map(str, nvrtc_version()))}\n{HEADER}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs without the GIL
        for spec, (_, report) in zip(SPECS, pool.map(compile_cubin, SPECS), strict=True):
            print(row(spec, report), flush=True)
            for warning in report.warnings:
                print("   ", warning)
