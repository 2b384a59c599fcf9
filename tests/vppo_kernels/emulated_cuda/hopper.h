// Stands in for `csrc/cuda/hopper.cuh`: what a Hopper chip does, on the emulated blocks and threads of `cuda_runtime.h`.
//
// Copies arrive between the turns of the warps, and products are made at the latest moment, when they are waited for;
// with EMULATED_CUDA_ORDER=reversed the newest copy arrives first and products are made at once. Who reads too early, or
// gives memory away too early, gets other numbers. Sums are cut off as a tensor core does it.
#pragma once
#define VPPO_HOPPER

#include <cuda_runtime.h>

#include <kernels.h>

extern "C" void multiply(const float* a, const float* b, float* out, int64_t rows, int64_t columns, int64_t depth);

namespace vppo {

using emulated::cluster;

constexpr bool kHopperCode = true;
constexpr int kSwizzled = 64;
constexpr size_t kFirstAddress = 1024;  // of shared memory
inline const char* const kProduct = "wgmma";
inline const char* const kRegisters = "setmaxnreg";
inline const char* const kCopy = "a barrier that counts";

struct TensorMap {
  Matrix matrix;
  int rows;
};

inline cudaError_t describe(const Matrix& matrix, int rows, TensorMap& map) {
  map = {matrix, rows};
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride * 2 % 16 == 0;
  return aligned && rows <= 256 && matrix.rows > 0 && matrix.columns > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

inline emulated::Block& this_block() { return *cluster.running->block; }
inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(this_block().shared); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - this_block().shared + kFirstAddress);
}

// ---- clusters

inline unsigned cluster_rank() { return static_cast<unsigned>(&this_block() - cluster.blocks.data()); }
inline unsigned cluster_size() { return static_cast<unsigned>(cluster.size); }
inline void cluster_sync() { emulated::meet(cluster.meeting, emulated::kCluster); }

// The same place in the memory of another block, which must still run.
template <typename T>
T* in_block(const T* here, const emulated::Block& from, const emulated::Block& to) {
  if (to.meeting.alive == 0) emulated::fail("the memory of a block that has ended is written to");
  return reinterpret_cast<T*>(to.shared + (reinterpret_cast<const char*>(here) - from.shared));
}

// ---- barriers

struct Barrier {
  int arrivals, missing, bytes;
  unsigned phase;

  void check() const {
    if (arrivals <= 0) emulated::fail("a barrier is used that nobody has initialised");
  }
  void arrive() {
    check();
    if (missing == 0) emulated::fail("more arrivals at a barrier than it expects");
    --missing;
    end_phase();
  }
  void take(int count) {
    check();
    bytes -= count;
    end_phase();
  }
  void end_phase() {
    cluster.moved = true;
    if (missing == 0 && bytes < 0) emulated::fail("more bytes at a barrier than it expects");
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};

inline void init(Barrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, 0}; }
inline void publish_barriers() {}
inline void arrive_expecting(Barrier& barrier, int bytes) {
  barrier.bytes += bytes;
  barrier.arrive();
}
inline void arrive(Barrier& barrier, unsigned rank) {
  in_block(&barrier, this_block(), cluster.blocks.at(rank))->arrive();
}
inline void wait(Barrier& barrier, unsigned parity) {
  barrier.check();
  emulated::wait_until(kCopy, [&] { return (barrier.phase & 1) != parity; });
}

// ---- copies

inline size_t swizzled(size_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load(void* into, const TensorMap& map, int row, int column, Barrier& barrier, unsigned blocks) {
  const emulated::Block& here = this_block();
  const size_t offset = static_cast<size_t>(static_cast<char*>(into) - here.shared);
  if (offset % 1024 != 0) emulated::fail("a copy to where no swizzled box begins");
  cluster.copies.push_back([=, &here, &barrier] {
    const auto* const data = static_cast<const uint16_t*>(map.matrix.data);
    for (unsigned rank = 0; rank < cluster.size; ++rank) {
      if ((blocks >> rank & 1) == 0) continue;
      char* const shared = cluster.blocks[rank].shared;
      for (int r = 0; r < map.rows; ++r) {
        for (int c = 0; c < kSwizzled; ++c) {
          const bool inside = row + r < map.matrix.rows && column + c < map.matrix.columns;
          const uint16_t value = inside ? data[(row + r) * map.matrix.stride + column + c] : 0;
          std::memcpy(shared + swizzled(offset + (r * kSwizzled + c) * 2), &value, sizeof value);
        }
      }
      in_block(&barrier, here, cluster.blocks[rank])->take(map.rows * kSwizzled * 2);
    }
  });
}

inline void load(void* into, const TensorMap& map, int row, int column, Barrier& barrier) {
  load(into, map, row, column, barrier, 1u << cluster_rank());
}

// ---- registers

template <int COUNT>
void give_registers_back() {
  emulated::wait(kRegisters);
}
template <int COUNT>
void take_registers() {
  emulated::wait(kRegisters);
}

// ---- products of a warpgroup

constexpr int kSums = 128;

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bfloat16(uint16_t narrow) {
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sixteen numbers of a row of the operand that a descriptor tells of.
template <bool BFLOAT16>
void read_row(uint64_t operand, int row, const emulated::Block& block, float* into) {
  const size_t start = (operand & 0x3fff) << 4, next_eight = (operand >> 32 & 0x3fff) << 4;
  if (operand >> 62 != 1) emulated::fail("an operand that is not swizzled over 128 bytes");
  for (int k = 0; k < 16; ++k) {
    uint16_t value;
    const size_t address = swizzled(start + row / 8 * next_eight + row % 8 * 128 + k * 2);
    std::memcpy(&value, block.shared + address - kFirstAddress, sizeof value);
    into[k] = BFLOAT16 ? from_bfloat16(value) : from_half(value);
  }
}

inline void begin_products() {
  auto& groups = cluster.running->groups;
  groups.emplace_back();
  emulated::wait(kProduct);
}

inline void end_products() { emulated::wait(kProduct); }

template <bool BFLOAT16>
void multiply(float (&sums)[kSums], uint64_t a, uint64_t b, bool adds) {
  const unsigned thread = threadIdx.x % 128, lane = thread % 32;
  const emulated::Block& block = this_block();
  const emulated::Task make = [&sums, &block, a, b, adds, thread, lane] {
    float left[2][16], right[64][16], out[2][64];
    for (int r = 0; r < 2; ++r) read_row<BFLOAT16>(a, thread / 32 * 16 + lane / 4 + 8 * r, block, left[r]);
    for (int c = 0; c < 64; ++c) read_row<BFLOAT16>(b, c / 2 * 8 + lane % 4 * 2 + c % 2, block, right[c]);
    for (int i = 0; i < kSums; ++i) out[i / 2 % 2][i / 4 * 2 + i % 2] = adds ? sums[i] : 0.0f;
    ::multiply(left[0], right[0], out[0], 2, 64, 16);
    for (int i = 0; i < kSums; ++i) sums[i] = out[i / 2 % 2][i / 4 * 2 + i % 2];
  };
  emulated::wait(kProduct);
  if (cluster.reversed) {
    make();
  } else if (cluster.running->groups.empty()) {
    emulated::fail("a product that nothing begins");
  } else {
    cluster.running->groups.back().push_back(make);
  }
}

template <int COUNT>
void wait_for_products() {
  emulated::wait(kProduct);
  auto& groups = cluster.running->groups;
  for (; groups.size() > COUNT; groups.pop_front()) {
    for (const emulated::Task& make : groups.front()) make();
  }
  emulated::wait(kProduct);
}

inline void finish_products(float (&)[kSums]) { wait_for_products<0>(); }

// ---- arithmetic

inline float root(float x) { return std::sqrt(x); }

// As far off as the chip's may be.
inline float power_of_2(float x) {
  const float power = std::exp2(x);
  if (power < 1.17549435e-38f) return 0.0f;
  return power * (__float_as_int(x) % 2 == 0 ? 1.0f + 0x1p-22f : 1.0f - 0x1p-22f);
}

}  // namespace vppo
