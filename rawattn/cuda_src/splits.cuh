// Splits of a tile's keys are taken together. The file that includes this says how its accumulators lie: ROWS_OF_THREAD, tile_row(r) of each of
// these rows, output_row(i) of them that register i of the output belongs to, and store_partial(); and how many loads a combining thread has in
// flight: those of RESULTS_IN_FLIGHT results for each of TASKS_IN_FLIGHT tasks.
#pragma once

// [WARPGROUP_ROWS, MAX_SPLITS]: for each row and result a pair, where the warpgroup keeps what it carries, which it no longer needs when it combines.
__device__ __forceinline__ float2& factors(float* carried, int row, int result) {
    const int place = 2 * (row * MAX_SPLITS + result);
    return *reinterpret_cast<float2*>(carried + place / 128 * CONSUMER_THREADS + place % 128);
}

// By what the results that lie in the workspace, and their sum before, are multiplied: one warp has a row, and a lane a result. As join_splits folds
// them, only that the running maximum, which is all that one factor has of the others, comes from a scan, exact in any order. The first pair holds 1 / sum.
__device__ __forceinline__ void weigh_results(const Arguments& args, const WorkTile& tile, int warpgroup, int rows, int first_split, int results, float* carried) {
    static_assert(MAX_SPLITS == 32, "one for each lane");
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x % 128 / 32; row < rows; row += 4) {
        const int tile_row = WARPGROUP_ROWS * warpgroup + row;
        float2 state = make_float2(NEGATIVE_INFINITY, 0.0f);
        if (lane < results) state = __ldcg(partial(args, tile, first_split + lane, tile_row).state);
        float max = state.x;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const float below = __shfl_up_sync(~0u, max, distance);
            if (lane >= distance) max = fmaxf(below, max);
        }
        const float before = __shfl_up_sync(~0u, max, 1);
        const float2 factor = make_float2(rescale_factor(before, max, args.scale_log2), rescale_factor(state.x, max, args.scale_log2));
        const float summand = __fmul_rn(state.y, factor.y);
        float sum = __shfl_sync(~0u, state.y, 0);
        for (int i = 1; i < results; ++i) sum = __fmaf_rn(sum, __shfl_sync(~0u, factor.x, i), __shfl_sync(~0u, summand, i));
        float inverse, lse;
        normalise(__shfl_sync(~0u, max, 31), sum, args.scale_log2, inverse, lse);
        factors(carried, row, lane) = lane == 0 ? make_float2(inverse, 0.0f) : factor;
        if (lane == 0) {
            const Destination to = destination(args, tile, tile_row);
            if (to.lse != nullptr) *to.lse = lse;
        }
    }
}

// Takes the results of a tile together, that of the share which has the first splits and those of the others in their order, and writes the output.
__device__ __forceinline__ void combine(const Arguments& args, const WorkTile& tile, int warpgroup, int barrier, float* carried) {
    constexpr int COLUMNS = 4;  // of a row, one thread's task
    const int rows = min(WARPGROUP_ROWS, min(TILE_ROWS, tile.q_length * PACK - tile.first_row) - WARPGROUP_ROWS * warpgroup);
    const int first_split = tile.first_splits - 1, results = tile.splits - first_split, tasks = rows * (HEAD_DIM_V / COLUMNS);
    float4 parts[TASKS_IN_FLIGHT][RESULTS_IN_FLIGHT];
    const auto load = [&](float4 (&parts)[RESULTS_IN_FLIGHT], int task, int first) {
        const int row = task / (HEAD_DIM_V / COLUMNS), column = task % (HEAD_DIM_V / COLUMNS) * COLUMNS;
        const float* from = partial(args, tile, first_split + first, WARPGROUP_ROWS * warpgroup + row).out + column;
#pragma unroll
        for (int i = 0; i < RESULTS_IN_FLIGHT; ++i) {
            if (task < tasks && first + i < results) parts[i] = __ldcg(reinterpret_cast<const float4*>(from + (long long)i * args.partial_rows * HEAD_DIM_V));
        }
    };
    const auto load_all = [&](int first_task, int first) {
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) load(parts[t], first_task + 128 * t, first);
    };
    const int own = threadIdx.x % 128;
    load_all(own, 0);  // on the way while the factors are found
    weigh_results(args, tile, warpgroup, rows, first_split, results, carried);
    named_barrier_sync(barrier, 128);
    for (int first_task = own; first_task < tasks; first_task += 128 * TASKS_IN_FLIGHT) {
        float outputs[TASKS_IN_FLIGHT][COLUMNS];
        for (int first = 0; first < results; first += RESULTS_IN_FLIGHT) {
            if (first_task > own || first > 0) load_all(first_task, first);
#pragma unroll
            for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
                const int task = first_task + 128 * t;
                if (task >= tasks) break;
#pragma unroll
                for (int i = 0; i < RESULTS_IN_FLIGHT; ++i) {
                    if (first + i >= results) break;
                    const float2 factor = factors(carried, task / (HEAD_DIM_V / COLUMNS), first + i);
                    const float part[COLUMNS] = {parts[t][i].x, parts[t][i].y, parts[t][i].z, parts[t][i].w};
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) outputs[t][j] = first + i == 0 ? part[j] : Fold::of(outputs[t][j], factor.x, part[j], factor.y);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
            const int task = first_task + 128 * t, row = task / (HEAD_DIM_V / COLUMNS), column = task % (HEAD_DIM_V / COLUMNS) * COLUMNS;
            if (task >= tasks) break;
            const float inverse = factors(carried, row, 0).x, (&output)[COLUMNS] = outputs[t];
            char* to = destination(args, tile, WARPGROUP_ROWS * warpgroup + row).out;
            store_global_8(to + 2 * column, pack2(output[0] * inverse, output[1] * inverse), pack2(output[2] * inverse, output[3] * inverse));
        }
    }
    named_barrier_sync(barrier, 128);  // what it carries next would overwrite the factors
}

// What becomes of a split's result: the CTA that has a tile's first splits carries them on from one to the next; every other result waits in the
// workspace, and whoever brings the last one combines them. Which CTA does what changes no bit: all take the splits in the same order in the same
// way. Returns whether `output` and `states` now hold the whole tile.
template <int REGISTERS>
__device__ __forceinline__ bool join_splits(const Arguments& args, const WorkTile& tile, int warpgroup, float (&output)[REGISTERS], RowStates<ROWS_OF_THREAD>& states,
                                            float* carried, RowStates<ROWS_OF_THREAD>& carried_states, int* is_last) {
    float* own_carried = carried + threadIdx.x - 128;
    const int rows = min(TILE_ROWS, tile.q_length * PACK - tile.first_row);  // that there are
    if (tile.run_begin == 0) {
        if (tile.split > 0) {
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r) {
                if (tile_row(r) >= rows) continue;
                const Fold fold(carried_states.max[r], carried_states.sum[r], states.max[r], states.sum[r], args.scale_log2);
                states.max[r] = fold.max;
                states.sum[r] = fold.sum;
#pragma unroll
                for (int i = 0; i < REGISTERS; ++i) {
                    if (output_row(i) == r) output[i] = fold.of(own_carried[i * CONSUMER_THREADS], output[i]);
                }
            }
        }
        if (tile.split == tile.splits - 1) return true;
        if (tile.split < tile.run_end - 1) {
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i) {
                if (tile_row(output_row(i)) < rows) own_carried[i * CONSUMER_THREADS] = output[i];
            }
            carried_states = states;
            return false;
        }
    }
    store_partial(args, tile, output, states);
    if (tile.split < tile.run_end - 1) return false;
    const int own_barrier = 1 + CONSUMER_WARPGROUPS + warpgroup, arriving = tile.run_end - tile.run_begin;
    named_barrier_sync(own_barrier, 128);
    if (threadIdx.x % 128 == 0) {
        gpu_fence();  // for all, whose stores the barrier has put before it
        int* arrived = args.arrivals + tile.slot * CONSUMER_WARPGROUPS + warpgroup;
        is_last[warpgroup] = atomicAdd(arrived, arriving) + arriving == tile.splits;
        if (is_last[warpgroup]) *arrived = 0;
        gpu_fence();
    }
    named_barrier_sync(own_barrier, 128);
    carried_states.reset();  // spent; tells the compiler that it needs no registers from here on
    if (is_last[warpgroup]) combine(args, tile, warpgroup, own_barrier, carried + 128 * warpgroup);
    return false;
}
