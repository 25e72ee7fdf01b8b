// CPU kernels of similarity_logsumexp and its backward. Contract: python/ncpvae/ops/similarity_logsumexp.py.
//
// Scores are formed in tiles of kRowBlock × kColumnBlock that stay in the cache. Work is cut by shape alone, and
// partial results are merged in order, so that the number of threads does not show in the result.
#include <algorithm>
#include <tuple>

#include "tensor.h"
#include "panels.h"

namespace ncpvae {
namespace {

constexpr int64_t kColumnBlock = 192;  // columns of a tile of scores: rows × columns fit the first-level cache
constexpr int64_t kPitch = kColumnBlock + 16;  // length of its rows in memory, in floats an odd number of cache lines
constexpr int64_t kRowGroups = 64;             // at most this many partial results per column
constexpr int64_t kTogether = 4;  // blocks of rows that take turns at a tile's columns, which stay in the cache
constexpr int64_t kPulledColumns = 48;               // columns that one task takes when gradients go to columns
constexpr int64_t kSlabColumns = 24 * kColumnBlock;  // columns of a slab, and how many scores' gradients it may hold
constexpr int64_t kSlabValues = 1 << 22;
// Within this range below the tile's maximum, exp(score − maximum) is accurate enough to serve rows and columns alike.
constexpr double kSharedRange = 32;

// Row and column (max, Σ exp(score − max)) of a tile; the inner products are overwritten.
template <typename A>
void reduce_tile(A* score, A scale, int64_t rows, int64_t columns, A* row_max, A* row_sum, A* column_max,
                 A* column_sum) {
  A max = -static_cast<A>(INFINITY), least = static_cast<A>(INFINITY);
  for (int64_t i = 0; i < rows; ++i) {
    A* row = score + i * kPitch;
    for (int64_t j = 0; j < columns; ++j) row[j] *= scale;
    row_max[i] = lane_max(row, columns);
    max = std::max(max, row_max[i]);
    least = std::min(least, row_max[i]);
  }
  for (int64_t j = 0; j < columns; ++j) column_max[j] = -INFINITY, column_sum[j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = score + i * kPitch;
    for (int64_t j = 0; j < columns; ++j) column_max[j] = row[j] > column_max[j] ? row[j] : column_max[j];
  }
  for (int64_t j = 0; j < columns; ++j) least = column_max[j] < least ? column_max[j] : least;
  if (max < INFINITY && max - least <= static_cast<A>(kSharedRange)) {
    for (int64_t i = 0; i < rows; ++i) {
      A* row = score + i * kPitch;
      row_max[i] = max;
      row_sum[i] = exponentiate(row, columns, max);
      for (int64_t j = 0; j < columns; ++j) column_sum[j] += row[j];
    }
    for (int64_t j = 0; j < columns; ++j) column_max[j] = max;
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* row = score + i * kPitch;
    for (int64_t j = 0; j < columns; ++j) {
      column_sum[j] += row[j] == column_max[j] ? A(1) : exp_nonpositive(row[j] - column_max[j]);
    }
    row_sum[i] = exponentiate(row, columns, row_max[i]);
  }
}

// The columns' vectors for inner products with rows' vectors: x transposed.
template <typename T, typename A = Accumulate<T>>
Buffer<A> transposed_panels(const T* x, int64_t K, int64_t D) {
  Buffer<A> panels = uninitialised<A>(round_up(K, kPanel<A>) * D);
  pack_transposed_panels(x, K, D, panels.get());
  return panels;
}

// Vectors for sums of them.
template <typename T, typename A = Accumulate<T>>
Buffer<A> row_panels(const T* vectors, int64_t size, int64_t D) {
  Buffer<A> panels = uninitialised<A>(round_up(D, kPanel<A>) * size);
  pack_panels(vectors, size, D, panels.get());
  return panels;
}

template <typename T, typename A = Accumulate<T>>
void forward(const T* z, const T* x, A scale, int64_t N, int64_t K, int64_t D, A* lse_z, A* lse_x) {
  const auto x_panels = transposed_panels(x, K, D);
  const int64_t group_rows = round_up((N + kRowGroups - 1) / kRowGroups, kRowBlock);
  const int64_t groups = N == 0 ? 0 : (N + group_rows - 1) / group_rows;
  const auto max_x = filled<A>((groups + 1) * K, -static_cast<A>(INFINITY)), sum_x = zeros<A>((groups + 1) * K);
  const int64_t grain = tasks_per_thread(static_cast<double>(std::min(group_rows, N)) * K * D);

  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    const auto blocks = uninitialised<A>(kTogether * kRowBlock * D);
    alignas(64) A score[kRowBlock * kPitch];
    A max[kTogether * kRowBlock], sum[kTogether * kRowBlock], tile_max[kRowBlock], tile_sum[kRowBlock];
    A column_max[kColumnBlock], column_sum[kColumnBlock];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t stop = std::min((group + 1) * group_rows, N);
      for (int64_t first = group * group_rows; first < stop; first += kTogether * kRowBlock) {
        const int64_t last = std::min(first + kTogether * kRowBlock, stop);
        for (int64_t n = first; n < last; n += kRowBlock) {
          copy_transposed<kRowBlock>(z + n * D, std::min(last - n, kRowBlock), D, blocks.get() + (n - first) * D);
        }
        for (int64_t i = 0; i < last - first; ++i) max[i] = -INFINITY, sum[i] = 0;
        for (int64_t j = 0; j < K; j += kColumnBlock) {
          const int64_t columns = std::min(K - j, kColumnBlock), at = group * K + j;
          for (int64_t n = first; n < last; n += kRowBlock) {
            const int64_t rows = std::min(last - n, kRowBlock), i = n - first;
            product<false, 1, kRowBlock>(blocks.get() + i * D, x_panels.get() + j * D, kPanel<A> * D, D, score, kPitch,
                                         rows, columns);
            reduce_tile(score, scale, rows, columns, tile_max, tile_sum, column_max, column_sum);
            merge_logsumexp(max + i, sum + i, tile_max, tile_sum, rows);
            merge_logsumexp(max_x.get() + at, sum_x.get() + at, column_max, column_sum, columns);
          }
        }
        for (int64_t i = 0; i < last - first; ++i) lse_z[first + i] = max[i] + std::log(sum[i]);
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

// Gradient of ⟨grad, lse⟩ over both sides. The scores' gradients are formed once, a slab of rows × columns at a time:
// by blocks of rows, which takes them to the rows' vectors, and then from memory by blocks of columns.
template <typename T, typename A = Accumulate<T>>
class Backward {
 public:
  Backward(const Side<T>& rows, const Side<T>& columns, A factor, int64_t depth)
      : z(rows), x(columns), scale(factor), D(depth), padded(round_up(depth, kPadding)) {
    slab_columns = std::min(round_up(x.size, kColumnBlock), kSlabColumns);
    const int64_t fitting = kSlabValues / slab_columns, slabs = (z.size + fitting - 1) / fitting;
    slab_rows = slabs == 0 ? 0 : round_up((z.size + slabs - 1) / slabs, kRowBlock);
    slab = uninitialised<A>(slab_columns / kColumnBlock * slab_rows * kPitch);
    x_panels = transposed_panels(x.vectors, x.size, D);
    x_rows = row_panels(x.vectors, x.size, D);
    z_rows = row_panels(z.vectors, z.size, D);
    dz = uninitialised<A>(round_up(z.size, kRowBlock) * padded);
    dx = z.size == 0 ? zeros<A>(x.size * padded) : uninitialised<A>(round_up(x.size, kPulledColumns) * padded);
    dscale = zeros<double>((z.size + kRowBlock - 1) / kRowBlock);
  }

  // Returns Σ ∂/∂score · dot, the gradient of the scale.
  double run(T* z_gradient, T* x_gradient) {
    for (int64_t j = 0; j < x.size; j += slab_columns) {
      for (int64_t n = 0; n < z.size; n += slab_rows) {
        pull_rows(n, std::min(n + slab_rows, z.size), j, std::min(j + slab_columns, x.size));
        pull_columns(n, std::min(n + slab_rows, z.size), j, std::min(j + slab_columns, x.size));
      }
    }
    finish(dz.get(), z.size, z_gradient);
    finish(dx.get(), x.size, x_gradient);
    double total = 0;
    for (int64_t block = 0; block < (z.size + kRowBlock - 1) / kRowBlock; ++block) total += dscale[block];
    return total;
  }

 private:
  // A tile's place in the slab whose first row and column these are.
  A* tile(int64_t row, int64_t column) const {
    return slab.get() + (column / kColumnBlock * slab_rows + row) * kPitch + column % kColumnBlock;
  }

  void pull_rows(int64_t first, int64_t last, int64_t first_column, int64_t last_column) {
    const int64_t blocks = (last - first + kRowBlock - 1) / kRowBlock;
    const int64_t grain = tasks_per_thread(2.0 * kRowBlock * (last_column - first_column) * D);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      const auto packed = uninitialised<A>(kTogether * kRowBlock * D);
      for (int64_t block = begin; block < end; block += kTogether) {
        const int64_t start = first + block * kRowBlock;
        const int64_t stop = std::min(first + std::min(block + kTogether, end) * kRowBlock, last);
        for (int64_t n = start; n < stop; n += kRowBlock) {
          copy_transposed<kRowBlock>(z.vectors + n * D, std::min(stop - n, kRowBlock), D,
                                     packed.get() + (n - start) * D);
        }
        for (int64_t j = first_column; j < last_column; j += kColumnBlock) {
          const int64_t columns = std::min(last_column - j, kColumnBlock);
          for (int64_t n = start; n < stop; n += kRowBlock) {
            const int64_t rows = std::min(stop - n, kRowBlock);
            A* score = tile(n - first, j - first_column);
            product<false, 1, kRowBlock>(packed.get() + (n - start) * D, x_panels.get() + j * D, kPanel<A> * D, D,
                                         score, kPitch, rows, columns);
            dscale[n / kRowBlock] += score_gradients(score, n, rows, j, columns);
            const auto pull = j == 0 ? product<false, kPitch, 1, A> : product<true, kPitch, 1, A>;
            pull(score, x_rows.get() + j * kPanel<A>, kPanel<A> * x.size, columns, dz.get() + n * padded, padded, rows,
                 D);
          }
        }
      }
    });
  }

  void pull_columns(int64_t first, int64_t last, int64_t first_column, int64_t last_column) {
    const int64_t tasks = (last_column - first_column + kPulledColumns - 1) / kPulledColumns;
    const int64_t grain = tasks_per_thread(static_cast<double>(kPulledColumns) * (last - first) * D);
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t j = first_column + task * kPulledColumns, columns = std::min(last_column - j, kPulledColumns);
        const auto pull = first == 0 ? product<false, 1, kPitch, A> : product<true, 1, kPitch, A>;
        pull(tile(0, j - first_column), z_rows.get() + first * kPanel<A>, kPanel<A> * z.size, last - first,
             dx.get() + j * padded, padded, columns, D);
      }
    });
  }

  // A tile of inner products becomes one of gradients with respect to scores; returns Σ gradient · inner product.
  double score_gradients(A* tile, int64_t n, int64_t rows, int64_t j, int64_t columns) const {
    const auto [least_row, most_row] = std::minmax_element(z.lse + n, z.lse + n + rows);
    const auto [least_column, most_column] = std::minmax_element(x.lse + j, x.lse + j + columns);
    const A most = std::max(*most_row, *most_column), least = std::min(*least_row, *least_column);
    const bool shared = most < INFINITY && most - least <= static_cast<A>(kSharedRange);
    A score[kColumnBlock], column_weight[kColumnBlock];
    if (shared) {
      for (int64_t k = 0; k < columns; ++k) column_weight[k] = x.grad[j + k] * fast_exp(most - x.lse[j + k]);
    }
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      A* dot = tile + i * kPitch;
      const A grad = z.grad[n + i], lse = z.lse[n + i];
      // Rounded here, in a loop of its own, as it was in the forward pass: a fused multiply and subtract would not
      // cancel against the lse of a row that one score dominates.
      for (int64_t k = 0; k < columns; ++k) score[k] = scale * dot[k];
      if (shared) {
        const A weight = grad * fast_exp(most - lse);
        for (int64_t k = 0; k < columns; ++k) score[k] = exp_nonpositive(score[k] - most) * (weight + column_weight[k]);
      } else {
        for (int64_t k = 0; k < columns; ++k) {
          score[k] = grad * exp_nonpositive(score[k] - lse) + x.grad[j + k] * exp_nonpositive(score[k] - x.lse[j + k]);
        }
      }
      for (int64_t k = 0; k < columns; ++k) {
        const A gradient = score[k];
        score[k] *= dot[k];
        dot[k] = gradient;
      }
      total += lane_sum(score, columns);
    }
    return total;
  }

  void finish(const A* sum, int64_t rows, T* gradient) const {
    torch::stable::parallel_for(0, rows, tasks_per_thread(2.0 * D), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t d = 0; d < D; ++d) gradient[i * D + d] = static_cast<T>(scale * sum[i * padded + d]);
      }
    });
  }

  const Side<T>&z, &x;
  A scale;
  int64_t D, padded, slab_rows, slab_columns;
  Buffer<A> slab;                      // tiles, rows of a column of tiles one after the other
  Buffer<A> x_panels, x_rows, z_rows;  // packed
  Buffer<A> dz, dx;                    // [size, padded], without the factor `scale`
  Buffer<double> dscale;               // by block of rows
};

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
    Backward<T> backward(rows, columns, static_cast<A>(factor), D);
    scale_gradient = backward.run(mutable_data<T>(dz), mutable_data<T>(dx));
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
