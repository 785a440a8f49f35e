// What the consumers of attention_decode.cu and attention_decode64.cu do with the splits that a CTA has, and which of its warps does what. The file that
// includes this has the Consumer, and where the CTAs of a cluster send their results and combine them.
#pragma once

// Computes what the list of splits says.
__device__ __forceinline__ void consume(const Arguments& args, const Buffers& buffers, int warpgroup) {
    Consumer consumer = {args, buffers, warpgroup};
    float* carried = consumer.more;  // [OUTPUT_REGISTERS, CONSUMER_THREADS]
    RowStates<ROWS_OF_THREAD> carried_states;
    Ring<TILE_SLOTS> slot_ring;
    while (true) {
        const uint32_t slot = await_tile(buffers, slot_ring);
        const WorkTile& tile = buffers.tile_slots[slot];
        if (tile.first_row < 0) break;
        Output output;
        RowStates<ROWS_OF_THREAD> states;
        consumer.attend(tile, args.append.rotary.dim > 0 ? cached_keys(args, tile.batch) : 0, output, states, [] {});
        if (tile.split == tile.run_end - 1) {
            if (consumer.signals) mbarrier_arrive(buffers.barriers + Q_EMPTY + 8 * consumer.q_ring.stage());
            ++consumer.q_ring.count;
        }
        if (tile.splits == 1 || join_splits(args, tile, warpgroup, output, states, carried, carried_states, buffers.is_last)) consumer.finish(tile, output, states);
        release_tile(buffers, slot);
    }
}

// CLUSTER: computes the splits of this CTA, and then its part of what they are together.
__device__ __forceinline__ void consume_splits(const Arguments& args, const Buffers& buffers, int warpgroup, int cached_keys) {
    Consumer consumer = {args, buffers, warpgroup};
    const ResultBuffers results(args, consumer.more);
    ResultAddresses addresses(results, buffers.barriers);
    cluster_wait();  // from here on the barriers are there, and results may be sent to all
    const int query = threadIdx.x - 128;
    if (args.append.rotary.dim > 0 && query < args.seqlen_q) args.append.rotary.prefetch(cached_keys + query);  // rotate_queries() wants it
    WorkTile tile = first_split(args, cached_keys);
    if (args.loads_ahead != 0 && !is_as_loaded(args, tile, tile_blocks(args, tile, tile.first_row))) consumer.pass_over();
    for (; tile.split < tile.splits; go_to_next_split(tile)) {
        Output output;
        RowStates<ROWS_OF_THREAD> states;
        consumer.attend(tile, cached_keys, output, states, [&] {
            if (tile.splits > 1) send_states(addresses, results, states);
        });
        if (tile.splits == 1) return consumer.finish(tile, output, states);
        send_output(addresses, results, output);
        addresses.go_to_next_split(results);
    }
    if (tile.splits > 1) combine_splits(args, tile, results, buffers.barriers);
}

// What the start waits for is shared out: two warps make the barriers and ask for the first keys, the others ask for the length meanwhile.
__device__ __forceinline__ void run_cluster(const Arguments& args, const Buffers& buffers) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == 1 || warp == 2) start_loads(args, buffers, warp == 2);
    const int cached = cached_keys(args, blockIdx.z);
    if (warp != 1 && warp != 2) cluster_arrive();
    if (warp >= 4) {
        consume_splits(args, buffers, warp / 4 - 1, cached);
    } else if (warp == 0) {
        cluster_wait();
        produce_splits(args, buffers, cached);
    } else if (args.append.k.data != nullptr) {
        append_for_cta(args, buffers, cached);
    }
}

__device__ __forceinline__ void decode(const Arguments& args, const Buffers& buffers) {
    if constexpr (CLUSTER)
        run_cluster(args, buffers);
    else
        run(args, buffers, [&](int warpgroup) { consume(args, buffers, warpgroup); });
}
