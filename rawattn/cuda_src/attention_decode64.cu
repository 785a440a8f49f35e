// Attention of 33 to 64 rows of a KV head to many keys, for sm_90a. The rows fill the 64 that WGMMA has, so the products are S = Q K^T and O = P V, with P
// in registers; a row's maximum is sought in four lanes, and no thread does it for others. Each of two consumer warpgroups has all rows and every second
// block of a split, so that one is at its softmax while the other multiplies; in the end they take their halves together and share out the columns.
// The constants in capitals and wgmma_scores / wgmma_output come from a generated prologue (compiler.py).
#include "pipeline.cuh"
#include "rows.cuh"

// Of 16 columns, a unit, a thread has eight registers.
constexpr int UNITS = (HEAD_DIM_V + 15) / 16, OWN_UNITS = (UNITS + 1) / 2;  // of the output, and of those a warpgroup's in the end
constexpr int OUTPUT_REGISTERS = 8 * OWN_UNITS, QK_STEPS = (HEAD_DIM + 15) / 16;
constexpr int TASKS_IN_FLIGHT = 2, RESULTS_IN_FLIGHT = 6;  // of a combination (splits.cuh), as registers allow

__device__ __forceinline__ int fragment_column(int i) { return 8 * (i / 4) + 2 * (threadIdx.x % 4) + i % 2; }
__device__ __forceinline__ int output_row(int i) { return fragment_row(i); }
__device__ __forceinline__ int own_warpgroup() { return threadIdx.x / 128 - 1; }
__device__ __forceinline__ int output_column(int i) { return 16 * OWN_UNITS * own_warpgroup() + fragment_column(i); }
__device__ __forceinline__ int tile_row(int r) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }
__device__ __forceinline__ void meet_all_consumers() { named_barrier_sync(1, CONSUMER_THREADS); }
__device__ __forceinline__ void meet_readers_of_q() { meet_all_consumers(); }

using Output = float[OUTPUT_REGISTERS];  // of a warpgroup's columns
using WholeOutput = float[HEAD_DIM_V / 2];

// scores = Q K^T for one block of keys
__device__ __forceinline__ void issue_scores(Scores& scores, uint32_t q_smem, uint32_t k_smem) {
    const MatrixDescriptor<Q_SLAB> q(q_smem);
    const MatrixDescriptor<KV_SLAB> k(k_smem);
    uint64_t q_steps[QK_STEPS], k_steps[QK_STEPS];
#pragma unroll
    for (int step = 0; step < QK_STEPS; ++step) {
        q_steps[step] = q.at_step(step);
        k_steps[step] = k.at_step(step);
    }
    pin(scores);
    wgmma_fence();
    wgmma_scores(scores, q_steps, k_steps, 0);
    wgmma_commit();
    pin(scores);
}

__device__ __forceinline__ void mask_scores(Scores& scores, const Mask& mask, int first_row, int first_key) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        const int begin = mask.begin(first_row + tile_row(r)) - first_key, end = mask.end(first_row + tile_row(r)) - first_key;
#pragma unroll
        for (int i = 2 * r; i < TILE_N / 2; i += 4) {
#pragma unroll
            for (int j = i; j < i + 2; ++j) {
                if (fragment_column(j) >= end || (BOUND_LEFT && fragment_column(j) < begin)) scores[j] = NEGATIVE_INFINITY;
            }
        }
    }
}

// The larger of a row's maximum and its raw scores, in all four lanes.
__device__ __forceinline__ float raised_max(const Scores& scores, float max, int r) {
#pragma unroll
    for (int i = 2 * r; i < TILE_N / 2; i += 4) max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
    max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
    return fmaxf(max, __shfl_xor_sync(~0u, max, 2));
}

__device__ __forceinline__ float sum_of_row(float sum) {
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
}

// Of each row the two columns of a lane side by side.
template <class Store>
__device__ __forceinline__ void for_each_pair(int r, Store store) {
#pragma unroll
    for (int i = 2 * r; i < OUTPUT_REGISTERS; i += 4) {
        if (output_column(i) < HEAD_DIM_V) store(i, output_column(i));
    }
}

__device__ __forceinline__ void store_partial(const Arguments& args, const WorkTile& tile, const Output& output, const RowStates<ROWS_OF_THREAD>& states) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        if (destination(args, tile, tile_row(r)).out == nullptr) continue;
        const Partial to = partial(args, tile, tile.split, tile_row(r));
        for_each_pair(r, [&](int i, int column) { __stcg(reinterpret_cast<float2*>(to.out + column), make_float2(output[i], output[i + 1])); });
        __stcg(to.state + threadIdx.x % 4, make_float2(states.max[r], states.sum[r]));  // both warpgroups the same
    }
}

#include "splits.cuh"
#include "cluster.cuh"
#include "queries.cuh"

// A warpgroup that computes its share of one split after the other.
struct Consumer {
    const Arguments& args;
    const Buffers& buffers;
    const int warpgroup;
    const bool signals = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer that a buffer is free
    float4* const exchange = reinterpret_cast<float4*>(buffers.more);  // [2, OUTPUT_REGISTERS / 4, 128], what a warpgroup gives the other
    float2* const exchanged_states = reinterpret_cast<float2*>(exchange + OUTPUT_REGISTERS / 4 * CONSUMER_THREADS);  // [2, TILE_M]
    float* const more = reinterpret_cast<float*>(exchanged_states + 2 * TILE_M);
    Ring<Q_STAGES> q_ring = {};
    struct Blocks {  // of K or V, that the warpgroup uses
        uint32_t count;       // of blocks before the one to come, the other warpgroup's too
        uint32_t phases = 0;  // of the warpgroup's barriers, a bit for each
        __device__ __forceinline__ uint32_t stage() const { return count % STAGES; }
        __device__ __forceinline__ void await(uint32_t barriers) const { mbarrier_wait(barriers + 8 * stage(), phases >> stage() & 1); }
        __device__ __forceinline__ void release(uint32_t barriers, bool signals) {
            if (signals) mbarrier_arrive(barriers + 8 * stage());
            phases ^= 1 << stage();
        }
    };
    const uint32_t own_barriers = buffers.barriers + SECOND * warpgroup;
    Blocks k_blocks = {uint32_t(warpgroup)}, v_blocks = k_blocks;

    // Does not use a block that was loaded.
    __device__ __forceinline__ void pass_over() {
        if (warpgroup == 0) {
            k_blocks.await(own_barriers + K_FULL);
            v_blocks.await(own_barriers + V_FULL);
            k_blocks.release(buffers.barriers + K_EMPTY, signals);
            v_blocks.release(buffers.barriers + V_EMPTY, signals);
        }
        ++k_blocks.count;
        ++v_blocks.count;
    }

    // Finds what the tile's split says of each row, `output` for the warpgroup's columns, with exponents relative to a whole number (result_offset).
    // under_last(): what is to be done once `states` are found, before `output` is.
    template <class UnderLast>
    __device__ __forceinline__ void attend(const WorkTile& tile, int cached_keys, Output& output, RowStates<ROWS_OF_THREAD>& states, UnderLast under_last) {
        const KeyBlocks blocks = tile_blocks(args, tile, tile.first_row);
        const Mask mask = tile_mask(args, tile);
        const int count = blocks.begin < blocks.end ? 1 + max(0, blocks.end - blocks.rest) : 0;
        // Rounding P to 16 bits is harmless where many keys average it out. Sequences whose first query has few keys add what the rounding lost.
        const bool few_keys = mask.end(0) - mask.begin(0) <= FEW_KEYS;

        Scores scores;
        uint32_t probs[TILE_N / 4];
        WholeOutput whole;
#pragma unroll
        for (int i = 0; i < HEAD_DIM_V / 2; ++i) whole[i] = 0.0f;
        states.reset();
        float rescale[ROWS_OF_THREAD];
        if (tile.split == tile.run_begin) await_queries(args, buffers, tile, warpgroup, cached_keys, q_ring.stage(), q_ring.phase());

        int number = warpgroup;  // of the block among the split's
        const uint32_t end = k_blocks.count + count;
        const auto start_scores = [&] {
            k_blocks.await(own_barriers + K_FULL);
            issue_scores(scores, buffers.q + q_ring.stage() * Q_BYTES, buffers.k + k_blocks.stage() * K_BYTES);
        };
        const auto start_output = [&] {
            v_blocks.await(own_barriers + V_FULL);
            issue_output(whole, probs, buffers.v + v_blocks.stage() * V_BYTES);
        };
        const auto await_output = [&] {
            wgmma_wait<0>();
            pin(whole);
            pin(probs);
        };
        const auto release_v = [&] {
            v_blocks.release(buffers.barriers + V_EMPTY, signals);
            v_blocks.count += 2;
        };
        const auto begin_softmax = [&] {  // once the scores are there
            pin(scores);
            k_blocks.release(buffers.barriers + K_EMPTY, signals);
            k_blocks.count += 2;
            const int block = number == 0 ? blocks.begin : blocks.rest + number - 1;
            if (block >= blocks.full_end || block < blocks.full_begin) mask_scores(scores, mask, tile.first_row, block * TILE_N);
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r) {
                const float max = raised_max(scores, states.max[r], r), offset = exponent_offset(max, args.scale_log2);
                rescale[r] = exp2_approx(exponent_shift(states.max[r], args.scale_log2) - offset);  // 1 if it did not move; 0 changes nothing before the first key
                states.max[r] = max;
                states.sum[r] *= rescale[r];
#pragma unroll
                for (int i = 2 * r; i < TILE_N / 2; i += 4) {
#pragma unroll
                    for (int j = i; j < i + 2; ++j) {
                        scores[j] = exp2_approx(fmaf(scores[j], args.scale_log2, -offset));
                        states.sum[r] += scores[j];
                    }
                }
            }
        };
        const auto finish_softmax = [&] {  // once the output of the block before is there
#pragma unroll
            for (int i = 0; i < HEAD_DIM_V / 2; ++i) whole[i] *= rescale[fragment_row(i)];
#pragma unroll
            for (int i = 0; i < TILE_N / 4; ++i) probs[i] = pack2(scores[2 * i], scores[2 * i + 1]);
        };
        if (number < count) {
            start_scores();
            wgmma_wait<0>();
            begin_softmax();
            finish_softmax();
#pragma unroll 1
            for (number += 2; number < count; number += 2) {
                start_scores();
                start_output();
                wgmma_wait<1>();
                begin_softmax();  // under the output of the block before
                await_output();
                release_v();
                finish_softmax();
            }
#pragma unroll 1
            for (int part = 0; part <= few_keys; ++part) {
                if (part > 0) {
#pragma unroll
                    for (int i = 0; i < TILE_N / 4; ++i) {
                        float low, high;
                        unpack2(probs[i], low, high);
                        probs[i] = pack2(scores[2 * i] - low, scores[2 * i + 1] - high);
                    }
                }
                start_output();
                await_output();
            }
            release_v();
        }
        k_blocks.count = v_blocks.count = end;

        // Both warpgroups find the states of all rows, in the same way.
        meet_all_consumers();  // what was exchanged before is read
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {
            const float shift = states.max[r] == NEGATIVE_INFINITY ? NEGATIVE_INFINITY : exponent_shift(states.max[r], args.scale_log2), sum = sum_of_row(states.sum[r]);
            if (threadIdx.x % 4 == 0) exchanged_states[TILE_M * warpgroup + tile_row(r)] = make_float2(shift, sum);
        }
        const auto of_whole = [&](int i) { return i < HEAD_DIM_V / 2 ? whole[i] : 0.0f; };
        const auto part = [&](bool of_first, int i) { return of_first ? of_whole(i) : of_whole(OUTPUT_REGISTERS + i); };
#pragma unroll
        for (int i = 0; i < OUTPUT_REGISTERS; i += 4) {
            const bool gives_first = warpgroup == 1;
            exchange[(OUTPUT_REGISTERS / 4 * warpgroup + i / 4) * 128 + threadIdx.x % 128] =
                make_float4(part(gives_first, i), part(gives_first, i + 1), part(gives_first, i + 2), part(gives_first, i + 3));
        }
        meet_all_consumers();
        float own_factor[ROWS_OF_THREAD], other_factor[ROWS_OF_THREAD];
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {
            const float2 first = exchanged_states[tile_row(r)], second = exchanged_states[TILE_M + tile_row(r)];
            states.max[r] = rintf(fmaxf(first.x, second.x));
            const float offset = result_offset(states.max[r], args.scale_log2), first_factor = exp2_approx(first.x - offset), second_factor = exp2_approx(second.x - offset);
            states.sum[r] = Fold::of(first.y, first_factor, second.y, second_factor);
            own_factor[r] = warpgroup == 0 ? first_factor : second_factor;
            other_factor[r] = warpgroup == 0 ? second_factor : first_factor;
        }
        under_last();
#pragma unroll
        for (int i = 0; i < OUTPUT_REGISTERS; i += 4) {
            const float4 given = exchange[(OUTPUT_REGISTERS / 4 * (1 - warpgroup) + i / 4) * 128 + threadIdx.x % 128];
            const float others[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int r = fragment_row(j);
                const float own = __fmul_rn(part(warpgroup == 0, i + j), own_factor[r]), other = __fmul_rn(others[j], other_factor[r]);
                output[i + j] = __fadd_rn(own, other);  // the same whoever has it
            }
        }
    }

    // Writes what is the whole tile's result.
    __device__ __forceinline__ void finish(const WorkTile& tile, Output& output, const RowStates<ROWS_OF_THREAD>& states) const {
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {
            float inverse, lse;
            normalise(result_offset(states.max[r], args.scale_log2), states.sum[r], inverse, lse);
            const Destination to = destination(args, tile, tile_row(r));
            if (to.out == nullptr) continue;
            for_each_pair(r, [&](int i, int column) { store_global_4(to.out + 2 * column, pack2(output[i] * inverse, output[i + 1] * inverse)); });
            if (to.lse != nullptr && threadIdx.x % 4 == 0 && warpgroup == 0) *to.lse = lse;
        }
    }
};

// ---- CLUSTER: the results ----

constexpr int PLACED_COLUMNS = 16 * UNITS;

// Where the CTAs send what they found: each combines some of the rows. Of a unit a lane's four columns are side by side.
struct ResultBuffers {
    int rows;          // of the tile
    int rows_of_rank;  // of all CTAs as many, in the last ones perhaps some beyond the end
    float* outs;       // [splits, rows_of_rank, PLACED_COLUMNS]
    float2* states;    // [splits, rows_of_rank]: what the exponents are relative to, and the sum

    __device__ __forceinline__ ResultBuffers(const Arguments& args, float* memory)
        : rows(args.seqlen_q * PACK), rows_of_rank(TILE_M >> (__ffs(cluster_size()) - 1)),  // the size is a power of two
          outs(memory), states(reinterpret_cast<float2*>(memory + RESULTS_OF_CTA * TILE_M * PLACED_COLUMNS)) {}
};

// Where a thread sends its part of a split's result. `outs` and `states` are at the same place in each CTA.
struct ResultAddresses {
    uint32_t outs[ROWS_OF_THREAD], outs_barriers[ROWS_OF_THREAD], states[ROWS_OF_THREAD], states_barriers[ROWS_OF_THREAD];

    __device__ __forceinline__ ResultAddresses(const ResultBuffers& to, uint32_t barriers) {
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {
            const int rank = tile_row(r) / to.rows_of_rank, row = cluster_rank() * to.rows_of_rank + tile_row(r) % to.rows_of_rank;
            outs[r] = shared_address_of(shared_address(to.outs), rank) + 4 * (row * PLACED_COLUMNS + 16 * OWN_UNITS * own_warpgroup() + 4 * (threadIdx.x % 4));
            states[r] = shared_address_of(shared_address(to.states), rank) + 8 * row;
            outs_barriers[r] = shared_address_of(barriers + RESULTS_FULL, rank);
            states_barriers[r] = shared_address_of(barriers + STATES_FULL, rank);
        }
    }

    __device__ __forceinline__ void go_to_next_split(const ResultBuffers&) {
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) {  // rows_of_rank for each CTA
            outs[r] += 4 * TILE_M * PLACED_COLUMNS;
            states[r] += 8 * TILE_M;
        }
    }
};

__device__ __forceinline__ void send_states(const ResultAddresses& to, const ResultBuffers& buffers, const RowStates<ROWS_OF_THREAD>& states) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        if (tile_row(r) < buffers.rows && own_warpgroup() == 0 && threadIdx.x % 4 == 0)
            store_cluster_8(to.states[r], states.max[r], states.sum[r], to.states_barriers[r], is_single());
    }
}

__device__ __forceinline__ void send_output(const ResultAddresses& to, const ResultBuffers& buffers, const Output& output) {
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r) {
        if (tile_row(r) >= buffers.rows) continue;
#pragma unroll
        for (int unit = 0; unit < OWN_UNITS; ++unit) {
            const float* columns = output + 8 * unit + 2 * r;
            if (OWN_UNITS * own_warpgroup() + unit < UNITS)
                store_cluster_16(to.outs[r] + 64 * unit, columns[0], columns[1], columns[4], columns[5], to.outs_barriers[r], is_single());
        }
    }
}

constexpr int AT_ONCE = 4;  // of the splits' results that a thread loads

// Takes the results of all splits together in their order, and writes this CTA's rows of the output. As what a result is to be multiplied by is a power of
// two, these are the bits that carrying the results on from one to the next gives (join_splits).
__device__ __forceinline__ void combine_splits(const Arguments& args, const WorkTile& tile, const ResultBuffers& from, uint32_t barriers) {
    constexpr int TASKS_OF_ROW = 4 * UNITS;  // four columns each
    const int first_row = cluster_rank() * from.rows_of_rank, rows = max(0, min(from.rows_of_rank, from.rows - first_row)), thread = threadIdx.x - 128;
    expect_results(barriers, 8 * tile.splits * rows, 4 * tile.splits * rows * PLACED_COLUMNS);
    await_results(barriers + STATES_FULL);  // also who has no row: a CTA that is sent something must not end
    await_results(barriers + RESULTS_FULL);
#pragma unroll 1
    for (int task = thread; task < rows * TASKS_OF_ROW; task += CONSUMER_THREADS) {
        const int row = task / TASKS_OF_ROW, place = 4 * (task % TASKS_OF_ROW), column = place / 16 * 16 + place % 16 / 2;
        const float2* states = from.states + row;
        const float* outs = from.outs + row * PLACED_COLUMNS + place;
        float shift = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll 1
        for (int first = 0; first < tile.splits; first += AT_ONCE) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) shift = fmaxf(shift, first + i < tile.splits ? states[(first + i) * from.rows_of_rank].x : NEGATIVE_INFINITY);
        }
        float output[4] = {};
#pragma unroll 1
        for (int first = 0; first < tile.splits; first += AT_ONCE) {
            float2 state[AT_ONCE];
            float4 out[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const bool is_one = first + i < tile.splits;
                const int of_split = (first + i) * from.rows_of_rank;
                state[i] = is_one ? states[of_split] : make_float2(NEGATIVE_INFINITY, 0.0f);
                out[i] = is_one ? *reinterpret_cast<const float4*>(outs + of_split * PLACED_COLUMNS) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const float factor = power_of_two(state[i].x - shift);
                sum = fmaf(state[i].y, factor, sum);
                output[0] = fmaf(out[i].x, factor, output[0]);
                output[1] = fmaf(out[i].y, factor, output[1]);
                output[2] = fmaf(out[i].z, factor, output[2]);
                output[3] = fmaf(out[i].w, factor, output[3]);
            }
        }
        float inverse, lse;
        normalise(result_offset(shift, args.scale_log2), sum, inverse, lse);
        const Destination to = destination(args, tile, first_row + row);
        store_global_4(to.out + 2 * column, pack2(output[0] * inverse, output[1] * inverse));
        if (column + 8 < HEAD_DIM_V) store_global_4(to.out + 2 * column + 16, pack2(output[2] * inverse, output[3] * inverse));
        if (to.lse != nullptr && place == 0) *to.lse = lse;
    }
}

#include "decode.cuh"

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMER_WARPGROUPS), CTAS_PER_SM) attention_decode64(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char shared[];
    const Buffers buffers(shared);
    decode(args, buffers);
}
