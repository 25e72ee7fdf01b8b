// The arithmetic of tile-Gumbel resampling, for host and device. Contract: python/ncpvae/ops/sir_resample.py.
#pragma once

#include "philox.h"

namespace ncpvae::sir {

constexpr int64_t kTile = 1024;  // proposals per logical tile; decides which uniform goes where

// Summary of some of a row's weights: m = max w, Σ exp(w − m), Σ exp(2 (w − m)). NaN in `log_max` marks a row
// that held NaN or +inf, and stays.
struct Summary {
  double log_max;
  double total;
  double total_sq;
};

NCPVAE_HD Summary merge(const Summary& a, const Summary& b) {
  if (std::isnan(a.log_max) || std::isnan(b.log_max)) return {NAN, NAN, NAN};
  const double log_max = a.log_max > b.log_max ? a.log_max : b.log_max;
  const double origin = log_max == -INFINITY ? 0.0 : log_max;
  const double scale_a = a.log_max == origin ? 1.0 : exp(a.log_max - origin);
  const double scale_b = b.log_max == origin ? 1.0 : exp(b.log_max - origin);
  return {log_max, a.total * scale_a + b.total * scale_b,
          a.total_sq * scale_a * scale_a + b.total_sq * scale_b * scale_b};
}

// What one Philox block decides for (row, draw, tile): whether the tile wins, and where in it the draw falls.
struct Draw {
  double key;        // m + log Σe + Gumbel; −inf for a tile without mass
  double threshold;  // uniform in (0, Σe), for the inverse CDF inside the tile
};

NCPVAE_HD Draw draw(Seed seed, uint64_t row_draw, uint32_t tile, const Summary& tile_summary) {
  const Words words = random_words(seed, row_draw, tile);
  const double exponential = -log(uniform52(words.x[0], words.x[1]));  // its −log is a standard Gumbel
  return {tile_summary.log_max + log(tile_summary.total / exponential),
          uniform52(words.x[2], words.x[3]) * tile_summary.total};
}

// log of the mean of `count` weights, and (Σw)²/Σw²; −inf and 0 for a row without mass, NaN for a bad row.
NCPVAE_HD double log_mean_weight(const Summary& s, int64_t count) {
  return s.log_max == -INFINITY ? -INFINITY : s.log_max + log(s.total) - log(static_cast<double>(count));
}
NCPVAE_HD double effective_sample_size(const Summary& s) {
  return s.log_max == -INFINITY ? 0.0 : s.total * s.total / s.total_sq;
}

}  // namespace ncpvae::sir
