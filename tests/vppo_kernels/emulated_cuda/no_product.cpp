// The one question that only the CPU's library is asked: here, as on a CPU without bfloat16 instructions.
#include <tvm/ffi/tvm_ffi.h>

namespace {
bool has_product() { return false; }
}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_product, has_product)
