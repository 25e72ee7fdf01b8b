// The components of gaussian_logsumexp's mixture, and tiles of log-joints log w_k N(z_n; k) with them.
#pragma once

#include <cmath>

#include "panels.h"
#include "tensor.h"

namespace ncpvae {
namespace {

constexpr int64_t kSumBlock = 8;  // squares summed at a stretch: sums of sums round less
constexpr int64_t kJointRows = kVectorBytes == 64 ? 8 : 4;  // rows of log-joints that the registers hold at once

// The mixture, packed: panels for forming log-joints and, where gradients are wanted, padded rows. A panel whose means
// all lie within kNear standard deviations of zero holds mean/std in place of the mean: t is a step shorter from these,
// and their rounding is no more than other steps'.
template <typename A>
struct Components {
  static constexpr A kNear = 6;
  int64_t K, D, padded;  // padded: D rounded up
  Buffer<A> mean_panels, inverse_std_panels, offset, mean_rows, inverse_std_rows;
  Buffer<bool> near;     // of panels
  bool ordinary = true;  // with rows: whether every std is within 2^±16 and every mean within ±2^20

  template <typename T>
  Components(const T* mean, const T* log_std, const T* log_weight, int64_t components, int64_t depth, bool with_rows)
      : K(components), D(depth), padded(round_up(depth, kPadding)) {
    const int64_t panels = (K + kPadding - 1) / kPadding;
    mean_panels = uninitialised<A>(panels * kPadding * D);
    inverse_std_panels = uninitialised<A>(panels * kPadding * D);
    offset = uninitialised<A>(panels * kPadding);
    near = uninitialised<bool>(panels);
    if (with_rows) mean_rows = uninitialised<A>(K * padded), inverse_std_rows = uninitialised<A>(K * padded);
    torch::stable::parallel_for(0, panels, tasks_per_thread(16.0 * kPadding * D), [&](int64_t begin, int64_t end) {
      const auto row = zeros<A>(2 * padded);
      for (int64_t k = begin * kPadding; k < end * kPadding; ++k) {
        A *mean_row = row.get(), *inverse_std_row = row.get() + padded;
        if (with_rows && k < K) {
          mean_row = mean_rows.get() + k * padded, inverse_std_row = inverse_std_rows.get() + k * padded;
          for (int64_t d = D; d < padded; ++d) mean_row[d] = inverse_std_row[d] = 0;
        }
        offset[k] = 0;
        if (k < K) {
          const double weight = log_weight ? static_cast<double>(log_weight[k]) : 0.0;
          offset[k] = static_cast<A>(weight - prepare(mean + k * D, log_std + k * D, mean_row, inverse_std_row));
        }
        const int64_t at = k / kPadding * kPadding * D + k % kPadding;
        for (int64_t d = 0; d < D; ++d) mean_panels[at + d * kPadding] = mean_row[d];
        for (int64_t d = 0; d < D; ++d) inverse_std_panels[at + d * kPadding] = inverse_std_row[d];
      }
      for (int64_t panel = begin; panel < end; ++panel) near[panel] = scale_if_near(panel * kPadding * D);
    });
    if (!with_rows) return;
    for (int64_t k = 0; k < K && ordinary; ++k) {
      bool outside = false;
      for (int64_t d = 0; d < D; ++d) {
        const A s = inverse_std_rows[k * padded + d], m = std::abs(mean_rows[k * padded + d]);
        outside |= !(s >= A(0x1p-16)) | !(s <= A(0x1p16)) | !(m <= A(0x1p20));
      }
      ordinary = !outside;
    }
  }

 private:
  // One component's row of means and of 1/std; returns the logarithm of its normalising constant.
  template <typename T>
  double prepare(const T* mean, const T* log_std, A* mean_row, A* inverse_std_row) const {
    for (int64_t d = 0; d < D; ++d) mean_row[d] = static_cast<A>(mean[d]);
    for (int64_t d = 0; d < D; ++d) inverse_std_row[d] = -static_cast<A>(log_std[d]);
    double log_constant = 0.5 * D * std::log(2 * 3.14159265358979323846);
    for (int64_t d = 0; d < D; ++d) log_constant -= inverse_std_row[d];
    for (int64_t d = 0; d < D; ++d) inverse_std_row[d] = fast_exp(inverse_std_row[d]);
    return log_constant;
  }

  // Whether the panel from this place on is near zero; then its means are divided by std.
  bool scale_if_near(int64_t at) {
    bool far = false;
    for (int64_t i = at; i < at + kPadding * D; ++i) {
      far |= !(std::abs(mean_panels[i] * inverse_std_panels[i]) <= kNear);
    }
    if (far) return false;
    for (int64_t i = at; i < at + kPadding * D; ++i) mean_panels[i] *= inverse_std_panels[i];
    return true;
  }
};

// out[rows, lanes] = offset − ½ Σ_d ((z − mean)/std)², z[D, kRowBlock] column by column; near: `mean` is mean/std
template <int64_t rows, bool near, typename A>
inline void joint_block(const A* z, const A* mean, const A* inverse_std, int64_t D, Vector<A> offset, A* out,
                        int64_t out_stride) {
  Vector<A> sum[rows] = {};
  for (int64_t start = 0; start < D; start += kSumBlock) {
    const int64_t end = start + kSumBlock < D ? start + kSumBlock : D;
    Vector<A> part[rows] = {};
    for (int64_t d = start; d < end; ++d) {
      const Vector<A> m = load(mean + d * kPadding), s = load(inverse_std + d * kPadding);
#pragma GCC unroll 8
      for (int64_t i = 0; i < rows; ++i) {
        const A here = z[d * kRowBlock + i];
        const Vector<A> t = near ? m - here * s : (m - here) * s;
        part[i] += t * t;
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) sum[i] += part[i];
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) store(out + i * out_stride, offset - A(0.5) * sum[i]);
}

// out[rows, columns] = log-joints of z's rows with the components [first, first + columns); z[D, kRowBlock] column by
// column. Up to three rows more are computed, and not to be read.
template <typename A>
void joint_tile(const A* z, const Components<A>& c, int64_t first, int64_t rows, int64_t columns, A* out,
                int64_t out_stride) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t column = 0; column < columns; column += lanes) {
    const int64_t k = first + column, at = k / kPadding * kPadding * c.D + k % kPadding;
    const A *mean = c.mean_panels.get() + at, *inverse_std = c.inverse_std_panels.get() + at;
    const Vector<A> offset = load(c.offset.get() + k);
    const bool near = c.near[k / kPadding];
    const auto joint = near ? joint_block<kJointRows, true, A> : joint_block<kJointRows, false, A>;
    const auto rest = near ? joint_block<4, true, A> : joint_block<4, false, A>;
    int64_t i = 0;
    for (; i + kJointRows <= rows; i += kJointRows) {
      joint(z + i, mean, inverse_std, c.D, offset, out + i * out_stride + column, out_stride);
    }
    for (; i < rows; i += 4) rest(z + i, mean, inverse_std, c.D, offset, out + i * out_stride + column, out_stride);
  }
}

}  // namespace
}  // namespace ncpvae
