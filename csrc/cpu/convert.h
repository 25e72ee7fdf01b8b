// float16 and bfloat16 to float32 and back, a vector at a time where the processor has instructions for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tensor.h"
#include "vector_math.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ncpvae {
namespace {

constexpr int64_t kHalves = VectorOf<float>::lanes;  // 16-bit numbers that a vector of floats is made from
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

inline HalfBits load_bits(const void* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

#if defined(__F16C__)
#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // the unmasked intrinsics make GCC warn of values that are not set
#endif
inline Vector<float> widen_half(HalfBits bits) {
#if defined(__AVX512F__)
  return bits_as<Vector<float>>(_mm512_maskz_cvtph_ps(kAllLanes, bits_as<__m256i>(bits)));
#else
  return bits_as<Vector<float>>(_mm256_cvtph_ps(bits_as<__m128i>(bits)));
#endif
}
inline HalfBits narrow_half(Vector<float> value) {
#if defined(__AVX512F__)
  return bits_as<HalfBits>(_mm512_maskz_cvtps_ph(kAllLanes, bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  return bits_as<HalfBits>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

// to[i] = from[i], i < count
template <typename T, typename A>
inline void widen(const T* from, int64_t count, A* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + kHalves <= count; i += kHalves) store(to + i, widen_half(load_bits(from + i)));
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of the float32
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    for (; i < count; ++i) to[i] = bits_as<float>(static_cast<uint32_t>(bits[i]) << 16);
  }
  for (; i < count; ++i) to[i] = static_cast<A>(from[i]);
}

// `from` as numbers of type A: itself, or converted into `space`.
template <typename T, typename A>
inline const A* widened(const T* from, int64_t count, A* space) {
  if constexpr (std::is_same_v<T, A>) {
    return from;
  } else {
    widen(from, count, space);
    return space;
  }
}

// The largest absolute value, 0 of none; NaN where one of them is.
template <typename T, typename A = Accumulate<T>>
inline A largest_magnitude(const T* values, int64_t size) {
  using Bits = std::conditional_t<sizeof(A) == sizeof(uint32_t), uint32_t, uint64_t>;
  constexpr int64_t stretch = 1024;
  Bits largest = 0;  // as integers, these are in the order of the numbers, and NaN comes last
  for (int64_t start = 0; start < size; start += stretch) {
    const int64_t count = size - start < stretch ? size - start : stretch;
    A space[stretch];
    const A* here = widened(values + start, count, space);
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = bits_as<Bits>(here[i]) & (~Bits{0} >> 1);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return bits_as<A>(largest);
}

// to[i] = from[i] rounded to the nearest, ties to even
template <typename T, typename A>
inline void narrow(const A* from, int64_t count, T* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + kHalves <= count; i += kHalves) {
      const HalfBits bits = narrow_half(load(from + i));
      std::memcpy(to + i, &bits, sizeof bits);
    }
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16>) {
    auto* bits = reinterpret_cast<uint16_t*>(to);
    for (; i < count; ++i) {
      const uint32_t word = bits_as<uint32_t>(from[i]);
      const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
      bits[i] = static_cast<uint16_t>(from[i] != from[i] ? 0x7fc0u : rounded);
    }
  }
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace
}  // namespace ncpvae
