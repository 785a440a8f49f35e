// Attention forward for sm_90a: out = softmax(scale * Q K^T + mask) V, one pass over the keys with the online softmax
// (Milakov and Gimelshein 2018, FlashAttention: Dao et al. 2022), scheduled as FlashAttention-3 (Shah et al. 2024) proposes:
// a producer warp feeds K and V through TMA into a ring of shared-memory stages; each consumer warpgroup owns 64 query rows, keeps scores,
// P and output in registers, and has the tensor cores to itself while the others are at their softmax.
// The constants in capitals and wgmma_scores / wgmma_output come from a generated prologue (compiler.py).
#include "pipeline.cuh"
#include "rows.cuh"

constexpr int TASKS_IN_FLIGHT = 1, RESULTS_IN_FLIGHT = 4;  // of a combination (splits.cuh), as registers allow

// Where a tile has more rows than a block has keys, the diagonal hides its last block from whole warpgroups, which pass over it.
constexpr bool PASSES_HIDDEN_BLOCKS = BOUND_RIGHT && !BOUND_LEFT && !SPLIT && TILE_M > TILE_N;

// A warpgroup whose rows all lie past the sequence's end only keeps pace with the others. To ask costs a short narrow tile 3%.
constexpr bool KEEPS_PACE = !SPLIT && (CONSUMER_WARPGROUPS > 2 || HEAD_DIM_V > 64);

// Masked blocks have a loop of their own where a branch in each block costs more than the compiler needs for a second copy.
constexpr bool IS_WIDE = HEAD_DIM_V > 128, ONE_LOOP = BOUND_LEFT || IS_WIDE || SPLIT;

// The maximum is sought among the bits of floats, as integers, where that is worth a second copy of the search.
constexpr bool COMPARES_BITS = !IS_WIDE && !SPLIT;

__device__ __forceinline__ int fragment_column(int i) { return 8 * (i >> 2) + (i & 1); }
__device__ __forceinline__ int output_row(int i) { return fragment_row(i); }
__device__ __forceinline__ int tile_row(int r) {
    const int thread = threadIdx.x - 128;
    return thread / 128 * 64 + thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * r;
}

constexpr int PAIRS_OF_ROW = TILE_N / 8, PAIRS = ROWS_OF_THREAD * PAIRS_OF_ROW;  // of scores that a thread has side by side

// In ping-pong P V of the block before lasts longer than the search for the maximum: the time is filled with the scaling and the first exponentials.
constexpr int EARLY_PAIRS = !PING_PONG ? 0 : HEAD_DIM_V > 64 ? 6 : 4;

struct LargestFloat {
    __device__ __forceinline__ float operator()(float x, float y, float z) const { return fmaxf(fmaxf(x, y), z); }
};

// One instruction instead of two, and right if any of the three has a clear sign bit.
struct LargestBits {
    __device__ __forceinline__ float operator()(float x, float y, float z) const {
        return __int_as_float(__vimax3_s32(__float_as_int(x), __float_as_int(y), __float_as_int(z)));
    }
};

struct Softmax : RowStates<ROWS_OF_THREAD> {
    bool compares_bits;  // no row of the warp has a negative maximum any more
    float block_sum[2];  // of the even and the odd scores of the row that is being exponentiated

    // The larger of the maximum of row r and the thread's scores of that row. Two chains, since a single one would wait for its own latency.
    template <class Largest>
    __device__ __forceinline__ float own_max(const Scores& scores, int r, Largest largest) const {
        float even = max[r], odd = max[r];
#pragma unroll
        for (int i = 2 * r; i < TILE_N / 2; i += 8) {
            const int next = i + 4 < TILE_N / 2 ? i + 4 : i;
            even = largest(even, scores[i], scores[next]);
            odd = largest(odd, scores[i + 1], scores[next + 1]);
        }
        return fmaxf(even, odd);
    }

    // Takes a block's scores into the maximum. What was accumulated before must be multiplied by `rescale`, which is exactly 1 if it did not move.
    template <bool IS_FIRST>
    __device__ __forceinline__ void raise_max(const Scores& scores, float scale_log2, float (&rescale)[2]) {
        float raised[2];
        if (COMPARES_BITS && !IS_FIRST && compares_bits) {
#pragma unroll
            for (int r = 0; r < 2; ++r) raised[r] = own_max(scores, r, LargestBits());
        } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) raised[r] = own_max(scores, r, LargestFloat());
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            raised[r] = fmaxf(raised[r], __shfl_xor_sync(~0u, raised[r], 1));
            raised[r] = fmaxf(raised[r], __shfl_xor_sync(~0u, raised[r], 2));
            rescale[r] = rescale_factor(max[r], raised[r], scale_log2);
            max[r] = raised[r];
        }
        if (COMPARES_BITS) compares_bits = __all_sync(~0u, (__float_as_int(max[0]) | __float_as_int(max[1])) >= 0);
    }

    // Turns the block's raw scores into scale * (score - max), for exp2.
    __device__ __forceinline__ void scale(Scores& scores, float scale_log2) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float offset = exponent_offset(max[r], scale_log2);
#pragma unroll
            for (int i = 2 * r; i < TILE_N / 2; i += 4) {
                scores[i] = fmaf(scores[i], scale_log2, -offset);
                scores[i + 1] = fmaf(scores[i + 1], scale_log2, -offset);
            }
        }
    }

    // Then the thread's pairs FIRST to LAST, row after row, into probabilities, and takes them into the sums.
    template <int FIRST, int LAST>
    __device__ __forceinline__ void exponentiate(Scores& scores, const float (&rescale)[2]) {
#pragma unroll
        for (int pair = FIRST; pair < LAST; ++pair) {
            const int r = pair / PAIRS_OF_ROW, of_row = pair % PAIRS_OF_ROW, i = 4 * of_row + 2 * r;
            if (of_row == 0) block_sum[0] = block_sum[1] = 0.0f;
            scores[i] = exp2_approx(scores[i]);
            scores[i + 1] = exp2_approx(scores[i + 1]);
            block_sum[0] += scores[i];
            block_sum[1] += scores[i + 1];
            if (of_row == PAIRS_OF_ROW - 1) sum[r] = fmaf(sum[r], rescale[r], block_sum[0] + block_sum[1]);
        }
    }

    // The sums over the row's four lanes.
    __device__ __forceinline__ void reduce() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        }
    }
};

// Hides the keys that a row does not see. `first_column` is the key position of the thread's column 0.
__device__ __forceinline__ void mask_scores(Scores& scores, const Mask& mask, int row, int first_column) {
    const int begin[2] = {mask.begin(row) - first_column, mask.begin(row + 8) - first_column};
    const int end[2] = {mask.end(row) - first_column, mask.end(row + 8) - first_column};
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) {
        const int column = fragment_column(i), r = fragment_row(i);
        if (column >= end[r] || (BOUND_LEFT && column < begin[r])) scores[i] = NEGATIVE_INFINITY;
    }
}

// The descriptors of Q for the first steps of Q K^T, which a tile keeps in uniform registers: left to itself, ptxas makes each again between two MMAs.
// There is room for eight.
constexpr int QK_STEPS = (HEAD_DIM + 15) / 16, KEPT_STEPS = QK_STEPS < 8 ? QK_STEPS : 8;

struct QDescriptors {
    MatrixDescriptor<Q_SLAB> first;
    uint64_t kept[KEPT_STEPS];

    __device__ __forceinline__ explicit QDescriptors(uint32_t q_smem) : first(q_smem) {
#pragma unroll
        for (int step = 0; step < KEPT_STEPS; ++step) {
            kept[step] = first.at_step(step);
            pin(kept[step]);
        }
    }
    __device__ __forceinline__ uint64_t at(int step) const { return step < KEPT_STEPS ? kept[step] : first.at_step(step); }
};

// scores = Q K^T for the warpgroup's 64 rows of Q and one block of keys
__device__ __forceinline__ void issue_scores(Scores& scores, const QDescriptors& q, uint32_t k_smem) {
    const MatrixDescriptor<KV_SLAB> k(k_smem);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int first = 0; first < QK_STEPS; first += QK_STEPS_AT_ONCE) {
        uint64_t q_steps[QK_STEPS_AT_ONCE], k_steps[QK_STEPS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < QK_STEPS_AT_ONCE; ++i) {
            q_steps[i] = q.at(first + i);
            k_steps[i] = k.at_step(first + i);
        }
        wgmma_scores(scores, q_steps, k_steps, first > 0);
    }
    wgmma_commit();
    pin(scores);
}

__device__ __forceinline__ void scale_rows(float (&output)[HEAD_DIM_V / 2], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM_V / 2; ++i) output[i] *= factor[fragment_row(i)];
}

// Most blocks leave the maximum where it was, and a factor of 1 changes no bit. Beyond 64 columns the multiplications fit between the exponentials.
__device__ __forceinline__ void rescale_rows(float (&output)[HEAD_DIM_V / 2], const float (&factor)[2]) {
    if (HEAD_DIM_V > 64 || __any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) scale_rows(output, factor);
}

// Writes the warpgroup's 64 rows. The four lanes of a row transpose 4 x 4 words, so that each stores 16 bytes.
__device__ __forceinline__ void store_output(const float (&output)[HEAD_DIM_V / 2], const Destination (&to)[2]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int group = 0; group < (HEAD_DIM_V + 31) / 32; ++group) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = 4 * (4 * group + j) + 2 * r;
                words[j] = i < HEAD_DIM_V / 2 ? pack2(output[i], output[i + 1]) : 0;
            }
#pragma unroll
            for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
                for (int low = 0; low < 4; ++low) {
                    if (low & bit) continue;
                    const uint32_t received = __shfl_xor_sync(~0u, lane & bit ? words[low] : words[low | bit], bit);
                    if (lane & bit)
                        words[low] = received;
                    else
                        words[low | bit] = received;
                }
            }
            const int column = 32 * group + 8 * lane;
            if (to[r].out != nullptr && column < HEAD_DIM_V) store_global_16(to[r].out + 2 * column, words);
        }
    }
}

__device__ __forceinline__ void store_lse(const float (&lse)[2], const Destination (&to)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (to[r].lse != nullptr && threadIdx.x % 4 == 0) *to[r].lse = lse[r];
    }
}

__device__ __forceinline__ void store_partial(const Arguments& args, const WorkTile& tile, const float (&output)[HEAD_DIM_V / 2], const RowStates<ROWS_OF_THREAD>& states) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = tile_row(r);
        if (destination(args, tile, row).out == nullptr) continue;
        const Partial to = partial(args, tile, tile.split, row);
#pragma unroll
        for (int i = 2 * r; i < HEAD_DIM_V / 2; i += 4)
            __stcg(reinterpret_cast<float2*>(to.out + fragment_column(i) + 2 * (threadIdx.x % 4)), make_float2(output[i], output[i + 1]));
        __stcg(to.state + threadIdx.x % 4, make_float2(states.max[r], states.sum[r]));
    }
}

#include "splits.cuh"

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// One warpgroup's part of every tile that the CTA takes, with FlashAttention-3's two overlaps: inside the warpgroup, P V of one block runs under the
// mask and the maximum of the next; between warpgroups, one issues its MMAs while the others are at their softmax.
__device__ __forceinline__ void consume(const Arguments& args, int warpgroup, const Buffers& buffers) {
    float* carried = reinterpret_cast<float*>(buffers.more);  // SPLIT: [Dv / 2, consumer threads]
    const bool signals = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer that a buffer is free
    const int thread_row = tile_row(0), thread_column = 2 * (threadIdx.x % 4);
    // Ping-pong: a warpgroup issues its MMAs when its own barrier, 1 + warpgroup, lets it, and then passes the turn on.
    const int my_turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % CONSUMER_WARPGROUPS;
    if (PING_PONG && warpgroup == CONSUMER_WARPGROUPS - 1) named_barrier_arrive(next_turn, 256);

    Ring<TILE_SLOTS> slot_ring;
    Ring<Q_STAGES> q_ring;
    Ring<STAGES> k_ring, v_ring;
    RowStates<ROWS_OF_THREAD> carried_states;
    const auto await_q = [&] { mbarrier_wait(buffers.barriers + Q_FULL + 8 * q_ring.stage(), q_ring.phase()); };
    const auto await_k = [&] { mbarrier_wait(buffers.barriers + K_FULL + 8 * k_ring.stage(), k_ring.phase()); };
    const auto await_v = [&] { mbarrier_wait(buffers.barriers + V_FULL + 8 * v_ring.stage(), v_ring.phase()); };
    const auto await_turn = [&] {
        if (PING_PONG) named_barrier_sync(my_turn, 256);
    };
    const auto pass_turn = [&] {
        if (PING_PONG) named_barrier_arrive(next_turn, 256);
    };
    const auto start_scores = [&](Scores& scores, const QDescriptors& q) {
        await_k();
        await_turn();
        issue_scores(scores, q, buffers.k + k_ring.stage() * K_BYTES);
    };
    const auto start_output = [&](float (&output)[HEAD_DIM_V / 2], uint32_t (&probs)[TILE_N / 4]) {
        await_v();
        issue_output(output, probs, buffers.v + v_ring.stage() * V_BYTES);
    };
    const auto release_q = [&] {
        if (signals) mbarrier_arrive(buffers.barriers + Q_EMPTY + 8 * q_ring.stage());
        ++q_ring.count;
    };
    const auto release_k = [&] {
        if (signals) mbarrier_arrive(buffers.barriers + K_EMPTY + 8 * k_ring.stage());
        ++k_ring.count;
    };
    const auto release_v = [&] {
        if (signals) mbarrier_arrive(buffers.barriers + V_EMPTY + 8 * v_ring.stage());
        ++v_ring.count;
    };
    // Of a block that the warpgroup does not compute. A buffer is released only once it is full: before, a warp's second release in one lap would
    // stand in for a warp that still reads.
    const auto pass_over_k = [&] {
        await_k();
        await_turn();
        pass_turn();
        release_k();
    };
    const auto pass_over_v = [&] {
        await_v();
        release_v();
    };

    while (true) {
        const uint32_t slot = await_tile(buffers, slot_ring);
        const WorkTile& tile = buffers.tile_slots[slot];  // read again where it is needed, rarely, since registers are scarce
        if (tile.first_row < 0) break;
        const int own_first = tile.first_row + 64 * warpgroup;
        const KeyBlocks blocks = tile_blocks(args, tile, own_first);
        int block = blocks.end - 1;
        if (KEEPS_PACE && own_first >= tile.q_length) {
            await_q();
            release_q();
#pragma unroll 1
            for (; block >= blocks.begin; --block) {
                pass_over_k();
                pass_over_v();
            }
            release_tile(buffers, slot);
            continue;
        }

        Scores scores;
        float rescale[2];
        uint32_t probs[TILE_N / 4];
        float output[HEAD_DIM_V / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM_V / 2; ++i) output[i] = 0.0f;
        Softmax softmax;
        softmax.reset();
        float inverse[2], lse[2];
        Destination to[2];
        const auto find_end = [&] {  // of a whole tile; under its last P V, which does not need it
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                normalise(exponent_offset(softmax.max[r], args.scale_log2), softmax.sum[r], inverse[r], lse[r]);
                to[r] = destination(args, tile, thread_row + 8 * r);
            }
            pin(inverse);
            pin(lse);
        };
        const bool is_last_of_q = !SPLIT || tile.split == tile.run_end - 1;
        if (!SPLIT || tile.split == tile.run_begin) await_q();
        if (SPLIT && blocks.begin >= blocks.end) {  // a split may have no key that the tile sees
            if (is_last_of_q) release_q();
        } else {
            const QDescriptors q(buffers.q + q_ring.stage() * Q_BYTES + warpgroup * 64 * SLAB_BYTES);
            const auto hide_masked = [&] { mask_scores(scores, tile_mask(args, tile), tile.first_row + thread_row, block * TILE_N + thread_column); };
            const auto pack_probs = [&] {
#pragma unroll
                for (int i = 0; i < TILE_N / 4; ++i) probs[i] = pack2(scores[2 * i], scores[2 * i + 1]);
            };
            const auto finish_output = [&] {
                wgmma_wait<0>();
                pin(output);
                pin(probs);
            };

            // Hidden keys add exact zeros, so leaving them out changes no bit.
            const bool passes = PASSES_HIDDEN_BLOCKS && block > blocks.begin && blocks.own_end <= block * TILE_N;
            if (passes) {
                pass_over_k();
                --block;
            }
            start_scores(scores, q);
            pass_turn();
            if (passes) pass_over_v();
            wgmma_wait<0>();
            pin(scores);
            release_k();
            if (block == blocks.begin && is_last_of_q) release_q();
            if (block >= blocks.full_end || block < blocks.full_begin) hide_masked();
            softmax.raise_max<true>(scores, args.scale_log2, rescale);
            softmax.scale(scores, args.scale_log2);
            softmax.exponentiate<0, PAIRS>(scores, rescale);
            pack_probs();

            const auto step = [&](auto masked) {
                if (IS_WIDE) await_v();  // so that nothing comes between the two products; with shorter ones the first had better start at once
                start_scores(scores, q);
                if (!PING_PONG) rescale_rows(output, rescale);
                if (!IS_WIDE) await_v();
                issue_output(output, probs, buffers.v + v_ring.stage() * V_BYTES);
                pass_turn();
                wgmma_wait<1>();
                pin(scores);
                release_k();
                if constexpr (BOUND_RIGHT && ONE_LOOP) {
                    if (block >= blocks.full_end || (BOUND_LEFT && block < blocks.full_begin)) hide_masked();
                } else if constexpr (decltype(masked)::value) {
                    hide_masked();
                }
                softmax.raise_max<false>(scores, args.scale_log2, rescale);
                if (PING_PONG) softmax.scale(scores, args.scale_log2);
                softmax.exponentiate<0, EARLY_PAIRS>(scores, rescale);
                // This branch also keeps ptxas from moving the wait for P V up, over the maximum. What comes after the wait may be interleaved.
                if (block == blocks.begin && is_last_of_q) release_q();
                finish_output();
                release_v();
                if (PING_PONG) rescale_rows(output, rescale);
                if (!PING_PONG) softmax.scale(scores, args.scale_log2);
                softmax.exponentiate<EARLY_PAIRS, PAIRS>(scores, rescale);
                pack_probs();
            };
            --block;
            if constexpr (BOUND_RIGHT && !ONE_LOOP)
                for (; block >= max(blocks.begin, blocks.full_end); --block) step(Constant<1>{});
            for (; block >= blocks.begin; --block) step(Constant<0>{});

            if (!PING_PONG) rescale_rows(output, rescale);
            // Rounding P to 16 bits is harmless where many keys average it out. Rows with few keys add what the rounding lost in their last block,
            // which holds all their keys unless a window makes them straddle two.
            const Mask mask = tile_mask(args, tile);
            const bool few_keys = mask.end(own_first) - mask.begin(own_first) <= FEW_KEYS;
            const auto pack_lost = [&] {
#pragma unroll
                for (int i = 0; i < TILE_N / 4; ++i) {
                    float low, high;
                    unpack2(probs[i], low, high);
                    probs[i] = pack2(scores[2 * i] - low, scores[2 * i + 1] - high);
                }
            };
            if constexpr (SPLIT) {
#pragma unroll 1
                for (int part = 0; part <= few_keys; ++part) {  // one P V less to compile
                    if (part > 0) pack_lost();
                    start_output(output, probs);
                    finish_output();
                }
                softmax.reduce();
            } else {
                start_output(output, probs);
                softmax.reduce();
                find_end();
                finish_output();
                if (few_keys) {
                    pack_lost();
                    start_output(output, probs);
                    finish_output();
                }
            }
            release_v();
        }

        bool is_done = true;
        if constexpr (SPLIT) {
            if (tile.splits > 1) is_done = join_splits(args, tile, warpgroup, output, softmax, carried, carried_states, buffers.is_last);
            if (is_done) find_end();
        }
        if (is_done) {
            scale_rows(output, inverse);
            release_tile(buffers, slot);
            store_output(output, to);
            store_lse(lse, to);
        } else {
            release_tile(buffers, slot);
        }
    }
    if (warpgroup == 0) await_turn();  // takes up the last turn, which nobody else would
}

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMER_WARPGROUPS), CTAS_PER_SM) attention_forward(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) char shared[];
    const Buffers buffers(shared);
    run(args, buffers, [&](int warpgroup) { consume(args, warpgroup, buffers); });
}
