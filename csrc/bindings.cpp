// The functions that Python calls, the same for every device: each checks its tensors and calls the library.
#include <tvm/ffi/tvm_ffi.h>

#include <cmath>
#include <limits>

#include "arguments.h"
#include "library.h"

namespace vppo {
namespace {

// The device of the first tensor, which all others must be on.
DLDevice device_of(const char* name, const TensorView& tensor) {
  const DLDevice device = tensor.device();
  if (device.device_type != kDeviceType) {
    TVM_FFI_THROW(ValueError) << name << ": got a tensor on " << text_of(device) << ", takes one on " << kDeviceName;
  }
  return device;
}

// A tile of `views` views, and the checks of what belongs to its rows.
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

Mixture mixture_of(double beta) {
  if (!(beta > 0.0 && beta < 1.0)) {
    TVM_FFI_THROW(ValueError) << "beta: got " << beta << ", takes a number between 0 and 1";
  }
  return {static_cast<float>(1.0 - beta), static_cast<float>(beta), static_cast<float>(std::log1p(-beta)),
          static_cast<float>(std::log(beta))};
}

Slope slope_of(double scale, double to_cap) { return {static_cast<float>(scale), static_cast<float>(to_cap)}; }

void fold_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const TileArguments of(tile, 1);
  const Targets chosen = of.targets(targets, first);
  const Fields into = of.fields("stats", stats, kSoftmaxFields);
  if (!of.empty()) fold(of.device, of.tile, chosen, into);
}

void fold_pair_(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const TileArguments of(tile, 2);
  const Targets chosen = of.targets(targets, first);
  const Fields into = of.fields("stats", stats, kPairFields);
  if (!of.empty()) fold_pair(of.device, of.tile, chosen, into);
}

void fold_jsd_(TensorView tile, TensorView pair, TensorView jsd_terms, double beta) {
  const TileArguments of(tile, 2);
  const Mixture mixture = mixture_of(beta);
  const Fields both = of.fields("pair", pair, kPairFields);
  const Fields into = of.fields("jsd_terms", jsd_terms, kJsdFields);
  if (!of.empty()) fold_jsd(of.device, of.tile, both, mixture, into);
}

void gradient_(TensorView tile, TensorView softmax, TensorView targets, int64_t first, TensorView grads, double scale,
               double to_cap) {
  const TileArguments of(tile, 1);
  const Fields view = of.fields("softmax", softmax, kSoftmaxFields);
  const Targets chosen = of.targets(targets, first);
  const Fields upstream = of.fields("grads", grads, kGradFields);
  if (!of.empty()) gradient(of.device, of.tile, view, chosen, upstream, slope_of(scale, to_cap));
}

void gradient_pair_(TensorView tile, TensorView pair, Optional<TensorView> jsd_terms, double beta,
                    Optional<TensorView> targets, int64_t first, TensorView grads, double scale_p, double to_cap_p,
                    double scale_q, double to_cap_q) {
  const TileArguments of(tile, 2);
  const Mixture mixture = mixture_of(beta);
  const Fields both = of.fields("pair", pair, kPairFields);
  const Fields terms = jsd_terms.has_value() ? of.fields("jsd_terms", *jsd_terms, kJsdFields) : Fields{};
  const Targets chosen = of.targets(targets, first);
  const int outputs = targets.has_value() ? kPairGradFields : kPairGradFieldsWithoutTargets;
  const Fields upstream = of.fields("grads", grads, outputs);
  const Slopes slopes{slope_of(scale_p, to_cap_p), slope_of(scale_q, to_cap_q)};
  if (!of.empty()) gradient_pair(of.device, of.tile, both, terms, mixture, chosen, upstream, slopes);
}

// `out` has the shape of the scores and is bool or float; it may be the scores themselves.
void topk_mask_(TensorView scores, TensorView valid, double keep_ratio, Optional<double> keep_threshold,
                Optional<TensorView> offsets, TensorView out) {
  const DLDevice device = device_of("scores", scores);
  if (!(keep_ratio > 0.0 && keep_ratio <= 1.0)) {
    TVM_FFI_THROW(ValueError) << "keep_ratio: got " << keep_ratio << ", takes a number above 0 and at most 1";
  }
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  if (keep_threshold.has_value() && std::isnan(*keep_threshold)) {
    TVM_FFI_THROW(ValueError) << "keep_threshold: got nan, takes None or a number";
  }
  const auto threshold = static_cast<float>(keep_threshold.has_value() ? *keep_threshold : kNone);
  const bool packed = offsets.has_value();
  if (scores.ndim() != (packed ? 1 : 2)) {
    TVM_FFI_THROW(ValueError) << "scores: got shape " << shape_of(scores) << ", takes "
                              << (packed ? "[total] with offsets" : "[rows, columns]");
  }
  Scores given{};
  given.rows = scores.size(0);
  given.columns = scores.size(-1);
  given.total = given.rows;  // of packed scores; of others it is set below, when their sizes are checked
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
    if (given.rows > 0 && given.total > 0) topk_mask(device, given, keep_ratio, threshold, keep);
  };
  if (same(out.dtype(), dtype_of<bool>())) {
    write(like_scores(bool{}, "out", out));
  } else {
    write(like_scores(float{}, "out", out));
  }
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold, vppo::fold_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_pair, vppo::fold_pair_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold_jsd, vppo::fold_jsd_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient, vppo::gradient_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gradient_pair, vppo::gradient_pair_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_mask, vppo::topk_mask_)
