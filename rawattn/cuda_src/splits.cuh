// Splits of a tile's keys are taken together. The file that includes this says how its accumulators lie: ROWS_OF_THREAD, tile_row(r) of each of
// these rows, output_row(i) of them that register i of the output belongs to, and store_partial(); and how many loads a combining thread has in
// flight: those of RESULTS_IN_FLIGHT results for each of TASKS_IN_FLIGHT tasks.
#pragma once

// Where a tile's results lie that are to be taken together: in the workspace, that of the share which has the first splits before all others. A row is
// one of the warpgroup's.
struct WorkspaceResults {
    const Arguments& args;
    const WorkTile& tile;
    int warpgroup;

    __device__ __forceinline__ int count() const { return tile.splits - tile.first_splits + 1; }
    __device__ __forceinline__ int first_row() const { return WARPGROUP_ROWS * warpgroup; }
    __device__ __forceinline__ int rows() const { return min(WARPGROUP_ROWS, existing_rows(tile) - first_row()); }
    __device__ __forceinline__ Partial at(int result, int row) const { return partial(args, tile, tile.first_splits - 1 + result, first_row() + row); }
    __device__ __forceinline__ float2 state(int result, int row) const { return __ldcg(at(result, row).state); }
    __device__ __forceinline__ float4 outputs(int result, int row, int column) const {
        return __ldcg(reinterpret_cast<const float4*>(at(result, row).out + column));
    }
};

// Or, each split's apart, in the shared memory of a cluster's CTAs, of which each has one split or two.
struct ClusterResults {
    uint32_t outs, states;                      // [rows, Dv] and [rows] float2 of a CTA's first split
    uint32_t outs_of_second, states_of_second;  // how many bytes further those of its second are
    int splits, two;                            // two: 1 where each CTA has two splits, else 0

    __device__ __forceinline__ int count() const { return splits; }
    __device__ __forceinline__ int first_row() const { return 0; }
    __device__ __forceinline__ float2 state(int result, int row) const {
        return load_cluster_8(shared_address_of(states + (result & two) * states_of_second + 8 * row, result >> two));
    }
    __device__ __forceinline__ float4 outputs(int result, int row, int column) const {
        return load_cluster_16(shared_address_of(outs + (result & two) * outs_of_second + 4 * (row * HEAD_DIM_V + column), result >> two));
    }
};

constexpr int COLUMNS = 4, TASKS_OF_ROW = HEAD_DIM_V / COLUMNS;  // of a row, one thread's task

// Takes the results of a tile together in their order, for tasks [begin, end) of the rows, and writes the output. A warpgroup calls it, and each of its
// threads `all_loaded` when the results may go.
template <class Results, class AllLoaded>
__device__ __forceinline__ void combine(const Arguments& args, const WorkTile& tile, const Results& results, int begin, int end, AllLoaded all_loaded) {
    const int count = results.count(), thread = threadIdx.x % 128;
    if (begin >= end) all_loaded();
    for (int first_task = begin; first_task < end; first_task += 128 * TASKS_IN_FLIGHT) {
        float outputs[TASKS_IN_FLIGHT][COLUMNS] = {};
        RowStates<TASKS_IN_FLIGHT> of_rows;
        of_rows.reset();
#pragma unroll 1
        for (int first = 0; first < count; first += RESULTS_IN_FLIGHT) {
            float2 states[TASKS_IN_FLIGHT][RESULTS_IN_FLIGHT];
            float4 columns[TASKS_IN_FLIGHT][RESULTS_IN_FLIGHT];
#pragma unroll
            for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
                const int task = min(first_task + thread + 128 * t, end - 1), row = task / TASKS_OF_ROW, column = task % TASKS_OF_ROW * COLUMNS;
#pragma unroll
                for (int i = 0; i < RESULTS_IN_FLIGHT; ++i) {  // rather the last one again than a branch for each
                    states[t][i] = results.state(min(first + i, count - 1), row);
                    columns[t][i] = results.outputs(min(first + i, count - 1), row, column);
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
                    outputs[t][0] = fold.of(outputs[t][0], is_one ? columns[t][i].x : 0.0f);
                    outputs[t][1] = fold.of(outputs[t][1], is_one ? columns[t][i].y : 0.0f);
                    outputs[t][2] = fold.of(outputs[t][2], is_one ? columns[t][i].z : 0.0f);
                    outputs[t][3] = fold.of(outputs[t][3], is_one ? columns[t][i].w : 0.0f);
                }
            }
        }
        if (first_task + 128 * TASKS_IN_FLIGHT >= end) {
#pragma unroll
            for (int t = 0; t < TASKS_IN_FLIGHT; ++t) pin(outputs[t]);  // by now the loads have not only begun
            all_loaded();
        }
#pragma unroll
        for (int t = 0; t < TASKS_IN_FLIGHT; ++t) {
            const int task = first_task + thread + 128 * t, row = task / TASKS_OF_ROW, column = task % TASKS_OF_ROW * COLUMNS;
            if (task >= end) break;
            float inverse, lse;
            normalise(of_rows.max[t], of_rows.sum[t], args.scale_log2, inverse, lse);
            const Destination to = destination(args, tile, results.first_row() + row);
            const float (&output)[COLUMNS] = outputs[t];
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
        gpu_fence();  // for all, whose stores the barrier has put before it
        int* arrived = args.arrivals + tile.slot * CONSUMER_WARPGROUPS + warpgroup;
        is_last[warpgroup] = atomicAdd(arrived, arriving) + arriving == tile.splits;
        if (is_last[warpgroup]) *arrived = 0;
        gpu_fence();
    }
    named_barrier_sync(own_barrier, 128);
    carried_states.reset();  // spent; tells the compiler that it needs no registers from here on
    if (is_last[warpgroup]) {
        const WorkspaceResults results = {args, tile, warpgroup};
        combine(args, tile, results, 0, results.rows() * TASKS_OF_ROW, [] {});
    }
    return false;
}
