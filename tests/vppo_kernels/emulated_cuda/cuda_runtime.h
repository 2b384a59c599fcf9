// Stands in for CUDA's own header of this name, so that a C++ compiler builds `csrc/cuda` as it is, for a CPU.
//
// Every CUDA thread of a cluster of blocks is a fibre, and clusters run one after the other. A warp runs as far as it
// can, until all of its threads wait for other warps, before the next warp takes its turn; its threads must meet in the
// same shuffles. Where nobody can go on, or threads do not meet, the launch fails and says where they wait. With
// EMULATED_CUDA_ORDER=reversed, clusters, warps and threads take turns from the last to the first: a result that changes
// is a race. (`hopper.h` has what only Hopper chips do.)
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
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define kDLCUDA kDLCPU  // the tensors that the bindings take
#define __global__
#define __device__
#define __host__
#define __shared__ static  // of the block that runs: kernels with clusters have dynamic shared memory alone
#define __launch_bounds__(...)
#define __grid_constant__

using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fibre that runs

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int binaryVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {

constexpr size_t kStack = 64 << 10;
constexpr size_t kLanes = 32;
constexpr size_t kMostShared = 227 << 10;
constexpr size_t kSharedAlignment = 1024;
// where a thread can wait: for its warp,
inline const char* const kShuffleXor = "__shfl_xor_sync";
inline const char* const kShuffleUp = "__shfl_up_sync";
// for other warps,
inline const char* const kBarrier = "__syncthreads";
inline const char* const kCluster = "the barrier of the cluster";
// and for nobody
inline const char* const kEnd = "the end";

// A barrier of all threads of a block or of a cluster that have not ended.
struct Meeting {
  size_t alive = 0, there = 0;
  unsigned times = 0;

  void arrive() {
    ++there;
    open();
  }
  void leave() {
    --alive;
    open();
  }
  void open() {
    if (there > 0 && there == alive) there = 0, ++times;
  }
};

struct Block {
  dim3 index;
  Meeting meeting;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
};

using Task = std::function<void()>;

struct Fibre {
  std::unique_ptr<char[]> stack;
  jmp_buf place;  // where it waits
  bool started = false;
  dim3 index;
  Block* block = nullptr;
  const char* waits_at = nullptr;
  bool for_others = false;  // it waits for other warps
  unsigned shuffles = 0;
  std::deque<std::vector<Task>> groups;  // what it has started and not waited for
};

struct Cluster {
  jmp_buf scheduler;
  std::vector<Fibre> fibres;
  std::vector<Block> blocks;
  size_t size = 0;  // blocks that run
  Meeting meeting;
  std::vector<uint32_t> passed[2];  // what threads hold out in a shuffle; every other one uses the other
  std::deque<Task> copies;          // that are under way
  const Task* kernel = nullptr;
  Fibre* running = nullptr;  // null while the scheduler runs
  bool reversed = false;
  bool moved = false;  // whether a thread has got on
};

inline Cluster cluster;
inline std::string failure;  // why the launch is given up

// Contexts start fibres; jumps, which ask nothing of the operating system, go between them.
inline void wait(const char* where) {
  cluster.running->waits_at = where;
  if (_setjmp(cluster.running->place) == 0) _longjmp(cluster.scheduler, 1);
}

inline void fail(const std::string& why) {
  if (failure.empty()) failure = "emulated_cuda: " + why;
  while (cluster.running != nullptr) {
    cluster.running->for_others = true;
    wait("nothing any more");
  }
}

template <typename Holds>
void wait_until(const char* where, const Holds& holds) {
  cluster.moved = true;
  Fibre& self = *cluster.running;
  for (self.for_others = true; !holds();) wait(where);
  self.for_others = false;
  cluster.moved = true;
}

inline void meet(Meeting& meeting, const char* where) {
  const unsigned before = meeting.times;
  meeting.arrive();
  Fibre& self = *cluster.running;
  cluster.moved = self.for_others = true;
  do wait(where);
  while (meeting.times == before);
  self.for_others = false;
  cluster.moved = true;
}

inline void enter() {
  (*cluster.kernel)();
  cluster.running->block->meeting.leave();
  cluster.meeting.leave();
  cluster.moved = true;
  wait(kEnd);
}

inline void resume(Fibre& fibre) {
  cluster.running = &fibre;
  threadIdx = fibre.index;
  blockIdx = fibre.block->index;
  if (_setjmp(cluster.scheduler) != 0) {
    cluster.running = nullptr;
    return;
  }
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
  return cluster.reversed ? count - 1 - index : index;
}

// Runs the threads of a warp until all that are left wait for other warps; whether there are any.
inline bool run_warp(size_t first, size_t threads) {
  for (;;) {
    const char *together = nullptr, *others = nullptr;
    for (size_t i = 0; i < threads && failure.empty(); ++i) {
      Fibre& fibre = cluster.fibres[first + turn(i, threads)];
      if (fibre.waits_at == kEnd) continue;
      resume(fibre);
      if (fibre.waits_at == kEnd) continue;
      if (fibre.for_others) {
        others = fibre.waits_at;
        continue;
      }
      if (together != nullptr && together != fibre.waits_at) {
        fail(std::string("threads of a warp wait at ") + together + " and at " + fibre.waits_at);
      }
      together = fibre.waits_at;
    }
    if (together == nullptr || !failure.empty()) return others != nullptr;
    if (others != nullptr) fail(std::string("threads of a warp wait at ") + together + " and at " + others);
  }
}

// The oldest first, or the other way round and fewer at a time.
inline void deliver_copies() {
  while (!cluster.copies.empty() && failure.empty()) {
    const Task copy = cluster.reversed ? cluster.copies.back() : cluster.copies.front();
    cluster.reversed ? cluster.copies.pop_back() : cluster.copies.pop_front();
    copy();
    if (cluster.reversed) return;
  }
}

inline void prepare_cluster(size_t first_block, size_t blocks, size_t shared) {
  const size_t threads = blockDim.x * blockDim.y * blockDim.z;
  cluster.fibres.resize(std::max(threads * blocks, cluster.fibres.size()));
  cluster.blocks.resize(std::max(blocks, cluster.blocks.size()));
  for (auto& values : cluster.passed) values.resize(cluster.fibres.size());
  cluster.size = blocks;
  cluster.meeting = {threads * blocks};
  cluster.copies.clear();
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = cluster.blocks[b];
    block.index = dim3((first_block + b) % gridDim.x, (first_block + b) / gridDim.x);
    block.meeting = {threads};
    if (!block.memory) block.memory.reset(new char[kMostShared + kSharedAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = block.memory.get() + (kSharedAlignment - address % kSharedAlignment);
    std::memset(block.shared, 0xff, shared);
    for (size_t i = 0; i < threads; ++i) {
      Fibre& fibre = cluster.fibres[b * threads + i];
      if (!fibre.stack) fibre.stack.reset(new char[kStack]);
      fibre.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      fibre.block = &block;
      fibre.started = fibre.for_others = false;
      fibre.waits_at = nullptr;
      fibre.shuffles = 0;
      fibre.groups.clear();
    }
  }
}

inline void run_cluster(const Task& kernel, size_t first_block, size_t blocks, size_t shared) {
  const size_t threads = blockDim.x * blockDim.y * blockDim.z, warps = (threads + kLanes - 1) / kLanes;
  prepare_cluster(first_block, blocks, shared);
  cluster.kernel = &kernel;
  for (bool waiting = true; waiting && failure.empty();) {
    waiting = cluster.moved = false;
    for (size_t i = 0; i < warps * blocks && failure.empty(); ++i) {
      const size_t at = turn(i, warps * blocks), first = at % warps * kLanes;
      waiting |= run_warp(at / warps * threads + first, std::min(kLanes, threads - first));
    }
    if (!waiting && !cluster.copies.empty()) fail("a block ends before its copies do");
    if (waiting && cluster.copies.empty() && !cluster.moved) {
      std::string where;
      for (size_t i = 0; i < threads * blocks; ++i) {
        const char* const each = cluster.fibres[i].waits_at;
        if (each != kEnd && where.find(each) == std::string::npos) where += (where.empty() ? "" : " and at ") + std::string(each);
      }
      fail("nobody can go on; threads wait at " + where);
    }
    deliver_copies();
  }
}

template <typename Value>
Value shuffle(Value value, unsigned mask, unsigned partner_lane, const char* where) {
  static_assert(sizeof(Value) == sizeof(uint32_t));
  Fibre& self = *cluster.running;
  const size_t threads = blockDim.x * blockDim.y * blockDim.z;
  const size_t thread = static_cast<size_t>(&self - cluster.fibres.data());
  const size_t partner = thread % threads / kLanes * kLanes + partner_lane;  // in the block
  const size_t other = thread / threads * threads + partner;
  auto& values = cluster.passed[self.shuffles++ % 2];
  std::memcpy(&values[thread], &value, sizeof(value));
  wait(where);
  if (mask != ~0u || partner >= threads || cluster.fibres[other].shuffles < self.shuffles) {
    fail("a shuffle with a lane that is not there");
  }
  std::memcpy(&value, &values[other], sizeof(value));
  return value;
}

}  // namespace emulated

inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorLaunchFailure  ? "cudaErrorLaunchFailure"
         : status == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                           : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorLaunchFailure  ? emulated::failure.c_str()
         : status == cudaErrorInvalidValue ? "invalid argument"
                                           : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= static_cast<int>(emulated::kMostShared) ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, Kernel) {
  return code->binaryVersion = 90, cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  return *clusters = static_cast<int>(8 / config->attrs[0].val.clusterDim.x), cudaSuccess;
}

inline void __syncthreads() { emulated::meet(emulated::cluster.running->block->meeting, emulated::kBarrier); }

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
  const size_t blocks = grid.x * grid.y;
  const size_t together = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  if (grid.x % together != 0 || config->dynamicSmemBytes > emulated::kMostShared) return cudaErrorInvalidConfiguration;
  static std::mutex alone;
  const std::lock_guard<std::mutex> lock(alone);
  const char* order = std::getenv("EMULATED_CUDA_ORDER");
  emulated::cluster.reversed = order != nullptr && std::string(order) == "reversed";
  emulated::failure.clear();
  gridDim = grid;
  blockDim = size;
  for (size_t i = 0; i < blocks / together && emulated::failure.empty(); ++i) {
    const size_t first = emulated::turn(i, blocks / together) * together;
    emulated::run_cluster([&] { kernel(static_cast<Parameters>(arguments)...); }, first, together,
                          config->dynamicSmemBytes);
  }
  return emulated::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
