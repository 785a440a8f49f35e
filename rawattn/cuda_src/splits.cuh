// Splits of a tile's keys are taken together. The file that includes this says how its accumulators lie: ROWS_OF_THREAD, tile_row(r) of each of
// these rows, output_row(i) of them that register i of the output belongs to, and store_partial(); and how many loads a combining thread has in
// flight: those of RESULTS_IN_FLIGHT results for each of TASKS_IN_FLIGHT tasks.
#pragma once

constexpr int COLUMNS = 4;  // of a row, that one thread combines at a time

// Where a tile's results lie that are to be taken together: in the workspace, that of the share which has the first splits before all others. A row is
// one of the warpgroup's.
struct WorkspaceResults {
    const float* outs;     // [results, partial_rows, Dv], from the warpgroup's first row on
    const float2* states;  // [results, partial_rows, 4]
    int results, partial_rows, first, existing;

    __device__ __forceinline__ WorkspaceResults(const Arguments& args, const WorkTile& tile, int warpgroup)
        : results(tile.splits - tile.first_splits + 1), partial_rows(args.partial_rows), first(WARPGROUP_ROWS * warpgroup),
          existing(min(WARPGROUP_ROWS, existing_rows(tile) - first)) {
        const Partial from = partial(args, tile, tile.first_splits - 1, first);
        outs = from.out;
        states = from.state;
    }
    __device__ __forceinline__ int count() const { return results; }
    __device__ __forceinline__ int first_row() const { return first; }
    __device__ __forceinline__ int rows() const { return existing; }
    __device__ __forceinline__ int first_column() const { return 0; }
    __device__ __forceinline__ int columns() const { return HEAD_DIM_V; }
    __device__ __forceinline__ int row_of(int task) const { return task / (HEAD_DIM_V / COLUMNS); }
    __device__ __forceinline__ float2 state(int result, int row) const { return __ldcg(states + 4 * (result * partial_rows + row)); }
    __device__ __forceinline__ float4 outputs(int result, int row, int column) const {
        return __ldcg(reinterpret_cast<const float4*>(outs + (result * partial_rows + row) * HEAD_DIM_V + column));
    }
};

// Or in the shared memory of a cluster's CTA: of its columns, each split's apart, as the CTAs have sent them.
struct ClusterResults {
    const float* outs;     // [splits, columns_of_rank, paired_rows]
    const float2* states;  // [splits, paired_rows]
    int splits, existing_rows, paired_rows, columns_of_rank;

    __device__ __forceinline__ int count() const { return splits; }
    __device__ __forceinline__ int first_row() const { return 0; }
    __device__ __forceinline__ int rows() const { return existing_rows; }
    __device__ __forceinline__ int first_column() const { return cluster_rank() * columns_of_rank; }
    __device__ __forceinline__ int columns() const { return max(0, min(columns_of_rank, HEAD_DIM_V - first_column())); }
    __device__ __forceinline__ int row_of(int task) const { return divide(task, columns() / COLUMNS); }
    __device__ __forceinline__ float2 state(int result, int row) const { return states[result * paired_rows + row]; }
    __device__ __forceinline__ float4 outputs(int result, int row, int column) const {
        const float* first = outs + (result * columns_of_rank + column) * paired_rows + row;
        return make_float4(first[0], first[paired_rows], first[2 * paired_rows], first[3 * paired_rows]);
    }
};

// Takes the results of a tile together in their order, and writes the output. Of its tasks, four columns of a row each, `threads` threads have their share.
template <class Results>
__device__ __forceinline__ void combine(const Arguments& args, const WorkTile& tile, const Results& results, int thread, int threads) {
    const int count = results.count(), tasks_of_row = results.columns() / COLUMNS, tasks = results.rows() * tasks_of_row;
    for (int first_task = thread; first_task < tasks; first_task += threads * TASKS_IN_FLIGHT) {
        int rows[TASKS_IN_FLIGHT], columns[TASKS_IN_FLIGHT];
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
            const int task = min(first_task + threads * t, tasks - 1);
            rows[t] = results.row_of(task);
            columns[t] = COLUMNS * (task - rows[t] * tasks_of_row);
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
                    states[t][i] = results.state(min(first + i, count - 1), rows[t]);
                    loaded[t][i] = results.outputs(min(first + i, count - 1), rows[t], columns[t]);
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
            if (first_task + threads * t >= tasks) break;
            float inverse, lse;
            normalise(of_rows.max[t], of_rows.sum[t], args.scale_log2, inverse, lse);
            const Destination to = destination(args, tile, results.first_row() + rows[t]);
            const float (&output)[COLUMNS] = outputs[t];
            const int column = results.first_column() + columns[t];
            store_global_8(to.out + 2 * column, pack2(output[0] * inverse, output[1] * inverse), pack2(output[2] * inverse, output[3] * inverse));
            if (to.lse != nullptr && column == 0) *to.lse = lse;
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
    if (is_last[warpgroup]) {
        const WorkspaceResults results(args, tile, warpgroup);
        combine(args, tile, results, threadIdx.x % 128, 128);
    }
    return false;
}
