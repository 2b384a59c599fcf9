// The table of operations for one instruction set; compiled once for each.
#include "tiles.h"

#define VPPO_JOIN_(a, b) a##b
#define VPPO_JOIN(a, b) VPPO_JOIN_(a, b)
#define VPPO_TEXT_(a) #a
#define VPPO_TEXT(a) VPPO_TEXT_(a)

namespace vppo {

extern const Operations VPPO_JOIN(operations_, VPPO_INSTRUCTIONS) = {
    VPPO_TEXT(VPPO_INSTRUCTIONS), fold, fold_pair, fold_jsd, gradient, gradient_pair, evaluate,
};

}  // namespace vppo
