// Attention of few queries, up to 32 rows of a KV head, to many keys, for sm_90a. The products are transposed, S^T = K Q^T and O^T = V^T P^T: keys, and
// columns of V, are the 64 rows that WGMMA has, and the few query rows of a warpgroup are its columns, so that nothing is computed for rows that do not
// exist, and each thread has its share of the exponentials. P^T goes through shared memory. Memory is the limit, so there is no overlap but that of
// the producer warp's loads (pipeline.cuh), and of O^T of one block with S^T and the maxima of the next.
// The constants in capitals and wgmma_scores / wgmma_output come from a generated prologue (compiler.py).
#include "pipeline.cuh"

// The accumulators of m64nNk16 (PTX ISA 9.7.15.5.1.1): register i of a thread is key, or column of V, 16 * warp + lane / 4 + 8 * (i / 2 % 2) and
// query row 8 * (i / 4) + 2 * (lane % 4) + i % 2; a row lives in the eight lanes of equal lane % 4 of all four warps.
constexpr int KEY_TILES = TILE_N / 64, REGISTERS = WARPGROUP_ROWS / 2, OUTPUT_REGISTERS = SLABS_V * REGISTERS;
constexpr int ROWS_OF_THREAD = WARPGROUP_ROWS / 4, COLUMNS_OF_THREAD = 2 * SLABS_V, QK_STEPS = (HEAD_DIM + 15) / 16;
constexpr int TASKS_IN_FLIGHT = WARPGROUP_ROWS <= 16 ? 1 : 2;  // of a combination (splits.cuh), as registers allow
constexpr int RESULTS_IN_FLIGHT = TASKS_IN_FLIGHT == 1 ? 8 : 6;
constexpr int PROBS_SLAB = WARPGROUP_ROWS * SLAB_BYTES, PROBS_BYTES = KEY_TILES * PROBS_SLAB;  // of a warpgroup

__device__ __forceinline__ int fragment_row(int i) { return i / 4 * 2 + i % 2; }
__device__ __forceinline__ int fragment_position(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * (i / 2 % 2); }
__device__ __forceinline__ int output_row(int i) { return fragment_row(i % REGISTERS); }
__device__ __forceinline__ int output_column(int i) { return 64 * (i / REGISTERS) + fragment_position(i % REGISTERS); }
__device__ __forceinline__ int own_warpgroup() { return CONSUMER_WARPGROUPS == 1 ? 0 : threadIdx.x / 128 - 1; }  // no shuffle: also where a warp has parted
__device__ __forceinline__ int warpgroup_barrier() { return 1 + own_warpgroup(); }
__device__ __forceinline__ int warpgroup_row(int r) { return r / 2 * 8 + 2 * (threadIdx.x % 4) + r % 2; }
__device__ __forceinline__ int tile_row(int r) { return WARPGROUP_ROWS * own_warpgroup() + warpgroup_row(r); }

using Scores = float[KEY_TILES][REGISTERS];
using Output = float[OUTPUT_REGISTERS];

struct Sum {
    __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};

struct Max {
    __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Takes the values that the threads have for each row together, in a fixed order: first those of a warp, which are left in `exchange`, [4,
// WARPGROUP_ROWS], which nobody may read any more.
template <class Operation>
__device__ __forceinline__ void over_keys_of_warp(float (&values)[ROWS_OF_THREAD], float* exchange, Operation operation) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    int row = 0;
    // Of two lanes each goes on with half of the rows, until it has one.
#pragma unroll
    for (int distance = 4, rows = ROWS_OF_THREAD; distance < 32; distance *= 2, rows = max(1, rows / 2)) {
        const bool upper = lane & distance;
        const int half = rows / 2;
        if (upper) row += half;
#pragma unroll
        for (int r = 0; r < max(1, half); ++r) {
            const float received = __shfl_xor_sync(~0u, upper ? values[r] : values[r + half], distance);
            values[r] = operation(upper ? values[r + half] : values[r], received);
        }
    }
    if (lane < 4 * ROWS_OF_THREAD) exchange[warp * WARPGROUP_ROWS + warpgroup_row(row)] = values[0];
}

// Then those of all four.
template <class Operation>
__device__ __forceinline__ void over_keys_of_warpgroup(float (&values)[ROWS_OF_THREAD], const float* exchange, Operation operation) {
    named_barrier_sync(warpgroup_barrier(), 128);
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; r += 2) {
        float2 of_warp[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) of_warp[w] = *reinterpret_cast<const float2*>(exchange + w * WARPGROUP_ROWS + warpgroup_row(r));
        values[r] = operation(operation(of_warp[0].x, of_warp[1].x), operation(of_warp[2].x, of_warp[3].x));
        values[r + 1] = operation(operation(of_warp[0].y, of_warp[1].y), operation(of_warp[2].y, of_warp[3].y));
    }
}

__device__ __forceinline__ void pin(Scores& scores) {
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) pin(scores[t]);
}

// scores = K Q^T for one block of keys
__device__ __forceinline__ void issue_scores(Scores& scores, uint32_t q_smem, uint32_t k_smem) {
    const MatrixDescriptor<Q_SLAB> q(q_smem);
    const MatrixDescriptor<KV_SLAB> k(k_smem);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
        for (int first = 0; first < QK_STEPS; first += QK_STEPS_AT_ONCE) {
            uint64_t k_steps[QK_STEPS_AT_ONCE], q_steps[QK_STEPS_AT_ONCE];
#pragma unroll
            for (int i = 0; i < QK_STEPS_AT_ONCE; ++i) {
                k_steps[i] = k.at_step(first + i, 64 * t * SLAB_BYTES);
                q_steps[i] = q.at_step(first + i);
            }
            wgmma_scores(scores[t], k_steps, q_steps, first > 0);
        }
    }
    wgmma_commit();
    pin(scores);
}

// output += V^T P^T for one block of keys
__device__ __forceinline__ void issue_output(Output& output, uint32_t probs_smem, uint32_t v_smem) {
    const MatrixDescriptor<KV_SLAB> v(v_smem);
    const MatrixDescriptor<PROBS_SLAB> probs(probs_smem);
    pin(output);
    wgmma_fence();
#pragma unroll
    for (int slab = 0; slab < SLABS_V; ++slab) {
        uint64_t v_steps[TILE_N / 16], probs_steps[TILE_N / 16];
#pragma unroll
        for (int step = 0; step < TILE_N / 16; ++step) {
            v_steps[step] = v.at(slab * KV_SLAB + step * 16 * SLAB_BYTES);
            probs_steps[step] = probs.at_step(step);
        }
        wgmma_output(reinterpret_cast<float(&)[REGISTERS]>(output[slab * REGISTERS]), v_steps, probs_steps, 1);
    }
    wgmma_commit();
    pin(output);
}

// Rounds P to 16 bits into shared memory, [WARPGROUP_ROWS, TILE_N] in slabs as Q lies.
__device__ __forceinline__ void store_probs(const Scores& scores, uint32_t probs_smem) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, row = lane % 8;
    const uint32_t address = probs_smem + row * SLAB_BYTES + ((2 * warp + lane / 8 % 2) ^ row) * 16;  // of eight keys of a row, swizzled
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < REGISTERS; i += 4) {
            const uint32_t words[2] = {pack2(scores[t][i], scores[t][i + 1]), pack2(scores[t][i + 2], scores[t][i + 3])};
            store_matrices_transposed(address + t * PROBS_SLAB + i / 4 * 8 * SLAB_BYTES, words);
        }
    }
}

// Leaves of P what that lost.
__device__ __forceinline__ void subtract_rounded(Scores& scores) {
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < REGISTERS; i += 2) {
            float low, high;
            unpack2(pack2(scores[t][i], scores[t][i + 1]), low, high);
            scores[t][i] -= low;
            scores[t][i + 1] -= high;
        }
    }
}

__device__ __forceinline__ void mask_scores(Scores& scores, const Mask& mask, int first_row, int first_key) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        const int begin = mask.begin(first_row + tile_row(r)) - first_key, end = mask.end(first_row + tile_row(r)) - first_key;
#pragma unroll
        for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i) {
                const int key = 64 * t + fragment_position(i);
                if (fragment_row(i) == r && (key >= end || (BOUND_LEFT && key < begin))) scores[t][i] = NEGATIVE_INFINITY;
            }
        }
    }
}

// Begins the softmax of a block: the maxima of a warp's raw scores.
__device__ __forceinline__ void find_max(const Scores& scores, const RowStates<ROWS_OF_THREAD>& states, float* exchange) {
    float max[ROWS_OF_THREAD];
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) max[r] = states.max[r];
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < REGISTERS; ++i) max[fragment_row(i)] = fmaxf(max[fragment_row(i)], scores[t][i]);
    }
    over_keys_of_warp(max, exchange, Max());
}

// Turns the raw scores into exp(scale * (score - max)), and rescales what was accumulated before.
__device__ __forceinline__ void exponentiate(Scores& scores, RowStates<ROWS_OF_THREAD>& states, Output& output, const float* exchange, float scale_log2) {
    float max[ROWS_OF_THREAD];
    over_keys_of_warpgroup(max, exchange, Max());
    float rescale[ROWS_OF_THREAD], offset[ROWS_OF_THREAD];
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        offset[r] = exponent_offset(max[r], scale_log2);
        rescale[r] = exp2_approx(exponent_shift(states.max[r], scale_log2) - offset[r]);  // 1 if it did not move; 0 changes nothing before the first key
        states.max[r] = max[r];
        states.sum[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < OUTPUT_REGISTERS; ++i) output[i] *= rescale[output_row(i)];
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
        for (int i = 0; i < REGISTERS; ++i) {
            const int r = fragment_row(i);
            scores[t][i] = exp2_approx(fmaf(scores[t][i], scale_log2, -offset[r]));
            states.sum[r] += scores[t][i];
        }
    }
}

// Neighbouring columns are four lanes apart: two lanes change places, so that each has two columns of one of their two rows.
__device__ __forceinline__ void store_output(const Arguments& args, const WorkTile& tile, const Output& output) {
    const bool is_odd = threadIdx.x & 4;
#pragma unroll
    for (int group = 0; group < WARPGROUP_ROWS / 8; ++group) {
        const Destination to = destination(args, tile, tile_row(2 * group + is_odd));
#pragma unroll
        for (int slab = 0; slab < SLABS_V; ++slab) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = slab * REGISTERS + 4 * group + 2 * half, column = output_column(i) & ~1;
                const float received = __shfl_xor_sync(~0u, is_odd ? output[i] : output[i + 1], 4);
                const uint32_t word = is_odd ? pack2(received, output[i + 1]) : pack2(output[i], received);
                if (to.out != nullptr && column < HEAD_DIM_V) store_global_4(to.out + 2 * column, word);
            }
        }
    }
}

// One lane of a row stores what all have.
__device__ __forceinline__ bool speaks_for_row() { return threadIdx.x % 128 < 4; }

__device__ __forceinline__ void store_partial(const Arguments& args, const WorkTile& tile, const Output& output, const RowStates<ROWS_OF_THREAD>& states) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        const int row = tile_row(r);
        if (destination(args, tile, row).out == nullptr) continue;
        const Partial to = partial(args, tile, tile.split, row);
#pragma unroll
        for (int i = 0; i < OUTPUT_REGISTERS; ++i) {
            if (output_row(i) == r && output_column(i) < HEAD_DIM_V) __stcg(to.out + output_column(i), output[i]);
        }
        if (speaks_for_row()) {
            const float4 state = make_float4(states.max[r], states.sum[r], states.max[r], states.sum[r]);
            __stcg(reinterpret_cast<float4*>(to.state), state);
            __stcg(reinterpret_cast<float4*>(to.state) + 1, state);
        }
    }
}

__device__ __forceinline__ void meet_readers_of_q() { named_barrier_sync(warpgroup_barrier(), 128); }
__device__ __forceinline__ void meet_all_consumers() { named_barrier_sync(1 + CONSUMER_WARPGROUPS, CONSUMER_THREADS); }

#include "splits.cuh"
#include "cluster.cuh"
#include "queries.cuh"

// A warpgroup that computes one split after the other.
struct Consumer {
    const Arguments& args;
    const Buffers& buffers;
    const int warpgroup;
    const bool signals = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer that a buffer is free
    const uint32_t probs_smem = shared_address(buffers.more) + 2 * PROBS_BYTES * warpgroup;  // P, and what rounding it lost
    float* const exchanges = reinterpret_cast<float*>(buffers.more + 2 * PROBS_BYTES * CONSUMER_WARPGROUPS);  // [CONSUMER_WARPGROUPS, 2, 4, WARPGROUP_ROWS]
    float* const max_exchange = exchanges + 8 * WARPGROUP_ROWS * warpgroup;
    float* const sum_exchange = max_exchange + 4 * WARPGROUP_ROWS;  // still read when the next tile's maxima are written
    float* const more = exchanges + 8 * TILE_M;
    Ring<Q_STAGES> q_ring = {};
    Ring<STAGES> k_ring = {}, v_ring = {};

    // Does not use a block that was loaded.
    __device__ __forceinline__ void pass_over() {
        mbarrier_wait(buffers.barriers + K_FULL + 8 * k_ring.stage(), k_ring.phase());
        mbarrier_wait(buffers.barriers + V_FULL + 8 * v_ring.stage(), v_ring.phase());
        if (signals) {
            mbarrier_arrive(buffers.barriers + K_EMPTY + 8 * k_ring.stage());
            mbarrier_arrive(buffers.barriers + V_EMPTY + 8 * v_ring.stage());
        }
        ++k_ring.count;
        ++v_ring.count;
    }

    // Finds what the tile's split says of each row, with exponents relative to a whole number (result_offset): only in the end, since relative to its maximum
    // a row's greatest weight is 1, which rounding P leaves as it is. under_last(): what is to be done once `states` are found, before `output` is.
    template <class UnderLast>
    __device__ __forceinline__ void attend(const WorkTile& tile, int cached_keys, Output& output, RowStates<ROWS_OF_THREAD>& states, UnderLast under_last) {
        const KeyBlocks blocks = tile_blocks(args, tile, tile.first_row + WARPGROUP_ROWS * warpgroup);
        const Mask mask = tile_mask(args, tile);
        // Rounding P to 16 bits is harmless where many keys average it out. Sequences whose first query has few keys add what the rounding lost.
        const bool few_keys = mask.end(0) - mask.begin(0) <= FEW_KEYS;

        Scores scores;
#pragma unroll
        for (int i = 0; i < OUTPUT_REGISTERS; ++i) output[i] = 0.0f;
        states.reset();
        if (tile.split == tile.run_begin) await_queries(args, buffers, tile, warpgroup, cached_keys, q_ring.stage(), q_ring.phase());
        const auto start_scores = [&] {
            mbarrier_wait(buffers.barriers + K_FULL + 8 * k_ring.stage(), k_ring.phase());
            issue_scores(scores, buffers.q + q_ring.stage() * Q_BYTES + WARPGROUP_ROWS * SLAB_BYTES * warpgroup, buffers.k + k_ring.stage() * K_BYTES);
        };
        const auto start_output = [&] {
            mbarrier_wait(buffers.barriers + V_FULL + 8 * v_ring.stage(), v_ring.phase());
            issue_output(output, probs_smem, buffers.v + v_ring.stage() * V_BYTES);
            if (few_keys) issue_output(output, probs_smem + PROBS_BYTES, buffers.v + v_ring.stage() * V_BYTES);
        };
        const auto finish_output = [&] {
            wgmma_wait<0>();
            pin(output);
            if (signals) mbarrier_arrive(buffers.barriers + V_EMPTY + 8 * v_ring.stage());
            ++v_ring.count;
        };
        int block = blocks.begin;
        const auto begin_softmax = [&] {  // once the scores are there
            pin(scores);
            if (signals) mbarrier_arrive(buffers.barriers + K_EMPTY + 8 * k_ring.stage());
            ++k_ring.count;
            if (block >= blocks.full_end || block < blocks.full_begin) mask_scores(scores, mask, tile.first_row, block * TILE_N);
            find_max(scores, states, max_exchange);
        };
        const auto finish_softmax = [&] {
            exponentiate(scores, states, output, max_exchange, args.scale_log2);
            store_probs(scores, probs_smem);  // nobody reads the block's before any more: all have met in exponentiate()
            if (few_keys) {
                subtract_rounded(scores);
                store_probs(scores, probs_smem + PROBS_BYTES);
            }
            async_proxy_fence();
            named_barrier_sync(warpgroup_barrier(), 128);
        };
        if (blocks.begin < blocks.end) {  // a split may have no key that the tile sees
            start_scores();
            wgmma_wait<0>();
            begin_softmax();
            finish_softmax();
#pragma unroll 1
            for (block = blocks.rest; block < blocks.end; ++block) {
                start_scores();
                start_output();
                wgmma_wait<1>();
                begin_softmax();  // under the output of the block before
                finish_output();
                finish_softmax();
            }
            start_output();
            over_keys_of_warp(states.sum, sum_exchange, Sum());
            over_keys_of_warpgroup(states.sum, sum_exchange, Sum());
            float factor[ROWS_OF_THREAD];
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r) {
                const float shift = exponent_shift(states.max[r], args.scale_log2);
                states.max[r] = rintf(shift);
                factor[r] = exp2_approx(shift - result_offset(states.max[r], args.scale_log2));
                states.sum[r] *= factor[r];
            }
            under_last();
            finish_output();
#pragma unroll
            for (int i = 0; i < OUTPUT_REGISTERS; ++i) output[i] *= factor[output_row(i)];
        } else {
            under_last();
        }
    }

    // Writes what is the whole tile's result.
    __device__ __forceinline__ void finish(const WorkTile& tile, Output& output, const RowStates<ROWS_OF_THREAD>& states) const {
        float inverse[ROWS_OF_THREAD];
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {
            float lse;
            normalise(result_offset(states.max[r], args.scale_log2), states.sum[r], inverse[r], lse);
            const Destination to = destination(args, tile, tile_row(r));
            if (to.lse != nullptr && speaks_for_row()) *to.lse = lse;
        }
#pragma unroll
        for (int i = 0; i < OUTPUT_REGISTERS; ++i) output[i] *= inverse[output_row(i)];
        store_output(args, tile, output);
    }
};

// ---- CLUSTER: the results ----

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
        : rows((args.seqlen_q * PACK + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT),
          columns_of_rank(64 * SLABS_V >> (__ffs(cluster_size()) - 1)),  // the size is a power of two
          outs(memory), ends(reinterpret_cast<RowEnd*>(memory + RESULTS_OF_CTA * OUTPUT_REGISTERS * CONSUMER_THREADS)), states(reinterpret_cast<float2*>(ends + TILE_M)) {}
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
        store_cluster_16(to.states + 8 * tile_row(r), states.max[r], states.sum[r], states.max[r + 1], states.sum[r + 1], to.states_barrier, is_single());
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
                store_cluster_16(address, rows[0], rows[1], rows[4], rows[5], to.outs_barriers[c], is_single());
            else
                store_cluster_8(address, rows[0], rows[1], to.outs_barriers[c], is_single());
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
    expect_results(barriers, 8 * tile.splits * from.rows, 4 * tile.splits * from.rows * columns);
    // While the results are on their way, each row's factors and, by other warps, its place:
    const int other = thread - 32;
    if (other >= 0 && other < rows) from.ends[other].out = destination(args, tile, other).out + 2 * first_column;
    int pair = divide(thread, rows);
    await_results(barriers + STATES_FULL);  // also who has no row: a CTA that is sent something must not end
    if (thread < rows) {
        float shift, sum, lse;
        find_factors(from.states + thread, tile.splits, from.rows, shift, sum);
        normalise(shift, sum, from.ends[thread].inverse, lse);
        if (args.lse != nullptr && first_column == 0) *destination(args, tile, thread).lse = lse;
    }
    meet_all_consumers();
    await_results(barriers + RESULTS_FULL);
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

#include "decode.cuh"

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMER_WARPGROUPS), CTAS_PER_SM) attention_decode(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char shared[];
    const Buffers buffers(shared);
    decode(args, buffers);
}
