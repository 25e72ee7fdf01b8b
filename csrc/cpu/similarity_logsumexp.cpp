// CPU kernels of similarity_logsumexp and its backward. Contract: python/ncpvae/ops/similarity_logsumexp.py.
//
// Scores are formed in tiles of kRowBlock × kColumnBlock that stay in the cache. Work is cut by shape alone, and
// partial results are merged in order, so that the number of threads does not show in the result.
#include <tuple>

#include "tensor.h"
#include "panels.h"

namespace ncpvae {
namespace {

constexpr int64_t kRowGroups = 64;  // at most this many partial results per column
// Within this range below the tile's maximum, exp(score − maximum) is accurate enough to serve rows and columns alike.
constexpr double kSharedRange = 32;

// dot[rows, columns] = the inner products of z's rows with the columns [first, first + columns) of x's panels
template <typename A>
void dot_tile(const A* z, const A* x_panels, int64_t depth, int64_t first, int64_t rows, int64_t columns, A* dot) {
  for (int64_t column = 0; column < columns; column += kPadding) {
    product_panel<false>(z, depth, x_panels + (first + column) * depth, kPadding, depth, dot + column, kColumnBlock,
                         rows);
  }
}

// Row and column (max, Σ exp(score − max)) of a tile; the scores are overwritten.
template <typename A>
void reduce_tile(A* score, int64_t rows, int64_t columns, A* row_max, A* row_sum, A* column_max, A* column_sum) {
  for (int64_t j = 0; j < columns; ++j) column_max[j] = -INFINITY, column_sum[j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = score + i * kColumnBlock;
    row_max[i] = lane_max(row, columns);
    for (int64_t j = 0; j < columns; ++j) column_max[j] = row[j] > column_max[j] ? row[j] : column_max[j];
  }
  const A max = lane_max(row_max, rows);
  A least = max;
  for (int64_t i = 0; i < rows; ++i) least = row_max[i] < least ? row_max[i] : least;
  for (int64_t j = 0; j < columns; ++j) least = column_max[j] < least ? column_max[j] : least;
  if (max < INFINITY && max - least <= static_cast<A>(kSharedRange)) {
    for (int64_t i = 0; i < rows; ++i) {
      A* row = score + i * kColumnBlock;
      row_max[i] = max;
      row_sum[i] = exponentiate(row, columns, max);
      for (int64_t j = 0; j < columns; ++j) column_sum[j] += row[j];
    }
    for (int64_t j = 0; j < columns; ++j) column_max[j] = max;
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* row = score + i * kColumnBlock;
    for (int64_t j = 0; j < columns; ++j) {
      column_sum[j] += row[j] == column_max[j] ? A(1) : fast_exp(row[j] - column_max[j]);
    }
    row_sum[i] = exponentiate(row, columns, row_max[i]);
  }
}

template <typename T, typename A = Accumulate<T>>
void forward(const T* z, const T* x, A scale, int64_t N, int64_t K, int64_t D, A* lse_z, A* lse_x) {
  const auto x_panels = zeros<A>(round_up(K, kPadding) * D);
  pack_panels(x, K, D, x_panels.get());
  const int64_t group_rows = round_up((N + kRowGroups - 1) / kRowGroups, kRowBlock);
  const int64_t groups = N == 0 ? 0 : (N + group_rows - 1) / group_rows;
  const auto max_x = zeros<A>((groups + 1) * K), sum_x = zeros<A>((groups + 1) * K);
  for (int64_t i = 0; i < (groups + 1) * K; ++i) max_x[i] = -INFINITY;

  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const auto block = zeros<A>(kRowBlock * D);
    alignas(64) A score[kRowBlock * kColumnBlock];
    A max[kRowBlock], sum[kRowBlock], tile_max[kRowBlock], tile_sum[kRowBlock];
    A column_max[kColumnBlock], column_sum[kColumnBlock];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t last = (group + 1) * group_rows < N ? (group + 1) * group_rows : N;
      for (int64_t first = group * group_rows; first < last; first += kRowBlock) {
        const int64_t rows = last - first < kRowBlock ? last - first : kRowBlock;
        copy_rows(z, first, rows, D, block.get(), D);
        for (int64_t i = 0; i < rows; ++i) max[i] = -INFINITY, sum[i] = 0;
        for (int64_t j = 0; j < K; j += kColumnBlock) {
          const int64_t columns = K - j < kColumnBlock ? K - j : kColumnBlock;
          dot_tile(block.get(), x_panels.get(), D, j, rows, columns, score);
          for (int64_t i = 0; i < rows * kColumnBlock; ++i) score[i] *= scale;
          reduce_tile(score, rows, columns, tile_max, tile_sum, column_max, column_sum);
          merge_logsumexp(max, sum, tile_max, tile_sum, rows);
          merge_logsumexp(max_x.get() + group * K + j, sum_x.get() + group * K + j, column_max, column_sum, columns);
        }
        for (int64_t i = 0; i < rows; ++i) lse_z[first + i] = max[i] + std::log(sum[i]);
      }
    }
  });
  A *max = max_x.get() + groups * K, *sum = sum_x.get() + groups * K;
  for (int64_t group = 0; group < groups; ++group) {
    merge_logsumexp(max, sum, max_x.get() + group * K, sum_x.get() + group * K, K);
  }
  for (int64_t j = 0; j < K; ++j) lse_x[j] = max[j] + std::log(sum[j]);
}

// One side of the scores: its vectors, and the gradient and value of their logsumexps.
template <typename T>
struct Side {
  const T* vectors;  // [size, D]
  int64_t size;
  const Accumulate<T>*grad, *lse;
};

// Gradient of ⟨grad, lse⟩ over both sides with respect to the vectors of side `a`; returns Σ ∂/∂score · dot. The other
// side's gradient is the same function with the sides exchanged: forming the scores once more costs less than keeping
// a partial result per thread.
template <typename T, typename A = Accumulate<T>>
double backward(const Side<T>& a, const Side<T>& b, A scale, int64_t D, T* gradient) {
  const int64_t padded = round_up(D, kPadding);
  const auto b_panels = zeros<A>(round_up(b.size, kPadding) * D), b_rows = zeros<A>(b.size * padded);
  pack_panels(b.vectors, b.size, D, b_panels.get());
  copy_rows(b.vectors, 0, b.size, D, b_rows.get(), padded);
  const int64_t blocks = (a.size + kRowBlock - 1) / kRowBlock;
  const auto dscale = zeros<double>(blocks);

  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const auto block = zeros<A>(kRowBlock * D), sum = zeros<A>(kRowBlock * padded);
    alignas(64) A dot[kRowBlock * kColumnBlock], score[kColumnBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kRowBlock, rows = a.size - first < kRowBlock ? a.size - first : kRowBlock;
      copy_rows(a.vectors, first, rows, D, block.get(), D);
      for (int64_t i = 0; i < rows * padded; ++i) sum[i] = 0;
      for (int64_t j = 0; j < b.size; j += kColumnBlock) {
        const int64_t columns = b.size - j < kColumnBlock ? b.size - j : kColumnBlock;
        dot_tile(block.get(), b_panels.get(), D, j, rows, columns, dot);
        for (int64_t i = 0; i < rows; ++i) {
          A* row = dot + i * kColumnBlock;
          const A grad = a.grad[first + i], lse = a.lse[first + i];
          // Rounded here, in a loop of its own, as it was in the forward pass: a fused multiply and subtract would not
          // cancel against the lse of a row that one score dominates.
          for (int64_t k = 0; k < columns; ++k) score[k] = scale * row[k];
          for (int64_t k = 0; k < columns; ++k) {
            const A ds = grad * fast_exp(score[k] - lse) + b.grad[j + k] * fast_exp(score[k] - b.lse[j + k]);
            score[k] = ds * row[k];
            row[k] = ds;
          }
          dscale[task] += lane_sum(score, columns);
        }
        for (int64_t d = 0; d < D; d += kPadding) {
          product_panel<true>(dot, kColumnBlock, b_rows.get() + j * padded + d, padded, columns, sum.get() + d, padded,
                              rows);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < D; ++d) gradient[(first + i) * D + d] = static_cast<T>(scale * sum[i * padded + d]);
      }
    }
  });
  double total = 0;
  for (int64_t task = 0; task < blocks; ++task) total += dscale[task];
  return total;
}

void check(const char* op, const Tensor& z, const Tensor& x, const Tensor& scale) {
  check_matrix(op, "z", z);
  check_matrix(op, "x", x, 1);
  check_dtype(op, "x", x, z.scalar_type());
  check_shape(op, "x", x, {x.size(0), z.size(1)});
  check_shape(op, "scale", scale, {});
}

double read_scale(const char* op, const Tensor& scale) {
  double value = 0;
  dispatch_floating(op, "scale", scale.scalar_type(),
                    [&](auto zero) { value = static_cast<double>(*data<decltype(zero)>(scale)); });
  return value;
}

std::tuple<Tensor, Tensor> similarity_logsumexp(Tensor z, Tensor x, Tensor scale) {
  const char* op = "similarity_logsumexp";
  check(op, z, x, scale);
  const int64_t N = z.size(0), K = x.size(0), D = z.size(1);
  const ScalarType type = accumulation_type(z.scalar_type());
  const Tensor lse_z = new_tensor(z, {N}, type), lse_x = new_tensor(z, {K}, type);
  const Tensor dense_z = as_contiguous(z), dense_x = as_contiguous(x);
  const double factor = read_scale(op, scale);
  dispatch_floating(op, "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    forward(data<T>(dense_z), data<T>(dense_x), static_cast<A>(factor), N, K, D, mutable_data<A>(lse_z),
            mutable_data<A>(lse_x));
  });
  return {lse_z, lse_x};
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp_backward(Tensor grad_z, Tensor grad_x, Tensor z, Tensor x,
                                                                 Tensor scale, Tensor lse_z, Tensor lse_x) {
  const char* op = "similarity_logsumexp_backward";
  check(op, z, x, scale);
  const int64_t N = z.size(0), K = x.size(0), D = z.size(1);
  const ScalarType type = accumulation_type(z.scalar_type());
  const std::tuple<const char*, Tensor*, int64_t> vectors[] = {
      {"grad_z", &grad_z, N}, {"lse_z", &lse_z, N}, {"grad_x", &grad_x, K}, {"lse_x", &lse_x, K}};
  for (const auto& [name, tensor, size] : vectors) {
    check_dtype(op, name, *tensor, type);
    check_shape(op, name, *tensor, {size});
    *tensor = as_contiguous(*tensor);
  }
  const Tensor dz = new_tensor(z, {N, D}, z.scalar_type()), dx = new_tensor(x, {K, D}, x.scalar_type());
  const Tensor dscale = new_tensor(scale, {}, scale.scalar_type());
  const Tensor dense_z = as_contiguous(z), dense_x = as_contiguous(x);
  const double factor = read_scale(op, scale);
  double scale_gradient = 0;
  dispatch_floating(op, "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const Side<T> rows{data<T>(dense_z), N, data<A>(grad_z), data<A>(lse_z)};
    const Side<T> columns{data<T>(dense_x), K, data<A>(grad_x), data<A>(lse_x)};
    scale_gradient = backward(rows, columns, static_cast<A>(factor), D, mutable_data<T>(dz));
    backward(columns, rows, static_cast<A>(factor), D, mutable_data<T>(dx));
  });
  dispatch_floating(op, "scale", scale.scalar_type(), [&](auto zero) {
    *mutable_data<decltype(zero)>(dscale) = static_cast<decltype(zero)>(scale_gradient);
  });
  return {dz, dx, dscale};
}

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CPU, m) {
  m.impl("similarity_logsumexp", TORCH_BOX(&similarity_logsumexp));
  m.impl("similarity_logsumexp_backward", TORCH_BOX(&similarity_logsumexp_backward));
}

}  // namespace
}  // namespace ncpvae
