// Stand-in for CUDA's runtime header: the kernels in csrc/cuda compile as C++ and run on the CPU.
//
// A block's threads are fibres that one host thread runs: a warp at a time up to the block's next barrier, within it a
// thread at a time up to the next shuffle; blocks run one after another. CUDA_EMULATION_ORDER says in which order they
// take their turns (forward, backward, or shuffled by a number): where two warps touch the same memory without a
// barrier between them, some order gives a different result. A barrier that a part of the block does not reach is an error.
// The ops register for the CPU.
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
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

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

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
enum class Wait { nothing, warp, block, returned };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::nothing;
  bool parity = false;
  uint64_t exchange[2] = {0, 0};
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline const std::function<void()>* body = nullptr;
inline int current = 0;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %d)\n", message, blockIdx.x, current);
  std::abort();
}

inline void entry() {
  (*body)();
  fibres[current].wait = Wait::returned;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void wait(Wait what) {
  const int self = current;
  fibres[self].wait = what;
  swapcontext(&fibres[self].context, &scheduler);
}

inline std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  const char* variable = std::getenv("CUDA_EMULATION_ORDER");
  const std::string how = variable == nullptr ? "forward" : variable;
  if (how == "backward") {
    std::reverse(order.begin(), order.end());
  } else if (how != "forward") {
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoul(how)));
  }
  return order;
}

inline void run_warp(int warp, const std::vector<unsigned>& order) {
  const int first = warp * kWarp;
  for (;;) {
    for (unsigned t : order) {
      if (static_cast<int>(t) / kWarp != warp || fibres[t].wait != Wait::nothing) continue;
      current = static_cast<int>(t);
      threadIdx = dim3(t);
      swapcontext(&scheduler, &fibres[t].context);
    }
    int at_shuffle = 0;
    for (int t = first; t < first + kWarp; ++t) at_shuffle += fibres[t].wait == Wait::warp;
    if (at_shuffle == 0) return;
    if (at_shuffle != kWarp) fail("a shuffle that only a part of the warp comes to");
    for (int t = first; t < first + kWarp; ++t) fibres[t].wait = Wait::nothing;
  }
}

inline void run_block(int threads, const std::vector<unsigned>& order) {
  constexpr size_t kStack = 64 * 1024;
  if (static_cast<int>(fibres.size()) < threads) fibres.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Fibre& f = fibres[t];
    if (!f.stack) f.stack = std::make_unique<char[]>(kStack);
    f.wait = Wait::nothing;
    f.parity = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  std::vector<int> warps;  // in the order in which `order` first names them
  for (unsigned t : order) {
    const int warp = static_cast<int>(t) / kWarp;
    if (std::find(warps.begin(), warps.end(), warp) == warps.end()) warps.push_back(warp);
  }
  for (;;) {  // every warp in turn runs as far as the next barrier of the block
    for (int warp : warps) run_warp(warp, order);
    int returned = 0, at_block = 0;
    for (int t = 0; t < threads; ++t) {
      returned += fibres[t].wait == Wait::returned;
      at_block += fibres[t].wait == Wait::block;
    }
    if (returned == threads) return;
    if (at_block != threads) fail("some threads wait where others do not come");
    for (int t = 0; t < threads; ++t) fibres[t].wait = Wait::nothing;
  }
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 8);
  Fibre& self = fibres[current];
  const int me = current;
  const bool parity = self.parity;
  self.parity = !parity;
  self.exchange[parity] = 0;
  std::memcpy(&self.exchange[parity], &value, sizeof(T));
  wait(Wait::warp);
  T result;
  std::memcpy(&result, &fibres[me / kWarp * kWarp + source].exchange[parity], sizeof(T));
  return result;
}

inline int lane() { return current % kWarp; }

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Wait::block); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::exchange(value, source);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const int lane = emulation::lane();
  return emulation::exchange(value, lane < static_cast<int>(by) ? lane : lane - static_cast<int>(by));
}
inline unsigned __ballot_sync(unsigned, bool condition) {
  unsigned bits = 0;
  const bool parity = emulation::fibres[emulation::current].parity;
  emulation::exchange<uint64_t>(condition, 0);
  const int first = emulation::current / emulation::kWarp * emulation::kWarp;
  for (int i = 0; i < emulation::kWarp; ++i) bits |= static_cast<unsigned>(emulation::fibres[first + i].exchange[parity]) << i;
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x, most = 1u << 20;
  if (threads == 0 || threads > 1024 || threads % emulation::kWarp != 0 || config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  const std::function<void()> call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulation::body = &call;
  gridDim = config->gridDim;
  if (const char* limit = std::getenv("CUDA_EMULATION_BLOCKS")) gridDim.x = std::min<unsigned>(gridDim.x, std::stoul(limit));
  if (gridDim.x > most) return cudaErrorInvalidConfiguration;
  blockDim = config->blockDim;
  const std::vector<unsigned> thread_order = emulation::turns(threads);
  for (unsigned block : emulation::turns(gridDim.x)) {
    blockIdx = dim3(block);
    emulation::run_block(static_cast<int>(threads), thread_order);
  }
  return cudaSuccess;
}

#include "mma_emulation.h"
