// What attention_forward.cu and attention_decode.cu share: their arguments, the list of tiles that a CTA works through, where results go, and the
// producer warp, which feeds Q, K and V through TMA into a ring of shared-memory stages.
#pragma once
#include "ptx.cuh"
#include "append.cuh"
#include "scheduler.cuh"
#include "mask.cuh"
#include "softmax.cuh"

struct Arguments {
    TensorMap q;              // boxes of [TILE_M, 64] of [B, Sq, Hq, D] or [Tq, Hq, D]; SPLIT: of [TILE_M / PACK, PACK, 64] of [B, Sq, Hq / PACK, PACK, D]
    TensorMap k;              // boxes of [TILE_N, 64] of [B, Sk, Hkv, D], [Tk, Hkv, D] or a cache; PAGE_ROWS: of [PAGE_ROWS, 64] of [N, page_size, Hkv, D]
    TensorMap v;              // likewise of Dv columns
    char* out;                // [B, Sq, Hq, Dv] or [Tq, Hq, Dv], 16-bit elements
    float* lse;               // [B, Hq, Sq] or [Hq, Tq], or null
    int* next_tile;           // [1], zero before and after a launch: tiles that CTAs have asked for beyond their first
    const int* cu_seqlens_q;  // [B + 1], or null where all have seqlen_q rows
    const int* cu_seqlens_k;  // [B + 1], or null
    const int* cache_seqlens;    // [B], or null
    const int* cache_batch_idx;  // [B], the row of the cache that a sequence has; or null
    const int* cache_leftpad;    // [B], keys at the start of that row that nobody sees; or null
    const int* page_table;       // [B, max_pages]
    int* arrivals;               // [CTAs, CONSUMER_WARPGROUPS], zero before and after a launch: splits of a tile that have arrived in `partial`
    float* partial_out;          // [CTAs, most_splits, partial_rows, Dv]: of splits, not yet divided by the sum
    float2* partial_state;       // [CTAs, most_splits, partial_rows, 4]: their maximum and sum
    long long out_batch_stride, out_row_stride, out_head_stride;  // bytes; where sequences are packed, the batch strides are 0
    long long lse_batch_stride;                                   // elements
    long long page_table_stride;                                  // elements
    int batch, heads;                                             // B; Hq, or Hq / PACK
    int seqlen_q, seqlen_k;                                       // Sq, Sk, or the totals Tq, Tk; for a cache, the keys that it holds at most
    int new_keys;                                                 // keys that each sequence has beyond cache_seqlens; -1: as many as it has queries
    int left, right;                                              // window around the diagonal
    int bottom_right;                                             // the diagonal ends at the last key (1) or starts at the first (0)
    int heads_per_group;                                          // heads whose K and V share L2; SPLIT: that have a list of their own
    int page_size;
    int partial_rows, most_splits;  // what is kept of a tile: rows of a split, and splits; FEW_ROWS: as many as a long sequence's tiles have
    float scale_log2;                                             // softmax scale * log2(e)
    int loads_ahead;                                              // CLUSTER: whether the first keys and Q are loaded before the length is known (1) or not (0)
    Append append;                                                // FEW_ROWS
};

constexpr int SLAB_BYTES = 128;  // a row of a slab: 64 columns of 16 bits, one period of the 128-byte swizzle
constexpr int SLABS_QK = (HEAD_DIM + 63) / 64, SLABS_V = (HEAD_DIM_V + 63) / 64;
constexpr int Q_SLAB = TILE_M * SLAB_BYTES, KV_SLAB = TILE_N * SLAB_BYTES;
constexpr int TILE_ROWS = TILE_M / PACK * PACK;  // rows of a tile: PACK heads of whole queries
constexpr int Q_BYTES = SLABS_QK * Q_SLAB, K_BYTES = SLABS_QK * KV_SLAB, V_BYTES = SLABS_V * KV_SLAB;
constexpr int CTA_WARPS = 4 * (1 + CONSUMER_WARPGROUPS);
constexpr int TILE_SLOTS = CLUSTER ? 1 : 4;  // tiles that a CTA has in hand: those that it finishes, computes and loads, rounded up to a cheap modulus
constexpr int BLOCK_WARPS = 4 * (SHARES_KEYS ? 1 : CONSUMER_WARPGROUPS);  // that use a block of keys
constexpr int APPENDING_WARPS = 3;  // FEW_ROWS: those beside the producer
constexpr int RELEASING_LANES = FEW_ROWS ? 32 : 1;  // of each warp that has read a tile: that __syncwarp() orders their reads, racecheck does not know
constexpr int CONSUMER_WARPS = 4 * CONSUMER_WARPGROUPS, CONSUMER_THREADS = 128 * CONSUMER_WARPGROUPS;
constexpr int WARPGROUP_ROWS = SHARES_KEYS ? TILE_M : TILE_M / CONSUMER_WARPGROUPS;  // each warpgroup has its own, or all of the rows for its share of the keys
constexpr bool MAY_BE_PACKED = !FEW_ROWS;  // few rows are those of the few queries that the host knows each sequence to have
constexpr int FEW_KEYS = 128;  // rows that see no more than this keep P in two parts

// Byte offsets of the mbarriers in shared memory, one full and, EMPTY later, one empty for each buffer; CLUSTER: and two of what its CTAs send each
// other, and one of new keys.
constexpr int K_FULL = 0, V_FULL = K_FULL + 8 * STAGES, Q_FULL = V_FULL + 8 * STAGES, STATES_FULL = Q_FULL + 8 * Q_STAGES, RESULTS_FULL = STATES_FULL + 8;
constexpr int APPENDED = RESULTS_FULL + 8, TILE_FULL = APPENDED + 8, EMPTY = TILE_FULL + 8 * TILE_SLOTS;
constexpr int SECOND = 2 * EMPTY, BARRIER_BYTES = (SHARES_KEYS ? 3 : 2) * EMPTY;  // SHARES_KEYS: the full ones of K and V are the first warpgroup's, SECOND later the second's
constexpr int K_EMPTY = K_FULL + EMPTY, V_EMPTY = V_FULL + EMPTY, Q_EMPTY = Q_FULL + EMPTY, TILE_EMPTY = TILE_FULL + EMPTY;

// Position in a ring of buffers. A consumer waits for phase(), the producer for the opposite one, so that its first lap passes at once.
template <int BUFFERS>
struct Ring {
    uint32_t count = 0;
    __device__ __forceinline__ uint32_t stage() const { return count % BUFFERS; }
    __device__ __forceinline__ uint32_t phase() const { return count / BUFFERS & 1; }
};

// One output tile: TILE_ROWS rows of one head, or of the PACK heads of a KV head, of one sequence. Where rows beyond a sequence's end may be a
// neighbour's, or memory that nobody wrote, the maps' row dimension ends at the last row of the tensor and the offset dimension slides it, so that
// row `rows - length + i` at offset `start + length` is row i of the sequence and everything past its end is out of bounds: TMA fills zeros.
struct WorkTile {
    int first_row, head, batch;  // first_row < 0: there is no tile left; a row is PACK * query + head of the pack
    int q_start, q_length;       // in queries
    int q_row, q_offset, q_batch;
    int k_length, k_row, k_offset, k_batch;
    int first_block, rest_block, end_block;  // SPLIT: the blocks of keys of this split; FEW_ROWS: one, and the rest of them. Then
    int split, splits;           // its number, and how many the tile has
    int run_begin, run_end;      // those of them that are in this CTA's share
    int first_splits;            // those in the share of the CTA that has the first one
    int slot;                    // that CTA, in whose part of the workspace they meet
};

template <bool, class First, class>
struct Either {
    using type = First;
};

template <class First, class Second>
struct Either<false, First, Second> {
    using type = Second;
};

struct Sequence {
    int q_start, q_length, k_start, k_length, k_batch;
};

// cache_seqlens of a sequence, where there are any.
__device__ __forceinline__ int cached_keys(const Arguments& args, int batch) { return args.cache_seqlens != nullptr ? args.cache_seqlens[batch] : 0; }

__device__ __forceinline__ Sequence sequence(const Arguments& args, int batch, int cached_keys) {
    Sequence seq = {0, args.seqlen_q, 0, args.seqlen_k, batch};
    if (MAY_BE_PACKED && args.cu_seqlens_q != nullptr) {
        seq.q_start = args.cu_seqlens_q[batch];
        seq.q_length = max(0, args.cu_seqlens_q[batch + 1] - seq.q_start);
    }
    if (MAY_BE_PACKED && args.cu_seqlens_k != nullptr) {
        seq.k_start = args.cu_seqlens_k[batch];
        seq.k_length = max(0, args.cu_seqlens_k[batch + 1] - seq.k_start);
        seq.k_batch = 0;
    } else if (args.cache_seqlens != nullptr) {
        seq.k_start = args.cache_leftpad != nullptr ? max(0, args.cache_leftpad[batch]) : 0;
        const int end = cached_keys + (args.new_keys < 0 ? seq.q_length : args.new_keys);
        seq.k_length = max(0, min(end, args.seqlen_k) - seq.k_start);
        if (args.cache_batch_idx != nullptr) seq.k_batch = args.cache_batch_idx[batch];
    }
    return seq;
}

__device__ __forceinline__ Mask sequence_mask(const Arguments& args, int q_length, int k_length) {
    return {k_length, args.bottom_right ? k_length - q_length : 0, args.left, args.right};
}

// Everything of a tile but its splits.
__device__ __forceinline__ void write_tile(const Arguments& args, const Sequence& seq, int batch, int m_block, int head, WorkTile& tile) {
    tile.first_row = m_block * TILE_ROWS;
    tile.head = head;
    tile.batch = batch;
    tile.q_start = seq.q_start;
    tile.q_length = seq.q_length;
    tile.q_batch = MAY_BE_PACKED && args.cu_seqlens_q != nullptr ? 0 : batch;
    if constexpr (SPLIT) {
        tile.q_row = 0;
        tile.q_offset = seq.q_start + m_block * (TILE_ROWS / PACK);
    } else {
        const bool slides = args.cu_seqlens_q != nullptr;
        tile.q_row = tile.first_row + (slides ? args.seqlen_q - seq.q_length : 0);
        tile.q_offset = slides ? seq.q_start + seq.q_length : 0;
    }
    tile.k_length = seq.k_length;
    tile.k_row = args.seqlen_k - seq.k_length;
    tile.k_offset = seq.k_start + seq.k_length;
    tile.k_batch = seq.k_batch;
}

// SPLIT: what one sequence adds to the list of all splits; without, to that of all tiles.
__device__ __forceinline__ Places sequence_places(const Arguments& args, const Sequence& seq) {
    const int rows = seq.q_length * PACK;
    Places places = {(rows + TILE_ROWS - 1) / TILE_ROWS, SPLIT ? args.heads_per_group : args.heads};
    if constexpr (SPLIT) {
        if (rows > 0) {
            const KeyBlocks blocks = key_blocks(sequence_mask(args, seq.q_length, seq.k_length), 0, rows - 1, 0, rows - 1);
            if constexpr (FEW_ROWS)
                places.deal(blocks.begin, blocks.end, args.most_splits, LEAST_BLOCKS);
            else
                places.split(blocks.begin, blocks.end, places.m_blocks * args.heads, FEWEST_SPLITS);
        }
    }
    return places;
}

// Of split `tile.split`. Where few rows meet many keys, the first blocks of the sequence are dealt to the splits one by one, and only the rest in runs: so
// it needs no length to know where a split begins (start_loads of cluster.cuh).
__device__ __forceinline__ void write_blocks(const Places& places, WorkTile& tile) {
    tile.splits = places.splits;
    if constexpr (FEW_ROWS) {
        const int rest = places.blocks - 1;
        tile.first_block = places.first_block + tile.split;
        tile.rest_block = places.first_block + places.splits + tile.split * rest;
        tile.end_block = tile.rest_block + rest;
    } else {
        tile.first_block = places.first_block + tile.split * places.blocks;
        tile.end_block = tile.first_block + places.blocks;
    }
}

// Writes the split after `last`, of the same tile. The whole warp calls it.
__device__ __forceinline__ void write_next_split(const WorkTile& last, WorkTile& tile) {
    constexpr int WORDS = sizeof(WorkTile) / 4;
    const int lane = threadIdx.x % 32;
    if (lane < WORDS) reinterpret_cast<int*>(&tile)[lane] = reinterpret_cast<const int*>(&last)[lane];
    __syncwarp();
    if (lane == 0) {
        tile.split = last.split + 1;
        tile.first_block = FEW_ROWS ? last.first_block + 1 : last.end_block;
        tile.rest_block = last.end_block;
        tile.end_block = 2 * last.end_block - (FEW_ROWS ? last.rest_block : last.first_block);
    }
}

// The list of all tiles of a call, which a whole warp reads in rising order. A place in it is a tile's number or, where keys are split, the cost
// of all splits before. Then each CTA has the splits that start in its share of the total cost, so that it meets those of one tile one after the other;
// and every gridDim.x-th head has such a list and gridDim.y CTAs for it, so that the rows of neighbouring heads, which lie side by side, are read at one time.
struct TileList {
    int first_batch = -1, next_batch = 0;  // lengths on the device: the 32 sequences that the warp has looked at, one a lane, and those that it wants
    int before = 0;                        // the places of all earlier ones
    Sequence seq;                          // the lane's
    Places own;
    int through;                           // the places of all lanes up to it
    int share, share_start, share_end;  // SPLIT: the places of a CTA, and where its own are
    int remaining = 0, cost;            // splits of the last tile found that the share still has, and the places that each takes

    // SPLIT: every warp of the CTA reads a part of the lengths, warp after warp, and leaves the places of that part. All warps call it.
    __device__ __forceinline__ void prepare(const Arguments& args, int* parts, int warp) {
        if constexpr (SPLIT) {
            const int begin = warp * part_length(args), end = min(args.batch, begin + part_length(args));
            int total = 0;
            for (int batch = begin; batch < end; batch += 32) total += look(args, batch);
            if (threadIdx.x % 32 == 0) parts[warp] = total;
            if (warp == 2 || warp == 3) prefetch_global(args.arrivals + 8 * (threadIdx.x - 64));  // whoever arrives last waits for the answer
        }
    }

    // Returns where the CTA's part of the list starts. Warp 0 calls it, once all have prepared.
    __device__ __forceinline__ int begin(const Arguments& args, const int* parts) {
        if constexpr (!SPLIT) return blockIdx.x;
        const int lane = threadIdx.x % 32, part = lane < CTA_WARPS ? parts[lane] : 0, up_to = inclusive_scan(part), total = __shfl_sync(~0u, up_to, 31);
        share = divide_up(total, gridDim.y);
        // Where all tiles are equal, shares end where these do, or at equal parts of them, if they become little longer: then few CTAs or none wait for
        // another's splits, and all heads of a sequence are read at the same pace, as they lie in memory.
        const int of_sequence = __shfl_sync(~0u, own.count(), 0), cost = __shfl_sync(~0u, own.cost, 0);
        if (of_sequence * args.batch == total) {
            for (int splits = __shfl_sync(~0u, own.splits, 0);; splits /= 2) {
                const int unit = splits * cost, rounded = divide_up(share, unit) * unit;
                if (rounded - share <= share / 16) {
                    share = rounded;
                    break;
                }
                if (splits % 2 != 0) break;
            }
        }
        share_start = min(total, int(blockIdx.y) * share);
        share_end = min(total, share_start + share);
        const uint32_t beyond = __ballot_sync(~0u, up_to > share_start);
        const int first_part = beyond != 0 ? __ffs(beyond) - 1 : 0;
        before = __shfl_sync(~0u, up_to - part, first_part);
        next_batch = first_part * part_length(args);
        return share_start;
    }

    static __device__ __forceinline__ int part_length(const Arguments& args) { return (args.batch + 32 * CTA_WARPS - 1) / (32 * CTA_WARPS) * 32; }

    static __device__ __forceinline__ int inclusive_scan(int value) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int below = __shfl_up_sync(~0u, value, distance);
            if (threadIdx.x % 32 >= distance) value += below;
        }
        return value;
    }

    // Writes the tile or split at or after `place` and returns the place after it. Once there is none, `before` is the length of the list.
    // `last` is what was written the time before.
    __device__ __forceinline__ int find(const Arguments& args, int place, const WorkTile& last, WorkTile& tile) {
        const int lane = threadIdx.x % 32;
        if constexpr (!VARLEN) {
            const int m_blocks = (args.seqlen_q + TILE_M - 1) / TILE_M, heads = args.heads * args.batch;
            before = m_blocks * heads;
            const TilePlace at = tile_place(min(place, before - 1), m_blocks, heads, args.heads_per_group);
            const int batch = at.head / args.heads, first_row = place < before ? at.m_block * TILE_M : -1;
            if (lane == 0) tile = {first_row, at.head - batch * args.heads, batch, 0, args.seqlen_q, first_row, 0, batch, args.seqlen_k, 0, 0, batch};
        } else {
            if (SPLIT && place >= share_end) {
                if (lane == 0) tile.first_row = -1;
                return place;
            }
            if (SPLIT && remaining > 0) {  // the same tile goes on, as most do
                --remaining;
                write_next_split(last, tile);
                return place + cost;
            }
            for (; next_batch < args.batch; next_batch += 32) {
                if (!SPLIT || next_batch != first_batch) look(args, next_batch);  // without SPLIT each time, since it would take registers to keep
                const int start = before + through - own.count(), item = own.at_or_after(place - start);  // a place may lie inside a split that another CTA has
                const uint32_t here = __ballot_sync(~0u, item < own.items());
                if (here != 0) {
                    const int owner = __ffs(here) - 1, item_start = start + item * own.cost;
                    if (lane == owner) {
                        if (!SPLIT || item_start < share_end)
                            write(args, item, start, tile);
                        else
                            tile.first_row = -1;
                    }
                    if constexpr (SPLIT) remaining = __shfl_sync(~0u, remaining, owner);
                    cost = __shfl_sync(~0u, own.cost, owner);
                    return __shfl_sync(~0u, item_start, owner) + cost;
                }
                before += __shfl_sync(~0u, through, 31);
            }
            if (lane == 0) tile.first_row = -1;
        }
        return place;
    }

    // Returns the places of the 32 sequences from `first` on.
    __device__ __forceinline__ int look(const Arguments& args, int first) {
        const int batch = first + threadIdx.x % 32;
        first_batch = first;
        seq = batch < args.batch ? sequence(args, batch, cached_keys(args, batch)) : Sequence{};
        own = sequence_places(args, seq);
        through = inclusive_scan(own.count());
        return __shfl_sync(~0u, through, 31);
    }

    __device__ __forceinline__ void write(const Arguments& args, int item, int start, WorkTile& tile) {
        const int number = divide(item, own.splits), m_block = divide(number, own.heads), head_of_list = number - m_block * own.heads;
        write_tile(args, seq, first_batch + threadIdx.x % 32, own.m_blocks - 1 - m_block, SPLIT ? head_of_list * gridDim.x + blockIdx.x : head_of_list, tile);
        if constexpr (SPLIT) {
            tile.split = item - number * own.splits;
            write_blocks(own, tile);
            const int tile_start = start + number * own.splits * own.cost;
            tile.run_begin = own.at_or_after(share_start - tile_start);
            tile.run_end = min(own.splits, own.at_or_after(share_end - tile_start));
            remaining = tile.run_end - tile.split - 1;
            tile.slot = blockIdx.y;
            tile.first_splits = tile.run_end;
            if (tile.run_begin > 0) {
                tile.slot = divide(tile_start, share);
                tile.first_splits = own.at_or_after((tile.slot + 1) * share - tile_start);
            }
            tile.slot = tile.slot * gridDim.x + blockIdx.x;
        }
    }
};

// Of the TILE_ROWS of a tile, how many its sequence has.
__device__ __forceinline__ int existing_rows(const WorkTile& tile) { return min(TILE_ROWS, tile.q_length * PACK - tile.first_row); }

__device__ __forceinline__ Mask tile_mask(const Arguments& args, const WorkTile& tile) {
    return sequence_mask(args, tile.q_length, tile.k_length);
}

// The blocks of keys of a tile, or of its split, with those that the warpgroup of the rows from own_first on sees whole. FEW_ROWS: of a split block
// `begin` and, if that is before `end`, those from `rest` on.
__device__ __forceinline__ KeyBlocks tile_blocks(const Arguments& args, const WorkTile& tile, int own_first) {
    const int last_row = min(tile.first_row + TILE_ROWS, tile.q_length * PACK) - 1;
    KeyBlocks blocks = key_blocks(tile_mask(args, tile), tile.first_row, last_row, own_first, own_first + WARPGROUP_ROWS - 1);
    if constexpr (FEW_ROWS) {
        const bool sees_first = blocks.begin <= tile.first_block && tile.first_block < blocks.end;
        const int rest = max(blocks.begin, tile.rest_block);
        blocks.begin = sees_first ? tile.first_block : rest;
        blocks.rest = sees_first ? rest : rest + 1;
        blocks.end = min(blocks.end, tile.end_block);
    } else if constexpr (SPLIT) {
        blocks.begin = max(blocks.begin, tile.first_block);
        blocks.end = min(blocks.end, tile.end_block);
    }
    return blocks;
}

// FEW_ROWS: whether append_new_keys() writes no key of the block.
__device__ __forceinline__ bool is_old(const Arguments& args, const WorkTile& tile, int block) { return (block + 1) * TILE_N <= tile.k_length - args.new_keys; }

// FEW_ROWS: whether a block that is not old is among those of the split; where there are no keys at all, the first split has it.
__device__ __forceinline__ bool has_new_keys(const Arguments& args, const WorkTile& tile) {
    const int first = max(0, tile.k_length - args.new_keys) / TILE_N, end = max(1, (tile.k_length + TILE_N - 1) / TILE_N);
    return tile.first_block >= first || max(tile.rest_block, first) < min(tile.end_block, end);
}

// Where row `tile_row` of a tile goes: null if the sequence has no such row, or if nobody asked for the LSE.
struct Destination {
    char* out;
    float* lse;
};

__device__ __forceinline__ Destination destination(const Arguments& args, const WorkTile& tile, int tile_row) {
    const int row = tile.first_row + tile_row, query = row / PACK, packed_query = tile.q_start + query, head = tile.head * PACK + row % PACK;
    if (tile_row >= TILE_ROWS || query >= tile.q_length) return {nullptr, nullptr};
    char* out = args.out + tile.batch * args.out_batch_stride + packed_query * args.out_row_stride + head * args.out_head_stride;
    float* lse = args.lse + tile.batch * args.lse_batch_stride + (long long)head * args.seqlen_q + packed_query;
    return {out, args.lse ? lse : nullptr};
}

// Where the results of one split of a tile are kept for the CTA that combines them, from row `tile_row` on.
struct Partial {
    float* out;     // [rows, Dv]
    float2* state;  // [rows, 4]: maximum and sum, once for each lane of the row, so that a whole sector is written and none has to be read first
};

__device__ __forceinline__ Partial partial(const Arguments& args, const WorkTile& tile, int split, int tile_row) {
    const long long row = ((long long)tile.slot * args.most_splits + split) * args.partial_rows + tile_row;
    return {args.partial_out + row * HEAD_DIM_V, args.partial_state + 4 * row};
}

// A tile whose rows see no key: output 0, LSE -inf. One warp writes it.
__device__ __forceinline__ void store_empty(const Arguments& args, const WorkTile& tile) {
    const uint32_t zeros[4] = {};
#pragma unroll 1
    for (int tile_row = threadIdx.x % 32; tile_row < TILE_ROWS; tile_row += 32) {
        const Destination to = destination(args, tile, tile_row);
        if (to.out == nullptr) break;
#pragma unroll 1
        for (int column = 0; column < HEAD_DIM_V; column += 8) store_global_16(to.out + 2 * column, zeros);
        if (to.lse != nullptr) *to.lse = NEGATIVE_INFINITY;
    }
}

// What no other tile reads leaves L2 first.
constexpr uint64_t KV_POLICY = FEW_ROWS ? L2_EVICT_FIRST : L2_EVICT_NORMAL;
constexpr uint64_t Q_POLICY = !SPLIT && HEAD_DIM > 128 ? L2_EVICT_FIRST : L2_EVICT_NORMAL;  // narrower ones are no faster so

template <uint64_t L2_POLICY>
__device__ __forceinline__ void load_slabs(
    const TensorMap* map, int slabs, int slab_bytes, uint32_t destination, uint32_t barrier, int row, int offset, int head, int batch) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab) tma_load<L2_POLICY>(destination + slab * slab_bytes, map, barrier, 64 * slab, row, offset, head, batch);
}

// PAGE_ROWS > 0: where a lane's piece of a page lies, counted from piece `first` of the block.
struct Piece {
    int row, length, page;

    Piece() = default;
    __device__ __forceinline__ Piece(const Arguments& args, const WorkTile& tile, int block, int first) {
        // The map of a page slides as that of a sequence does: the last page ends where the sequence ends. Pieces past it load the last key
        // and zeros, since TMA faults on a box that is out of bounds as a whole where the map's base is no memory.
        const int key = min(block * TILE_N + (first + int(threadIdx.x % 32)) * PAGE_ROWS, tile.k_length - 1), number = key / args.page_size;
        length = min(args.page_size, tile.k_length - number * args.page_size);
        row = args.page_size - length + key - number * args.page_size;
        page = args.page_table[tile.batch * args.page_table_stride + number];
    }
};

constexpr bool LOOKS_UP_EARLY = PAGE_ROWS > 0 && FEW_ROWS;  // where there are registers for it, before the producer waits for a buffer

// Loads the TILE_N rows of one block of keys or values: at once, or page by page. Then the whole warp calls it. LOOKS_UP_EARLY: `first_piece` is of the first 32.
__device__ __forceinline__ void load_block(const Arguments& args, const TensorMap* map, int slabs, uint32_t destination, uint32_t barrier, const WorkTile& tile,
                                           int block, const Piece& first_piece) {
    const int kv_head = tile.head * PACK / GQA_RATIO, lane = threadIdx.x % 32;
    if (lane == 0) mbarrier_arrive_expect(barrier, slabs * KV_SLAB);
    if constexpr (PAGE_ROWS == 0) {
        load_slabs<KV_POLICY>(map, slabs, KV_SLAB, destination, barrier, tile.k_row + block * TILE_N, tile.k_offset, kv_head, tile.k_batch);
    } else {
        constexpr int PIECES = TILE_N / (PAGE_ROWS > 0 ? PAGE_ROWS : TILE_N);
#pragma unroll 1
        for (int first = 0; first < PIECES; first += 32) {
            const Piece piece = LOOKS_UP_EARLY && first == 0 ? first_piece : Piece(args, tile, block, first);
            const int number = first + lane;
            __syncwarp();
            if (number < PIECES)  // each lane its own: to tell one lane of all takes twice as long
                load_slabs<KV_POLICY>(map, slabs, KV_SLAB, destination + number * PAGE_ROWS * SLAB_BYTES, barrier, piece.row, piece.length, kv_head, piece.page);
        }
    }
}

// Shared memory of a CTA, in this order; addresses in the shared window, and pointers for what threads read and write themselves.
struct Buffers {
    uint32_t barriers;
    WorkTile* tile_slots;  // [TILE_SLOTS]
    int* is_last;          // [CONSUMER_WARPGROUPS], what join_splits tells a warpgroup's threads
    int* parts;            // [CTA_WARPS], what the warps tell each other of the list of tiles
    uint32_t q, k, v;      // [stages, slabs, rows, 64 columns]
    char* more;            // whatever else the consumers need

    __device__ __forceinline__ explicit Buffers(char* shared)
        : barriers(shared_address(shared)), tile_slots(reinterpret_cast<WorkTile*>(shared + BARRIER_BYTES)),
          is_last(reinterpret_cast<int*>(tile_slots + TILE_SLOTS)), parts(is_last + CONSUMER_WARPGROUPS), q(barriers + CONTROL_BYTES), k(q + Q_STAGES * Q_BYTES), v(k + STAGES * K_BYTES),
          more(shared + CONTROL_BYTES + Q_STAGES * Q_BYTES + STAGES * (K_BYTES + V_BYTES)) {
        static_assert(BARRIER_BYTES + TILE_SLOTS * sizeof(WorkTile) + 4 * (CONSUMER_WARPGROUPS + CTA_WARPS) <= CONTROL_BYTES, "tiles.py reserves too little shared memory");
        if (q % 1024 != 0) __trap();  // the swizzle pattern repeats every 1024 bytes of address
    }
};

// Waits for the tile that the producer tells next, and returns its slot.
__device__ __forceinline__ uint32_t await_tile(const Buffers& buffers, Ring<TILE_SLOTS>& slot_ring) {
    const uint32_t slot = slot_ring.stage();
    mbarrier_wait(buffers.barriers + TILE_FULL + 8 * slot, slot_ring.phase());
    ++slot_ring.count;
    return slot;
}

// Says that the warp has done with the tile.
__device__ __forceinline__ void release_tile(const Buffers& buffers, uint32_t slot) {
    __syncwarp();
    if (RELEASING_LANES > 1 || threadIdx.x % 32 == 0) mbarrier_arrive(buffers.barriers + TILE_EMPTY + 8 * slot);
}

// What the producer warp fills, one tile or split after the other.
struct Rings {
    Ring<Q_STAGES> q;
    Ring<STAGES> k, v;

    // Loads Q and the blocks of K and V, from the last that the tile sees to the first or, FEW_ROWS, the other way; K runs one block ahead of V. Where K
    // and V lie in pages the whole warp calls it, otherwise one thread. `has_q`, `has_first`: Q, or the first block, is loaded.
    template <class BeforeBlock, class BeforeLast>
    __device__ __forceinline__ void fill(const Arguments& args, const Buffers& buffers, const WorkTile& tile, const KeyBlocks& blocks, bool has_q, bool has_first,
                                         BeforeBlock before_block, BeforeLast before_last) {
        const int first = FEW_ROWS ? blocks.begin : blocks.end - 1;
        const auto user = [](int number) { return SHARES_KEYS ? SECOND * (number % 2) : 0; };  // of a split's block
        const auto next_k = [&](int block, int number, const Piece& piece) {
            if (!has_first || block != first) {
                before_block(block);
                if (threadIdx.x == 0) mbarrier_wait(buffers.barriers + K_EMPTY + 8 * k.stage(), k.phase() ^ 1);
                load_block(args, &args.k, SLABS_QK, buffers.k + k.stage() * K_BYTES, buffers.barriers + user(number) + K_FULL + 8 * k.stage(), tile, block, piece);
            }
            ++k.count;
        };
        const auto next_v = [&](int block, int number, const Piece& piece) {
            if (!has_first || block != first) {
                if (threadIdx.x == 0) mbarrier_wait(buffers.barriers + V_EMPTY + 8 * v.stage(), v.phase() ^ 1);
                load_block(args, &args.v, SLABS_V, buffers.v + v.stage() * V_BYTES, buffers.barriers + user(number) + V_FULL + 8 * v.stage(), tile, block, piece);
            }
            ++v.count;
        };
        const auto next_q = [&] {
            if (SPLIT && tile.split != tile.run_begin) return;  // it stays for all splits of the tile
            if (threadIdx.x == 0 && !has_q) {
                mbarrier_wait(buffers.barriers + Q_EMPTY + 8 * q.stage(), q.phase() ^ 1);
                const uint32_t barrier = buffers.barriers + Q_FULL + 8 * q.stage();
                mbarrier_arrive_expect(barrier, SLABS_QK * TILE_ROWS * SLAB_BYTES);
                load_slabs<Q_POLICY>(&args.q, SLABS_QK, Q_SLAB, buffers.q + q.stage() * Q_BYTES, barrier, tile.q_row, tile.q_offset, tile.head, tile.q_batch);
            }
            ++q.count;
        };
        Piece piece, piece_before;
        int before = first, number = 0;
#pragma unroll 1
        for (int block = first;; block = FEW_ROWS ? (block == first ? blocks.rest : block + 1) : block - 1) {
            const bool exists = FEW_ROWS ? block < blocks.end : block >= blocks.begin;
            if (LOOKS_UP_EARLY && exists) piece = Piece(args, tile, block, 0);
            if (exists) next_k(block, number, piece);
            if (block == first) next_q();
            if (!exists) before_last();
            if (block != first) next_v(!FEW_ROWS && PAGE_ROWS > 0 ? block + 1 : before, number - 1, piece_before);  // with pages registers are scarce
            if (!exists) break;
            before = block;
            piece_before = piece;
            ++number;
        }
    }
};

// Puts a sequence's new keys and values of one head into the cache, for TMA to load: whoever loads them has done it before. Warps 1 to 3 call it, and ask
// `is_needed` while the new rows are on their way.
template <class IsNeeded>
__device__ __forceinline__ void append_new_keys(const Arguments& args, int batch, int kv_head, int cached_keys, IsNeeded is_needed) {
    constexpr int THREADS = 32 * APPENDING_WARPS, AT_ONCE = TILE_M <= 16 ? 1 : TILE_M / 16;  // with few queries there are few new rows
    const Append& append = args.append;
    const Rotary& rotary = append.rotary;
    const int pairs = rotary.interleaved ? 0 : rotary.dim / 16;  // of eight columns and their partners, which a key begins with
    const int thread = 32 * APPENDING_WARPS - threadIdx.x / 32 * 32 + threadIdx.x % 32;  // warp 3, which has nothing else to do, begins
    const int of_key = HEAD_DIM / 8 - pairs, keys = args.new_keys * of_key, tasks = keys + args.new_keys * (HEAD_DIM_V / 8);
#pragma unroll 1
    for (int first = thread; first < tasks; first += THREADS * AT_ONCE) {
        Chunk<4> own[AT_ONCE] = {}, partner[AT_ONCE] = {};
        Angles angles[AT_ONCE] = {};
        char* to[AT_ONCE];
        bool is_rotated[AT_ONCE], has_partner[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int task = first + THREADS * i, of_row = task < keys ? of_key : HEAD_DIM_V / 8, in_rows = task < keys ? task : task - keys;
            const int row = divide(in_rows, of_row), part = in_rows - row * of_row, position = cached_keys + row;
            const bool is_v = task >= keys;
            const int column = 8 * (is_v || part < pairs ? part : part + pairs);
            is_rotated[i] = !is_v && column < rotary.dim;
            has_partner[i] = is_rotated[i] && !rotary.interleaved;
            to[i] = nullptr;
            if (task >= tasks || position < 0 || position >= args.seqlen_k) continue;  // a row that does not fit is dropped
            const char* from = (is_v ? append.v : append.k).at(batch, row, kv_head) + 2 * column;
            own[i] = load(from);
            if (has_partner[i]) partner[i] = load(from + rotary.dim);
            if (is_rotated[i]) angles[i] = rotary.angles(position, column);
            to[i] = append.cached(args, PAGE_ROWS > 0, is_v, batch, position, kv_head) + 2 * column;
        }
        if (first == thread && !is_needed()) break;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (to[i] == nullptr) continue;
            if (is_rotated[i]) rotary.turn(own[i], partner[i], angles[i]);
            store_global_16(to[i], own[i].words);
            if (has_partner[i]) store_global_16(to[i] + rotary.dim, partner[i].words);
        }
    }
    global_async_proxy_fence();
    __syncwarp();
}

// Appends the new keys of each tile that the CTA takes, while its old ones are loaded. Warps 1 to 3 call it.
__device__ __forceinline__ void append_for_tiles(const Arguments& args, const Buffers& buffers) {
    Ring<TILE_SLOTS> slot_ring;
    while (true) {
        const uint32_t slot = await_tile(buffers, slot_ring);
        const WorkTile& tile = buffers.tile_slots[slot];
        if (tile.first_row < 0) break;
        if (has_new_keys(args, tile)) {
            append_new_keys(args, tile.batch, tile.head * PACK / GQA_RATIO, cached_keys(args, tile.batch), [] { return true; });
            if (threadIdx.x % 32 == 0) mbarrier_arrive(buffers.barriers + APPENDED);
        }
        release_tile(buffers, slot);
    }
}

// Takes tile after tile, tells the consumers, and loads what they need. A CTA's first tile is its own number; the others are dealt to whoever asks, so
// that all end together. Splits are not dealt: a CTA has those of its share.
__device__ __forceinline__ void produce(const Arguments& args, TileList& list, const Buffers& buffers) {
    Ring<TILE_SLOTS> slot_ring;
    Rings rings;
    const bool appends = FEW_ROWS && args.append.k.data != nullptr;
    int asked = 0, appended = 0, place = list.begin(args, buffers.parts);
    const auto ask = [&] {
        if (!SPLIT && threadIdx.x == 0) asked = atomicAdd(args.next_tile, 1);
    };
    while (true) {
        const uint32_t slot = slot_ring.stage();
        mbarrier_wait(buffers.barriers + TILE_EMPTY + 8 * slot, slot_ring.phase() ^ 1);
        const int next = list.find(args, place, buffers.tile_slots[(slot + TILE_SLOTS - 1) % TILE_SLOTS], buffers.tile_slots[slot]);
        __syncwarp();
        typename Either<FEW_ROWS, const WorkTile, const WorkTile&>::type tile = buffers.tile_slots[slot];  // a copy, where there are registers for it
        if (VARLEN && !FEW_ROWS && slot_ring.count == 0) wait_for_kernel_before();  // append_kv, which writes keys, values and rotated queries; also if there is no tile
        if (tile.first_row < 0) break;
        KeyBlocks blocks = tile_blocks(args, tile, tile.first_row);
        blocks.end = max(blocks.end, blocks.begin);
        if (blocks.end == blocks.begin && (!SPLIT || tile.splits == 1) && !appends) {
            store_empty(args, tile);
            ask();
            __syncwarp();  // and into the same slot
        } else {
            ++slot_ring.count;
            mbarrier_arrive(buffers.barriers + TILE_FULL + 8 * slot);  // every lane, for any of them may have written the tile
            // It asks late, so that who is done first is served first, and early enough to load the next Q in time.
            const bool has_new = appends && has_new_keys(args, tile);
            bool waits = has_new;
            const auto wait_for_new_keys = [&] {
                mbarrier_wait(buffers.barriers + APPENDED, appended % 2);
                waits = false;
            };
            const auto before_block = [&](int block) {
                if (waits && !is_old(args, tile, block)) wait_for_new_keys();
            };
            if (PAGE_ROWS > 0 || threadIdx.x == 0) {
                rings.fill(args, buffers, tile, blocks, false, false, before_block, ask);
                if (waits) wait_for_new_keys();  // no phase of the barrier is left out
            }
            appended += has_new;
        }
        place = SPLIT ? next : gridDim.x + __shfl_sync(~0u, asked, 0);
    }
    mbarrier_arrive(buffers.barriers + TILE_FULL + 8 * slot_ring.stage());
    // As many ask as there are tiles: who is told the last number knows that nobody asks after it, and leaves zero for the next launch.
    if constexpr (!SPLIT) {
        if (threadIdx.x == 0 && place - int(gridDim.x) == list.before - 1) *args.next_tile = 0;
    }
}

// A CTA's life: warp 0 produces, the warpgroups from the second on consume. Lengths are read before wait_for_kernel_before(), so append_kv must not
// write them, nor be itself allowed to start before what wrote them has ended.
template <class Consume>
__device__ __forceinline__ void run(const Arguments& args, const Buffers& buffers, Consume consume) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, so that the roles are branches and not predicates
    const bool appends = FEW_ROWS && args.append.k.data != nullptr;
    const int tile_readers = RELEASING_LANES * (CONSUMER_WARPS + (appends ? APPENDING_WARPS : 0));
    TileList list;
    if (threadIdx.x == 32) {
        prefetch_tensor_map(&args.q);
        prefetch_tensor_map(&args.k);
        prefetch_tensor_map(&args.v);
#pragma unroll
        for (int barrier = 0; barrier < EMPTY; barrier += 8) {
            mbarrier_init(buffers.barriers + barrier, barrier < APPENDED ? 1 : barrier < TILE_FULL ? APPENDING_WARPS : 32);
            if (SHARES_KEYS && barrier < Q_FULL) mbarrier_init(buffers.barriers + barrier + SECOND, 1);
            mbarrier_init(buffers.barriers + barrier + EMPTY, barrier < Q_FULL ? BLOCK_WARPS : barrier < TILE_FULL ? CONSUMER_WARPS : tile_readers);
        }
        mbarrier_init_fence();
    }
    list.prepare(args, buffers.parts, warp);
    __syncthreads();
    if (warp >= 4) {
        if constexpr (CONSUMER_REGISTERS > 0) acquire_registers<CONSUMER_REGISTERS>();
        consume(warp / 4 - 1);
        return;
    }
    // The producer's code follows the start, which its first load waits for.
    if constexpr (PRODUCER_REGISTERS > 0) release_registers<PRODUCER_REGISTERS>();
    if (warp == 0) produce(args, list, buffers);
    if (warp > 0 && appends) append_for_tiles(args, buffers);
}
