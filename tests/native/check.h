// Checks for the programs in this folder: the first that fails says what and where, and ends the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (false)

#define CHECK_NEAR(value, expected, tolerance)                                                                     \
  do {                                                                                                             \
    const double value_ = static_cast<double>(value), expected_ = static_cast<double>(expected);                   \
    if (!(std::fabs(value_ - expected_) <= (tolerance))) {                                                         \
      std::fprintf(stderr, "%s:%d: %s is %.17g, not %.17g up to %.3g\n", __FILE__, __LINE__, #value, value_,       \
                   expected_, static_cast<double>(tolerance));                                                     \
      std::exit(1);                                                                                                \
    }                                                                                                              \
  } while (false)

// Numbers without a library: Weyl's sequence mixed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
struct Numbers {
  uint64_t state = 1;

  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // Not inlined: GCC may fuse the sum for one use of the result and not for another, which then differ by an ulp.
  __attribute__((noinline)) double between(double low, double high) {
    return low + (high - low) * (static_cast<double>(next() >> 11) * 0x1p-53);
  }
};
