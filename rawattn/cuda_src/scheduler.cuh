// Which output tile a CTA computes next. A persistent grid walks a fixed list, so no counter has to be reset between launches or graph replays.
#pragma once

struct TilePlace {
    int m_block;
    int head;  // over all sequences: batch * heads + head
};

// The list of a dense call. Heads come in groups whose K and V fit in L2 together; inside a group the longest rows (highest m_block) come first.
__device__ __forceinline__ TilePlace tile_place(int index, int m_blocks, int heads, int heads_per_group) {
    const int group = index / (heads_per_group * m_blocks);
    const int first_head = group * heads_per_group;
    const int group_heads = min(heads_per_group, heads - first_head);
    const int within = index - first_head * m_blocks;
    return {m_blocks - 1 - within / group_heads, first_head + within % group_heads};
}

// The list is dealt like cards, there and back: who got the longer tile of one round gets the shorter one of the next.
__device__ __forceinline__ int dealt_index(int round, int cta, int ctas) { return round * ctas + (round & 1 ? ctas - 1 - cta : cta); }
