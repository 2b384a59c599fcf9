#include "operations.h"

#include <tvm/ffi/error.h>

#include <cstdlib>
#include <cstring>

namespace vppo {
namespace {

const Operations* choose() {
  const char* const asked = std::getenv("VPPO_KERNELS_ISA");
  const auto wanted = [&](const Operations& of) { return asked == nullptr || std::strcmp(asked, of.name) == 0; };
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted(operations_avx512)) return &operations_avx512;
  if (avx2 && wanted(operations_avx2)) return &operations_avx2;
#endif
  return wanted(operations_baseline) ? &operations_baseline : nullptr;
}

}  // namespace

const Operations& operations() {
  static const Operations* const chosen = choose();
  if (chosen == nullptr) {
    TVM_FFI_THROW(ValueError) << "VPPO_KERNELS_ISA: got '" << std::getenv("VPPO_KERNELS_ISA")
                              << "', takes an instruction set of this processor: baseline, avx2 or avx512";
  }
  return *chosen;
}

}  // namespace vppo
