// Tiles of pairwise scores, shared by similarity_logsumexp and gaussian_logsumexp.
//
// A block of 16×16 threads forms the scores of kTile rows against kTile columns, each thread a small square of them,
// with the operands staged through shared memory kDepth at a time. Scores live in registers and are never stored:
// what leaves a block is a (max, sum) per row, or a sum over its tiles. Where there are too few rows for all of the
// GPU, the columns are split over blocks; the splits meet in a second kernel, in a fixed order, so that every result
// is the same from run to run.
#pragma once

#include "launch.h"
#include "logsumexp.h"

namespace ncpvae::cuda {

constexpr int kSide = 16;  // threads along either side of a tile
constexpr int kTileThreads = kSide * kSide;
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kDepth = 16;    // dimensions, or rows, in shared memory at once
constexpr int kResident = 2;  // blocks per multiprocessor that registers must allow; unasked, ptxas spills for more

template <typename T>
constexpr int kPer = sizeof(T) == 8 ? 2 : 4;  // rows, and columns, of a tile per thread
template <typename T>
constexpr int kTile = kPer<T> * kSide;
template <typename T>
constexpr int kPitch = kTile<T> + 16 / sizeof(T);  // keeps rows 16-byte aligned, and apart in the memory banks

// What one thread holds of a tile.
template <typename T>
using Patch = T[kPer<T>][kPer<T>];

// Some dimensions of a tile's rows, or some rows; and a value for each pair of a whole tile.
template <typename T>
struct alignas(16) Stage {
  T at[kDepth][kPitch<T>];
};
template <typename T>
struct alignas(16) Square {
  T at[kTile<T>][kPitch<T>];
};

// A contiguous [rows, dims].
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, dims;
};

__device__ __forceinline__ int min_int(int64_t a, int b) { return a < b ? static_cast<int>(a) : b; }

// stage.at[d][r] = matrix[first_row + r][first_dim + d], for all rows of a tile; zero outside the matrix.
template <typename T>
__device__ __forceinline__ void stage_dims(Stage<T>& stage, const Matrix<T>& matrix, int64_t first_row,
                                           int64_t first_dim) {
  const int rows = min_int(matrix.rows - first_row, kTile<T>), dims = min_int(matrix.dims - first_dim, kDepth);
  const int d = threadIdx.x % kDepth;
  const T* const from = matrix.data + first_row * matrix.dims + first_dim + d;
#pragma unroll
  for (int i = 0; i < kTile<T> * kDepth / kTileThreads; ++i) {
    const int r = i * (kTileThreads / kDepth) + threadIdx.x / kDepth;
    stage.at[d][r] = r < rows && d < dims ? from[r * matrix.dims] : T(0);
  }
}

// stage.at[r][d] = matrix[first_row + r][first_dim + d], for kDepth rows and as many dimensions as a tile is wide;
// zero outside the matrix.
template <typename T>
__device__ __forceinline__ void stage_rows(Stage<T>& stage, const Matrix<T>& matrix, int64_t first_row,
                                           int64_t first_dim) {
  const int rows = min_int(matrix.rows - first_row, kDepth), dims = min_int(matrix.dims - first_dim, kTile<T>);
  const int d = threadIdx.x % kTile<T>;
  const T* const from = matrix.data + first_row * matrix.dims + first_dim + d;
#pragma unroll
  for (int i = 0; i < kTile<T> * kDepth / kTileThreads; ++i) {
    const int r = i * (kTileThreads / kTile<T>) + static_cast<int>(threadIdx.x) / kTile<T>;
    stage.at[r][d] = r < rows && d < dims ? from[r * matrix.dims] : T(0);
  }
}

template <typename T>
__device__ __forceinline__ void clear(Patch<T>& patch) {
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) patch[i][j] = 0;
  }
}

// This thread's patch into the square, rows along its first index; along the second where `transposed`.
template <bool transposed, typename T>
__device__ __forceinline__ void place(Square<T>& square, const Patch<T>& patch) {
  const int column = threadIdx.x % kSide * kPer<T>, row = threadIdx.x / kSide * kPer<T>;
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) {
      (transposed ? square.at[column + j][row + i] : square.at[row + i][column + j]) = patch[i][j];
    }
  }
}

// This thread's few of a row in shared memory: those from `first` on, in one 16-byte read.
template <typename T>
__device__ __forceinline__ void fetch(const T* row, int first, T (&out)[kPer<T>]) {
  const auto pack = *reinterpret_cast<const Pack<T, kPer<T>>*>(row + first);
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) out[i] = pack.value[i];
}

// ---- logsumexp -----------------------------------------------------------------------------------------------

// A RunningLogSumExp on its way through memory.
template <typename T>
struct Partial {
  T max, sum;
};

template <typename T>
__device__ __forceinline__ void merge(RunningLogSumExp<T>& into, const Partial<T>& other) {
  into.merge(other.max, other.sum);
}

// The values of one row or column in this thread, with one exp each.
template <typename T>
__device__ __forceinline__ Partial<T> summarise(const T (&values)[kPer<T>]) {
  T max = values[0];
#pragma unroll
  for (int i = 1; i < kPer<T>; ++i) max = values[i] > max ? values[i] : max;
  const T origin = max > -INFINITY && max < INFINITY ? max : T(0);
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) sum += exp(values[i] - origin);
  return {std::isnan(sum) ? static_cast<T>(NAN) : max, sum};
}

// Joins the lanes whose numbers differ in the bits of `low` to `high`, both powers of two.
template <typename T>
__device__ __forceinline__ void merge_lanes(RunningLogSumExp<T>& state, int low, int high) {
  for (int mask = low; mask <= high; mask *= 2) {
    merge(state, Partial<T>{shuffle_xor(state.max, mask), shuffle_xor(state.sum, mask)});
  }
}

// lse[i] from partials [count, splits], by a warp each.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    merge_partials(const Partial<T>* partials, int64_t count, int64_t splits, T* lse) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileWarps;
  for (int64_t i = blockIdx.x * int64_t{kTileWarps} + threadIdx.x / kWarp; i < count; i += stride) {
    RunningLogSumExp<T> state;
    for (int64_t split = lane; split < splits; split += kWarp) merge(state, partials[i * splits + split]);
    merge_lanes(state, 1, kWarp / 2);
    if (lane == 0) lse[i] = state.value();
  }
}

// ---- sums over splits ----------------------------------------------------------------------------------------

// sum[i] from parts [splits, count], in order.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) sum_splits(const T* parts, int64_t splits, int64_t count, T* sum) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t i = blockIdx.x * int64_t{kTileThreads} + threadIdx.x; i < count; i += stride) {
    T total = 0;
    for (int64_t split = 0; split < splits; ++split) total += parts[split * count + i];
    sum[i] = total;
  }
}

// This thread's square of the matrix at (row, dim); zero outside.
template <typename T>
__device__ __forceinline__ void hold(Patch<T>& out, const Matrix<T>& matrix, int64_t row, int64_t dim) {
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) {
      const bool exists = row + i < matrix.rows && dim + j < matrix.dims;
      out[i][j] = exists ? matrix.data[(row + i) * matrix.dims + dim + j] : T(0);
    }
  }
}

// Adds this thread's square to a split's own part [rows, dims] of an output, or begins it. Only this thread ever
// touches these elements, so that they are built up tile by tile in order.
template <typename T>
__device__ __forceinline__ void accumulate(T* part, int64_t rows, int64_t dims, int64_t row, int64_t dim,
                                           const Patch<T>& value, bool begin) {
#pragma unroll
  for (int i = 0; i < kPer<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kPer<T>; ++j) {
      if (row + i >= rows || dim + j >= dims) continue;
      T& element = part[(row + i) * dims + dim + j];
      element = begin ? value[i][j] : element + value[i][j];
    }
  }
}

// ---- the shares of the blocks --------------------------------------------------------------------------------

// Block b owns tile b / splits of the rows, and of the columns those tiles that belong to split b mod splits.
struct Shares {
  int64_t row_tiles, column_tiles, splits, tiles_per_split;

  __host__ __device__ int64_t blocks() const { return row_tiles * splits; }
  __device__ int64_t first_tile(int64_t block) const { return block % splits * tiles_per_split; }
  __device__ int64_t end_tile(int64_t block) const {
    const int64_t end = first_tile(block) + tiles_per_split;
    return end < column_tiles ? end : column_tiles;
  }
};

// Enough blocks to fill a large GPU; a constant, so that results do not depend on the device.
constexpr int64_t kEnoughBlocks = 264;

inline Shares share(int64_t rows, int64_t columns, int tile) {
  Shares s{ceil_div(rows, tile), ceil_div(columns, tile), 0, 1};
  const int64_t wanted = ceil_div(kEnoughBlocks, std::max<int64_t>(s.row_tiles, 1));
  s.tiles_per_split = std::max<int64_t>(1, s.column_tiles / wanted);
  s.splits = ceil_div(s.column_tiles, s.tiles_per_split);
  return s;
}

// The split of the columns that gives the busiest multiprocessor the fewest tiles, of those that make up to four waves
// of blocks.
inline Shares share_in_waves(int64_t rows, int64_t columns, int tile) {
  Shares best{};
  int64_t least = INT64_MAX;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    Shares s{ceil_div(rows, tile), ceil_div(columns, tile), 0, 1};
    const int64_t wanted = kEnoughBlocks * waves / std::max<int64_t>(s.row_tiles, 1);
    s.tiles_per_split = std::max<int64_t>(1, ceil_div(s.column_tiles, std::max<int64_t>(wanted, 1)));
    s.splits = ceil_div(s.column_tiles, s.tiles_per_split);
    const int64_t tiles_in_turn = ceil_div(s.blocks(), kEnoughBlocks) * s.tiles_per_split;
    if (tiles_in_turn < least) best = s;
    least = std::min(least, tiles_in_turn);
  }
  return best;
}

template <typename T>
inline Matrix<T> matrix(const Tensor& tensor) {
  return {data<T>(tensor), tensor.size(0), tensor.size(1)};
}

// Calls f(T{}) with the type that the op computes in.
template <typename F>
void dispatch_wide(ScalarType type, F&& f) {
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace ncpvae::cuda
