// The product as Python calls it: checks its tensors.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>

#include "../arguments.h"
#include "product.h"

namespace vppo {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};

// A bound on rows and hidden size that no real matrix reaches; the product of two such numbers does not overflow.
constexpr int64_t kMost = int64_t{1} << 30;

int64_t scratch_of(int64_t rows, int64_t hidden_size) {
  const auto check = [](const char* name, int64_t value) {
    if (value < 0 || value > kMost) {
      TVM_FFI_THROW(ValueError) << name << ": got " << value << ", takes a number from 0 to " << kMost;
    }
  };
  check("rows", rows);
  check("hidden_size", hidden_size);
  return product_scratch(rows, hidden_size);
}

// Data of a bfloat16 matrix with any number of rows.
const uint16_t* check_matrix(const char* name, const TensorView& tensor, int64_t hidden_size, int64_t& stride) {
  check_kind(name, tensor, dtype_of<uint16_t>(), 2, kCpu);
  return check_rows<uint16_t>(name, tensor, {tensor.size(0), hidden_size}, kCpu, stride);
}

void product_of(TensorView first, TensorView second, TensorView shares_rounding, TensorView weight, TensorView scratch,
                TensorView out) {
  if (!has_product()) TVM_FFI_THROW(RuntimeError) << "product: this processor does not multiply bfloat16";
  Product given{};
  given.hidden_size = weight.ndim() == 2 ? weight.size(1) : 0;
  given.weight = check_matrix("weight", weight, given.hidden_size, given.weight_stride);
  given.columns = weight.size(0);
  given.first = check_matrix("first", first, given.hidden_size, given.first_stride);
  given.second = check_matrix("second", second, given.hidden_size, given.second_stride);
  // the difference of two sizes cannot overflow, their sum can
  if (first.size(0) - second.size(0) != 0 && first.size(0) - second.size(0) != 1) {
    TVM_FFI_THROW(ValueError) << "second: got shape " << shape_of(second) << ", takes as many rows as first, "
                              << first.size(0) << ", or one less";
  }
  const int64_t rows = std::min(first.size(0), kMost) + std::min(second.size(0), kMost);
  const int64_t scratch_size = scratch_of(rows, given.hidden_size);
  given.rows = first.size(0) + second.size(0);
  given.shares_rounding = check_contiguous<bool>("shares_rounding", shares_rounding, {given.half()}, kCpu);
  given.scratch = check_contiguous<float>("scratch", scratch, {scratch_size}, kCpu);
  given.out = check_contiguous<float>("out", out, {given.rows, given.columns}, kCpu);
  if (given.rows > 0 && given.columns > 0) product(given);
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_product, vppo::has_product)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product_scratch, vppo::scratch_of)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, vppo::product_of)
