// Running logsumexp, for host and device: shared by similarity_logsumexp and gaussian_logsumexp.
#pragma once

#include "philox.h"

namespace ncpvae {

// max and Σ exp(v − max) of the values seen. Without finite values `value()` is −inf; NaN and +inf propagate as
// torch.logsumexp has them.
template <typename T>
struct RunningLogSumExp {
  T max = -INFINITY;
  T sum = 0;

  NCPVAE_HD void add(T v) { merge(v, T(1)); }

  NCPVAE_HD void merge(T other_max, T other_sum) {
    if (std::isnan(other_max) || other_max > max) {
      sum = max == -INFINITY ? other_sum : sum * exp(max - other_max) + other_sum;
      max = other_max;
    } else if (other_max > -INFINITY) {
      sum += other_max == max ? other_sum : other_sum * exp(other_max - max);
    }
  }

  NCPVAE_HD T value() const {
    if (max == INFINITY || max == -INFINITY) return max;
    return max + log(sum);
  }
};

}  // namespace ncpvae
