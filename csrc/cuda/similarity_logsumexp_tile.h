// Tiles of 128×128 scores z·x on tensor cores, for both passes of similarity_logsumexp.
//
// Eight warps share a tile, two along its rows and four along its columns; a warp forms 64×32 scores from 4×4 products
// of 16×8. The operands come through shared memory, 16 words of each row at a time (16 float32 values, or 32 of 16
// bits): while one such stage is multiplied, the next is on its way. Rows lie 20 words apart, which spreads the eight
// rows of an ldmatrix over all banks.
//
// float32 values are split into two TF32 values ("3xTF32", see mma.h), and the products of 8 dimensions (16 of 16-bit
// values) are added to their sum outside the tensor core, so that a score has float32's error and not TF32's.
// Under tests/cuda_emulation, 128 dot products of 512 dimensions against float64, in units of 2^-23 · Σ|z x|: normal
// values, rms 0.09 and at most 0.26 (torch on the CPU 0.13 and 0.36); uniform positive values, where all that is
// truncated adds up, 1.1 and 3.1 (0.8 and 1.8). No GPU has measured it.
#pragma once

#include "launch.h"
#include "mma.h"
#include "tile.h"

namespace ncpvae::cuda {

constexpr int kBlock = 128;  // rows, and columns, of a tile
constexpr int kBlockWarps = 8, kBlockThreads = kBlockWarps * kWarp;
constexpr int kWarpRows = 2, kWarpColumns = 4;                    // warps along a tile's rows and columns
constexpr int kProducts = 4;                                      // of 16×8, along a warp's rows and columns
constexpr int kStageWords = 16, kStagePitch = kStageWords + 4;    // of a row
constexpr int kOperandWords = kBlock * kStagePitch;               // of a stage's one operand
constexpr int kStepWords = 8, kSteps = kStageWords / kStepWords;  // of one mma
constexpr int kEights = 2 * kProducts;                            // rows, and columns, of a warp's scores per lane

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);
template <typename T>
constexpr int kStageDims = kStageWords * kPerWord<T>;
// A contiguous [rows, dims], which can be copied in pieces of `bytes`.
template <typename T>
struct Source {
  const T* data;
  int64_t rows, dims;
  int bytes;
};

// Which scores of a tile are this lane's: value i of product (m, n) is at (row(m, i), column(n, i)).
struct Lane {
  int lane, group, member, warp_row, warp_column;

  __device__ __forceinline__ Lane() {
    const int warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    group = lane / 4;
    member = lane % 4;
    warp_row = warp / kWarpColumns;
    warp_column = warp % kWarpColumns;
  }
  __device__ __forceinline__ int first_row(int m) const { return warp_row * 64 + m * 16; }
  // A warp's columns are 32 apart, so that all warps have less to do where there are few.
  __device__ __forceinline__ int first_column(int n) const { return n * 32 + warp_column * 8; }
  __device__ __forceinline__ int row(int m, int i) const { return first_row(m) + group + i / 2 * 8; }
  __device__ __forceinline__ int column(int n, int i) const { return first_column(n) + 2 * member + i % 2; }
};

using Scores = float[kProducts][kProducts][4];

__device__ __forceinline__ void clear(Scores& scores) {
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0;
    }
  }
}

// ---- from global to shared memory ----------------------------------------------------------------------------

// to[r · pitch + w] = word w of row first_row + r, from first_dim on; zero outside the matrix. In pieces of `piece` words.
template <int rows, int words, int pitch, int piece, typename T>
__device__ __forceinline__ void copy_pieces(uint32_t* to, const Source<T>& from, int64_t first_row, int64_t first_dim) {
  constexpr int kPieces = words / piece;
#pragma unroll 1
  for (int p = threadIdx.x; p < rows * kPieces; p += kBlockThreads) {
    const int r = p / kPieces, w = p % kPieces * piece;
    const int64_t row = first_row + r, dim = first_dim + w * kPerWord<T>;
    const bool exists = row < from.rows && dim < from.dims;
    instruction::copy_async<4 * piece>(to + r * pitch + w, exists ? from.data + row * from.dims + dim : from.data,
                                       exists);
  }
}

// The same for rows of 16-bit values that begin in the middle of a word.
template <int rows, int words, int pitch, typename T>
__device__ __forceinline__ void gather_words(uint32_t* to, const Source<T>& from, int64_t first_row,
                                             int64_t first_dim) {
  const auto* const values = reinterpret_cast<const uint16_t*>(from.data);
#pragma unroll 1
  for (int p = threadIdx.x; p < rows * words; p += kBlockThreads) {
    const int r = p / words, w = p % words;
    const int64_t row = first_row + r, dim = first_dim + 2 * w;
    uint32_t word = 0;
    if (row < from.rows && dim < from.dims) word = values[row * from.dims + dim];
    if (row < from.rows && dim + 1 < from.dims) word |= static_cast<uint32_t>(values[row * from.dims + dim + 1]) << 16;
    to[r * pitch + w] = word;
  }
}

template <int rows, int words, int pitch, typename T>
__device__ __forceinline__ void copy_block(uint32_t* to, const Source<T>& from, int64_t first_row, int64_t first_dim) {
  if (from.bytes == 16) {
    copy_pieces<rows, words, pitch, 4>(to, from, first_row, first_dim);
  } else if (sizeof(T) == 4 || from.bytes == 4) {
    copy_pieces<rows, words, pitch, 1>(to, from, first_row, first_dim);
  } else {
    gather_words<rows, words, pitch>(to, from, first_row, first_dim);
  }
}

template <typename T>
__device__ __forceinline__ int count_stages(const Source<T>& side) {
  return static_cast<int>((side.dims + kStageDims<T> - 1) / kStageDims<T>);
}

// One stage of both operands.
template <typename T>
__device__ __forceinline__ void copy_stage(uint32_t* stage, const Source<T>& own, const Source<T>& other, int row_tile,
                                           int column_tile, int number) {
  const int64_t dim = int64_t{number} * kStageDims<T>;
  copy_block<kBlock, kStageWords, kStagePitch>(stage, own, int64_t{row_tile} * kBlock, dim);
  copy_block<kBlock, kStageWords, kStagePitch>(stage + kOperandWords, other, int64_t{column_tile} * kBlock, dim);
}

// ---- from shared memory to tensor cores ----------------------------------------------------------------------

// A's words of step `step` and product row m, of rows `pitch` words apart.
template <int pitch, typename T>
__device__ __forceinline__ void load_rows(Operand<T, 4>& a, const uint32_t* words, const Lane& lane, int m, int step) {
  uint32_t loaded[4];
  instruction::load_matrices(
      loaded, words + (lane.first_row(m) + lane.lane % 16) * pitch + step * kStepWords + lane.lane / 16 * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) a.set(i, loaded[i]);
}

// B's words of step `step`, where B's columns lie in memory as rows: those of the second operand's stage.
template <typename T>
__device__ __forceinline__ void load_columns(Operand<T, 2> (&b)[kProducts], const uint32_t* words, const Lane& lane,
                                             int step) {
#pragma unroll
  for (int n = 0; n < kProducts; n += 2) {
    uint32_t loaded[4];
    const int column = lane.first_column(n + lane.lane / 16) + lane.lane % 8;
    instruction::load_matrices(loaded, words + column * kStagePitch + step * kStepWords + lane.lane / 8 % 2 * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[n + i / 2].set(i % 2, loaded[i]);
  }
}

// sum += A·B over a stage, for the first `products` columns of products. The products of a step are added up in the
// tensor core and reach the sum by an addition outside it. One step at a time: with more, registers do not suffice.
template <typename T, bool exchanged, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply_stage(Scores& sum, int products, LoadA load_a, LoadB load_b) {
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    Operand<T, 2> b[kProducts];
    load_b(b, step);
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      Operand<T, 4> a;
      load_a(a, m, step);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        if (n >= products) continue;
        float part[4] = {0, 0, 0, 0};
        multiply_add<exchanged>(part, a, b[n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] += part[i];
      }
    }
  }
}

template <typename T, bool exchanged>
__device__ __forceinline__ void multiply_scores(Scores& dot, const uint32_t* stage, const Lane& lane) {
  multiply_stage<T, exchanged>(
      dot, kProducts,
      [&](Operand<T, 4>& a, int m, int step) { load_rows<kStagePitch>(a, stage, lane, m, step); },
      [&](Operand<T, 2>(&b)[kProducts], int step) { load_columns(b, stage + kOperandWords, lane, step); });
}

// ---- scores --------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ int size_of_tile(const Source<T>& side, int tile) {
  return min_int(side.rows - int64_t{tile} * kBlock, kBlock);
}

// A float32 value that is infinite, or rounds to infinity, has no split into two: its products become NaN. Where any
// of a warp's dot products is not finite, all of them are formed again without tensor cores. This is slow, and rare.
template <typename T>
constexpr bool kMayBreak = std::is_same_v<T, float>;

// f(row, column, dot) for the warp's part of a tile, by the whole warp: each lane has a column, and rows go by one by
// one. Outside the matrices `dot` is 0.
template <typename F>
__device__ __forceinline__ void for_each_dot(const Source<float>& own, const Source<float>& other, const Lane& lane,
                                             int row_tile, int column_tile, F f) {
  const int column = lane.first_column(lane.lane / 8) + lane.lane % 8, first = lane.first_row(0);
  const int64_t c = int64_t{column_tile} * kBlock + column;
#pragma unroll 1
  for (int row = first; row < first + kBlock / kWarpRows; ++row) {
    const int64_t r = int64_t{row_tile} * kBlock + row;
    const bool exists = r < own.rows && c < other.rows;
    float dot = 0;
#pragma unroll 1
    for (int64_t d = 0; exists && d < own.dims; ++d) {
      dot = fmaf(own.data[r * own.dims + d], other.data[c * other.dims + d], dot);
    }
    f(row, column, dot);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

template <typename T>
Source<T> source(const Tensor& tensor) {
  const T* const values = data<T>(tensor);
  const uintptr_t address = reinterpret_cast<uintptr_t>(values), row = tensor.size(1) * sizeof(T);
  const int bytes = (address | row) % 16 == 0 ? 16 : (address | row) % 4 == 0 ? 4 : sizeof(T);
  return {values, tensor.size(0), tensor.size(1), bytes};
}

}  // namespace ncpvae::cuda
