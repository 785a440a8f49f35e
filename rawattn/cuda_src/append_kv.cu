// Writes the new rows of K and V into the cache, rotated by their positions where there is a rotary embedding (Su et al. 2021), and the rotated
// queries beside them. One warp has one head of one token; a lane has 8 columns, or 8 and the 8 that they are rotated with.
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

__device__ void copy_head(const char* from, char* to, int columns) {
    const int column = 8 * (threadIdx.x % 32);
    if (column < columns) store_global_16(to + 2 * column, load(from + 2 * column).words);
}

__device__ void rotate_head(const Arguments& args, const char* from, char* to, int position) {
    const int column = 8 * (threadIdx.x % 32), half = args.rotary_dim / 2;
    const long long row = (long long)min(max(position, 0), args.max_position - 1) * half;
    if (column >= args.rotary_dim) {
        if (column < args.head_dim) store_global_16(to + 2 * column, load(from + 2 * column).words);
    } else if (args.interleaved) {
        Chunk<4> chunk = load(from + 2 * column);
        const Chunk<2> cos = load<2>(args.cos + row + column / 2), sin = load<2>(args.sin + row + column / 2);
        for (int i = 0; i < 4; ++i) {
            float x, y, c[2], s[2];
            unpack2(chunk.words[i], x, y);
            unpack2(cos.words[i / 2], c[0], c[1]);
            unpack2(sin.words[i / 2], s[0], s[1]);
            rotate(x, y, c[i % 2], s[i % 2], x, y);
            chunk.words[i] = pack2(x, y);
        }
        store_global_16(to + 2 * column, chunk.words);
    } else if (column < half) {
        Chunk<4> first = load(from + 2 * column), second = load(from + 2 * (column + half));
        const Chunk<4> cos = load(args.cos + row + column), sin = load(args.sin + row + column);
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
        store_global_16(to + 2 * column, first.words);
        store_global_16(to + 2 * (column + half), second.words);
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
    const int heads = 2 * args.kv_heads + (args.rotated_q.data != nullptr ? args.q_heads : 0);
    const long long task = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
    const long long token = task / heads;
    const int task_head = task % heads;
    const bool is_packed = args.cu_seqlens_q != nullptr;
    if (token >= (is_packed ? 1LL : args.batch) * args.seqlen_q) return;
    const int row = token % args.seqlen_q;  // in the arrays of new rows
    const int batch = is_packed ? sequence_of(args, row) : token / args.seqlen_q;
    if (is_packed && row >= args.cu_seqlens_q[batch + 1]) return;
    const int array_batch = is_packed ? 0 : batch;
    const int number = is_packed ? row - args.cu_seqlens_q[batch] : row;  // in the sequence
    const int cached = args.cache_seqlens[batch], position = cached + number;

    if (task_head >= 2 * args.kv_heads) {
        const int head = task_head - 2 * args.kv_heads;
        rotate_head(args, at(args.q, array_batch, row, head), at(args.rotated_q, array_batch, row, head), args.query_advances ? position : cached);
        return;
    }
    if (position < 0 || position >= args.capacity) return;  // a row that does not fit is dropped
    int cache_batch = args.cache_batch_idx != nullptr ? args.cache_batch_idx[batch] : batch, cache_row = position;
    if (args.page_table != nullptr) {
        cache_batch = args.page_table[batch * args.page_table_stride + position / args.page_size];
        cache_row = position % args.page_size;
    }
    const int head = task_head % args.kv_heads;
    if (task_head >= args.kv_heads)
        copy_head(at(args.v, array_batch, row, head), at(args.v_cache, cache_batch, cache_row, head), args.head_dim_v);
    else if (args.rotary_dim > 0)
        rotate_head(args, at(args.k, array_batch, row, head), at(args.k_cache, cache_batch, cache_row, head), position);
    else
        copy_head(at(args.k, array_batch, row, head), at(args.k_cache, cache_batch, cache_row, head), args.head_dim);
}
