#include "parallel.h"

#include <dlfcn.h>

namespace vppo {

void on_every_thread(void (*task)(void*), void* state) {
  // what GCC compiles `omp parallel` into a call of; the runtimes of Intel and LLVM have it too
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel != nullptr) {
    parallel(task, state, 0, 0);  // 0 threads: as many as are set
  } else {
    task(state);
  }
}

}  // namespace vppo
