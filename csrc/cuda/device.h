// Enqueuing on torch's current stream of the tensors' device.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include <cstdint>
#include <limits>

namespace vppo {

// Calls `enqueue(stream)` while the tensors' device is the current one.
template <typename Enqueue>
void on(DLDevice device, std::int64_t rows, const Enqueue& enqueue) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // blocks of a grid
  if (rows > kMost) TVM_FFI_THROW(ValueError) << "got " << rows << " rows, takes at most " << kMost;
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  TVM_FFI_CHECK_CUDA_ERROR(
      enqueue(static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id))));
}

}  // namespace vppo
