"""The tile table: KernelSpec -> tile sizes, pipeline stages, warpgroups and their register budgets. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .spec import ROWS_OF_SPLIT_TILES, KernelSpec

SHARED_MEMORY_LIMIT = 232448  # bytes a block may use on Hopper
SLAB = 64  # columns of a 128-byte-swizzled slab of 16-bit elements
CONTROL_BYTES = 1024  # mbarriers and tile slots, at the start of shared memory
SHARED_MEMORY_OF_SM = 233472  # of which each CTA takes 1024 more than it asks for
SPLITS_OF_A_SEQUENCE = 128  # over all its tiles, at most: about the SMs of an H100, so that one long sequence fills it
MAX_SPLITS = 32  # of one tile, half as many unless a sequence has few tiles: the time of the combination grows with it
PORTABLE_CLUSTER, LARGEST_CLUSTER = 8, 16  # CTAs; beyond the first there are few places where all their SMs are near each other
BUSY_CTAS = 64  # load from memory at its full rate
FEW_BLOCKS = 32  # of keys: what a CTA loads in some 15 us, or 30 if they are of 64 KB
# K and V of the heads whose tiles are dealt together, as if each query head had its own, since their Q and output pass through L2 as well
# (50 MB on an H100): at least and at most, and in between for each key of a sequence.
GROUP_BYTES, GROUP_BYTES_OF_KEY = (8 << 20, 32 << 20), 16 << 10
FEW_KEYS = 128  # rows that see no more than this keep P in two parts; FEW_KEYS of the kernel


def slabs(dim: int) -> int:
    """Slabs of 64 columns that hold `dim` columns; TMA fills the rest of the last one with zeros."""
    return -(-dim // SLAB)


@dataclass(frozen=True)
class Tile:
    """The shape of one CTA's work: tile_m query rows against blocks of tile_n keys.

    Each consumer warpgroup owns 64 of the tile_m rows. Of few rows one owns up to 16, or two 16 each, or both all 64 and share the keys.
    K and V each have `stages` buffers of tile_n rows.
    """

    tile_m: int
    tile_n: int
    q_stages: int  # 2: the next tile's Q arrives while this one computes
    stages: int
    registers: tuple[int, int]  # setmaxnreg of the producer and of a consumer warpgroup; 0: what the compiler gave them
    ping_pong: bool  # consumer warpgroups take turns on the tensor cores, so that one's softmax hides under the other's MMA
    reason: str
    ctas_per_sm: int = 1
    few_rows: bool = False  # a tile of decoding: attention_decode.cu, where the MMAs' own 64 rows are keys, or attention_decode64.cu
    short: Tile | None = None  # instead, for sequences of up to SHORT_QUERIES queries that are not packed

    def __post_init__(self) -> None:
        # More than the CTA was launched with would make a warpgroup wait for registers for ever.
        launched = 65536 // (self.threads * self.ctas_per_sm) // 8 * 8
        producer, consumer = self.registers
        assert producer + self.consumer_warpgroups * consumer <= (1 + self.consumer_warpgroups) * launched, self

    @property
    def consumer_warpgroups(self) -> int:
        return (2 if self.tile_m > 16 else 1) if self.few_rows else self.tile_m // 64

    @property
    def shares_keys(self) -> bool:
        """Whether each consumer warpgroup has all rows, and its share of the keys."""
        return self.few_rows and self.tile_m == 64

    def most_splits(self, tiles: int) -> int:
        """Where keys are split: how many splits each of a sequence's `tiles` has at most."""
        return min(max(SPLITS_OF_A_SEQUENCE // tiles, self.fewest_splits), MAX_SPLITS if tiles < self.few_tiles else MAX_SPLITS // 2)

    @property
    def few_tiles(self) -> int:
        """Where keys are split: fewer tiles than these, in 16 splits each, would not load at the full rate of memory."""
        return BUSY_CTAS // (MAX_SPLITS // 2) if self.few_rows else 1

    @property
    def fewest_splits(self) -> int:
        """Splits of a tile at least, where rows with few keys keep P in two parts only in a split's, or a warpgroup's, last block."""
        if self.few_rows:
            return 2 if self.shares_keys else 1
        return max(1, FEW_KEYS // self.tile_n)

    @property
    def least_blocks(self) -> int:
        """Of few rows: blocks of a split at least, if four splits have so many: the combination takes time too."""
        return 4 if self.tile_m <= 16 or (self.tile_m, self.tile_n) == (32, 128) else 8

    def q_stages_of(self, spec: KernelSpec) -> int:
        """q_stages, but 1 in a cluster, which has one tile."""
        return 1 if spec.cluster else self.q_stages

    @property
    def threads(self) -> int:
        return 128 * (1 + self.consumer_warpgroups)

    def splits_of_cta(self, spec: KernelSpec, rows: int) -> int:
        """Splits of a tile of `rows` rows that each CTA of a cluster has at most: of these, it has room for the results."""
        unit = 2 if self.tile_m <= 8 else self.tile_m  # rows are kept in so many
        return min(4, self.results_of_cta(spec) * self.tile_m // (-(-rows // unit) * unit))

    def results_of_cta(self, spec: KernelSpec) -> int:
        """Results of whole tiles for which each CTA of a cluster has room: four, if that takes no stage and no CTA from an SM."""
        return 4 if self._bytes(spec, 4) <= SHARED_MEMORY_OF_SM // self.ctas_per_sm - 1024 else 2

    def shared_memory_bytes(self, spec: KernelSpec) -> int:
        return self._bytes(spec, self.results_of_cta(spec) if spec.cluster else 1)

    def _bytes(self, spec: KernelSpec, results: int) -> int:
        """Shared memory with so many results of whole tiles: where few rows have no cluster one, which is carried."""
        q = self.q_stages_of(spec) * self.tile_m * slabs(spec.head_dim)
        kv = self.stages * self.tile_n * (slabs(spec.head_dim) + slabs(spec.head_dim_v))
        if self.shares_keys:
            columns = -(-spec.head_dim_v // 32) * 32  # of the output: both warpgroups have as many units of 16
            floats = columns + 4 + results * columns  # of each row: what the warpgroups exchange, and their states; the results
            if spec.cluster:
                floats += 2 * results  # their states
        elif self.few_rows:
            q += 2 * self.tile_m * slabs(self.tile_n)  # P in two parts, which lie as Q does
            floats = 2 * 4 + results * SLAB * slabs(spec.head_dim_v)  # of each row: what four warps tell one another, twice; results
            if spec.cluster:
                floats += 2 * MAX_SPLITS + 4  # the states of all splits, and what they come to
        else:
            floats = spec.head_dim_v if spec.split_rows else 0  # the output of the splits so far
        return CONTROL_BYTES + 2 * SLAB * (q + kv) + 4 * self.tile_m * floats


_ALL = ("full", "causal", "window")

SHORT_QUERIES = 1024
# Of short sequences. A block has as many keys as in the tile of long ones, and the diagonal falls as it does there: the bits are the same.
_SHORT_64 = Tile(128, 128, 2, 4, (40, 232), True, "192 rows waste a third of their last tile, and a tile on the diagonal half of itself")
_SHORT_256 = Tile(128, 80, 1, 2, (40, 232), True, "in turns, which fill the ends of tiles; long sequences are 1 to 2% faster without")

# (largest head_dim, largest head_dim_v, masks, tile); the first row that holds the spec is used.
# Accumulators a consumer thread holds: scores tile_n/2, P tile_n/4, output head_dim_v/2, beside about 35 for the rest.
TABLE: tuple[tuple[int, int, tuple[str, ...], Tile], ...] = (
    (
        64,
        64,
        ("full", "window"),
        Tile(192, 128, 2, 2, (32, 160), True, "few MMAs a key: three warpgroups share each K/V load and hide each other's exp2"),
    ),
    (
        64,
        64,
        ("causal",),
        Tile(192, 128, 2, 4, (32, 160), True, "as full; warpgroups that may run ahead find more blocks loaded", short=_SHORT_64),
    ),
    (80, 80, _ALL, Tile(192, 112, 1, 3, (32, 160), True, "three warpgroups as for 64, with as many keys as their registers hold")),
    (96, 96, ("full", "window"), Tile(192, 112, 1, 3, (32, 160), True, "likewise; causal is 5% faster with the square tile of 128")),
    (112, 112, ("full", "window"), Tile(192, 96, 1, 3, (32, 160), True, "likewise")),
    (
        128,
        128,
        _ALL,
        Tile(128, 128, 2, 2, (40, 232), True, "square, so that the diagonal wastes half a block and no more; full is as fast as 128x176"),
    ),
    (192, 128, _ALL, Tile(128, 128, 1, 2, (40, 232), False, "two stages of 192 + 128 columns just fit in shared memory")),
    (192, 192, _ALL, Tile(128, 112, 1, 2, (40, 232), False, "two stages of 192 + 192 columns just fit in shared memory")),
    (
        256,
        256,
        ("full", "causal"),
        Tile(128, 80, 1, 2, (40, 232), False, "two stages of 256 + 256 columns just fit; the output takes 128 registers", short=_SHORT_256),
    ),
    (256, 256, ("window",), Tile(128, 64, 1, 2, (40, 232), False, "both bounds of a window take registers that a wider block would spill")),
)


def _few_rows(rows: int, tile_n: int, q_stages: int, stages: int, reason: str, ctas_per_sm: int = 1) -> Tile:
    return Tile(rows, tile_n, q_stages, stages, (0, 0), False, reason, ctas_per_sm, few_rows=True)


# Where keys are split: (largest head_dim, largest head_dim_v, tile); the first row with tile_m = split_rows that holds the spec is used.
# Memory is the limit, so the rows fit the few queries, and as many bytes of K and V as shared memory holds are on the way.
SPLIT_TABLE: tuple[tuple[int, int, Tile], ...] = (
    (64, 64, _few_rows(8, 128, 2, 3, "half the columns, twice the keys: a block is 32 KB as at head_dim 128", 2)),
    (64, 64, _few_rows(16, 128, 1, 2, "as for 8 rows", 2)),
    (64, 64, _few_rows(32, 128, 2, 5, "the registers of 32 rows leave room for one CTA")),
    (64, 64, _few_rows(64, 128, 2, 4, "rows fill the MMAs; two warpgroups share the keys")),
    (64, 64, Tile(128, 128, 1, 4, (56, 224), True, "a chunk of queries: as for 128")),
    (128, 128, _few_rows(8, 64, 2, 3, "small blocks, many even in a short sequence; one CTA computes, one loads", 2)),
    (128, 128, _few_rows(16, 64, 2, 2, "as for 8 rows", 2)),
    (128, 128, _few_rows(32, 128, 1, 2, "the registers of 32 rows leave room for one CTA; fewer, larger blocks")),
    (128, 128, _few_rows(64, 64, 1, 3, "as for 64 columns")),
    (128, 128, Tile(128, 128, 1, 2, (56, 224), True, "a chunk of queries is bound by the tensor cores, as prefill is")),
    *((192, 128, _few_rows(rows, 64, 1, 4, "as many stages as fit, in one CTA")) for rows in (8, 16, 32)),
    *((192, 192, _few_rows(rows, 64, 1, 3, "as many stages as fit, in one CTA")) for rows in (8, 16, 32)),
    *((256, 256, _few_rows(rows, 64, 1, stages, "as many stages as fit, in one CTA")) for rows, stages in ((8, 3), (16, 2), (32, 2))),
    (192, 128, Tile(64, 64, 2, 3, (0, 0), False, "P and the carried output of 64 rows leave too little room where rows are columns")),
    (192, 192, Tile(64, 64, 1, 3, (0, 0), False, "likewise")),
    (256, 256, Tile(64, 64, 1, 2, (0, 0), False, "likewise: two stages of 64 KB and the carried output just fit")),
)


def _alone(tile: Tile) -> Tile:
    """The tile of a CTA that has an SM to itself: three stages, since more are not faster."""
    return replace(tile, ctas_per_sm=1, stages=3, reason="an SM to itself: for nearly each SM one tile, or few CTAs that load")


def _in_cluster(tile: Tile, spec: KernelSpec) -> Tile:
    """The tile of a CTA of a cluster: with a stage less than three or more, if only that leaves room for the results of four splits."""
    smaller = replace(tile, stages=max(2, tile.stages - 1))
    return smaller if tile.results_of_cta(spec) < smaller.results_of_cta(spec) else tile


def is_short(spec: KernelSpec, rows_q: int) -> bool:
    """Whether sequences of `rows_q` queries have a tile of their own."""
    return rows_q <= SHORT_QUERIES and not spec.varlen and tile_for(spec).short is not None


def split_rows(head_dim: int, head_dim_v: int, gqa_ratio: int, kv_heads: int, rows_q: int | None) -> int:
    """KernelSpec.split_rows for sequences of `rows_q` queries, None if only the device knows; 0 where one has tiles enough without."""
    chunk = 128 if max(head_dim, head_dim_v) <= 128 else 64
    if rows_q is None:
        return chunk
    rows = rows_q * gqa_ratio
    if rows <= 64:
        return next(n for n in ROWS_OF_SPLIT_TILES if rows <= n)
    return chunk if 2 * -(-rows // chunk) * kv_heads <= SPLITS_OF_A_SEQUENCE else 0


def cache_spec(
    dtype: str, head_dim: int, head_dim_v: int, gqa_ratio: int, kv_heads: int, mask: str, rows_q: int | None, page_size: int = 0
) -> KernelSpec:
    """The variant that serves attention_with_kvcache; rows_q as for split_rows, page_size 0 where the cache does not lie in pages.

    >>> cache_spec("bfloat16", 128, 128, 4, 8, "causal", 1, page_size=16).name  # one query sees all keys
    'attn_fwd_bf16_d128_gqa4_full_varlen_split8_page16'
    """
    split = split_rows(head_dim, head_dim_v, gqa_ratio, kv_heads, rows_q)
    if split and rows_q == 1 and mask == "causal":
        mask = "full"  # the only query sees all keys
    spec = KernelSpec(dtype, head_dim, head_dim_v, gqa_ratio, mask, True, split)
    return replace(spec, page_rows=math.gcd(page_size, tile_for(spec).tile_n)) if page_size else spec


def splits_of_a_tile(tile: Tile, tiles: int, blocks: int) -> int:
    """Into how many splits the `blocks` of keys of a sequence are cut for each of its `tiles`, as Places of the kernel says."""
    most = tile.most_splits(tiles)
    if tile.few_rows:
        return max(1, min(most, max(min(blocks, 4), -(-blocks // tile.least_blocks))))
    return max(1, -(-blocks // max(1, -(-blocks // most))))


def tile_rows(spec: KernelSpec) -> int:
    """Rows of a tile that are used: those of whole queries."""
    return tile_for(spec).tile_m // spec.pack * spec.pack


def tiles_of_sequence(spec: KernelSpec, rows_q: int, heads: int) -> int:
    """Tiles of a sequence of `rows_q` queries with `heads` query heads."""
    return -(-rows_q * spec.pack // tile_rows(spec)) * (heads // spec.pack)


def cluster_sizes(spec: KernelSpec, rows: int, tiles: int, of_sequence: int, keys: int, multiprocessors: int) -> list[int]:
    """CTAs that the cluster of a tile of `rows` rows may have, the best number first; none where a list of all splits is better.

    That is so where a CTA would have more splits than it has room for, where the clusters of all `tiles` would not be on the GPU at once,
    and where one sequence much longer than the others would wait for its own few CTAs. Clusters grow beyond PORTABLE_CLUSTER only while
    fewer than BUSY_CTAS would load, and SMs have several CTAs only if those of a cluster find place together. A sequence has `keys` keys at
    most, so that the lengths, which only the device knows, have no say; of the tiles it has `of_sequence`.
    """
    tile = tile_for(spec)
    blocks = -(-keys // tile.tile_n)
    splits = splits_of_a_tile(tile, of_sequence, blocks)  # fewer keys have no more
    most, fewest = min(splits, PORTABLE_CLUSTER), max(1, -(-splits // tile.splits_of_cta(spec, rows)))
    size = max(1 << (most.bit_length() - 1), 1 << (fewest - 1).bit_length())
    while 2 * size <= min(splits, LARGEST_CLUSTER) and tiles * size < BUSY_CTAS and 2 * tiles * size <= multiprocessors:
        size *= 2
    if tile.ctas_per_sm == 1:
        fewest = max(fewest, 2)  # one CTA's results are stored in another way, which costs all others time
    sizes = []
    while size >= fewest:
        are_at_once = tiles * size <= multiprocessors * (tile.ctas_per_sm if size <= 2 else 1)
        if are_at_once and (of_sequence * size >= BUSY_CTAS or -(-splits // size) * -(-blocks // splits) <= FEW_BLOCKS):
            sizes.append(size)
        size //= 2
    return sizes


def is_alone(spec: KernelSpec, tiles: int, multiprocessors: int) -> bool:
    """Whether each CTA should have an SM to itself: where nearly each SM then has a tile, which need not be cut if all are equal.

    To take the results of a cut tile together costs 3 to 8 us, at the end of all CTAs, when nothing is loaded any more.
    """
    return tile_for(spec).ctas_per_sm > 1 and 7 * multiprocessors < 8 * tiles <= 8 * multiprocessors


def launch_variant(
    spec: KernelSpec, batch: int, rows_q: int, heads: int, keys: int, multiprocessors: int,
    are_at_once: Callable[[KernelSpec, int, int], bool] = lambda spec, tiles, size: True,
) -> tuple[KernelSpec, int]:  # fmt: skip
    """The one of launch_variants(spec) that a launch takes for sequences of `rows_q` queries and up to `keys` keys, and its clusters' size.

    `are_at_once` says whether the GPU holds as many clusters of so many CTAs as there are tiles.
    """
    tile = tile_for(spec)
    if not tile.few_rows:
        return spec, 0
    of_sequence = tiles_of_sequence(spec, rows_q, heads)
    tiles, rows = batch * of_sequence, rows_q * spec.pack
    assert rows <= tile_rows(spec), spec  # cluster.cuh: a KV head of few rows has one tile
    in_cluster = replace(spec, cluster=True)
    for size in cluster_sizes(in_cluster, rows, tiles, of_sequence, keys, multiprocessors):
        variant = replace(in_cluster, alone=tile.ctas_per_sm > 1 and size > 1 and tiles * size <= min(BUSY_CTAS, multiprocessors))
        if are_at_once(variant, tiles, size):
            return variant, size
    return replace(spec, alone=is_alone(spec, tiles, multiprocessors)), 0


def launch_variants(spec: KernelSpec) -> tuple[KernelSpec, ...]:
    """`spec`, and what a launch may take instead: clusters, CTAs that have an SM to themselves, or clusters of such."""
    tile, variants = tile_for(spec), [spec]
    if tile.few_rows:
        variants.append(replace(spec, cluster=True))
    if tile.ctas_per_sm > 1:
        variants += [replace(spec, alone=True), replace(spec, cluster=True, alone=True)]
    return tuple(dict.fromkeys(variants))


def grid(spec: KernelSpec, batch: int, tiles: int, multiprocessors: int) -> int:
    """CTAs of a launch of `tiles` tiles of `batch` sequences."""
    if not spec.split_rows:
        return min(multiprocessors, tiles)
    if spec.alone:
        return tiles
    if batch * SPLITS_OF_A_SEQUENCE > multiprocessors:
        multiprocessors *= tile_for(spec).ctas_per_sm  # fewer splits are better spread over as many SMs
    return min(multiprocessors, tiles * MAX_SPLITS)


def lists_of_splits(spec: KernelSpec, heads: int, tiles: int, ctas: int) -> int:
    """How many lists there are of the splits of `heads`: one, or one for each head, with its part of the CTAs.

    Then the rows that heads have of one key, neighbours in memory, are read at one time though a CTA has several of the `tiles` to read.
    Where it has no more than one they are so anyway; and chunks are not limited by memory.
    """
    return heads if tile_for(spec).few_rows and tiles > ctas and ctas % heads == 0 else 1


def heads_per_group(spec: KernelSpec, batch: int, kv_heads: int, keys: int) -> int:
    """Query heads whose tiles are dealt together where keys are not split, of `batch` sequences of `keys` keys with `kv_heads` KV heads.

    Equal tiles of one head run side by side. With a diagonal, the longest tiles of as many heads as L2 holds come first. A group has whole
    sequences or an equal part of one, since the heads of a row are neighbours in memory, and groups are equal, since a smaller last one
    would not fill the GPU; where nothing divides so, they are nearly equal.
    """
    if spec.mask != "causal":
        return 1
    least, most = GROUP_BYTES
    size = min(max(GROUP_BYTES_OF_KEY * keys, least), most)
    total = batch * kv_heads
    heads = min(max(1, size // (2 * spec.gqa_ratio * keys * (spec.head_dim + spec.head_dim_v))), total)
    step, whole = (kv_heads, total) if heads >= kv_heads else (1, kv_heads)
    for n in range(heads - heads % step, (heads - 1) // 2, -step):
        if whole % n == 0:
            return n * spec.gqa_ratio
    return -(-total // -(-total // heads)) * spec.gqa_ratio


def tile_for(spec: KernelSpec) -> Tile:
    """The row of the table that serves `spec`, or its _alone or _in_cluster.

    It depends on the spec alone, and its blocks not on how a launch shares them out, so a row's bits cannot depend on its batch.
    """
    if spec.split_rows:
        for head_dim, head_dim_v, tile in SPLIT_TABLE:
            if spec.head_dim <= head_dim and spec.head_dim_v <= head_dim_v and spec.split_rows == tile.tile_m:
                return _alone(tile) if spec.alone else _in_cluster(tile, spec) if spec.cluster else tile
    for head_dim, head_dim_v, masks, tile in TABLE:
        if spec.head_dim <= head_dim and spec.head_dim_v <= head_dim_v and spec.mask in masks:
            return tile.short or tile if spec.short else tile
    raise AssertionError(f"no tile for {spec}")  # the last row holds every legal spec
