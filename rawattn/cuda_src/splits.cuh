// Splits of a tile's keys are taken together. The file that includes this says how its accumulators lie: ROWS_OF_THREAD, tile_row(r) of each of
// these rows, output_row(i) of them that register i of the output belongs to, store_partial(), and SPLITS_IN_FLIGHT.
#pragma once

// Takes the splits of a tile together, those of the first CTA, which are one result, and the others in their order, and writes the output.
__device__ __forceinline__ void combine(const Arguments& args, const WorkTile& tile, int warpgroup) {
    constexpr int COLUMNS = 4;  // of one thread's task
    constexpr int BATCH = SPLITS_IN_FLIGHT;
    for (int task = threadIdx.x % 128; task < WARPGROUP_ROWS * (HEAD_DIM_V / COLUMNS); task += 128) {
        const int row = WARPGROUP_ROWS * warpgroup + task / (HEAD_DIM_V / COLUMNS), column = task % (HEAD_DIM_V / COLUMNS) * COLUMNS;
        const Destination to = destination(args, tile, row);
        if (to.out == nullptr) break;
        const int first_split = tile.first_splits - 1;  // has those before it in it
        float output[COLUMNS] = {}, max = NEGATIVE_INFINITY, sum = 0.0f;
        for (int first = first_split; first < tile.splits; first += BATCH) {
            float4 parts[BATCH];
            float2 states[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first + i >= tile.splits) break;
                const Partial from = partial(args, tile, first + i, row);
                states[i] = __ldcg(from.state);
                parts[i] = __ldcg(reinterpret_cast<const float4*>(from.out + column));
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first + i >= tile.splits) break;
                const float part[COLUMNS] = {parts[i].x, parts[i].y, parts[i].z, parts[i].w};
                const bool is_first = first + i == first_split;
                const Fold fold(max, sum, states[i].x, states[i].y, args.scale_log2);
                max = is_first ? states[i].x : fold.max;
                sum = is_first ? states[i].y : fold.sum;
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) output[j] = is_first ? part[j] : fold.of(output[j], part[j]);
            }
        }
        float inverse, lse;
        normalise(max, sum, args.scale_log2, inverse, lse);
        store_global_8(to.out + 2 * column, pack2(output[0] * inverse, output[1] * inverse), pack2(output[2] * inverse, output[3] * inverse));
        if (to.lse != nullptr && column == 0) *to.lse = lse;
    }
}

// What becomes of a split's result: the CTA that has a tile's first splits carries them on from one to the next; every other result waits in the
// workspace, and whoever brings the last one combines them. Which CTA does what changes no bit: all take the splits in the same order in the same
// way. Returns whether `output` and `states` now hold the whole tile.
template <int REGISTERS>
__device__ __forceinline__ bool join_splits(const Arguments& args, const WorkTile& tile, int warpgroup, float (&output)[REGISTERS], RowStates<ROWS_OF_THREAD>& states,
                                            float* carried, RowStates<ROWS_OF_THREAD>& carried_states, int* is_last) {
    carried += threadIdx.x - 128;
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
                    if (output_row(i) == r) output[i] = fold.of(carried[i * CONSUMER_THREADS], output[i]);
                }
            }
        }
        if (tile.split == tile.splits - 1) return true;
        if (tile.split < tile.run_end - 1) {
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i) {
                if (tile_row(output_row(i)) < rows) carried[i * CONSUMER_THREADS] = output[i];
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
    if (is_last[warpgroup]) combine(args, tile, warpgroup);
    return false;
}
