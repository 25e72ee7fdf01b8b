// Products of small matrices on tensor cores, by one warp, and the copies that feed them: mma.sync, ldmatrix and
// cp.async, which every GPU from sm_80 on has, so that one source serves all targets. (Hopper's wgmma and Blackwell's
// tcgen05 are faster still. They are left out until a GPU can test them: nothing here could show a wrong descriptor.)
//
// C[16, 8] += A[16, k] · B[k, 8] in float32. Lane l has group = l / 4 and member = l % 4; a fragment's 32-bit words are
//
//   A   a[0] (row group,     word member)        B   b[0] (word member,     column group)
//       a[1] (row group + 8, word member)            b[1] (word member + 4, column group)
//       a[2] (row group,     word member + 4)
//       a[3] (row group + 8, word member + 4)    C   c[0], c[1] (row group,     columns 2·member, 2·member + 1)
//                                                    c[2], c[3] (row group + 8, the same columns)
//
// where a word along k is one TF32 value (k = 8), or two values of 16 bits, the lower one first (k = 16). These are the
// tables "Matrix Fragments for mma.m16n8k8" (.tf32) and "… mma.m16n8k16 with floating point type" (.f16, .bf16) of the
// PTX ISA, chapter "Warp-level matrix instructions: mma"; CUTLASS's cute/atom/mma_traits_sm80.hpp says the same. In
// words, both types have one layout, and it is that of ldmatrix.
//
// TF32 has float32's exponent and 10 bits of mantissa; mma ignores the lower 13 bits of a word. Products are exact, but
// tensor cores truncate when they add (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// 2021). Long sums therefore belong outside, where additions round to nearest.
//
// Where no CUDA compiler reads this file, the stand-in for cuda_runtime.h brings its own `instruction`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tensor.h"

namespace ncpvae::cuda {

#if defined(__CUDACC__)
namespace instruction {

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// Four matrices of 8 rows of 16 bytes. Lanes 8i … 8i+7 name the rows of matrix i, 16-byte aligned, in shared memory;
// word i of a lane is word `member` of row `group` of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of matrices of 8×8 values of 16 bits, each transposed: the word is rows 2·member and 2·member + 1 of column
// `group`.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 4 or 16 bytes, aligned to as many, from global to shared memory; zeros where they do not exist.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  static_assert(bytes == 4 || bytes == 16);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 4 : 0)
                 : "memory");
  }
}
// This thread's copies have landed; a barrier must follow before another thread reads them.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The nearest TF32 value, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// a · b, never fused with an addition that follows.
__device__ __forceinline__ float multiply_and_round(float a, float b) { return __fmul_rn(a, b); }

// The shared memory that the launch asked for.
__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ uint4 ncpvae_dynamic_shared_memory[];
  return ncpvae_dynamic_shared_memory;
}

}  // namespace instruction
#endif

__device__ __forceinline__ float as_float(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}
__device__ __forceinline__ uint32_t as_word(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof(word));
  return word;
}

// `count` words of a matrix of T as mma takes them. A float32 value is the sum of two TF32 values up to 2^-22 of itself;
// for ±∞ and what rounds to it, the second is NaN.
template <typename T, int count>
struct Operand {
  uint32_t word[count];
  __device__ __forceinline__ void set(int i, uint32_t value) { word[i] = value; }
};
template <int count>
struct Operand<float, count> {
  uint32_t high[count], low[count];
  __device__ __forceinline__ void set(int i, uint32_t value) {
    high[i] = instruction::round_to_tf32(as_float(value));
    low[i] = instruction::round_to_tf32(as_float(value) - as_float(high[i]));
  }
};

// sum += a · b. For float32 it is hi·lo + lo·hi + hi·hi ("3xTF32"): what is left out is below 2^-22 of each product.
// `exchanged` adds the first two in the other order, so that A·B and the transposed Bᵀ·Aᵀ are the same to the last bit.
template <bool exchanged, typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Operand<T, 4>& a, const Operand<T, 2>& b) {
  if constexpr (std::is_same_v<T, float>) {
    instruction::mma_tf32(sum, exchanged ? a.high : a.low, exchanged ? b.low : b.high);
    instruction::mma_tf32(sum, exchanged ? a.low : a.high, exchanged ? b.high : b.low);
    instruction::mma_tf32(sum, a.high, b.high);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    instruction::mma_bf16(sum, a.word, b.word);
  } else {
    instruction::mma_f16(sum, a.word, b.word);
  }
}

}  // namespace ncpvae::cuda
