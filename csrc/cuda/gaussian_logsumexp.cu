// log Σ_k w_k N(z; mean_k, std_k²) on the GPU, the log-densities formed tile by tile and never stored.
//
// Forward: the operands are packed once into panels of 128 rows or components, dimension by dimension, with what of the
// log-density does not depend on z. A block owns a panel of rows and runs over panels of components, 8×8 pairs per
// thread, the next dimensions on their way into shared memory while these are worked on. A pair and dimension costs
// t = fma(z, 1/std, −mean/std) and t². Where z and the mean share digits that this would lose, because a component of
// the panel is far from zero in units of its std, t = (z − mean) · 1/std, which costs one more; each panel and
// dimension takes its own way.
// Backward: the log-densities are formed again and become responsibilities in shared memory; one kernel owns rows and
// runs over components for ∂z, one owns components and runs over rows for the rest. No atomics: sums have one order.
//
// The reference is in python/ncpvae/ops/reference.py.
#include <limits>

#include "gaussian_panels.h"

namespace ncpvae::cuda {
namespace {

// ---- forward -------------------------------------------------------------------------------------------------

// Joins this thread's pairs of one row, whose squares are `sum`, to the row's running sum. NaN is passed over by the
// maximum and stays in the sum.
template <typename T>
__device__ __forceinline__ void add_densities(RunningLogSumExp<T>& row, T (&sum)[kPatch<T>],
                                              const T (&offset)[kPatch<T>]) {
  T max = row.max;
#pragma unroll
  for (int j = 0; j < kPatch<T>; ++j) {
    sum[j] = fma(T(-0.5), sum[j], offset[j]);
    max = fmax(max, sum[j]);
  }
  const T origin = fabs(max) < INFINITY ? max : T(0);
  row.sum *= fast_exp(row.max - origin);
  row.max = max;
#pragma unroll
  for (int j = 0; j < kPatch<T>; ++j) row.sum += fast_exp(sum[j] - origin);
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    row_logsumexp(Packed<T> packed, Shares shares, Partial<T>* partials) {  // [N, splits]
  __shared__ Buffer<T> buffers[2];
  __shared__ Offsets<T> offsets[2];
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide, warp = threadIdx.x / kWarp;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row_panel = block / shares.splits, split = block % shares.splits;
    const int64_t first_panel = shares.first_tile(block), end_panel = shares.end_tile(block);
    // Starts the copies of a chunk of a panel, and says which of its dimensions are fused.
    const auto request = [&](int64_t panel, int64_t chunk, int buffer) {
      const int64_t dim = chunk * kChunk + warp;
      if (dim < packed.dims) {
        const int64_t component = (panel * packed.dims + dim) * kPanel<T>;
        copy_dimension(buffers[buffer].z[warp], packed.z + (row_panel * packed.dims + dim) * kPanel<T>);
        copy_dimension(buffers[buffer].location[warp], packed.location + component);
        copy_dimension(buffers[buffer].inverse_std[warp], packed.inverse_std + component);
      }
      if (chunk == 0 && warp == 0) copy_dimension(offsets[panel % 2].at, packed.offset + panel * kPanel<T>);
      return packed.fused[panel * packed.chunks + chunk];
    };

    RunningLogSumExp<T> rows[kPatch<T>];
    unsigned next_fused = request(first_panel, 0, 0);
    int buffer = 0;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      T sum[kPatch<T>][kPatch<T>] = {};
      for (int64_t chunk = 0; chunk < packed.chunks; ++chunk, buffer ^= 1) {
        const unsigned fused = next_fused;
        await_copies();
        __syncthreads();  // this chunk is there for all, and nobody reads the other buffer any more
        const bool last = chunk + 1 == packed.chunks;
        if (!last || panel + 1 < end_panel) {
          next_fused = request(last ? panel + 1 : panel, last ? 0 : chunk + 1, buffer ^ 1);
        }
        add_squares(sum, buffers[buffer], min_int(packed.dims - chunk * kChunk, kChunk), fused);
      }
      T offset[kPatch<T>];
      fetch_patch(offsets[panel % 2].at, tx, offset);
#pragma unroll
      for (int i = 0; i < kPatch<T>; ++i) add_densities(rows[i], sum[i], offset);
    }
    __syncthreads();  // the next share's copies may overwrite the buffers
#pragma unroll
    for (int i = 0; i < kPatch<T>; ++i) {
      if (std::isnan(rows[i].sum)) rows[i].max = NAN;
      merge_lanes(rows[i], 1, kSide / 2);
      const int64_t row = row_panel * kPanel<T> + place_of<T>(ty, i);
      if (tx == 0 && row < packed.rows) partials[row * shares.splits + split] = {rows[i].max, rows[i].sum};
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------

// What the sums take instead of z, mean and 1/std: finite, so that what meets a responsibility of zero adds zero. The
// values that are changed are those whose squares overflow.
template <typename T>
struct Bounded {
  Matrix<T> z, mean, inverse_variance;
};

template <typename T>
constexpr T kMost = std::numeric_limits<T>::max();

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident) bound(Matrix<T> from, T* to) {
  constexpr T most = kMost<T> / 2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t i = blockIdx.x * int64_t{kTileThreads} + threadIdx.x; i < from.rows * from.dims; i += stride) {
    const T value = from.data[i];
    to[i] = value > most ? most : value < -most ? -most : value;  // NaN stays
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident) invert_variance(Matrix<T> log_std, T* to) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t i = blockIdx.x * int64_t{kTileThreads} + threadIdx.x; i < log_std.rows * log_std.dims; i += stride) {
    const T inverse = exp(-log_std.data[i]), square = inverse * inverse;
    to[i] = square > kMost<T> ? kMost<T> : square;
  }
}

template <typename T>
struct Stages {
  Stage<T> z, mean, inverse_std;  // mean: or what Packed has in its place
};

// stage.at[d][r]: some dimensions of a tile of packed rows, which is one half of a panel.
template <typename T>
__device__ __forceinline__ void stage_packed(Stage<T>& stage, const T* packed, int64_t dims, int64_t row, int64_t dim) {
  static_assert(kPanel<T> == 2 * kTile<T>);
  const T* const from = packed + (row / kPanel<T> * dims + dim) * kPanel<T> + row % kPanel<T>;
  const int count = min_int(dims - dim, kDepth) * kTile<T>;
  for (int i = threadIdx.x; i < count; i += kTileThreads) {
    stage.at[i / kTile<T>][i % kTile<T>] = from[i / kTile<T> * kPanel<T> + i % kTile<T>];
  }
}

// grad_r · exp(log(w_c N(z_r; c)) − lse_r) for this thread's rows and components of the tile at (row, column); zero
// outside. The log-densities are the forward's to the last bit, or the responsibilities would not add up to one. A row
// without mass (lse = −inf) has no gradient.
template <typename T>
__device__ __forceinline__ void responsibilities(Patch<T>& out, Stages<T>& stages, const Packed<T>& packed,
                                                 int64_t components, const T* grad, const T* lse, int64_t row,
                                                 int64_t column) {
  static_assert(kDepth == 2 * kChunk);
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  clear<T>(out);
  for (int64_t dim = 0; dim < packed.dims; dim += kDepth) {
    __syncthreads();  // nobody reads the stages any more
    stage_packed(stages.z, packed.z, packed.dims, row, dim);
    stage_packed(stages.mean, packed.location, packed.dims, column, dim);
    stage_packed(stages.inverse_std, packed.inverse_std, packed.dims, column, dim);
    const unsigned* const bits = packed.fused + column / kPanel<T> * packed.chunks + dim / kChunk;
    const unsigned fused = bits[0] | (dim + kChunk < packed.dims ? bits[1] << kChunk : 0u);
    __syncthreads();
    const int depth = min_int(packed.dims - dim, kDepth);
#pragma unroll 1
    for (int d = 0; d < depth; ++d) {
      T value[kPer<T>], location[kPer<T>], inverse_std[kPer<T>];
      fetch(stages.z.at[d], ty * kPer<T>, value);
      fetch(stages.mean.at[d], tx * kPer<T>, location);
      fetch(stages.inverse_std.at[d], tx * kPer<T>, inverse_std);
      add_square(out, value, location, inverse_std, (fused >> d & 1) != 0);
    }
  }
  const int rows = min_int(packed.rows - row, kTile<T>), columns = min_int(components - column, kTile<T>);
  T offset[kPer<T>];
  fetch(packed.offset + column, tx * kPer<T>, offset);
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
    const int r = ty * kPer<T> + i;
    const T weight = r < rows ? grad[row + r] : T(0), log_sum = r < rows ? lse[row + r] : T(0);
    const T safe = log_sum == -INFINITY ? T(0) : log_sum;
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) {
      const bool exists = r < rows && tx * kPer<T> + j < columns;
      const T log_density = fma(T(-0.5), out[i][j], offset[j]);
      out[i][j] = exists ? weight * fast_exp(log_density - safe) : T(0);
    }
  }
}

// ∂z as parts [splits, N, D]: Σ_k ρ_nk (mean_kd − z_nd) / std²_kd.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    backward_rows(Packed<T> packed, Bounded<T> bounded, const T* grad, const T* lse, Shares shares, T* parts) {
  __shared__ Stages<T> stages;
  __shared__ Square<T> rho;  // [component][row]
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int64_t rows = bounded.z.rows, dims = bounded.z.dims, count = bounded.mean.rows;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row = block / shares.splits * kTile<T>, my_row = row + ty * kPer<T>;
    T* const part = parts + block % shares.splits * rows * dims;
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      const int64_t column = tile * kTile<T>;
      Patch<T> values;
      responsibilities(values, stages, packed, count, grad, lse, row, column);
      place<true>(rho, values);
      const int width = min_int(count - column, kTile<T>);
      for (int64_t dim = 0; dim < dims; dim += kTile<T>) {
        const int64_t my_dim = dim + tx * kPer<T>;
        Patch<T> value, sum = {};
        hold(value, bounded.z, my_row, my_dim);
        for (int first = 0; first < width; first += kDepth) {
          __syncthreads();
          stage_rows(stages.mean, bounded.mean, column + first, dim);
          stage_rows(stages.inverse_std, bounded.inverse_variance, column + first, dim);
          __syncthreads();
          const int depth = min_int(width - first, kDepth);
#pragma unroll 2
          for (int k = 0; k < depth; ++k) {
            T weight[kPer<T>], mean[kPer<T>], inverse_variance[kPer<T>];
            fetch(rho.at[first + k], ty * kPer<T>, weight);
            fetch(stages.mean.at[k], tx * kPer<T>, mean);
            fetch(stages.inverse_std.at[k], tx * kPer<T>, inverse_variance);
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
              for (int j = 0; j < kPer<T>; ++j) {
                sum[i][j] = fma(weight[i] * (mean[j] - value[i][j]), inverse_variance[j], sum[i][j]);
              }
            }
          }
        }
        accumulate(part, rows, dims, my_row, my_dim, sum, tile == shares.first_tile(block));
      }
    }
  }
}

// ∂mean and ∂log_std as parts [splits, K, D], ∂log_weight as parts [splits, K]: with u = z − mean, Σ_n ρ u / std²,
// Σ_n ρ u² / std² − Σ_n ρ, and Σ_n ρ.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    backward_components(Packed<T> packed, Bounded<T> bounded, const T* grad, const T* lse, Shares shares,
                        T* mean_parts, T* log_std_parts, T* log_weight_parts) {
  __shared__ Stages<T> stages;
  __shared__ Square<T> rho;  // [row][component]
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const int64_t rows = bounded.z.rows, dims = bounded.z.dims, count = bounded.mean.rows;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t column = block / shares.splits * kTile<T>, mine = column + ty * kPer<T>,
                  split = block % shares.splits;
    T* const mean_part = mean_parts + split * count * dims;
    T* const log_std_part = log_std_parts + split * count * dims;
    T weight_sum = 0;
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      const int64_t row = tile * kTile<T>;
      Patch<T> values;
      responsibilities(values, stages, packed, count, grad, lse, row, column);
      place<false>(rho, values);
      const int height = min_int(rows - row, kTile<T>);
      for (int64_t dim = 0; dim < dims; dim += kTile<T>) {
        const int64_t my_dim = dim + tx * kPer<T>;
        Patch<T> mean, inverse_variance, sum = {}, sum_sq = {};
        T mass[kPer<T>] = {};
        hold(mean, bounded.mean, mine, my_dim);
        for (int first = 0; first < height; first += kDepth) {
          __syncthreads();
          stage_rows(stages.z, bounded.z, row + first, dim);
          __syncthreads();
          const int depth = min_int(height - first, kDepth);
          for (int n = 0; n < depth; ++n) {
            T weight[kPer<T>], value[kPer<T>];
            fetch(rho.at[first + n], ty * kPer<T>, weight);
            fetch(stages.z.at[n], tx * kPer<T>, value);
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
              mass[i] += weight[i];
#pragma unroll
              for (int j = 0; j < kPer<T>; ++j) {
                const T u = value[j] - mean[i][j], pull = weight[i] * u;
                sum[i][j] += pull;
                sum_sq[i][j] = fma(pull, u, sum_sq[i][j]);
              }
            }
            if (dim == 0 && thread < kTile<T>) weight_sum += rho.at[first + n][thread];
          }
        }
        hold(inverse_variance, bounded.inverse_variance, mine, my_dim);
#pragma unroll
        for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
          for (int j = 0; j < kPer<T>; ++j) {
            sum[i][j] *= inverse_variance[i][j];
            sum_sq[i][j] = fma(sum_sq[i][j], inverse_variance[i][j], -mass[i]);
          }
        }
        const bool begin = tile == shares.first_tile(block);
        accumulate(mean_part, count, dims, mine, my_dim, sum, begin);
        accumulate(log_std_part, count, dims, mine, my_dim, sum_sq, begin);
      }
    }
    if (thread < kTile<T> && column + thread < count) log_weight_parts[split * count + column + thread] = weight_sum;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

// The arguments in the type that the op computes in; `log_weight` is empty where there is none.
struct Wide {
  Tensor z, mean, log_std;
  std::optional<Tensor> log_weight;
  ScalarType type;

  template <typename T>
  const T* weight() const {
    return log_weight.has_value() ? data<T>(*log_weight) : nullptr;
  }
};

Wide check_and_widen(const char* op, const Tensor& z, const Tensor& mean, const Tensor& log_std,
                     const std::optional<Tensor>& log_weight) {
  check_matrix(op, "z", z);
  check_matrix(op, "mean", mean, 1);
  check_shape(op, "mean", mean, {mean.size(0), z.size(1)});
  check_shape(op, "log_std", log_std, mean.sizes());
  check_dtype(op, "mean", mean, z.scalar_type());
  check_dtype(op, "log_std", log_std, z.scalar_type());
  Wide wide{widened(z), widened(mean), widened(log_std), std::nullopt, accumulation_type(z.scalar_type())};
  if (log_weight.has_value()) {
    check_shape(op, "log_weight", *log_weight, {mean.size(0)});
    check_dtype(op, "log_weight", *log_weight, z.scalar_type());
    wide.log_weight = widened(*log_weight);
  }
  return wide;
}

// What Packed points to.
struct PackedTensors {
  Tensor z, location, inverse_std, offset, fused;

  template <typename T>
  Packed<T> operands(int64_t rows) const {
    return {data<T>(z),           data<T>(location), data<T>(inverse_std), data<T>(offset),
            data<unsigned>(fused), rows,              z.size(1),            fused.size(1)};
  }
};

template <typename T>
PackedTensors pack(const Launcher& launcher, const Wide& wide) {
  const int64_t rows = wide.z.size(0), components = wide.mean.size(0), dims = wide.z.size(1);
  const int64_t row_panels = ceil_div(rows, kPanel<T>), panels = ceil_div(components, kPanel<T>);
  const auto packed = [&](int64_t count) { return new_tensor(wide.z, {count, dims, kPanel<T>}, wide.type); };
  const PackedTensors to{packed(row_panels), packed(panels), packed(panels),
                         new_tensor(wide.z, {panels, kPanel<T>}, wide.type),
                         new_tensor(wide.z, {panels, ceil_div(dims, kChunk)}, ScalarType::Int)};
  launcher.launch(pack_rows<T>, row_panels * ceil_div(dims, kWarp), kTileThreads, matrix<T>(wide.z),
                  mutable_data<T>(to.z));
  launcher.launch(pack_components<T>, rows == 0 ? 0 : panels, kTileThreads, matrix<T>(wide.mean),
                  data<T>(wide.log_std), wide.weight<T>(), mutable_data<T>(to.location),
                  mutable_data<T>(to.inverse_std), mutable_data<T>(to.offset), mutable_data<unsigned>(to.fused));
  return to;
}

Tensor gaussian_logsumexp(const Tensor& z, const Tensor& mean, const Tensor& log_std,
                          const std::optional<Tensor>& log_weight) {
  const char* op = "gaussian_logsumexp";
  const Launcher launcher(op, z);
  const Wide wide = check_and_widen(op, z, mean, log_std, log_weight);
  const Tensor lse = new_tensor(z, {z.size(0)}, wide.type);
  dispatch_wide(wide.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = z.size(0);
    const Shares shares = share_in_waves(rows, mean.size(0), kPanel<T>);
    const PackedTensors packed = pack<T>(launcher, wide);
    const Tensor partials = new_tensor(z, {rows, shares.splits, 2}, wide.type);
    launcher.launch(row_logsumexp<T>, shares.blocks(), kTileThreads, packed.operands<T>(rows), shares,
                    mutable_data<Partial<T>>(partials));
    launcher.launch(merge_partials<T>, ceil_div(rows, kTileWarps), kTileThreads, data<Partial<T>>(partials), rows,
                    shares.splits, mutable_data<T>(lse));
  });
  return lse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_logsumexp_backward(const Tensor& grad, const Tensor& z,
                                                                       const Tensor& mean, const Tensor& log_std,
                                                                       const std::optional<Tensor>& log_weight,
                                                                       const Tensor& lse) {
  const char* op = "gaussian_logsumexp_backward";
  const Launcher launcher(op, z);
  const Wide wide = check_and_widen(op, z, mean, log_std, log_weight);
  check_shape(op, "grad", grad, {z.size(0)});
  check_shape(op, "lse", lse, {z.size(0)});
  const ScalarType type = wide.type;
  const Tensor row_grad = as_contiguous(as_type(grad, type)), row_lse = as_contiguous(as_type(lse, type));
  const int64_t rows = z.size(0), count = mean.size(0), dims = z.size(1);
  const Tensor inverse_variance = new_tensor(z, {count, dims}, type);
  const Tensor finite_z = new_tensor(z, {rows, dims}, type), finite_mean = new_tensor(z, {count, dims}, type);
  const Tensor dz = new_tensor(z, {rows, dims}, type), dmean = new_tensor(z, {count, dims}, type);
  const Tensor dlog_std = new_tensor(z, {count, dims}, type), dlog_weight = new_tensor(z, {count}, type);
  dispatch_wide(type, [&](auto zero) {
    using T = decltype(zero);
    const PackedTensors packed = pack<T>(launcher, wide);
    const Packed<T> operands = packed.operands<T>(rows);
    launcher.launch(invert_variance<T>, ceil_div(count * dims, kTileThreads), kTileThreads, matrix<T>(wide.log_std),
                    mutable_data<T>(inverse_variance));
    launcher.launch(bound<T>, ceil_div(rows * dims, kTileThreads), kTileThreads, matrix<T>(wide.z),
                    mutable_data<T>(finite_z));
    launcher.launch(bound<T>, ceil_div(count * dims, kTileThreads), kTileThreads, matrix<T>(wide.mean),
                    mutable_data<T>(finite_mean));
    const Bounded<T> bounded{matrix<T>(finite_z), matrix<T>(finite_mean), matrix<T>(inverse_variance)};
    const auto add_up = [&](const Tensor& parts, const Tensor& sum) {
      launcher.launch(sum_splits<T>, ceil_div(sum.numel(), kTileThreads), kTileThreads, data<T>(parts), parts.size(0),
                      sum.numel(), mutable_data<T>(sum));
    };
    const Shares by_rows = share_in_waves(rows, count, kTile<T>), by_components = share_in_waves(count, rows, kTile<T>);
    const Tensor parts = new_tensor(z, {by_rows.splits, rows, dims}, type);
    launcher.launch(backward_rows<T>, by_rows.blocks(), kTileThreads, operands, bounded,
                    data<T>(row_grad), data<T>(row_lse), by_rows, mutable_data<T>(parts));
    add_up(parts, dz);
    const Tensor mean_parts = new_tensor(z, {by_components.splits, count, dims}, type);
    const Tensor log_std_parts = new_tensor(z, {by_components.splits, count, dims}, type);
    const Tensor log_weight_parts = new_tensor(z, {by_components.splits, count}, type);
    launcher.launch(backward_components<T>, by_components.blocks(), kTileThreads, operands, bounded, data<T>(row_grad),
                    data<T>(row_lse), by_components, mutable_data<T>(mean_parts), mutable_data<T>(log_std_parts),
                    mutable_data<T>(log_weight_parts));
    add_up(mean_parts, dmean);
    add_up(log_std_parts, dlog_std);
    add_up(log_weight_parts, dlog_weight);
  });
  const ScalarType own = z.scalar_type();
  return {as_type(dz, own), as_type(dmean, own), as_type(dlog_std, own),
          as_type(dlog_weight, log_weight.has_value() ? own : type)};
}

}  // namespace
}  // namespace ncpvae::cuda

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CUDA, m) {
  m.impl("gaussian_logsumexp", TORCH_BOX(&ncpvae::cuda::gaussian_logsumexp));
  m.impl("gaussian_logsumexp_backward", TORCH_BOX(&ncpvae::cuda::gaussian_logsumexp_backward));
}
