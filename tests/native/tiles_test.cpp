// tiles.h: pieces add up to the numbers, squares are turned, and products are as accurate as float32's own. With AMX's
// own registers where the compiler was told of them, and else with arrays in their place.
#if !defined(__AMX_BF16__)
#define NCPVAE_EMULATED_TILES
#endif
#include "cpu/tiles.h"

#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/capability.h"

#if NCPVAE_TILES

using namespace ncpvae;

namespace {

// The number that a half of a word is.
double piece(uint32_t word, bool upper) {
  return bits_as<float>(upper ? word & 0xffff0000u : word << 16);
}

// Entry (i, k) of a square packed by pack_left, from all its pieces.
template <int64_t pieces>
double left_entry(const uint32_t* words, int64_t i, int64_t k) {
  double sum = 0;
  for (int64_t p = 0; p < pieces; ++p) sum += piece(words[p * kPieceWords + i * kHalf + k % kHalf], k >= kHalf);
  return sum;
}

// Entry (k, j) of a square packed by pack_right.
template <int64_t pieces>
double right_entry(const uint32_t* words, int64_t k, int64_t j) {
  const int64_t at = j / kHalf * kTileWords + k % kHalf * kHalf + j % kHalf;
  double sum = 0;
  for (int64_t p = 0; p < pieces; ++p) sum += piece(words[p * kPieceWords + at], k >= kHalf);
  return sum;
}

// Numbers of many sizes and both signs, or of few bits.
float number(Numbers& numbers, int bits) {
  const double value = numbers.between(-1, 1) * std::exp2(numbers.between(-20, 20));
  int exponent;
  const double mantissa = std::frexp(value, &exponent);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits));
}

template <int64_t pieces, bool kNearest>
void pieces_add_up(int bits, double error) {
  Numbers numbers;
  for (int repeat = 0; repeat < 50; ++repeat) {
    constexpr int64_t stride = kSquare + 3;
    float values[kSquare * stride];
    for (float& value : values) value = number(numbers, bits);
    uint32_t left[pieces * kPieceWords], right[pieces * kPieceWords];
    pack_left<pieces, kNearest>(values, stride, left);
    pack_right<pieces, kNearest>(values, stride, right);
    for (int64_t i = 0; i < kSquare; ++i) {
      for (int64_t j = 0; j < kSquare; ++j) {
        const double value = values[i * stride + j];
        CHECK_NEAR(left_entry<pieces>(left, i, j), value, error * std::fabs(value));
        CHECK_NEAR(right_entry<pieces>(right, i, j), value, error * std::fabs(value));
      }
    }
  }
}

void squares_are_turned() {
  constexpr int64_t from_stride = kHalf + 5, to_stride = kHalf + 2;
  float from[kHalf * from_stride], to[kHalf * to_stride];
  for (int64_t i = 0; i < kHalf * from_stride; ++i) from[i] = static_cast<float>(i);
  transpose(from, from_stride, to, to_stride);
  for (int64_t i = 0; i < kHalf; ++i) {
    for (int64_t j = 0; j < kHalf; ++j) CHECK(to[j * to_stride + i] == from[i * from_stride + j]);
  }
}

// c = or += a b for a of kSquare rows and b of kSquare columns, of so many bits; the error is relative to |a| |b|.
template <int64_t left_pieces, int64_t right_pieces, bool kAdd>
void products_are_accurate(int64_t squares, int left_bits, int right_bits, double error) {
  Numbers numbers;
  const int64_t depth = squares * kSquare;
  constexpr int64_t stride = kSquare + 16;
  std::vector<float> a(kSquare * depth), b(depth * kSquare), c(kSquare * stride);
  for (float& value : a) value = number(numbers, left_bits);
  for (float& value : b) value = number(numbers, right_bits);
  for (float& value : c) value = number(numbers, 24);
  std::vector<uint32_t> left(squares * left_pieces * kPieceWords), right(squares * right_pieces * kPieceWords);
  for (int64_t s = 0; s < squares; ++s) {
    pack_left<left_pieces, true>(a.data() + s * kSquare, depth, left.data() + s * left_pieces * kPieceWords);
    pack_right<right_pieces, true>(b.data() + s * kSquare * kSquare, kSquare,
                                   right.data() + s * right_pieces * kPieceWords);
  }
  std::vector<float> result = c;
  TileRegisters registers;
  multiply<left_pieces, right_pieces, kAdd>(left.data(), right.data(), squares, result.data(), stride);
  for (int64_t i = 0; i < kSquare; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      const float before = c[i * stride + j];
      if (j >= kSquare) {
        CHECK(result[i * stride + j] == before);  // what lies between the rows is not touched
        continue;
      }
      double sum = kAdd ? before : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a[i * depth + k]) * b[k * kSquare + j];
        sum += term, size += std::fabs(term);
      }
      CHECK_NEAR(result[i * stride + j], sum, error * size);
    }
  }
}

template <int64_t left_pieces, int64_t right_pieces>
void products_of(int left_bits, int right_bits) {
  for (const int64_t squares : {1, 2, 3, 4, 5, 8, 9, 17}) {
    const double error = 1e-6;  // 8 units of float32's precision, of sums of up to 544 terms
    products_are_accurate<left_pieces, right_pieces, false>(squares, left_bits, right_bits, error);
    products_are_accurate<left_pieces, right_pieces, true>(squares, left_bits, right_bits, error);
  }
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  CHECK(has_tiles());
#endif
  pieces_add_up<3, true>(24, 0);
  pieces_add_up<3, false>(24, 0);
  pieces_add_up<2, true>(11, 0);
  pieces_add_up<2, false>(24, 0x1p-15);
  pieces_add_up<1, true>(8, 0);
  pieces_add_up<1, true>(24, 0x1p-8);
  squares_are_turned();
  products_of<3, 3>(24, 24);
  products_of<2, 2>(11, 11);
  products_of<1, 1>(8, 8);
  products_of<2, 1>(11, 8);
  products_of<1, 2>(8, 11);
}

#else

int main() {}  // a compiler that makes no use of tiles

#endif
