// The masks as arithmetic on positions. A row sees the keys [begin, end). Rows count the PACK heads of one query apart.
#pragma once

struct Mask {
    int keys;      // length of the sequence's keys
    int diagonal;  // key position that stands on the diagonal of row 0: Sk - Sq bottom-right, 0 top-left
    int left;      // keys a row sees to the left of its diagonal; read if BOUND_LEFT
    int right;     // and to the right; read if BOUND_RIGHT

    __device__ __forceinline__ int begin(int row) const { return BOUND_LEFT ? max(0, row / PACK + diagonal - left) : 0; }
    __device__ __forceinline__ int end(int row) const { return BOUND_RIGHT ? min(keys, row / PACK + diagonal + right + 1) : keys; }
};

struct KeyBlocks {
    int begin, end;            // blocks that hold a key that some row of the tile sees; none if end <= begin
    int rest;                  // see tile_blocks
    int full_begin, full_end;  // of these, blocks that every row of the warpgroup sees whole
    int own_end;               // a key, not a block: from it on no row of the warpgroup sees any
};

// Blocks of TILE_N keys for the rows [first_row, last_row] of a tile, of which the caller's warpgroup has [own_first, own_last].
__device__ __forceinline__ KeyBlocks key_blocks(const Mask& mask, int first_row, int last_row, int own_first, int own_last) {
    KeyBlocks blocks;
    const int begin = mask.begin(first_row), end = mask.end(last_row);
    blocks.begin = begin / TILE_N;
    blocks.end = end > begin ? (end + TILE_N - 1) / TILE_N : blocks.begin;
    blocks.full_begin = (mask.begin(own_last) + TILE_N - 1) / TILE_N;
    blocks.full_end = mask.end(own_first) / TILE_N;
    blocks.own_end = mask.end(own_last);
    return blocks;
}
