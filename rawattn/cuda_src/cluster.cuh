// A tile's splits in a cluster of CTAs, for few sequences. There what comes before the first product and after the last one is half of the time, and
// instructions are its greater part: so no thread is told what to do, each finds it out while the first keys are on their way, and the results meet in
// shared memory. A KV head of few rows has one tile; the grid is [B, heads, CTAs of a cluster].
#pragma once

static_assert(!CLUSTER || (PRODUCER_REGISTERS == 0 && CONSUMER_REGISTERS == 0), "run_cluster leaves registers as they are");

// The first of the splits of this CTA: they are dealt to the CTAs in turn, and as the host sees to, each has room for the results of its own.
__device__ __forceinline__ WorkTile first_split(const Arguments& args, int cached_keys) {
    const Sequence seq = sequence(args, blockIdx.z, cached_keys);
    WorkTile tile;
    write_tile(args, seq, blockIdx.z, 0, blockIdx.y, tile);
    tile.split = tile.run_begin = cluster_rank();
    write_blocks(sequence_places(args, seq), tile);
    return tile;
}

__device__ __forceinline__ void go_to_next_split(WorkTile& tile) {
    const int further = cluster_size(), rest = further * (tile.end_block - tile.rest_block);
    tile.split += further;
    tile.first_block += further;
    tile.rest_block += rest;
    tile.end_block += rest;
}

// ---- the first keys ----

// Makes the barriers, and asks for the first blocks of K and V and for Q. Two warps call it, one for K and then V, one for Q: the code, which no cache has
// yet, comes once, and V does not keep K waiting. What turns out to be no old key is not used (is_as_loaded).
__device__ __forceinline__ void start_loads(const Arguments& args, const Buffers& buffers, bool is_q) {
    const bool speaks = threadIdx.x % 32 == 0;
    if (speaks) {
        const uint32_t first = buffers.barriers + (is_q ? Q_FULL : K_FULL);
#pragma unroll
        for (int i = 0; i < max(2 * STAGES, 4); ++i) {
            if (i >= (is_q ? 4 : 2 * STAGES)) break;  // beside those of K are those of V, and beside that of Q those of a cluster alone
            mbarrier_init(first + 8 * i, is_q && first + 8 * i == buffers.barriers + APPENDED ? APPENDING_WARPS : 1);
            if (SHARES_KEYS && !is_q) mbarrier_init(first + SECOND + 8 * i, 1);
            mbarrier_init(first + EMPTY + 8 * i, is_q ? CONSUMER_WARPS : BLOCK_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_arrive();
    if (!speaks || args.loads_ahead == 0) return;
    WorkTile tile;  // as if the cache were full: the map begins at the first key
    write_tile(args, {0, args.seqlen_q, 0, args.seqlen_k, int(blockIdx.z)}, blockIdx.z, 0, blockIdx.y, tile);
#pragma unroll 1
    for (int is_v = 0; is_v < (is_q ? 1 : 2); ++is_v) {
        const TensorMap* map = is_q ? &args.q : is_v ? &args.v : &args.k;
        const uint32_t barrier = buffers.barriers + (is_q ? Q_FULL : is_v ? V_FULL : K_FULL), to = is_q ? buffers.q : is_v ? buffers.v : buffers.k;
        const int slabs = is_v ? SLABS_V : SLABS_QK, row = is_q ? tile.q_row : cluster_rank() * TILE_N, offset = is_q ? tile.q_offset : tile.k_offset;
        mbarrier_arrive_expect(barrier, slabs * (is_q ? TILE_ROWS * SLAB_BYTES : KV_SLAB));
        load_slabs<KV_POLICY>(map, slabs, is_q ? Q_SLAB : KV_SLAB, to, barrier, row, offset, is_q ? tile.head : tile.head * PACK / GQA_RATIO, blockIdx.z);
    }
}

// Whether the CTA's first split does begin with the block that was loaded ahead. If not, that counts as one that nobody uses.
__device__ __forceinline__ bool is_as_loaded(const Arguments& args, const WorkTile& tile, const KeyBlocks& blocks) {
    return blocks.begin == cluster_rank() && blocks.begin < blocks.end && is_old(args, tile, blocks.begin);
}

// ---- the results ----

// Whether a CTA is a cluster of its own, which it is only where an SM has two: it stores results as usual, and its consumers meet before they take them together.
__device__ __forceinline__ bool is_single() { return CTAS_PER_SM > 1 && cluster_size() == 1; }

// One thread says how many bytes will be sent here, of states and of outputs. All consumers call it.
__device__ __forceinline__ void expect_results(uint32_t barriers, uint32_t states_bytes, uint32_t outs_bytes) {
    if (is_single()) {
        meet_all_consumers();
    } else if (threadIdx.x == 128) {
        mbarrier_arrive_expect(barriers + STATES_FULL, states_bytes);
        mbarrier_arrive_expect(barriers + RESULTS_FULL, outs_bytes);
    }
}

__device__ __forceinline__ void await_results(uint32_t barrier) {
    if (!is_single()) mbarrier_wait_for_cluster(barrier, 0);
}

// ---- the producer ----

// Warps 1 to 3 call it.
__device__ __forceinline__ void append_for_cta(const Arguments& args, const Buffers& buffers, int cached_keys) {
    append_new_keys(args, blockIdx.z, blockIdx.y * PACK / GQA_RATIO, cached_keys, [&] {
        bool is_needed = false;
        for (WorkTile tile = first_split(args, cached_keys); tile.split < tile.splits; go_to_next_split(tile)) is_needed |= has_new_keys(args, tile);
        return is_needed;
    });
    cluster_wait();  // the barrier is there
    if (threadIdx.x % 32 == 0) mbarrier_arrive(buffers.barriers + APPENDED);
}

// Warp 0 calls it.
__device__ __forceinline__ void produce_splits(const Arguments& args, const Buffers& buffers, int cached_keys) {
    if (PAGE_ROWS == 0 && threadIdx.x != 0) return;
    WorkTile tile = first_split(args, cached_keys);
    KeyBlocks blocks = tile_blocks(args, tile, tile.first_row);
    const bool has_loaded = args.loads_ahead != 0;
    bool has_first = has_loaded && is_as_loaded(args, tile, blocks);
    if (has_loaded && tile.split >= tile.splits) {  // nobody waits for it, but a CTA that is sent something must not end
        mbarrier_wait(buffers.barriers + Q_FULL, 0);
        mbarrier_wait(buffers.barriers + K_FULL, 0);
        mbarrier_wait(buffers.barriers + V_FULL, 0);
    }
    Rings rings;
    if (has_loaded && !has_first) rings.k.count = rings.v.count = 1;
    const auto wait_for_new_keys = [&](int block) {
        if (args.append.k.data != nullptr && !is_old(args, tile, block)) mbarrier_wait(buffers.barriers + APPENDED, 0);
    };
    while (tile.split < tile.splits) {
        rings.fill(args, buffers, tile, blocks, has_loaded, has_first, wait_for_new_keys, [] {});
        has_first = false;
        go_to_next_split(tile);
        blocks = tile_blocks(args, tile, tile.first_row);
    }
}
