// What the CPU and CUDA libraries share on torch's side: dtype dispatch and argument checks, on the stable ABI only.
//
// The Python functions in python/ncpvae/ops check everything with better messages; these checks are what memory
// safety needs when torch.ops.ncpvae.<op> is called directly.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "philox.h"

namespace ncpvae {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 stays float64; everything narrower is computed in float32
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A contiguous tensor on the device of `like`, its values to be written. torch::stable::new_empty would pass through the
// dispatcher, which takes 0.6 μs more on a CPU: with three results a fifth of a tiny call.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, device_type, device_index, &made));
  return Tensor(made);
}
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return new_tensor(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        torch::headeronly::IntHeaderOnlyArrayRef expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == expected[i];
  STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", shape_text(expected), ", got ",
                  shape_text(tensor.sizes()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  check_shape(op, name, tensor, torch::headeronly::IntHeaderOnlyArrayRef(expected.begin(), expected.size()));
}

// a matrix with at least one column, and at least `rows` rows
inline void check_matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows = 0) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) >= rows && tensor.size(1) >= 1, op, ": ", name,
                  " must be a matrix with at least ", rows, " row(s) and 1 column, got shape ",
                  shape_text(tensor.sizes()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must have dtype ", toString(expected), ", got ",
                  toString(tensor.scalar_type()));
}

inline void check_seed(const char* op, const Tensor& seed) {
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_shape(op, "seed", seed, {2});
}

// Calls f(T{}) with the C++ type of a floating dtype.
template <typename F>
void dispatch_floating(const char* op, const char* name, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", toString(type));
  }
}

}  // namespace ncpvae
