// Checks of the tensors that come from Python; a wrong one raises an exception that names it.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <string>
#include <type_traits>

namespace vppo {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

template <typename T>
constexpr DLDataType dtype_of() {
  if constexpr (std::is_same_v<T, bool>) {
    return {kDLBool, 8, 1};
  } else if constexpr (std::is_same_v<T, float>) {
    return {kDLFloat, 32, 1};
  } else if constexpr (std::is_same_v<T, uint16_t>) {  // C++17 has no bfloat16
    return {kDLBfloat, 16, 1};
  } else {
    static_assert(std::is_same_v<T, int64_t>);
    return {kDLInt, 64, 1};
  }
}

inline bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string shape_of(const TensorView& tensor) { return text_of(tensor.shape()); }

inline std::string text_of(DLDevice device) {
  const char* const kind = device.device_type == kDLCPU ? "cpu" : device.device_type == kDLCUDA ? "cuda" : nullptr;
  return (kind ? kind : "device type " + std::to_string(device.device_type)) + ":" + std::to_string(device.device_id);
}

// tvm::ffi's own function throws at complex numbers, and a throw while an error is composed would end the process.
inline std::string text_of(DLDataType dtype) {
  if (dtype.code == kDLBool) return "bool";
  const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
  const std::string kind = dtype.code < std::size(kinds) ? kinds[dtype.code] : "type " + std::to_string(dtype.code) + ", ";
  return kind + std::to_string(dtype.bits);
}

// `tensor` has this type and rank and lies on this device.
inline void check_kind(const char* name, const TensorView& tensor, DLDataType dtype, int rank, DLDevice device) {
  const DLDevice at = tensor.device();
  if (at.device_type != device.device_type || at.device_id != device.device_id) {
    TVM_FFI_THROW(ValueError) << name << ": got a tensor on " << text_of(at) << ", takes one on " << text_of(device);
  }
  if (!same(tensor.dtype(), dtype)) {
    TVM_FFI_THROW(TypeError) << name << ": got dtype " << text_of(tensor.dtype()) << ", takes " << text_of(dtype);
  }
  if (tensor.ndim() != rank) {
    TVM_FFI_THROW(ValueError) << name << ": got shape " << shape_of(tensor) << ", takes " << rank << " dimensions";
  }
}

// The most bytes that a tensor may span: more than any memory holds, and sums of such numbers do not overflow.
constexpr int64_t kReach = int64_t{1} << 56;

// `a * b` of two numbers that are not negative; throws where the tensor would be larger than any memory.
inline int64_t times(const char* name, const TensorView& tensor, int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || product > kReach) {
    TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides()) << " of shape "
                              << shape_of(tensor) << ", takes a tensor that fits into memory";
  }
  return product;
}

// Data of a tensor of this shape that is contiguous in all dimensions but the first. The first one's stride goes to
// `stride`, and 0 where the tensor is empty.
template <typename T>
T* check_rows(const char* name, const TensorView& tensor, std::initializer_list<int64_t> shape, DLDevice device,
              int64_t& stride) {
  check_kind(name, tensor, dtype_of<T>(), static_cast<int>(shape.size()), device);
  bool empty = false;
  int dimension = 0;
  for (const int64_t size : shape) {
    if (tensor.size(dimension++) != size || size < 0) {
      TVM_FFI_THROW(ValueError) << name << ": got shape " << shape_of(tensor) << ", takes " << text_of(shape);
    }
    empty |= size == 0;
  }
  if (empty) {
    stride = 0;
    return reinterpret_cast<T*>(tensor.data_ptr());
  }
  int64_t packed = 1;
  for (int i = dimension - 1; i > 0; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != packed) {
      TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides()) << " of shape "
                                << shape_of(tensor) << ", takes consecutive entries in all dimensions but the first";
    }
    packed = times(name, tensor, packed, tensor.size(i));
  }
  stride = dimension && tensor.size(0) != 1 ? tensor.stride(0) : packed;
  if (stride < packed) {
    TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides()) << " of shape "
                              << shape_of(tensor) << ", takes rows that lie one after the other";
  }
  times(name, tensor, times(name, tensor, stride, dimension ? tensor.size(0) : 1), sizeof(T));
  if (tensor.data_ptr() == nullptr) {
    TVM_FFI_THROW(ValueError) << name << ": got a tensor without data, takes one with data";
  }
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

// Data of a contiguous tensor of this shape.
template <typename T>
T* check_contiguous(const char* name, const TensorView& tensor, std::initializer_list<int64_t> shape,
                    DLDevice device) {
  int64_t stride = 0;
  T* const data = check_rows<T>(name, tensor, shape, device, stride);
  int64_t packed = stride > 0;  // 0 of an empty tensor; the sizes of others have been multiplied without overflow
  for (const int64_t* size = shape.begin() + (shape.size() > 0); size != shape.end() && packed; ++size) packed *= *size;
  if (stride != packed) {
    TVM_FFI_THROW(ValueError) << name << ": got strides " << text_of(tensor.strides()) << " of shape "
                              << shape_of(tensor) << ", takes a contiguous tensor";
  }
  return data;
}

}  // namespace vppo
