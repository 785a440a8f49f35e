// Writes the new rows of K and V into the cache, rotated by their positions where there is a rotary embedding (Su et al. 2021), and the rotated
// queries beside them. A group of lanes has one head of one token; a lane has 8 columns, or 8 and the 8 that they are rotated with.
// The constants in capitals come from a generated prologue (compiler.py).
#include "ptx.cuh"

struct Rows {
    char* data;  // 16-bit elements
    long long batch_stride, row_stride, head_stride;  // bytes; where sequences are packed, the batch stride is 0
};

struct Arguments {
    Rows q;                      // [B, Sq, Hq, D] or [Tq, Hq, D]
    Rows rotated_q;              // likewise; data is null without rotary
    Rows k;                      // [B, Sq, Hkv, D] or [Tq, Hkv, D]
    Rows v;                      // [B, Sq, Hkv, Dv] or [Tq, Hkv, Dv]
    Rows k_cache;                // [B_cache, S_max, Hkv, D] or [N, page_size, Hkv, D]
    Rows v_cache;                // [B_cache, S_max, Hkv, Dv] or [N, page_size, Hkv, Dv]
    const uint16_t* cos;         // [max_position, rotary_dim / 2], or null
    const uint16_t* sin;         // likewise
    const int* cu_seqlens_q;     // [B + 1], or null where all have seqlen_q rows
    const int* cache_seqlens;    // [B]
    const int* cache_batch_idx;  // [B], or null
    const int* page_table;       // [B, max_pages], or null
    long long page_table_stride;  // elements
    int batch, seqlen_q;          // seqlen_q: Sq, or Tq
    int q_heads, kv_heads;
    int head_dim, head_dim_v;
    int capacity, page_size;
    int rotary_dim, max_position;
    unsigned lanes;      // of a group: a power of two that 8 columns each suffice for; fewer CTAs start sooner
    int interleaved;     // pairs are neighbours (1), or half of the rotary columns apart (0)
    int query_advances;  // query i is rotated as key i is (1), or all as key 0 (0)
};

// 2 * WORDS columns
template <int WORDS>
struct alignas(4 * WORDS) Chunk {
    uint32_t words[WORDS];
};

template <int WORDS = 4>
__device__ Chunk<WORDS> load(const void* pointer) {
    return *static_cast<const Chunk<WORDS>*>(pointer);
}

// (x, y) turned by the angle of each column: x cos - y sin, y cos + x sin, in float32.
__device__ void rotate(float x, float y, float cos, float sin, float& rotated_x, float& rotated_y) {
    rotated_x = x * cos - y * sin;
    rotated_y = y * cos + x * sin;
}

// Turns a lane's 8 columns, which are four pairs.
__device__ void rotate_neighbours(Chunk<4>& chunk, const uint16_t* cosines, const uint16_t* sines) {
    const Chunk<2> cos = load<2>(cosines), sin = load<2>(sines);
    for (int i = 0; i < 4; ++i) {
        float x, y, c[2], s[2];
        unpack2(chunk.words[i], x, y);
        unpack2(cos.words[i / 2], c[0], c[1]);
        unpack2(sin.words[i / 2], s[0], s[1]);
        rotate(x, y, c[i % 2], s[i % 2], x, y);
        chunk.words[i] = pack2(x, y);
    }
}

// Turns a lane's 8 columns with the 8 that are half of the rotary columns further.
__device__ void rotate_halves(Chunk<4>& first, Chunk<4>& second, const uint16_t* cosines, const uint16_t* sines) {
    const Chunk<4> cos = load(cosines), sin = load(sines);
    for (int i = 0; i < 4; ++i) {
        float x[2], y[2], c[2], s[2];
        unpack2(first.words[i], x[0], x[1]);
        unpack2(second.words[i], y[0], y[1]);
        unpack2(cos.words[i], c[0], c[1]);
        unpack2(sin.words[i], s[0], s[1]);
        for (int j = 0; j < 2; ++j) rotate(x[j], y[j], c[j], s[j], x[j], y[j]);
        first.words[i] = pack2(x[0], x[1]);
        second.words[i] = pack2(y[0], y[1]);
    }
}

__device__ char* at(const Rows& rows, int batch, int row, int head) {
    return rows.data + batch * rows.batch_stride + row * rows.row_stride + head * rows.head_stride;
}

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
    const int rotary_dim = is_v ? 0 : args.rotary_dim, half = rotary_dim / 2;
    const bool has_partner = !args.interleaved && column < half;
    const char* from = at(is_q ? args.q : is_v ? args.v : args.k, array_batch, row, head) + 2 * column;
    Chunk<4> own = {}, partner = {};  // on their way while the lengths are
    if (column < columns) own = load(from);
    if (has_partner) partner = load(from + 2 * half);
    if (column < rotary_dim) {  // finds the pages of the tables, of which the length says the row
        prefetch_global(args.cos);
        prefetch_global(args.sin);
    }

    const int batch = is_packed ? sequence_of(args, row) : array_batch;
    if (is_packed && row >= args.cu_seqlens_q[batch + 1]) return;
    const int number = is_packed ? row - args.cu_seqlens_q[batch] : row;  // in the sequence
    const int cached = args.cache_seqlens[batch], position = cached + number;
    char* to;
    if (is_q) {
        to = at(args.rotated_q, array_batch, row, head);
    } else {
        if (position < 0 || position >= args.capacity) return;  // a row that does not fit is dropped
        int cache_batch = args.cache_batch_idx != nullptr ? args.cache_batch_idx[batch] : batch, cache_row = position;
        if (args.page_table != nullptr) {
            cache_batch = args.page_table[batch * args.page_table_stride + position / args.page_size];
            cache_row = position % args.page_size;
        }
        to = at(is_v ? args.v_cache : args.k_cache, cache_batch, cache_row, head);
    }
    to += 2 * column;
    if (column < rotary_dim) {
        const int angle = is_q && !args.query_advances ? cached : position;
        const long long angles = (long long)min(max(angle, 0), args.max_position - 1) * half + (args.interleaved ? column / 2 : column);
        if (args.interleaved) {
            rotate_neighbours(own, args.cos + angles, args.sin + angles);
        } else if (has_partner) {
            rotate_halves(own, partner, args.cos + angles, args.sin + angles);
            store_global_16(to + 2 * half, partner.words);
        } else {
            return;  // another lane's partner
        }
    }
    if (column < columns) store_global_16(to, own.words);
}
