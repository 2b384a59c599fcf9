// What Python calls of the product: checks its tensors.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>

#include "../arguments.h"
#include "product.h"

namespace vppo {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int64_t kMostThreads = 1024;

struct Matrix {
  const uint16_t* data;
  int64_t rows, depth, stride;
};

// A bfloat16 matrix whose rows may lie anywhere, their elements beside each other.
Matrix check_matrix(const char* name, const TensorView& tensor) {
  check_kind<BFloat16>(name, tensor, 2, kCpu);
  const int64_t rows = tensor.size(0), depth = tensor.size(1);
  if (depth > 1 && tensor.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << name << ": got elements " << tensor.stride(1) << " apart in a row, takes 1";
  }
  return {static_cast<const uint16_t*>(tensor.data_ptr()), rows, depth, rows > 1 ? tensor.stride(0) : depth};
}

void product_(TensorView first, TensorView second, TensorView alike, TensorView weight, TensorView scratch,
              TensorView out, int64_t threads) {
  if (!has_product()) TVM_FFI_THROW(RuntimeError) << "product: this processor has no AVX512-BF16";
  const Matrix one = check_matrix("first", first), other = check_matrix("second", second);
  const Matrix head = check_matrix("weight", weight);
  const int64_t rows = one.rows + other.rows;
  if (one.rows != (rows + 1) / 2) {
    TVM_FFI_THROW(ValueError) << "second: got " << other.rows << " rows, takes as many as first, " << one.rows
                              << ", or one less";
  }
  for (const auto& [name, matrix] : {std::pair{"first", one}, std::pair{"second", other}}) {
    if (matrix.depth != head.depth) {
      TVM_FFI_THROW(ValueError) << name << ": got rows of " << matrix.depth << ", takes those of weight, " << head.depth;
    }
  }
  if (threads < 1) TVM_FFI_THROW(ValueError) << "threads: got " << threads << ", takes at least 1";
  Product given{};
  given.first = one.data, given.first_stride = one.stride;
  given.second = other.data, given.second_stride = other.stride;
  given.weight = head.data, given.weight_stride = head.stride;
  given.rows = rows, given.columns = head.rows, given.depth = head.depth;
  given.alike = check_contiguous<bool>("alike", alike, {one.rows}, kCpu);
  given.scratch = check_contiguous<int32_t>("scratch", scratch, {product_scratch(rows, head.depth)}, kCpu);
  given.out = check_contiguous<float>("out", out, {rows, head.rows}, kCpu);
  if (rows > 0 && head.rows > 0) product(given, static_cast<int>(std::min(threads, kMostThreads)));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_product, has_product);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product_scratch, product_scratch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, product_);

}  // namespace vppo
