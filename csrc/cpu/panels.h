// Packed operands and the register-blocked product shared by similarity_logsumexp and gaussian_logsumexp.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include <torch/csrc/stable/ops.h>

#include "vector_math.h"

namespace ncpvae {
namespace {

// How many rows and vectors of a product the registers hold at once.
constexpr int64_t kProductRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int64_t kProductVectors = 2;

constexpr int64_t kPadding = 16;       // rows of packed operands are padded to a multiple of this
constexpr int64_t kDepthBlock = 128;   // terms of an inner product that are summed at a stretch
constexpr int64_t kRowBlock = 24;      // rows of a tile of scores: a multiple of every kProductRows

// Columns of a panel, the packed right operand of a product: panels are stored one after the other, each row by row.
template <typename A>
constexpr int64_t kPanel = kProductVectors * VectorOf<A>::lanes;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Memory that begins at a cache line, so that no load of a register crosses from one line to the next.
constexpr std::align_val_t kCacheLine{64};

template <typename A>
struct FreeAligned {
  void operator()(A* memory) const { operator delete[](memory, kCacheLine); }
};
template <typename A>
using Buffer = std::unique_ptr<A[], FreeAligned<A>>;

template <typename A>
Buffer<A> uninitialised(int64_t size) {
  return Buffer<A>(static_cast<A*>(operator new[](size * sizeof(A), kCacheLine)));
}

template <typename A>
Buffer<A> filled(int64_t size, A value) {
  Buffer<A> buffer = uninitialised<A>(size);
  for (int64_t i = 0; i < size; ++i) buffer[i] = value;
  return buffer;
}

template <typename A>
Buffer<A> zeros(int64_t size) {
  return filled<A>(size, A(0));
}

// How many tasks a thread must have to be worth its start, where one task takes `operations` multiply-adds.
inline int64_t tasks_per_thread(double operations) {
  constexpr double kWorthAThread = 1 << 20;
  return operations >= kWorthAThread ? 1 : static_cast<int64_t>(kWorthAThread / (operations < 1 ? 1 : operations)) + 1;
}

// rows [first, first + rows) of a row-major [.., columns] array, converted, into `to` of row length `stride`
template <typename T, typename A>
inline void copy_rows(const T* from, int64_t first, int64_t rows, int64_t columns, A* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * stride + j] = static_cast<A>(from[(first + i) * columns + j]);
  }
}

// The transpose of rows of a row-major [.., columns] array, converted: to[columns, to_rows], zero past the last row. By
// pieces of columns, because each of their elements lies in another cache line.
template <int64_t to_rows, typename T, typename A>
inline void copy_transposed(const T* from, int64_t rows, int64_t columns, A* to) {
  constexpr int64_t piece = 64;
  for (int64_t start = 0; start < columns; start += piece) {
    const int64_t end = start + piece < columns ? start + piece : columns;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = start; j < end; ++j) to[j * to_rows + i] = static_cast<A>(from[i * columns + j]);
    }
    for (int64_t i = rows; i < to_rows; ++i) {
      for (int64_t j = start; j < end; ++j) to[j * to_rows + i] = 0;
    }
  }
}

// A row-major [rows, columns] array, converted, in panels of columns, the last padded with zeros.
template <typename T, typename A>
inline void pack_panels(const T* from, int64_t rows, int64_t columns, A* to) {
  constexpr int64_t width = kPanel<A>;
  torch::stable::parallel_for(0, rows, tasks_per_thread(2.0 * columns), [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t here = columns - j < width ? columns - j : width;
      for (int64_t i = begin; i < end; ++i) {
        A* row = to + (j * rows + i * width);
        for (int64_t l = 0; l < here; ++l) row[l] = static_cast<A>(from[i * columns + j + l]);
        for (int64_t l = here; l < width; ++l) row[l] = 0;
      }
    }
  });
}

// The transpose of a row-major [rows, columns] array in panels.
template <typename T, typename A>
inline void pack_transposed_panels(const T* from, int64_t rows, int64_t columns, A* to) {
  constexpr int64_t width = kPanel<A>;
  const int64_t panels = (rows + width - 1) / width;
  torch::stable::parallel_for(0, panels, tasks_per_thread(16.0 * width * columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; i += width) {
      copy_transposed<width>(from + i * columns, rows - i < width ? rows - i : width, columns, to + i * columns);
    }
  });
}

// c[rows, vectors · lanes] = or += Σ_k a(i, k) b(k, j), the sum in registers; a(i, k) is a[i · a_row + k · a_depth]
template <bool kAdd, int64_t rows, int64_t vectors, int64_t a_row, int64_t a_depth, typename A>
inline void product_block(const A* a, const A* b, int64_t depth, A* c, int64_t c_stride) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  Vector<A> sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> right[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) right[v] = load(b + k * kPanel<A> + v * lanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const A left = a[i * a_row + k * a_depth];
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      A* to = c + i * c_stride + v * lanes;
      store(to, kAdd ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// The same for a panel of b and any number of rows. One row more is computed where that number is odd.
template <bool kAdd, int64_t vectors, int64_t a_row, int64_t a_depth, typename A>
inline void product_panel(const A* a, const A* b, int64_t depth, A* c, int64_t c_stride, int64_t rows) {
  int64_t i = 0;
  for (; i + kProductRows <= rows; i += kProductRows) {
    product_block<kAdd, kProductRows, vectors, a_row, a_depth>(a + i * a_row, b, depth, c + i * c_stride, c_stride);
  }
  for (; i + 4 <= rows; i += 4) {
    product_block<kAdd, 4, vectors, a_row, a_depth>(a + i * a_row, b, depth, c + i * c_stride, c_stride);
  }
  for (; i < rows; i += 2) {
    product_block<kAdd, 2, vectors, a_row, a_depth>(a + i * a_row, b, depth, c + i * c_stride, c_stride);
  }
}

// The same for any number of columns, panels of b being `panel_size` apart, and depth in blocks: sums of sums round
// less. As many columns are computed as fill registers.
template <bool kAdd, int64_t a_row, int64_t a_depth, typename A>
void product(const A* a, const A* b, int64_t panel_size, int64_t depth, A* c, int64_t c_stride, int64_t rows,
             int64_t columns) {
  const int64_t block = depth < kDepthBlock ? depth : kDepthBlock;
  for (int64_t j = 0; j < columns; j += kPanel<A>) {
    const A* panel = b + j / kPanel<A> * panel_size;
    if (columns - j > VectorOf<A>::lanes) {
      product_panel<kAdd, kProductVectors, a_row, a_depth>(a, panel, block, c + j, c_stride, rows);
    } else {
      product_panel<kAdd, 1, a_row, a_depth>(a, panel, block, c + j, c_stride, rows);
    }
  }
  if (block < depth) {
    product<true, a_row, a_depth>(a + block * a_depth, b + block * kPanel<A>, panel_size, depth - block, c, c_stride,
                                  rows, columns);
  }
}

// Logsumexps under way, side by side: `max` and Σ exp(v − max) of the values seen, −inf and 0 before any. Their value
// is max + log(sum), also where values are ±inf or NaN: an infinite maximum counts its occurrences in the sum, and a
// NaN shows in the sum alone.
template <typename A>
inline void merge_logsumexp(A* max, A* sum, const A* other_max, const A* other_sum, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const A most = other_max[i] > max[i] ? other_max[i] : max[i];
    const A mine = max[i] == most ? A(1) : fast_exp(max[i] - most);
    const A theirs = other_max[i] == most ? A(1) : fast_exp(other_max[i] - most);
    sum[i] = sum[i] * mine + other_sum[i] * theirs;
    max[i] = most;
  }
}

// Σ exp(value − max), with 1 where they are equal
template <typename A>
inline A sum_of_exponentials(const A* values, int64_t size, A max) {
  const int64_t whole = size / kLanes * kLanes;
  Lanes<A> lanes = {};
  A rest[kLanes] = {};
  if (max > -INFINITY && max < INFINITY) {
    for (int64_t i = 0; i < whole; i += kLanes) {
#pragma GCC unroll 8
      for (int64_t p = 0; p < lanes.parts; ++p) {
        lanes.part[p] += exp_nonpositive(load(values + i + p * lanes.width) - max);
      }
    }
    for (int64_t l = 0; l < size - whole; ++l) rest[l] = exp_nonpositive(values[whole + l] - max);
  } else {
    for (int64_t i = 0; i < size; ++i) rest[i % kLanes] += values[i] == max ? A(1) : exp_nonpositive(values[i] - max);
  }
#pragma GCC unroll 8
  for (int64_t p = 0; p < lanes.parts; ++p) lanes.part[p] += load(rest + p * lanes.width);
  return lanes.sum();
}

// exp_nonpositive is 0 below this.
template <typename A>
constexpr A kNegligible = sizeof(A) == sizeof(float) ? A(-87.33) : A(-708);

// The largest value, NaN passed over, and the plain sum, which shows what the largest value does not: −inf where one of
// the values is, NaN where one of them is.
template <typename A>
struct Survey {
  A max, sum;

  Survey(const A* values, int64_t size) {
    const int64_t whole = size / kLanes * kLanes;
    Lanes<A> most, total = {};
    for (Vector<A>& part : most.part) part = Vector<A>{} - static_cast<A>(INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) {
#pragma GCC unroll 8
      for (int64_t p = 0; p < most.parts; ++p) {
        const Vector<A> next = load(values + i + p * most.width);
        most.part[p] = Larger()(most.part[p], next);
        total.part[p] += next;
      }
    }
    max = most.max(), sum = total.sum();
    for (int64_t i = whole; i < size; ++i) {
      max = values[i] > max ? values[i] : max;
      sum += values[i];
    }
  }

  bool has_nan() const { return sum != sum; }  // or infinities of both signs
  bool finite() const { return sum - sum == 0; }
};

}  // namespace
}  // namespace ncpvae
