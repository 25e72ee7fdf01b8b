// Stand-in for CUDA's runtime header: the kernels in csrc/cuda compile as C++ and run on the CPU.
//
// It declares what the kernels use of CUDA and no more; emulation.h says how their threads run. The ops register for
// the CPU. CUDA_EMULATION_BLOCKS limits the blocks of a launch, so that kernels which loop over their grid do loop.
#pragma once

#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
#define aoti_torch_get_current_cuda_stream emulated_current_cuda_stream
#if !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <math.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulation.h"

extern "C" {
inline AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(1);
  return TORCH_SUCCESS;
}
inline AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return TORCH_SUCCESS; }
inline AOTITorchError emulated_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return TORCH_SUCCESS;
}
}

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

// ---- the language --------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so that they can share

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::sync_warp(); }

namespace emulation {

// `value` of the lane that `source_of` names, given this lane's number within its group of `width`. Only whole warps
// may come together: a mask that leaves lanes out would need as many schedules as there are masks.
template <typename T, typename F>
T shuffle(unsigned mask, T value, int width, F source_of) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("a shuffle with a mask of a part of the warp");
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = lane / width * width;
  const int source = source_of(lane - group);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source < 0 || source >= width ? lane : group + source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle(mask, value, width, [=](int) { return source % width; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulation::shuffle(mask, value, width, [=](int lane) { return lane ^ lane_mask; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulation::shuffle(mask, value, width, [=](int lane) { return lane - static_cast<int>(by); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return emulation::shuffle(mask, value, width, [=](int lane) { return lane + static_cast<int>(by); });
}
inline unsigned __ballot_sync(unsigned, bool condition) { return emulation::ballot(condition); }
inline int __any_sync(unsigned, bool condition) { return emulation::ballot(condition) != 0; }
inline int __all_sync(unsigned, bool condition) { return emulation::ballot(condition) == 0xffffffffu; }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

// ---- the runtime ---------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
namespace emulation {
inline std::string last_failure;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulation::last_failure.c_str() : "invalid configuration argument";
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  constexpr unsigned kMostThreads = 1024, kMostBlocks = 1u << 20;
  const unsigned threads = config->blockDim.x;
  gridDim = config->gridDim;
  if (const char* limit = std::getenv("CUDA_EMULATION_BLOCKS")) {
    gridDim.x = std::min<unsigned>(gridDim.x, std::stoul(limit));
  }
  if (threads == 0 || threads > kMostThreads || threads % emulation::kWarp != 0 || gridDim.x == 0 ||
      gridDim.x > kMostBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  blockDim = config->blockDim;
  emulation::last_failure = emulation::run(gridDim.x, threads, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return emulation::last_failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

#include "mma_emulation.h"
