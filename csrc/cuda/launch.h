// What every CUDA op needs around its kernels: the device, the stream, checked launches, dtypes, warp primitives.
//
// LibTorch's stable ABI only, so that one build serves every torch from 2.11 on. Kernels are launched through
// `cudaLaunchKernelEx` and warps talk through the `shuffle…` functions here, so that the sources hold no syntax
// that only nvcc reads: with stand-ins for cuda_runtime.h they also compile and run as host code.
#pragma once

#if !defined(USE_CUDA)
#define USE_CUDA  // torch/csrc/inductor/aoti_torch/c/shim.h declares the current stream only with it
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "tensor.h"

namespace ncpvae::cuda {

// ---- host ----------------------------------------------------------------------------------------------------

// The device of `on` and its current stream, for as long as the object lives; launches kernels for the op `op`.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on) : op_(op), guard_(on.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Nothing is launched for zero blocks. Kernels loop over blockIdx.x, so that any number of blocks may be asked for.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments&&... arguments) const {
    launch_with_memory(kernel, blocks, threads, 0, std::forward<Arguments>(arguments)...);
  }

  // The same with `bytes` of dynamic shared memory, for which a kernel must be prepared where they pass 48 KB.
  template <typename... Parameters, typename... Arguments>
  void launch_with_memory(void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes,
                          Arguments&&... arguments) const {
    if (blocks <= 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream_;
    if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  }

 private:
  void check(cudaError_t status) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // it is reported here, and not to whoever asks next
    STD_TORCH_CHECK(false, op_, ": the kernel could not be launched: ", cudaGetErrorString(status));
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A contiguous tensor of the dtype that `tensor` is computed in.
inline Tensor widened(const Tensor& tensor) {
  const ScalarType type = accumulation_type(tensor.scalar_type());
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// ---- host and device -----------------------------------------------------------------------------------------

// `count` values that are read or written at once, in 16-byte accesses where that is possible.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
  T value[count];
};

template <typename T, int count>
bool aligned_for(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, count>) == 0;
}

NCPVAE_HD uint64_t multiply_high64(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Division by a number that the host knows, of any 64-bit number: a product instead of the hundred instructions that a
// GPU takes to divide. With r = ⌊(2⁶⁴ − 1) / d⌋, ⌊a r / 2⁶⁴⌋ is a / d rounded down or one less.
struct Divisor {
  uint64_t value = 1, reciprocal = UINT64_MAX;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint64_t>(divisor)), reciprocal(UINT64_MAX / value) {}

  NCPVAE_HD int64_t divide(int64_t number, int64_t& remainder) const {
    const uint64_t a = static_cast<uint64_t>(number);
    uint64_t quotient = multiply_high64(a, reciprocal), rest = a - quotient * value;
    if (rest >= value) {
      ++quotient;
      rest -= value;
    }
    remainder = static_cast<int64_t>(rest);
    return static_cast<int64_t>(quotient);
  }
};

// ---- device --------------------------------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The value held by the lane whose number is this lane's xor `mask`, by lane `lane`, and by the lane `by` below.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int by) {
  return __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(by));
}
// The GPU's own 2^x, log₂ x and 1/x: one instruction where the library's functions take ten to twenty. Errors stay at
// two units of rounding, but for logarithms near zero, whose absolute error is 2⁻²². Below 2⁻¹²⁶ is zero.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }
__device__ __forceinline__ float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
__device__ __forceinline__ double fast_reciprocal(double x) { return 1 / x; }

// e^x for x ≤ 0. The difference to a maximum is multiplied, and not the value itself, so that no common offset costs
// digits.
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * 1.44269504f); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }

// 16 bytes from global to shared memory, both on 16-byte boundaries, past the registers. They are there once the thread
// that asked has awaited its copies, and for the block's other threads after a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  std::memcpy(shared, global, 16);
#endif
}
__device__ __forceinline__ void await_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// One bit per lane.
__device__ __forceinline__ unsigned ballot(bool condition) { return __ballot_sync(kFullWarp, condition); }

// Sums and maxima over a warp, the same in every lane and always in the same order. No lane's value may be NaN in
// the maximum.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace ncpvae::cuda
