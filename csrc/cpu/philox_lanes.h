// Philox for many blocks side by side, in vector registers; the words are those of philox.h.
#pragma once

#include "philox.h"
#include "vector_math.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ncpvae {
namespace {

typedef Vector<uint64_t> Wide;  // 32-bit words in 64-bit lanes; what the upper halves hold does not matter
constexpr int64_t kWideLanes = VectorOf<uint64_t>::lanes;

// The products of the lower halves.
inline Wide multiply_words(Wide a, Wide b) {
#if defined(__AVX512F__)
  return bits_as<Wide>(_mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  return bits_as<Wide>(_mm256_mul_epu32(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#elif defined(__SSE2__)
  return bits_as<Wide>(_mm_mul_epu32(bits_as<__m128i>(a), bits_as<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

constexpr int64_t kChains = 2;  // registers that are worked on by turns, because a round has to wait for its products
constexpr int64_t kAbreast = kChains * kWideLanes;

// x[c][i], lane l = word i of `random_words` at position first + c · kWideLanes + l
inline void fill_words(Seed seed, uint64_t first, uint32_t sub, Wide (&x)[kChains][4]) {
  const auto key = static_cast<uint64_t>(seed.key), stream = static_cast<uint64_t>(seed.stream);
  Wide lane, zero = {};
  for (int64_t l = 0; l < kWideLanes; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int64_t c = 0; c < kChains; ++c) {
    const Wide index = lane + (first + static_cast<uint64_t>(c * kWideLanes));
    x[c][0] = index;
    x[c][1] = index >> 32;
    x[c][2] = zero + sub;
    x[c][3] = zero + stream;
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int64_t c = 0; c < kChains; ++c) {
      const Wide product0 = multiply_words(x[c][0], zero + kPhiloxMultiplier0);
      const Wide product1 = multiply_words(x[c][2], zero + kPhiloxMultiplier1);
      x[c][0] = (product1 >> 32) ^ x[c][1] ^ key0;
      x[c][1] = product1;
      x[c][2] = (product0 >> 32) ^ x[c][3] ^ key1;
      x[c][3] = product0;
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace
}  // namespace ncpvae
