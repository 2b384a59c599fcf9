// What Python calls: checks its tensors and enqueues a kernel on torch's current stream of their device.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include <limits>

#include "../arguments.h"
#include "kernels.h"

namespace vppo {
namespace {

constexpr int64_t kViewFields = 4, kPairFields = 10, kSums = 12;
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // blocks of a grid, and tokens that an int can count

DLDevice device_of(const char* name, const TensorView& tensor) {
  if (tensor.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << name << ": got a tensor on " << text_of(tensor.device()) << ", takes one on cuda";
  }
  return tensor.device();
}

// Runs `enqueue(stream)` with the tensors' device the current one.
template <typename Enqueue>
void on(DLDevice device, Enqueue enqueue) {
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  TVM_FFI_CHECK_CUDA_ERROR(
      enqueue(static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id))));
}

Tile check_tile(const TensorView& tile, int views) {
  const DLDevice device = device_of("tile", tile);
  if (tile.ndim() != views + 1) {
    TVM_FFI_THROW(ValueError) << "tile: got shape " << shape_of(tile) << ", takes " << views + 1 << " dimensions";
  }
  const int64_t rows = tile.size(-2), columns = tile.size(-1);
  if (rows > kMost) TVM_FFI_THROW(ValueError) << "tile: got " << rows << " rows, takes at most " << kMost;
  float* data = views == 1 ? check_contiguous<float>("tile", tile, {rows, columns}, device)
                           : check_contiguous<float>("tile", tile, {2, rows, columns}, device);
  return {data, rows, columns};
}

Fields fields_of(const char* name, const TensorView& packed, int64_t fields, int64_t rows, DLDevice device) {
  Fields found{};
  found.data = check_rows<float>(name, packed, {fields, rows}, device, found.stride);
  return found;
}

Targets check_targets(const Optional<TensorView>& targets, int64_t first, int64_t rows, DLDevice device) {
  if (!targets.has_value()) return {nullptr, first};
  return {check_contiguous<int64_t>("targets", *targets, {rows}, device), first};
}

bool empty(const Tile& tile) { return tile.rows == 0 || tile.columns == 0; }

void fold_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const Tile z = check_tile(tile, 1);
  const Targets chosen = check_targets(targets, first, z.rows, tile.device());
  const Fields into = fields_of("stats", stats, kViewFields, z.rows, tile.device());
  if (!empty(z)) on(tile.device(), [&](cudaStream_t stream) { return fold(z, chosen, into, stream); });
}

void fold_pair_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const Tile z = check_tile(tile, 2);
  const Targets chosen = check_targets(targets, first, z.rows, tile.device());
  const Fields into = fields_of("stats", stats, kPairFields, z.rows, tile.device());
  if (!empty(z)) on(tile.device(), [&](cudaStream_t stream) { return fold_pair(z, chosen, into, stream); });
}

void fold_jsd_(TensorView tile, TensorView pair, TensorView halves) {
  const Tile z = check_tile(tile, 2);
  const Fields both = fields_of("pair", pair, kPairFields, z.rows, tile.device());
  const Fields into = fields_of("halves", halves, 2, z.rows, tile.device());
  if (!empty(z)) on(tile.device(), [&](cudaStream_t stream) { return fold_jsd(z, both, into, stream); });
}

void gradient_(TensorView tile, TensorView view, TensorView targets, int64_t first, TensorView grads, double scale,
               double to_cap) {
  const Tile z = check_tile(tile, 1);
  const Fields softmax = fields_of("view", view, kViewFields, z.rows, tile.device());
  const Targets chosen = check_targets(targets, first, z.rows, tile.device());
  const Fields upstream = fields_of("grads", grads, 2, z.rows, tile.device());
  const Slope slope{static_cast<float>(scale), static_cast<float>(to_cap)};
  if (empty(z)) return;
  on(tile.device(), [&](cudaStream_t stream) { return gradient(z, softmax, chosen, upstream, slope, stream); });
}

void gradient_pair_(TensorView tile, TensorView pair, Optional<TensorView> halves, Optional<TensorView> targets,
                    int64_t first, TensorView grads, double scale, double to_cap) {
  const Tile z = check_tile(tile, 2);
  const Fields both = fields_of("pair", pair, kPairFields, z.rows, tile.device());
  const Fields half = halves.has_value() ? fields_of("halves", *halves, 2, z.rows, tile.device()) : Fields{};
  const Targets chosen = check_targets(targets, first, z.rows, tile.device());
  const Fields upstream = fields_of("grads", grads, targets.has_value() ? 5 : 3, z.rows, tile.device());
  const Slope slope{static_cast<float>(scale), static_cast<float>(to_cap)};
  if (empty(z)) return;
  on(tile.device(),
     [&](cudaStream_t stream) { return gradient_pair(z, both, half, chosen, upstream, slope, stream); });
}

// `out`, like the scores, is the scores themselves or a bool mask.
void topk_mask_(TensorView scores, TensorView valid, double keep_ratio, Optional<TensorView> offsets, TensorView out) {
  const DLDevice device = device_of("scores", scores);
  const bool packed = offsets.has_value();
  if (scores.ndim() != (packed ? 1 : 2)) {
    TVM_FFI_THROW(ValueError) << "scores: got shape " << shape_of(scores) << ", takes "
                              << (packed ? "[total] with offsets" : "[rows, columns]");
  }
  if (!(keep_ratio > 0.0 && keep_ratio <= 1.0)) {
    TVM_FFI_THROW(ValueError) << "keep_ratio: got " << keep_ratio << ", takes a number above 0 and at most 1";
  }
  Scores given{};
  given.columns = scores.size(-1);
  given.total = scores.numel();
  if (packed) {
    const TensorView places = *offsets;
    const int64_t count = places.ndim() == 1 ? places.size(0) : 0;
    if (count < 1) TVM_FFI_THROW(ValueError) << "offsets: got shape " << shape_of(places) << ", takes [rows + 1]";
    given.offsets = check_contiguous<int64_t>("offsets", places, {count}, device);
    given.rows = count - 1;
    given.data = check_contiguous<float>("scores", scores, {given.columns}, device);
    given.valid = check_contiguous<bool>("valid", valid, {given.columns}, device);
  } else {
    given.rows = scores.size(0);
    given.data = check_contiguous<float>("scores", scores, {given.rows, given.columns}, device);
    given.valid = check_contiguous<bool>("valid", valid, {given.rows, given.columns}, device);
  }
  if (given.rows > kMost || given.columns > kMost) {
    TVM_FFI_THROW(ValueError) << "scores: got shape " << shape_of(scores) << ", takes at most " << kMost << " of each";
  }
  const auto write = [&](auto* keep) {
    if (given.rows == 0 || given.total == 0) return;
    on(device, [&](cudaStream_t stream) { return topk_mask(given, keep_ratio, keep, stream); });
  };
  const auto like_scores = [&](auto type) {
    using Out = decltype(type);
    return packed ? check_contiguous<Out>("out", out, {given.columns}, device)
                  : check_contiguous<Out>("out", out, {given.rows, given.columns}, device);
  };
  if (same(out.dtype(), dtype_of<bool>())) {
    write(like_scores(bool()));
  } else {
    write(like_scores(float()));
  }
}

// `[rows, columns]` arguments of the loss, which all have the shape of the mask.
struct TokenTensors {
  int64_t rows, columns;
  DLDevice device;

  explicit TokenTensors(const TensorView& mask) : device(device_of("mask", mask)) {
    if (mask.ndim() != 2 || mask.size(0) > kMost) {
      TVM_FFI_THROW(ValueError) << "mask: got shape " << shape_of(mask) << ", takes [rows, columns]";
    }
    rows = mask.size(0);
    columns = mask.size(1);
  }
  template <typename T>
  T* data(const char* name, const TensorView& tensor) const {
    return check_contiguous<T>(name, tensor, {rows, columns}, device);
  }
  template <typename T>
  T* data(const char* name, const Optional<TensorView>& tensor) const {
    return tensor.has_value() ? data<T>(name, *tensor) : nullptr;
  }
};

LossOptions loss_options(double low, double high, double dual, double limit, double nll_coef, double entropy_coef,
                         double kl_coef, bool ref_of_all) {
  const auto number = [](double x) { return static_cast<float>(x); };
  return {number(low),          number(high),    number(dual), number(limit), number(nll_coef),
          number(entropy_coef), number(kl_coef), ref_of_all};
}

void clipped_loss_(TensorView logprobs, Optional<TensorView> entropy, TensorView old_logprobs, TensorView advantages,
                   TensorView keep, TensorView mask, Optional<TensorView> ref_logprobs,
                   Optional<TensorView> is_weights, Optional<TensorView> dependency, double low, double high,
                   double dual, double limit, double nll_coef, double entropy_coef, double kl_coef, bool ref_of_all,
                   Optional<TensorView> values, TensorView sums) {
  const TokenTensors of(mask);
  const Tokens tokens{of.data<float>("logprobs", logprobs),
                      of.data<float>("old_logprobs", old_logprobs),
                      of.data<float>("advantages", advantages),
                      of.data<bool>("keep", keep),
                      of.data<bool>("mask", mask),
                      of.data<float>("entropy", entropy),
                      of.data<float>("ref_logprobs", ref_logprobs),
                      of.data<float>("is_weights", is_weights),
                      of.data<float>("dependency", dependency),
                      of.rows,
                      of.columns};
  const LossOptions options = loss_options(low, high, dual, limit, nll_coef, entropy_coef, kl_coef, ref_of_all);
  float* of_tokens = of.data<float>("values", values);
  float* of_rows = check_contiguous<float>("sums", sums, {kSums, of.rows}, of.device);
  if (of.rows == 0) return;
  on(of.device, [&](cudaStream_t stream) { return clipped_loss(tokens, options, of_tokens, of_rows, stream); });
}

void clipped_loss_gradient_(TensorView logprobs, TensorView old_logprobs, TensorView advantages, TensorView mask,
                            Optional<TensorView> ref_logprobs, Optional<TensorView> is_weights, TensorView upstream,
                            double low, double high, double dual, double limit, double nll_coef, double entropy_coef,
                            double kl_coef, TensorView grad, Optional<TensorView> grad_entropy) {
  const TokenTensors of(mask);
  Tokens tokens{};
  tokens.logprobs = of.data<float>("logprobs", logprobs);
  tokens.old_logprobs = of.data<float>("old_logprobs", old_logprobs);
  tokens.advantages = of.data<float>("advantages", advantages);
  tokens.mask = of.data<bool>("mask", mask);
  tokens.ref_logprobs = of.data<float>("ref_logprobs", ref_logprobs);
  tokens.is_weights = of.data<float>("is_weights", is_weights);
  tokens.rows = of.rows;
  tokens.columns = of.columns;
  const LossOptions options = loss_options(low, high, dual, limit, nll_coef, entropy_coef, kl_coef, false);
  const bool per_token = upstream.ndim() == 2;
  const float* given = per_token ? of.data<float>("upstream", upstream)
                                 : check_contiguous<float>("upstream", upstream, {of.rows}, of.device);
  float* of_logprobs = of.data<float>("grad", grad);
  float* of_entropy = of.data<float>("grad_entropy", grad_entropy);
  if (of.rows == 0 || of.columns == 0) return;
  on(of.device, [&](cudaStream_t stream) {
    return clipped_loss_gradient(tokens, options, given, per_token, of_logprobs, of_entropy, stream);
  });
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold, vppo::fold_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_pair, vppo::fold_pair_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_jsd, vppo::fold_jsd_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient, vppo::gradient_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient_pair, vppo::gradient_pair_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_mask, vppo::topk_mask_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(clipped_loss, vppo::clipped_loss_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(clipped_loss_gradient, vppo::clipped_loss_gradient_)
