// What the library of every device implements, and `bindings.cpp` exports to Python.
//
// Arguments are checked, lie on `device` and have at least one row; the contracts are those of
// `vppo_kernels/backends/protocols.py`. Nothing is allocated.
#pragma once

#include <dlpack/dlpack.h>

#include "types.h"

namespace vppo {

extern const DLDeviceType kDeviceType;
extern const char* const kDeviceName;

void fold(DLDevice device, Tile tile, Targets targets, Fields stats);
void fold_pair(DLDevice device, Tile tile, Targets targets, Fields stats);
void fold_jsd(DLDevice device, Tile tile, Fields pair, Mixture mixture, Fields jsd_terms);
void gradient(DLDevice device, Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope);
// `jsd_terms.data` is null where the divergence is not Jensen-Shannon's
void gradient_pair(DLDevice device, Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets,
                   Fields grads, Slopes slopes);
// the mask goes to `keep`, which may be the scores; a threshold of NaN is none
void topk_mask(DLDevice device, const Scores& scores, double keep_ratio, float threshold, float* keep);
void topk_mask(DLDevice device, const Scores& scores, double keep_ratio, float threshold, bool* keep);

}  // namespace vppo
