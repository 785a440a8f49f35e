// Queries of the kernels for few rows, rotated in place. The file that includes this says who meets in meet_readers_of_q().
#pragma once

// Waits for a tile's Q in its stage, and rotates it there if that is asked for; of the rows each warpgroup has its share.
__device__ __forceinline__ void await_queries(const Arguments& args, const Buffers& buffers, const WorkTile& tile, int warpgroup, int cached_keys, uint32_t stage, uint32_t phase) {
    const uint32_t q_full = buffers.barriers + Q_FULL + 8 * stage, q_smem = buffers.q + stage * Q_BYTES;
    if (args.append.rotary.dim == 0) return mbarrier_wait(q_full, phase);
    constexpr int ROWS = TILE_M / CONSUMER_WARPGROUPS;
    const Rotary& rotary = args.append.rotary;
    const int first_row = ROWS * warpgroup, tasks_of_row = rotary.dim / (rotary.interleaved ? 8 : 16);
    for (int task = threadIdx.x % 128; task < min(ROWS, existing_rows(tile) - first_row) * tasks_of_row; task += 128) {
        const int row = first_row + divide(task, tasks_of_row), column = 8 * (task - (row - first_row) * tasks_of_row), query = (tile.first_row + row) / PACK;
        const Angles angles = rotary.angles(cached_keys + (rotary.query_advances ? query : 0), column);
        const auto address = [&](int column) { return q_smem + column / 64 * Q_SLAB + row * SLAB_BYTES + (column % 64 / 8 ^ row % 8) * 16; };
        Chunk<4> own, partner = {};
        mbarrier_wait(q_full, phase);
        load_shared_16(address(column), own.words);
        if (!rotary.interleaved) load_shared_16(address(column + rotary.dim / 2), partner.words);
        rotary.turn(own, partner, angles);
        store_shared_16(address(column), own.words);
        if (!rotary.interleaved) store_shared_16(address(column + rotary.dim / 2), partner.words);
    }
    mbarrier_wait(q_full, phase);
    async_proxy_fence();
    meet_readers_of_q();
}
