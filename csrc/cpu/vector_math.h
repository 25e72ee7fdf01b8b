// Branch-free elementary functions that compilers turn into SIMD code, and sums whose order does not depend on the
// SIMD width. Everything has internal linkage: sources compiled for several instruction sets may include it.
//
// The polynomials are Chebyshev fits made for this file. Error bounds are in units in the last place (ulp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ncpvae {
namespace {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Adding and subtracting 1.5·2^(mantissa bits) rounds to an integer, and leaves that integer in the low bits of the
// sum: rounding and conversion without instructions that the baseline lacks.
constexpr float kRoundFloat = 0x1.8p23f;
constexpr double kRoundDouble = 0x1.8p52;

inline float power_of_two(float rounded) {  // from n + kRoundFloat to 2^n, |n| ≤ 126
  return bits_as<float>((bits_as<uint32_t>(rounded) + 127u) << 23);
}
inline double power_of_two(double rounded) {
  return bits_as<double>((bits_as<uint64_t>(rounded) + 1023u) << 52);
}

// e^x within 2 ulp, subnormal results included; 0 at −inf, inf on overflow, NaN at NaN.
inline float fast_exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float n = (x * 0x1.715476p+0f + kRoundFloat) - kRoundFloat;
  const float r = (x - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;
  float q = 0x1.6d10fcp-10f;
  q = q * r + 0x1.120b62p-7f;
  q = q * r + 0x1.55551ap-5f;
  q = q * r + 0x1.5554dep-3f;
  q = q * r + 0.5f;
  // 2^n in two factors, because n reaches beyond the exponents of normal numbers
  const float half = 0.5f * n + kRoundFloat;
  const float rest = (n - (half - kRoundFloat)) + kRoundFloat;
  return (1.0f + (r + r * r * q)) * power_of_two(half) * power_of_two(rest);
}

inline double fast_exp(double x) {
  x = x < -746.0 ? -746.0 : x;
  x = x > 710.0 ? 710.0 : x;
  const double n = (x * 0x1.71547652b82fep+0 + kRoundDouble) - kRoundDouble;
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double q = 0x1.af389ecfc4b9cp-26;
  q = q * r + 0x1.28917c89a43a7p-22;
  q = q * r + 0x1.71de0db2f6b19p-19;
  q = q * r + 0x1.a019b9149a41cp-16;
  q = q * r + 0x1.a01a01a7c2efep-13;
  q = q * r + 0x1.6c16c17889ef1p-10;
  q = q * r + 0x1.11111111109b5p-7;
  q = q * r + 0x1.5555555553d68p-5;
  q = q * r + 0x1.5555555555556p-3;
  q = q * r + 0.5;
  const double half = 0.5 * n + kRoundDouble;
  const double rest = (n - (half - kRoundDouble)) + kRoundDouble;
  return (1.0 + (r + r * r * q)) * power_of_two(half) * power_of_two(rest);
}

// What `exp_nonpositive` needs of a type: log2 e and ln 2, the number that rounds, the least argument with a normal
// result, the exponent's bias and place, and c with 2^f ≈ 1 + c₁ f + c₂ f² + … on [−½, ½].
template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2_e = 0x1.715476p+0f, round = kRoundFloat, least = -87.33f;
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr uint32_t bias = 127, mantissa = 23;
  static constexpr float c[] = {0x1.5f089p-10f, 0x1.3b2a54p-7f, 0x1.c6af6cp-5f, 0x1.ebfbep-3f, 0x1.62e43p-1f};
  static constexpr float leading = 0x1.44138ap-13f;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2_e = 0x1.71547652b82fep+0, round = kRoundDouble, least = -708.3;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr uint64_t bias = 1023, mantissa = 52;
  static constexpr double c[] = {0x1.e6000da667c3dp-28, 0x1.b524fd83a1eacp-24, 0x1.62bfd788714bap-20,
                                 0x1.ffcbfc66345p-17,   0x1.4309130870d63p-13, 0x1.5d87fe78a541p-10,
                                 0x1.3b2ab6fba219cp-7,  0x1.c6b08d704a0c1p-5,  0x1.ebfbdff82c597p-3,
                                 0x1.62e42fefa39efp-1};
  static constexpr double leading = 0x1.e9ceb5c98b1ep-32;
};

// 2^(x log2 e) for x ≤ 0: 0 where that is below the normal numbers, NaN at NaN. V is T or a vector of it, Bits as wide.
template <typename T, typename Bits, bool exact, typename V>
inline V exp_nonpositive_as(V x) {
  using E = ExpConstants<T>;
  const V rounded = x * E::log2_e + E::round;
  const V n = rounded - E::round;
  V f = x * E::log2_e - n;
  if constexpr (exact) f = ((x - n * E::ln2_high) - n * E::ln2_low) * E::log2_e;
  V q = f * E::leading + E::c[0];
#pragma GCC unroll 16
  for (size_t i = 1; i < sizeof(E::c) / sizeof(T); ++i) q = q * f + E::c[i];
  const V power = bits_as<V>((bits_as<Bits>(rounded) + E::bias) << E::mantissa);
  const V e = (q * f) * power + power;
  return x < E::least ? V{} : e;
}

// e^x for x ≤ 0 within 2 ulp, in fewer steps than `fast_exp`.
inline float exp_nonpositive(float x) { return exp_nonpositive_as<float, uint32_t, true>(x); }
inline double exp_nonpositive(double x) { return exp_nonpositive_as<double, uint64_t, true>(x); }

// log x within 2 ulp for positive, normal, finite x.
inline float fast_log(float x) {
  // x = 2^e · m with m in [√½, √2), so that a result near 0 keeps its relative accuracy
  const uint32_t shifted = bits_as<uint32_t>(x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float m = bits_as<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float f = m - 1.0f;
  const float s = f / (2.0f + f);  // log m = 2 artanh s
  const float t = s * s;
  const float q = (0x1.2f013ep-2f * t + 0x1.997b96p-2f) * t + 0x1.55555cp-1f;
  return e * 0x1.62ep-1f + (2.0f * s + (s * t * q + e * 0x1.0bfbe8p-15f));
}

// The same for double: V is double or a vector of it, Bits as wide.
template <typename Bits, typename V>
inline V fast_log_as(V x) {
  constexpr uint64_t one = 0x3ff0000000000000u, root_half = 0x3fe6a09e667f3bcdu;
  constexpr double c[] = {0x1.39fe606542ddep-3, 0x1.7462b4ab2ef6bp-3, 0x1.c71c62e5800a1p-3,
                          0x1.2492492df148dp-2, 0x1.99999999952e2p-2, 0x1.5555555555558p-1};
  const Bits shifted = bits_as<Bits>(x) + (one - root_half);
  const V e = bits_as<V>((shifted >> 52) | bits_as<uint64_t>(0x1p52)) - (0x1p52 + 1023);
  const V m = bits_as<V>((shifted & (~uint64_t{0} >> 12)) + root_half);
  const V f = m - 1.0;
  const V s = f / (f + 2.0);
  const V t = s * s;
  V q = t * 0x1.2b584aae78a57p-3 + c[0];
#pragma GCC unroll 8
  for (int i = 1; i < 6; ++i) q = q * t + c[i];
  return e * 0x1.62e42feep-1 + (2.0 * s + (s * t * q + e * 0x1.a39ef35793c76p-33));
}
inline double fast_log(double x) { return fast_log_as<uint64_t>(x); }

// sin and cos of an angle in [0, 2π], error below 1e-7
inline void fast_sincos(float angle, float& sine, float& cosine) {
  const float rounded = angle * 0x1.45f306p-1f + kRoundFloat;
  const float k = rounded - kRoundFloat;  // quadrant, 0 … 4
  const float r = (angle - k * 0x1.921fp+0f) - k * 0x1.6a8886p-17f;
  const float t = r * r;
  const float s = r + r * t * ((-0x1.9aaea8p-13f * t + 0x1.110bf6p-7f) * t - 0x1.555552p-3f);
  const float c = 1.0f - 0.5f * t + t * t * ((0x1.9bc2fp-16f * t - 0x1.6c12aap-10f) * t + 0x1.555554p-5f);
  const uint32_t quadrant = bits_as<uint32_t>(rounded);
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t s_bits = bits_as<uint32_t>(s), c_bits = bits_as<uint32_t>(c);
  const uint32_t mixed = (s_bits ^ c_bits) & swap;
  sine = bits_as<float>((s_bits ^ mixed) ^ ((quadrant & 2u) << 30));
  cosine = bits_as<float>((c_bits ^ mixed) ^ (((quadrant + 1u) & 2u) << 30));
}
inline void fast_sincos(double angle, double& sine, double& cosine) {
  sine = std::sin(angle);
  cosine = std::cos(angle);
}

// Registers of the instruction set that this source is compiled for.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;

inline Vector<float> exp_nonpositive(Vector<float> x) {
  return exp_nonpositive_as<float, Vector<uint32_t>, true>(x);
}
inline Vector<double> exp_nonpositive(Vector<double> x) {
  return exp_nonpositive_as<double, Vector<uint64_t>, true>(x);
}

inline Vector<double> fast_log(Vector<double> x) { return fast_log_as<Vector<uint64_t>>(x); }

// e^x for x ≤ 0 within 2 + 1.25 |x| ulp, about what rounding x may have cost, two steps shorter.
inline Vector<float> rough_exp_nonpositive(Vector<float> x) {
  return exp_nonpositive_as<float, Vector<uint32_t>, false>(x);
}
inline Vector<double> rough_exp_nonpositive(Vector<double> x) {
  return exp_nonpositive_as<double, Vector<uint64_t>, false>(x);
}

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename T>
inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// as many values as Vector<double> holds, converted
inline Vector<double> load_double(const float* from) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half v;
  std::memcpy(&v, from, sizeof v);
#if defined(__AVX512F__)
  return bits_as<Vector<double>>(_mm512_maskz_cvtps_pd(0xff, bits_as<__m256>(v)));  // GCC 12 converts by quarters
#else
  return __builtin_convertvector(v, Vector<double>);
#endif
}
inline Vector<double> load_double(const double* from) { return load(from); }

constexpr int64_t kLanes = 16;  // logical lanes of a reduction, whatever the width of the registers

// n values as one: the upper half joins the lower until one is left, in this order whatever the width of the registers.
template <int64_t n, typename T, typename Join>
inline T halved(const T* values, Join join) {
  if constexpr (n == 1) {
    return values[0];
  } else {
    constexpr int64_t half = n / 2, bytes = half * sizeof(T);
    T joined[half];
    if constexpr (bytes >= 16 && bytes <= kVectorBytes) {  // GCC 12 makes loops over halves of this, through memory
      typedef T Half __attribute__((vector_size(bytes)));
      Half lower, upper;
      std::memcpy(&lower, values, bytes);
      std::memcpy(&upper, values + half, bytes);
      lower = join(lower, upper);
      std::memcpy(joined, &lower, bytes);
    } else {
      for (int64_t i = 0; i < half; ++i) joined[i] = join(values[i], values[half + i]);
    }
    return halved<half>(joined, join);
  }
}

// `most`, or `next` where it is larger; NaN in `next` is passed over
struct Larger {
  template <typename V>
  V operator()(V most, V next) const {
    return next > most ? next : most;
  }
};

// `least`, or `next` where it is smaller; NaN in `next` is passed over
struct Smaller {
  template <typename V>
  V operator()(V least, V next) const {
    return next < least ? next : least;
  }
};

// kLanes partial results in registers
template <typename T>
struct Lanes {
  static constexpr int64_t width = VectorOf<T>::lanes, parts = kLanes / width;
  Vector<T> part[parts];

  template <typename Join>
  T joined(Join join) const {
    T lane[kLanes];
    std::memcpy(lane, part, sizeof lane);
    return halved<kLanes>(lane, join);
  }
  T sum() const { return joined(std::plus<>()); }
  T max() const { return joined(Larger()); }
  T min() const { return joined(Smaller()); }
};

template <typename T>
inline Lanes<T> in_all_lanes(T value) {
  Lanes<T> lanes;
#pragma GCC unroll 8
  for (Vector<T>& part : lanes.part) part = Vector<T>{} + value;
  return lanes;
}

// total += sum, lane by lane
inline void add_as_double(Lanes<double>& total, const Lanes<float>& sum) {
  float lane[kLanes];
  std::memcpy(lane, sum.part, sizeof lane);
#pragma GCC unroll 8
  for (int64_t p = 0; p < total.parts; ++p) total.part[p] += load_double(lane + p * total.width);
}
inline void add_as_double(Lanes<double>& total, const Lanes<double>& sum) {
#pragma GCC unroll 8
  for (int64_t p = 0; p < total.parts; ++p) total.part[p] += sum.part[p];
}

template <typename T>
inline T lane_sum(const T* values, int64_t size) {
  Lanes<T> lanes = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
#pragma GCC unroll 8
    for (int64_t p = 0; p < lanes.parts; ++p) lanes.part[p] += load(values + i + p * lanes.width);
  }
  T rest[kLanes] = {};
  for (int64_t l = 0; l < size - i; ++l) rest[l] = values[i + l];
#pragma GCC unroll 8
  for (int64_t p = 0; p < lanes.parts; ++p) lanes.part[p] += load(rest + p * lanes.width);
  return lanes.sum();
}

// The largest value, NaN passed over; −inf where there is none.
template <typename T>
inline T lane_max(const T* values, int64_t size) {
  constexpr int64_t width = VectorOf<T>::lanes, chains = 4;  // independent ones: a maximum takes several cycles
  const int64_t whole = size / (chains * width) * (chains * width);
  T lane[chains * width];
  for (T& value : lane) value = -static_cast<T>(INFINITY);
  Vector<T> most[chains];
  std::memcpy(most, lane, sizeof lane);
  for (int64_t i = 0; i < whole; i += chains * width) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < chains; ++c) most[c] = Larger()(most[c], load(values + i + c * width));
  }
  std::memcpy(lane, most, sizeof lane);
  T result = halved<chains * width>(lane, Larger());
  for (int64_t i = whole; i < size; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

}  // namespace
}  // namespace ncpvae
