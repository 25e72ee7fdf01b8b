// The machine under cuda_runtime.h: the threads of a block are fibres that one host thread runs.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;

// Where the running thread is. Everything between two barriers of its block has one `block_phase`, everything between
// two __syncwarp of its warp one `warp_phase`.
struct Place {
  uint32_t launch = 0, block = 0, thread = 0, block_phase = 0, warp_phase = 0;
};

// Runs `kernel` once for each thread of each block, block after block. Empty, or what went wrong.
std::string run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

bool in_kernel();
Place place();

// For the running thread: waits for its block, or for its warp.
void sync_block();
void sync_warp();

// All lanes of the warp come here with a value each and leave with that of lane `source`. Orders no memory, as CUDA's
// shuffles do not.
uint64_t exchange(uint64_t value, int source);
// One bit per lane, set where `condition` is.
unsigned ballot(bool condition);

// Ends the launch, which then reports `message`.
[[noreturn]] void fail(const std::string& message);

}  // namespace emulation
