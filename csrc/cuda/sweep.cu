// The fused sweep for Hopper: product and fold in one kernel, logits in registers only.
//
// A block takes 128 rows of hidden states, of two views in turns of eight, through a part of the vocabulary in tiles of
// 256 columns. One thread copies slices of 64 numbers of both operands into a ring of stages; two warpgroups of 64 rows
// each multiply them, and each folds the logits of its tile where the products left them: a thread holds 64 columns of
// both views of one row, or of two rows of one view, and keeps statistics of its own until the end.
//
// The second warpgroup begins a ring of stages later than the first, so one multiplies while the other folds. Both read
// the same slice of the weight, and so do all blocks of a cluster, which have other rows: each copies its share of it
// into the shared memory of all.
#include <cmath>
#include <cstdint>

#include "../statistics.h"
#include "hopper.cuh"
#include "kernels.h"
#include "row.cuh"
#include "softmax.cuh"

namespace vppo {
namespace fused {  // inline and not without a name, as nothing uses it on other chips, which compilers would mention

constexpr int kRows = 128, kColumns = 256, kDepth = kSwizzled;  // of a block, of a tile, of a stage
constexpr int kStages = 4;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;  // of which the first copies
constexpr int kWarpsThatRead = 8;                           // of a block
constexpr int kCopyRows = kColumns / kMostRanks;            // of the weight, in one copy
constexpr int kWords = kSums / 2;                           // of each of its two rows that a thread holds
constexpr float kFar = 20.0f;                               // the mean gap does not move by more in one pass
constexpr float kLog2E = 1.4426950408889634f;

struct Stage {
  uint16_t hidden[kRows * kDepth], weight[kColumns * kDepth];
};

struct Shared {
  Stage stages[kStages];
  Barrier full[kStages], empty[kStages];
  Barrier ahead;  // the first warpgroup has had every stage once
};

// Goes around the ring of stages.
struct Place {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// What the kernel is told of its work.
struct Work {
  int64_t rows;                                             // of each view
  int columns, slices, tiles, tiles_of_part, row_clusters;  // `slices` of the hidden size
  const float* bias;
  float scale;
  Targets targets;
  Fields out;
  int64_t part_stride;  // from the statistics of a part to those of the next
};

// A matrix operand in shared memory, as products take it: slices of 128 bytes, swizzled, eight rows after 1024 bytes.
__device__ inline uint64_t operand(const uint16_t* data) {
  const uint64_t address = (shared_address(data) & 0x3ffff) >> 4, next_eight = 1024 >> 4, swizzle_of_128 = 1;
  return address | uint64_t{1} << 16 | next_eight << 32 | swizzle_of_128 << 62;
}

__device__ inline float exp_fast(float x) { return power_of_2(x * kLog2E); }

// What distances are measured from: the largest logit, or where all are masked a number far above theirs.
__device__ inline float base_of(float top) { return top < 0.1f * kFloor ? 0.1f * kFloor : top; }

// A logit that is at the floor because its word is masked, as it is known elsewhere.
__device__ inline float seen(float z) { return z <= kFloor ? -INFINITY : z; }

// Logit i of the upper and of the lower of a thread's two rows; its column is `column_of(i)` after the thread's first.
__device__ constexpr int upper(int i) { return i / 2 * 4 + i % 2; }
__device__ constexpr int lower(int i) { return upper(i) + 2; }
template <bool LOWER>
__device__ constexpr int logit(int i) {
  return LOWER ? lower(i) : upper(i);
}
__device__ constexpr int column_of(int i) { return i / 2 * 8 + i % 2; }

// One view of a row, over the columns that a thread has seen.
class OfView {
 public:
  // The upper of a thread's two rows, or the lower one.
  template <bool LOWER>
  __device__ void fold(const float (&z)[kSums]) {
    float top = known_.max;
#pragma unroll
    for (int i = 0; i < kWords; ++i) top = fmaxf(top, z[logit<LOWER>(i)]);
    const float about = base_of(top), down = distance(known_.max, about), keep = exp_fast(down);
    float sum = 0.0f, moment = 0.0f;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float shifted = finite(z[logit<LOWER>(i)]) - about, weight = exp_fast(shifted);
      sum += weight;
      moment += weight * shifted;
    }
    const float before = keep * (known_.weighted_sum + down * known_.sum);
    known_ = {seen(top), keep * known_.sum + sum, before + moment};
  }

  template <bool LOWER>
  __device__ void see_target(const float (&z)[kSums], int offset) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (offset == column_of(i)) target_ = seen(z[logit<LOWER>(i)]);
    }
  }

  // With what the lane `step` away knows of the same row.
  __device__ void join(int step) {
    const auto other = [step](float x) { return __shfl_xor_sync(kAllLanes, x, step); };
    known_ = merge(known_, SoftmaxStats{other(known_.max), other(known_.sum), other(known_.weighted_sum)});
    target_ = fmaxf(target_, other(target_));
  }

  __device__ void store(const Fields& out, int64_t row) const {
    store_stats(out, kP, row, known_);
    field(out, kTarget, row) = target_;
  }

 private:
  SoftmaxStats known_{-INFINITY, 0.0f, 0.0f};
  float target_ = -INFINITY;
};

// Both views of a row, over the columns that a thread has seen.
class OfPair {
 public:
  // Weights are taken about the maxima, this tile's included, and gaps about the mean gap known so far. Where that is so
  // far from the new mean that the excess about it is lost, the tile is folded once more about its own maxima and mean,
  // and merged.
  // (`_fold_pair` of triton_fused.py is the same for all columns of a row.)
  __device__ void fold(const float (&z)[kSums]) {
    float own_p = -INFINITY, own_q = -INFINITY;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      own_p = fmaxf(own_p, z[upper(i)]);
      own_q = fmaxf(own_q, z[lower(i)]);
    }
    const float top_p = fmaxf(known_.p.max, own_p), top_q = fmaxf(known_.q.max, own_q);
    float about_p = base_of(top_p), about_q = base_of(top_q);
    const float down_p = distance(known_.p.max, about_p), down_q = distance(known_.q.max, about_q);
    float centre = known_.mean_diff + (down_p - down_q);
#pragma unroll 1
    for (bool own_mean = false;; own_mean = true) {
      float sum_p = 0.0f, moment_p = 0.0f, sum_q = 0.0f, moment_q = 0.0f, gaps = 0.0f, phis = 0.0f;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float log_p = z[upper(i)] - about_p, log_q = z[lower(i)] - about_q;
        const float p = exp_fast(log_p), q = exp_fast(log_q);
        const float d = centre - (log_p - log_q), weighted = p * d;
        const float series = 1.0f / 24 + d * (1.0f / 120 + d * (1.0f / 720 + d * (1.0f / 5040 + d * (1.0f / 40320))));
        const float near = weighted * d * (0.5f + d * (1.0f / 6 + d * series));
        const float far = exp_fast(log_q + centre) - (p + weighted);  // p exp(d) alone could overflow
        sum_p += p;
        moment_p += p * log_p;
        sum_q += q;
        moment_q += q * log_q;
        gaps += weighted;
        phis += fabsf(d) < 0.5f ? near : far;
        // NaN in both views: the rest makes no difference. The compiler mixes the words between two branches, and without
        // them it would mix more than it has registers for.
        if (i % 8 == 7 && sum_p != sum_p && sum_q != sum_q) break;
      }
      if (!own_mean) {
        const float keep_p = exp_fast(down_p), keep_q = exp_fast(down_q);
        const SoftmaxStats p{top_p, keep_p * known_.p.sum + sum_p,
                             keep_p * (known_.p.weighted_sum + down_p * known_.p.sum) + moment_p};
        const SoftmaxStats q{top_q, keep_q * known_.q.sum + sum_q,
                             keep_q * (known_.q.weighted_sum + down_q * known_.q.sum) + moment_q};
        const float move = quotient(gaps, p.sum);  // from the new mean gap to the known one
        const float shrink = exp_fast(-move), moved = phi(move) * p.sum;
        const float excess = fmaxf((keep_p * known_.excess + phis - moved) * shrink, 0.0f);
        // what the difference may have lost, some of the last bits of its terms, has to be small beside the bound
        const float lost = fmaxf(phis, moved) * shrink;
        bool close = lost <= 4.0f * excess + 1.2f * root(excess * p.sum) + 0.004f * p.sum;
        close &= fabsf(move) <= kFar;
        close &= known_.p.sum > 0.0f || known_.q.sum == 0.0f;  // else the excess so far hangs on no weight of p
        if (close) {
          known_ = {p, q, centre - move, excess};
          return;
        }
        const float above_p = distance(base_of(own_p), about_p), above_q = distance(base_of(own_q), about_q);
        centre = sum_p > 0.0f ? centre - quotient(gaps, sum_p) - (above_p - above_q) : 0.0f;
        about_p = base_of(own_p), about_q = base_of(own_q);
      } else {
        const float move = sum_p > 0.0f ? quotient(gaps, sum_p) : 0.0f;  // what rounding has left
        const float excess = fmaxf(phis - phi(move) * sum_p, 0.0f) + 0.0f * phis;  // a NaN stays one
        known_ = merge(known_, PairStats{{seen(own_p), sum_p, moment_p}, {seen(own_q), sum_q, moment_q}, centre - move,
                                         excess * exp_fast(-move)});
        return;
      }
    }
  }

  __device__ void see_target(const float (&z)[kSums], int offset) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (offset == column_of(i)) target_p_ = seen(z[upper(i)]), target_q_ = seen(z[lower(i)]);
    }
  }

  // With what the lane `step` away knows of the same row.
  __device__ void join(int step) {
    const auto other = [step](float x) { return __shfl_xor_sync(kAllLanes, x, step); };
    const auto view = [&other](const SoftmaxStats& x) {
      return SoftmaxStats{other(x.max), other(x.sum), other(x.weighted_sum)};
    };
    known_ = merge(known_, PairStats{view(known_.p), view(known_.q), other(known_.mean_diff), other(known_.excess)});
    target_p_ = fmaxf(target_p_, other(target_p_));
    target_q_ = fmaxf(target_q_, other(target_q_));
  }

  __device__ void store(const Fields& out, int64_t row) const {
    store_stats(out, row, known_);
    field(out, kP + kTarget, row) = target_p_;
    field(out, kQ + kTarget, row) = target_q_;
  }

 private:
  PairStats known_{{-INFINITY, 0.0f, 0.0f}, {-INFINITY, 0.0f, 0.0f}, 0.0f, 0.0f};
  float target_p_ = -INFINITY, target_q_ = -INFINITY;
};

// From products to logits, those beyond the vocabulary masked; `first` is the column of this thread's first.
__device__ inline void to_logits(float (&z)[kSums], const Work& work, int first) {
  if (work.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float bias = first + column_of(i) < work.columns ? work.bias[first + column_of(i)] : 0.0f;
      z[upper(i)] = finite((z[upper(i)] + bias) * work.scale);
      z[lower(i)] = finite((z[lower(i)] + bias) * work.scale);
    }
  } else if (work.scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) z[i] *= work.scale;
  }
  if (first + column_of(kWords - 1) >= work.columns) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (first + column_of(i) >= work.columns) z[upper(i)] = z[lower(i)] = kFloor;
    }
  }
}

// The column of a row's target, counted from the first of this process's; -1 if there is none.
__device__ inline int target_of(const Work& work, int64_t row) {
  return row < work.rows ? static_cast<int>(target_column(work.targets, row, work.columns)) : -1;
}

// Products of a tile: `sums` of this warpgroup's 64 rows and 256 columns.
template <bool BFLOAT16>
__device__ void multiply_tile(float (&sums)[kSums], Shared& shared, Place& place, const Work& work, int warpgroup,
                              bool first_tile) {
  const unsigned lane = threadIdx.x % kWarp, blocks = cluster_size();
  // a stage is free when all warps of the cluster have read their part of it
  const auto release = [&](int stage) {
    if (lane < blocks) arrive(shared.empty[stage], lane);
  };
  int before = 0;
  for (int slice = 0; slice < work.slices; ++slice) {
    wait(shared.full[place.stage], place.parity);
    const Stage& stage = shared.stages[place.stage];
    const uint64_t a = operand(stage.hidden + warpgroup * 64 * kDepth), b = operand(stage.weight);
    begin_products();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {  // 32 bytes further along the rows each time
      multiply<BFLOAT16>(sums, a + 2 * step, b + 2 * step, slice > 0 || step > 0);
    }
    end_products();
    if (slice > 0) {
      wait_for_products<1>();
      release(before);
    }
    before = place.stage;
    place.advance();
    if (first_tile && slice == min(kStages, work.slices) - 1 && warpgroup == 0 && threadIdx.x % kWarpgroup == 0) {
      arrive(shared.ahead, cluster_rank());
    }
  }
  finish_products(sums);
  release(before);
}

// Copies all that a block multiplies, in the order in which it does.
__device__ inline void copy_tiles(const TensorMap& hidden, const TensorMap& weight, Shared& shared, const Work& work,
                           int row_block, int first_tile, int last_tile) {
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  Place place;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int slice = 0; slice < work.slices; ++slice, place.advance()) {
      Stage& stage = shared.stages[place.stage];
      Barrier& full = shared.full[place.stage];
      wait(shared.empty[place.stage], place.parity ^ 1);
      arrive_expecting(full, sizeof(Stage));
      load(stage.hidden, hidden, row_block * kRows, slice * kDepth, full);
      for (int part = rank; part < kColumns / kCopyRows; part += blocks) {
        load(stage.weight + part * kCopyRows * kDepth, weight, tile * kColumns + part * kCopyRows, slice * kDepth, full,
             (1u << blocks) - 1);
      }
    }
  }
}

template <bool BFLOAT16, bool PAIR>
__device__ void fold_tiles(Shared& shared, const Work& work, int64_t row_block, int part, int first_tile,
                           int last_tile) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp, first_of_lane = lane % 4 * 2;
  // sixteen rows of a warp are one eight of a view, and the next eight or that of the other view
  const int64_t sixteen = row_block * (kRows / 16) + warpgroup * 4 + warp;
  const int64_t row = sixteen * (PAIR ? 8 : 16) + lane / 4;
  const Fields out{work.out.data + part * work.part_stride, work.out.stride};
  const int target = target_of(work, row), target_below = PAIR ? -1 : target_of(work, row + 8);

  if (warpgroup == 1) wait(shared.ahead, 0);
  Place place;
  float z[kSums];
  [[maybe_unused]] OfPair pair;
  [[maybe_unused]] OfView above, below;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    multiply_tile<BFLOAT16>(z, shared, place, work, warpgroup, tile == first_tile);
    const int first = tile * kColumns + first_of_lane;
    to_logits(z, work, first);
    if constexpr (PAIR) {
      if (target >= first && target < first + kColumns) pair.see_target(z, target - first);
      pair.fold(z);
    } else {
      if (target >= first && target < first + kColumns) above.see_target<false>(z, target - first);
      if (target_below >= first && target_below < first + kColumns) below.see_target<true>(z, target_below - first);
      above.fold<false>(z);
      below.fold<true>(z);
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {  // four lanes share a row
    if constexpr (PAIR) {
      pair.join(step);
    } else {
      above.join(step);
      below.join(step);
    }
  }
  if (lane % 4 != 0) return;
  if constexpr (PAIR) {
    if (row < work.rows) pair.store(out, row);
  } else {
    if (row < work.rows) above.store(out, row);
    if (row + 8 < work.rows) below.store(out, row + 8);
  }
}

template <bool BFLOAT16, bool PAIR>
__global__ void __launch_bounds__(kThreads, 1)
    sweep_kernel(const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight, const Work work) {
  if constexpr (kHopperCode) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    const int blocks = static_cast<int>(cluster_size()), cluster = static_cast<int>(blockIdx.x) / blocks;
    const int part = cluster / work.row_clusters;
    const int row_block = cluster % work.row_clusters * blocks + static_cast<int>(cluster_rank());
    const int first_tile = part * work.tiles_of_part, last_tile = min(first_tile + work.tiles_of_part, work.tiles);

    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init(shared.full[stage], 1);
        init(shared.empty[stage], blocks * kWarpsThatRead);
      }
      init(shared.ahead, 1);
      publish_barriers();
    }
    cluster_sync();
    if (threadIdx.x < kWarpgroup) {
      give_registers_back<24>();
      if (threadIdx.x == 0) copy_tiles(hidden, weight, shared, work, row_block, first_tile, last_tile);
    } else {
      take_registers<240>();
      fold_tiles<BFLOAT16, PAIR>(shared, work, row_block, part, first_tile, last_tile);
    }
    cluster_sync();  // no block ends while another may still write into its memory
  }
}

// One thread for each row.
template <bool PAIR>
__global__ void __launch_bounds__(kWarpgroup) merge_parts_kernel(Fields parts, int64_t part_stride, int count,
                                                                 int64_t rows, Fields out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpgroup + threadIdx.x;
  if (row >= rows) return;
  const auto each_later = [&](auto with) {
    for (int part = 1; part < count; ++part) with(Fields{parts.data + part * part_stride, parts.stride});
  };
  constexpr int kViews = PAIR ? 2 : 1;
  float targets[kViews];
  for (int view = 0; view < kViews; ++view) {
    const int at = view * kSoftmaxFields + kTarget;
    targets[view] = field(parts, at, row);
    each_later([&](const Fields& part) { targets[view] = fmaxf(targets[view], field(part, at, row)); });
  }
  if constexpr (PAIR) {
    PairStats known = load_pair_stats(parts, row);
    each_later([&](const Fields& part) { known = merge(known, load_pair_stats(part, row)); });
    store_stats(out, row, known);
  } else {
    SoftmaxStats known = load_stats(parts, kP, row);
    each_later([&](const Fields& part) { known = merge(known, load_stats(part, kP, row)); });
    store_stats(out, kP, row, known);
  }
  for (int view = 0; view < kViews; ++view) field(out, view * kSoftmaxFields + kTarget, row) = targets[view];
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a kernel is started in so many clusters of so many blocks.
struct Start {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};

  Start(int clusters, int ranks, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(clusters * ranks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Shared);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Start(const Start&) = delete;
};

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
}

template <bool BFLOAT16, bool PAIR>
cudaError_t start(const Sweep& given, cudaStream_t stream) {
  TensorMap hidden, weight;
  const auto kernel = sweep_kernel<BFLOAT16, PAIR>;
  cudaError_t status = describe(given.hidden, kRows, hidden);
  if (status == cudaSuccess) status = describe(given.weight, kCopyRows, weight);
  if (status == cudaSuccess) status = allow_shared(kernel);
  if (status != cudaSuccess) return status;

  Work work{};
  work.rows = given.rows;
  work.columns = static_cast<int>(given.weight.rows);
  work.slices = static_cast<int>(ceil_div(given.weight.columns, kDepth));
  work.tiles = static_cast<int>(ceil_div(work.columns, kColumns));
  work.tiles_of_part = static_cast<int>(ceil_div(work.tiles, given.splits));
  work.row_clusters = static_cast<int>(ceil_div(given.hidden.rows, kRows * given.ranks));
  work.bias = given.bias;
  work.scale = given.scale;
  work.targets = given.targets;
  // where that leaves nothing for the last parts, there are fewer
  const int parts = static_cast<int>(ceil_div(work.tiles, work.tiles_of_part));
  const Fields of_parts{given.parts, given.rows};
  work.out = parts == 1 ? given.stats : of_parts;
  work.part_stride = (PAIR ? kPairFields : kSoftmaxFields) * given.rows;

  const Start start(parts * work.row_clusters, given.ranks, stream);
  status = cudaLaunchKernelEx(&start.config, kernel, hidden, weight, work);
  if (status != cudaSuccess || parts == 1) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(given.rows, kWarpgroup)));
  return launch(merge_parts_kernel<PAIR>, grid, dim3(kWarpgroup), stream, of_parts, work.part_stride, parts, given.rows,
                given.stats);
}

}  // namespace fused

cudaError_t sweep(const Sweep& given, bool pair, cudaStream_t stream) {
  using fused::start;
  if (given.hidden.bfloat16) return pair ? start<true, true>(given, stream) : start<true, false>(given, stream);
  return pair ? start<false, true>(given, stream) : start<false, false>(given, stream);
}

int sweep_places(int ranks) {
  const auto kernel = fused::sweep_kernel<true, true>;
  const fused::Start start(1, ranks, nullptr);
  cudaFuncAttributes code{};
  int places = 0;
  cudaError_t status = cudaFuncGetAttributes(&code, kernel);
  if (status == cudaSuccess && code.binaryVersion == 90) {
    status = fused::allow_shared(kernel);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&places, kernel, &start.config);
  }
  if (status != cudaSuccess) cudaGetLastError();  // it is answered, not left for the next call
  return status == cudaSuccess ? places : 0;
}

}  // namespace vppo
