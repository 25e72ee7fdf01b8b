// Stand-in for the instructions that csrc/cuda/mma.h names, by lane exchanges; cuda_runtime.h beside it includes this.
//
// It is as coarse as the hardware, or coarser. mma reads only the TF32 bits of a word; products are exact; all that is
// added at once is cut off 24 bits below the greatest exponent and the sum is truncated to float32, as Fasi, Higham,
// Mikaitis and Pranesh measured it on the A100 ("Numerical behavior of NVIDIA tensor cores", 2021). Asynchronous copies
// land only when the thread waits for them, so that a kernel which forgets to wait reads what was there before.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ncpvae::cuda::instruction {

// The mailboxes below are the machine's own registers and not memory of the kernel's: a race detector passes over them.
#define NCPVAE_MACHINE __attribute__((no_sanitize("thread")))

struct Mailbox {
  uint32_t a[4], b[2];
  const void* row;
};
inline Mailbox mailboxes[2][1024];  // twice, because a lane may be one instruction ahead of its warp
inline bool side[1024];

// All lanes of the warp leave theirs and come back when all have.
NCPVAE_MACHINE inline const Mailbox* exchange(const Mailbox& mine) {
  const unsigned me = threadIdx.x;
  const bool now = side[me];
  side[me] = !now;
  mailboxes[now][me] = mine;
  __shfl_sync(0xffffffffu, 0, 0);
  return mailboxes[now] + me / 32 * 32;
}

inline float word_as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// c + Σ a_k b_k as a tensor core adds.
inline float truncated_sum(float c, const double* products, int count) {
  double plain = c;
  double greatest = std::fabs(c);
  for (int k = 0; k < count; ++k) {
    plain += products[k];
    greatest = std::fabs(products[k]) > greatest ? std::fabs(products[k]) : greatest;
  }
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  if (greatest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(greatest) - 24);
  double sum = std::trunc(c / unit) * unit;
  for (int k = 0; k < count; ++k) sum += std::trunc(products[k] / unit) * unit;
  const float nearest = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(nearest)) <= std::fabs(sum)) return nearest;
  return std::isinf(nearest) ? nearest : std::nextafter(nearest, 0.0f);
}

// `value_of(word, which)`: the values in a word, `per_word` of them.
template <int per_word, typename F>
NCPVAE_MACHINE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F value_of) {
  Mailbox mine{};
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const unsigned lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const Mailbox* const warp = exchange(mine);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, column = 2 * member + i % 2;
    double products[8 * per_word];
    for (unsigned word = 0; word < 8; ++word) {
      const uint32_t left = warp[group * 4 + word % 4].a[row_half + word / 4 * 2];
      const uint32_t right = warp[column * 4 + word % 4].b[word / 4];
      for (int which = 0; which < per_word; ++which) {
        products[word * per_word + which] = value_of(left, which) * value_of(right, which);
      }
    }
    c[i] = truncated_sum(c[i], products, 8 * per_word);
  }
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<1>(c, a, b, [](uint32_t word, int) -> double { return word_as_float(word & 0xffffe000u); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, [](uint32_t word, int which) -> double {
    return word_as_float(which == 0 ? word << 16 : word & 0xffff0000u);
  });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, [](uint32_t word, int which) -> double {
    return torch::headeronly::Half(static_cast<uint16_t>(word >> 16 * which), torch::headeronly::Half::from_bits());
  });
}

inline const Mailbox* exchange_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix from an unaligned row");
  Mailbox mine{};
  mine.row = row;
  return exchange(mine);
}
NCPVAE_MACHINE inline const void* row_of(const Mailbox* warp, unsigned lane) { return warp[lane].row; }

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const unsigned lane = threadIdx.x % 32;
  const Mailbox* const warp = exchange_rows(row);
  for (unsigned i = 0; i < 4; ++i) {
    words[i] = static_cast<const uint32_t*>(row_of(warp, 8 * i + lane / 4))[lane % 4];
  }
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  const unsigned lane = threadIdx.x % 32;
  const Mailbox* const warp = exchange_rows(row);
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low = static_cast<const uint16_t*>(row_of(warp, 8 * i + lane % 4 * 2))[lane / 4];
    const uint32_t high = static_cast<const uint16_t*>(row_of(warp, 8 * i + lane % 4 * 2 + 1))[lane / 4];
    words[i] = low | high << 16;
  }
}

struct Copy {
  uint32_t* to;
  const uint32_t* from;
  int words;
};
constexpr int kMostCopies = 256;  // that a thread may have under way: no heap, whose blocks would pass between threads
inline Copy copies[1024][kMostCopies];
inline int copies_under_way[1024];

template <int bytes>
NCPVAE_MACHINE void copy_async(void* to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    emulation::fail("cp.async from or to an unaligned address");
  }
  int& count = copies_under_way[threadIdx.x];
  if (count == kMostCopies) emulation::fail("more copies under way than the stand-in has room for");
  copies[threadIdx.x][count++] = {static_cast<uint32_t*>(to), exists ? static_cast<const uint32_t*>(from) : nullptr,
                                  bytes / 4};
}
NCPVAE_MACHINE inline int number_of_copies() { return copies_under_way[threadIdx.x]; }
NCPVAE_MACHINE inline Copy copy_number(int number) { return copies[threadIdx.x][number]; }
NCPVAE_MACHINE inline void forget_copies() { copies_under_way[threadIdx.x] = 0; }

inline void wait_for_copies() {
  for (int c = 0; c < number_of_copies(); ++c) {
    const Copy copy = copy_number(c);
    for (int i = 0; i < copy.words; ++i) copy.to[i] = copy.from == nullptr ? 0 : copy.from[i];
  }
  forget_copies();
}

inline uint32_t round_to_tf32(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  if (std::isnan(value)) return 0x7fffffffu;
  return std::isinf(value) ? word : (word + 0x1000u) & 0xffffe000u;  // a carry reaches the exponent, and ∞ at last
}
inline uint32_t pack_bf16(float low, float high) {
  const torch::headeronly::BFloat16 first(low), second(high);
  return first.x | static_cast<uint32_t>(second.x) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  const torch::headeronly::Half first(low), second(high);
  return first.x | static_cast<uint32_t>(second.x) << 16;
}
inline float multiply_and_round(float a, float b) { return a * b; }

inline void* dynamic_shared_memory() {
  alignas(16) static unsigned char memory[227 * 1024];
  return memory;
}

}  // namespace ncpvae::cuda::instruction

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
