// The operands of gaussian_logsumexp packed for its kernels: panels of 128 rows or components (64 in float64),
// dimension by dimension, with what of the log-density does not depend on z; and the squares added up from them.
#pragma once

#include "tile.h"

namespace ncpvae::cuda {

constexpr double kHalfLogTwoPi = 0.91893853320467274178;

// ---- packing -------------------------------------------------------------------------------------------------

template <typename T>
constexpr int kPatch = sizeof(T) == 8 ? 4 : 8;  // rows, and components, of a panel per thread
template <typename T>
constexpr int kPanel = kPatch<T> * kSide;
constexpr int kRowBytes = 512;  // of one dimension of a panel: a 16-byte copy for each lane of a warp
constexpr int kChunk = kTileWarps;  // dimensions in shared memory at once: a row for each warp
static_assert(kPanel<float> * sizeof(float) == kRowBytes && kPanel<double> * sizeof(double) == kRowBytes);

// mean/std up to which a dimension may go without the subtraction: t is then off by 64 · 2⁻²⁴ at most, and the result
// by no more than eager torch's (against float64 at σ = 1 and 0.1, D = 32; without a bound it is three times as much at
// σ = 0.01).
constexpr int kReach = 64;

// Matrices as [panels, D, kPanel], zero or harmless past their last row.
template <typename T>
struct Packed {
  const T *z, *location, *inverse_std;  // location: the mean, or −mean/std where the dimension is fused
  const T* offset;                      // [panels · kPanel]: what does not depend on z; −∞ past the last component
  const unsigned* fused;                // [panels, chunks]: one bit per dimension
  int64_t rows, dims, chunks;
};

// 32 dimensions of a panel, to be read the other way.
template <typename T>
struct Corner {
  T at[kWarp][kPanel<T> + 1];
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident) pack_rows(Matrix<T> from, T* to) {
  __shared__ Corner<T> corner;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t groups = (from.dims + kWarp - 1) / kWarp, panels = (from.rows + kPanel<T> - 1) / kPanel<T>;
  for (int64_t job = blockIdx.x; job < panels * groups; job += gridDim.x) {
    const int64_t panel = job / groups, first = job % groups * kWarp;
    for (int r = warp; r < kPanel<T>; r += kTileWarps) {
      const int64_t row = panel * kPanel<T> + r;
      const bool exists = row < from.rows && first + lane < from.dims;
      corner.at[lane][r] = exists ? from.data[row * from.dims + first + lane] : T(0);
    }
    __syncthreads();
    const int dims = min_int(from.dims - first, kWarp);
    for (int i = thread; i < dims * kPanel<T>; i += kTileThreads) {
      to[(panel * from.dims + first) * kPanel<T> + i] = corner.at[i / kPanel<T>][i % kPanel<T>];
    }
    __syncthreads();
  }
}

// The components' side of Packed, by a block per panel; log_weight may be null.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    pack_components(Matrix<T> mean, const T* log_std, const T* log_weight, T* location, T* inverse_std, T* offset,
                    unsigned* fused) {
  __shared__ Corner<T> means, inverses;
  __shared__ bool dimension_fused[kWarp];
  constexpr int kOwn = kPanel<T> / kTileWarps;  // components of a warp
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t dims = mean.dims, chunks = (dims + kChunk - 1) / kChunk;
  for (int64_t panel = blockIdx.x; panel * kPanel<T> < mean.rows; panel += gridDim.x) {
    double log_std_sum[kOwn] = {};
    for (int64_t first = 0; first < dims; first += kWarp) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int r = i * kTileWarps + warp;
        const int64_t k = panel * kPanel<T> + r;
        const bool exists = k < mean.rows && first + lane < dims;
        const T value = exists ? log_std[k * dims + first + lane] : T(0);
        log_std_sum[i] += value;
        means.at[lane][r] = exists ? mean.data[k * dims + first + lane] : T(0);
        inverses.at[lane][r] = exp(-value);
      }
      __syncthreads();
      for (int d = warp; first + d < dims && d < kWarp; d += kTileWarps) {
        bool within = true;  // of all components: NaN is not
        for (int r = lane; r < kPanel<T>; r += kWarp) {
          within = within && fabs(means.at[d][r] * inverses.at[d][r]) <= kReach;
        }
        within = ballot(within) == kFullWarp;
        for (int r = lane; r < kPanel<T>; r += kWarp) {
          const T own_mean = means.at[d][r], inverse = inverses.at[d][r];
          const int64_t at = (panel * dims + first + d) * kPanel<T> + r;
          location[at] = within ? -own_mean * inverse : own_mean;
          inverse_std[at] = inverse;
        }
        if (lane == 0) dimension_fused[d] = within;
      }
      __syncthreads();
      if (thread < kWarp / kChunk && first / kChunk + thread < chunks) {
        unsigned bits = 0;
        for (int d = 0; d < kChunk && first + thread * kChunk + d < dims; ++d) {
          bits |= static_cast<unsigned>(dimension_fused[thread * kChunk + d]) << d;
        }
        fused[panel * chunks + first / kChunk + thread] = bits;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t k = panel * kPanel<T> + i * kTileWarps + warp;
      const double sum = warp_sum(log_std_sum[i]);
      if (lane != 0) continue;
      const double weight = log_weight == nullptr || k >= mean.rows ? 0.0 : static_cast<double>(log_weight[k]);
      const double log_density = weight - sum - kHalfLogTwoPi * static_cast<double>(dims);
      offset[k] = static_cast<T>(k < mean.rows ? log_density : -INFINITY);
    }
  }
}

// ---- panels in shared memory ---------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Buffer {
  T z[kChunk][kPanel<T>], location[kChunk][kPanel<T>], inverse_std[kChunk][kPanel<T>];
};

template <typename T>
struct alignas(16) Offsets {
  T at[kPanel<T>];
};

// This thread's of a panel's row in shared memory: two 16-byte reads half a panel apart, so that a warp's lie side by
// side. Entry i is number place<T>(own, i) of the panel.
template <typename T>
__device__ __forceinline__ int place_of(int own, int i) {
  constexpr int kHalf = kPatch<T> / 2;
  return i / kHalf * (kPanel<T> / 2) + own * kHalf + i % kHalf;
}

template <typename T>
__device__ __forceinline__ void fetch_patch(const T* row, int own, T (&out)[kPatch<T>]) {
  constexpr int kHalf = kPatch<T> / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto pack = *reinterpret_cast<const Pack<T, kHalf>*>(row + place_of<T>(own, half * kHalf));
#pragma unroll
    for (int i = 0; i < kHalf; ++i) out[half * kHalf + i] = pack.value[i];
  }
}

template <typename T>
__device__ __forceinline__ void copy_dimension(T* to, const T* from) {
  const int part = threadIdx.x % kWarp * (16 / static_cast<int>(sizeof(T)));
  copy_async(to + part, from + part);
}

// sum[i][j] += t² of one dimension.
template <typename T, int count>
__device__ __forceinline__ void add_square(T (&sum)[count][count], const T (&z)[count], const T (&location)[count],
                                           const T (&inverse_std)[count], bool fused) {
  if (fused) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const T t = fma(z[i], inverse_std[j], location[j]);
        sum[i][j] = fma(t, t, sum[i][j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const T t = (z[i] - location[j]) * inverse_std[j];
        sum[i][j] = fma(t, t, sum[i][j]);
      }
    }
  }
}

// sum[i][j] += Σ t² over the dimensions of a chunk.
template <typename T>
__device__ __forceinline__ void add_squares(T (&sum)[kPatch<T>][kPatch<T>], const Buffer<T>& buffer, int depth,
                                            unsigned fused) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll 1
  for (int d = 0; d < depth; ++d) {
    T z[kPatch<T>], location[kPatch<T>], inverse_std[kPatch<T>];
    fetch_patch(buffer.z[d], ty, z);
    fetch_patch(buffer.location[d], tx, location);
    fetch_patch(buffer.inverse_std[d], tx, inverse_std);
    add_square(sum, z, location, inverse_std, (fused >> d & 1) != 0);
  }
}

}  // namespace ncpvae::cuda
