// Writes the new rows of K and V into the cache, and the rotated queries beside them, for an attention that does not append by itself (attention_decode.cu
// does). A group of lanes has one head of one token.
// The constants in capitals come from a generated prologue (compiler.py).
#include "append.cuh"

struct Arguments {
    Rows q;          // [B, Sq, Hq, D] or [Tq, Hq, D]
    Rows rotated_q;  // likewise; data is null without rotary
    Append append;
    const int* cu_seqlens_q;     // [B + 1], or null where all have seqlen_q rows
    const int* cache_seqlens;    // [B]
    const int* cache_batch_idx;  // [B], or null
    const int* page_table;       // [B, max_pages], or null
    long long page_table_stride;  // elements
    int batch, seqlen_q;          // seqlen_q: Sq, or Tq
    int q_heads, kv_heads;
    int head_dim, head_dim_v;
    int capacity, page_size;
    unsigned lanes;  // of a group: a power of two that 8 columns each suffice for; fewer CTAs start sooner
};

// The sequence that a packed row belongs to: the last one that starts at or before it.
__device__ int sequence_of(const Arguments& args, int row) {
    int low = 0, high = args.batch - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (args.cu_seqlens_q[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

extern "C" __global__ void append_kv(const __grid_constant__ Arguments args) {
    let_next_kernel_start();  // the attention gets ready meanwhile, and waits before it loads what is written here
    const Append& append = args.append;
    const Rotary& rotary = append.rotary;
    const unsigned heads = 2 * args.kv_heads + (args.rotated_q.data != nullptr ? args.q_heads : 0);
    const unsigned task = blockIdx.x * (blockDim.x / args.lanes) + threadIdx.x / args.lanes, token = task / heads;
    const bool is_packed = args.cu_seqlens_q != nullptr;
    const unsigned array_batch = is_packed ? 0 : token / args.seqlen_q;
    if (array_batch >= (is_packed ? 1 : args.batch)) return;
    const int row = token - array_batch * args.seqlen_q;  // in the arrays of new rows
    if (row >= args.seqlen_q) return;

    int head = task - token * heads;
    const bool is_q = head >= 2 * args.kv_heads, is_v = !is_q && head >= args.kv_heads;
    head -= is_q ? 2 * args.kv_heads : is_v ? args.kv_heads : 0;
    const int column = 8 * (threadIdx.x % args.lanes), columns = is_v ? args.head_dim_v : args.head_dim;
    const bool is_rotated = !is_v && column < rotary.dim, has_partner = is_rotated && rotary.has_partner(column);
    const char* from = (is_q ? args.q : is_v ? append.v : append.k).at(array_batch, row, head) + 2 * column;
    Chunk<4> own = {}, partner = {};  // on their way while the lengths are
    if (column < columns) own = load(from);
    if (has_partner) partner = load(from + rotary.dim);
    if (is_rotated) rotary.prefetch(0);  // finds the pages of the tables, of which the length says the row

    const int batch = is_packed ? sequence_of(args, row) : array_batch;
    if (is_packed && row >= args.cu_seqlens_q[batch + 1]) return;
    const int number = is_packed ? row - args.cu_seqlens_q[batch] : row;  // in the sequence
    const int cached = args.cache_seqlens[batch], position = cached + number;
    char* to;
    if (is_q) {
        to = args.rotated_q.at(array_batch, row, head);
    } else {
        if (position < 0 || position >= args.capacity) return;  // a row that does not fit is dropped
        to = append.cached(args, args.page_table != nullptr, is_v, batch, position, head);
    }
    to += 2 * column;
    if (is_rotated) {
        if (rotary.is_partner(column)) return;
        rotary.turn(own, partner, rotary.angles(is_q && !rotary.query_advances ? cached : position, column));
        if (has_partner) store_global_16(to + rotary.dim, partner.words);
    }
    if (column < columns) store_global_16(to, own.words);
}
