// The pass of sir_resample over its weights: a warp reduces a tile of 1,024 to its maximum and sums.
#pragma once

#include "launch.h"
#include "sir_resample.h"

namespace ncpvae::cuda {

using sir::kTile;
using sir::Summary;

constexpr int kPerLane = kTile / kWarp;      // weights of a tile per lane
constexpr int kSection = 128;                // neighbouring weights whose sum is kept
constexpr int kSections = kTile / kSection;  // of a tile

// Weights that a lane reads at once. A warp's reads then lie side by side, and neighbouring fours of a lane's weights
// are of one section, for every T.
template <typename T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;

template <typename T>
struct Weights {
  const T* data;
  int64_t row_stride;  // columns lie side by side
  int64_t rows, columns, tiles;
  bool aligned;  // every tile starts where vectors may be read

  __device__ const T* tile(int64_t row, int64_t t) const { return data + row * row_stride + t * kTile; }
  __device__ int length(int64_t t) const {
    return static_cast<int>(columns - t * kTile < kTile ? columns - t * kTile : kTile);
  }
};

// tile[first …] to `out`, −inf past the tile's end.
template <typename T>
__device__ __forceinline__ void load(const T* tile, int first, int length, bool aligned, Accumulate<T>* out) {
  if (aligned && first + kVector<T> <= length) {
    const auto pack = *reinterpret_cast<const Pack<T, kVector<T>>*>(tile + first);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) out[i] = static_cast<Accumulate<T>>(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      out[i] = first + i < length ? static_cast<Accumulate<T>>(tile[first + i]) : -INFINITY;
    }
  }
}

// What is kept of a row's tiles, in shared or in global memory.
template <typename A>
struct Tiles {
  Summary* summary;
  double* rough_mass;  // max + log Σe to 1e-6, NaN for a bad tile
  A* section;          // [kSections] per tile: Σe of its sections

  __device__ Tiles from(int64_t tile) const { return {summary + tile, rough_mass + tile, section + tile * kSections}; }
};

// sums[i] added up over the warp, to lanes 4 i to 4 i + 3. Lanes exchange the halves they do not go on with, so that
// nine shuffles do for eight sums.
template <typename A>
__device__ __forceinline__ A sum_sections(A (&sums)[kSections]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = kSections / 2; half > 0; half /= 2) {
    const int mask = half * (kWarp / kSections);
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A mine = upper ? sums[i + half] : sums[i], given = upper ? sums[i] : sums[i + half];
      sums[i] = mine + shuffle_xor(given, mask);
    }
  }
  for (int mask = kWarp / kSections / 2; mask > 0; mask /= 2) sums[0] += shuffle_xor(sums[0], mask);
  return sums[0];
}

// Tile `t` of a row, by a warp.
template <typename T>
__device__ __forceinline__ void summarise(const Weights<T>& weights, int64_t row, int64_t t,
                                          const Tiles<Accumulate<T>>& to) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarp, length = weights.length(t);
  const T* const tile = weights.tile(row, t);
  A w[kPerLane];
  if (weights.aligned && length == kTile) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVector<T>) load(tile, i * kWarp + lane * kVector<T>, kTile, true, w + i);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; i += kVector<T>) {
      load(tile, i * kWarp + lane * kVector<T>, length, weights.aligned, w + i);
    }
  }

  A high = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) high = fmax(high, w[i]);  // passes over NaN, which the sum will show
  high = warp_max(high);
  const A origin = high == -INFINITY ? A(0) : high;
  A sums[kSections] = {}, squares[4] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const A e = fast_exp(w[i] - origin);  // NaN for +inf, which is its own origin
    sums[i / 4] += e;
    squares[i % 4] = fma(e, e, squares[i % 4]);
  }
  const A section = sum_sections(sums);
  double total = section;
  for (int mask = kWarp / 2; mask >= kWarp / kSections; mask /= 2) total += shuffle_xor(total, mask);
  const double total_sq = warp_sum(static_cast<double>(squares[0] + squares[1] + (squares[2] + squares[3])));

  if (lane % (kWarp / kSections) == 0) to.section[lane / (kWarp / kSections)] = section;
  if (lane == 0) {
    *to.summary = std::isnan(total) ? Summary{NAN, NAN, NAN} : Summary{static_cast<double>(high), total, total_sq};
    constexpr float kLogTwo = 0.693147181f;
    *to.rough_mass = static_cast<double>(high) + kLogTwo * fast_log2(static_cast<float>(total));
  }
}

}  // namespace ncpvae::cuda
