// Attention forward for sm_90a: out = softmax(scale * Q K^T + mask) V, one pass over the keys with the online softmax
// (Milakov and Gimelshein 2018, FlashAttention: Dao et al. 2022), scheduled as FlashAttention-3 (Shah et al. 2024) proposes:
// a producer warp feeds K and V through TMA into a ring of shared-memory stages; each consumer warpgroup owns 64 query rows, keeps scores,
// P and output in registers, and has the tensor cores to itself while the others are at their softmax.
// The constants in capitals and wgmma_scores / wgmma_output come from a generated prologue (compiler.py).
#include "ptx.cuh"
#include "scheduler.cuh"
#include "mask.cuh"
#include "softmax.cuh"

struct Arguments {
    TensorMap q;              // boxes of [TILE_M, 64] of [B, Sq, Hq, D] or [Tq, Hq, D]
    TensorMap k;              // boxes of [TILE_N, 64] of [B, Sk, Hkv, D] or [Tk, Hkv, D]
    TensorMap v;              // boxes of [TILE_N, 64] of [B, Sk, Hkv, Dv] or [Tk, Hkv, Dv]
    char* out;                // [B, Sq, Hq, Dv] or [Tq, Hq, Dv], 16-bit elements
    float* lse;               // [B, Hq, Sq] or [Hq, Tq], or null
    int* next_tile;           // [1], zero before and after a launch: tiles that CTAs have asked for beyond their first
    const int* cu_seqlens_q;  // [B + 1], varlen only
    const int* cu_seqlens_k;  // [B + 1], varlen only
    long long out_batch_stride, out_row_stride, out_head_stride;  // bytes; where sequences are packed, the batch strides are 0
    long long lse_batch_stride;                                   // elements
    int batch, heads;                                             // B, Hq
    int seqlen_q, seqlen_k;                                       // Sq, Sk, or the totals Tq, Tk
    int left, right;                                              // window around the diagonal
    int bottom_right;                                             // the diagonal ends at the last key (1) or starts at the first (0)
    int heads_per_group;                                          // heads whose K and V share L2
    float scale_log2;                                             // softmax scale * log2(e)
};

constexpr int SLAB_BYTES = 128;  // a row of a slab: 64 columns of 16 bits, one period of the 128-byte swizzle
constexpr int SLABS_QK = (HEAD_DIM + 63) / 64, SLABS_V = (HEAD_DIM_V + 63) / 64;
constexpr int Q_SLAB = TILE_M * SLAB_BYTES, KV_SLAB = TILE_N * SLAB_BYTES;
constexpr int Q_BYTES = SLABS_QK * Q_SLAB, K_BYTES = SLABS_QK * KV_SLAB, V_BYTES = SLABS_V * KV_SLAB;
constexpr int TILE_SLOTS = 4;  // tiles that a CTA has in hand: those that it finishes, computes and loads, rounded up to a cheap modulus
constexpr int CONSUMER_WARPS = 4 * CONSUMER_WARPGROUPS;
constexpr int FEW_KEYS = 128;  // rows that see no more than this keep P of their last block in two parts

// Byte offsets of the mbarriers in shared memory, one full and one empty for each buffer.
constexpr int Q_FULL = 0, Q_EMPTY = 8 * Q_STAGES, K_FULL = 16 * Q_STAGES, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
constexpr int TILE_FULL = V_EMPTY + 8 * STAGES, TILE_EMPTY = TILE_FULL + 8 * TILE_SLOTS;
constexpr int BARRIER_BYTES = TILE_EMPTY + 8 * TILE_SLOTS;

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// Position in a ring of buffers. A consumer waits for phase(), the producer for the opposite one, so that its first lap passes at once.
template <int BUFFERS>
struct Ring {
    uint32_t count = 0;
    __device__ __forceinline__ uint32_t stage() const { return count % BUFFERS; }
    __device__ __forceinline__ uint32_t phase() const { return count / BUFFERS & 1; }
};

// One output tile: TILE_M rows of one head of one sequence. Where the sequences are packed, the maps' row dimension ends at the last row of
// the tensor and the offset dimension slides it, so that row `total - length + i` at offset `start + length` is row i of the sequence and
// everything past its end is out of bounds: TMA fills zeros, and a neighbour's rows, NaN or not, are never read.
struct WorkTile {
    int first_row, head, batch;  // first_row -1: there is no tile left
    int q_start, q_length, q_row, q_offset;
    int k_length, k_row, k_offset;
};

// The list of all tiles of a call, which a whole warp reads in rising order.
struct TileList {
    int first_batch = 0, tiles_before = 0;  // varlen: the 32 sequences that the warp looks at, and the tiles of all earlier ones

    // Writes the tile at `index`. Once there is none, tiles_before is the length of the list.
    __device__ __forceinline__ void find(const Arguments& args, int index, WorkTile& tile) {
        const int lane = threadIdx.x % 32;
        if constexpr (!VARLEN) {
            const int m_blocks = (args.seqlen_q + TILE_M - 1) / TILE_M, heads = args.heads * args.batch;
            tiles_before = m_blocks * heads;
            const TilePlace place = tile_place(min(index, tiles_before - 1), m_blocks, heads, args.heads_per_group);
            const int batch = place.head / args.heads, first_row = index < tiles_before ? place.m_block * TILE_M : -1;
            if (lane == 0) tile = {first_row, place.head - batch * args.heads, batch, 0, args.seqlen_q, 0, 0, args.seqlen_k, 0, 0};
        } else {
            for (; first_batch < args.batch; first_batch += 32) {
                const int batch = first_batch + lane;
                const int q_start = batch < args.batch ? args.cu_seqlens_q[batch] : 0;
                const int q_length = batch < args.batch ? max(0, args.cu_seqlens_q[batch + 1] - q_start) : 0;
                const int tiles = (q_length + TILE_M - 1) / TILE_M * args.heads;
                int tiles_through = tiles;  // inclusive scan over the lanes
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int below = __shfl_up_sync(~0u, tiles_through, distance);
                    if (lane >= distance) tiles_through += below;
                }
                const uint32_t beyond = __ballot_sync(~0u, tiles_before + tiles_through > index);
                if (beyond != 0) {
                    if (lane == __ffs(beyond) - 1) {  // the tile is one of this lane's sequence
                        const TilePlace place =
                            tile_place(index - tiles_before - (tiles_through - tiles), (q_length + TILE_M - 1) / TILE_M, args.heads, args.heads);
                        const int k_start = args.cu_seqlens_k[batch], k_length = max(0, args.cu_seqlens_k[batch + 1] - k_start);
                        tile = {place.m_block * TILE_M, place.head, batch, q_start, q_length, args.seqlen_q - q_length, q_start + q_length,
                                k_length, args.seqlen_k - k_length, k_start + k_length};
                    }
                    return;
                }
                tiles_before += __shfl_sync(~0u, tiles_through, 31);
            }
            if (lane == 0) tile.first_row = -1;
        }
    }
};

__device__ __forceinline__ Mask tile_mask(const Arguments& args, const WorkTile& tile) {
    return {tile.k_length, args.bottom_right ? tile.k_length - tile.q_length : 0, args.left, args.right};
}

// Where row `tile_row` of a tile goes. `rows` rows of the sequence are left from there on; none if it is 0 or less.
struct Destination {
    char* out;
    float* lse;
    int rows;
};

__device__ __forceinline__ Destination destination(const Arguments& args, const WorkTile& tile, int tile_row) {
    const int row = tile.first_row + tile_row, packed_row = tile.q_start + row;
    char* out = args.out + tile.batch * args.out_batch_stride + packed_row * args.out_row_stride + tile.head * args.out_head_stride;
    float* lse = args.lse + tile.batch * args.lse_batch_stride + (long long)tile.head * args.seqlen_q + packed_row;
    return {out, args.lse ? lse : nullptr, tile.q_length - row};
}

// A tile whose rows see no key: output 0, LSE -inf. One warp writes it.
__device__ __forceinline__ void store_empty(const Arguments& args, const WorkTile& tile) {
    const uint32_t zeros[4] = {};
#pragma unroll 1
    for (int tile_row = threadIdx.x % 32; tile_row < TILE_M; tile_row += 32) {
        const Destination to = destination(args, tile, tile_row);
        if (to.rows <= 0) break;
#pragma unroll 1
        for (int column = 0; column < HEAD_DIM_V; column += 8) store_global_16(to.out + 2 * column, zeros);
        if (to.lse != nullptr) *to.lse = NEGATIVE_INFINITY;
    }
}

__device__ __forceinline__ void load_slabs(
    const TensorMap* map, int slabs, int slab_bytes, uint32_t destination, uint32_t barrier, int row, int offset, int head, int batch) {
    mbarrier_arrive_expect(barrier, slabs * slab_bytes);
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab) tma_load(destination + slab * slab_bytes, map, barrier, 64 * slab, row, offset, head, batch);
}

// Takes tile after tile, tells the consumers, and loads Q and then the blocks of K and V from the last that the tile sees to the first;
// K runs one block ahead of V. A CTA's first tile is its own number; the others are dealt to whoever asks, so that all end together.
__device__ __forceinline__ void produce(const Arguments& args, uint32_t barriers, WorkTile* tile_slots, uint32_t q_smem, uint32_t k_smem, uint32_t v_smem) {
    TileList list;
    Ring<TILE_SLOTS> slot_ring;
    Ring<Q_STAGES> q_ring;
    Ring<STAGES> k_ring, v_ring;
    int index = blockIdx.x;
    while (true) {
        const uint32_t slot = slot_ring.stage();
        mbarrier_wait(barriers + TILE_EMPTY + 8 * slot, slot_ring.phase() ^ 1);
        list.find(args, index, tile_slots[slot]);
        __syncwarp();
        const WorkTile& tile = tile_slots[slot];
        if (tile.first_row < 0) break;
        int asked = 0;
        const int last_row = min(tile.first_row + TILE_M, tile.q_length) - 1;
        const KeyBlocks blocks = key_blocks(tile_mask(args, tile), tile.first_row, last_row, tile.first_row, last_row);
        if (blocks.end <= blocks.begin) {
            store_empty(args, tile);
            if (threadIdx.x == 0) asked = atomicAdd(args.next_tile, 1);
            __syncwarp();
            index = gridDim.x + __shfl_sync(~0u, asked, 0);
            continue;  // into the same slot
        }
        ++slot_ring.count;
        if (threadIdx.x == 0) {
            mbarrier_arrive(barriers + TILE_FULL + 8 * slot);
            const int batch = VARLEN ? 0 : tile.batch, kv_head = tile.head / GQA_RATIO, k_row = tile.k_row, k_offset = tile.k_offset;
            const auto load_k = [&](int block) {
                const uint32_t stage = k_ring.stage();
                mbarrier_wait(barriers + K_EMPTY + 8 * stage, k_ring.phase() ^ 1);
                load_slabs(&args.k, SLABS_QK, KV_SLAB, k_smem + stage * K_BYTES, barriers + K_FULL + 8 * stage, k_row + block * TILE_N, k_offset, kv_head, batch);
                ++k_ring.count;
            };
            const auto load_v = [&](int block) {
                const uint32_t stage = v_ring.stage();
                mbarrier_wait(barriers + V_EMPTY + 8 * stage, v_ring.phase() ^ 1);
                load_slabs(&args.v, SLABS_V, KV_SLAB, v_smem + stage * V_BYTES, barriers + V_FULL + 8 * stage, k_row + block * TILE_N, k_offset, kv_head, batch);
                ++v_ring.count;
            };
            const uint32_t stage = q_ring.stage();
            mbarrier_wait(barriers + Q_EMPTY + 8 * stage, q_ring.phase() ^ 1);
            load_slabs(&args.q, SLABS_QK, Q_SLAB, q_smem + stage * Q_BYTES, barriers + Q_FULL + 8 * stage, tile.q_row + tile.first_row, tile.q_offset, tile.head,
                       batch);
            ++q_ring.count;
            load_k(blocks.end - 1);
#pragma unroll 1
            for (int block = blocks.end - 2; block >= blocks.begin; --block) {
                load_k(block);
                load_v(block + 1);
            }
            asked = atomicAdd(args.next_tile, 1);  // late, so that who is done first is served first, and early enough to load the next Q in time
            load_v(blocks.begin);
        }
        index = gridDim.x + __shfl_sync(~0u, asked, 0);
    }
    if (threadIdx.x == 0) mbarrier_arrive(barriers + TILE_FULL + 8 * slot_ring.stage());
    // As many ask as there are tiles: who is told the last number knows that nobody asks after it, and leaves zero for the next launch.
    if (threadIdx.x == 0 && index - int(gridDim.x) == list.tiles_before - 1) *args.next_tile = 0;
}

// scores = Q K^T for the warpgroup's 64 rows of Q and one block of keys
__device__ __forceinline__ void issue_scores(float (&scores)[TILE_N / 2], uint32_t q_smem, uint32_t k_smem) {
    const MatrixDescriptor<Q_SLAB> q(q_smem);
    const MatrixDescriptor<KV_SLAB> k(k_smem);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < (HEAD_DIM + 15) / 16; ++step) {
        const int slab = step / 4, within = step % 4 * 32;
        wgmma_scores(scores, q.at(slab * Q_SLAB + within), k.at(slab * KV_SLAB + within), step > 0);
    }
    wgmma_commit();
    pin(scores);
}

// output += P V for one block of keys; P's fragments are already in the layout of operand A
__device__ __forceinline__ void issue_output(float (&output)[HEAD_DIM_V / 2], uint32_t (&probs)[TILE_N / 4], uint32_t v_smem) {
    const MatrixDescriptor<KV_SLAB> v(v_smem);
    pin(output);
    pin(probs);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE_N / 16; ++step)
        wgmma_output(output, probs[4 * step], probs[4 * step + 1], probs[4 * step + 2], probs[4 * step + 3], v.at(step * 16 * SLAB_BYTES), 1);
    wgmma_commit();
    pin(output);
}

__device__ __forceinline__ void scale_rows(float (&output)[HEAD_DIM_V / 2], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM_V / 2; ++i) output[i] *= factor[fragment_row(i)];
}

// Most blocks leave the maximum where it was, and a factor of 1 changes no bit.
__device__ __forceinline__ void rescale_rows(float (&output)[HEAD_DIM_V / 2], const float (&factor)[2]) {
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) scale_rows(output, factor);
}

// Writes the warpgroup's 64 rows. The four lanes of a row transpose 4 x 4 words, so that each stores 16 bytes.
__device__ __forceinline__ void store_output(const float (&output)[HEAD_DIM_V / 2], const Destination& to, long long row_stride) {
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
            if (8 * r < to.rows && column < HEAD_DIM_V) store_global_16(to.out + 8 * r * row_stride + 2 * column, words);
        }
    }
}

__device__ __forceinline__ void store_lse(const float (&lse)[2], const Destination& to) {
    if (to.lse == nullptr || threadIdx.x % 4 != 0) return;
    if (to.rows > 0) to.lse[0] = lse[0];
    if (to.rows > 8) to.lse[8] = lse[1];
}

// One warpgroup's part of every tile that the CTA takes, with FlashAttention-3's two overlaps: inside the warpgroup, P V of one block runs under the
// mask and the maximum of the next; between warpgroups, one issues its MMAs while the others are at their softmax.
__device__ __forceinline__ void consume(const Arguments& args, int warpgroup, uint32_t barriers, const WorkTile* tile_slots, uint32_t q_smem, uint32_t k_smem,
                                        uint32_t v_smem) {
    const bool signals = threadIdx.x % 32 == 0;  // one lane of each warp tells the producer that a buffer is free
    const int thread_row = 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, thread_column = 2 * (threadIdx.x % 4);
    // Ping-pong: a warpgroup issues its MMAs when its own barrier, 1 + warpgroup, lets it, and then passes the turn on.
    const int my_turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % CONSUMER_WARPGROUPS;
    if (PING_PONG && warpgroup == CONSUMER_WARPGROUPS - 1) named_barrier_arrive(next_turn, 256);

    Ring<TILE_SLOTS> slot_ring;
    Ring<Q_STAGES> q_ring;
    Ring<STAGES> k_ring, v_ring;
    const auto start_scores = [&](float (&scores)[TILE_N / 2]) {
        mbarrier_wait(barriers + K_FULL + 8 * k_ring.stage(), k_ring.phase());
        if (PING_PONG) named_barrier_sync(my_turn, 256);
        issue_scores(scores, q_smem + q_ring.stage() * Q_BYTES + warpgroup * 64 * SLAB_BYTES, k_smem + k_ring.stage() * K_BYTES);
    };
    const auto start_output = [&](float (&output)[HEAD_DIM_V / 2], uint32_t (&probs)[TILE_N / 4]) {
        mbarrier_wait(barriers + V_FULL + 8 * v_ring.stage(), v_ring.phase());
        issue_output(output, probs, v_smem + v_ring.stage() * V_BYTES);
    };
    const auto pass_turn = [&] {
        if (PING_PONG) named_barrier_arrive(next_turn, 256);
    };
    const auto release_q = [&] {
        if (signals) mbarrier_arrive(barriers + Q_EMPTY + 8 * q_ring.stage());
        ++q_ring.count;
    };
    const auto release_k = [&] {
        if (signals) mbarrier_arrive(barriers + K_EMPTY + 8 * k_ring.stage());
        ++k_ring.count;
    };
    const auto release_v = [&] {
        if (signals) mbarrier_arrive(barriers + V_EMPTY + 8 * v_ring.stage());
        ++v_ring.count;
    };

    while (true) {
        const uint32_t slot = slot_ring.stage();
        mbarrier_wait(barriers + TILE_FULL + 8 * slot, slot_ring.phase());
        ++slot_ring.count;
        const WorkTile& tile = tile_slots[slot];  // read again where it is needed, rarely, since registers are scarce
        if (tile.first_row < 0) break;
        const int own_first = tile.first_row + 64 * warpgroup;
        const KeyBlocks blocks =
            key_blocks(tile_mask(args, tile), tile.first_row, min(tile.first_row + TILE_M, tile.q_length) - 1, own_first, own_first + 63);
        int block = blocks.end - 1;

        float scores[TILE_N / 2], rescale[2];
        uint32_t probs[TILE_N / 4];
        float output[HEAD_DIM_V / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM_V / 2; ++i) output[i] = 0.0f;
        Softmax softmax;
        softmax.reset();
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

        mbarrier_wait(barriers + Q_FULL + 8 * q_ring.stage(), q_ring.phase());
        start_scores(scores);
        pass_turn();
        wgmma_wait<0>();
        pin(scores);
        release_k();
        if (block == blocks.begin) release_q();
        if (block >= blocks.full_end || block < blocks.full_begin) hide_masked();
        softmax.raise_max(scores, args.scale_log2, rescale);
        softmax.exponentiate(scores, args.scale_log2);
        pack_probs();

        const auto step = [&](auto masked) {
            start_scores(scores);
            if (!PING_PONG) rescale_rows(output, rescale);
            start_output(output, probs);
            pass_turn();
            wgmma_wait<1>();
            pin(scores);
            release_k();
            if constexpr (decltype(masked)::value) hide_masked();
            softmax.raise_max(scores, args.scale_log2, rescale);
            // This branch also keeps ptxas from moving the wait for P V up, over the maximum. What comes after the wait may be interleaved.
            if (block == blocks.begin) release_q();
            finish_output();
            release_v();
            if (PING_PONG) rescale_rows(output, rescale);
            softmax.exponentiate(scores, args.scale_log2);
            pack_probs();
        };
        --block;
        if constexpr (BOUND_RIGHT)
            for (; block >= max(blocks.begin, blocks.full_end); --block) step(Constant<1>{});
        for (; block >= (BOUND_LEFT ? max(blocks.begin, blocks.full_begin) : blocks.begin); --block) step(Constant<0>{});
        if constexpr (BOUND_LEFT)
            for (; block >= blocks.begin; --block) step(Constant<1>{});

        if (!PING_PONG) rescale_rows(output, rescale);
        start_output(output, probs);
        finish_output();
        // Rounding P to 16 bits is harmless where many keys average it out. Rows with few keys add what the rounding lost in their last block,
        // which holds all their keys unless a window makes them straddle two.
        const Mask mask = tile_mask(args, tile);
        if (mask.end(own_first) - mask.begin(own_first) <= FEW_KEYS) {
#pragma unroll
            for (int i = 0; i < TILE_N / 4; ++i) {
                float low, high;
                unpack2(probs[i], low, high);
                probs[i] = pack2(scores[2 * i] - low, scores[2 * i + 1] - high);
            }
            start_output(output, probs);
            finish_output();
        }
        release_v();

        float inverse[2], lse[2];
        softmax.finish(args.scale_log2, inverse, lse);
        scale_rows(output, inverse);
        const Destination to = destination(args, tile, thread_row);
        __syncwarp();
        if (signals) mbarrier_arrive(barriers + TILE_EMPTY + 8 * slot);
        store_output(output, to, args.out_row_stride);
        store_lse(lse, to);
    }
    if (PING_PONG && warpgroup == 0) named_barrier_sync(my_turn, 256);  // takes up the last turn, which nobody else would
}

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMER_WARPGROUPS), 1) attention_forward(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(16) char shared[];
    static_assert(BARRIER_BYTES + TILE_SLOTS * sizeof(WorkTile) <= CONTROL_BYTES, "tiles.py reserves too little shared memory");
    WorkTile* tile_slots = reinterpret_cast<WorkTile*>(shared + BARRIER_BYTES);
    const uint32_t barriers = shared_address(shared);
    const uint32_t q_smem = (barriers + CONTROL_BYTES + 1023) & ~1023u;  // the swizzle pattern repeats every 1024 bytes of address
    const uint32_t k_smem = q_smem + Q_STAGES * Q_BYTES, v_smem = k_smem + STAGES * K_BYTES;
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&args.q);
        prefetch_tensor_map(&args.k);
        prefetch_tensor_map(&args.v);
        for (int stage = 0; stage < Q_STAGES; ++stage) {
            mbarrier_init(barriers + Q_FULL + 8 * stage, 1);
            mbarrier_init(barriers + Q_EMPTY + 8 * stage, CONSUMER_WARPS);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(barriers + K_FULL + 8 * stage, 1);
            mbarrier_init(barriers + V_FULL + 8 * stage, 1);
            mbarrier_init(barriers + K_EMPTY + 8 * stage, CONSUMER_WARPS);
            mbarrier_init(barriers + V_EMPTY + 8 * stage, CONSUMER_WARPS);
        }
        for (int slot = 0; slot < TILE_SLOTS; ++slot) {
            mbarrier_init(barriers + TILE_FULL + 8 * slot, 1);
            mbarrier_init(barriers + TILE_EMPTY + 8 * slot, CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, so that the roles are branches and not predicates
    if (warp < 4) {
        release_registers<PRODUCER_REGISTERS>();
        if (warp == 0) produce(args, barriers, tile_slots, q_smem, k_smem, v_smem);
    } else {
        acquire_registers<CONSUMER_REGISTERS>();
        consume(args, warp / 4 - 1, barriers, tile_slots, q_smem, k_smem, v_smem);
    }
}
