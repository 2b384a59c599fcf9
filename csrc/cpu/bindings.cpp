// What Python calls: checks its tensors and divides their rows among threads.
#include <tvm/ffi/tvm_ffi.h>

#include <cstdlib>

#include "../arguments.h"
#include "operations.h"
#include "parallel.h"
#include "selection.h"

namespace vppo {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int64_t kWorth = 1 << 14;  // entries that a thread takes at a time

const Operations& chosen_operations() {
  const Operations* const chosen = operations();
  if (chosen == nullptr) {
    TVM_FFI_THROW(ValueError) << "VPPO_KERNELS_ISA: got '" << std::getenv("VPPO_KERNELS_ISA")
                              << "', takes an instruction set of this processor: baseline, avx2 or avx512";
  }
  return *chosen;
}

// Calls `body(operations, begin, end)` for rows of so many columns.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  const Operations& on = chosen_operations();
  parallel_for(rows, kWorth / std::max<int64_t>(columns, 1),
               [&](int64_t begin, int64_t end) { body(on, begin, end); });
}

Tile check_tile(const TensorView& tile, int views) {
  if (tile.ndim() != views + 1) {
    TVM_FFI_THROW(ValueError) << "tile: got shape " << shape_of(tile) << ", takes " << views + 1 << " dimensions";
  }
  const int64_t rows = tile.size(-2), columns = tile.size(-1);
  float* const data = views == 1 ? check_contiguous<float>("tile", tile, {rows, columns}, kCpu)
                                 : check_contiguous<float>("tile", tile, {2, rows, columns}, kCpu);
  return {data, columns ? rows : 0, columns};
}

Fields check_fields(const char* name, const TensorView& packed, int fields, int64_t rows) {
  Fields found{};
  found.data = check_rows<float>(name, packed, {fields, rows}, kCpu, found.stride);
  return found;
}

Targets check_targets(const Optional<TensorView>& targets, int64_t first, int64_t rows) {
  if (!targets.has_value()) return {nullptr, first};
  return {check_contiguous<int64_t>("targets", *targets, {rows}, kCpu), first};
}

Slope slope_of(double scale, double to_cap) { return {static_cast<float>(scale), static_cast<float>(to_cap)}; }

void fold(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const Tile z = check_tile(tile, 1);
  const Targets chosen = check_targets(targets, first, tile.size(-2));
  const Fields into = check_fields("stats", stats, kViewFields, tile.size(-2));
  for_rows(z.rows, z.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.fold(z, chosen, into, begin, end); });
}

void fold_pair(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const Tile z = check_tile(tile, 2);
  const Targets chosen = check_targets(targets, first, tile.size(-2));
  const Fields into = check_fields("stats", stats, kPairFields, tile.size(-2));
  for_rows(z.rows, z.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.fold_pair(z, chosen, into, begin, end); });
}

void fold_jsd(TensorView tile, TensorView pair, TensorView halves) {
  const Tile z = check_tile(tile, 2);
  const Fields both = check_fields("pair", pair, kPairFields, tile.size(-2));
  const Fields into = check_fields("halves", halves, 2, tile.size(-2));
  for_rows(z.rows, z.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.fold_jsd(z, both, into, begin, end); });
}

void gradient(TensorView tile, TensorView view, TensorView targets, int64_t first, TensorView grads, double scale,
              double to_cap) {
  const Tile z = check_tile(tile, 1);
  const Fields softmax = check_fields("view", view, kViewFields, tile.size(-2));
  const Targets chosen = check_targets(targets, first, tile.size(-2));
  const Fields upstream = check_fields("grads", grads, 2, tile.size(-2));
  for_rows(z.rows, z.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.gradient(z, softmax, chosen, upstream, slope_of(scale, to_cap), begin, end);
  });
}

void gradient_pair(TensorView tile, TensorView pair, Optional<TensorView> halves, Optional<TensorView> targets,
                   int64_t first, TensorView grads, double scale, double to_cap) {
  const Tile z = check_tile(tile, 2);
  const int64_t rows = tile.size(-2);
  const Fields both = check_fields("pair", pair, kPairFields, rows);
  const Fields half = halves.has_value() ? check_fields("halves", *halves, 2, rows) : Fields{};
  const Targets chosen = check_targets(targets, first, rows);
  const Fields upstream = check_fields("grads", grads, targets.has_value() ? 5 : 3, rows);
  for_rows(z.rows, z.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.gradient_pair(z, both, half, chosen, upstream, slope_of(scale, to_cap), begin, end);
  });
}

// `out`, like the scores, is the scores themselves or a mask.
void topk_mask_(TensorView scores, TensorView valid, double keep_ratio, Optional<TensorView> offsets, TensorView out) {
  if (!(keep_ratio > 0.0 && keep_ratio <= 1.0)) {
    TVM_FFI_THROW(ValueError) << "keep_ratio: got " << keep_ratio << ", takes a number above 0 and at most 1";
  }
  const bool packed = offsets.has_value();
  if (scores.ndim() != (packed ? 1 : 2)) {
    TVM_FFI_THROW(ValueError) << "scores: got shape " << shape_of(scores) << ", takes "
                              << (packed ? "[total] with offsets" : "[rows, columns]");
  }
  const int64_t columns = scores.size(-1);
  int64_t rows = scores.size(0);
  Scores given{};
  if (packed) {
    const TensorView places = *offsets;
    rows = places.ndim() == 1 ? places.size(0) - 1 : -1;
    if (rows < 0) TVM_FFI_THROW(ValueError) << "offsets: got shape " << shape_of(places) << ", takes [rows + 1]";
    given.offsets = check_contiguous<int64_t>("offsets", places, {rows + 1}, kCpu);
  }
  const auto like_scores = [&](auto type, const char* name, const TensorView& tensor) {
    using T = decltype(type);
    return packed ? check_contiguous<T>(name, tensor, {columns}, kCpu)
                  : check_contiguous<T>(name, tensor, {rows, columns}, kCpu);
  };
  given.data = like_scores(float{}, "scores", scores);
  given.valid = like_scores(bool{}, "valid", valid);
  given.rows = rows;
  given.columns = columns;
  given.total = scores.numel();
  const auto write = [&](auto* keep) {
    // a packed row may be of any length
    parallel_for(rows, packed ? 1 : kWorth / std::max<int64_t>(columns, 1),
                 [&](int64_t begin, int64_t end) { topk_mask(given, keep_ratio, keep, begin, end); });
  };
  if (same(out.dtype(), dtype_of<bool>())) {
    write(like_scores(bool{}, "out", out));
  } else {
    write(like_scores(float{}, "out", out));
  }
}

// Arguments of the loss, `[rows, columns]` as its mask.
struct LikeMask {
  int64_t rows, columns;

  explicit LikeMask(const TensorView& mask) {
    if (mask.ndim() != 2) TVM_FFI_THROW(ValueError) << "mask: got shape " << shape_of(mask) << ", takes [rows, columns]";
    rows = mask.size(0);
    columns = mask.size(1);
  }
  template <typename T = float>
  T* data(const char* name, const TensorView& tensor) const {
    return check_contiguous<T>(name, tensor, {rows, columns}, kCpu);
  }
  float* data(const char* name, const Optional<TensorView>& tensor) const {
    return tensor.has_value() ? data(name, *tensor) : nullptr;
  }
};

LossOptions loss_options(double low, double high, double dual, double limit, double nll_coef, double entropy_coef,
                         double kl_coef, bool ref_of_all) {
  const auto single = [](double x) { return static_cast<float>(x); };
  return {single(low),          single(high),    single(dual), single(limit), single(nll_coef),
          single(entropy_coef), single(kl_coef), ref_of_all};
}

void clipped_loss(TensorView logprobs, Optional<TensorView> entropy, TensorView old_logprobs, TensorView advantages,
                  TensorView keep, TensorView mask, Optional<TensorView> ref_logprobs, Optional<TensorView> is_weights,
                  Optional<TensorView> dependency, double low, double high, double dual, double limit, double nll_coef,
                  double entropy_coef, double kl_coef, bool ref_of_all, Optional<TensorView> values, TensorView sums) {
  const LikeMask like(mask);
  const Tokens tokens{like.data("logprobs", logprobs),
                      like.data("old_logprobs", old_logprobs),
                      like.data("advantages", advantages),
                      like.data<bool>("keep", keep),
                      like.data<bool>("mask", mask),
                      like.data("entropy", entropy),
                      like.data("ref_logprobs", ref_logprobs),
                      like.data("is_weights", is_weights),
                      like.data("dependency", dependency),
                      like.rows,
                      like.columns};
  const LossOptions options = loss_options(low, high, dual, limit, nll_coef, entropy_coef, kl_coef, ref_of_all);
  float* const of_tokens = like.data("values", values);
  const Fields of_rows = check_fields("sums", sums, kSums, like.rows);
  for_rows(like.rows, like.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.clipped_loss(tokens, options, of_tokens, of_rows, begin, end);
  });
}

void clipped_loss_gradient(TensorView logprobs, TensorView old_logprobs, TensorView advantages, TensorView mask,
                           Optional<TensorView> ref_logprobs, Optional<TensorView> is_weights, TensorView upstream,
                           double low, double high, double dual, double limit, double nll_coef, double entropy_coef,
                           double kl_coef, TensorView grad, Optional<TensorView> grad_entropy) {
  const LikeMask like(mask);
  Tokens tokens{};
  tokens.logprobs = like.data("logprobs", logprobs);
  tokens.old_logprobs = like.data("old_logprobs", old_logprobs);
  tokens.advantages = like.data("advantages", advantages);
  tokens.mask = like.data<bool>("mask", mask);
  tokens.ref_logprobs = like.data("ref_logprobs", ref_logprobs);
  tokens.is_weights = like.data("is_weights", is_weights);
  tokens.rows = like.rows;
  tokens.columns = like.columns;
  const LossOptions options = loss_options(low, high, dual, limit, nll_coef, entropy_coef, kl_coef, false);
  LossGradient gradient{};
  gradient.per_token = upstream.ndim() == 2;
  gradient.upstream = gradient.per_token ? like.data("upstream", upstream)
                                         : check_contiguous<float>("upstream", upstream, {like.rows}, kCpu);
  gradient.logprobs = like.data("grad", grad);
  gradient.entropy = like.data("grad_entropy", grad_entropy);
  for_rows(like.rows, like.columns, [&](const Operations& on, int64_t begin, int64_t end) { on.clipped_loss_gradient(tokens, options, gradient, begin, end);
  });
}

tvm::ffi::String instructions() { return chosen_operations().name; }

// On how many threads a loop runs.
int64_t threads() {
  std::atomic<int64_t> count{0};
  on_every_thread([](void* counted) { ++*static_cast<std::atomic<int64_t>*>(counted); }, &count);
  return count;
}

// For tests: one of the vectorised functions, of every entry of `x`.
void evaluate(tvm::ffi::String function, TensorView x, TensorView out) {
  const int64_t count = x.numel();
  const float* const from = check_contiguous<float>("x", x, {count}, kCpu);
  if (!chosen_operations().evaluate(function.c_str(), from, check_contiguous<float>("out", out, {count}, kCpu), count)) {
    TVM_FFI_THROW(ValueError) << "function: got '" << function << "', takes exp, exp_down, expm1, phi or log1p";
  }
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold, vppo::fold)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_pair, vppo::fold_pair)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_jsd, vppo::fold_jsd)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient, vppo::gradient)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient_pair, vppo::gradient_pair)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_mask, vppo::topk_mask_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(clipped_loss, vppo::clipped_loss)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(clipped_loss_gradient, vppo::clipped_loss_gradient)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instructions, vppo::instructions)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(threads, vppo::threads)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(evaluate, vppo::evaluate)
