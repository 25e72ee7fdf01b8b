// similarity_logsumexp on tensor cores, for float32, bfloat16 and float16: the backward pass.
//
// A block owns 128 rows. It forms a tile of scores again, turns it into gradients
//     grad_i · exp(score − lse_i) + grad_j · exp(score − lse_j) = exp(score − m) · (grad_i · exp(m − lse_i) + …),
// with one exp where the tile's logsumexps lie close to their maximum m, and multiplies it with the columns' vectors.
// The same kernel with z and x exchanged gives the other side: to form scores once for both, either atomics or parts
// of N·K/128·D values would be needed. No atomics: every sum has one order.
#pragma once

#include "similarity_logsumexp_tile.h"

namespace ncpvae::cuda {

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
  double scale_sums[kBlockThreads], warp_sums[kBlockWarps];
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

// The gradient of a row's or column's logsumexp, and that logsumexp: as they are, or, where all of a warp's scores share
// `origin`, with the gradient taken relative to it.
struct Weight {
  float grad, lse;
};
template <bool shared>
__device__ __forceinline__ Weight weight(float grad, float lse, float origin) {
  return shared ? Weight{grad * fast_exp(origin - lse), origin} : Weight{grad, lse};
}

// Turns dot products into the gradients of the scores, in shared memory; Σ gradient · dot of this thread's.
template <bool shared, typename T>
__device__ __forceinline__ float place_gradient(BackwardMemory<T>& memory, const Scores& dot, float scale,
                                                const float* boost, const Lane& lane, int height, int width,
                                                float origin) {
  const bool whole = height == kBlock && width == kBlock;
  const float power = kBoosted<T> ? *boost : 1.0f;
  Weight columns[kEights];
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int c = lane.column(j / 2, j % 2);
    columns[j] = weight<shared>(memory.other_grad[c], memory.other_lse[c], origin);
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int m = j / 2, first = j % 2 * 2, r = lane.row(m, first);
    const Weight row = weight<shared>(memory.own_grad[r], memory.own_lse[r], origin);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      float gradient[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Weight& column = columns[2 * n + i];
        const float product = dot[m][n][first + i], score = instruction::multiply_and_round(scale, product);
        gradient[i] = shared ? fast_exp(score - origin) * (row.grad + column.grad)
                             : row.grad * fast_exp(score - row.lse) + column.grad * fast_exp(score - column.lse);
        const bool here = whole || (r < height && lane.column(n, i) < width);
        sum = here ? fmaf(gradient[i], product, sum) : sum;
        gradient[i] = here ? gradient[i] : 0;
        if constexpr (kBoosted<T>) gradient[i] *= power;
      }
      place<T>(memory.gradient, r, lane.column(n, 0), gradient[0], gradient[1]);
    }
  }
  return sum;
}

// The same without tensor cores, for dot products that are not finite.
__device__ __forceinline__ float place_slowly(BackwardMemory<float>& memory, const Side<float>& own,
                                              const Side<float>& other, int row_tile, int column_tile, float scale,
                                              const Lane& lane, int height, int width) {
  float sum = 0;
  for_each_dot(own.vectors, other.vectors, lane, row_tile, column_tile, [&](int r, int c, float dot) {
    const bool here = r < height && c < width;
    const float score = instruction::multiply_and_round(scale, dot);
    const float gradient = memory.own_grad[r] * fast_exp(score - memory.own_lse[r]) +
                           memory.other_grad[c] * fast_exp(score - memory.other_lse[c]);
    memory.gradient[r * kGradientPitch<float> + c] = here ? as_word(gradient) : 0;
    sum = here ? fmaf(gradient, dot, sum) : sum;
  });
  return sum;
}

template <typename T>
__device__ __forceinline__ float place_gradient(BackwardMemory<T>& memory, const Scores& dot, const Side<T>& own,
                                                const Side<T>& other, int row_tile, int column_tile, float scale,
                                                const float* boost, const Lane& lane) {
  const int height = size_of_tile(own.vectors, row_tile), width = size_of_tile(other.vectors, column_tile);
  if constexpr (kMayBreak<T>) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kProducts * kProducts * 4; ++i) {
      finite = finite && fabsf(dot[i / 16][i / 4 % 4][i % 4]) < INFINITY;
    }
    if (ballot(!finite) != 0) {
      return place_slowly(memory, own, other, row_tile, column_tile, scale, lane, height, width);
    }
  }
  float greatest = -INFINITY, least = INFINITY;
  bool numbers = true;
  const auto look_at = [&](float lse) {
    greatest = fmaxf(greatest, lse), least = fminf(least, lse);
    numbers = numbers && !std::isnan(lse);
  };
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    look_at(memory.own_lse[lane.row(j / 2, j % 2 * 2)]);
    look_at(memory.other_lse[lane.column(j / 2, j % 2)]);
  }
  greatest = warp_max(greatest);
  const bool shared = numbers && greatest - least <= kSharedRange;  // not where both are infinite
  return ballot(!shared) == 0
             ? place_gradient<true>(memory, dot, scale, boost, lane, height, width, greatest)
             : place_gradient<false>(memory, dot, scale, boost, lane, height, width, 0.0f);
}

// f(value of `sum`, its element of a split's part of the output, which begins at the tile's first row and `dim`): a
// thread's elements are only ever its own.
template <typename F>
__device__ __forceinline__ void for_each_element(Scores& sum, float* part, int64_t dims, int64_t dim, int height,
                                                 const Lane& lane, F f) {
  const int width = min_int(dims - dim, kBlock);
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    const int m = j / 2, first = j % 2 * 2, r = lane.row(m, first);
    float* const row = part + r * dims + dim;
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = lane.column(n, i);
        if (r < height && d < width) f(sum[m][n][first + i], row[d]);
      }
    }
  }
}

// What a block copies, in order: for each tile the stages of its scores, then, for every kBlock dimensions, those of the
// columns' vectors.
struct Position {
  int tile, column = -1;  // of the tile, for vectors
  int step = 0;           // stage of the scores, or kBlock dimensions of the vectors

  template <typename T>
  __device__ __forceinline__ void advance(int stages, int chunks) {
    if (column < 0) {
      if (++step == stages) step = 0, column = 0;
      return;
    }
    column += kStageDims<T>;
    if (column < kBlock) return;
    column = 0;
    if (++step == chunks) step = 0, column = -1, ++tile;
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
  const int64_t dims = own.vectors.dims;
  const int stages = count_stages(own.vectors), chunks = static_cast<int>((dims + kBlock - 1) / kBlock);
  for (int64_t block = blockIdx.x; block < shares.blocks(); block += gridDim.x) {
    const int row_tile = static_cast<int>(block / shares.splits), height = size_of_tile(own.vectors, row_tile);
    const int first_tile = static_cast<int>(shares.first_tile(block)), end_tile = static_cast<int>(shares.end_tile(block));
    float* const part = parts + (block % shares.splits * own.vectors.rows + int64_t{row_tile} * kBlock) * dims;
    Scores sum;
    memory.scale_sums[thread] = 0;  // not in a register: they are short

    Position next{first_tile};
    int buffer = 1;
    const auto copy_next = [&](int to) {
      if (next.tile >= end_tile) return;
      if (next.column < 0) {
        copy_stage(memory.stages[to], own.vectors, other.vectors, row_tile, next.tile, next.step);
      } else {
        copy_block<kStageDims<T>, kBlock / kPerWord<T>, kVectorPitch<T>>(
            memory.stages[to], other.vectors, int64_t{next.tile} * kBlock + next.column,
            int64_t{next.step} * kBlock);
      }
      next.template advance<T>(stages, chunks);
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
      const int64_t at = int64_t{row_tile} * kBlock + (thread < height ? thread : height - 1);
      memory.own_grad[thread] = own.grad[at], memory.own_lse[thread] = own.lse[at];
    }

    for (int tile = first_tile; tile < end_tile; ++tile) {
      const int width = size_of_tile(other.vectors, tile);
      if (thread < kBlock) {
        const int64_t at = int64_t{tile} * kBlock + (thread < width ? thread : width - 1);
        memory.other_grad[thread] = other.grad[at], memory.other_lse[thread] = other.lse[at];
      }
      Scores dot;
      clear(dot);
      for (int s = 0; s < stages; ++s) multiply_scores<T, exchanged>(dot, stage(), lane);
      memory.scale_sums[thread] += place_gradient(memory, dot, own, other, row_tile, tile, *scale, boost, lane);

      // The sums of up to kBlock dimensions stay in registers over all tiles; more than that wait in memory. So do those
      // of float32, whose operands need the registers.
      const bool stays = sizeof(T) == 2 && dims <= kBlock, begin = tile == first_tile, end = tile + 1 == end_tile;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t dim = int64_t{chunk} * kBlock;
        if (begin || !stays) clear(sum);
        if (!begin && !stays) {
          for_each_element(sum, part, dims, dim, height, lane, [](float& value, float element) { value = element; });
        }
        for (int c = 0; c < kBlock; c += kStageDims<T>) {
          multiply_gradient(sum, memory, stage(), lane, c, min_int(dims - dim, kBlock));
        }
        if (end || !stays) {
          const float factor = !end ? 1.0f : kBoosted<T> ? *scale / *boost : *scale;
          for_each_element(sum, part, dims, dim, height, lane,
                           [=](float value, float& element) { element = factor * value; });
        }
      }
    }
    double scale_sum = warp_sum(memory.scale_sums[thread]);
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
