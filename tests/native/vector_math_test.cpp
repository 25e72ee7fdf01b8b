// cpu/vector_math.h: the error bounds that its comments claim, against long double. Prints a digest of its sums, whose
// bits must be the same for every instruction set that this is compiled for.
#include "cpu/vector_math.h"

#include <limits>

#include "check.h"

using namespace ncpvae;

namespace {

template <typename T>
double ulps(T value, long double truth) {
  int exponent;
  std::frexp(truth, &exponent);
  const int lowest = std::numeric_limits<T>::min_exponent;
  const long double unit = std::ldexp(1.0L, (exponent < lowest ? lowest : exponent) - std::numeric_limits<T>::digits);
  return static_cast<double>(std::fabs(value - truth) / unit);
}

// f(x) for many x of [low, high], evenly spaced, and many whose logarithms are
template <typename T, typename F>
void sweep(T low, T high, F f) {
  Numbers numbers;
  for (int i = 0; i < 200'000; ++i) {
    f(static_cast<T>(numbers.between(low, high)));
    const double small = std::exp2(numbers.between(-40, 0));
    f(static_cast<T>(low * small));
    f(static_cast<T>(high * small));
  }
  f(low);
  f(high);
}

template <typename T>
void exp_within_two_ulp() {
  const T infinity = std::numeric_limits<T>::infinity();
  const T low = sizeof(T) == 4 ? T(-103.9) : T(-745.1), high = sizeof(T) == 4 ? T(88.72) : T(709.78);
  sweep(low, high, [](T x) { CHECK_NEAR(ulps(fast_exp(x), std::exp(static_cast<long double>(x))), 0, 2); });
  CHECK(fast_exp(T(0)) == 1 && fast_exp(-infinity) == 0 && fast_exp(infinity) == infinity);
  CHECK(fast_exp(high + 1) == infinity && fast_exp(-std::numeric_limits<T>::max()) == 0);
  CHECK(std::isnan(fast_exp(static_cast<T>(NAN))));
}

template <typename T>
T rough(T x) {
  return rough_exp_nonpositive(Vector<T>{} + x)[0];
}

template <typename T>
void exp_nonpositive_within_its_bounds() {
  const T infinity = std::numeric_limits<T>::infinity();
  const T low = sizeof(T) == 4 ? T(-87.33) : T(-708);
  sweep(low, T(0), [](T x) {
    const long double truth = std::exp(static_cast<long double>(x));
    CHECK_NEAR(ulps(exp_nonpositive(x), truth), 0, 2);
    CHECK_NEAR(ulps(rough(x), truth), 0, 2 - 1.25 * x);
  });
  for (const T x : {T(low * 1.001), T(-1e4), T(-1e30), -std::numeric_limits<T>::max(), -infinity}) {
    CHECK(exp_nonpositive(x) == 0 && rough(x) == 0);
  }
  CHECK(exp_nonpositive(T(0)) == 1 && rough(T(0)) == 1);
  CHECK(std::isnan(exp_nonpositive(static_cast<T>(NAN))) && std::isnan(rough(static_cast<T>(NAN))));
}

template <typename T>
void log_within_two_ulp() {
  const auto check = [](T x) { CHECK_NEAR(ulps(fast_log(x), std::log(static_cast<long double>(x))), 0, 2); };
  sweep(T(1e-4), T(4), check);
  sweep(T(0.999), T(1.001), check);
  sweep(T(1), std::numeric_limits<T>::max(), check);
  check(std::numeric_limits<T>::min());
  CHECK(fast_log(T(1)) == 0);
}

template <typename T>
void sincos_within_1e_7() {
  sweep(T(0), T(6.283185307179586), [](T angle) {
    T sine, cosine;
    fast_sincos(angle, sine, cosine);
    CHECK_NEAR(sine, std::sin(static_cast<long double>(angle)), 1e-7);
    CHECK_NEAR(cosine, std::cos(static_cast<long double>(angle)), 1e-7);
  });
}

template <typename T>
void sums_and_maxima_of_any_length() {
  Numbers numbers;
  T values[200];
  uint64_t digest = 0;
  for (T& v : values) v = static_cast<T>(static_cast<double>(numbers.next() >> 11) * 0x1p-53 - 0.5);  // exact in double
  for (int64_t size = 0; size <= 200; ++size) {
    long double sum = 0;
    T max = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < size; ++i) {
      sum += values[i];
      max = values[i] > max ? values[i] : max;
    }
    const T got = lane_sum(values, size);
    CHECK_NEAR(got, sum, 400 * std::numeric_limits<T>::epsilon());
    CHECK(lane_max(values, size) == max);
    uint64_t bits = 0;
    std::memcpy(&bits, &got, sizeof(got));
    digest = digest * 0x9E3779B97F4A7C15u + bits;
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
  values[7] = static_cast<T>(NAN);
  values[150] = 5;
  CHECK(lane_max(values, 200) == 5 && std::isnan(lane_sum(values, 200)));
  values[0] = static_cast<T>(NAN);
  CHECK(lane_max(values, 1) == -std::numeric_limits<T>::infinity());
}

}  // namespace

int main() {
  exp_within_two_ulp<float>();
  exp_within_two_ulp<double>();
  exp_nonpositive_within_its_bounds<float>();
  exp_nonpositive_within_its_bounds<double>();
  log_within_two_ulp<float>();
  log_within_two_ulp<double>();
  sincos_within_1e_7<float>();
  sincos_within_1e_7<double>();
  sums_and_maxima_of_any_length<float>();
  sums_and_maxima_of_any_length<double>();
}
