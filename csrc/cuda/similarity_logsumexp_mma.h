// The kernels of similarity_logsumexp on tensor cores, for float32, bfloat16 and float16.
//
// Forward: a block takes up to 16×16 tiles. Where all of a warp's scores lie within ±64, exp(score) needs no maximum to
// be taken off, and one exp per score serves its row and its column; otherwise each row and column has its own maximum.
// Backward: a block owns 128 rows. It forms a tile of scores again, turns it into gradients
//     grad_i · exp(score − lse_i) + grad_j · exp(score − lse_j) = exp(score − m) · (grad_i · exp(m − lse_i) + …),
// with one exp where the tile's logsumexps lie close to their maximum m, and multiplies it with the columns' vectors.
// The same kernel with z and x exchanged gives the other side: parts of the one gradient for each block of the other
// would take N·K/128·D memory. No atomics: every sum has one order.
#pragma once

#include "similarity_logsumexp_groups.h"
#include "similarity_logsumexp_tile.h"

namespace ncpvae::cuda {

// ---- forward -------------------------------------------------------------------------------------------------

constexpr float kPlainRange = 64;  // of scores whose exp, and sums of it, float32 holds with room to spare

struct ForwardMemory {
  alignas(16) uint32_t stages[2][2 * kOperandWords];
  Partial<float> rows[kWarpColumns][kBlock];  // by the warps along the other side, which do not wait for each other
  Partial<float> columns[kWarpRows][kGroup * kBlock];
};

__device__ __forceinline__ void merge_into(Partial<float>& state, const Partial<float>& other) {
  RunningLogSumExp<float> running{state.max, state.sum};
  merge(running, other);
  state = {running.max, running.sum};
}

// Sums over the lanes that differ in the bits `mask`, mask/2, …: each ends with `left` of the values, those of its own
// number among these lanes.
template <int left>
__device__ __forceinline__ void scatter_sums(float (&values)[kEights], int lane, int mask) {
#pragma unroll
  for (int half = kEights / 2; half >= left; half /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? values[half + i] : values[i], give = upper ? values[i] : values[half + i];
      values[i] = keep + shuffle_xor(give, mask);
    }
  }
}

// One exp for each score, which its row and its column share.
__device__ __forceinline__ void add_plain(const Scores& score, const Lane& lane, Partial<float>* rows,
                                          Partial<float>* columns) {
  float row_sum[kEights] = {}, column_sum[kEights] = {};
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float e = fast_exp(score[m][n][i]);
        row_sum[2 * m + i / 2] += e;
        column_sum[2 * n + i % 2] += e;
      }
    }
  }
  scatter_sums<2>(row_sum, lane.lane, 2);
  scatter_sums<1>(column_sum, lane.lane, 16);
  const auto partial = [](float sum) { return Partial<float>{sum > 0 ? 0 : -INFINITY, sum}; };
  merge_into(rows[lane.row(lane.member, 0)], partial(row_sum[0]));
  merge_into(rows[lane.row(lane.member, 2)], partial(row_sum[1]));
  merge_into(columns[lane.column(lane.group / 2, lane.group % 2)], partial(column_sum[0]));
}

// The values of one row or column in the lanes that differ in the bits of `low` to `high`.
__device__ __forceinline__ Partial<float> summarise_lanes(const float (&values)[kEights], int low, int high) {
  float max = values[0];
#pragma unroll
  for (int i = 1; i < kEights; ++i) max = values[i] > max ? values[i] : max;
  const float origin = fabsf(max) < INFINITY ? max : 0;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEights; ++i) sum += fast_exp(values[i] - origin);
  RunningLogSumExp<float> state;
  merge(state, Partial<float>{std::isnan(sum) ? NAN : max, sum});
  merge_lanes(state, low, high);
  return {state.max, state.sum};
}

// Every row and every column with a maximum of its own: for any scores.
__device__ __forceinline__ void add_any(const Scores& score, const Lane& lane, Partial<float>* rows,
                                        Partial<float>* columns) {
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    float values[kEights];
#pragma unroll
    for (int i = 0; i < kEights; ++i) values[i] = score[j / 2][i / 2][j % 2 * 2 + i % 2];
    const Partial<float> row = summarise_lanes(values, 1, 2);
    if (lane.member == j / 2) merge_into(rows[lane.row(j / 2, j % 2 * 2)], row);
#pragma unroll
    for (int i = 0; i < kEights; ++i) values[i] = score[i / 2][j / 2][i % 2 * 2 + j % 2];
    const Partial<float> column = summarise_lanes(values, 4, 16);
    if (lane.group == j) merge_into(columns[lane.column(j / 2, j % 2)], column);
  }
}

// From dot products to scores, −∞ where there are none, and on to the logsumexps.
template <typename T>
__device__ __forceinline__ void add_scores(Scores& score, float scale, const Source<T>& z, const Source<T>& x,
                                           const Lane& lane, int64_t row, int64_t column, Partial<float>* rows,
                                           Partial<float>* columns) {
  const bool whole = row + kBlock <= z.rows && column + kBlock <= x.rows;
  bool plain = true;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = score[m][n][i];
        value = instruction::multiply_and_round(scale, value);
        plain = plain && fabsf(value) <= kPlainRange;
        if (!whole && !exists(z, x, row + lane.row(m, i), column + lane.column(n, i))) value = -INFINITY;
      }
    }
  }
  if (ballot(!plain) == 0) {
    add_plain(score, lane, rows, columns);
  } else {
    add_any(score, lane, rows, columns);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    both_directions_mma(Source<T> z, Source<T> x, const float* scale, Groups groups,
                        Partial<float>* row_partials,     // [N, column groups]
                        Partial<float>* column_partials)  // [K, row groups]
{
  auto& memory = *static_cast<ForwardMemory*>(instruction::dynamic_shared_memory());
  const Lane lane;
  const int thread = threadIdx.x;
  constexpr Partial<float> kNothing{-INFINITY, 0};

  for (int64_t block = blockIdx.x; block < groups.row_groups * groups.column_groups; block += gridDim.x) {
    const int64_t row_group = block / groups.column_groups, column_group = block % groups.column_groups;
    const int64_t first_row = row_group * groups.tiles * kBlock, first_column = column_group * groups.tiles * kBlock;
    const int row_tiles = min_int(groups.row_tiles - row_group * groups.tiles, static_cast<int>(groups.tiles));
    const int column_tiles = min_int(groups.column_tiles - column_group * groups.tiles, static_cast<int>(groups.tiles));
    for (int w = 0; w < kWarpRows; ++w) {
      for (int c = thread; c < column_tiles * kBlock; c += kBlockThreads) memory.columns[w][c] = kNothing;
    }
    for (int w = 0; w < kWarpColumns; ++w) {
      if (thread < kBlock) memory.rows[w][thread] = kNothing;
    }

    // The stage that is on its way; it runs ahead over the ends of tiles.
    int64_t next_dim = 0;
    int next_row = 0, next_column = 0, buffer = 0;
    copy_stage(memory.stages[0], z, x, first_row, first_column, 0);
    for (int r = 0; r < row_tiles; ++r) {
      const int64_t row = first_row + r * kBlock;
      for (int c = 0; c < column_tiles; ++c) {
        const int64_t column = first_column + c * kBlock;
        Scores score;
        clear(score);
        for (int64_t dim = 0; dim < z.dims; dim += kStageDims<T>, buffer ^= 1) {
          instruction::wait_for_copies();
          __syncthreads();  // the stage has landed for all, and nobody reads the other one any more
          next_dim += kStageDims<T>;
          if (next_dim >= z.dims) {
            next_dim = 0;
            if (++next_column == column_tiles) next_column = 0, ++next_row;
          }
          if (next_row < row_tiles) {
            copy_stage(memory.stages[buffer ^ 1], z, x, first_row + next_row * kBlock,
                       first_column + next_column * kBlock, next_dim);
          }
          multiply_scores<T, false>(score, memory.stages[buffer], lane);
        }
        mend(score, z, x, lane, row, column);
        add_scores(score, *scale, z, x, lane, row, column, memory.rows[lane.warp_column],
                   memory.columns[lane.warp_row] + c * kBlock);
      }
      __syncthreads();
      if (thread < kBlock) {
        RunningLogSumExp<float> state;
        for (int w = 0; w < kWarpColumns; ++w) {
          merge(state, memory.rows[w][thread]);
          memory.rows[w][thread] = kNothing;
        }
        if (row + thread < z.rows) {
          row_partials[(row + thread) * groups.column_groups + column_group] = {state.max, state.sum};
        }
      }
    }
    for (int c = thread; c < column_tiles * kBlock; c += kBlockThreads) {
      RunningLogSumExp<float> state;
      for (int w = 0; w < kWarpRows; ++w) merge(state, memory.columns[w][c]);
      if (first_column + c < x.rows) {
        column_partials[(first_column + c) * groups.row_groups + row_group] = {state.max, state.sum};
      }
    }
    __syncthreads();  // before the next share begins all this anew
  }
}

// ---- backward ------------------------------------------------------------------------------------------------

// Within this range below the tile's greatest logsumexp, exp(score − greatest) serves rows and columns alike.
constexpr float kSharedRange = 32;

// One side of the scores: its vectors, the gradient of its logsumexps, and those.
template <typename T>
struct Side {
  Source<T> vectors;
  const float *grad, *lse;
};

// Gradients of scores, as words that mma takes. float16 could not hold those of a mean over many rows: they carry a
// factor, a power of two.
template <typename T>
constexpr bool kBoosted = std::is_same_v<T, Half>;
template <typename T>
constexpr int kGradientPitch = kBlock / kPerWord<T> + 4;
// Some of the columns' vectors, kStageDims of them, and kBlock of their dimensions.
template <typename T>
constexpr int kVectorPitch = kBlock / kPerWord<T> + (sizeof(T) == 4 ? 8 : 4);

template <typename T>
struct BackwardMemory {
  alignas(16) uint32_t stages[2][2 * kOperandWords];
  alignas(16) uint32_t gradient[kBlock * kGradientPitch<T>];  // [row][column]
  float own_grad[kBlock], own_lse[kBlock], other_grad[kBlock], other_lse[kBlock];
  double warp_sums[kBlockWarps];
};

// B's words of step `step`, where B's rows lie in memory as such.
template <typename T>
__device__ __forceinline__ void load_vectors(Operand<T, 2> (&b)[kProducts], const uint32_t* words, const Lane& lane,
                                             int step) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const uint32_t* const from =
          words + (step * kStepWords + lane.member) * kVectorPitch<T> + lane.first_column(n) + lane.group;
      b[n].set(0, from[0]);
      b[n].set(1, from[4 * kVectorPitch<T>]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < kProducts; n += 2) {
      uint32_t loaded[4];
      const int row = step * 2 * kStepWords + lane.lane % 16;
      instruction::load_matrices_transposed(
          loaded, words + row * kVectorPitch<T> + lane.first_column(n + lane.lane / 16) / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n + i / 2].set(i % 2, loaded[i]);
    }
  }
}

// sum += gradient · vectors for columns first … first + kStageDims of the tile, and the first `dims` dimensions.
template <typename T>
__device__ __forceinline__ void multiply_gradient(Scores& sum, const BackwardMemory<T>& memory, const uint32_t* stage,
                                                  const Lane& lane, int first, int dims) {
  const uint32_t* const gradient = memory.gradient + first / kPerWord<T>;
  multiply_stage<T, false>(
      sum, (dims + 31) / 32,
      [&](Operand<T, 4>& a, int m, int step) { load_rows<kGradientPitch<T>>(a, gradient, lane, m, step); },
      [&](Operand<T, 2>(&b)[kProducts], int step) { load_vectors(b, stage, lane, step); });
}

// The logsumexps and their gradients of this lane's rows and columns; `factor` is what exp(score − origin) takes.
struct Weights {
  float lse[kEights], factor[kEights];
};

// Two gradients of scores side by side.
template <typename T>
__device__ __forceinline__ void place(uint32_t* gradient, int row, int column, float first, float second) {
  uint32_t* const to = gradient + row * kGradientPitch<T> + column / kPerWord<T>;
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<Pack<float, 2>*>(to) = {first, second};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    *to = instruction::pack_bf16(first, second);
  } else {
    *to = instruction::pack_f16(first, second);
  }
}

// Turns dot products into the gradients of the scores, in shared memory; Σ gradient · dot of this thread's.
template <typename T>
__device__ __forceinline__ float place_gradient(BackwardMemory<T>& memory, const Scores& dot, float scale, float boost,
                                                const Lane& lane, int height, int width) {
  Weights rows, columns;
  float origin = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int r = lane.row(j / 2, j % 2 * 2), c = lane.column(j / 2, j % 2);
    rows.lse[j] = memory.own_lse[r], rows.factor[j] = memory.own_grad[r];
    columns.lse[j] = memory.other_lse[c], columns.factor[j] = memory.other_grad[c];
    origin = fmaxf(origin, fmaxf(rows.lse[j], columns.lse[j]));
  }
  origin = warp_max(origin);
  bool close = true;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    close = close && origin - rows.lse[j] <= kSharedRange && origin - columns.lse[j] <= kSharedRange;
  }
  const bool shared = ballot(!close) == 0;
  if (shared) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      rows.factor[j] *= fast_exp(origin - rows.lse[j]);
      columns.factor[j] *= fast_exp(origin - columns.lse[j]);
    }
  }
  const bool whole = height >= kBlock && width >= kBlock;
  float sum = 0;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      float gradient[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int a = 2 * m + i / 2, b = 2 * n + i % 2;
        const float score = instruction::multiply_and_round(scale, dot[m][n][i]);
        gradient[i] = shared ? fast_exp(score - origin) * (rows.factor[a] + columns.factor[b])
                             : rows.factor[a] * fast_exp(score - rows.lse[a]) +
                                   columns.factor[b] * fast_exp(score - columns.lse[b]);
        const bool here = whole || (lane.row(m, i) < height && lane.column(n, i) < width);
        if (!here) gradient[i] = 0;
        if (here) sum = fmaf(gradient[i], dot[m][n][i], sum);
        if constexpr (kBoosted<T>) gradient[i] *= boost;
      }
      place<T>(memory.gradient, lane.row(m, 0), lane.column(n, 0), gradient[0], gradient[1]);
      place<T>(memory.gradient, lane.row(m, 2), lane.column(n, 0), gradient[2], gradient[3]);
    }
  }
  return sum;
}

// Adds factor · sum to a split's own part [rows, dims] of an output, or begins it; only this thread touches these
// elements.
__device__ __forceinline__ void accumulate(float* part, int64_t rows, int64_t dims, int64_t row, int64_t dim,
                                           const Lane& lane, const Scores& sum, float factor, bool begin) {
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = row + lane.row(m, i), d = dim + lane.column(n, i);
        if (r >= rows || d >= dims) continue;
        float& element = part[r * dims + d];
        element = begin ? factor * sum[m][n][i] : fmaf(factor, sum[m][n][i], element);
      }
    }
  }
}

// What a block copies, in order: for each tile the stages of its scores, then, for every kBlock dimensions, those of the
// columns' vectors.
struct Position {
  int64_t tile, dim = 0;
  int column = -1;  // of the tile, for vectors

  template <typename T>
  __device__ __forceinline__ void advance(int64_t dims) {
    if (column < 0) {
      dim += kStageDims<T>;
      if (dim >= dims) dim = 0, column = 0;
      return;
    }
    column += kStageDims<T>;
    if (column < kBlock) return;
    column = 0, dim += kBlock;
    if (dim >= dims) dim = 0, column = -1, ++tile;
  }
};

// Gradient with respect to the vectors of `own`, as parts [splits, own rows, dims]; and, where asked for, every
// block's part of the gradient with respect to the scale.
template <typename T, bool exchanged>
__global__ void __launch_bounds__(kBlockThreads, 1)
    backward_side_mma(Side<T> own, Side<T> other, const float* scale, const float* boost, Shares shares, float* parts,
                      double* scale_parts) {
  auto& memory = *static_cast<BackwardMemory<T>*>(instruction::dynamic_shared_memory());
  const Lane lane;
  const int thread = threadIdx.x;
  const int64_t rows = own.vectors.rows, columns = other.vectors.rows, dims = own.vectors.dims;
  const float power = kBoosted<T> ? *boost : 1.0f;

  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row = block / shares.splits * kBlock, end_tile = shares.end_tile(block);
    const int height = min_int(rows - row, kBlock);
    float* const part = parts + block % shares.splits * rows * dims;
    double scale_sum = 0;
    Scores sum;

    Position next{shares.first_tile(block)};
    int buffer = 1;
    const auto copy_next = [&](int to) {
      if (next.tile >= end_tile) return;
      if (next.column < 0) {
        copy_stage(memory.stages[to], own.vectors, other.vectors, row, next.tile * kBlock, next.dim);
      } else {
        copy_block<kStageDims<T>, kBlock / kPerWord<T>, kVectorPitch<T>>(
            memory.stages[to], other.vectors, next.tile * kBlock + next.column, next.dim);
      }
      next.template advance<T>(dims);
    };
    const auto stage = [&] {
      instruction::wait_for_copies();
      __syncthreads();  // the stage has landed for all, and nobody reads the other one any more
      buffer ^= 1;
      copy_next(buffer ^ 1);
      return memory.stages[buffer];
    };
    copy_next(0);
    // Rows and columns that do not exist take the logsumexp of the last one, so that they do not widen the range.
    if (thread < kBlock) {
      const int64_t at = row + (thread < height ? thread : height - 1);
      memory.own_grad[thread] = own.grad[at], memory.own_lse[thread] = own.lse[at];
    }

    for (int64_t tile = shares.first_tile(block); tile < end_tile; ++tile) {
      const int64_t column = tile * kBlock;
      const int width = min_int(columns - column, kBlock);
      if (thread < kBlock) {
        const int64_t at = column + (thread < width ? thread : width - 1);
        memory.other_grad[thread] = other.grad[at], memory.other_lse[thread] = other.lse[at];
      }
      Scores dot;
      clear(dot);
      for (int64_t dim = 0; dim < dims; dim += kStageDims<T>) multiply_scores<T, exchanged>(dot, stage(), lane);
      mend(dot, own.vectors, other.vectors, lane, row, column);
      scale_sum += place_gradient(memory, dot, *scale, power, lane, height, width);

      // Up to kBlock dimensions stay in registers over all tiles; more than that are added up in memory.
      const bool stays = dims <= kBlock, first = tile == shares.first_tile(block), last = tile + 1 == end_tile;
      for (int64_t dim = 0; dim < dims; dim += kBlock) {
        if (first || !stays) clear(sum);
        for (int c = 0; c < kBlock; c += kStageDims<T>) {
          multiply_gradient(sum, memory, stage(), lane, c, min_int(dims - dim, kBlock));
        }
        if (last || !stays) accumulate(part, rows, dims, row, dim, lane, sum, *scale / power, first || stays);
      }
    }
    scale_sum = warp_sum(scale_sum);
    if (lane.lane == 0) memory.warp_sums[thread / kWarp] = scale_sum;
    __syncthreads();  // also before the next share begins all this anew
    if (thread == 0 && scale_parts != nullptr) {
      for (int w = 1; w < kBlockWarps; ++w) scale_sum += memory.warp_sums[w];
      scale_parts[block] = scale_sum;
    }
  }
}

// The power of two that brings the largest gradient of a score to about 2^14, a quarter of float16's range.
__global__ void __launch_bounds__(kBlockThreads)
    choose_boost(const float* grad_z, int64_t rows, const float* grad_x, int64_t columns, float* boost) {
  __shared__ float warp_z[kBlockWarps], warp_x[kBlockWarps];
  const auto largest = [](const float* values, int64_t count) {
    float most = 0;
    for (int64_t i = threadIdx.x; i < count; i += kBlockThreads) most = fmaxf(most, fabsf(values[i]));
    return warp_max(most);
  };
  const float most_z = largest(grad_z, rows), most_x = largest(grad_x, columns);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) warp_z[warp] = most_z, warp_x[warp] = most_x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float z = 0, x = 0;
  for (int w = 0; w < kBlockWarps; ++w) z = fmaxf(z, warp_z[w]), x = fmaxf(x, warp_x[w]);
  const float most = z + x;
  const bool usable = most > 1e-30f && most < 1e30f;
  *boost = usable ? exp2f(floorf(14 - log2f(most))) : 1.0f;
}

}  // namespace ncpvae::cuda
