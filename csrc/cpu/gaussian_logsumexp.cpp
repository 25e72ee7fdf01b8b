// CPU kernels of gaussian_logsumexp and its backward. Contract: python/ncpvae/ops/gaussian_logsumexp.py.
//
// Log-joints log w_k N(z_n; k) are formed in tiles that stay in the cache, always from t = (z − mean)/std itself: the
// square is never expanded. Work is cut by shape alone, and partial results are merged in order, so that the number of
// threads does not show.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "convert.h"
#include "gaussian_components.h"
#include "panels.h"
#include "tensor.h"

namespace ncpvae {
namespace {

constexpr int64_t kColumnBlock = 256;                // components of a tile of log-joints in the forward pass
constexpr int64_t kColumnChunk = 16 * kColumnBlock;  // components that one task takes in the forward pass
constexpr int64_t kGradColumns = 64;                 // components of a tile in the backward pass
constexpr int64_t kGradBlock = 2 * kRowBlock;        // rows of such a tile
constexpr int64_t kGradRows = 4 * kGradBlock;        // rows that a task takes there, at least
constexpr int64_t kGradTasks = 64;                   // about how many tasks there are …
constexpr int64_t kSideBySide = 2;                   // … that many with the same components, where there are plenty
constexpr int64_t kMomentValues = 1 << 20;           // of sums that components keep for these groups of rows
constexpr int64_t kSlabValues = 1 << 21;             // of partial sums of dz
constexpr int64_t kPulls = kVectorBytes == 64 ? 4 : 2;  // components whose gradients the registers hold at once

template <typename T, typename A = Accumulate<T>>
void forward(const T* z, const Components<A>& c, int64_t N, A* lse) {
  const int64_t blocks = (N + kRowBlock - 1) / kRowBlock, chunks = (c.K + kColumnChunk - 1) / kColumnChunk;
  const auto max = filled<A>((chunks + 1) * N, -static_cast<A>(INFINITY)), sum = zeros<A>((chunks + 1) * N);
  const int64_t grain = tasks_per_thread(static_cast<double>(kRowBlock) * std::min(c.K, kColumnChunk) * c.D);

  torch::stable::parallel_for(0, blocks * chunks, grain, [&](int64_t begin, int64_t end) {
    const auto block = uninitialised<A>(kRowBlock * c.D);
    alignas(64) A joint[kRowBlock * kColumnBlock];
    A tile_max[kRowBlock], tile_sum[kRowBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, first = task % blocks * kRowBlock;
      const int64_t rows = std::min(N - first, kRowBlock), last = std::min((chunk + 1) * kColumnChunk, c.K);
      A *max_here = max.get() + chunk * N + first, *sum_here = sum.get() + chunk * N + first;
      copy_transposed<kRowBlock>(z + first * c.D, rows, c.D, block.get());
      for (int64_t k = chunk * kColumnChunk; k < last; k += kColumnBlock) {
        const int64_t columns = std::min(last - k, kColumnBlock);
        joint_tile(block.get(), c, k, rows, columns, joint, kColumnBlock);
        bool negligible[kRowBlock];
        for (int64_t i = 0; i < rows; ++i) {  // of all rows first: one does not have to wait for another's
          const Survey<A> row(joint + i * kColumnBlock, columns);
          tile_max[i] = row.max;
          negligible[i] = row.max - max_here[i] < kNegligible<A> && !row.has_nan();
        }
        for (int64_t i = 0; i < rows; ++i) {
          tile_sum[i] = negligible[i] ? A(0) : sum_of_exponentials(joint + i * kColumnBlock, columns, tile_max[i]);
        }
        merge_logsumexp(max_here, sum_here, tile_max, tile_sum, rows);
      }
    }
  });
  A *all_max = max.get() + chunks * N, *all_sum = sum.get() + chunks * N;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    merge_logsumexp(all_max, all_sum, max.get() + chunk * N, sum.get() + chunk * N, N);
  }
  for (int64_t i = 0; i < N; ++i) lse[i] = all_max[i] + std::log(all_sum[i]);
}

template <typename A>
inline bool has_zero(const A* values, int64_t size) {
  using Bits = std::conditional_t<sizeof(A) == sizeof(uint32_t), uint32_t, uint64_t>;
  Bits least = ~Bits{0};
  for (int64_t i = 0; i < size; ++i) {
    const Bits magnitude = bits_as<Bits>(values[i]) << 1;
    least = magnitude < least ? magnitude : least;
  }
  return least == 0;
}

// A tile of responsibilities times the row's gradient.
template <typename A>
struct Responsibilities {
  alignas(64) A value[kGradBlock * kGradColumns];
  int64_t active[kGradBlock], count;  // the rows where any of them is not zero; the others are not written
  bool full;                          // whether none of these rows has a zero
  bool overflow;                      // whether t may be infinite somewhere

  // value holds the log-joints. A row without mass has no responsibilities.
  void from_joints(int64_t rows, int64_t columns, const A* lse, const A* grad) {
    count = 0, full = true, overflow = false;
    for (int64_t i = 0; i < rows; ++i) {
      const A origin = lse[i] == -static_cast<A>(INFINITY) ? A(0) : lse[i], factor = grad[i];
      A* row = value + i * kGradColumns;
      const Survey<A> survey(row, columns);
      if (survey.max - origin < kNegligible<A> && !survey.has_nan() && factor - factor == 0) continue;
      for (int64_t j = 0; j < columns; ++j) row[j] = factor * exp_nonpositive(row[j] - origin);
      active[count++] = i;
      full = full && !has_zero(row, columns);
      overflow |= !survey.finite();
    }
  }

  void add_to_mass(int64_t columns, double* mass) const {
    A sum[kGradColumns] = {};
    for (int64_t a = 0; a < count; ++a) {
      const A* row = value + active[a] * kGradColumns;
      for (int64_t j = 0; j < columns; ++j) sum[j] += row[j];
    }
    for (int64_t j = 0; j < columns; ++j) mass[j] += sum[j];
  }
};

template <int64_t size, typename A>
inline bool all_zero(const A* values) {
  using Bits = std::conditional_t<sizeof(A) == sizeof(uint32_t), uint32_t, uint64_t>;
  Bits any = 0;
#pragma GCC unroll 8
  for (int64_t i = 0; i < size; ++i) any |= bits_as<Bits>(values[i]);
  return any << 1 == 0;  // all but the signs
}

// What `components` components from the tile's column `first` on and the rows of the tile give to each other: the rows
// Σ_k ρ t/std, the components Σ_n ρ t and Σ_n ρ t². Rows where all these ρ are zero are passed over, which with one
// component is what keeps 0 · ∞ out. kOrdinary: all sizes are such that t may be scaled by std after the sums.
template <bool kOrdinary, int64_t components, typename A>
inline void exchange(const Responsibilities<A>& rho, int64_t first, const A* z, const A* mean, const A* inverse_std,
                     int64_t stride, A* dz, A* scratch, double* first_moment, double* second_moment) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  int64_t some[kGradBlock], count = rho.count;
  const int64_t* active = rho.active;
  if (!rho.full) {
    active = some, count = 0;
    for (int64_t a = 0; a < rho.count; ++a) {
      some[count] = rho.active[a];
      count += !all_zero<components>(rho.value + rho.active[a] * kGradColumns + first);
    }
    if (count == 0) return;
  }
  for (int64_t d = 0; d < stride; d += lanes) {
    Vector<A> m[components], factor[components], sum[components] = {}, square[components] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < components; ++c) {
      const Vector<A> s = load(inverse_std + c * stride + d);
      m[c] = load(mean + c * stride + d), factor[c] = kOrdinary ? s * s : s;
    }
    for (int64_t a = 0; a < count; ++a) {
      const A* weight = rho.value + active[a] * kGradColumns + first;
      const Vector<A> here = load(z + active[a] * stride + d);
      Vector<A> pull = load(dz + active[a] * stride + d);
#pragma GCC unroll 8
      for (int64_t c = 0; c < components; ++c) {
        const Vector<A> t = kOrdinary ? here - m[c] : (here - m[c]) * factor[c], weighted = weight[c] * t;
        sum[c] += weighted;
        square[c] += weighted * t;
        pull += weighted * factor[c];
      }
      store(dz + active[a] * stride + d, pull);
    }
#pragma GCC unroll 8
    for (int64_t c = 0; c < components; ++c) {
      const Vector<A> s = load(inverse_std + c * stride + d);
      store(scratch + c * stride + d, kOrdinary ? sum[c] * s : sum[c]);
      store(scratch + (components + c) * stride + d, kOrdinary ? square[c] * factor[c] : square[c]);
    }
  }
  const int64_t size = components * stride;
  for (int64_t i = 0; i < size; ++i) first_moment[i] += scratch[i];
  for (int64_t i = 0; i < size; ++i) second_moment[i] += scratch[size + i];
}

// The backward pass. Every task forms the log-joints of a group of rows of the slab with a group of components once,
// and adds what they give both: components keep a sum per group of rows, rows a sum per group of components.
template <typename T, typename A = Accumulate<T>>
class Backward {
 public:
  Backward(const T* points, const Components<A>& mixture, int64_t rows, const A* row_grad, const A* row_lse)
      : z(points), c(mixture), N(rows), grad(row_grad), lse(row_lse) {
    const int64_t row_groups_kept = std::clamp(kMomentValues / (c.K * c.padded), int64_t{1}, kGradTasks);
    const int64_t column_parts = kGradTasks / std::min(row_groups_kept, kSideBySide);
    columns_per_group = round_up((c.K + column_parts - 1) / column_parts, kGradColumns);
    column_groups = (c.K + columns_per_group - 1) / columns_per_group;
    row_groups = std::min({(kGradTasks + column_groups - 1) / column_groups, (N + kGradRows - 1) / kGradRows,
                           row_groups_kept});
    const int64_t fitting = kSlabValues / (column_groups * c.padded) / kGradBlock * kGradBlock;
    slab_rows = std::min(N, std::max(fitting, row_groups * kGradRows));
    rows_per_group = row_groups == 0 ? 0 : round_up((slab_rows + row_groups - 1) / row_groups, kGradBlock);
    first_moment = uninitialised<double>(row_groups * c.K * c.padded);
    second_moment = uninitialised<double>(row_groups * c.K * c.padded);
    mass = uninitialised<double>(row_groups * c.K);
    pull = uninitialised<A>(column_groups * slab_rows * c.padded);
    const A largest_grad = largest_magnitude(grad, N);
    ordinary = c.ordinary && largest_magnitude(z, N * c.D) <= A(0x1p20) && largest_grad >= A(0x1p-40) &&
               largest_grad <= A(0x1p40);
  }

  template <typename W>
  void run(T* dz, T* dmean, T* dlog_std, W* dlog_weight) {
    const int64_t grain = tasks_per_thread(3.0 * rows_per_group * columns_per_group * c.D);
    for (int64_t slab = 0; slab < N; slab += slab_rows) {
      torch::stable::parallel_for(0, row_groups * column_groups, grain, [&](int64_t begin, int64_t end) {
        Workspace space(c);
        for (int64_t task = begin; task < end; ++task) group(slab, task % row_groups, task / row_groups, space);
      });
      finish_rows(slab, dz);
    }
    finish_components(dmean, dlog_std, dlog_weight);
  }

 private:
  struct Workspace {
    Buffer<A> columns, rows, pull;  // a block of rows of z column by column and row by row, and its dz so far
    Buffer<A> sums;                 // of components
    Buffer<double> total;
    Responsibilities<A> rho;

    explicit Workspace(const Components<A>& c)
        : columns(uninitialised<A>(kGradBlock * c.D)), rows(zeros<A>(kGradBlock * c.padded)),
          pull(uninitialised<A>(kGradBlock * c.padded)), sums(uninitialised<A>(2 * kPulls * c.padded)),
          total(uninitialised<double>(kGradBlock * c.padded)) {}
  };

  void group(int64_t slab, int64_t row_group, int64_t column_group, Workspace& space) {
    const int64_t start = slab + row_group * rows_per_group;
    const int64_t stop = std::min({start + rows_per_group, slab + slab_rows, N});
    const int64_t first_column = column_group * columns_per_group;
    const int64_t last_column = std::min(first_column + columns_per_group, c.K);
    if (slab == 0) {
      const int64_t component = row_group * c.K + first_column, components = last_column - first_column;
      std::fill_n(mass.get() + component, components, 0.0);
      std::fill_n(first_moment.get() + component * c.padded, components * c.padded, 0.0);
      std::fill_n(second_moment.get() + component * c.padded, components * c.padded, 0.0);
    }
    for (int64_t first = start; first < stop; first += kGradBlock) {
      const int64_t rows = std::min(stop - first, kGradBlock), values = rows * c.padded;
      for (int64_t i = 0; i < rows; i += kRowBlock) {
        const int64_t here = std::min(rows - i, kRowBlock);
        copy_transposed<kRowBlock>(z + (first + i) * c.D, here, c.D, space.columns.get() + i * c.D);
      }
      copy_rows(z, first, rows, c.D, space.rows.get(), c.padded);
      for (int64_t i = 0; i < values; ++i) space.total[i] = 0;
      for (int64_t k = first_column; k < last_column; k += kGradColumns) {
        tile(row_group, first, rows, k, std::min(last_column - k, kGradColumns), space);
      }
      A* to = pull.get() + (column_group * slab_rows + first - slab) * c.padded;
      for (int64_t i = 0; i < values; ++i) to[i] = static_cast<A>(space.total[i]);
    }
  }

  void tile(int64_t row_group, int64_t first, int64_t rows, int64_t k, int64_t columns, Workspace& space) {
    Responsibilities<A>& rho = space.rho;
    for (int64_t i = 0; i < rows; i += kRowBlock) {
      const int64_t here = std::min(rows - i, kRowBlock);
      joint_tile(space.columns.get() + i * c.D, c, k, here, columns, rho.value + i * kGradColumns, kGradColumns);
    }
    rho.from_joints(rows, columns, lse + first, grad + first);
    if (rho.count == 0) return;
    rho.add_to_mass(columns, mass.get() + row_group * c.K + k);
    for (int64_t i = 0; i < rows * c.padded; ++i) space.pull[i] = 0;
    int64_t j = 0;
    const auto exchange_with = [&](auto components) {
      const int64_t row = (k + j) * c.padded, moment = (row_group * c.K + k + j) * c.padded;
      const auto function = ordinary ? exchange<true, components, A> : exchange<false, components, A>;
      function(rho, j, space.rows.get(), c.mean_rows.get() + row, c.inverse_std_rows.get() + row, c.padded,
               space.pull.get(), space.sums.get(), first_moment.get() + moment, second_moment.get() + moment);
      j += components;
    };
    while (!rho.overflow && j + kPulls <= columns) exchange_with(std::integral_constant<int64_t, kPulls>{});
    while (j < columns) exchange_with(std::integral_constant<int64_t, 1>{});
    for (int64_t i = 0; i < rows * c.padded; ++i) space.total[i] += space.pull[i];
  }

  // dz = −Σ_k ρ t/std
  void finish_rows(int64_t slab, T* dz) const {
    const int64_t rows = std::min(N - slab, slab_rows);
    torch::stable::parallel_for(0, rows, tasks_per_thread(column_groups * c.D), [&](int64_t begin, int64_t end) {
      const auto total = uninitialised<double>(c.D);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t d = 0; d < c.D; ++d) total[d] = 0;
        for (int64_t q = 0; q < column_groups; ++q) {
          const A* part = pull.get() + (q * slab_rows + i) * c.padded;
          for (int64_t d = 0; d < c.D; ++d) total[d] += part[d];
        }
        for (int64_t d = 0; d < c.D; ++d) dz[(slab + i) * c.D + d] = static_cast<T>(-total[d]);
      }
    });
  }

  // dmean = Σ_n ρ t/std, dlog_std = Σ_n ρ (t² − 1), dlog_weight = Σ_n ρ
  template <typename W>
  void finish_components(T* dmean, T* dlog_std, W* dlog_weight) const {
    torch::stable::parallel_for(0, c.K, tasks_per_thread(4.0 * row_groups * c.D), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const double total = sum_of_groups(mass.get() + k, c.K);
        dlog_weight[k] = static_cast<W>(total);
        for (int64_t d = 0; d < c.D; ++d) {
          const int64_t at = k * c.padded + d, stride = c.K * c.padded;
          dmean[k * c.D + d] = static_cast<T>(sum_of_groups(first_moment.get() + at, stride) * c.inverse_std_rows[at]);
          dlog_std[k * c.D + d] = static_cast<T>(sum_of_groups(second_moment.get() + at, stride) - total);
        }
      }
    });
  }

  double sum_of_groups(const double* values, int64_t stride) const {
    double total = 0;
    for (int64_t p = 0; p < row_groups; ++p) total += values[p * stride];
    return total;
  }

  const T* z;
  const Components<A>& c;
  int64_t N;
  const A *grad, *lse;
  int64_t columns_per_group, column_groups, rows_per_group, row_groups, slab_rows;
  bool ordinary;  // whether sums of ρ (z − mean) and of its square cannot leave the range of A where those of t do not
  Buffer<double> first_moment, second_moment, mass;  // [row_groups, K, padded], the last [row_groups, K]
  Buffer<A> pull;                                    // [column_groups, slab_rows, padded]
};

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
                                     const std::optional<Tensor>& log_weight, bool with_rows) {
  const Tensor dense_mean = as_contiguous(mean), dense_std = as_contiguous(log_std);
  const Tensor dense_weight = log_weight ? as_contiguous(*log_weight) : Tensor();
  const T* weight = log_weight ? data<T>(dense_weight) : nullptr;
  return {data<T>(dense_mean), data<T>(dense_std), weight, mean.size(0), mean.size(1), with_rows};
}

Tensor gaussian_logsumexp(Tensor z, Tensor mean, Tensor log_std, std::optional<Tensor> log_weight) {
  check("gaussian_logsumexp", z, mean, log_std, log_weight);
  const Tensor lse = new_tensor(z, {z.size(0)}, accumulation_type(z.scalar_type())), dense = as_contiguous(z);
  dispatch_floating("gaussian_logsumexp", "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto c = components<T>(mean, log_std, log_weight, false);
    forward(data<T>(dense), c, z.size(0), mutable_data<Accumulate<T>>(lse));
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
    const Components<A> c = components<T>(mean, log_std, log_weight, true);
    Backward<T> backward(points, c, N, row_grad, row_lse);
    T *to_z = mutable_data<T>(dz), *to_mean = mutable_data<T>(dmean), *to_log_std = mutable_data<T>(dlog_std);
    if (log_weight) {
      backward.run(to_z, to_mean, to_log_std, mutable_data<T>(dlog_weight));
    } else {
      backward.run(to_z, to_mean, to_log_std, mutable_data<A>(dlog_weight));
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
