// log Σ_k w_k N(z; mean_k, std_k²) on the GPU, the log-densities formed tile by tile and never stored.
//
// `prepare` takes the exponentials and logarithms of the components once: 1/std, and what of the log-density does not
// depend on z. A pair and dimension then costs a subtraction, a product and an FMA: t = (z − mean) · 1/std and t².
// (fma(z, 1/std, −mean/std) would save the subtraction and with it all digits that z and the mean share.) A block owns
// a tile of rows and runs over the components with a running (max, sum) per row in registers.
// Backward: the log-densities are formed again and become responsibilities in shared memory; one kernel owns rows and
// runs over components for ∂z, one owns components and runs over rows for the rest. No atomics: sums have one order.
//
// The reference is in python/ncpvae/ops/reference.py.
#include "tile.h"

namespace ncpvae::cuda {
namespace {

template <typename T>
struct Components {
  Matrix<T> mean, inverse_std;
  const T* offset;  // log w_k − Σ_d log std_kd − D/2 · log 2π
};

// 1/std and the offsets, by a warp per component; log_weight may be null.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    prepare(Matrix<T> log_std, const T* log_weight, T* inverse_std, T* offset) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileWarps;
  for (int64_t k = blockIdx.x * int64_t{kTileWarps} + threadIdx.x / kWarp; k < log_std.rows; k += stride) {
    double sum = 0;
    for (int64_t d = lane; d < log_std.dims; d += kWarp) {
      const T value = log_std.data[k * log_std.dims + d];
      inverse_std[k * log_std.dims + d] = exp(-value);
      sum += value;
    }
    sum = warp_sum(sum);
    constexpr double kHalfLogTwoPi = 0.91893853320467274178;
    const double weight = log_weight == nullptr ? 0.0 : static_cast<double>(log_weight[k]);
    if (lane == 0) offset[k] = static_cast<T>(weight - sum - kHalfLogTwoPi * static_cast<double>(log_std.dims));
  }
}

template <typename T>
struct Stages {
  Stage<T> z, mean, inverse_std;
};

// log(w_c N(z_r; c)) for this thread's rows and components of the tile at (row, column); −inf outside.
template <typename T>
__device__ __forceinline__ void log_joint(Patch<T>& out, Stages<T>& stages, const Matrix<T>& z,
                                          const Components<T>& components, int64_t row, int64_t column) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  clear<T>(out);
  for (int64_t dim = 0; dim < z.dims; dim += kDepth) {
    __syncthreads();  // nobody reads the stages any more
    stage_dims(stages.z, z, row, dim);
    stage_dims(stages.mean, components.mean, column, dim);
    stage_dims(stages.inverse_std, components.inverse_std, column, dim);
    __syncthreads();
    const int depth = min_int(z.dims - dim, kDepth);
#pragma unroll 4
    for (int d = 0; d < depth; ++d) {
      T value[kPer<T>], mean[kPer<T>], inverse_std[kPer<T>];
      fetch(stages.z.at[d], ty * kPer<T>, value);
      fetch(stages.mean.at[d], tx * kPer<T>, mean);
      fetch(stages.inverse_std.at[d], tx * kPer<T>, inverse_std);
#pragma unroll
      for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kPer<T>; ++j) {
          const T t = (value[i] - mean[j]) * inverse_std[j];
          out[i][j] = fma(t, t, out[i][j]);
        }
      }
    }
  }
  const int rows = min_int(z.rows - row, kTile<T>), columns = min_int(components.mean.rows - column, kTile<T>);
#pragma unroll
  for (int j = 0; j < kPer<T>; ++j) {
    const int c = tx * kPer<T> + j;
    const T offset = c < columns ? components.offset[column + c] : T(0);
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) {
      const bool exists = ty * kPer<T> + i < rows && c < columns;
      out[i][j] = exists ? offset - T(0.5) * out[i][j] : static_cast<T>(-INFINITY);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    row_logsumexp(Matrix<T> z, Components<T> components, Shares shares,
                  Partial<T>* partials) {  // [N, splits]
  __shared__ Stages<T> stages;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row = block / shares.splits * kTile<T>, split = block % shares.splits;
    RunningLogSumExp<T> state[kPer<T>];
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      Patch<T> values;
      log_joint(values, stages, z, components, row, tile * kTile<T>);
#pragma unroll
      for (int i = 0; i < kPer<T>; ++i) merge(state[i], summarise(values[i]));
    }
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) {
      merge_lanes(state[i], 1, kSide / 2);
      const int64_t r = row + ty * kPer<T> + i;
      if (tx == 0 && r < z.rows) partials[r * shares.splits + split] = {state[i].max, state[i].sum};
    }
  }
}

// log_joint, made grad_r · exp(log_joint − lse_r); zero outside. A row without mass (lse = −inf) has no gradient, and
// no t counts where this is zero.
template <typename T>
__device__ __forceinline__ void responsibilities(Patch<T>& out, Stages<T>& stages, const Matrix<T>& z,
                                                 const Components<T>& components, const T* grad, const T* lse,
                                                 int64_t row, int64_t column) {
  log_joint(out, stages, z, components, row, column);
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const int rows = min_int(z.rows - row, kTile<T>), columns = min_int(components.mean.rows - column, kTile<T>);
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
    const int r = ty * kPer<T> + i;
    const T weight = r < rows ? grad[row + r] : T(0), log_sum = r < rows ? lse[row + r] : T(0);
    const T safe = log_sum == -INFINITY ? T(0) : log_sum;
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) {
      const bool exists = r < rows && tx * kPer<T> + j < columns;
      out[i][j] = exists ? weight * exp(out[i][j] - safe) : T(0);
    }
  }
}

// ∂z as parts [splits, N, D]: −Σ_k ρ_nk t_nkd / std_kd.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    backward_rows(Matrix<T> z, Components<T> components, const T* grad, const T* lse, Shares shares, T* parts) {
  __shared__ Stages<T> stages;
  __shared__ Square<T> rho;  // [component][row]
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row = block / shares.splits * kTile<T>, my_row = row + ty * kPer<T>;
    T* const part = parts + block % shares.splits * z.rows * z.dims;
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      const int64_t column = tile * kTile<T>;
      Patch<T> values;
      responsibilities(values, stages, z, components, grad, lse, row, column);
      place<true>(rho, values);
      const int width = min_int(components.mean.rows - column, kTile<T>);
      for (int64_t dim = 0; dim < z.dims; dim += kTile<T>) {
        const int64_t my_dim = dim + tx * kPer<T>;
        Patch<T> value, sum = {};
        hold(value, z, my_row, my_dim);
        for (int first = 0; first < width; first += kDepth) {
          __syncthreads();
          stage_rows(stages.mean, components.mean, column + first, dim);
          stage_rows(stages.inverse_std, components.inverse_std, column + first, dim);
          __syncthreads();
          const int depth = min_int(width - first, kDepth);
#pragma unroll 1
          for (int k = 0; k < depth; ++k) {
            T weight[kPer<T>], mean[kPer<T>], inverse_std[kPer<T>];
            fetch(rho.at[first + k], ty * kPer<T>, weight);
            fetch(stages.mean.at[k], tx * kPer<T>, mean);
            fetch(stages.inverse_std.at[k], tx * kPer<T>, inverse_std);
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
              for (int j = 0; j < kPer<T>; ++j) {
                const T t = weight[i] == 0 ? T(0) : (value[i][j] - mean[j]) * inverse_std[j];  // t may be ∞
                sum[i][j] = fma(-weight[i] * t, inverse_std[j], sum[i][j]);
              }
            }
          }
        }
        accumulate(part, z.rows, z.dims, my_row, my_dim, sum, tile == shares.first_tile(block));
      }
    }
  }
}

// ∂mean and ∂log_std as parts [splits, K, D], ∂log_weight as parts [splits, K]: Σ_n ρ t / std, Σ_n ρ (t² − 1), Σ_n ρ.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    backward_components(Matrix<T> z, Components<T> components, const T* grad, const T* lse, Shares shares,
                        T* mean_parts, T* log_std_parts, T* log_weight_parts) {
  __shared__ Stages<T> stages;
  __shared__ Square<T> rho;  // [row][component]
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const int64_t count = components.mean.rows;
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t column = block / shares.splits * kTile<T>, mine = column + ty * kPer<T>,
                  split = block % shares.splits;
    T* const mean_part = mean_parts + split * count * z.dims;
    T* const log_std_part = log_std_parts + split * count * z.dims;
    T weight_sum = 0;
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      const int64_t row = tile * kTile<T>;
      Patch<T> values;
      responsibilities(values, stages, z, components, grad, lse, row, column);
      place<false>(rho, values);
      const int height = min_int(z.rows - row, kTile<T>);
      for (int64_t dim = 0; dim < z.dims; dim += kTile<T>) {
        const int64_t my_dim = dim + tx * kPer<T>;
        Patch<T> mean, inverse_std, sum = {}, sum_sq = {};
        hold(mean, components.mean, mine, my_dim);
        hold(inverse_std, components.inverse_std, mine, my_dim);
        for (int first = 0; first < height; first += kDepth) {
          __syncthreads();
          stage_rows(stages.z, z, row + first, dim);
          __syncthreads();
          const int depth = min_int(height - first, kDepth);
          for (int n = 0; n < depth; ++n) {
            T weight[kPer<T>], value[kPer<T>];
            fetch(rho.at[first + n], ty * kPer<T>, weight);
            fetch(stages.z.at[n], tx * kPer<T>, value);
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
              for (int j = 0; j < kPer<T>; ++j) {
                const T t = weight[i] == 0 ? T(0) : (value[j] - mean[i][j]) * inverse_std[i][j];
                sum[i][j] = fma(weight[i], t, sum[i][j]);
                sum_sq[i][j] = fma(weight[i], fma(t, t, T(-1)), sum_sq[i][j]);
              }
            }
            if (dim == 0 && thread < kTile<T>) weight_sum += rho.at[first + n][thread];
          }
        }
#pragma unroll
        for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
          for (int j = 0; j < kPer<T>; ++j) sum[i][j] *= inverse_std[i][j];
        }
        const bool begin = tile == shares.first_tile(block);
        accumulate(mean_part, count, z.dims, mine, my_dim, sum, begin);
        accumulate(log_std_part, count, z.dims, mine, my_dim, sum_sq, begin);
      }
    }
    if (thread < kTile<T> && column + thread < count) log_weight_parts[split * count + column + thread] = weight_sum;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

// The arguments as the kernels take them; the tensors own what `components` points to.
struct Prepared {
  Tensor z, mean, inverse_std, offset;
  ScalarType type;

  template <typename T>
  Components<T> components() const {
    return {matrix<T>(mean), matrix<T>(inverse_std), data<T>(offset)};
  }
};

Prepared check_and_prepare(const char* op, const Launcher& launcher, const Tensor& z, const Tensor& mean,
                           const Tensor& log_std, const std::optional<Tensor>& log_weight) {
  check_matrix(op, "z", z);
  check_matrix(op, "mean", mean, 1);
  check_shape(op, "mean", mean, {mean.size(0), z.size(1)});
  check_shape(op, "log_std", log_std, mean.sizes());
  check_dtype(op, "mean", mean, z.scalar_type());
  check_dtype(op, "log_std", log_std, z.scalar_type());
  if (log_weight.has_value()) {
    check_shape(op, "log_weight", *log_weight, {mean.size(0)});
    check_dtype(op, "log_weight", *log_weight, z.scalar_type());
  }
  const ScalarType type = accumulation_type(z.scalar_type());
  const Tensor wide_log_std = widened(log_std);
  const Tensor wide_weight = log_weight.has_value() ? widened(*log_weight) : wide_log_std;
  Prepared p{widened(z), widened(mean), new_tensor(mean, {mean.size(0), mean.size(1)}, type),
             new_tensor(mean, {mean.size(0)}, type), type};
  dispatch_wide(type, [&](auto zero) {
    using T = decltype(zero);
    launcher.launch(prepare<T>, ceil_div(mean.size(0), kTileWarps), kTileThreads, matrix<T>(wide_log_std),
                    log_weight.has_value() ? data<T>(wide_weight) : nullptr, mutable_data<T>(p.inverse_std),
                    mutable_data<T>(p.offset));
  });
  return p;
}

Tensor gaussian_logsumexp(const Tensor& z, const Tensor& mean, const Tensor& log_std,
                          const std::optional<Tensor>& log_weight) {
  const char* op = "gaussian_logsumexp";
  const Launcher launcher(op, z);
  const Prepared p = check_and_prepare(op, launcher, z, mean, log_std, log_weight);
  const Tensor lse = new_tensor(z, {z.size(0)}, p.type);
  dispatch_wide(p.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = z.size(0);
    const Shares shares = share(rows, mean.size(0), kTile<T>);
    const Tensor partials = new_tensor(z, {rows, shares.splits, 2}, p.type);
    launcher.launch(row_logsumexp<T>, shares.blocks(), kTileThreads, matrix<T>(p.z), p.components<T>(), shares,
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
  const Prepared p = check_and_prepare(op, launcher, z, mean, log_std, log_weight);
  check_shape(op, "grad", grad, {z.size(0)});
  check_shape(op, "lse", lse, {z.size(0)});
  const Tensor row_grad = as_contiguous(as_type(grad, p.type)), row_lse = as_contiguous(as_type(lse, p.type));
  const int64_t rows = z.size(0), count = mean.size(0), dims = z.size(1);
  const Tensor dz = new_tensor(z, {rows, dims}, p.type), dmean = new_tensor(z, {count, dims}, p.type);
  const Tensor dlog_std = new_tensor(z, {count, dims}, p.type), dlog_weight = new_tensor(z, {count}, p.type);
  dispatch_wide(p.type, [&](auto zero) {
    using T = decltype(zero);
    const Components<T> components = p.components<T>();
    const auto add_up = [&](const Tensor& parts, const Tensor& sum) {
      launcher.launch(sum_splits<T>, ceil_div(sum.numel(), kTileThreads), kTileThreads, data<T>(parts), parts.size(0),
                      sum.numel(), mutable_data<T>(sum));
    };
    const Shares by_rows = share(rows, count, kTile<T>), by_components = share(count, rows, kTile<T>);
    const Tensor parts = new_tensor(z, {by_rows.splits, rows, dims}, p.type);
    launcher.launch(backward_rows<T>, by_rows.blocks(), kTileThreads, matrix<T>(p.z), components, data<T>(row_grad),
                    data<T>(row_lse), by_rows, mutable_data<T>(parts));
    add_up(parts, dz);
    const Tensor mean_parts = new_tensor(z, {by_components.splits, count, dims}, p.type);
    const Tensor log_std_parts = new_tensor(z, {by_components.splits, count, dims}, p.type);
    const Tensor log_weight_parts = new_tensor(z, {by_components.splits, count}, p.type);
    launcher.launch(backward_components<T>, by_components.blocks(), kTileThreads, matrix<T>(p.z), components,
                    data<T>(row_grad), data<T>(row_lse), by_components, mutable_data<T>(mean_parts),
                    mutable_data<T>(log_std_parts), mutable_data<T>(log_weight_parts));
    add_up(mean_parts, dmean);
    add_up(log_std_parts, dlog_std);
    add_up(log_weight_parts, dlog_weight);
  });
  const ScalarType type = z.scalar_type();
  return {as_type(dz, type), as_type(dmean, type), as_type(dlog_std, type),
          as_type(dlog_weight, log_weight.has_value() ? type : p.type)};
}

}  // namespace
}  // namespace ncpvae::cuda

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CUDA, m) {
  m.impl("gaussian_logsumexp", TORCH_BOX(&ncpvae::cuda::gaussian_logsumexp));
  m.impl("gaussian_logsumexp_backward", TORCH_BOX(&ncpvae::cuda::gaussian_logsumexp_backward));
}
