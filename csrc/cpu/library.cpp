// The library of the CPU: every operation divides its rows among threads.
#include "../library.h"

#include <algorithm>

#include "operations.h"
#include "parallel.h"
#include "selection.h"

namespace vppo {
namespace {

constexpr std::int64_t kGrain = 1 << 14;  // entries that a thread takes at a time

// Calls `body(begin, end)` for ranges of rows, each of so many columns.
template <typename Body>
void for_rows(std::int64_t rows, std::int64_t columns, const Body& body) {
  parallel_for(rows, kGrain / std::max<std::int64_t>(columns, 1), body);
}

// A packed row may have any length, so a thread takes one at a time.
template <typename Out>
void write_mask(const Scores& scores, double keep_ratio, float threshold, Out* keep) {
  for_rows(scores.rows, scores.offsets != nullptr ? kGrain : scores.columns,
           [&](auto begin, auto end) { topk_mask(scores, keep_ratio, threshold, keep, begin, end); });
}

}  // namespace

const DLDeviceType kDeviceType = kDLCPU;
const char* const kDeviceName = "cpu";

void fold(DLDevice, Tile tile, Targets targets, Fields stats) {
  const Operations& on = operations();
  for_rows(tile.rows, tile.columns, [&](auto begin, auto end) { on.fold(tile, targets, stats, begin, end); });
}

void fold_pair(DLDevice, Tile tile, Targets targets, Fields stats) {
  const Operations& on = operations();
  for_rows(tile.rows, tile.columns, [&](auto begin, auto end) { on.fold_pair(tile, targets, stats, begin, end); });
}

void fold_jsd(DLDevice, Tile tile, Fields pair, Mixture mixture, Fields jsd_terms) {
  const Operations& on = operations();
  for_rows(tile.rows, tile.columns,
           [&](auto begin, auto end) { on.fold_jsd(tile, pair, mixture, jsd_terms, begin, end); });
}

void gradient(DLDevice, Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope) {
  const Operations& on = operations();
  for_rows(tile.rows, tile.columns,
           [&](auto begin, auto end) { on.gradient(tile, softmax, targets, grads, slope, begin, end); });
}

void gradient_pair(DLDevice, Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                   Slopes slopes) {
  const Operations& on = operations();
  for_rows(tile.rows, tile.columns, [&](auto begin, auto end) {
    on.gradient_pair(tile, pair, jsd_terms, mixture, targets, grads, slopes, begin, end);
  });
}

void topk_mask(DLDevice, const Scores& scores, double keep_ratio, float threshold, float* keep) {
  write_mask(scores, keep_ratio, threshold, keep);
}

void topk_mask(DLDevice, const Scores& scores, double keep_ratio, float threshold, bool* keep) {
  write_mask(scores, keep_ratio, threshold, keep);
}

}  // namespace vppo
