// Packed operands and the register-blocked product shared by similarity_logsumexp and gaussian_logsumexp.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "../logsumexp.h"
#include "vector_math.h"

namespace ncpvae {
namespace {

// Width of the registers, and how many rows and vectors of a product they hold at once.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64, kProductRows = 8, kProductVectors = 2;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32, kProductRows = 6, kProductVectors = 2;
#else
constexpr int64_t kVectorBytes = 16, kProductRows = 4, kProductVectors = 2;
#endif

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(A);
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
inline Vector<A> load(const A* from) {
  Vector<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename A>
inline void store(A* to, Vector<A> v) {
  std::memcpy(to, &v, sizeof v);
}

constexpr int64_t kPadding = 16;      // columns of packed operands are padded to a multiple of this
constexpr int64_t kRowBlock = 24;     // rows of a tile of scores: a multiple of every kProductRows
constexpr int64_t kColumnBlock = 256;  // columns of a tile of scores: rows × columns fit the first-level cache

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename A>
std::unique_ptr<A[]> zeros(int64_t size) {
  return std::unique_ptr<A[]>(new A[size]());
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

// c[rows, vectors · lanes] = or += a[rows, depth] · b[depth, vectors · lanes], all in registers
template <bool kAdd, int64_t rows, int64_t vectors, typename A>
inline void product_block(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c,
                          int64_t c_stride) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  Vector<A> sum[rows][vectors];
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sum[i][v] = kAdd ? load(c + i * c_stride + v * lanes) : Vector<A>{};
  }
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
    for (int64_t v = 0; v < vectors; ++v) store(c + i * c_stride + v * lanes, sum[i][v]);
  }
}

// The same for any number of rows, and a panel of kPadding columns.
template <bool kAdd, typename A>
inline void product_panel(const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c,
                          int64_t c_stride, int64_t rows) {
  constexpr int64_t vectors = kPadding / VectorOf<A>::lanes < kProductVectors ? 1 : kProductVectors;
  constexpr int64_t width = vectors * VectorOf<A>::lanes;
  for (int64_t column = 0; column < kPadding; column += width) {
    int64_t i = 0;
    for (; i + kProductRows <= rows; i += kProductRows) {
      product_block<kAdd, kProductRows, vectors>(a + i * a_stride, a_stride, b + column, b_stride, depth,
                                                 c + i * c_stride + column, c_stride);
    }
    for (; i < rows; ++i) {
      product_block<kAdd, 1, vectors>(a + i * a_stride, a_stride, b + column, b_stride, depth,
                                      c + i * c_stride + column, c_stride);
    }
  }
}

// Folds Σ exp(v − max) of further values into a running logsumexp. A NaN among the values shows in the sum only.
template <typename A>
inline void fold(RunningLogSumExp<A>& running, A max, A sum) {
  running.merge(std::isnan(sum) && max < INFINITY ? static_cast<A>(NAN) : max, sum);
}

}  // namespace
}  // namespace ncpvae
