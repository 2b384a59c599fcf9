// What Python calls, of the library of any device: checks its tensors.
#include <tvm/ffi/tvm_ffi.h>

#include "arguments.h"
#include "library.h"

namespace vppo {
namespace {

// Where the first tensor lies, and with it all others.
DLDevice device_of(const char* name, const TensorView& tensor) {
  const DLDevice device = tensor.device();
  if (device.device_type != kDeviceType) {
    TVM_FFI_THROW(ValueError) << name << ": got a tensor on " << text_of(device) << ", takes one on " << kDeviceName;
  }
  return device;
}

// A tile of so many views, and what belongs to its rows.
struct TileArguments {
  DLDevice device;
  Tile tile;

  TileArguments(const TensorView& given, int views) : device(device_of("tile", given)) {
    if (given.ndim() != views + 1) {
      TVM_FFI_THROW(ValueError) << "tile: got shape " << shape_of(given) << ", takes " << views + 1 << " dimensions";
    }
    tile.rows = given.size(-2);
    tile.columns = given.size(-1);
    tile.data = views == 1 ? check_contiguous<float>("tile", given, {tile.rows, tile.columns}, device)
                           : check_contiguous<float>("tile", given, {2, tile.rows, tile.columns}, device);
  }
  Fields fields(const char* name, const TensorView& packed, int count) const {
    Fields found{};
    found.data = check_rows<float>(name, packed, {count, tile.rows}, device, found.stride);
    return found;
  }
  Targets targets(const Optional<TensorView>& given, int64_t first) const {
    if (!given.has_value()) return {nullptr, first};
    return {check_contiguous<int64_t>("targets", *given, {tile.rows}, device), first};
  }
  bool empty() const { return tile.rows == 0 || tile.columns == 0; }
};

Slope slope_of(double scale, double to_cap) { return {static_cast<float>(scale), static_cast<float>(to_cap)}; }

void fold_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const TileArguments of(tile, 1);
  const Targets chosen = of.targets(targets, first);
  const Fields into = of.fields("stats", stats, kViewFields);
  if (!of.empty()) fold(of.device, of.tile, chosen, into);
}

void fold_pair_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const TileArguments of(tile, 2);
  const Targets chosen = of.targets(targets, first);
  const Fields into = of.fields("stats", stats, kPairFields);
  if (!of.empty()) fold_pair(of.device, of.tile, chosen, into);
}

void fold_jsd_(TensorView tile, TensorView pair, TensorView jsd_terms) {
  const TileArguments of(tile, 2);
  const Fields both = of.fields("pair", pair, kPairFields);
  const Fields into = of.fields("jsd_terms", jsd_terms, 2);
  if (!of.empty()) fold_jsd(of.device, of.tile, both, into);
}

void gradient_(TensorView tile, TensorView view, TensorView targets, int64_t first, TensorView grads, double scale,
               double to_cap) {
  const TileArguments of(tile, 1);
  const Fields softmax = of.fields("view", view, kViewFields);
  const Targets chosen = of.targets(targets, first);
  const Fields upstream = of.fields("grads", grads, 2);
  if (!of.empty()) gradient(of.device, of.tile, softmax, chosen, upstream, slope_of(scale, to_cap));
}

void gradient_pair_(TensorView tile, TensorView pair, Optional<TensorView> jsd_terms, Optional<TensorView> targets,
                    int64_t first, TensorView grads, double scale, double to_cap) {
  const TileArguments of(tile, 2);
  const Fields both = of.fields("pair", pair, kPairFields);
  const Fields half = jsd_terms.has_value() ? of.fields("jsd_terms", *jsd_terms, 2) : Fields{};
  const Targets chosen = of.targets(targets, first);
  const Fields upstream = of.fields("grads", grads, targets.has_value() ? 5 : 3);
  if (!of.empty()) gradient_pair(of.device, of.tile, both, half, chosen, upstream, slope_of(scale, to_cap));
}

// `out`, like the scores, is the scores themselves or a bool mask.
void topk_mask_(TensorView scores, TensorView valid, double keep_ratio, Optional<TensorView> offsets, TensorView out) {
  const DLDevice device = device_of("scores", scores);
  if (!(keep_ratio > 0.0 && keep_ratio <= 1.0)) {
    TVM_FFI_THROW(ValueError) << "keep_ratio: got " << keep_ratio << ", takes a number above 0 and at most 1";
  }
  const bool packed = offsets.has_value();
  if (scores.ndim() != (packed ? 1 : 2)) {
    TVM_FFI_THROW(ValueError) << "scores: got shape " << shape_of(scores) << ", takes "
                              << (packed ? "[total] with offsets" : "[rows, columns]");
  }
  Scores given{};
  given.rows = scores.size(0);
  given.columns = scores.size(-1);
  given.total = given.rows;  // of packed scores; of others only once their sizes are checked
  if (packed) {
    const TensorView places = *offsets;
    const int64_t count = places.ndim() == 1 ? places.size(0) : 0;
    if (count < 1) TVM_FFI_THROW(ValueError) << "offsets: got shape " << shape_of(places) << ", takes [rows + 1]";
    given.offsets = check_contiguous<int64_t>("offsets", places, {count}, device);
    given.rows = count - 1;
  }
  const auto like_scores = [&](auto type, const char* name, const TensorView& tensor) {
    using T = decltype(type);
    return packed ? check_contiguous<T>(name, tensor, {given.total}, device)
                  : check_contiguous<T>(name, tensor, {given.rows, given.columns}, device);
  };
  given.data = like_scores(float{}, "scores", scores);
  if (!packed) given.total = given.rows && given.columns ? given.rows * given.columns : 0;
  given.valid = like_scores(bool{}, "valid", valid);
  const auto write = [&](auto* keep) {
    if (given.rows > 0 && given.total > 0) topk_mask(device, given, keep_ratio, keep);
  };
  if (same(out.dtype(), dtype_of<bool>())) {
    write(like_scores(bool{}, "out", out));
  } else {
    write(like_scores(float{}, "out", out));
  }
}

// Arguments of the loss, `[rows, columns]` as its mask.
struct LikeMask {
  DLDevice device;
  int64_t rows, columns;

  explicit LikeMask(const TensorView& mask) : device(device_of("mask", mask)) {
    if (mask.ndim() != 2) TVM_FFI_THROW(ValueError) << "mask: got shape " << shape_of(mask) << ", takes [rows, columns]";
    rows = mask.size(0);
    columns = mask.size(1);
  }
  template <typename T = float>
  T* data(const char* name, const TensorView& tensor) const {
    return check_contiguous<T>(name, tensor, {rows, columns}, device);
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

void clipped_loss_(TensorView logprobs, Optional<TensorView> entropy, TensorView old_logprobs, TensorView advantages,
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
  Fields of_rows{};
  of_rows.data = check_rows<float>("sums", sums, {kSums, like.rows}, like.device, of_rows.stride);
  if (like.rows > 0) clipped_loss(like.device, tokens, options, of_tokens, of_rows);
}

void clipped_loss_gradient_(TensorView logprobs, TensorView old_logprobs, TensorView advantages, TensorView mask,
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
                                         : check_contiguous<float>("upstream", upstream, {like.rows}, like.device);
  gradient.logprobs = like.data("grad", grad);
  gradient.entropy = like.data("grad_entropy", grad_entropy);
  if (like.rows > 0 && like.columns > 0) clipped_loss_gradient(like.device, tokens, options, gradient);
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
