// The fused sweep as Python calls it: checks its tensors.
#include <tvm/ffi/tvm_ffi.h>

#include <limits>

#include "../arguments.h"
#include "../library.h"
#include "device.h"
#include "kernels.h"

namespace vppo {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 4096;  // of rows, columns and width: sums fit an int

// A matrix of 16-bit numbers that copies of whole tiles take.
Matrix check_operand(const char* name, const TensorView& tensor, DLDataType dtype, DLDevice device) {
  constexpr int64_t kBytes = 16;
  check_kind(name, tensor, dtype, 2, device);
  Matrix matrix{nullptr, tensor.size(0), tensor.size(1), 0, dtype.code == kDLBfloat};
  if (matrix.rows < 1 || matrix.columns < 1 || matrix.rows > kMost || matrix.columns > kMost) {
    TVM_FFI_THROW(ValueError) << name << ": got shape " << shape_of(tensor) << ", takes sizes from 1 to " << kMost;
  }
  if (matrix.columns > 1 && tensor.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides())
                              << ", takes consecutive entries in a row";
  }
  matrix.stride = matrix.rows > 1 ? tensor.stride(0) : (matrix.columns + 7) / 8 * 8;
  matrix.data = static_cast<const char*>(tensor.data_ptr()) + tensor.byte_offset();
  if (matrix.stride < matrix.columns || matrix.stride % (kBytes / 2) != 0 || matrix.stride > kMost ||
      tensor.data_ptr() == nullptr || reinterpret_cast<uintptr_t>(matrix.data) % kBytes != 0) {
    TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides()) << " of shape "
                              << shape_of(tensor) << ", takes rows that begin at multiples of " << kBytes << " bytes";
  }
  return matrix;
}

void check_ranks(int64_t ranks) {
  if (ranks < 1 || ranks > kMostRanks || kMostRanks % ranks != 0) {
    TVM_FFI_THROW(ValueError) << "ranks: got " << ranks << ", takes 1, 2 or " << kMostRanks;
  }
}

// `stats` is `[4, rows]` of one view or `[10, rows]` of two; `parts` is `[splits, fields, rows]`.
void sweep_(TensorView hidden, TensorView weight, Optional<TensorView> bias, Optional<TensorView> targets,
            int64_t first, double scale, int64_t ranks, TensorView parts, TensorView stats) {
  const DLDevice device = weight.device();
  if (device.device_type != kDeviceType) {
    TVM_FFI_THROW(ValueError) << "weight: got a tensor on " << text_of(device) << ", takes one on " << kDeviceName;
  }
  const DLDataType dtype = weight.dtype();
  if (dtype.bits != 16 || dtype.lanes != 1 || (dtype.code != kDLBfloat && dtype.code != kDLFloat)) {
    TVM_FFI_THROW(TypeError) << "weight: got dtype " << text_of(dtype) << ", takes bfloat16 or float16";
  }
  check_ranks(ranks);
  Sweep given{};
  given.hidden = check_operand("hidden", hidden, dtype, device);
  given.weight = check_operand("weight", weight, dtype, device);
  if (given.hidden.columns != given.weight.columns) {
    TVM_FFI_THROW(ValueError) << "hidden: got shape " << shape_of(hidden) << ", takes rows of " << given.weight.columns;
  }
  const int64_t fields = stats.ndim() == 2 ? stats.size(0) : 0;
  if (fields != kSoftmaxFields && fields != kPairFields) {
    TVM_FFI_THROW(ValueError) << "stats: got shape " << shape_of(stats) << ", takes [" << kSoftmaxFields << " or "
                              << kPairFields << ", rows]";
  }
  const bool pair = fields == kPairFields;
  given.rows = stats.size(1);
  const int64_t stacked = pair ? (given.rows + 7) / 8 * 16 : given.rows;  // eights of both views in turns
  if (given.hidden.rows != stacked) {
    TVM_FFI_THROW(ValueError) << "hidden: got shape " << shape_of(hidden) << ", takes " << stacked << " rows";
  }
  given.stats.data = check_rows<float>("stats", stats, {fields, given.rows}, device, given.stats.stride);
  const int64_t splits = parts.ndim() == 3 ? parts.size(0) : 0;
  if (splits < 1 || splits > given.weight.rows) {
    TVM_FFI_THROW(ValueError) << "parts: got shape " << shape_of(parts) << ", takes [splits, fields, rows]";
  }
  given.parts = check_contiguous<float>("parts", parts, {splits, fields, given.rows}, device);
  given.splits = static_cast<int>(splits);
  given.ranks = static_cast<int>(ranks);
  given.scale = static_cast<float>(scale);
  given.bias =
      bias.has_value() ? check_contiguous<float>("bias", *bias, {given.weight.rows}, device) : nullptr;
  given.targets = {
      targets.has_value() ? check_contiguous<int64_t>("targets", *targets, {given.rows}, device) : nullptr, first};
  on(device, splits * given.hidden.rows, [&](cudaStream_t stream) { return sweep(given, pair, stream); });
}

// Clusters of so many blocks that run at a time; 0 where this device has no fused sweep, or there is no such device.
int64_t sweep_places_(int64_t device_id, int64_t ranks) {
  check_ranks(ranks);
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) return cudaGetLastError(), 0;
  const tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device_id));
  return sweep_places(static_cast<int>(ranks));
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sweep, vppo::sweep_)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sweep_places, vppo::sweep_places_)
