// Philox4x32-10 and the maps from its words to variates, for host and device. No torch header.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The plain-torch twin is
// `random_words`, `uniform52`, `gumbel` and `normal_pair` in python/ncpvae/ops/reference.py; the words agree
// bit for bit, the variates to rounding.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define NCPVAE_HD __host__ __device__ __forceinline__
#else
#define NCPVAE_HD inline
#endif

namespace ncpvae {

struct Words {
  uint32_t x[4];
};

NCPVAE_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

NCPVAE_HD Words philox4x32(Words c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(kPhiloxMultiplier0, c.x[0]), low0 = kPhiloxMultiplier0 * c.x[0];
    const uint32_t high1 = multiply_high(kPhiloxMultiplier1, c.x[2]), low1 = kPhiloxMultiplier1 * c.x[2];
    c = Words{{high1 ^ c.x[1] ^ key0, low1, high0 ^ c.x[3] ^ key1, low0}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

// seed = (key, stream), as drawn by ops.draw_seed; only the stream's low 32 bits count.
struct Seed {
  int64_t key;
  int64_t stream;
};

// The four words at 64-bit position `index` and 32-bit position `sub`.
NCPVAE_HD Words random_words(Seed seed, uint64_t index, uint32_t sub) {
  const uint64_t key = static_cast<uint64_t>(seed.key);
  const Words counter{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), sub,
                       static_cast<uint32_t>(static_cast<uint64_t>(seed.stream))}};
  return philox4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// Uniform strictly inside (0, 1): the midpoints of 2^52 equal cells.
NCPVAE_HD double uniform52(uint32_t high, uint32_t low) {
  const uint64_t cell = (static_cast<uint64_t>(high) << 20) | (low >> 12);
  return (static_cast<double>(cell) + 0.5) * 0x1p-52;
}

// Standard Gumbel by inversion.
NCPVAE_HD double gumbel(double uniform) { return -log(-log(uniform)); }

// Box-Muller in T arithmetic: two words to two independent standard Normals.
template <typename T>
NCPVAE_HD void normal_pair(uint32_t first, uint32_t second, T& a, T& b);

template <>
NCPVAE_HD void normal_pair<float>(uint32_t first, uint32_t second, float& a, float& b) {
  const float u = static_cast<float>(first) * 0x1p-32f + 0x1p-33f;
#if defined(__CUDA_ARCH__)
  // The GPU's own root, sine and cosine (the last two as in cuRAND): relative error 2^-23, and 2^-21 of the radius for
  // an angle in [−π, π).
  float radius;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(-2.0f * logf(u)));
  __sincosf(static_cast<float>(static_cast<int32_t>(second)) * static_cast<float>(6.283185307179586 * 0x1p-32), &b, &a);
  a *= radius;
  b *= radius;
#else
  const float radius = sqrtf(-2.0f * logf(u));
  const float angle = static_cast<float>(second) * static_cast<float>(6.283185307179586 * 0x1p-32);
  a = radius * cosf(angle);
  b = radius * sinf(angle);
#endif
}

template <>
NCPVAE_HD void normal_pair<double>(uint32_t first, uint32_t second, double& a, double& b) {
  const double u = static_cast<double>(first) * 0x1p-32 + 0x1p-33;
  const double radius = sqrt(-2.0 * log(u));
#if defined(__CUDA_ARCH__)
  sincospi(static_cast<double>(second) * 0x1p-31, &b, &a);
  a *= radius;
  b *= radius;
#else
  const double angle = static_cast<double>(second) * (6.283185307179586 * 0x1p-32);
  a = radius * cos(angle);
  b = radius * sin(angle);
#endif
}

}  // namespace ncpvae
