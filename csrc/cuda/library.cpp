// The library of CUDA: every operation enqueues a kernel on torch's current stream of the tensors' device.
#include "../library.h"

#include <tvm/ffi/error.h>

#include <cstdint>
#include <limits>

#include "device.h"
#include "kernels.h"

namespace vppo {
namespace {

template <typename Out>
void write_mask(DLDevice device, const Scores& scores, double keep_ratio, float threshold, Out* keep) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // tokens that an int can count
  if (scores.columns > kMost) {
    TVM_FFI_THROW(ValueError) << "scores: got " << scores.columns << " columns, takes at most " << kMost;
  }
  on(device, scores.rows, [&](cudaStream_t stream) { return topk_mask(scores, keep_ratio, threshold, keep, stream); });
}

}  // namespace

const DLDeviceType kDeviceType = kDLCUDA;
const char* const kDeviceName = "cuda";

void fold(DLDevice device, Tile tile, Targets targets, Fields stats) {
  on(device, tile.rows, [&](cudaStream_t stream) { return fold(tile, targets, stats, stream); });
}

void fold_pair(DLDevice device, Tile tile, Targets targets, Fields stats) {
  on(device, tile.rows, [&](cudaStream_t stream) { return fold_pair(tile, targets, stats, stream); });
}

void fold_jsd(DLDevice device, Tile tile, Fields pair, Mixture mixture, Fields jsd_terms) {
  on(device, tile.rows, [&](cudaStream_t stream) { return fold_jsd(tile, pair, mixture, jsd_terms, stream); });
}

void gradient(DLDevice device, Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope) {
  on(device, tile.rows, [&](cudaStream_t stream) { return gradient(tile, softmax, targets, grads, slope, stream); });
}

void gradient_pair(DLDevice device, Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets,
                   Fields grads, Slopes slopes) {
  on(device, tile.rows, [&](cudaStream_t stream) {
    return gradient_pair(tile, pair, jsd_terms, mixture, targets, grads, slopes, stream);
  });
}

void topk_mask(DLDevice device, const Scores& scores, double keep_ratio, float threshold, float* keep) {
  write_mask(device, scores, keep_ratio, threshold, keep);
}

void topk_mask(DLDevice device, const Scores& scores, double keep_ratio, float threshold, bool* keep) {
  write_mask(device, scores, keep_ratio, threshold, keep);
}

}  // namespace vppo
