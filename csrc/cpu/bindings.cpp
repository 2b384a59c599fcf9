// What Python calls: checks its tensors and divides their rows among threads.
#include <tvm/ffi/tvm_ffi.h>

#include "../arguments.h"
#include "operations.h"
#include "parallel.h"

namespace vppo {
namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int64_t kWorth = 1 << 15;  // entries of a tile that a thread takes at a time

Tile check_tile(const TensorView& tile, int views) {
  if (tile.ndim() != views + 1) {
    TVM_FFI_THROW(ValueError) << "tile: got shape " << shape_of(tile) << ", takes " << views + 1 << " dimensions";
  }
  const int64_t rows = tile.size(-2), columns = tile.size(-1);
  float* const data = views == 1 ? check_contiguous<float>("tile", tile, {rows, columns}, kCpu)
                                 : check_contiguous<float>("tile", tile, {2, rows, columns}, kCpu);
  return {data, rows, columns};
}

Fields check_fields(const char* name, const TensorView& packed, int fields, int64_t rows) {
  Fields found{};
  found.data = check_rows<float>(name, packed, {fields, rows}, kCpu, found.stride);
  return found;
}

Targets check_targets(const Optional<TensorView>& targets, int64_t first, int64_t rows) {
  if (!targets.has_value()) return {nullptr, first};
  return {check_contiguous<int64_t>("targets", *targets, {rows}, kCpu), first};
}

template <typename Body>
void for_rows(const Tile& tile, const Body& body) {
  if (tile.columns == 0) return;
  parallel_for(tile.rows, kWorth / tile.columns, body);
}

void fold(TensorView tile, Optional<TensorView> targets, int64_t first, TensorView stats) {
  const Tile z = check_tile(tile, 1);
  const Targets chosen = check_targets(targets, first, z.rows);
  const Fields into = check_fields("stats", stats, kViewFields, z.rows);
  for_rows(z, [&](int64_t begin, int64_t end) { operations().fold(z, chosen, into, begin, end); });
}

tvm::ffi::String instructions() { return operations().name; }

}  // namespace
}  // namespace vppo

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fold, vppo::fold)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instructions, vppo::instructions)
