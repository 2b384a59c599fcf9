// The operations on tiles and tokens, once per instruction set; `backends/torch.py` and `loss.py` say what each does.
//
// All take rows `begin` to `end`. Every row is computed by itself, so results do not depend on how rows are divided among
// threads. Nothing is allocated.
#pragma once

#include <cstdint>

namespace vppo {

// Packed numbers of all rows, in the order of statistics.py and of `SUMS` of loss.py.
constexpr int kViewFields = 4, kPairFields = 10, kSums = 12;

// Finished logits, `[rows, columns]`, of one view, or of two views one after the other.
struct Tile {
  float* data;
  std::int64_t rows, columns;
};

// Field f of row r lies at `data[f * stride + r]`.
struct Fields {
  float* data;
  std::int64_t stride;
};

// The target of every row, where there are targets; `first` is the vocabulary index of the tile's first column.
struct Targets {
  const std::int64_t* data;
  std::int64_t first;
};

// Derivative of finished logits z by raw ones: `scale * (1 - (to_cap z)^2)`; `to_cap` is 0 without a cap.
struct Slope {
  float scale, to_cap;
};

// Tokens `[rows, columns]` of a batch. Values where `mask` is 0 take part in nothing. From `entropy` on there may be none.
struct Tokens {
  const float *logprobs, *old_logprobs, *advantages;
  const bool *keep, *mask;
  const float *entropy, *ref_logprobs, *is_weights, *dependency;
  std::int64_t rows, columns;
};

// As the arguments of `_clipped_loss` in loss.py; `dual` is infinite where there is no such clip.
struct LossOptions {
  float low, high, dual, limit, nll_coef, entropy_coef, kl_coef;
  bool ref_of_all;
};

// Upstream gradient of each token's loss, or of each row's, and where those of log-probabilities and entropy go.
struct LossGradient {
  const float* upstream;
  bool per_token;
  float *logprobs, *entropy;  // `entropy` may be null
};

struct Operations {
  const char* name;
  void (*fold)(Tile tile, Targets targets, Fields stats, std::int64_t begin, std::int64_t end);
  void (*fold_pair)(Tile tile, Targets targets, Fields stats, std::int64_t begin, std::int64_t end);
  void (*fold_jsd)(Tile tile, Fields pair, Fields halves, std::int64_t begin, std::int64_t end);
  void (*gradient)(Tile tile, Fields view, Targets targets, Fields grads, Slope slope, std::int64_t begin,
                   std::int64_t end);
  // `halves.data` is null where the divergence is not Jensen-Shannon's
  void (*gradient_pair)(Tile tile, Fields pair, Fields halves, Targets targets, Fields grads, Slope slope,
                        std::int64_t begin, std::int64_t end);
  // `values`, `[rows, columns]`, may be null; `sums` is `[kSums, rows]`
  void (*clipped_loss)(const Tokens& tokens, const LossOptions& options, float* values, Fields sums,
                       std::int64_t begin, std::int64_t end);
  void (*clipped_loss_gradient)(const Tokens& tokens, const LossOptions& options, const LossGradient& gradient,
                                std::int64_t begin, std::int64_t end);
  // for tests: `out[i] = function(x[i])`, false if there is no function of that name
  bool (*evaluate)(const char* function, const float* x, float* out, std::int64_t count);
};

extern const Operations operations_baseline;
#ifdef __x86_64__
extern const Operations operations_avx2, operations_avx512;
#endif

// Those for the best instruction set of this processor, or for the one that VPPO_KERNELS_ISA names; null if there is none.
const Operations* operations();

}  // namespace vppo
