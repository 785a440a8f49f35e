// What attention_forward.cu and attention_decode64.cu share, where the 64 query rows of a warpgroup are those of WGMMA.
#pragma once

// The accumulators of m64nNk16 (PTX ISA 9.7.15.5.1.1): register i of a thread is row lane / 4 + 8 * (i / 2 % 2) of its warp's 16 rows and column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2; a row lives in four lanes.
constexpr int ROWS_OF_THREAD = 2;

__device__ __forceinline__ int fragment_row(int i) { return (i >> 1) & 1; }

using Scores = float[TILE_N / 2];

// output += P V for one block of keys; P's fragments are already in the layout of operand A
__device__ __forceinline__ void issue_output(float (&output)[HEAD_DIM_V / 2], uint32_t (&probs)[TILE_N / 4], uint32_t v_smem) {
    const MatrixDescriptor<KV_SLAB> v(v_smem);
    uint64_t v_steps[TILE_N / 16];
#pragma unroll
    for (int step = 0; step < TILE_N / 16; ++step) v_steps[step] = v.at(step * 16 * SLAB_BYTES);
    pin(output);
    pin(probs);
    wgmma_fence();
    wgmma_output(output, probs, v_steps, 1);
    wgmma_commit();
    pin(output);
}
