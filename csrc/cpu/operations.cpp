#include "operations.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vppo {
namespace {

const Operations& choose() {
  const char* const asked = std::getenv("VPPO_KERNELS_ISA");
  const std::string name = asked == nullptr ? "" : asked;
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == operations_avx512.name)) return operations_avx512;
  if (avx2 && (name.empty() || name == operations_avx2.name)) return operations_avx2;
#endif
  if (name.empty() || name == operations_baseline.name) return operations_baseline;
  throw std::invalid_argument("VPPO_KERNELS_ISA: got '" + name + "', takes an instruction set of this processor");
}

}  // namespace

const Operations& operations() {
  static const Operations& chosen = choose();
  return chosen;
}

}  // namespace vppo
