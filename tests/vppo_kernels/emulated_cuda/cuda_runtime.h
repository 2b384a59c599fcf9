// Stands in for CUDA's own header of this name, so that a C++ compiler builds `csrc/cuda` as it is, for a CPU.
//
// Every CUDA thread of a block is a fibre, and blocks run one after the other. A warp runs as far as it can, to the
// next `__syncthreads`, before the next warp takes its turn; its threads must meet in the same shuffles, or the process
// aborts. With EMULATED_CUDA_ORDER=reversed, blocks, warps and threads take turns from the last to the first: a result
// that changes is a race.
#pragma once

#include <dlpack/dlpack.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define kDLCUDA kDLCPU  // the tensors that the bindings take
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulated {

constexpr size_t kStack = 64 << 10;
constexpr size_t kLanes = 32;
// where a thread can wait
inline const char* const kEnd = "the end";
inline const char* const kBarrier = "__syncthreads";
inline const char* const kShuffleXor = "__shfl_xor_sync";
inline const char* const kShuffleUp = "__shfl_up_sync";

struct Fibre {
  std::unique_ptr<char[]> stack;
  jmp_buf place;  // where it waits
  bool started = false;
  dim3 index;
  const char* waits_at = nullptr;
  unsigned shuffles = 0;
};

struct Block {
  jmp_buf scheduler;
  std::vector<Fibre> fibres;
  std::vector<uint32_t> passed[2];  // what threads hold out in a shuffle; every other one uses the other
  const std::function<void()>* kernel = nullptr;
  Fibre* running = nullptr;
  bool reversed = false;
};

inline Block block;

[[noreturn]] inline void fail(const std::string& why) {
  std::fprintf(stderr, "emulated_cuda: %s\n", why.c_str());
  std::abort();
}

// Contexts start fibres; jumps, which ask nothing of the operating system, go between them.
inline void wait(const char* where) {
  block.running->waits_at = where;
  if (_setjmp(block.running->place) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
  (*block.kernel)();
  wait(kEnd);
}

inline void resume(Fibre& fibre) {
  block.running = &fibre;
  threadIdx = fibre.index;
  if (_setjmp(block.scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fibre.stack.get();
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

inline size_t turn(size_t index, size_t count) {
  return block.reversed ? count - 1 - index : index;
}

// Runs the threads of a warp until all that are left wait for the block; whether there are any.
inline bool run_warp(size_t first, size_t threads) {
  for (;;) {
    const char* where = nullptr;
    for (size_t i = 0; i < threads; ++i) {
      Fibre& fibre = block.fibres[first + turn(i, threads)];
      if (fibre.waits_at == kEnd) continue;
      resume(fibre);
      if (fibre.waits_at == kEnd) continue;
      if (where != nullptr && where != fibre.waits_at) {
        fail(std::string("threads of a warp wait at ") + where + " and at " + fibre.waits_at);
      }
      where = fibre.waits_at;
    }
    if (where == nullptr || where == kBarrier) return where != nullptr;
  }
}

inline void run_block(const std::function<void()>& kernel) {
  const size_t threads = blockDim.x * blockDim.y * blockDim.z, warps = (threads + kLanes - 1) / kLanes;
  block.kernel = &kernel;
  block.fibres.resize(std::max(threads, block.fibres.size()));
  for (auto& values : block.passed) values.resize(block.fibres.size());
  for (size_t i = 0; i < threads; ++i) {
    Fibre& fibre = block.fibres[i];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    fibre.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fibre.started = false;
    fibre.waits_at = nullptr;
    fibre.shuffles = 0;
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (size_t i = 0; i < warps; ++i) {
      const size_t first = turn(i, warps) * kLanes;
      waiting |= run_warp(first, std::min(kLanes, threads - first));
    }
  }
}

template <typename Value>
Value shuffle(Value value, unsigned mask, unsigned partner_lane, const char* where) {
  static_assert(sizeof(Value) == sizeof(uint32_t));
  Fibre& self = *block.running;
  const size_t thread = static_cast<size_t>(&self - block.fibres.data());
  const size_t partner = thread / kLanes * kLanes + partner_lane;
  auto& values = block.passed[self.shuffles++ % 2];
  std::memcpy(&values[thread], &value, sizeof(value));
  wait(where);
  if (mask != ~0u || partner >= blockDim.x * blockDim.y * blockDim.z ||
      block.fibres[partner].shuffles < self.shuffles) {
    fail("a shuffle with a lane that is not there");
  }
  std::memcpy(&value, &values[partner], sizeof(value));
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::kBarrier); }

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int step) {
  return emulated::shuffle(value, mask, threadIdx.x % 32 ^ static_cast<unsigned>(step), emulated::kShuffleXor);
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, int step) {
  const unsigned lane = threadIdx.x % 32, by = static_cast<unsigned>(step);
  return emulated::shuffle(value, mask, lane < by ? lane : lane - by, emulated::kShuffleUp);
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, size = config->blockDim;
  if (grid.x * grid.y * grid.z == 0 || grid.y > 65535 || size.x * size.y * size.z == 0 ||
      size.x * size.y * size.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  static std::mutex alone;
  const std::lock_guard<std::mutex> lock(alone);
  const char* order = std::getenv("EMULATED_CUDA_ORDER");
  emulated::block.reversed = order != nullptr && std::string(order) == "reversed";
  gridDim = grid;
  blockDim = size;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    const size_t at = emulated::turn(i, grid.x * grid.y);
    blockIdx = dim3(at % grid.x, at / grid.x);
    emulated::run_block([&] { kernel(static_cast<Parameters>(arguments)...); });
  }
  return cudaSuccess;
}
