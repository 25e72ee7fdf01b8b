// CPU kernels of similarity_logsumexp and its backward. Contract: python/ncpvae/ops/similarity_logsumexp.py.
//
// Scores are formed in tiles of Products::kRows × kColumns that stay in the cache. Work is cut by shape alone, and
// partial results are merged in order, so that the number of threads does not show in the result.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "convert.h"
#include "similarity_products.h"
#include "tensor.h"

namespace ncpvae {
namespace {

constexpr int64_t kSlabTiles = 24;  // in a row of a slab of scores' gradients
// Within this range below the tile's maximum, exp(score − maximum) is accurate enough to serve rows and columns alike.
constexpr double kSharedRange = 32;

// Inner products times scale; also the largest and the smallest, NaN passed over.
template <int64_t kPitch, typename A>
void scale_tile(A* score, A scale, int64_t rows, int64_t columns, A& max, A& min) {
  const int64_t whole = columns / kLanes * kLanes;
  auto most = in_all_lanes(-static_cast<A>(INFINITY)), least = in_all_lanes(static_cast<A>(INFINITY));
  max = -INFINITY, min = INFINITY;
  for (int64_t i = 0; i < rows; ++i) {
    A* row = score + i * kPitch;
    for (int64_t j = 0; j < whole; j += kLanes) {
#pragma GCC unroll 8
      for (int64_t p = 0; p < most.parts; ++p) {
        const Vector<A> value = load(row + j + p * most.width) * scale;
        store(row + j + p * most.width, value);
        most.part[p] = Larger()(most.part[p], value), least.part[p] = Smaller()(least.part[p], value);
      }
    }
    for (int64_t j = whole; j < columns; ++j) {
      row[j] *= scale;
      max = Larger()(max, row[j]), min = Smaller()(min, row[j]);
    }
  }
  max = Larger()(most.max(), max), min = Smaller()(least.min(), min);
}

// The largest of every row and column; returns the smallest of these.
template <int64_t kPitch, typename A>
A find_maxima(const A* score, int64_t rows, int64_t columns, A* row_max, A* column_max) {
  A least = INFINITY;
  for (int64_t j = 0; j < columns; ++j) column_max[j] = -INFINITY;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = score + i * kPitch;
    row_max[i] = lane_max(row, columns);
    least = std::min(least, row_max[i]);
    for (int64_t j = 0; j < columns; ++j) column_max[j] = row[j] > column_max[j] ? row[j] : column_max[j];
  }
  for (int64_t j = 0; j < columns; ++j) least = std::min(least, column_max[j]);
  return least;
}

// Row and column Σ exp(score − max), one exponential serving both.
template <int64_t kPitch, typename A>
void sum_tile(const A* score, A max, int64_t rows, int64_t columns, A* row_sum, A* column_sum) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = score + i * kPitch;
    Lanes<A> sum = {};
    for (int64_t j = 0; j < whole; j += kLanes) {
#pragma GCC unroll 8
      for (int64_t p = 0; p < sum.parts; ++p) {
        const int64_t at = j + p * sum.width;
        const Vector<A> term = exp_nonpositive(load(row + at) - max);
        sum.part[p] += term;
        store(column_sum + at, load(column_sum + at) + term);
      }
    }
    row_sum[i] = sum.sum();
    for (int64_t j = whole; j < columns; ++j) {
      const A term = exp_nonpositive(row[j] - max);
      row_sum[i] += term, column_sum[j] += term;
    }
  }
}

// Row and column (max, Σ exp(score − max)) of a tile; the inner products are overwritten.
template <int64_t kPitch, typename A>
void reduce_tile(A* score, A scale, int64_t rows, int64_t columns, A* row_max, A* row_sum, A* column_max,
                 A* column_sum) {
  constexpr A range = static_cast<A>(kSharedRange);
  A max, min;
  scale_tile<kPitch>(score, scale, rows, columns, max, min);
  for (int64_t j = 0; j < columns; ++j) column_sum[j] = 0;
  bool shared = max - min <= range;  // not with infinities
  if (!shared) shared = max - find_maxima<kPitch>(score, rows, columns, row_max, column_max) <= range;
  if (shared) {
    for (int64_t i = 0; i < rows; ++i) row_max[i] = max;
    for (int64_t j = 0; j < columns; ++j) column_max[j] = max;
    return sum_tile<kPitch>(score, max, rows, columns, row_sum, column_sum);
  }
  for (int64_t i = 0; i < rows; ++i) {
    A* row = score + i * kPitch;
    for (int64_t j = 0; j < columns; ++j) {
      column_sum[j] += row[j] == column_max[j] ? A(1) : exp_nonpositive(row[j] - column_max[j]);
    }
    row_sum[i] = sum_of_exponentials(row, columns, row_max[i]);
  }
}

template <typename Products, typename A = typename Products::A>
void forward(const Products& products, A scale, int64_t N, int64_t K, int64_t D, A* lse_z, A* lse_x) {
  constexpr int64_t block = Products::kRows, together = Products::kTogether * block, tile_columns = Products::kColumns;
  const int64_t group_rows = round_up((N + Products::kRowGroups - 1) / Products::kRowGroups, block);
  const int64_t groups = N == 0 ? 0 : (N + group_rows - 1) / group_rows;
  const auto max_x = filled<A>((groups + 1) * K, -static_cast<A>(INFINITY)), sum_x = zeros<A>((groups + 1) * K);
  const int64_t grain = tasks_per_thread(static_cast<double>(std::min(group_rows, N)) * K * D / Products::kSpeed);

  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    typename Products::Space space(products);
    alignas(64) A score[block * Products::kPitch];
    A max[together], sum[together], tile_max[block], tile_sum[block];
    A column_max[tile_columns], column_sum[tile_columns];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t stop = std::min((group + 1) * group_rows, N);
      for (int64_t first = group * group_rows; first < stop; first += together) {
        const int64_t last = std::min(first + together, stop);
        products.take_rows(first, last, space);
        for (int64_t i = 0; i < last - first; ++i) max[i] = -INFINITY, sum[i] = 0;
        for (int64_t j = 0; j < K; j += tile_columns) {
          const int64_t columns = std::min(K - j, tile_columns), at = group * K + j;
          for (int64_t i = 0; i < last - first; i += block) {
            const int64_t rows = std::min(last - first - i, block);
            products.scores(space, i, j, rows, columns, score);
            reduce_tile<Products::kPitch>(score, scale, rows, columns, tile_max, tile_sum, column_max, column_sum);
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

// The gradient and value of one side's logsumexps.
template <typename A>
struct Side {
  int64_t size;
  const A *grad, *lse;
};

// Gradient of ⟨grad, lse⟩ over both sides. The scores' gradients are formed once, a slab of rows × columns at a time:
// by blocks of rows, which takes them to the rows' vectors, and then from memory by blocks of columns.
template <typename Products, typename A = typename Products::A>
class Backward {
 public:
  // The sides' gradients are in units of `grad_unit`.
  Backward(const Products& made, const Side<A>& rows, const Side<A>& columns, A factor, A grad_unit, int64_t depth)
      : products(made), z(rows), x(columns), scale(factor), unit(grad_unit), D(depth) {
    slab_columns = std::min(round_up(x.size, tile_columns), kSlabTiles * tile_columns);
    const int64_t fitting = Products::kSlabValues / slab_columns, slabs = (z.size + fitting - 1) / fitting;
    slab_rows = slabs == 0 ? 0 : round_up((z.size + slabs - 1) / slabs, block);
    slab = uninitialised<A>(slab_columns / tile_columns * slab_rows * Products::kPitch);
    dscale = zeros<double>((z.size + block - 1) / block);
  }

  // Returns Σ ∂/∂score · dot, the gradient of the scale.
  template <typename T>
  double run(T* z_gradient, T* x_gradient) {
    for (int64_t j = 0; j < x.size; j += slab_columns) {
      for (int64_t n = 0; n < z.size; n += slab_rows) {
        give_rows(n, std::min(n + slab_rows, z.size), j, std::min(j + slab_columns, x.size));
        give_columns(n, std::min(n + slab_rows, z.size), j, std::min(j + slab_columns, x.size));
      }
    }
    finish(z.size, z_gradient, [this](int64_t n, A*) { return products.row_gradients(n); });
    finish(x.size, x_gradient, [this](int64_t k, A* space) { return products.column_gradients(k, space); });
    double total = 0;
    for (int64_t b = 0; b < (z.size + block - 1) / block; ++b) total += dscale[b];
    return total * unit;
  }

 private:
  static constexpr int64_t block = Products::kRows, tile_columns = Products::kColumns;

  // A tile's place in the slab whose first row and column these are.
  A* tile(int64_t row, int64_t column) const {
    return slab.get() + (column / tile_columns * slab_rows + row) * Products::kPitch + column % tile_columns;
  }

  void give_rows(int64_t first, int64_t last, int64_t first_column, int64_t last_column) {
    const int64_t blocks = (last - first + block - 1) / block;
    const int64_t grain = tasks_per_thread(2.0 * block * (last_column - first_column) * D / Products::kSpeed);
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      typename Products::Space space(products);
      for (int64_t b = begin; b < end; b += Products::kTogether) {
        const int64_t start = first + b * block;
        const int64_t stop = std::min(first + std::min(b + Products::kTogether, end) * block, last);
        products.take_rows(start, stop, space);
        for (int64_t j = first_column; j < last_column; j += tile_columns) {
          const int64_t columns = std::min(last_column - j, tile_columns);
          for (int64_t n = start; n < stop; n += block) {
            const int64_t rows = std::min(stop - n, block);
            A* score = tile(n - first, j - first_column);
            products.scores(space, n - start, j, rows, columns, score);
            dscale[n / block] += score_gradients(score, n, rows, j, columns);
            products.give_rows(space, score, n, j, rows, columns);
          }
        }
      }
    });
  }

  void give_columns(int64_t first, int64_t last, int64_t first_column, int64_t last_column) {
    constexpr int64_t together = Products::kTakenColumns;
    const int64_t tasks = (last_column - first_column + together - 1) / together;
    const int64_t grain = tasks_per_thread(static_cast<double>(together) * (last - first) * D / Products::kSpeed);
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      typename Products::Space space(products);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t j = first_column + task * together, columns = std::min(last_column - j, together);
        products.give_columns(space, tile(0, j - first_column), first, j, last - first, columns);
      }
    });
  }

  // A tile of inner products becomes one of gradients with respect to scores; returns Σ gradient · inner product.
  double score_gradients(A* tile, int64_t n, int64_t rows, int64_t j, int64_t columns) const {
    const auto [least_row, most_row] = std::minmax_element(z.lse + n, z.lse + n + rows);
    const auto [least_column, most_column] = std::minmax_element(x.lse + j, x.lse + j + columns);
    const A most = std::max(*most_row, *most_column), least = std::min(*least_row, *least_column);
    const bool shared = most < INFINITY && most - least <= static_cast<A>(kSharedRange);
    A score[tile_columns], column_weight[tile_columns];
    if (shared) {
      for (int64_t k = 0; k < columns; ++k) column_weight[k] = x.grad[j + k] * fast_exp(most - x.lse[j + k]);
    }
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      A* dot = tile + i * Products::kPitch;
      const A grad = z.grad[n + i], lse = z.lse[n + i];
      // Rounded here, in a loop of its own, as it was in the forward pass: a fused multiply and subtract would not
      // cancel against the lse of a row that one score dominates.
      for (int64_t k = 0; k < columns; ++k) score[k] = scale * dot[k];
      if (shared) {
        total += shared_gradients(score, dot, most, grad * fast_exp(most - lse), column_weight, columns);
        continue;
      }
      for (int64_t k = 0; k < columns; ++k) {
        const A gradient =
            grad * exp_nonpositive(score[k] - lse) + x.grad[j + k] * exp_nonpositive(score[k] - x.lse[j + k]);
        score[k] = gradient * dot[k];
        dot[k] = gradient;
      }
      total += lane_sum(score, columns);
    }
    return total;
  }

  // A row of it: dot becomes the gradient exp(score − most) · (weight + column_weight); returns Σ gradient · dot.
  static A shared_gradients(const A* score, A* dot, A most, A weight, const A* column_weight, int64_t columns) {
    const int64_t whole = columns / kLanes * kLanes;
    Lanes<A> sum = {};
    for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 8
      for (int64_t p = 0; p < sum.parts; ++p) {
        const int64_t at = k + p * sum.width;
        const Vector<A> gradient = exp_nonpositive(load(score + at) - most) * (load(column_weight + at) + weight);
        sum.part[p] += gradient * load(dot + at);
        store(dot + at, gradient);
      }
    }
    A total = sum.sum();
    for (int64_t k = whole; k < columns; ++k) {
      const A gradient = exp_nonpositive(score[k] - most) * (weight + column_weight[k]);
      total += gradient * dot[k];
      dot[k] = gradient;
    }
    return total;
  }

  // gradient[size, D] = scale times the sums, which are in their unit and of which `sums` gives a block at a time, in
  // space of its own or in this
  template <typename T, typename F>
  void finish(int64_t size, T* gradient, F&& sums) const {
    const int64_t blocks = (size + block - 1) / block, length = products.row_length();
    torch::stable::parallel_for(0, blocks, tasks_per_thread(2.0 * block * D), [&](int64_t begin, int64_t end) {
      const auto space = uninitialised<A>(block * length);
      for (int64_t i = begin * block; i < std::min(end * block, size); i += block) {
        const A* sum = sums(i, space.get());
        for (int64_t row = i; row < std::min(i + block, size); ++row, sum += length) {
          for (int64_t d = 0; d < D; ++d) gradient[row * D + d] = static_cast<T>(scale * sum[d] * unit);
        }
      }
    });
  }

  const Products& products;
  const Side<A>&z, &x;
  A scale, unit;
  int64_t D, slab_rows, slab_columns;
  Buffer<A> slab;         // tiles, rows of a column of tiles one after the other
  Buffer<double> dscale;  // by block of rows
};

// Whether numbers are of ordinary size, so that products on tile registers are as good as any: their pieces cannot
// overflow, nor meet an infinity with the zeros that its other pieces would be, and those too small for a normal
// number, which the registers take for zero, are nothing beside the largest, in inner products too.
template <typename T>
bool ordinary(const T* values, int64_t size) {
  const float largest = largest_magnitude(values, size);
  return largest == 0 || (largest >= 0x1p-30f && largest <= 0x1p40f);
}

// Gradients of both sides' logsumexps in units of a power of two, which is the first of the results: 1 unless they are
// extremely small or large, infinity or NaN where one of them is. Changed ones are put into `space`.
template <typename A>
std::tuple<A, const A*, const A*> in_units(const A* rows, int64_t N, const A* columns, int64_t K, Buffer<A>& space) {
  const A row_size = largest_magnitude(rows, N), column_size = largest_magnitude(columns, K);
  const A size = row_size > column_size || row_size != row_size ? row_size : column_size;
  if (!std::isfinite(size)) return {size, rows, columns};
  if (size == 0 || (size >= A(0x1p-40) && size <= A(0x1p40))) return {A(1), rows, columns};
  int exponent;
  std::frexp(size, &exponent);
  const A unit = std::ldexp(A(1), std::clamp(exponent, -120, 120));
  space = uninitialised<A>(N + K);
  for (int64_t i = 0; i < N; ++i) space[i] = rows[i] / unit;
  for (int64_t j = 0; j < K; ++j) space[N + j] = columns[j] / unit;
  return {unit, space.get(), space.get() + N};
}

// Calls f with the products of z's rows and x's. The choice is by shape and values, so that it is the same in both
// passes: a score that is alone in its row cancels against its logsumexp only where it is the same to the last bit.
// `plain`: not on tile registers in any case.
template <typename T, typename A, typename F>
void with_products(const T* z, const T* x, [[maybe_unused]] A scale, int64_t N, int64_t K, int64_t D, bool gradients,
                   [[maybe_unused]] bool plain, F&& f) {
#if NCPVAE_TILES
  if constexpr (std::is_same_v<A, float>) {
    using Products = TileProducts<T>;
    if (!plain && Products::suit(N, K, D) && ordinary(&scale, 1) && ordinary(z, N * D) && ordinary(x, K * D)) {
      return f(Products(z, x, N, K, D, gradients));
    }
  }
#endif
  f(PanelProducts<T>(z, x, N, K, D, gradients));
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
    const A scaling = static_cast<A>(factor);
    with_products(data<T>(dense_z), data<T>(dense_x), scaling, N, K, D, false, false, [&](const auto& products) {
      forward(products, scaling, N, K, D, mutable_data<A>(lse_z), mutable_data<A>(lse_x));
    });
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
    Buffer<A> space;
    const auto [unit, by_row, by_column] = in_units(data<A>(grad_z), N, data<A>(grad_x), K, space);
    const Side<A> rows{N, by_row, data<A>(lse_z)}, columns{K, by_column, data<A>(lse_x)};
    const A scaling = static_cast<A>(factor), grad_unit = unit;
    const bool infinite = !std::isfinite(unit);  // then all that matters is where infinities and NaN go
    with_products(data<T>(dense_z), data<T>(dense_x), scaling, N, K, D, true, infinite, [&](const auto& products) {
      using Products = std::decay_t<decltype(products)>;
      Backward<Products> backward(products, rows, columns, scaling, infinite ? A(1) : grad_unit, D);
      scale_gradient = backward.run(mutable_data<T>(dz), mutable_data<T>(dx));
    });
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
