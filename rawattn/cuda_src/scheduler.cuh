// The order in which output tiles are dealt to the CTAs of a persistent grid.
#pragma once

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
