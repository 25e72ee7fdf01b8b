// The matrix products of similarity_logsumexp: scores in tiles, and what their gradients give to rows and columns. Two
// classes with the same members make them, of which the op takes one by shape and values:
//
//   PanelProducts: in vector registers, any floating type;
//   TileProducts: on tile registers, where the processor has them, for what is computed in float32.
#pragma once

#include <algorithm>

#include "convert.h"
#include "panels.h"
#include "tiles.h"

namespace ncpvae {
namespace {

template <typename T>
class PanelProducts {
 public:
  using A = Accumulate<T>;
  static constexpr int64_t kRows = kRowBlock, kColumns = 192;  // of a tile of scores, which fits the first-level cache
  static constexpr int64_t kPitch = kColumns + 16;  // length of its rows, in floats an odd number of cache lines
  static constexpr int64_t kTogether = 4;    // tiles, one below the other, that take turns at their columns' vectors
  static constexpr int64_t kRowGroups = 64;  // at most this many partial results per column
  static constexpr int64_t kTakenColumns = 48;      // columns that one task takes when gradients go to columns
  static constexpr int64_t kSlabValues = 1 << 22;   // of scores' gradients that are kept for that
  static constexpr double kSpeed = 1;               // in multiply-adds, as tasks_per_thread counts them

  // What a thread needs of its own: the rows that it is at.
  struct Space {
    Buffer<A> rows;
    explicit Space(const PanelProducts& products) : rows(uninitialised<A>(kTogether * kRows * products.D)) {}
  };

  PanelProducts(const T* z_rows, const T* x_rows, int64_t rows, int64_t columns, int64_t depth, bool with_gradients)
      : z(z_rows), N(rows), K(columns), D(depth), padded(round_up(depth, kPadding)) {
    x_panels = uninitialised<A>(round_up(K, kPanel<A>) * D);
    pack_transposed_panels(x_rows, K, D, x_panels.get());
    if (!with_gradients) return;
    x_sums = in_panels(x_rows, K), z_sums = in_panels(z_rows, N);
    dz = uninitialised<A>(round_up(N, kRows) * padded);
    dx = N == 0 ? zeros<A>(K * padded) : uninitialised<A>(round_up(K, kTakenColumns) * padded);
  }

  // Makes rows [first, last), at most kTogether blocks, those that the thread is at.
  void take_rows(int64_t first, int64_t last, Space& space) const {
    for (int64_t n = first; n < last; n += kRows) {
      copy_transposed<kRows>(z + n * D, std::min(last - n, kRows), D, space.rows.get() + (n - first) * D);
    }
  }

  // score[rows, columns] = inner products of the rows from the thread's row i on with the columns from j on
  void scores(const Space& space, int64_t i, int64_t j, int64_t rows, int64_t columns, A* score) const {
    product<false, 1, kRows>(space.rows.get() + i * D, x_panels.get() + j * D, kPanel<A> * D, D, score, kPitch, rows,
                             columns);
  }

  // dz of the rows from n on = or, from the second columns on, += gradient[rows, columns] · x of the columns from j on
  void give_rows(Space&, const A* gradient, int64_t n, int64_t j, int64_t rows, int64_t columns) const {
    const auto give = j == 0 ? product<false, kPitch, 1, A> : product<true, kPitch, 1, A>;
    give(gradient, x_sums.get() + j * kPanel<A>, kPanel<A> * K, columns, dz.get() + n * padded, padded, rows, D);
  }

  // dx of the columns from j on = or, from the second rows on, += gradient[rows, columns]ᵀ · z of the rows from n on
  void give_columns(Space&, const A* gradient, int64_t n, int64_t j, int64_t rows, int64_t columns) const {
    const auto give = n == 0 ? product<false, 1, kPitch, A> : product<true, 1, kPitch, A>;
    give(gradient, z_sums.get() + n * kPanel<A>, kPanel<A> * N, rows, dx.get() + j * padded, padded, columns, D);
  }

  // Rows of dz from row n on, and of dx from row k on, one every row_length() numbers.
  const A* row_gradients(int64_t n) const { return dz.get() + n * padded; }
  const A* column_gradients(int64_t k, A*) const { return dx.get() + k * padded; }
  int64_t row_length() const { return padded; }

 private:
  Buffer<A> in_panels(const T* vectors, int64_t size) const {
    Buffer<A> panels = uninitialised<A>(round_up(D, kPanel<A>) * size);
    pack_panels(vectors, size, D, panels.get());
    return panels;
  }

  const T* z;
  int64_t N, K, D, padded;
  Buffer<A> x_panels, x_sums, z_sums;  // for inner products, and for sums of vectors
  Buffer<A> dz, dx;                    // [size, padded]
};

#if NCPVAE_TILES

template <typename T>
class TileProducts {
 public:
  using A = float;
  static constexpr int64_t kRows = kSquare, kColumns = kTileDepth, kPitch = kColumns + 16;
  // More at a time than PanelProducts: the third-level cache is slow for registers that compute so fast.
  static constexpr int64_t kTogether = 16, kRowGroups = 64, kTakenColumns = kColumns, kSlabValues = 1 << 22;
  static constexpr double kSpeed = 2;

  struct Space {
    TileRegisters registers;
    Buffer<uint32_t> rows, gradient;
    Buffer<float> plain;

    explicit Space(const TileProducts& products)
        : rows(uninitialised<uint32_t>(kTogether * products.depth_squares * kVectorSquare)),
          gradient(uninitialised<uint32_t>(kColumns / kSquare * kGradientSquare)),
          plain(uninitialised<float>(kSquare * products.padded)) {}
  };

  // Whether they are worth their packing.
  static bool suit(int64_t N, int64_t K, int64_t D) { return N >= kSquare && K >= kSquare && D >= 3 * kHalf; }

  TileProducts(const T* z_rows, const T* x_rows, int64_t rows, int64_t columns, int64_t depth, bool with_gradients)
      : z(z_rows), N(rows), K(columns), D(depth), padded(round_up(depth, kSquare)), depth_squares(padded / kSquare),
        row_squares(round_up(rows, kSquare) / kSquare), column_squares(round_up(columns, kSquare) / kSquare) {
    x_inner = uninitialised<uint32_t>(column_squares * depth_squares * kVectorSquare);
    if (with_gradients) {
      x_sums = uninitialised<uint32_t>(column_squares * depth_squares * kVectorSquare);
      z_sums = uninitialised<uint32_t>(row_squares * depth_squares * kVectorSquare);
      dz = uninitialised<float>(row_squares * kSquare * padded);
      dx = uninitialised<float>(column_squares * kSquare * padded);
    }
    pack(column_squares, [&](int64_t square, float* plain, float* turned) {
      copy_square(x_rows, square, K, plain);
      for (int64_t d = 0; d < depth_squares; ++d) {
        if (with_gradients) {
          pack_right<kPieces<T>, true>(plain + d * kSquare, padded, sums(x_sums, column_squares, square, d));
        }
        transpose_square(plain + d * kSquare, padded, turned, kSquare);
        pack_right<kPieces<T>, true>(turned, kSquare,
                                     x_inner.get() + (square * depth_squares + d) * kVectorSquare);
      }
    });
    if (!with_gradients) return;
    pack(row_squares, [&](int64_t square, float* plain, float* turned) {
      copy_square(z_rows, square, N, plain);
      for (int64_t d = 0; d < depth_squares; ++d) {
        transpose_square(plain + d * kSquare, padded, turned, kSquare);
        pack_left<kPieces<T>, true>(turned, kSquare, sums(z_sums, row_squares, square, d));
      }
    });
  }

  void take_rows(int64_t first, int64_t last, Space& space) const {
    for (int64_t n = first; n < last; n += kRows) {
      copy_square(z, n / kSquare, N, space.plain.get());
      for (int64_t d = 0; d < depth_squares; ++d) {
        pack_left<kPieces<T>, true>(space.plain.get() + d * kSquare, padded,
                                    space.rows.get() + ((n - first) / kSquare * depth_squares + d) * kVectorSquare);
      }
    }
  }

  // Rows and columns past the last are written as well, with zeros.
  void scores(const Space& space, int64_t i, int64_t j, int64_t, int64_t columns, float* score) const {
    const uint32_t* left = space.rows.get() + i / kSquare * depth_squares * kVectorSquare;
    for (int64_t c = 0; c < columns; c += kSquare) {
      const uint32_t* right = x_inner.get() + (j + c) / kSquare * depth_squares * kVectorSquare;
      multiply<kPieces<T>, kPieces<T>, false>(left, right, depth_squares, score + c, kPitch);
    }
  }

  void give_rows(Space& space, const float* gradient, int64_t n, int64_t j, int64_t, int64_t columns) const {
    const int64_t squares = round_up(columns, kSquare) / kSquare;
    for (int64_t s = 0; s < squares; ++s) {
      pack_left<kWeightPieces, false>(gradient + s * kSquare, kPitch, space.gradient.get() + s * kGradientSquare);
    }
    const auto give = j == 0 ? multiply<kWeightPieces, kPieces<T>, false> : multiply<kWeightPieces, kPieces<T>, true>;
    for (int64_t d = 0; d < depth_squares; ++d) {
      give(space.gradient.get(), sums(x_sums, column_squares, j / kSquare, d), squares,
           dz.get() + n * padded + d * kSquare, padded);
    }
  }

  void give_columns(Space& space, const float* gradient, int64_t n, int64_t j, int64_t rows, int64_t columns) const {
    constexpr int64_t stretch = kColumns;  // rows whose packed vectors stay in the cache while columns take turns
    for (int64_t first = 0; first < rows; first += stretch) {
      const int64_t squares = round_up(std::min(rows - first, stretch), kSquare) / kSquare;
      const auto give = n + first == 0 ? multiply<kPieces<T>, kWeightPieces, false>
                                       : multiply<kPieces<T>, kWeightPieces, true>;
      for (int64_t c = 0; c < columns; c += kSquare) {
        for (int64_t s = 0; s < squares; ++s) {
          pack_right<kWeightPieces, false>(gradient + (first + s * kSquare) * kPitch + c, kPitch,
                                           space.gradient.get() + s * kGradientSquare);
        }
        for (int64_t d = 0; d < depth_squares; ++d) {
          give(sums(z_sums, row_squares, (n + first) / kSquare, d), space.gradient.get(), squares,
               dx.get() + d * kSquare * column_squares * kSquare + j + c, column_squares * kSquare);
        }
      }
    }
  }

  const float* row_gradients(int64_t n) const { return dz.get() + n * padded; }
  const float* column_gradients(int64_t k, float* space) const {
    const int64_t stride = column_squares * kSquare;
    for (int64_t d = 0; d < padded; d += kSquare) {
      transpose_square(dx.get() + d * stride + k, stride, space + d, padded);
    }
    return space;
  }
  int64_t row_length() const { return padded; }

 private:
  // What is added to float16 and bfloat16 vectors' gradients is rounded to these types in the end.
  static constexpr int64_t kWeightPieces = std::is_same_v<T, float> ? 3 : 2;
  static constexpr int64_t kVectorSquare = kPieces<T> * kPieceWords, kGradientSquare = kWeightPieces * kPieceWords;

  // Calls f for every square along the rows of a matrix, with memory for kSquare of its rows and for one square.
  template <typename F>
  void pack(int64_t squares, F&& f) const {
    const int64_t grain = tasks_per_thread(16.0 * kSquare * padded);
    torch::stable::parallel_for(0, squares, grain, [&](int64_t begin, int64_t end) {
      const auto plain = uninitialised<float>(kSquare * padded);
      alignas(64) float turned[kSquare * kSquare];
      for (int64_t square = begin; square < end; ++square) f(square, plain.get(), turned);
    });
  }

  // kSquare rows as float32, with zeros past the last row and column
  void copy_square(const T* from, int64_t square, int64_t size, float* to) const {
    const int64_t first = square * kSquare, rows = std::min(size - first, kSquare);
    for (int64_t i = 0; i < rows; ++i) {
      widen(from + (first + i) * D, D, to + i * padded);
      std::fill(to + i * padded + D, to + (i + 1) * padded, 0.0f);
    }
    std::fill(to + rows * padded, to + kSquare * padded, 0.0f);
  }

  static void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < kSquare; i += kHalf) {
      for (int64_t j = 0; j < kSquare; j += kHalf) {
        transpose(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
      }
    }
  }

  // Where a square for sums over rows has its place.
  static uint32_t* sums(const Buffer<uint32_t>& squares, int64_t row_squares, int64_t row_square, int64_t d) {
    return squares.get() + (d * row_squares + row_square) * kVectorSquare;
  }

  const T* z;
  int64_t N, K, D, padded, depth_squares, row_squares, column_squares;
  Buffer<uint32_t> x_inner;  // squares of x, those of 32 columns one after the other
  Buffer<uint32_t> x_sums;   // squares of x, those of 32 dimensions one after the other
  Buffer<uint32_t> z_sums;   // of z, transposed
  Buffer<float> dz, dx;      // [rows, padded]; [padded, columns]
};

#endif

}  // namespace
}  // namespace ncpvae
