// The online softmax, whatever the layout of the scores.
#pragma once

constexpr float NEGATIVE_INFINITY = -1.0f / 0.0f, LN2 = 0.693147182f;

// What the exponents of a row are relative to, rounded once, so that its rounding error is the same everywhere and cancels.
__device__ __forceinline__ float exponent_shift(float max, float scale_log2) { return __fmul_rn(max, scale_log2); }

// By what is to be multiplied that was accumulated before the maximum moved: exactly 1 if it did not.
__device__ __forceinline__ float rescale_factor(float old_max, float max, float scale_log2) {
    return max == old_max ? 1.0f : exp2_approx(exponent_shift(old_max, scale_log2) - exponent_shift(max, scale_log2));
}

// Of a row of which no key was seen yet the maximum is -inf, and -inf - -inf would be NaN.
__device__ __forceinline__ float exponent_offset(float max, float scale_log2) { return max == NEGATIVE_INFINITY ? 0.0f : exponent_shift(max, scale_log2); }

// What is known of a thread's rows.
template <int ROWS>
struct RowStates {
    float max[ROWS];  // of the raw scores so far; FEW_ROWS: once the split is done, see result_offset
    float sum[ROWS];  // of exp over the thread's own keys so far; over all keys once it was reduced

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) max[r] = NEGATIVE_INFINITY, sum[r] = 0.0f;
    }
};

// A row's output is to be multiplied by `inverse`; `lse` is its log-sum-exp, `offset` being the exponent_offset of its maximum. A row without a key has
// output 0 and LSE -inf; a NaN stays one.
__device__ __forceinline__ void normalise(float offset, float sum, float& inverse, float& lse) {
    inverse = sum == 0.0f ? 0.0f : reciprocal_approx(sum);
    lse = sum == 0.0f ? NEGATIVE_INFINITY : fmaf(offset, LN2, logf(sum));
}

// What the exponents of a split that is done are relative to. FEW_ROWS: RowStates has it instead of the maximum, rounded to a whole number, so that
// rescaling is exact and it does not matter when it happens.
__device__ __forceinline__ float result_offset(float max, float scale_log2) {
    return FEW_ROWS ? (max == NEGATIVE_INFINITY ? 0.0f : max) : exponent_offset(max, scale_log2);
}

// 2^exponent of a whole exponent that is not positive; 0 below -126, and of NaN. The sum's low bits are the exponent's field.
__device__ __forceinline__ float power_of_two(float exponent) {
    return __int_as_float(__float_as_int(fmaxf(exponent, -127.0f) + (12582912.0f + 127.0f)) << 23);
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
    __device__ __forceinline__ float factor(float one_max, float scale_log2) const {
        return FEW_ROWS ? power_of_two(one_max - max) : rescale_factor(one_max, max, scale_log2);
    }
    __device__ __forceinline__ float of(float first, float second) const { return of(first, first_factor, second, second_factor); }
    static __device__ __forceinline__ float of(float first, float first_factor, float second, float second_factor) {
        return __fmaf_rn(first, first_factor, __fmul_rn(second, second_factor));
    }
};
