// The arithmetic of one Langevin step, for host and device. Contract: python/ncpvae/ops/langevin_step.py.
#pragma once

#include "philox.h"

namespace ncpvae::langevin {

// The four standard Normals of block `block` = element / 4, in T arithmetic.
template <typename T>
NCPVAE_HD void normals(Seed seed, uint64_t block, T noise[4]) {
  const Words words = random_words(seed, block, 0);
  normal_pair<T>(words.x[0], words.x[1], noise[0], noise[1]);
  normal_pair<T>(words.x[2], words.x[3], noise[2], noise[3]);
}

// z + ½λ·drift + √(λ·temperature)·ε
template <typename T>
NCPVAE_HD T step(T z, T drift, T half_step_size, T noise_scale, T noise) {
  return z + half_step_size * drift + noise_scale * noise;
}

// score + (mean − z)/std²: the gradient of a Normal base prior added to that of log r. By 1/std twice, and not by 1/std²,
// which overflows before it should.
template <typename T>
NCPVAE_HD T drift_with_base(T z, T score, T mean, T inverse_std) {
  return score + (mean - z) * inverse_std * inverse_std;
}

}  // namespace ncpvae::langevin
