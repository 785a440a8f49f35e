// Splits of a tile's keys are taken together. The file that includes this says how its accumulators lie: ROWS_OF_THREAD, tile_row(r) of each of
// these rows, output_row(i) of them that register i of the output belongs to, and store_partial(); and how many loads a combining thread has in
// flight: those of RESULTS_IN_FLIGHT results for each of TASKS_IN_FLIGHT tasks.
#pragma once

constexpr int COLUMNS = 4;  // of a row, that one thread combines at a time

// Takes the results of a tile that wait in the workspace together in their order, and writes the output of the rows, or of the columns, of a warpgroup. Of its
// tasks, four columns of a row each, the warpgroup's threads have their share.
__device__ __forceinline__ void combine(const Arguments& args, const WorkTile& tile, int warpgroup) {
    constexpr int OWN_COLUMNS = SHARES_KEYS ? (HEAD_DIM_V + 31) / 32 * 16 : HEAD_DIM_V, TASKS_OF_ROW = OWN_COLUMNS / COLUMNS;
    const int first_row = SHARES_KEYS ? 0 : WARPGROUP_ROWS * warpgroup, first_column = SHARES_KEYS ? OWN_COLUMNS * warpgroup : 0;
    const int tasks = min(WARPGROUP_ROWS, existing_rows(tile) - first_row) * TASKS_OF_ROW;
    const int count = tile.splits - tile.first_splits + 1;  // the share that has the first splits has one result of all of them
    const Partial from = partial(args, tile, tile.first_splits - 1, first_row);
    for (int first_task = threadIdx.x % 128; first_task < tasks; first_task += 128 * TASKS_IN_FLIGHT) {
        int rows[TASKS_IN_FLIGHT], columns[TASKS_IN_FLIGHT];
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
            const int task = min(first_task + 128 * t, tasks - 1);
            rows[t] = task / TASKS_OF_ROW;
            columns[t] = first_column + COLUMNS * (task % TASKS_OF_ROW);
            if (SHARES_KEYS) columns[t] = min(columns[t], HEAD_DIM_V - COLUMNS);  // the second warpgroup may have fewer
        }
        float outputs[TASKS_IN_FLIGHT][COLUMNS] = {};
        RowStates<TASKS_IN_FLIGHT> of_rows;
        of_rows.reset();
#pragma unroll 1
        for (int first = 0; first < count; first += RESULTS_IN_FLIGHT) {
            float2 states[TASKS_IN_FLIGHT][RESULTS_IN_FLIGHT];
            float4 loaded[TASKS_IN_FLIGHT][RESULTS_IN_FLIGHT];
#pragma unroll
            for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
#pragma unroll
                for (int i = 0; i < RESULTS_IN_FLIGHT; ++i) {  // rather the last one again than a branch for each
                    const int row = min(first + i, count - 1) * args.partial_rows + rows[t];
                    states[t][i] = __ldcg(from.state + 4 * row);
                    loaded[t][i] = __ldcg(reinterpret_cast<const float4*>(from.out + row * HEAD_DIM_V + columns[t]));
                }
            }
#pragma unroll
            for (int i = 0; i < RESULTS_IN_FLIGHT; ++i) {
                const bool is_one = first + i < count;  // what is none changes nothing, so that all factors are found beside each other
#pragma unroll
                for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
                    const Fold fold(of_rows.max[t], of_rows.sum[t], is_one ? states[t][i].x : NEGATIVE_INFINITY, is_one ? states[t][i].y : 0.0f, args.scale_log2);
                    of_rows.max[t] = fold.max;
                    of_rows.sum[t] = fold.sum;
                    outputs[t][0] = fold.of(outputs[t][0], is_one ? loaded[t][i].x : 0.0f);
                    outputs[t][1] = fold.of(outputs[t][1], is_one ? loaded[t][i].y : 0.0f);
                    outputs[t][2] = fold.of(outputs[t][2], is_one ? loaded[t][i].z : 0.0f);
                    outputs[t][3] = fold.of(outputs[t][3], is_one ? loaded[t][i].w : 0.0f);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
            if (first_task + 128 * t >= tasks) break;
            float inverse, lse;
            normalise(result_offset(of_rows.max[t], args.scale_log2), of_rows.sum[t], inverse, lse);
            const Destination to = destination(args, tile, first_row + rows[t]);
            const float (&output)[COLUMNS] = outputs[t];
            store_global_8(to.out + 2 * columns[t], pack2(output[0] * inverse, output[1] * inverse), pack2(output[2] * inverse, output[3] * inverse));
            if (to.lse != nullptr && columns[t] == 0) *to.lse = lse;
        }
    }
}

// What becomes of a split's result: the CTA that has a tile's first splits carries them on from one to the next; every other result waits in the
// workspace, and whoever brings the last one combines them. Which CTA does what changes no bit: all take the splits in the same order in the same
// way. Returns whether `output` and `states` now hold the whole tile.
template <int REGISTERS>
__device__ __forceinline__ bool join_splits(const Arguments& args, const WorkTile& tile, int warpgroup, float (&output)[REGISTERS], RowStates<ROWS_OF_THREAD>& states,
                                            float* carried, RowStates<ROWS_OF_THREAD>& carried_states, int* is_last) {
    float* own_carried = carried + threadIdx.x - 128;
    const int rows = existing_rows(tile);
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
        int* arrived = args.arrivals + tile.slot * CONSUMER_WARPGROUPS + warpgroup;
        is_last[warpgroup] = add_and_meet(arrived, arriving) + arriving == tile.splits;
        if (is_last[warpgroup]) *arrived = 0;
    }
    named_barrier_sync(own_barrier, 128);
    carried_states.reset();  // spent; tells the compiler that it needs no registers from here on
    if (is_last[warpgroup]) combine(args, tile, warpgroup);
    return false;
}
