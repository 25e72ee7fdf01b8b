// logsumexp.h: running logsumexps, added to and merged in any order, have torch.logsumexp's value.
#include "logsumexp.h"

#include <algorithm>

#include "check.h"

using namespace ncpvae;

namespace {

template <typename T>
long double logsumexp(const T* values, int count) {
  const long double max = *std::max_element(values, values + count);
  if (std::isinf(max)) return max;
  long double sum = 0;
  for (int i = 0; i < count; ++i) sum += std::exp(values[i] - max);
  return max + std::log(sum);
}

template <typename T>
RunningLogSumExp<T> of(const T* values, int count) {
  RunningLogSumExp<T> state;
  for (int i = 0; i < count; ++i) state.add(values[i]);
  return state;
}

template <typename T>
void any_order_gives_the_sum() {
  Numbers numbers;
  for (const double spread : {0.0, 1.0, 60.0, 1e4, 1e37}) {
    for (int repeat = 0; repeat < 200; ++repeat) {
      T values[40];
      for (T& v : values) v = static_cast<T>(numbers.next() % 8 == 0 ? -INFINITY : numbers.between(-spread, spread));
      const long double truth = logsumexp(values, 40);
      const double tolerance = 40 * std::numeric_limits<T>::epsilon() * std::max<double>(1, std::fabs(truth));
      RunningLogSumExp<T> whole = of(values, 40), first = of(values, 13), second = of(values + 13, 27), turned = second;
      first.merge(second.max, second.sum);
      turned.merge(of(values, 13).max, of(values, 13).sum);
      std::sort(values, values + 40);
      for (const T value : {whole.value(), first.value(), turned.value(), of(values, 40).value()}) {
        if (std::isinf(truth)) {
          CHECK(value == static_cast<T>(truth));
        } else {
          CHECK_NEAR(value, truth, tolerance);
        }
      }
    }
  }
}

template <typename T>
void values_that_are_no_numbers_are_kept() {
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(RunningLogSumExp<T>{}.value() == -infinity);
  const T none[] = {-infinity, -infinity}, all[] = {1, infinity, 2}, lost[] = {1, static_cast<T>(NAN), infinity, 2};
  CHECK(of(none, 2).value() == -infinity);
  CHECK(of(all, 3).value() == infinity);
  CHECK(std::isnan(of(lost, 2).value()) && std::isnan(of(lost + 1, 3).value()));
  RunningLogSumExp<T> state = of(all, 1);
  state.merge(-infinity, 0);
  CHECK(state.max == 1 && state.sum == 1);
}

}  // namespace

int main() {
  any_order_gives_the_sum<float>();
  any_order_gives_the_sum<double>();
  values_that_are_no_numbers_are_kept<float>();
  values_that_are_no_numbers_are_kept<double>();
}
