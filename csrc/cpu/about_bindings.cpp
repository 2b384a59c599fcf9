// Functions by which Python asks the CPU's library about itself.
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>

#include "../arguments.h"
#include "operations.h"
#include "parallel.h"

namespace vppo {
namespace {

tvm::ffi::String instructions() { return operations().name; }

// The number of threads that a loop runs on.
int64_t threads() {
  std::atomic<int64_t> count{0};
  on_every_thread([](void* counted) { ++*static_cast<std::atomic<int64_t>*>(counted); }, &count);
  return count;
}

// For tests: applies one of the vectorised functions to every entry of `x`.
void evaluate(tvm::ffi::String function, TensorView x, TensorView out) {
  const int64_t count = x.ndim() == 1 ? x.size(0) : 0;
  const float* const from = check_contiguous<float>("x", x, {count}, {kDLCPU, 0});
  float* const into = check_contiguous<float>("out", out, {count}, {kDLCPU, 0});
  if (!operations().evaluate(function.c_str(), from, into, count)) {
    TVM_FFI_THROW(ValueError) << "function: got '" << function << "', takes exp, exp_down, phi_near or log1p";
  }
}

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(instructions, vppo::instructions)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(threads, vppo::threads)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(evaluate, vppo::evaluate)
