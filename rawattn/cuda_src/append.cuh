// New rows of K and V on their way into the cache, and the rotary embedding (Su et al. 2021) of their keys and of queries. A lane has 8 columns of a row,
// or 8 and the 8 that they are rotated with.
#pragma once
#include "ptx.cuh"

struct Rows {
    char* data;  // 16-bit elements
    long long batch_stride, row_stride, head_stride;  // bytes; where sequences are packed, the batch stride is 0

    __device__ char* at(int batch, int row, int head) const { return data + batch * batch_stride + row * row_stride + head * head_stride; }
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

// Cosines and sines of a lane's columns: eight, or four where pairs are neighbours.
struct Angles {
    Chunk<4> cos, sin;
};

struct Rotary {
    const uint16_t* cos;  // [max_position, dim / 2], or null
    const uint16_t* sin;  // likewise
    int dim, max_position;
    int interleaved;     // pairs are neighbours (1), or half of the rotary columns apart (0)
    int query_advances;  // query i is rotated as key i is (1), or all as key 0 (0)

    // Whether the columns from `column` on are rotated with those half of the rotary columns further, and whether they are such, another lane's.
    __device__ bool has_partner(int column) const { return !interleaved && column < dim / 2; }
    __device__ bool is_partner(int column) const { return !interleaved && column >= dim / 2 && column < dim; }

    // Where the tables have a position.
    __device__ long long row(int position) const { return (long long)min(max(position, 0), max_position - 1) * (dim / 2); }

    __device__ void prefetch(int position) const {
        prefetch_global(cos + row(position));
        prefetch_global(sin + row(position));
    }

    // What turns the columns from `column` < dim on at a position.
    __device__ Angles angles(int position, int column) const {
        const long long at = row(position) + (interleaved ? column / 2 : column);
        if (!interleaved) return {load(cos + at), load(sin + at)};
        const Chunk<2> cosines = load<2>(cos + at), sines = load<2>(sin + at);
        return {{cosines.words[0], cosines.words[1]}, {sines.words[0], sines.words[1]}};
    }

    // (x, y) turned by the angle of each column: x cos - y sin, y cos + x sin, in float32.
    static __device__ void turn(float x, float y, float cos, float sin, float& turned_x, float& turned_y) {
        turned_x = x * cos - y * sin;
        turned_y = y * cos + x * sin;
    }

    // Turns a lane's columns, with their partners if they have such.
    __device__ void turn(Chunk<4>& own, Chunk<4>& partner, const Angles& angles) const {
        for (int i = 0; i < 4; ++i) {
            float c[2], s[2], x[2], y[2];
            unpack2(interleaved ? angles.cos.words[i / 2] : angles.cos.words[i], c[0], c[1]);  // not words[...], which would lie in local memory
            unpack2(interleaved ? angles.sin.words[i / 2] : angles.sin.words[i], s[0], s[1]);
            unpack2(own.words[i], x[0], x[1]);
            if (interleaved) {
                turn(x[0], x[1], c[i % 2], s[i % 2], x[0], x[1]);
            } else {
                unpack2(partner.words[i], y[0], y[1]);
                for (int j = 0; j < 2; ++j) turn(x[j], y[j], c[j], s[j], x[j], y[j]);
                partner.words[i] = pack2(y[0], y[1]);
            }
            own.words[i] = pack2(x[0], x[1]);
        }
    }
};

struct Append {
    Rows k;        // [B, Sq, Hkv, D] or [Tq, Hkv, D]; data is null where nothing is appended
    Rows v;        // [B, Sq, Hkv, Dv] or [Tq, Hkv, Dv]
    Rows k_cache;  // [B_cache, S_max, Hkv, D] or [N, page_size, Hkv, D]
    Rows v_cache;  // [B_cache, S_max, Hkv, Dv] or [N, page_size, Hkv, Dv]
    Rotary rotary;

    // Where the cache has a sequence's row of K or V.
    template <class Arguments>
    __device__ char* cached(const Arguments& args, bool is_paged, bool is_v, int batch, int position, int kv_head) const {
        const Rows& cache = is_v ? v_cache : k_cache;
        if (!is_paged) return cache.at(args.cache_batch_idx != nullptr ? args.cache_batch_idx[batch] : batch, position, kv_head);
        return cache.at(args.page_table[batch * args.page_table_stride + position / args.page_size], position % args.page_size, kv_head);
    }
};
