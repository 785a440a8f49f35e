// A tile's splits in a cluster of CTAs, for few sequences. There what comes before the first product and after the last one is half of the time, and
// instructions are its greater part: so no thread is told what to do, each finds it out while the first keys are on their way, and the results meet in
// shared memory. The grid is [B, heads, tiles of a head * CTAs of a cluster]. attention_decode.cu, which includes this, says how its accumulators lie.
#pragma once

static_assert(!CLUSTER || (PRODUCER_REGISTERS == 0 && CONSUMER_REGISTERS == 0), "run_cluster leaves registers as they are");

// Of the tiles of a head, which are seldom more than one.
__device__ __forceinline__ int m_block_of_cluster(const Arguments& args) { return args.seqlen_q * PACK <= TILE_ROWS ? 0 : cluster_index(); }

// The first of the splits of this CTA: they are dealt to the CTAs in turn, and as the host sees to, no CTA has more than two.
__device__ __forceinline__ WorkTile first_split(const Arguments& args, int cached_keys) {
    const Sequence seq = sequence(args, blockIdx.z, cached_keys);
    WorkTile tile;
    write_tile(args, seq, blockIdx.z, m_block_of_cluster(args), blockIdx.y, tile);
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
            mbarrier_init(first + 8 * i, 1);
            mbarrier_init(first + EMPTY + 8 * i, CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_arrive();
    if (!speaks || args.loads_ahead == 0) return;
    WorkTile tile;  // as if the cache were full: the map begins at the first key
    write_tile(args, {0, args.seqlen_q, 0, args.seqlen_k, int(blockIdx.z)}, blockIdx.z, m_block_of_cluster(args), blockIdx.y, tile);
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

// Warp 3 calls it.
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

// ---- the results ----

constexpr int ROWS_AT_ONCE = ROWS_OF_THREAD < 4 ? ROWS_OF_THREAD : 4;  // of a column, that a thread sends in one store
constexpr int ROW_UNIT = ROWS_AT_ONCE == 4 ? 16 : 2;  // rows of a tile are sent in so many

// Where a row is among those of a result: what a thread has of a column is side by side.
__device__ __forceinline__ int place_of_row(int row) { return ROWS_AT_ONCE == 4 ? (row & ~15) + (row & 6) * 2 + (row & 8) / 4 + (row & 1) : row; }

// What a row's results come to.
struct alignas(16) RowEnd {
    char* out;
    float inverse;  // the output is to be multiplied by it
};

// Where the CTAs send what they found. Each gets, of every split, those columns that it combines, and the states of all rows.
struct ResultBuffers {
    int rows;             // of the tile, in units
    int columns_of_rank;  // of all CTAs as many, in the last one perhaps some beyond Dv
    float* outs;          // [splits, columns_of_rank, rows], each row at its place
    RowEnd* ends;         // [rows]
    float2* states;       // [splits, rows]: what the exponents are relative to, by which the factor of the split's output is then replaced, and the sum

    __device__ __forceinline__ ResultBuffers(const Arguments& args, float* memory)
        : rows((min(TILE_ROWS, args.seqlen_q * PACK - m_block_of_cluster(args) * TILE_ROWS) + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT),
          columns_of_rank(64 * SLABS_V >> (__ffs(cluster_size()) - 1)),  // the size is a power of two
          outs(memory), ends(reinterpret_cast<RowEnd*>(memory + 2 * OUTPUT_REGISTERS * CONSUMER_THREADS)), states(reinterpret_cast<float2*>(ends + TILE_M)) {}
};

// Where a thread sends its part of a split's result. `outs` and `states` are at the same place in each CTA.
struct ResultAddresses {
    uint32_t outs[COLUMNS_OF_THREAD], outs_barriers[COLUMNS_OF_THREAD];
    uint32_t states, states_barrier;

    __device__ __forceinline__ ResultAddresses(const ResultBuffers& to, uint32_t barriers) {
        const int split = cluster_rank();
#pragma unroll
        for (int c = 0; c < COLUMNS_OF_THREAD; ++c) {
            const int column = output_column(register_of_column(c)), rank = column * cluster_size() / (64 * SLABS_V);
            outs[c] = shared_address_of(shared_address(to.outs), rank) + 4 * ((split - rank) * to.columns_of_rank + column) * to.rows;
            outs_barriers[c] = shared_address_of(barriers + RESULTS_FULL, rank);
        }
        const int told = min(told_rank(), cluster_size() - 1);
        states = shared_address_of(shared_address(to.states), told) + 8 * split * to.rows;
        states_barrier = shared_address_of(barriers + STATES_FULL, told);
    }

    __device__ __forceinline__ void go_to_next_split(const ResultBuffers& to) {
#pragma unroll
        for (int c = 0; c < COLUMNS_OF_THREAD; ++c) outs[c] += 4 * cluster_size() * to.columns_of_rank * to.rows;
        states += 8 * cluster_size() * to.rows;
    }

    // All lanes of a row know its state, and each tells one CTA.
    static __device__ __forceinline__ int told_rank() { return threadIdx.x % 128 / 4; }
    // The first of the thread's registers of its column c; those of other rows follow in fours.
    static __device__ __forceinline__ int register_of_column(int c) { return c / 2 * REGISTERS + c % 2 * 2; }
};

__device__ __forceinline__ void send_states(const ResultAddresses& to, const ResultBuffers& buffers, const RowStates<ROWS_OF_THREAD>& states) {
    if (to.told_rank() >= cluster_size()) return;
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; r += 2) {
        if (tile_row(r) >= buffers.rows) continue;
        store_cluster_16(to.states + 8 * tile_row(r), states.max[r], states.sum[r], states.max[r + 1], states.sum[r + 1], to.states_barrier);
    }
}

__device__ __forceinline__ void send_output(const ResultAddresses& to, const ResultBuffers& buffers, const Output& output) {
#pragma unroll
    for (int c = 0; c < COLUMNS_OF_THREAD; ++c) {
        const int first = to.register_of_column(c);
        if (output_column(first) >= HEAD_DIM_V) continue;
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; r += ROWS_AT_ONCE) {
            const float* rows = output + first + 2 * r;  // r and r + 1, then two registers of another column
            const uint32_t address = to.outs[c] + 4 * place_of_row(tile_row(r));
            if (tile_row(r) >= buffers.rows) continue;
            if constexpr (ROWS_AT_ONCE == 4)
                store_cluster_16(address, rows[0], rows[1], rows[4], rows[5], to.outs_barriers[c]);
            else
                store_cluster_8(address, rows[0], rows[1], to.outs_barriers[c]);
        }
    }
}

constexpr int AT_ONCE = 4;  // of the splits' results that a thread loads: the compiler cannot know that none is stored where the next is loaded from

// For a row, turns the splits' shifts into factors, by which their outputs are to be multiplied.
__device__ __forceinline__ void find_factors(float2* states, int splits, int stride, float& shift, float& sum) {
    shift = NEGATIVE_INFINITY;
    sum = 0.0f;
#pragma unroll 1
    for (int first = 0; first < splits; first += AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) shift = fmaxf(shift, first + i < splits ? states[(first + i) * stride].x : NEGATIVE_INFINITY);
    }
#pragma unroll 1
    for (int first = 0; first < splits; first += AT_ONCE) {
        float2 loaded[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) loaded[i] = first + i < splits ? states[(first + i) * stride] : make_float2(NEGATIVE_INFINITY, 0.0f);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const float factor = power_of_two(loaded[i].x - shift);
            sum = fmaf(loaded[i].y, factor, sum);
            if (first + i < splits) states[(first + i) * stride].x = factor;
        }
    }
}

// Takes the results of all splits together in their order, and writes this CTA's columns of the output. As what a result is to be multiplied by is a power of
// two, these are the bits that carrying the results on from one to the next gives (join_splits).
__device__ __forceinline__ void combine_splits(const Arguments& args, const WorkTile& tile, const ResultBuffers& from, uint32_t barriers) {
    const int first_column = cluster_rank() * from.columns_of_rank, columns = max(0, min(from.columns_of_rank, HEAD_DIM_V - first_column));
    const int rows = existing_rows(tile), thread = threadIdx.x - 128;
    if (thread == 0) {
        mbarrier_arrive_expect(barriers + STATES_FULL, 8 * tile.splits * from.rows);
        mbarrier_arrive_expect(barriers + RESULTS_FULL, 4 * tile.splits * from.rows * columns);
    }
    // While the results are on their way, each row's factors and, by other warps, its place:
    const int other = thread - 32;
    if (other >= 0 && other < rows) from.ends[other].out = destination(args, tile, other).out + 2 * first_column;
    int pair = divide(thread, rows);
    mbarrier_wait_for_cluster(barriers + STATES_FULL, 0);  // also who has no row: a CTA that is sent something must not end
    if (thread < rows) {
        float shift, sum, lse;
        find_factors(from.states + thread, tile.splits, from.rows, shift, sum);
        normalise(shift, sum, from.ends[thread].inverse, lse);
        if (args.lse != nullptr && first_column == 0) *destination(args, tile, thread).lse = lse;
    }
    named_barrier_sync(1 + CONSUMER_WARPGROUPS, CONSUMER_THREADS);
    mbarrier_wait_for_cluster(barriers + RESULTS_FULL, 0);
#pragma unroll 1
    for (int task = thread; task < rows * columns / 2; task += CONSUMER_THREADS, pair = divide(task, rows)) {  // two columns of a row; neighbours have others' banks
        const int row = task - pair * rows, column = 2 * pair;
        const float2* states = from.states + row;
        const float* outs = from.outs + column * from.rows + place_of_row(row);
        const RowEnd end = from.ends[row];
        float2 output = {};
#pragma unroll 1
        for (int i = 0; i < tile.splits; i += AT_ONCE) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) {
                const bool is_one = i + j < tile.splits;
                const float factor = is_one ? states[(i + j) * from.rows].x : 0.0f;
                const float* out = outs + (i + j) * from.columns_of_rank * from.rows;
                output.x = fmaf(is_one ? out[0] : 0.0f, factor, output.x);
                output.y = fmaf(is_one ? out[from.rows] : 0.0f, factor, output.y);
            }
        }
        store_global_4(end.out + 2 * column, pack2(output.x * end.inverse, output.y * end.inverse));
    }
}
