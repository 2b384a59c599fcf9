// The tile operations in vectors.
#include "../../statistics.h"
#include "../operations.h"
#include "exponential.h"

#define VPPO_JOIN_(a, b) a##b
#define VPPO_JOIN(a, b) VPPO_JOIN_(a, b)
#define VPPO_TEXT_(a) #a
#define VPPO_TEXT(a) VPPO_TEXT_(a)

namespace vppo {
namespace {

using std::int64_t;

constexpr int64_t kBlock = 2048;  // columns taken together: they stay in the nearest cache between two looks at them

View fold_block(const float* z, int64_t columns) {
  Vec top = all(-INFINITY);
  each_vector(columns, [&](int64_t j, int count) { top = max(load(z + j, count, -INFINITY), top); });
  const float most = largest(top);
  Vec total{}, moment{};
  each_vector(columns, [&](int64_t j, int count) {
    const Vec shifted = max(all(-104.0f), load(z + j, count, -INFINITY) - most);
    const Vec weight = exp_down(shifted);
    total += weight;
    moment += weight * shifted;
  });
  return {most, sum(total), sum(moment)};
}

void fold(const Tile& tile, const Targets& targets, const Fields& stats, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* const z = tile.view(0, row);
    View view{stats(0, row), stats(1, row), stats(2, row)};
    for (int64_t start = 0; start < tile.columns; start += kBlock) {
      const int64_t rest = tile.columns - start;
      view = merge(view, fold_block(z + start, rest < kBlock ? rest : kBlock));
    }
    stats(0, row) = view.max;
    stats(1, row) = view.sum;
    stats(2, row) = view.moment;
    const int64_t target = targets.column(row, tile.columns);
    if (target >= 0) stats(3, row) = z[target];
  }
}

}  // namespace

extern const Operations VPPO_JOIN(operations_, VPPO_INSTRUCTIONS);
const Operations VPPO_JOIN(operations_, VPPO_INSTRUCTIONS) = {VPPO_TEXT(VPPO_INSTRUCTIONS), fold};

}  // namespace vppo
