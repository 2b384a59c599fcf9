// What Python calls of the product: checks its tensors.
#include <tvm/ffi/tvm_ffi.h>

#include "../arguments.h"
#include "product.h"

namespace vppo {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};

// Data of a bfloat16 matrix of any number of rows.
const uint16_t* check_matrix(const char* name, const TensorView& tensor, int64_t depth, int64_t& stride) {
  check_kind(name, tensor, dtype_of<uint16_t>(), 2, kCpu);
  return check_rows<uint16_t>(name, tensor, {tensor.size(0), depth}, kCpu, stride);
}

void product_of(TensorView first, TensorView second, TensorView alike, TensorView weight, TensorView scratch,
                TensorView out) {
  if (!has_product()) TVM_FFI_THROW(RuntimeError) << "product: this processor does not multiply bfloat16";
  Product given{};
  given.depth = weight.ndim() == 2 ? weight.size(1) : 0;
  given.weight = check_matrix("weight", weight, given.depth, given.weight_stride);
  given.columns = weight.size(0);
  given.first = check_matrix("first", first, given.depth, given.first_stride);
  given.second = check_matrix("second", second, given.depth, given.second_stride);
  given.rows = first.size(0) + second.size(0);
  if (given.half() != first.size(0)) {
    TVM_FFI_THROW(ValueError) << "second: got shape " << shape_of(second) << ", takes as many rows as first, "
                              << first.size(0) << ", or one less";
  }
  given.alike = check_contiguous<bool>("alike", alike, {given.half()}, kCpu);
  given.scratch = check_contiguous<float>("scratch", scratch, {product_scratch(given.rows, given.depth)}, kCpu);
  given.out = check_contiguous<float>("out", out, {given.rows, given.columns}, kCpu);
  if (given.rows > 0 && given.columns > 0) product(given);
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_product, vppo::has_product)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product_scratch, vppo::product_scratch)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, vppo::product_of)
