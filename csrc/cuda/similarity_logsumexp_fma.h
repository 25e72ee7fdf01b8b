// similarity_logsumexp on the FMA pipes: the path of float64.
//
// Forward: a block keeps the running (max, sum) of a row in registers while it passes over the columns, and that of
// every column in shared memory. Backward: a block owns a tile of rows, turns each tile of scores into their gradient
// and multiplies it with the columns' vectors.
#pragma once

#include "similarity_logsumexp_groups.h"

namespace ncpvae::cuda {

// z_r · x_c for this thread's rows and columns of the tile at (row, column).
template <typename T>
__device__ __forceinline__ void dot_products(Patch<T>& dot, Stage<T>& z_stage, Stage<T>& x_stage, const Matrix<T>& z,
                                             const Matrix<T>& x, int64_t row, int64_t column) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  clear<T>(dot);
  for (int64_t dim = 0; dim < z.dims; dim += kDepth) {
    __syncthreads();  // nobody reads the stages any more
    stage_dims(z_stage, z, row, dim);
    stage_dims(x_stage, x, column, dim);
    __syncthreads();
    const int depth = min_int(z.dims - dim, kDepth);
#pragma unroll 4
    for (int d = 0; d < depth; ++d) {
      T a[kPer<T>], b[kPer<T>];
      fetch(z_stage.at[d], ty * kPer<T>, a);
      fetch(x_stage.at[d], tx * kPer<T>, b);
#pragma unroll
      for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kPer<T>; ++j) dot[i][j] = fma(a[i], b[j], dot[i][j]);
      }
    }
  }
}


template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    both_directions_fma(Matrix<T> z, Matrix<T> x, const T* scale, Groups groups,
                    Partial<T>* row_partials,     // [N, column groups]
                    Partial<T>* column_partials)  // [K, row groups]
{
  __shared__ Stage<T> z_stage, x_stage;
  __shared__ Partial<T> columns[kGroup * kTile<T>], warp_columns[kTileWarps][kTile<T>];
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide, warp = thread / kWarp;

  for (int64_t block = blockIdx.x; block < groups.row_groups * groups.column_groups; block += gridDim.x) {
    const int64_t row_group = block / groups.column_groups, column_group = block % groups.column_groups;
    const int64_t first_row_tile = row_group * groups.tiles, first_column_tile = column_group * groups.tiles;
    const int row_tiles = min_int(groups.row_tiles - first_row_tile, static_cast<int>(groups.tiles));
    const int column_tiles = min_int(groups.column_tiles - first_column_tile, static_cast<int>(groups.tiles));
    // A thread resets only what it alone read at the end of the last share, so that no barrier is needed here.
    for (int c = thread; c < column_tiles * kTile<T>; c += kTileThreads) columns[c] = {-INFINITY, 0};

    for (int r = 0; r < row_tiles; ++r) {
      const int64_t row = (first_row_tile + r) * kTile<T>;
      RunningLogSumExp<T> state[kPer<T>];
      for (int c = 0; c < column_tiles; ++c) {
        const int64_t column = (first_column_tile + c) * kTile<T>;
        Patch<T> score;
        dot_products(score, z_stage, x_stage, z, x, row, column);
#pragma unroll
        for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
          for (int j = 0; j < kPer<T>; ++j) {
            const bool exists = row + ty * kPer<T> + i < z.rows && column + tx * kPer<T> + j < x.rows;
            score[i][j] = exists ? *scale * score[i][j] : static_cast<T>(-INFINITY);
          }
          merge(state[i], summarise(score[i]));
        }
#pragma unroll
        for (int j = 0; j < kPer<T>; ++j) {
          T values[kPer<T>];
#pragma unroll
          for (int i = 0; i < kPer<T>; ++i) values[i] = score[i][j];
          RunningLogSumExp<T> down;
          merge(down, summarise(values));
          merge_lanes(down, kSide, kSide);
          if (thread % kWarp < kSide) warp_columns[warp][tx * kPer<T> + j] = {down.max, down.sum};
        }
        __syncthreads();
        if (thread < kTile<T>) {
          Partial<T>& column_state = columns[c * kTile<T> + thread];
          RunningLogSumExp<T> down;
          merge(down, column_state);
          for (int w = 0; w < kTileWarps; ++w) merge(down, warp_columns[w][thread]);
          column_state = {down.max, down.sum};
        }
      }
#pragma unroll
      for (int i = 0; i < kPer<T>; ++i) {
        merge_lanes(state[i], 1, kSide / 2);
        const int64_t at = row + ty * kPer<T> + i;
        if (tx == 0 && at < z.rows)
          row_partials[at * groups.column_groups + column_group] = {state[i].max, state[i].sum};
      }
    }
    __syncthreads();
    for (int c = thread; c < column_tiles * kTile<T>; c += kTileThreads) {
      const int64_t at = first_column_tile * kTile<T> + c;
      if (at < x.rows) column_partials[at * groups.row_groups + row_group] = columns[c];
    }
  }
}

// One side of the scores: its vectors, the gradient of its logsumexps, and those.
template <typename T>
struct Axis {
  Matrix<T> vectors;
  const T *grad, *lse;
};

// Gradient with respect to the vectors of `own`, as parts [splits, own rows, dims]; and, where asked for, every
// block's part of the gradient with respect to the scale.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kResident)
    backward_side_fma(Axis<T> own, Axis<T> other, const T* scale, Shares shares, T* parts, double* scale_parts) {
  __shared__ Stage<T> own_stage, other_stage;
  __shared__ Square<T> gradient;  // [column][row]: of the products z·x
  __shared__ double warp_sums[kTileWarps];
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const int64_t rows = own.vectors.rows, columns = other.vectors.rows, dims = own.vectors.dims;
  const T factor = *scale;

  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int64_t row = block / shares.splits * kTile<T>, my_row = row + ty * kPer<T>;
    T* const part = parts + block % shares.splits * rows * dims;
    double scale_sum = 0;
    for (int64_t tile = shares.first_tile(block); tile < shares.end_tile(block); ++tile) {
      const int64_t column = tile * kTile<T>;
      const int width = min_int(columns - column, kTile<T>), height = min_int(rows - row, kTile<T>);
      Patch<T> dot;
      T tile_sum = 0;
      dot_products(dot, own_stage, other_stage, own.vectors, other.vectors, row, column);
#pragma unroll
      for (int j = 0; j < kPer<T>; ++j) {
        const int c = tx * kPer<T> + j;
        const T grad = c < width ? other.grad[column + c] : T(0), lse = c < width ? other.lse[column + c] : T(0);
#pragma unroll
        for (int i = 0; i < kPer<T>; ++i) {
          const int r = ty * kPer<T> + i;
          T g = 0;
          if (r < height && c < width) {
            const T score = factor * dot[i][j];
            g = own.grad[row + r] * exp(score - own.lse[row + r]) + grad * exp(score - lse);
            tile_sum += g * dot[i][j];
          }
          gradient.at[c][r] = factor * g;
        }
      }
      scale_sum += tile_sum;

      for (int64_t dim = 0; dim < dims; dim += kTile<T>) {
        Patch<T> sum = {};
        for (int first = 0; first < width; first += kDepth) {
          __syncthreads();
          stage_rows(other_stage, other.vectors, column + first, dim);
          __syncthreads();
          const int depth = min_int(width - first, kDepth);
#pragma unroll 4
          for (int k = 0; k < depth; ++k) {
            T g[kPer<T>], v[kPer<T>];
            fetch(gradient.at[first + k], ty * kPer<T>, g);
            fetch(other_stage.at[k], tx * kPer<T>, v);
#pragma unroll
            for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
              for (int j = 0; j < kPer<T>; ++j) sum[i][j] = fma(g[i], v[j], sum[i][j]);
            }
          }
        }
        accumulate(part, rows, dims, my_row, dim + tx * kPer<T>, sum, tile == shares.first_tile(block));
      }
    }
    if (scale_parts == nullptr) continue;
    scale_sum = warp_sum(scale_sum);
    if (thread % kWarp == 0) warp_sums[thread / kWarp] = scale_sum;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kTileWarps; ++w) scale_sum += warp_sums[w];
      scale_parts[block] = scale_sum;
    }
  }
}

}  // namespace ncpvae::cuda
