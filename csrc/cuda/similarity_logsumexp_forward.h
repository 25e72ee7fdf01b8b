// similarity_logsumexp on tensor cores, for float32, bfloat16 and float16: the forward pass.
//
// A block takes up to 16×16 tiles. Where all of a warp's scores lie within ±64, exp(score) needs no maximum to be taken
// off, and one exp per score serves its row and its column; otherwise each row and column has its own maximum.
#pragma once

#include "similarity_logsumexp_groups.h"
#include "similarity_logsumexp_tile.h"

namespace ncpvae::cuda {

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

// Without tensor cores, for scores that are not finite.
__device__ __forceinline__ void add_slowly(float scale, const Source<float>& z, const Source<float>& x,
                                           const Lane& lane, int row_tile, int column_tile, Partial<float>* rows,
                                           Partial<float>* columns) {
  const int height = size_of_tile(z, row_tile), width = size_of_tile(x, column_tile);
  for_each_dot(z, x, lane, row_tile, column_tile, [&](int r, int c, float dot) {
    const float score = r < height && c < width ? instruction::multiply_and_round(scale, dot) : -INFINITY;
    RunningLogSumExp<float> row;
    row.add(score);
    merge_into(columns[c], {row.max, row.sum});
    merge_lanes(row, 1, kWarp / 2);
    if (lane.lane == 0) merge_into(rows[r], {row.max, row.sum});
  });
}

// From dot products to scores, −∞ where there are none, and on to the logsumexps.
template <typename T>
__device__ __forceinline__ void add_scores(Scores& score, float scale, const Source<T>& z, const Source<T>& x,
                                           const Lane& lane, int row_tile, int column_tile, Partial<float>* rows,
                                           Partial<float>* columns) {
  const int height = size_of_tile(z, row_tile), width = size_of_tile(x, column_tile);
  const bool whole = height == kBlock && width == kBlock;
  bool plain = true, finite = true;
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& value = score[m][n][i];
        value = instruction::multiply_and_round(scale, value);
        plain = plain && fabsf(value) <= kPlainRange;
        finite = finite && fabsf(value) < INFINITY;
        if (!whole && (lane.row(m, i) >= height || lane.column(n, i) >= width)) value = -INFINITY;
      }
    }
  }
  if (ballot(!plain) == 0) {
    add_plain(score, lane, rows, columns);
    return;
  }
  if constexpr (kMayBreak<T>) {
    if (ballot(!finite) != 0) {
      add_slowly(scale, z, x, lane, row_tile, column_tile, rows, columns);
      return;
    }
  }
  add_any(score, lane, rows, columns);
}

// Two blocks on a multiprocessor leave a thread 128 registers, which the split operands of float32 exceed by a few. It
// has one block: its time goes into products, and little is gained by overlapping them with the exps of another.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads, std::is_same_v<T, float> ? 1 : 2)
    both_directions_mma(Source<T> z, Source<T> x, const float* scale, Groups groups,
                        Partial<float>* row_partials,     // [N, column groups]
                        Partial<float>* column_partials)  // [K, row groups]
{
  auto& memory = *static_cast<ForwardMemory*>(instruction::dynamic_shared_memory());
  const Lane lane;
  const int thread = threadIdx.x, stages = count_stages(z);
  constexpr Partial<float> kNothing{-INFINITY, 0};

  for (int64_t block = blockIdx.x; block < groups.row_groups * groups.column_groups; block += gridDim.x) {
    // Tiles and stages are counted in 32 bits: memory for 2^31 of them does not exist, and registers are short.
    const int tiles = static_cast<int>(groups.tiles);
    const int row_group = static_cast<int>(block / groups.column_groups), first_row_tile = row_group * tiles;
    const int column_group = static_cast<int>(block % groups.column_groups), first_column_tile = column_group * tiles;
    const int end_row_tile = first_row_tile + min_int(groups.row_tiles - first_row_tile, tiles);
    const int end_column_tile = first_column_tile + min_int(groups.column_tiles - first_column_tile, tiles);
    const int columns = (end_column_tile - first_column_tile) * kBlock;
    for (int w = 0; w < kWarpRows; ++w) {
      for (int c = thread; c < columns; c += kBlockThreads) memory.columns[w][c] = kNothing;
    }
    for (int w = 0; w < kWarpColumns; ++w) {
      if (thread < kBlock) memory.rows[w][thread] = kNothing;
    }

    int buffer = 0;
    copy_stage(memory.stages[0], z, x, first_row_tile, first_column_tile, 0);
    for (int row_tile = first_row_tile; row_tile < end_row_tile; ++row_tile) {
      for (int column_tile = first_column_tile; column_tile < end_column_tile; ++column_tile) {
        Scores score;
        clear(score);
        for (int s = 0; s < stages; ++s, buffer ^= 1) {
          instruction::wait_for_copies();
          __syncthreads();  // the stage has landed for all, and nobody reads the other one any more
          const bool same_tile = s + 1 < stages, same_row = same_tile || column_tile + 1 < end_column_tile;
          if (same_row || row_tile + 1 < end_row_tile) {
            copy_stage(memory.stages[buffer ^ 1], z, x, same_row ? row_tile : row_tile + 1,
                       same_tile  ? column_tile
                       : same_row ? column_tile + 1
                                  : first_column_tile,
                       same_tile ? s + 1 : 0);
          }
          multiply_scores<T, false>(score, memory.stages[buffer], lane);
        }
        add_scores(score, *scale, z, x, lane, row_tile, column_tile, memory.rows[lane.warp_column],
                   memory.columns[lane.warp_row] + (column_tile - first_column_tile) * kBlock);
      }
      __syncthreads();
      if (thread < kBlock) {
        RunningLogSumExp<float> state;
        for (int w = 0; w < kWarpColumns; ++w) {
          merge(state, memory.rows[w][thread]);
          memory.rows[w][thread] = kNothing;
        }
        const int64_t at = int64_t{row_tile} * kBlock + thread;
        if (at < z.rows) row_partials[at * groups.column_groups + column_group] = {state.max, state.sum};
      }
    }
    for (int c = thread; c < columns; c += kBlockThreads) {
      RunningLogSumExp<float> state;
      for (int w = 0; w < kWarpRows; ++w) merge(state, memory.columns[w][c]);
      const int64_t at = int64_t{first_column_tile} * kBlock + c;
      if (at < x.rows) column_partials[at * groups.row_groups + row_group] = {state.max, state.sum};
    }
    __syncthreads();  // before the next share begins all this anew
  }
}

}  // namespace ncpvae::cuda
