// Packed operands and the register-blocked product shared by similarity_logsumexp and gaussian_logsumexp.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "vector_math.h"

namespace ncpvae {
namespace {

// How many rows and vectors of a product the registers hold at once.
constexpr int64_t kProductRows = kVectorBytes == 64 ? 8 : kVectorBytes == 32 ? 6 : 4;
constexpr int64_t kProductVectors = 2;

constexpr int64_t kPadding = 16;       // columns of packed operands are padded to a multiple of this
constexpr int64_t kDepthBlock = 64;    // terms of an inner product that are summed at a stretch
constexpr int64_t kRowBlock = 24;      // rows of a tile of scores: a multiple of every kProductRows
constexpr int64_t kColumnBlock = 256;  // columns of a tile of scores: rows × columns fit the first-level cache

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
  constexpr double kWorthAThread = 1 << 19;
  return operations >= kWorthAThread ? 1 : static_cast<int64_t>(kWorthAThread / operations) + 1;
}

// rows [first, first + rows) of a row-major [.., columns] array, converted, into `to` of row length `stride`
template <typename T, typename A>
inline void copy_rows(const T* from, int64_t first, int64_t rows, int64_t columns, A* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * stride + j] = static_cast<A>(from[(first + i) * columns + j]);
  }
}

// A row-major [rows, columns] array as panels of kPadding rows, each stored column by column: [rows/16][columns][16].
template <typename T, typename A>
inline void pack_panels(const T* from, int64_t rows, int64_t columns, A* to) {
  for (int64_t i = 0; i < rows; ++i) {
    A* panel = to + i / kPadding * kPadding * columns + i % kPadding;
    for (int64_t j = 0; j < columns; ++j) panel[j * kPadding] = static_cast<A>(from[i * columns + j]);
  }
}

// c[rows, vectors · lanes] = or += a[rows, depth] · b[depth, vectors · lanes], the sum in registers
template <bool kAdd, int64_t rows, int64_t vectors, typename A>
inline void product_block(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c,
                          int64_t c_stride) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  Vector<A> sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> right[vectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) right[v] = load(b + k * b_stride + v * lanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const A left = a[i * a_stride + k];
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

// The same for any number of rows, a panel of kPadding columns, and depth in blocks: sums of sums round less.
template <bool kAdd, typename A>
inline void product_panel(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c,
                          int64_t c_stride, int64_t rows) {
  constexpr int64_t vectors = kPadding / VectorOf<A>::lanes < kProductVectors ? 1 : kProductVectors;
  constexpr int64_t width = vectors * VectorOf<A>::lanes;
  const int64_t block = depth < kDepthBlock ? depth : kDepthBlock;
  for (int64_t column = 0; column < kPadding; column += width) {
    const A* right = b + column;
    int64_t i = 0;
    for (; i + kProductRows <= rows; i += kProductRows) {
      product_block<kAdd, kProductRows, vectors>(a + i * a_stride, a_stride, right, b_stride, block,
                                                 c + i * c_stride + column, c_stride);
    }
    for (; i < rows; ++i) {
      product_block<kAdd, 1, vectors>(a + i * a_stride, a_stride, right, b_stride, block, c + i * c_stride + column,
                                      c_stride);
    }
  }
  if (block < depth) {
    product_panel<true>(a + block, a_stride, b + block * b_stride, b_stride, depth - block, c, c_stride, rows);
  }
}

// Logsumexps under way, side by side: `max` and Σ exp(v − max) of the values seen, −inf and 0 before any. Their value
// is max + log(sum), also where values are ±inf or NaN: an infinite maximum counts its occurrences in the sum, and a NaN
// shows in the sum alone.
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

// values becomes exp(value − max), with 1 where they are equal; returns the sum
template <typename A>
inline A exponentiate(A* values, int64_t size, A max) {
  if (max > -INFINITY && max < INFINITY) {
    for (int64_t i = 0; i < size; ++i) values[i] = exp_nonpositive(values[i] - max);
  } else {
    for (int64_t i = 0; i < size; ++i) values[i] = values[i] == max ? A(1) : exp_nonpositive(values[i] - max);
  }
  return lane_sum(values, size);
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
        most.part[p] = next > most.part[p] ? next : most.part[p];
        total.part[p] += next;
      }
    }
    A lane[kLanes];
    std::memcpy(lane, most.part, sizeof lane);
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    }
    max = lane[0], sum = total.sum();
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
