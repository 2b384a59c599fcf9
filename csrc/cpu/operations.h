// The operations on tiles, once per instruction set; `vppo_kernels/backends/protocols.py` says what each does.
//
// All take rows `begin` to `end`. Every row is computed by itself, so results do not depend on how rows are divided
// among threads. Nothing is allocated.
#pragma once

#include "../types.h"

namespace vppo {

struct Operations {
  const char* name;
  void (*fold)(Tile tile, Targets targets, Fields stats, std::int64_t begin, std::int64_t end);
  void (*fold_pair)(Tile tile, Targets targets, Fields stats, std::int64_t begin, std::int64_t end);
  void (*fold_jsd)(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms, std::int64_t begin, std::int64_t end);
  void (*gradient)(Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope, std::int64_t begin,
                   std::int64_t end);
  // `jsd_terms.data` is null where the divergence is not Jensen-Shannon's
  void (*gradient_pair)(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                        Slopes slopes, std::int64_t begin, std::int64_t end);
  // for tests: `out[i] = function(x[i])`, false if there is no function of that name
  bool (*evaluate)(const char* function, const float* x, float* out, std::int64_t count);
};

extern const Operations operations_baseline;
#ifdef __x86_64__
extern const Operations operations_avx2, operations_avx512;
#endif

// The operations for the best instruction set of this processor, or for the one that VPPO_KERNELS_ISA names.
const Operations& operations();

}  // namespace vppo
