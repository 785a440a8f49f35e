// Attention of few queries, up to 64 rows of a KV head, to many keys, for sm_90a. The products are transposed, S^T = K Q^T and O^T = V^T P^T: keys, and
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

// Rotates the warpgroup's rows of Q where they lie in shared memory, once they are there.
__device__ __forceinline__ void rotate_queries(const Arguments& args, const WorkTile& tile, int warpgroup, int cached_keys, uint32_t q_smem, uint32_t q_full, uint32_t phase) {
    const Rotary& rotary = args.append.rotary;
    const int first_row = WARPGROUP_ROWS * warpgroup, tasks_of_row = rotary.dim / (rotary.interleaved ? 8 : 16);
    for (int task = threadIdx.x % 128; task < min(WARPGROUP_ROWS, existing_rows(tile) - first_row) * tasks_of_row; task += 128) {
        const int row = divide(task, tasks_of_row), column = 8 * (task - row * tasks_of_row), query = (tile.first_row + first_row + row) / PACK;
        const Angles angles = rotary.angles(cached_keys + (rotary.query_advances ? query : 0), column);
        const auto address = [&](int column) { return q_smem + column / 64 * Q_SLAB + row * SLAB_BYTES + (column % 64 / 8 ^ row % 8) * 16; };
        Chunk<4> own, partner = {};
        mbarrier_wait(q_full, phase);
        load_shared_16(address(column), own.words);
        if (!rotary.interleaved) load_shared_16(address(column + rotary.dim / 2), partner.words);
        rotary.turn(own, partner, angles);
        store_shared_16(address(column), own.words);
        if (!rotary.interleaved) store_shared_16(address(column + rotary.dim / 2), partner.words);
    }
    async_proxy_fence();
    named_barrier_sync(warpgroup_barrier(), 128);
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

#include "splits.cuh"
#include "cluster.cuh"

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
        const uint32_t q_smem = buffers.q + q_ring.stage() * Q_BYTES + WARPGROUP_ROWS * SLAB_BYTES * warpgroup;
        if (tile.split == tile.run_begin) {
            const uint32_t q_full = buffers.barriers + Q_FULL + 8 * q_ring.stage();
            if (args.append.rotary.dim > 0) rotate_queries(args, tile, warpgroup, cached_keys, q_smem, q_full, q_ring.phase());
            mbarrier_wait(q_full, q_ring.phase());
        }
        const auto start_scores = [&] {
            mbarrier_wait(buffers.barriers + K_FULL + 8 * k_ring.stage(), k_ring.phase());
            issue_scores(scores, q_smem, buffers.k + k_ring.stage() * K_BYTES);
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

// Computes what the list of splits says.
__device__ __forceinline__ void consume(const Arguments& args, const Buffers& buffers, int warpgroup) {
    Consumer consumer = {args, buffers, warpgroup};
    float* carried = consumer.more;  // [OUTPUT_REGISTERS, CONSUMER_THREADS]
    RowStates<ROWS_OF_THREAD> carried_states;
    Ring<TILE_SLOTS> slot_ring;
    while (true) {
        const uint32_t slot = slot_ring.stage();
        mbarrier_wait(buffers.barriers + TILE_FULL + 8 * slot, slot_ring.phase());
        ++slot_ring.count;
        const WorkTile& tile = buffers.tile_slots[slot];
        if (tile.first_row < 0) break;
        Output output;
        RowStates<ROWS_OF_THREAD> states;
        consumer.attend(tile, args.append.rotary.dim > 0 ? cached_keys(args, tile.batch) : 0, output, states, [] {});
        if (tile.split == tile.run_end - 1) {
            if (consumer.signals) mbarrier_arrive(buffers.barriers + Q_EMPTY + 8 * consumer.q_ring.stage());
            ++consumer.q_ring.count;
        }
        if (tile.splits == 1 || join_splits(args, tile, warpgroup, output, states, carried, carried_states, buffers.is_last)) consumer.finish(tile, output, states);
        __syncwarp();
        if (consumer.signals) mbarrier_arrive(buffers.barriers + TILE_EMPTY + 8 * slot);
    }
}

// CLUSTER: computes the splits of this CTA, and then its columns of what they are together.
__device__ __forceinline__ void consume_splits(const Arguments& args, const Buffers& buffers, int warpgroup, int cached_keys) {
    Consumer consumer = {args, buffers, warpgroup};
    const ResultBuffers results(args, consumer.more);
    ResultAddresses addresses(results, buffers.barriers);
    cluster_wait();  // from here on the barriers are there, and results may be sent to all
    const int query = threadIdx.x - 128;
    if (args.append.rotary.dim > 0 && query < args.seqlen_q) args.append.rotary.prefetch(cached_keys + query);  // rotate_queries() wants it
    WorkTile tile = first_split(args, cached_keys);
    if (args.loads_ahead != 0 && !is_as_loaded(args, tile, tile_blocks(args, tile, tile.first_row))) consumer.pass_over();
    for (; tile.split < tile.splits; go_to_next_split(tile)) {
        Output output;
        RowStates<ROWS_OF_THREAD> states;
        consumer.attend(tile, cached_keys, output, states, [&] {
            if (tile.splits > 1) send_states(addresses, results, states);
        });
        if (tile.splits == 1) return consumer.finish(tile, output, states);
        send_output(addresses, results, output);
        addresses.go_to_next_split(results);
    }
    if (tile.splits > 1) combine_splits(args, tile, results, buffers.barriers);
}

// What the start waits for is shared out: two warps make the barriers and ask for the first keys, the others ask for the length meanwhile.
__device__ __forceinline__ void run_cluster(const Arguments& args, const Buffers& buffers) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 1 || warp == 2) return start_loads(args, buffers, warp == 2);
    const int cached = cached_keys(args, blockIdx.z);
    cluster_arrive();
    if (warp >= 4) {
        consume_splits(args, buffers, warp / 4 - 1, cached);
    } else if (warp == 0) {
        cluster_wait();
        produce_splits(args, buffers, cached);
    } else if (args.append.k.data != nullptr) {
        append_for_cta(args, buffers, cached);
    }
}

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMER_WARPGROUPS), CTAS_PER_SM) attention_decode(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char shared[];
    const Buffers buffers(shared);
    if constexpr (CLUSTER)
        run_cluster(args, buffers);
    else
        run(args, buffers, [&](int warpgroup) { consume(args, buffers, warpgroup); });
}
