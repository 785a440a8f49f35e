// The order in which output tiles are dealt to the CTAs of a persistent grid.
#pragma once

// n / divisor for n >= 0 and divisor > 0, if it is under 2^21: half the instructions of the compiler's own division, which the start of a kernel
// waits for. The estimate is at most one off.
__device__ __forceinline__ int divide(int n, int divisor) {
    const int estimate = int(float(n) * reciprocal_approx(float(divisor))), rest = n - estimate * divisor;
    return estimate + (rest >= divisor) - (rest < 0);
}

__device__ __forceinline__ int divide_up(int n, int divisor) { return divide(n + divisor - 1, divisor); }

struct TilePlace {
    int m_block;
    int head;  // of one sequence, or batch * heads + head over all sequences of one length
};

// Heads come in groups whose K and V fit in L2 together; inside a group the longest rows (highest m_block) come first.
__device__ __forceinline__ TilePlace tile_place(int index, int m_blocks, int heads, int heads_per_group) {
    const int group = index / (heads_per_group * m_blocks);
    const int first_head = group * heads_per_group;
    const int group_heads = min(heads_per_group, heads - first_head);
    const int within = index - first_head * m_blocks;
    return {m_blocks - 1 - within / group_heads, first_head + within % group_heads};
}

// What one sequence adds to the list of all tiles, or of all splits of tiles.
struct Places {
    int m_blocks = 0, heads = 0;
    int first_block = 0, blocks = 0;  // of keys: where the splits begin, and how many each has
    int splits = 1;                   // of each tile
    int cost = 1;                     // places that each split takes

    __device__ __forceinline__ int items() const { return m_blocks * heads * splits; }
    __device__ __forceinline__ int count() const { return items() * cost; }
    __device__ __forceinline__ int at_or_after(int place) const { return divide_up(max(0, place), cost); }

    // Cuts the blocks [begin, end) of keys into equal splits, as many as one sequence of `tiles` needs to fill a GPU: by what this sequence is, not
    // by what else is in the batch, so that its bits are its own.
    __device__ __forceinline__ void split(int begin, int end, int tiles, int fewest) {
        const int wanted = min(max(divide(SPLITS_OF_A_SEQUENCE, tiles), max(fewest, 1)), MAX_SPLITS / 2), total = max(0, end - begin);
        first_block = begin;
        blocks = max(1, divide_up(total, wanted));
        splits = max(1, divide_up(total, blocks));
        cost = blocks + 1;  // the start and the end of a split take about as long as a block
    }

    // Likewise, but deals a block to each split, and then the rest of the blocks in runs. `most` splits are what a sequence of so many tiles needs.
    __device__ __forceinline__ void deal(int begin, int end, int most, int least_blocks) {
        const int total = max(1, end - begin);
        first_block = begin;
        splits = min(most, max(min(total, 4), (total + least_blocks - 1) / least_blocks));
        blocks = divide_up(total, splits);
        cost = blocks + 1;
    }
};
