// Products of float matrices on the tile registers of Intel's AMX, which multiply bfloat16 and sum in float32.
//
// A float32 is the sum of three bfloat16 numbers, its pieces, a float16 of two. A product of two numbers is the sum of
// the products of their pieces, of which those of about 2⁻²⁴ of it and less are left out: six of nine remain for
// float32, and the sums are as accurate as float32's own. See Henry, Tang, Heinecke, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", 2019.
//
// Operands are packed in squares of kSquare × kSquare numbers: two registers for each piece, in which words of two
// numbers lie side by side. Which two is ours to choose, as long as both operands agree: number l of a stretch of
// kSquare goes with number l + kHalf.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "tensor.h"
#include "vector_math.h"

// Without AMX the registers can be arrays, slow and visible to sanitizers: tests/test_native.py asks for that. GCC has
// the shuffles since version 12.
#define NCPVAE_TILES 0
#if (defined(__AMX_BF16__) || defined(NCPVAE_EMULATED_TILES)) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#undef NCPVAE_TILES
#define NCPVAE_TILES 1
#endif
#endif

namespace ncpvae {
namespace {

constexpr int64_t kSquare = 32, kHalf = 16;         // numbers, and words of two, along a square's side
constexpr int64_t kTileWords = kHalf * kHalf;       // of a register
constexpr int64_t kPieceWords = 2 * kTileWords;     // of a square, for one piece
// Terms of an inner product that are summed at a stretch: sums of sums round less, and with six squares or more the
// stores at its end take about 280 ns longer (measured on a Xeon with AMX).
constexpr int64_t kTileDepth = 4 * kSquare;

// How many bfloat16 numbers make one of these.
template <typename T>
constexpr int64_t kPieces = std::is_same_v<T, BFloat16> ? 1 : std::is_same_v<T, Half> ? 2 : 3;

#if defined(__AMX_BF16__)

// Sets this thread's tile registers up for as long as it lives: eight of sixteen rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void load_tile(const uint32_t* words) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(words), "r"(int64_t{64}) : "memory");
}
template <int tile>
inline void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride * int64_t{sizeof(float)}) : "memory");
}
template <int to, int left, int right>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(to), "i"(left), "i"(right));
}

#elif NCPVAE_TILES

struct TileRegisters {
  TileRegisters() {}
  ~TileRegisters() {}
};

thread_local uint32_t emulated_tiles[8][kTileWords];

template <int tile>
inline void clear_tile() {
  std::memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}
template <int tile>
inline void load_tile(const uint32_t* words) {
  std::memcpy(emulated_tiles[tile], words, sizeof emulated_tiles[tile]);
}
template <int tile>
inline void store_tile(float* to, int64_t stride) {
  for (int64_t i = 0; i < kHalf; ++i) {
    std::memcpy(to + i * stride, emulated_tiles[tile] + i * kHalf, kHalf * sizeof *to);
  }
}
template <int to, int left, int right>
inline void multiply_tiles() {
  const auto lower = [](uint32_t word) { return bits_as<float>(word << 16); };
  const auto upper = [](uint32_t word) { return bits_as<float>(word & 0xffff0000u); };
  for (int64_t i = 0; i < kHalf; ++i) {
    for (int64_t j = 0; j < kHalf; ++j) {
      float sum = bits_as<float>(emulated_tiles[to][i * kHalf + j]);
      for (int64_t k = 0; k < kHalf; ++k) {
        const uint32_t a = emulated_tiles[left][i * kHalf + k], b = emulated_tiles[right][k * kHalf + j];
        sum += lower(a) * lower(b) + upper(a) * upper(b);
      }
      emulated_tiles[to][i * kHalf + j] = bits_as<uint32_t>(sum);
    }
  }
}

#endif

#if NCPVAE_TILES

// c[kSquare, kSquare] = the product of `squares` squares of a left and as many of a right operand, one after the other
template <int64_t left_pieces, int64_t right_pieces>
inline void multiply_squares(const uint32_t* left, const uint32_t* right, int64_t squares, float* c, int64_t c_stride) {
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t s = 0; s < squares; ++s) {
#pragma GCC unroll 3
    for (int64_t i = 0; i < left_pieces; ++i) {
      load_tile<4>(left + i * kPieceWords), load_tile<5>(left + i * kPieceWords + kTileWords);
#pragma GCC unroll 3
      for (int64_t j = 0; j < right_pieces; ++j) {
        if (i + j >= 3) continue;  // about 2⁻²⁴ of the product
        load_tile<6>(right + j * kPieceWords), load_tile<7>(right + j * kPieceWords + kTileWords);
        multiply_tiles<0, 4, 6>(), multiply_tiles<1, 4, 7>(), multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
      }
    }
    left += left_pieces * kPieceWords, right += right_pieces * kPieceWords;
  }
  store_tile<0>(c, c_stride), store_tile<1>(c + kHalf, c_stride);
  store_tile<2>(c + kHalf * c_stride, c_stride), store_tile<3>(c + kHalf * c_stride + kHalf, c_stride);
}

// The same for any depth, in blocks: sums of sums round less. kAdd: c += the product
template <int64_t left_pieces, int64_t right_pieces, bool kAdd>
inline void multiply(const uint32_t* left, const uint32_t* right, int64_t squares, float* c, int64_t c_stride) {
  constexpr int64_t block = kTileDepth / kSquare;
  if constexpr (!kAdd) {
    const int64_t first = squares < block ? squares : block;
    multiply_squares<left_pieces, right_pieces>(left, right, first, c, c_stride);
    left += first * left_pieces * kPieceWords, right += first * right_pieces * kPieceWords, squares -= first;
  }
  alignas(64) float sum[kSquare * kSquare];
  for (int64_t s = 0; s < squares; s += block) {
    const int64_t here = squares - s < block ? squares - s : block;
    multiply_squares<left_pieces, right_pieces>(left + s * left_pieces * kPieceWords,
                                                right + s * right_pieces * kPieceWords, here, sum, kSquare);
    for (int64_t i = 0; i < kSquare; ++i) {
      for (int64_t j = 0; j < kSquare; ++j) c[i * c_stride + j] += sum[i * kSquare + j];
    }
  }
}

typedef float Row __attribute__((vector_size(kHalf * sizeof(float))));

// One exchange of a transposition: of rows that lie `distance` apart, blocks of as many columns change places.
template <size_t distance, size_t... lane>
inline void exchange(Row& upper, Row& lower, std::index_sequence<lane...>) {
  const Row a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (lane & distance ? kHalf + lane - distance : lane)...);
  lower = __builtin_shufflevector(a, b, (lane & distance ? kHalf + lane : lane + distance)...);
}
template <size_t distance>
inline void exchange_all(Row (&rows)[kHalf]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < kHalf; ++i) {
    if (!(i & distance)) exchange<distance>(rows[i], rows[i + distance], std::make_index_sequence<kHalf>());
  }
}

// to[j, i] = from[i, j], kHalf × kHalf
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Row rows[kHalf];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kHalf; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
  exchange_all<8>(rows), exchange_all<4>(rows), exchange_all<2>(rows), exchange_all<1>(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kHalf; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
}

// The upper half of a float's bits, which is a bfloat16: the nearest, or in one step the next nearer to zero.
template <bool kNearest>
inline uint32_t piece_of(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return (kNearest ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits) & 0xffff0000u;
}

// Words of the pieces of first[l] and second[l], l < kHalf, those of a piece kPieceWords after those of the one before.
template <int64_t pieces, bool kNearest>
inline void pair_up(const float* first, const float* second, uint32_t* words) {
  for (int64_t l = 0; l < kHalf; ++l) {
    float a = first[l], b = second[l];
#pragma GCC unroll 3
    for (int64_t p = 0; p < pieces; ++p) {
      const uint32_t a_piece = piece_of<kNearest>(a), b_piece = piece_of<kNearest>(b);
      words[p * kPieceWords + l] = a_piece >> 16 | b_piece;
      a -= bits_as<float>(a_piece), b -= bits_as<float>(b_piece);
    }
  }
}

// A square of the left operand from its rows: depth runs along them.
template <int64_t pieces, bool kNearest>
inline void pack_left(const float* from, int64_t stride, uint32_t* words) {
  for (int64_t i = 0; i < kSquare; ++i) {
    pair_up<pieces, kNearest>(from + i * stride, from + i * stride + kHalf, words + i * kHalf);
  }
}

// A square of the right operand from its rows: depth runs across them.
template <int64_t pieces, bool kNearest>
inline void pack_right(const float* from, int64_t stride, uint32_t* words) {
  for (int64_t k = 0; k < kHalf; ++k) {
    const float *first = from + k * stride, *second = from + (k + kHalf) * stride;
    pair_up<pieces, kNearest>(first, second, words + k * kHalf);
    pair_up<pieces, kNearest>(first + kHalf, second + kHalf, words + k * kHalf + kTileWords);
  }
}

#endif

}  // namespace
}  // namespace ncpvae
