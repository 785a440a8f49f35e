// Online softmax on the accumulator fragments of m64nNk16 (PTX ISA 9.7.15.5.1.1): register i of a thread is
// row lane / 4 + 8 * (i / 2 % 2) of its warp's 16 rows and column 8 * (i / 4) + 2 * (lane % 4) + i % 2; a row lives in four lanes.
#pragma once

constexpr float NEGATIVE_INFINITY = -1.0f / 0.0f, LN2 = 0.693147182f;

__device__ __forceinline__ int fragment_row(int i) { return (i >> 1) & 1; }
__device__ __forceinline__ int fragment_column(int i) { return 8 * (i >> 2) + (i & 1); }

struct Softmax {
    float max[2];  // of the raw scores of the thread's two rows so far
    float sum[2];  // of exp over the thread's own columns so far; reduced over the four lanes once, at the end

    // What the exponents are relative to, rounded once, so that its rounding error is the same everywhere and cancels.
    static __device__ __forceinline__ float shift(float score, float scale_log2) { return __fmul_rn(score, scale_log2); }

    __device__ __forceinline__ void reset() {
        max[0] = max[1] = NEGATIVE_INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    // Takes a block's scores into the maximum. What was accumulated before must be multiplied by `rescale`, which is exactly 1 if it did not move.
    __device__ __forceinline__ void raise_max(const float (&scores)[TILE_N / 2], float scale_log2, float (&rescale)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Two chains a row: a single one would wait for its own latency.
            float even = scores[2 * r], odd = scores[2 * r + 1];
#pragma unroll
            for (int i = 4 + 2 * r; i < TILE_N / 2; i += 4) {
                even = fmaxf(even, scores[i]);
                odd = fmaxf(odd, scores[i + 1]);
            }
            float block_max = fmaxf(even, odd);
            block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 1));
            block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 2));
            const float old_max = max[r];
            max[r] = fmaxf(old_max, block_max);
            rescale[r] = max[r] == old_max ? 1.0f : exp2_approx(shift(old_max, scale_log2) - shift(max[r], scale_log2));
            sum[r] *= rescale[r];
        }
    }

    // Turns the block's raw scores into exp(scale * (score - max)).
    __device__ __forceinline__ void exponentiate(float (&scores)[TILE_N / 2], float scale_log2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float offset = max[r] == NEGATIVE_INFINITY ? 0.0f : shift(max[r], scale_log2);  // -inf - -inf would be NaN
            float sum_even = 0.0f, sum_odd = 0.0f;
#pragma unroll
            for (int i = 2 * r; i < TILE_N / 2; i += 4) {
                scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset));
                scores[i + 1] = exp2_approx(fmaf(scores[i + 1], scale_log2, -offset));
                sum_even += scores[i];
                sum_odd += scores[i + 1];
            }
            sum[r] += sum_even + sum_odd;
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

// A row's output is to be multiplied by `inverse`; `lse` is its log-sum-exp. A row without a key has output 0 and LSE -inf; a NaN stays one.
__device__ __forceinline__ void normalise(float max, float sum, float scale_log2, float& inverse, float& lse) {
    inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float offset = max == NEGATIVE_INFINITY ? 0.0f : Softmax::shift(max, scale_log2);
    lse = sum == 0.0f ? NEGATIVE_INFINITY : fmaf(offset, LN2, logf(sum));
}

// Takes two sets of a row's keys together, always with the same operations, wherever it happens.
struct Fold {
    float max, sum;
    float first_factor, second_factor;

    __device__ __forceinline__ Fold(float first_max, float first_sum, float second_max, float second_sum, float scale_log2) {
        max = fmaxf(first_max, second_max);
        first_factor = factor(first_max, scale_log2);
        second_factor = factor(second_max, scale_log2);
        sum = of(first_sum, second_sum);
    }
    __device__ __forceinline__ float factor(float old_max, float scale_log2) const {
        return max == old_max ? 1.0f : exp2_approx(Softmax::shift(old_max, scale_log2) - Softmax::shift(max, scale_log2));
    }
    __device__ __forceinline__ float of(float first, float second) const { return __fmaf_rn(first, first_factor, __fmul_rn(second, second_factor)); }
};

// Hides the keys that a row does not see. `first_column` is the key position of the thread's column 0.
__device__ __forceinline__ void mask_scores(float (&scores)[TILE_N / 2], const Mask& mask, int row, int first_column) {
    const int begin[2] = {mask.begin(row) - first_column, mask.begin(row + 8) - first_column};
    const int end[2] = {mask.end(row) - first_column, mask.end(row + 8) - first_column};
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) {
        const int column = fragment_column(i), r = fragment_row(i);
        if (column >= end[r] || (BOUND_LEFT && column < begin[r])) scores[i] = NEGATIVE_INFINITY;
    }
}
