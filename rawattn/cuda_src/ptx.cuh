// One wrapper for each PTX instruction that the kernels need. Section numbers: PTX ISA 8.8.
#pragma once

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

struct alignas(64) TensorMap {
    uint64_t opaque[16];  // a CUtensorMap, written by cuTensorMapEncodeTiled
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier (9.7.13.15) ----

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the TMA unit and to the cluster (fence.mbarrier_init, 9.7.13.4).
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The braces keep the labels local, so that the wrapper can be inlined more than once. With the hint (in ns) a waiting warp sleeps; without,
// it asks every 25 cycles and takes issue slots from the consumer warps beside it.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@done bra.uni DONE;\n"
        "bra.uni WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(barrier), "r"(phase), "n"(10000000) : "memory");
}

// Likewise for what CTAs of the cluster have stored here.
__device__ __forceinline__ void mbarrier_wait_for_cluster(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1, %2;\n"
        "@done bra.uni DONE;\n"
        "bra.uni WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(barrier), "r"(phase), "n"(10000000) : "memory");
}

// ---- TMA (9.7.9.25) ----

// prefetch.tensormap (9.7.9.15)
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Brings 32 bytes into L2 (prefetch, 9.7.9.15).
__device__ __forceinline__ void prefetch_global(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer) : "memory");
}

// How L2 is to treat what passes: the encodings that createpolicy (9.7.9.18) gives for all of it.
constexpr uint64_t L2_EVICT_NORMAL = 0x1000000000000000, L2_EVICT_FIRST = 0x12F0000000000000;

// Copies one box to shared memory; elements outside the tensor arrive as zeros. Coordinates: column, row, row offset, head, batch.
template <uint64_t L2_POLICY = L2_EVICT_NORMAL>
__device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column, int row, int offset, int head, int batch) {
    if constexpr (L2_POLICY != L2_EVICT_NORMAL) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
            "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(offset), "r"(head), "r"(batch), "l"(L2_POLICY)
            : "memory");
        return;
    }
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(offset), "r"(head), "r"(batch)
        : "memory");
}

// ---- warpgroup MMA (9.7.15) ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the latest groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Pins registers that an asynchronous MMA reads or writes: the compiler may neither move accesses across this point nor reuse them before it.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void pin(uint64_t& register_pair) { asm volatile("" : "+l"(register_pair)::"memory"); }

template <int N>
__device__ __forceinline__ void pin(uint32_t (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Matrix descriptor of a 128-byte-swizzled operand (9.7.15.5.1): 8-row groups are 1024 bytes apart, 64-column slabs SLAB_STRIDE apart.
// Only the low half depends on the address, so that stepping through a tile is one 32-bit addition for each MMA.
template <int SLAB_STRIDE>
struct MatrixDescriptor {
    uint32_t low;

    // In a cluster the CTA's rank stands above bit 18 of an address.
    __device__ __forceinline__ explicit MatrixDescriptor(uint32_t address) : low((CLUSTER ? address & 0x3ffff : address) >> 4 | SLAB_STRIDE >> 4 << 16) {}
    __device__ __forceinline__ uint64_t at(int bytes) const {
        constexpr uint32_t high = 1u << 30 | 1024 >> 4;  // swizzle mode 1 in bits 62 and 63, stride of row groups from bit 32
        return uint64_t(high) << 32 | (low + bytes / 16);
    }
    // Of the 16 columns of one of the steps of an MMA, from byte `bytes` on.
    __device__ __forceinline__ uint64_t at_step(int step, int bytes = 0) const { return at(step / 4 * SLAB_STRIDE + step % 4 * 32 + bytes); }
};

// Stores two 8 x 8 matrices of 16-bit elements transposed (stmatrix, 9.7.14.5.16): lane 8 * m + r gives where row r of the stored matrix m begins, 16 bytes.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&words)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1]) : "memory");
}

// Makes the thread's writes to shared memory visible to WGMMA (fence.proxy, 9.7.13.4).
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void load_shared_16(uint32_t address, uint32_t (&words)[4]) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint32_t (&words)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// ---- memory order ----

// Makes the thread's writes to global memory visible to TMA (fence.proxy, 9.7.13.4).
__device__ __forceinline__ void global_async_proxy_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Adds to a counter and returns what it was. Who finds another's addition in it sees what that thread, and those that it had met at a barrier, did in
// global memory before (atom, 9.7.13.5).
__device__ __forceinline__ int add_and_meet(int* counter, int number) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(number) : "memory");
    return before;
}

// ---- programmatic dependent launch (griddepcontrol, 9.7.13.13) ----

// Lets the next kernel of the stream start, if it was launched so that it may, once all CTAs of this one have called this or ended.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernel before, during which this one was allowed to start, has ended and all that it wrote can be seen, by TMA too (fence.proxy).
// Returns at once in a kernel that was launched as usual.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    global_async_proxy_fence();
}

// ---- thread block clusters ----

// %cluster_ctarank and %cluster_nctarank (10.16, 10.17)
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// barrier.cluster (9.7.13.3): who has waited may use the shared memory of the cluster's CTAs and the barriers that they made visible before they arrived.
// All threads arrive, or end. Relaxed, since a release would be a fence of all memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where a CTA of the cluster has what this one has at `address` of its shared memory (mapa, 9.7.9.23).
__device__ __forceinline__ uint32_t shared_address_of(uint32_t address, int rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Stores to a CTA of the cluster, where an mbarrier counts the bytes (st.async, 9.7.9.12); or, if the CTA `is_single`, as usual, since memcheck wants two
// CTAs for st.async. Both predicated: a branch would cost more than the instruction.
__device__ __forceinline__ void store_cluster_8(uint32_t address, float x, float y, uint32_t barrier, bool is_single) {
    asm volatile(
        "{\n"
        ".reg .pred single;\n"
        "setp.ne.u32 single, %4, 0;\n"
        "@single st.shared.v2.f32 [%0], {%1, %2};\n"
        "@!single st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n"
        "}\n" ::"r"(address), "f"(x), "f"(y), "r"(barrier), "r"(uint32_t(is_single)) : "memory");
}

__device__ __forceinline__ void store_cluster_16(uint32_t address, float x, float y, float z, float w, uint32_t barrier, bool is_single) {
    asm volatile(
        "{\n"
        ".reg .pred single;\n"
        "setp.ne.u32 single, %6, 0;\n"
        "@single st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "@!single st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n"
        "}\n" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w), "r"(barrier), "r"(uint32_t(is_single)) : "memory");
}

// ---- registers, barriers between warpgroups ----

// setmaxnreg (9.7.20.5)
template <int REGISTERS>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void acquire_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// bar (9.7.13.1); id 0 belongs to __syncthreads
__device__ __forceinline__ void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- arithmetic ----

// ex2 (9.7.3.21): relative error 2^-22
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// rcp (9.7.3.13): within 1 ulp
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to nearest even and packed, the first in the low half (cvt, 9.7.9.21).
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t packed;
    if constexpr (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The two floats that pack2 packed, each widened exactly (cvt).
__device__ __forceinline__ void unpack2(uint32_t packed, float& low, float& high) {
    if constexpr (BF16) {
        low = __uint_as_float(packed << 16);
        high = __uint_as_float(packed & 0xFFFF0000);
    } else {
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}" : "=f"(low), "=f"(high) : "r"(packed));
    }
}

// ---- stores of 16, 4 and 8 bytes (st, 9.7.9.11) ----

__device__ __forceinline__ void store_global_16(void* pointer, const uint32_t (&words)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

__device__ __forceinline__ void store_global_4(void* pointer, uint32_t word) { asm volatile("st.global.b32 [%0], %1;" ::"l"(pointer), "r"(word) : "memory"); }

__device__ __forceinline__ void store_global_8(void* pointer, uint32_t first, uint32_t second) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(pointer), "r"(first), "r"(second) : "memory");
}
