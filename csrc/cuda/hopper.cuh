// What only Hopper chips have (sm_90a), one function each: barriers in shared memory that count arrivals and bytes, copies
// of whole tiles (TMA), clusters of blocks, products of a warpgroup (wgmma) and registers that warps hand over.
//
// The tests compile `sweep.cu` for a CPU with their own meaning of these functions, so nothing but them is in here.
#ifndef VPPO_HOPPER
#define VPPO_HOPPER

#include <cuda.h>  // for its types: nothing of the driver is linked
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace vppo {

// Whether the compiler is at work on machine code that may have these instructions.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopperCode = true;
#else
constexpr bool kHopperCode = false;
#endif

// Numbers of 128 bytes side by side, which is what copies and products swizzle in shared memory.
constexpr int kSwizzled = 64;

// Where a matrix lies, for copies of boxes of `rows` x kSwizzled numbers. What lies outside of it is read as 0.
using TensorMap = CUtensorMap;

inline cudaError_t describe(const Matrix& matrix, int rows, TensorMap& map) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[] = {kSwizzled, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
  const auto type = matrix.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status =
      encode(&map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  return dynamic;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- clusters

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Waits for all threads of the cluster, which see what the others wrote before.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- barriers

// A phase of a barrier ends when all arrivals and bytes that it expects are there; then the next one begins.
struct Barrier {
  uint64_t state;
};

__device__ inline void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// After `init`, before the cluster synchronises: copies and other blocks then see the barriers.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, after which so many bytes more are expected.
__device__ inline void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// One arrival at the barrier of this name in a block of the cluster.
__device__ inline void arrive(Barrier& barrier, unsigned rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first, then 1, then 0 again. Of a barrier that is in its
// first phase, the phase before, of parity 1, counts as ended.
__device__ inline void wait(Barrier& barrier, unsigned parity) {
  unsigned ended;
  do {
    asm volatile(
        "{\n\t.reg .pred ended;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, ended;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// ---- copies

// Copies a box of the matrix, from this row and column on, into shared memory and reports its bytes to the barrier.
__device__ inline void load(void* into, const TensorMap& map, int row, int column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(into)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// The same into the same place of several blocks of the cluster, each of which has its own barrier; `blocks` has a bit
// for each.
__device__ inline void load(void* into, const TensorMap& map, int row, int column, Barrier& barrier, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(into)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// ---- registers

template <int COUNT>
__device__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- products of a warpgroup

constexpr int kSums = 128;  // of a product of 64 x 256 results, for each thread

// Before the first product of several: what the threads wrote into the sums is then there.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last COUNT: their operands may then be overwritten.
template <int COUNT>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

#define VPPO_PRODUCT(TYPE)                                                                                           \
  asm volatile(                                                                                                      \
      "{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, %130, 0;\n\t"                                                      \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                             \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                             \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                             \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                             \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                             \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                 \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "            \
      "%128, %129, adds, 1, 1, 0, 0;\n\t}"                                                                           \
      : VPPO_32(0), VPPO_32(32), VPPO_32(64), VPPO_32(96)                                                            \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))
#define VPPO_32(I) VPPO_8(I), VPPO_8(I + 8), VPPO_8(I + 16), VPPO_8(I + 24)
#define VPPO_8(I) VPPO_4(I), VPPO_4(I + 4)
#define VPPO_4(I) "+f"(sums[I]), "+f"(sums[I + 1]), "+f"(sums[I + 2]), "+f"(sums[I + 3])

// Starts `sums = a b^T`, or with `adds` `sums += a b^T`, of 64 x 16 and 256 x 16 numbers. Thread t of the warpgroup has
// columns 8 j + 2 (t % 4) and the next one of rows 16 (t / 32) + t % 32 / 4 and of that 8 below, in sums 4 j to 4 j + 3.
template <bool BFLOAT16>
__device__ void multiply(float (&sums)[kSums], uint64_t a, uint64_t b, bool adds) {
  if constexpr (BFLOAT16) {
    VPPO_PRODUCT("bf16");
  } else {
    VPPO_PRODUCT("f16");
  }
}

// Waits for all products. The sums are named, or the compiler might read them before.
__device__ inline void finish_products(float (&sums)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : VPPO_32(0), VPPO_32(32), VPPO_32(64), VPPO_32(96)::"memory");
}

#undef VPPO_PRODUCT
#undef VPPO_32
#undef VPPO_8
#undef VPPO_4

// ---- arithmetic

// `2^x` to 2 ulp; 0 where the result would not be a normal number.
__device__ inline float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The square root to 2 ulp.
__device__ inline float root(float x) {
  float found;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(x));
  return found;
}

}  // namespace vppo

#endif
