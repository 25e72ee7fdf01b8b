// philox.h: the published known answers, and its maps at the edges and in the mean.
#include "philox.h"

#include "check.h"

using namespace ncpvae;

namespace {

constexpr uint32_t kEdges[] = {0u, 1u, 0x7fffffffu, 0x80000000u, 0xfffffffeu, 0xffffffffu};

bool equal(const Words& a, const Words& b) {
  return a.x[0] == b.x[0] && a.x[1] == b.x[1] && a.x[2] == b.x[2] && a.x[3] == b.x[3];
}

// Random123 1.14, tests/kat_vectors, "philox4x32 10".
void known_answers() {
  CHECK(equal(philox4x32({{0, 0, 0, 0}}, 0, 0), {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
  constexpr uint32_t ones = 0xffffffffu;
  CHECK(equal(philox4x32({{ones, ones, ones, ones}}, ones, ones),
              {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
  CHECK(equal(philox4x32({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u),
              {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}));
}

void words_are_addressed_by_all_of_seed_index_and_sub() {
  const Seed seed{0x299f31d0a4093822, 0x1234567803707344};  // of the stream, the low half counts
  const uint64_t index = 0x85a308d3243f6a88u;
  CHECK(equal(random_words(seed, index, 0x13198a2eu), {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}));
  CHECK(equal(random_words({-1, -1}, ~uint64_t{0}, ~0u), philox4x32({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u)));
}

void uniforms_are_midpoints_of_2_to_52_cells() {
  CHECK(uniform52(0, 0) == 0x1p-53);
  CHECK(uniform52(~0u, ~0u) == 1 - 0x1p-53);
  CHECK(uniform52(5, 0xfff) == uniform52(5, 0));
  CHECK(uniform52(5, 0x1000) - uniform52(5, 0) == 0x1p-52);
  for (const uint32_t high : kEdges) {
    for (const uint32_t low : kEdges) {
      const double u = uniform52(high, low);
      CHECK(u > 0 && u < 1);
      CHECK(std::isfinite(gumbel(u)));
    }
  }
}

void gumbels_have_their_edges_and_moments() {
  const double log_two = std::log(2.0);
  CHECK_NEAR(gumbel(uniform52(0, 0)), -std::log(53 * log_two), 1e-14);
  CHECK_NEAR(gumbel(uniform52(~0u, ~0u)), 53 * log_two, 1e-13);
  constexpr int count = 1 << 18;
  double sum = 0, square = 0;
  for (int i = 0; i < count; ++i) {
    const Words words = random_words({3, 4}, static_cast<uint64_t>(i), 0);
    const double g = gumbel(uniform52(words.x[0], words.x[1]));
    sum += g;
    square += g * g;
  }
  const double mean = sum / count, variance = M_PI * M_PI / 6;
  CHECK_NEAR(mean, 0.57721566490153286, 5 * std::sqrt(variance / count));
  // the fourth central moment of the Gumbel distribution is 27/5 of the squared variance
  CHECK_NEAR(square / count - mean * mean, variance, 5 * variance * std::sqrt(4.4 / count));
}

template <typename T>
void normals_are_finite_at_the_edges() {
  for (const uint32_t first : kEdges) {
    for (const uint32_t second : kEdges) {
      T a, b;
      normal_pair<T>(first, second, a, b);
      CHECK(std::isfinite(a) && std::isfinite(b));
      const double u = (static_cast<double>(first) + 0.5) * 0x1p-32;
      // float rounds u close to one, where the radius is 1e-5 at most
      CHECK_NEAR(std::hypot(a, b), std::sqrt(-2 * std::log(u)), sizeof(T) == 4 ? 5e-4 : 1e-12);
    }
  }
  T a, b;
  normal_pair<T>(0, 0x40000000u, a, b);  // a quarter turn
  CHECK_NEAR(a, 0, 1e-5);
  CHECK_NEAR(b, std::sqrt(66 * std::log(2.0)), 1e-5);
}

template <typename T>
void normals_have_their_moments() {
  constexpr int count = 1 << 18;
  double moment[4] = {}, product = 0;
  for (int i = 0; i < count; ++i) {
    const Words words = random_words({5, 6}, static_cast<uint64_t>(i), 0);
    T a, b;
    normal_pair<T>(words.x[0], words.x[1], a, b);
    double first, second;
    normal_pair<double>(words.x[0], words.x[1], first, second);
    CHECK_NEAR(a, first, 1e-5);
    CHECK_NEAR(b, second, 1e-5);
    for (const double v : {static_cast<double>(a), static_cast<double>(b)}) {
      moment[0] += v;
      moment[1] += v * v;
      moment[2] += v * v * v;
      moment[3] += v * v * v * v;
    }
    product += static_cast<double>(a) * b;
  }
  const double expected[] = {0, 1, 0, 3}, variance[] = {1, 2, 15, 96};
  for (int m = 0; m < 4; ++m) CHECK_NEAR(moment[m] / (2 * count), expected[m], 5 * std::sqrt(variance[m] / (2 * count)));
  CHECK_NEAR(product / count, 0, 5 / std::sqrt(count));
}

}  // namespace

int main() {
  known_answers();
  words_are_addressed_by_all_of_seed_index_and_sub();
  uniforms_are_midpoints_of_2_to_52_cells();
  gumbels_have_their_edges_and_moments();
  normals_are_finite_at_the_edges<float>();
  normals_are_finite_at_the_edges<double>();
  normals_have_their_moments<float>();
  normals_have_their_moments<double>();
}
