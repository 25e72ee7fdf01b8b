// sir_resample.h: summaries of a row's parts, however they are merged, are the summary of the row.
#include "sir_resample.h"

#include "check.h"

using namespace ncpvae;
using sir::Summary;

namespace {

const Summary kNothing{-INFINITY, 0, 0};

Summary of_weights(const double* w, int count) {
  Summary s = kNothing;
  for (int i = 0; i < count; ++i) s.log_max = std::fmax(s.log_max, w[i]);
  for (int i = 0; i < count && s.log_max > -INFINITY; ++i) {
    s.total += std::exp(w[i] - s.log_max);
    s.total_sq += std::exp(2 * (w[i] - s.log_max));
  }
  return s;
}

void check_same(const Summary& a, const Summary& b) {
  CHECK(a.log_max == b.log_max);
  CHECK_NEAR(a.total, b.total, 1e-13 * std::fabs(b.total));
  CHECK_NEAR(a.total_sq, b.total_sq, 1e-13 * std::fabs(b.total_sq));
}

void merging_is_associative_commutative_and_right() {
  Numbers numbers;
  for (const double spread : {0.0, 1.0, 30.0, 800.0, 1e300}) {
    for (int repeat = 0; repeat < 200; ++repeat) {
      double w[30];
      for (double& v : w) v = numbers.next() % 8 == 0 ? -INFINITY : numbers.between(-spread, spread);
      const Summary a = of_weights(w, 10), b = of_weights(w + 10, 10), c = of_weights(w + 20, 10);
      check_same(merge(merge(a, b), c), of_weights(w, 30));
      check_same(merge(a, merge(b, c)), of_weights(w, 30));
      check_same(merge(c, merge(b, a)), of_weights(w, 30));
    }
  }
}

void nothing_is_neutral_and_a_bad_part_spoils_the_row() {
  const Summary some{3, 2, 1.5}, bad{NAN, NAN, NAN};
  check_same(merge(some, kNothing), some);
  check_same(merge(kNothing, some), some);
  check_same(merge(kNothing, kNothing), kNothing);
  for (const Summary& other : {some, kNothing, bad}) {
    CHECK(std::isnan(merge(bad, other).log_max) && std::isnan(merge(other, bad).total));
  }
}

void statistics_of_a_row() {
  const double equal[] = {7, 7, 7, 7}, one[] = {-INFINITY, 2, -INFINITY};
  CHECK_NEAR(sir::log_mean_weight(of_weights(equal, 4), 4), 7, 1e-15);
  CHECK_NEAR(sir::effective_sample_size(of_weights(equal, 4)), 4, 1e-15);
  CHECK_NEAR(sir::log_mean_weight(of_weights(one, 3), 3), 2 - std::log(3.0), 1e-15);
  CHECK_NEAR(sir::effective_sample_size(of_weights(one, 3)), 1, 1e-15);
  CHECK(sir::log_mean_weight(kNothing, 5) == -INFINITY && sir::effective_sample_size(kNothing) == 0);
  const Summary bad{NAN, NAN, NAN};
  CHECK(std::isnan(sir::log_mean_weight(bad, 5)) && std::isnan(sir::effective_sample_size(bad)));
}

void draws_fall_inside_the_tile_and_never_on_one_without_mass() {
  double sum = 0;
  constexpr int count = 1 << 16;
  for (int i = 0; i < count; ++i) {
    const sir::Draw d = sir::draw({1, 2}, static_cast<uint64_t>(i), 3, {5, 2.5, 1});
    CHECK(std::isfinite(d.key) && d.threshold > 0 && d.threshold < 2.5);
    sum += d.key;
    CHECK(sir::draw({1, 2}, static_cast<uint64_t>(i), 3, kNothing).key == -INFINITY);
  }
  CHECK_NEAR(sum / count, 5 + std::log(2.5) + 0.57721566490153286, 5 * std::sqrt(M_PI * M_PI / 6 / count));
}

}  // namespace

int main() {
  merging_is_associative_commutative_and_right();
  nothing_is_neutral_and_a_bad_part_spoils_the_row();
  statistics_of_a_row();
  draws_fall_inside_the_tile_and_never_on_one_without_mass();
}
