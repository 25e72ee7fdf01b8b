// CPU kernels of gaussian_logsumexp and its backward. Contract: python/ncpvae/ops/gaussian_logsumexp.py.
//
// Log-joints log w_k N(z_n; k) are formed in tiles that stay in the cache, always from t = (z − mean)/std itself. Work
// is cut by shape alone, and partial results are merged in order, so that the number of threads does not show.
#include <cmath>
#include <optional>
#include <tuple>

#include "tensor.h"
#include "panels.h"

namespace ncpvae {
namespace {

constexpr int64_t kColumnChunk = 16 * kColumnBlock;  // components that one task takes in the forward pass
constexpr int64_t kGradColumns = 32;                 // components that one task takes in the backward pass
constexpr int64_t kSumBlock = 8;                     // squares summed at a stretch: sums of sums round less
constexpr int64_t kPullBlock = 64;                   // terms of dz summed at a stretch, before float64
constexpr int64_t kRows = 4;                         // rows, or components, held in registers together

// The mixture, packed: panels for forming log-joints, and padded rows for gradients.
template <typename A>
struct Components {
  int64_t K, D, padded;  // padded: D rounded up
  std::unique_ptr<A[]> mean_panels, inverse_std_panels, mean_rows, inverse_std_rows, offset;

  template <typename T>
  Components(const T* mean, const T* log_std, const T* log_weight, int64_t components, int64_t depth)
      : K(components), D(depth), padded(round_up(depth, kPadding)) {
    const int64_t panels = round_up(K, kPadding);
    mean_panels = zeros<A>(panels * D);
    inverse_std_panels = zeros<A>(panels * D);
    mean_rows = zeros<A>(K * padded);
    inverse_std_rows = zeros<A>(K * padded);
    offset = zeros<A>(panels);
    for (int64_t k = 0; k < K; ++k) {
      double log_constant = 0.5 * D * std::log(2 * 3.14159265358979323846);
      for (int64_t d = 0; d < D; ++d) {
        const A value = static_cast<A>(log_std[k * D + d]);
        log_constant += value;
        mean_rows[k * padded + d] = static_cast<A>(mean[k * D + d]);
        inverse_std_rows[k * padded + d] = fast_exp(-value);
        const int64_t at = (k / kPadding * D + d) * kPadding + k % kPadding;
        mean_panels[at] = mean_rows[k * padded + d];
        inverse_std_panels[at] = inverse_std_rows[k * padded + d];
      }
      offset[k] = static_cast<A>((log_weight ? static_cast<double>(log_weight[k]) : 0.0) - log_constant);
    }
  }
};

// out[rows, lanes] = offset − ½ Σ_d ((z − mean)/std)²
template <int64_t rows, typename A>
inline void joint_block(const A* z, int64_t z_stride, const A* mean, const A* inverse_std, int64_t D, Vector<A> offset,
                        A* out, int64_t out_stride) {
  Vector<A> sum[rows] = {};
  for (int64_t start = 0; start < D; start += kSumBlock) {
    const int64_t end = start + kSumBlock < D ? start + kSumBlock : D;
    Vector<A> part[rows] = {};
    for (int64_t d = start; d < end; ++d) {
      const Vector<A> m = load(mean + d * kPadding), s = load(inverse_std + d * kPadding);
#pragma GCC unroll 8
      for (int64_t i = 0; i < rows; ++i) {
        const Vector<A> t = (z[i * z_stride + d] - m) * s;
        part[i] += t * t;
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) sum[i] += part[i];
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) store(out + i * out_stride, offset - A(0.5) * sum[i]);
}

// out[rows, columns] = log-joints of z's rows with the components [first, first + columns)
template <typename A>
void joint_tile(const A* z, const Components<A>& c, int64_t first, int64_t rows, int64_t columns, A* out,
                int64_t out_stride) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t column = 0; column < columns; column += lanes) {
    const int64_t k = first + column, at = k / kPadding * kPadding * c.D + k % kPadding;
    const A *mean = c.mean_panels.get() + at, *inverse_std = c.inverse_std_panels.get() + at;
    const Vector<A> offset = load(c.offset.get() + k);
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      joint_block<kRows>(z + i * c.padded, c.padded, mean, inverse_std, c.D, offset, out + i * out_stride + column,
                         out_stride);
    }
    for (; i < rows; ++i) {
      joint_block<1>(z + i * c.padded, c.padded, mean, inverse_std, c.D, offset, out + i * out_stride + column,
                     out_stride);
    }
  }
}

template <typename T, typename A = Accumulate<T>>
void forward(const T* z, const Components<A>& c, int64_t N, A* lse) {
  const int64_t blocks = (N + kRowBlock - 1) / kRowBlock, chunks = (c.K + kColumnChunk - 1) / kColumnChunk;
  const auto max = zeros<A>((chunks + 1) * N), sum = zeros<A>((chunks + 1) * N);
  for (int64_t i = 0; i < (chunks + 1) * N; ++i) max[i] = -INFINITY;

  torch::stable::parallel_for(0, blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    const auto block = zeros<A>(kRowBlock * c.padded);
    alignas(64) A joint[kRowBlock * kColumnBlock];
    A tile_max[kRowBlock], tile_sum[kRowBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, first = task % blocks * kRowBlock;
      const int64_t rows = N - first < kRowBlock ? N - first : kRowBlock;
      const int64_t last = (chunk + 1) * kColumnChunk < c.K ? (chunk + 1) * kColumnChunk : c.K;
      copy_rows(z, first, rows, c.D, block.get(), c.padded);
      for (int64_t k = chunk * kColumnChunk; k < last; k += kColumnBlock) {
        const int64_t columns = last - k < kColumnBlock ? last - k : kColumnBlock;
        joint_tile(block.get(), c, k, rows, columns, joint, kColumnBlock);
        for (int64_t i = 0; i < rows; ++i) {
          tile_max[i] = lane_max(joint + i * kColumnBlock, columns);
          tile_sum[i] = exponentiate(joint + i * kColumnBlock, columns, tile_max[i]);
        }
        merge_logsumexp(max.get() + chunk * N + first, sum.get() + chunk * N + first, tile_max, tile_sum, rows);
      }
    }
  });
  A *all_max = max.get() + chunks * N, *all_sum = sum.get() + chunks * N;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    merge_logsumexp(all_max, all_sum, max.get() + chunk * N, sum.get() + chunk * N, N);
  }
  for (int64_t i = 0; i < N; ++i) lse[i] = all_max[i] + std::log(all_sum[i]);
}

// Log-joints to responsibilities times the row's gradient; a row without mass has none. Where one is zero, t may be
// infinite, so the sums below leave it out rather than multiply by it.
template <typename A>
void responsibilities(A* joint, int64_t stride, int64_t rows, int64_t columns, const A* lse, const A* grad) {
  for (int64_t i = 0; i < rows; ++i) {
    const A origin = lse[i] == -static_cast<A>(INFINITY) ? A(0) : lse[i], factor = grad[i];
    A* row = joint + i * stride;
    for (int64_t j = 0; j < columns; ++j) row[j] = factor * fast_exp(row[j] - origin);
  }
}

// dz = −Σ_k ρ t/std
template <typename T, typename A = Accumulate<T>>
void backward_rows(const T* z, const Components<A>& c, int64_t N, const A* grad, const A* lse, T* dz) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  torch::stable::parallel_for(0, (N + kRowBlock - 1) / kRowBlock, 1, [&](int64_t begin, int64_t end) {
    const auto block = zeros<A>(kRowBlock * c.padded);
    const auto total = zeros<double>(kRowBlock * c.padded);
    alignas(64) A rho[kRowBlock * kColumnBlock] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kRowBlock, rows = N - first < kRowBlock ? N - first : kRowBlock;
      copy_rows(z, first, rows, c.D, block.get(), c.padded);
      for (int64_t i = 0; i < rows * c.padded; ++i) total[i] = 0;
      for (int64_t k = 0; k < c.K; k += kColumnBlock) {
        const int64_t columns = c.K - k < kColumnBlock ? c.K - k : kColumnBlock;
        joint_tile(block.get(), c, k, rows, columns, rho, kColumnBlock);
        responsibilities(rho, kColumnBlock, rows, columns, lse + first, grad + first);
        for (int64_t i = 0; i < rows; i += kRows) {  // rows past the end are computed too, and not read
          for (int64_t d = 0; d < c.D; d += lanes) {
            Vector<A> here[kRows];
            for (int64_t r = 0; r < kRows; ++r) here[r] = load(block.get() + (i + r) * c.padded + d);
            for (int64_t start = 0; start < columns; start += kPullBlock) {
              const int64_t end = start + kPullBlock < columns ? start + kPullBlock : columns;
              Vector<A> sum[kRows] = {};
              for (int64_t j = start; j < end; ++j) {
                const Vector<A> m = load(c.mean_rows.get() + (k + j) * c.padded + d);
                const Vector<A> s = load(c.inverse_std_rows.get() + (k + j) * c.padded + d);
#pragma GCC unroll 8
                for (int64_t r = 0; r < kRows; ++r) {
                  const A weight = rho[(i + r) * kColumnBlock + j];
                  if (weight != 0) sum[r] += weight * ((here[r] - m) * s) * s;
                }
              }
              for (int64_t r = 0; r < kRows; ++r) {
                for (int64_t l = 0; l < lanes; ++l) total[(i + r) * c.padded + d + l] += sum[r][l];
              }
            }
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < c.D; ++d) dz[(first + i) * c.D + d] = static_cast<T>(-total[i * c.padded + d]);
      }
    }
  });
}

// dmean = Σ_n ρ t/std, dlog_std = Σ_n ρ (t² − 1), dlog_weight = Σ_n ρ; the last may be null
template <typename T, typename W, typename A = Accumulate<T>>
void backward_components(const T* z, const Components<A>& c, int64_t N, const A* grad, const A* lse, T* dmean,
                         T* dlog_std, W* dlog_weight) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  torch::stable::parallel_for(0, (c.K + kGradColumns - 1) / kGradColumns, 1, [&](int64_t begin, int64_t end) {
    const auto block = zeros<A>(kRowBlock * c.padded);
    const auto first_moment = zeros<double>(kGradColumns * c.padded);
    const auto second_moment = zeros<double>(kGradColumns * c.padded);
    alignas(64) A rho[kRowBlock * kGradColumns];
    double mass[kGradColumns];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kGradColumns, columns = c.K - first < kGradColumns ? c.K - first : kGradColumns;
      for (int64_t i = 0; i < columns * c.padded; ++i) first_moment[i] = second_moment[i] = 0;
      for (int64_t k = 0; k < columns; ++k) mass[k] = 0;
      for (int64_t n = 0; n < N; n += kRowBlock) {
        const int64_t rows = N - n < kRowBlock ? N - n : kRowBlock;
        copy_rows(z, n, rows, c.D, block.get(), c.padded);
        joint_tile(block.get(), c, first, rows, columns, rho, kGradColumns);
        responsibilities(rho, kGradColumns, rows, columns, lse + n, grad + n);
        for (int64_t k = 0; k < columns; ++k) {
          for (int64_t i = 0; i < rows; ++i) mass[k] += rho[i * kGradColumns + k];
          for (int64_t d = 0; d < c.D; d += lanes) {
            const Vector<A> m = load(c.mean_rows.get() + (first + k) * c.padded + d);
            const Vector<A> s = load(c.inverse_std_rows.get() + (first + k) * c.padded + d);
            Vector<A> sum = {}, sum_sq = {};
            for (int64_t i = 0; i < rows; ++i) {
              const A weight = rho[i * kGradColumns + k];
              if (weight == 0) continue;
              const Vector<A> t = (load(block.get() + i * c.padded + d) - m) * s;
              const Vector<A> weighted = weight * t;
              sum += weighted;
              sum_sq += weighted * t;
            }
            for (int64_t l = 0; l < lanes; ++l) {
              first_moment[k * c.padded + d + l] += sum[l];
              second_moment[k * c.padded + d + l] += sum_sq[l];
            }
          }
        }
      }
      for (int64_t k = 0; k < columns; ++k) {
        for (int64_t d = 0; d < c.D; ++d) {
          const int64_t at = k * c.padded + d, to = (first + k) * c.D + d;
          dmean[to] = static_cast<T>(first_moment[at] * c.inverse_std_rows[first * c.padded + at]);
          dlog_std[to] = static_cast<T>(second_moment[at] - mass[k]);
        }
        dlog_weight[first + k] = static_cast<W>(mass[k]);
      }
    }
  });
}

void check(const char* op, const Tensor& z, const Tensor& mean, const Tensor& log_std,
           const std::optional<Tensor>& log_weight) {
  check_matrix(op, "z", z);
  check_matrix(op, "mean", mean, 1);
  check_dtype(op, "mean", mean, z.scalar_type());
  check_shape(op, "mean", mean, {mean.size(0), z.size(1)});
  check_dtype(op, "log_std", log_std, z.scalar_type());
  check_shape(op, "log_std", log_std, mean.sizes());
  if (!log_weight) return;
  check_dtype(op, "log_weight", *log_weight, z.scalar_type());
  check_shape(op, "log_weight", *log_weight, {mean.size(0)});
}

// The mixture from its tensors.
template <typename T>
Components<Accumulate<T>> components(const Tensor& mean, const Tensor& log_std,
                                     const std::optional<Tensor>& log_weight) {
  const Tensor dense_mean = as_contiguous(mean), dense_std = as_contiguous(log_std);
  const Tensor dense_weight = log_weight ? as_contiguous(*log_weight) : Tensor();
  const T* weight = log_weight ? data<T>(dense_weight) : nullptr;
  return {data<T>(dense_mean), data<T>(dense_std), weight, mean.size(0), mean.size(1)};
}

Tensor gaussian_logsumexp(Tensor z, Tensor mean, Tensor log_std, std::optional<Tensor> log_weight) {
  check("gaussian_logsumexp", z, mean, log_std, log_weight);
  const Tensor lse = new_tensor(z, {z.size(0)}, accumulation_type(z.scalar_type())), dense = as_contiguous(z);
  dispatch_floating("gaussian_logsumexp", "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    forward(data<T>(dense), components<T>(mean, log_std, log_weight), z.size(0), mutable_data<Accumulate<T>>(lse));
  });
  return lse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_logsumexp_backward(Tensor grad, Tensor z, Tensor mean,
                                                                       Tensor log_std, std::optional<Tensor> log_weight,
                                                                       Tensor lse) {
  const char* op = "gaussian_logsumexp_backward";
  check(op, z, mean, log_std, log_weight);
  const int64_t N = z.size(0), K = mean.size(0), D = z.size(1);
  const ScalarType type = z.scalar_type(), accumulation = accumulation_type(type);
  check_dtype(op, "grad", grad, accumulation);
  check_shape(op, "grad", grad, {N});
  check_dtype(op, "lse", lse, accumulation);
  check_shape(op, "lse", lse, {N});
  const Tensor dz = new_tensor(z, {N, D}, type), dmean = new_tensor(z, {K, D}, type);
  const Tensor dlog_std = new_tensor(z, {K, D}, type);
  const Tensor dlog_weight = new_tensor(z, {K}, log_weight ? type : accumulation);
  const Tensor dense_z = as_contiguous(z), dense_grad = as_contiguous(grad), dense_lse = as_contiguous(lse);
  dispatch_floating(op, "z", type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const T* points = data<T>(dense_z);
    const A *row_grad = data<A>(dense_grad), *row_lse = data<A>(dense_lse);
    const Components<A> c = components<T>(mean, log_std, log_weight);
    backward_rows(points, c, N, row_grad, row_lse, mutable_data<T>(dz));
    const auto into = [&](auto* weights) {
      backward_components(points, c, N, row_grad, row_lse, mutable_data<T>(dmean), mutable_data<T>(dlog_std), weights);
    };
    if (log_weight) {
      into(mutable_data<T>(dlog_weight));
    } else {
      into(mutable_data<A>(dlog_weight));
    }
  });
  return {dz, dmean, dlog_std, dlog_weight};
}

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CPU, m) {
  m.impl("gaussian_logsumexp", TORCH_BOX(&gaussian_logsumexp));
  m.impl("gaussian_logsumexp_backward", TORCH_BOX(&gaussian_logsumexp_backward));
}

}  // namespace
}  // namespace ncpvae
