"""attention() on a Hopper GPU: every shape of the contract against float64, bits, streams, graphs, frameworks, errors."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gpu_support
import numpy as np
import pytest
from gpu_support import (
    DTYPES,
    ENOUGH_ELEMENTS,
    LAYOUTS,
    assert_close,
    assert_lse_close,
    assert_right,
    compile_in_parallel,
    jax_on_gpu,
    normal,
    packed_qkv,
    poison,
    poisoned,
    same_bits,
    strided,
    strides_of,
    torch_on_gpu,
    untouched_outside,
)

import rawattn
from rawattn import reference
from rawattn.attention import FEW_QUERIES
from rawattn.spec import KernelSpec
from rawattn.tiles import tile_for

cp = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    gpu_support.seed(request.node.name)


# ---- variants and shapes


MASKS = ("full", "causal", "window")
RATIOS = (1, 2, 3, 4, 7, 8, 16, 32)
SHAPES_OF_A_VARIANT = 6


def _variants() -> list[KernelSpec]:
    """96 variants: every D three times, once for each mask, with Dv = D, Dv from far away, and a shuffled Dv; dtypes and ratios in turn."""
    dims = list(range(8, 257, 8))
    shuffled = random.Random(8).sample(dims, len(dims))
    variants = []
    for i, dim in enumerate(dims):
        for j, mask in enumerate(MASKS):
            n = len(MASKS) * i + j
            dim_v = (dim, 264 - dim, shuffled[i])[(i + j) % 3]
            variants.append(KernelSpec(tuple(DTYPES)[(i + j) % 2], dim, dim_v, RATIOS[n % len(RATIOS)], mask))
    return variants


VARIANTS = _variants()


@dataclass(frozen=True)
class Case:
    spec: KernelSpec
    batch: int
    rows_q: int
    rows_k: int
    heads_k: int
    causal: bool | str
    window: tuple[int | None, int | None] | None
    scale: float | None
    layout: str
    layout_out: str | None  # None: attention() makes the output

    @property
    def masks(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "scale": self.scale}


def _draw_length(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.06:
        return rng.randint(0, 1)
    if kind < 0.50:
        return rng.randint(2, 200)
    if kind < 0.75:
        return rng.randint(201, 1000) | 1
    return rng.randint(1001, 4200)


def _draw_mask(rng: random.Random, mask: str) -> tuple[bool | str, tuple[int | None, int | None] | None]:
    def side() -> int:
        return rng.choice((0, 1, rng.randint(2, 63), rng.randint(64, 600)))

    if mask == "full":
        return False, rng.choice((None, None, (None, None), (-1, None)))
    if mask == "causal":
        return rng.choice(((True, None), ("top-left", None), (False, (None, side())), (False, (-1, 0)), (True, (None, 3))))
    return rng.choice(
        ((False, (side(), side())), (False, (side(), None)), (True, (side(), -1)), (True, (side(), 5)), ("top-left", (side(), side())))
    )


def _draw(rng: random.Random, spec: KernelSpec) -> Case:
    """Any shape that float64 can check in well under a second, with so many elements that the L2 rule does not hang on luck."""
    while True:
        rows_q, rows_k = _draw_length(rng), _draw_length(rng)
        layout = rng.choice((*LAYOUTS, "packed QKV", "packed QKV"))
        if layout == "packed QKV" or rng.random() < 0.2:
            rows_k = rows_q
        heads_k = rng.randint(1, 16)
        causal, window = _draw_mask(rng, spec.mask)
        # A steeper softmax would rest on few keys, where the max error hangs on luck.
        factor = rng.choice((None, None, None, 0.5, 0.8))
        scale = None if factor is None else factor / math.sqrt(spec.head_dim)
        heads_q = heads_k * spec.gqa_ratio
        first, last = reference.visible_keys(rows_q, rows_k, causal, window)
        rounded_elements = int((last - first > 1).sum()) * heads_q * spec.head_dim_v
        batch = rng.randint(1, 3)
        if rounded_elements:
            batch = max(batch, -(-ENOUGH_ELEMENTS // rounded_elements))
        scores = batch * heads_q * rows_q * rows_k
        elements = batch * heads_q * max(rows_q, rows_k) * max(spec.head_dim, spec.head_dim_v)
        if scores <= 1 << 27 and elements <= 1 << 26 and batch * heads_k <= 300:
            return Case(spec, batch, rows_q, rows_k, heads_k, causal, window, scale, layout, rng.choice((None, *LAYOUTS)))


def cases_of(spec: KernelSpec) -> list[Case]:
    rng = random.Random(spec.name)
    return [_draw(rng, spec) for _ in range(SHAPES_OF_A_VARIANT)]


# What the other tests call for; listed so that it is compiled in parallel, before the first test.
DENSE = {
    "D 64": KernelSpec("float16", 64, 64, 1, "full"),
    "D 64 causal": KernelSpec("bfloat16", 64, 64, 4, "causal"),
    "D 128": KernelSpec("bfloat16", 128, 128, 4, "full"),
    "D 128 causal": KernelSpec("bfloat16", 128, 128, 4, "causal"),
    "D 128 window": KernelSpec("float16", 128, 128, 8, "window"),
    "D 192/128 causal": KernelSpec("bfloat16", 192, 128, 1, "causal"),
    "D 256 causal": KernelSpec("float16", 256, 256, 2, "causal"),
    "D 40/72 window": KernelSpec("bfloat16", 40, 72, 7, "window"),
}
VARLEN = {name: KernelSpec(s.dtype, s.head_dim, s.head_dim_v, s.gqa_ratio, s.mask, varlen=True) for name, s in DENSE.items()}
MASK_OF: dict[str, dict[str, Any]] = {"full": {}, "causal": {"causal": True}, "window": {"window": (100, 37)}}
NAN_SPECS = [KernelSpec("bfloat16", 128, 128, 4, mask) for mask in MASKS]


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    compile_in_parallel([*VARIANTS, *DENSE.values(), *VARLEN.values(), *NAN_SPECS], request.config)


def make(spec: KernelSpec, batch: int, rows_q: int, rows_k: int, heads_k: int) -> tuple[Any, Any, Any]:
    q = normal((batch, rows_q, heads_k * spec.gqa_ratio, spec.head_dim), spec.dtype)
    k = normal((batch, rows_k, heads_k, spec.head_dim), spec.dtype)
    v = normal((batch, rows_k, heads_k, spec.head_dim_v), spec.dtype)
    return q, k, v


# ---- shapes


def _run(case: Case) -> None:
    plain = make(case.spec, case.batch, case.rows_q, case.rows_k, case.heads_k)
    q, k, v = packed_qkv(*plain) if case.layout == "packed QKV" else (strided(x, case.layout) for x in plain)
    if case.layout_out is None:
        out, lse = rawattn.attention(q, k, v, **case.masks, return_lse=True)
    else:
        shape = (*q.shape[:-1], case.spec.head_dim_v)
        view, buffer = poisoned(shape, case.spec.dtype, strides_of(case.layout_out, shape))
        result, lse = rawattn.attention(q, k, v, **case.masks, out=view, return_lse=True)
        assert result is view
        out = view.copy()
        assert untouched_outside(view, buffer), "memory around out was written"
    assert_right(out, lse, *plain, case.masks)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_random_shapes(spec: KernelSpec) -> None:
    failures = []
    for case in cases_of(spec):
        try:
            _run(case)
        except AssertionError as error:  # the others of the variant show where the fault lies; a CUDA error ends the test at once
            failures.append(f"{case}\n    {error}")
    assert not failures, "\n".join([f"{len(failures)} of {SHAPES_OF_A_VARIANT} shapes are wrong", *failures])


@pytest.mark.parametrize("name", DENSE)
def test_lengths_around_the_edges_of_tiles_and_blocks(name: str) -> None:
    spec = DENSE[name]
    tile = tile_for(spec)
    masks = MASK_OF[spec.mask]
    edges_q = [1, 63, 64, 65, tile.tile_m - 1, tile.tile_m, tile.tile_m + 1, 2 * tile.tile_m + 1]
    edges_k = [1, 2, 15, 16, 17, tile.tile_n - 1, tile.tile_n, tile.tile_n + 1, 2 * tile.tile_n, 3 * tile.tile_n + 1]
    for rows_q, rows_k in itertools.product(edges_q, edges_k):
        q, k, v = make(spec, 2, rows_q, rows_k, 2)
        out, lse = rawattn.attention(q, k, v, **masks, return_lse=True)
        assert_right(out, lse, q, k, v, masks)


@pytest.mark.parametrize("batch, rows_q, rows_k, heads", [(2, 0, 5, 4), (2, 5, 0, 4), (1, 0, 0, 4), (0, 5, 5, 4)])
@pytest.mark.parametrize("causal", [False, True, "top-left"])
def test_empty(batch: int, rows_q: int, rows_k: int, heads: int, causal: bool | str) -> None:
    q, k, v = (normal((batch, rows, heads, 64), "float16") for rows in (rows_q, rows_k, rows_k))
    out = cp.empty_like(q)
    poison(out)
    out, lse = rawattn.attention(q, k, v, causal=causal, out=out, return_lse=True)
    assert out.shape == q.shape and bool((out == 0).all())
    assert lse.shape == (batch, heads, rows_q) and bool((lse == -math.inf).all())


def test_large_scores() -> None:
    """Scores up to some thousands: the softmax is then nearly one key's, and its LSE nearly the largest score."""
    spec = DENSE["D 128"]
    q, k, v = make(spec, 1, 300, 500, 2)
    q = (q.astype(np.float32) * 30).astype(q.dtype)
    expected, expected_lse = reference.attention(q, k, v, scale=1.0, return_lse=True)
    out, lse = rawattn.attention(q, k, v, scale=1.0, return_lse=True)
    # float32 scores of that size are off by some 1e-4 themselves, so the rule for N(0, 1) inputs does not hold.
    assert float(cp.abs(out.astype(np.float64) - expected).max()) < 0.05
    assert float(cp.abs(lse / expected_lse - 1).max()) < 1e-6


@pytest.mark.parametrize("name", ["D 64", "D 64 causal", "D 128", "D 128 causal", "D 128 window"])
@pytest.mark.parametrize("positive", [slice(0), slice(None, 300), slice(400, None)], ids=["never", "first", "last"])
def test_scores_that_are_negative_but_for_some_keys(name: str, positive: slice) -> None:
    """The maximum is sought among the bits of floats, which are ordered as integers are unless all are negative."""
    spec = DENSE[name]
    q, k, v = make(spec, 1, 700, 700, 2)
    q, k = (abs(x.astype(np.float32)) for x in (q, k))
    signs = cp.full((700, 1, 1), -1, np.float32)
    signs[positive] = 1
    q, k = (x.astype(v.dtype) for x in (q, k * signs))
    out, lse = rawattn.attention(q, k, v, **MASK_OF[spec.mask], return_lse=True)
    assert_right(out, lse, q, k, v, MASK_OF[spec.mask])


def test_scores_of_either_zero() -> None:
    q, k, v = make(DENSE["D 128"], 1, 300, 500, 2)
    q[...] = 1
    k[...] = 0
    k[:, ::3] = -0.0
    out, lse = rawattn.attention(q, k, v, return_lse=True)
    assert_right(out, lse, q, k, v, {})


# ---- NaN and inf


@pytest.mark.parametrize("spec", NAN_SPECS, ids=lambda spec: spec.mask)
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_reaches_the_rows_that_see_it_and_no_other_sequence_or_head(spec: KernelSpec, where: str) -> None:
    masks = MASK_OF[spec.mask]
    q, k, v = make(spec, 3, 1100, 1100, 2)
    clean, clean_lse = rawattn.attention(q, k, v, **masks, return_lse=True)
    batch, key, head = 1, 333, 0
    {"k": k, "v": v}[where][batch, key, head] = math.nan
    out, lse = rawattn.attention(q, k, v, **masks, return_lse=True)

    first, last = reference.visible_keys(1100, 1100, masks.get("causal", False), masks.get("window"))
    sees = np.flatnonzero((first <= key) & (key < last))
    group = slice(head * spec.gqa_ratio, (head + 1) * spec.gqa_ratio)
    assert bool(cp.isnan(out[batch, int(sees[0]) : int(sees[-1]) + 1, group].astype(np.float32)).all())

    # A mask hides the key from rows of the same tile, and from those of a tile which loads the key's block, but 0 * NaN may reach them.
    tile = tile_for(spec)
    near = tile.tile_m + tile.tile_n
    rows = slice(max(0, int(sees[0]) - near), int(sees[-1]) + near)
    out[batch, rows, group], lse[batch, group, rows] = clean[batch, rows, group], clean_lse[batch, group, rows]
    assert same_bits(out, clean) and same_bits(lse, clean_lse)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_value_reaches_every_row_that_sees_it(value: float) -> None:
    q, k, v = make(DENSE["D 128 causal"], 1, 400, 400, 2)
    v[0, 200, 1, 7] = value
    out = rawattn.attention(q, k, v, causal=True)[0].astype(np.float32)
    assert bool((out[200:, 4:, 7] == value).all())
    for others in (out[:, :4], out[:, 4:, :7], out[:, 4:, 8:]):
        assert bool(cp.isfinite(others).all())


# ---- bits


@pytest.mark.parametrize("name", DENSE)
def test_ten_runs_give_the_same_bits(name: str) -> None:
    spec = DENSE[name]
    masks = MASK_OF[spec.mask]
    q, k, v = make(spec, 4, 1501, 1777, 8)
    first, first_lse = rawattn.attention(q, k, v, **masks, return_lse=True)
    for _ in range(9):
        out, lse = rawattn.attention(q, k, v, **masks, return_lse=True)
        assert same_bits(out, first) and same_bits(lse, first_lse)


@pytest.mark.parametrize("rows_q, rows_k", [(1, 700), (77, 77), (700, 1000)])
@pytest.mark.parametrize("name", DENSE)
def test_a_sequence_does_not_depend_on_its_batch(name: str, rows_q: int, rows_k: int) -> None:
    spec = DENSE[name]
    masks = MASK_OF[spec.mask]
    q, k, v = make(spec, 1, rows_q, rows_k, 2)
    alone, alone_lse = rawattn.attention(q, k, v, **masks, return_lse=True)
    for batch, place in [(2, 1), (7, 3), (40, 39)]:
        many = make(spec, batch, rows_q, rows_k, 2)
        for x, one in zip(many, (q, k, v), strict=True):
            x[place] = one[0]
        out, lse = rawattn.attention(*many, **masks, return_lse=True)
        assert same_bits(out[place], alone[0]) and same_bits(lse[place], alone_lse[0]), f"place {place} of {batch}"


@pytest.mark.parametrize("name", [name for name in DENSE if DENSE[name].mask == "causal"])
def test_the_tile_that_a_row_falls_into_does_not_change_its_bits(name: str) -> None:
    """Which hidden keys are left out differs from tile to tile. All rows see more than FEW_KEYS, which goes by a warpgroup's first row."""
    q, k, v = make(DENSE[name], 1, 1300, 1600, 2)
    out, lse = rawattn.attention(q, k, v, causal=True, return_lse=True)
    for first in (1, 64, 100, 191, 300):  # the last has few enough rows for the tile of short sequences
        tail, tail_lse = rawattn.attention(q[:, first:], k, v, causal=True, return_lse=True)
        assert same_bits(tail, out[:, first:]) and same_bits(tail_lse, lse[..., first:]), first


@pytest.mark.parametrize("name", DENSE)
def test_strides_and_out_do_not_change_bits(name: str) -> None:
    spec = DENSE[name]
    masks = MASK_OF[spec.mask]
    q, k, v = make(spec, 2, 333, 333, 3)
    plain, plain_lse = rawattn.attention(q, k, v, **masks, return_lse=True)
    inputs = [packed_qkv(q, k, v)] + [tuple(strided(x, layout) for x in (q, k, v)) for layout in LAYOUTS]
    for arrays, layout in itertools.product(inputs, LAYOUTS):
        view, buffer = poisoned(plain.shape, spec.dtype, strides_of(layout, plain.shape))
        _, lse = rawattn.attention(*arrays, **masks, out=view, return_lse=True)
        assert same_bits(view, plain) and same_bits(lse, plain_lse), layout
        assert untouched_outside(view, buffer), layout


def test_return_lse_does_not_change_bits() -> None:
    q, k, v = make(DENSE["D 128"], 2, 100, 400, 2)
    assert same_bits(rawattn.attention(q, k, v), rawattn.attention(q, k, v, return_lse=True)[0])


# ---- sequences of different lengths


LENGTHS = {
    "mixed": ([1, 17, 128, 300, 333, 64], [5, 17, 200, 31, 1000, 64]),
    "no queries in some": ([0, 40, 0, 0, 130, 0], [7, 40, 300, 0, 200, 1]),
    "no keys in some": ([9, 40, 129, 1, 60, 5], [0, 40, 0, 0, 200, 0]),
    "all empty": ([0, 0, 0], [0, 0, 0]),
    "one sequence": ([700], [900]),
    "no sequence": ([], []),
    "two hundred of one": ([1] * 200, [1] * 200),
    "long and short": ([2000, 1, 1, 3, 1000], [2100, 1, 3000, 3, 10]),
}


def cu_seqlens(lengths: list[int]) -> Any:
    return cp.asarray(np.cumsum([0, *lengths]), np.int32)


def make_varlen(spec: KernelSpec, rows_q: int, rows_k: int, heads_k: int) -> tuple[Any, Any, Any]:
    """Packed q, k and v, with NaNs between heads, before the first row and after the last."""
    q, k, v = (strided(x, "padded")[0] for x in make(spec, 1, rows_q, rows_k, heads_k))
    return q, k, v


def sequences(lengths_q: list[int], lengths_k: list[int]) -> Iterator[tuple[slice, slice]]:
    ends_q, ends_k = np.cumsum([0, *lengths_q]).tolist(), np.cumsum([0, *lengths_k]).tolist()
    for b in range(len(lengths_q)):
        yield slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_equals_a_loop_over_the_sequences(name: str, lengths: str) -> None:
    spec = VARLEN[name]
    masks = MASK_OF[spec.mask]
    lengths_q, lengths_k = LENGTHS[lengths]
    spare = 37  # rows that belong to no sequence: NaN in the inputs, not written in the output
    q, k, v = make_varlen(spec, sum(lengths_q) + spare, sum(lengths_k) + spare, 2)
    for x in (q[sum(lengths_q) :], k[sum(lengths_k) :], v[sum(lengths_k) :]):
        poison(x)
    shape = (1, *q.shape[:-1], spec.head_dim_v)
    view, buffer = poisoned(shape, spec.dtype, strides_of("padded", shape))
    out, lse = rawattn.attention_varlen(q, k, v, cu_seqlens(lengths_q), cu_seqlens(lengths_k), **masks, out=view[0], return_lse=True)
    for rows_q, rows_k in sequences(lengths_q, lengths_k):
        one = q[None, rows_q], k[None, rows_k], v[None, rows_k]
        assert_right(out[None, rows_q], lse[None, :, rows_q], *one, masks)
        dense, dense_lse = rawattn.attention(*one, **masks, return_lse=True)
        if FEW_QUERIES * one[0].shape[1] <= one[1].shape[1]:  # attention() splits the keys, which attention_varlen() does not
            assert_right(dense, dense_lse, *one, masks)
        else:
            assert same_bits(out[None, rows_q], dense) and same_bits(lse[None, :, rows_q], dense_lse), (rows_q, rows_k)
    assert untouched_outside(out[: sum(lengths_q)], buffer), "rows of no sequence, or memory around out, were written"


@pytest.mark.parametrize("name", VARLEN)
def test_a_neighbours_nan_stays_with_it(name: str) -> None:
    spec = VARLEN[name]
    masks = MASK_OF[spec.mask]
    lengths_q, lengths_k = [50, 3, 200, 130, 9], [50, 61, 200, 300, 2]
    ends = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    clean = make_varlen(spec, sum(lengths_q), sum(lengths_k), 2)
    expected, expected_lse = rawattn.attention_varlen(*clean, *ends, **masks, return_lse=True)
    for rows_q, rows_k in sequences(lengths_q, lengths_k):
        q, k, v = (cp.empty(x.shape, x.dtype) for x in clean)
        for x, whole, rows in zip((q, k, v), clean, (rows_q, rows_k, rows_k), strict=True):
            poison(x)
            x[rows] = whole[rows]
        out, lse = rawattn.attention_varlen(q, k, v, *ends, **masks, return_lse=True)
        assert same_bits(out[rows_q], expected[rows_q]) and same_bits(lse[:, rows_q], expected_lse[:, rows_q]), (rows_q, rows_k)


# ---- frameworks


class Framework(NamedTuple):
    name: str
    send: Callable[[Any], Any]  # a CuPy array as one of the framework's over the same memory
    receive: Callable[[Any], Any]  # and back


@pytest.fixture(params=["cupy", "torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Framework:
    def received(x: Any) -> Any:
        cp.cuda.Device().synchronize()
        return cp.from_dlpack(x)

    def sender(from_dlpack: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def send(x: Any) -> Any:
            cp.cuda.Device().synchronize()
            return from_dlpack(x)

        return send

    if request.param == "torch":
        torch = torch_on_gpu()
        return Framework("torch", sender(torch.from_dlpack), received)
    if request.param == "jax":
        jax = jax_on_gpu()
        return Framework("jax", sender(jax.dlpack.from_dlpack), received)
    return Framework("cupy", lambda x: x, lambda x: x)


LLAMA = DENSE["D 128 causal"]  # LLaMA 3.1 8B: 32 query heads and 8 key/value heads of 128


@functools.cache
def llama(batch: int, rows: int) -> tuple[Any, ...]:
    q, k, v = make(LLAMA, batch, rows, rows, 8)
    return q, k, v, *reference.attention(q, k, v, causal=True, return_lse=True)


@pytest.mark.parametrize("rows", [17, 512, 4096])
@pytest.mark.parametrize("batch", [1, 2])
def test_llama(framework: Framework, batch: int, rows: int) -> None:
    q, k, v, expected, expected_lse = llama(batch, rows)
    inputs = [framework.send(x) for x in (q, k, v)]
    out, lse = rawattn.attention(*inputs, causal=True, return_lse=True)
    for x, dtype in ((out, "bfloat16"), (lse, "float32")):
        assert type(x) is type(inputs[0])
        assert x.device == inputs[0].device
        assert str(x.dtype).removeprefix("torch.") == dtype
    assert_close(framework.receive(out), expected)
    assert_lse_close(framework.receive(lse), expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frameworks_give_the_same_bits(framework: Framework, dtype: str) -> None:
    spec = KernelSpec(dtype, 64, 64, 1, "full")
    q, k, v = make(spec, 2, 100, 130, 3)
    plain, plain_lse = rawattn.attention(q, k, v, return_lse=True)
    out, lse = rawattn.attention(*(framework.send(x) for x in (q, k, v)), return_lse=True)
    assert same_bits(framework.receive(out), plain) and same_bits(framework.receive(lse), plain_lse)

    ends = cu_seqlens([60, 0, 140])
    q, k, v = (x.reshape(-1, 3, 64)[:200] for x in (q, k, v))
    plain = rawattn.attention_varlen(q, k, v, ends, ends)
    q, k, v, ends = (framework.send(x) for x in (q, k, v, ends))
    out = rawattn.attention_varlen(q, k, v, ends, ends)
    assert same_bits(framework.receive(out), plain)


def test_no_copy_on_the_way(framework: Framework) -> None:
    """A call takes memory for its results and for nothing else, and keeps nothing once they are gone."""
    q, k, v = make(DENSE["D 128"], 2, 2048, 2048, 8)
    inputs = [framework.send(x) for x in (q, k, v)]

    torch = torch_on_gpu() if framework.name == "torch" else None
    pool = cp.get_default_memory_pool()

    def held() -> int:
        return pool.used_bytes() + (torch.cuda.memory_allocated() if torch else 0)

    rawattn.attention(*inputs)
    gc.collect()  # of what tests before left
    before = held()
    if torch:
        torch.cuda.reset_peak_memory_stats()
    out = rawattn.attention(*inputs)
    assert held() - before <= q.nbytes + 1024
    if torch:
        assert torch.cuda.max_memory_allocated() + pool.used_bytes() - before <= q.nbytes + 1024
    cp.cuda.Device().synchronize()
    del out
    assert held() == before


def test_inputs_are_let_go() -> None:
    """What is kept from call to call must not hold the caller's arrays."""
    pool = cp.get_default_memory_pool()
    rawattn.attention(*make(DENSE["D 128"], 1, 777, 777, 8))
    before = pool.used_bytes()
    for rows in (778, 779, 780):
        rawattn.attention(*make(DENSE["D 128"], 1, rows, rows, 8))
    assert pool.used_bytes() <= before


# ---- streams


SPIN_CYCLES = 60_000_000  # some 35 ms, far longer than the host needs for the calls behind it


@functools.cache
def _spin_kernel() -> Any:
    return cp.RawKernel(
        'extern "C" __global__ void spin(long long n) { long long start = clock64(); while (clock64() - start < n) {} }', "spin"
    )


def spin() -> None:
    """Keep CuPy's current stream busy for a while."""
    _spin_kernel()((1,), (1,), (np.int64(SPIN_CYCLES),))


def test_cupy_stream() -> None:
    """Work goes to the current stream: it waits for the inputs that this stream is still making, and what follows there waits for it."""
    values = make(DENSE["D 128"], 2, 500, 700, 2)
    expected = reference.attention(*values)
    stream = cp.cuda.Stream(non_blocking=True)
    for _ in range(2):  # the second time, nothing is left to compile meanwhile
        inputs = [cp.empty_like(x) for x in values]
        for x in inputs:
            poison(x)
        cp.cuda.Device().synchronize()
        with stream:
            spin()
            for x, value in zip(inputs, values, strict=True):
                x[...] = value
            out = rawattn.attention(*inputs)
            result = out.copy()
            out[...] = 0
        stream.synchronize()
        assert_close(result, expected)


def test_torch_stream() -> None:
    torch = torch_on_gpu()
    values = make(DENSE["D 128"], 2, 500, 700, 2)
    expected = reference.attention(*values)
    cp.cuda.Device().synchronize()
    sources = [torch.from_dlpack(x) for x in values]
    stream = torch.cuda.Stream()
    for _ in range(2):
        inputs = [torch.full_like(x, math.nan) for x in sources]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN_CYCLES)
            for x, value in zip(inputs, sources, strict=True):
                x.copy_(value)
            out = rawattn.attention(*inputs)
            result = out.clone()
            out.zero_()
        stream.synchronize()
        assert_close(cp.from_dlpack(result), expected)


def test_jax_order() -> None:
    """JAX has streams of its own: the call waits for inputs that XLA is still making, and XLA waits for the call's result."""
    jax = jax_on_gpu()
    values = make(DENSE["D 128"], 2, 500, 700, 2)
    expected = reference.attention(*values)
    cp.cuda.Device().synchronize()
    sources = [jax.dlpack.from_dlpack(x) for x in values]

    @jax.jit
    def slowly(x: Any, matrix: Any) -> Any:
        for _ in range(20):
            matrix = matrix @ matrix
        return jax.numpy.where(jax.numpy.isnan(matrix.sum()), jax.numpy.nan, x).astype(x.dtype)

    negate = jax.jit(lambda x: -x)
    matrix = jax.numpy.eye(4096, dtype=jax.numpy.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    for current in (cp.cuda.Stream.null, stream):
        with current:
            inputs = [slowly(x, matrix) for x in sources]
            spin()
            negated = negate(rawattn.attention(*inputs))
            negated.block_until_ready()
        assert_close(cp.from_dlpack(negated), -expected)


def test_jax_inputs_may_be_let_go_at_once() -> None:
    """XLA may give a dead array's memory to its next computation, which does not wait for our stream: the call must keep it alive."""
    jax = jax_on_gpu()
    values = make(DENSE["D 128"], 2, 500, 700, 2)
    expected = reference.attention(*values)
    cp.cuda.Device().synchronize()
    sources = [jax.dlpack.from_dlpack(x) for x in values]
    with cp.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):
            inputs = jax.block_until_ready([jax.numpy.copy(x) for x in sources])
            spin()
            out = rawattn.attention(*inputs)
            del inputs
            garbage = [jax.numpy.full(x.shape, jax.numpy.nan, x.dtype) for x in sources for _ in range(4)]
            jax.block_until_ready(garbage)
            stream.synchronize()
            assert_close(cp.from_dlpack(out), expected)


# ---- CUDA graphs


REPLAYS = [
    ([100, 300, 1, 99], [100, 500, 150, 50]),
    ([500, 0, 0, 0], [800, 0, 0, 0]),
    ([0, 0, 0, 500], [0, 10, 0, 790]),
    ([3, 200, 100, 50], [700, 1, 0, 77]),
    ([0, 0, 0, 0], [0, 0, 0, 0]),
]


def check_varlen(q: Any, k: Any, v: Any, out: Any, lse: Any, lengths_q: list[int], lengths_k: list[int], masks: dict[str, Any]) -> None:
    for rows_q, rows_k in sequences(lengths_q, lengths_k):
        one = q[None, rows_q], k[None, rows_k], v[None, rows_k]
        assert_right(out[None, rows_q], lse[None, :, rows_q], *one, masks)


@pytest.mark.parametrize("name", ["D 128 causal", "D 64", "D 40/72 window"])
def test_cupy_graph_replays_with_new_lengths_and_data(name: str) -> None:
    spec = VARLEN[name]
    masks = MASK_OF[spec.mask]
    q, k, v = make_varlen(spec, 500, 800, 2)
    ends_q, ends_k = cu_seqlens(REPLAYS[0][0]), cu_seqlens(REPLAYS[0][1])
    stream = cp.cuda.Stream(non_blocking=True)
    rawattn.attention_varlen(q, k, v, ends_q, ends_k, **masks, return_lse=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        out, lse = rawattn.attention_varlen(q, k, v, ends_q, ends_k, **masks, return_lse=True)
        graph = stream.end_capture()
    for lengths_q, lengths_k in REPLAYS:
        ends_q[...], ends_k[...] = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
        for x in (q, k, v):
            x[...] = normal(x.shape, spec.dtype)
        poison(out)
        lse[...] = math.nan
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        check_varlen(q, k, v, out, lse, lengths_q, lengths_k, masks)


@pytest.mark.parametrize("name", DENSE)
def test_cupy_graph_replays_with_new_data(name: str) -> None:
    spec = DENSE[name]
    masks = MASK_OF[spec.mask]
    q, k, v = make(spec, 2, 300, 500, 2)
    out = cp.empty((*q.shape[:-1], spec.head_dim_v), q.dtype)
    stream = cp.cuda.Stream(non_blocking=True)
    rawattn.attention(q, k, v, **masks, out=out, return_lse=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        _, lse = rawattn.attention(q, k, v, **masks, out=out, return_lse=True)
        graph = stream.end_capture()
    for _ in range(3):
        for x in (q, k, v):
            x[...] = normal(x.shape, spec.dtype)
        poison(out)
        lse[...] = math.nan
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert_right(out, lse, q, k, v, masks)


def test_torch_graph_replays_with_new_lengths_and_data() -> None:
    torch = torch_on_gpu()
    q, k, v = make(DENSE["D 128"], 2, 300, 500, 2)
    packed = make_varlen(VARLEN["D 128 causal"], 500, 800, 2)
    ends_q, ends_k = cu_seqlens(REPLAYS[0][0]), cu_seqlens(REPLAYS[0][1])
    cp.cuda.Device().synchronize()
    dense_inputs = [torch.from_dlpack(x) for x in (q, k, v)]
    varlen_inputs = [torch.from_dlpack(x) for x in (*packed, ends_q, ends_k)]
    rawattn.attention(*dense_inputs)
    rawattn.attention_varlen(*varlen_inputs, causal=True, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rawattn.attention(*dense_inputs)
        varlen_out, varlen_lse = rawattn.attention_varlen(*varlen_inputs, causal=True, return_lse=True)
    for lengths_q, lengths_k in REPLAYS:
        ends_q[...], ends_k[...] = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
        for x in (q, k, v, *packed):
            x[...] = normal(x.shape, "bfloat16")
        cp.cuda.Device().synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert_close(cp.from_dlpack(out), reference.attention(q, k, v))
        check_varlen(*packed, cp.from_dlpack(varlen_out), cp.from_dlpack(varlen_lse), lengths_q, lengths_k, {"causal": True})


# ---- merge_states


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states_of_split_keys(dtype: str) -> None:
    spec = KernelSpec(dtype, 64, 64, 1, "full")
    q, k, v = make(spec, 2, 150, 1000, 4)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    pieces = [slice(0, 301), slice(301, 301), slice(301, 310), slice(310, 1000)]
    parts = [rawattn.attention(q, k[:, piece], v[:, piece], return_lse=True) for piece in pieces]
    out, lse = rawattn.merge_states(*zip(*parts, strict=True))
    assert out.dtype == q.dtype
    # Three roundings more: of each part, weighted, and of their sum.
    assert_close(out, expected, l2_factor=2.0)
    assert_lse_close(lse, expected_lse)
    neutral = cp.zeros_like(out), cp.full_like(lse, -math.inf)
    again, again_lse = rawattn.merge_states([out, neutral[0]], [lse, neutral[1]])
    assert same_bits(again, out) and same_bits(again_lse, lse)


# ---- errors


def _gpu_arrays() -> dict[str, Any]:
    q, k, v = make(DENSE["D 128"], 2, 33, 65, 2)
    return {"q": q, "k": k, "v": v}


def _float8(x: Any) -> Any:
    torch = torch_on_gpu()
    return torch.from_dlpack(x).to(torch.float8_e4m3fn)


def _requires_grad(x: Any) -> Any:
    return torch_on_gpu().from_dlpack(x).requires_grad_()


def _all_torch(arrays: dict[str, Any]) -> dict[str, Any]:
    torch = torch_on_gpu()
    return {name: torch.from_dlpack(x) for name, x in arrays.items()}


def _uneven_rows(x: Any) -> Any:
    shape = x.shape
    row = shape[2] * shape[3] + 4  # 8 bytes more than a multiple of 16
    return poisoned(shape, x.dtype.name, (shape[1] * row, row, shape[3], 1))[0]


def _off_by_one(x: Any) -> Any:
    return cp.empty(x.size + 8, x.dtype)[1 : x.size + 1].reshape(x.shape)


# name of the argument that the error must speak of, and what is wrong with it
WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "q is float32": ("q", lambda a: {**a, "q": a["q"].astype(np.float32)}),
    "all are float32": ("q", lambda a: {name: x.astype(np.float32) for name, x in a.items()}),
    "all are fp8": ("q", lambda a: {name: _float8(x) for name, x in a.items()}),
    "k is float16 beside bfloat16": ("k", lambda a: {**a, "k": a["k"].astype(np.float16)}),
    "k has another head_dim": ("k", lambda a: {**a, "k": cp.ascontiguousarray(a["k"][..., :64])}),
    "k has heads that do not divide q's": ("k", lambda a: {**a, "k": a["k"].repeat(3, 2)[:, :, :3], "v": a["v"].repeat(3, 2)[:, :, :3]}),
    "v has other heads than k": ("v", lambda a: {**a, "v": a["v"][:, :, :1]}),
    "v has other rows than k": ("v", lambda a: {**a, "v": a["v"][:, :-1]}),
    "k has another batch": ("k", lambda a: {**a, "k": a["k"][:1], "v": a["v"][:1]}),
    "q is 3-dimensional": ("q", lambda a: {**a, "q": a["q"][0]}),
    "head_dim is 12": ("q", lambda a: {name: cp.ascontiguousarray(x[..., :12]) for name, x in a.items()}),
    "head_dim is 264": ("q", lambda a: {name: x.repeat(3, 3)[..., :264].copy() for name, x in a.items()}),
    "q has a strided last axis": ("q", lambda a: {**a, "q": a["q"].repeat(2, 3)[..., ::2]}),
    "k has rows off 16 bytes": ("k", lambda a: {**a, "k": _uneven_rows(a["k"])}),
    "v starts off 16 bytes": ("v", lambda a: {**a, "v": _off_by_one(a["v"])}),
    "k is on the host": ("k", lambda a: {**a, "k": cp.asnumpy(a["k"])}),
    "k is a torch tensor": ("k", lambda a: {**a, "k": torch_on_gpu().from_dlpack(a["k"])}),
    "v is a CPU tensor": ("v", lambda a: {**_all_torch(a), "v": torch_on_gpu().from_dlpack(a["v"]).cpu()}),
    "q requires grad": ("q", lambda a: {**_all_torch(a), "q": _requires_grad(a["q"])}),
    "k is a list": ("k", lambda a: {**a, "k": [1.0]}),
    "out has another shape": ("out", lambda a: {**a, "out": cp.empty((2, 32, 8, 128), a["q"].dtype)}),
    "out has another dtype": ("out", lambda a: {**a, "out": cp.empty(a["q"].shape, np.float16)}),
    "out has a strided last axis": ("out", lambda a: {**a, "out": cp.empty((*a["q"].shape, 2), a["q"].dtype)[..., 0]}),
    "window is negative": ("window", lambda a: {**a, "window": (-2, 0)}),
    "window is one number": ("window", lambda a: {**a, "window": 5}),
    "window is of floats": ("window", lambda a: {**a, "window": (1.5, 2)}),
    "causal is unknown": ("causal", lambda a: {**a, "causal": "bottom"}),
    "scale is 0": ("scale", lambda a: {**a, "scale": 0.0}),
    "scale is NaN": ("scale", lambda a: {**a, "scale": math.nan}),
    "scale is infinite": ("scale", lambda a: {**a, "scale": math.inf}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_between_two_right_ones(wrong: str) -> None:
    argument, spoil = WRONG[wrong]
    arrays = _gpu_arrays()
    before = rawattn.attention(**arrays)
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        rawattn.attention(**spoil(arrays))
    cp.cuda.Device().synchronize()
    assert same_bits(rawattn.attention(**arrays), before)


WRONG_VARLEN: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "cu_seqlens_q is int64": ("cu_seqlens_q", lambda a: {**a, "cu_seqlens_q": a["cu_seqlens_q"].astype(np.int64)}),
    "cu_seqlens_k has another length": ("cu_seqlens_k", lambda a: {**a, "cu_seqlens_k": a["cu_seqlens_k"][:-1]}),
    "cu_seqlens_k is on the host": ("cu_seqlens_k", lambda a: {**a, "cu_seqlens_k": cp.asnumpy(a["cu_seqlens_k"])}),
    "cu_seqlens_q is 2-dimensional": ("cu_seqlens_q", lambda a: {**a, "cu_seqlens_q": a["cu_seqlens_q"][None]}),
    "q is 4-dimensional": ("q", lambda a: {**a, "q": a["q"][None]}),
    "out has the shape of q": ("out", lambda a: {**a, "out": cp.empty((1, *a["q"].shape), a["q"].dtype)}),
}


@pytest.mark.parametrize("wrong", WRONG_VARLEN)
def test_a_wrong_varlen_call_between_two_right_ones(wrong: str) -> None:
    argument, spoil = WRONG_VARLEN[wrong]
    q, k, v = (x[0] for x in make(DENSE["D 128"], 1, 40, 90, 2))
    arrays = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens([30, 10]), "cu_seqlens_k": cu_seqlens([50, 40])}
    before = rawattn.attention_varlen(**arrays)
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b"):
        rawattn.attention_varlen(**spoil(arrays))
    cp.cuda.Device().synchronize()
    assert same_bits(rawattn.attention_varlen(**arrays), before)


def test_jax_out_is_refused() -> None:
    jax = jax_on_gpu()
    q, k, v = (jax.dlpack.from_dlpack(x) for x in make(DENSE["D 128"], 1, 40, 90, 2))
    with pytest.raises((TypeError, ValueError), match=r"\bout\b"):
        rawattn.attention(q, k, v, out=jax.numpy.zeros_like(q))


# ---- documentation


def test_examples_of_the_readme_run() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    for example in examples:
        try:
            if "import torch" in example:
                torch_on_gpu()
            if "import jax" in example:
                jax_on_gpu()
        except pytest.skip.Exception:
            continue
        exec(compile(example, "README.md", "exec"), scope)
    assert len(examples) == 12
