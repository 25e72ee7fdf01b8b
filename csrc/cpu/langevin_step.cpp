// CPU kernels of langevin_step and langevin_step_. Contract: python/ncpvae/ops/langevin_step.py.
#include "langevin_step.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "convert.h"
#include "philox_lanes.h"
#include "tensor.h"
#include "vector_math.h"

namespace ncpvae {
namespace {

constexpr int64_t kChunk = 256;          // elements that a thread works on at a time, in the first-level cache
constexpr int64_t kBlocks = kChunk / 4;  // of four Normals
constexpr int64_t kChunkGrain = 16;      // chunks worth a thread of their own
constexpr int64_t kInverted = 1 << 14;   // at most so many standard deviations are inverted before the step
constexpr int64_t kMaxDims = 64;

// words[i][b] = word i of block first_block + b
void fill_words(Seed seed, uint64_t first_block, uint32_t (&words)[4][kBlocks]) {
  for (int64_t b = 0; b < kBlocks; b += kAbreast) {
    Wide x[kChains][4];
    fill_words(seed, first_block + static_cast<uint64_t>(b), 0, x);
    for (int64_t c = 0; c < kChains; ++c) {
      for (int64_t i = 0; i < 4; ++i) {
        for (int64_t l = 0; l < kWideLanes; ++l) {
          words[i][b + c * kWideLanes + l] = static_cast<uint32_t>(x[c][i][l]);
        }
      }
    }
  }
}

// Standard Normals for the kChunk elements from block `first_block` on. Same arithmetic as langevin::normals, laid
// out so that each loop runs over independent blocks.
template <typename T>
void fill_normals(Seed seed, uint64_t first_block, T* noise) {
  alignas(64) uint32_t words[4][kBlocks];
  fill_words(seed, first_block, words);
  alignas(64) T normal[4][kBlocks];
  for (int64_t pair = 0; pair < 4; pair += 2) {
    for (int64_t b = 0; b < kBlocks; ++b) {
      const T u = static_cast<T>(words[pair][b]) * T(0x1p-32) + T(0x1p-33);
      const T radius = std::sqrt(T(-2) * fast_log(u));
      const T angle = static_cast<T>(words[pair + 1][b]) * static_cast<T>(6.283185307179586 * 0x1p-32);
      T sine, cosine;
      fast_sincos(angle, sine, cosine);
      normal[pair][b] = radius * cosine;
      normal[pair + 1][b] = radius * sine;
    }
  }
  for (int64_t b = 0; b < kBlocks; ++b) {
    for (int64_t i = 0; i < 4; ++i) noise[4 * b + i] = normal[i][b];
  }
}

// A tensor read as if expanded to z's shape. Dimensions that can be walked as one are joined: what is left for a full
// tensor is one dimension, for a repeated trailing block two, the outer one of stride 0.
struct Broadcast {
  const void* data = nullptr;
  int64_t dims = 0;
  int64_t size[kMaxDims], stride[kMaxDims];

  // The values of `count` elements from `start` on: where they lie, if they do so one after the other, or in `space`.
  template <typename T>
  const Accumulate<T>* read(int64_t start, int64_t count, Accumulate<T>* space) const {
    Accumulate<T>* out = space;
    int64_t at[kMaxDims], offset = 0, rest = start;
    for (int64_t d = dims - 1; d >= 0; --d) {
      at[d] = rest % size[d];
      rest /= size[d];
      offset += at[d] * stride[d];
    }
    const T* values = static_cast<const T*>(data);
    const int64_t last = dims - 1, step = stride[last];
    if constexpr (std::is_same_v<T, Accumulate<T>>) {
      if (step == 1 && count <= size[last] - at[last]) return values + offset;
    }
    while (count > 0) {
      const int64_t run = count < size[last] - at[last] ? count : size[last] - at[last];
      if (step == 1) {
        widen(values + offset, run, out);
      } else {
        for (int64_t i = 0; i < run; ++i) out[i] = static_cast<Accumulate<T>>(values[offset + i * step]);
      }
      out += run;
      count -= run;
      at[last] += run;
      offset += run * step;
      for (int64_t d = last; d > 0 && at[d] == size[d]; --d) {
        offset += stride[d - 1] - at[d] * stride[d];
        at[d] = 0;
        ++at[d - 1];
      }
    }
    return space;
  }
};

Broadcast broadcast(const char* op, const char* name, const Tensor& tensor, const Tensor& z) {
  const int64_t lead = z.dim() - tensor.dim();
  Broadcast view;
  view.data = tensor.const_data_ptr();
  STD_TORCH_CHECK(z.dim() <= kMaxDims, op, ": z must have at most ", kMaxDims, " dimensions, got ", z.dim());
  for (int64_t d = 0; d < z.dim(); ++d) {
    const int64_t want = z.size(d), have = d < lead ? 1 : tensor.size(d - lead);
    STD_TORCH_CHECK(lead >= 0 && (have == want || have == 1), op, ": ", name, " must broadcast to z's shape ",
                    shape_text(z.sizes()), ", got ", shape_text(tensor.sizes()));
    if (want == 1) continue;
    const int64_t stride = have == 1 ? 0 : tensor.stride(d - lead);
    if (view.dims > 0 && view.stride[view.dims - 1] == stride * want) {
      view.size[view.dims - 1] *= want;
      view.stride[view.dims - 1] = stride;
    } else {
      view.size[view.dims] = want;
      view.stride[view.dims++] = stride;
    }
  }
  STD_TORCH_CHECK(lead >= 0, op, ": ", name, " must broadcast to z's shape ", shape_text(z.sizes()), ", got ",
                  shape_text(tensor.sizes()));
  if (view.dims == 0) view.size[0] = 1, view.stride[0] = 0, view.dims = 1;
  return view;
}

// A block repeated in a row, written out to a few chunks: a short one, such as the mean of a two-dimensional latent,
// would otherwise be read two values at a time.
template <typename T>
void repeat_short_block(Broadcast& view, std::vector<T>& storage) {
  if (view.dims != 2 || view.stride[0] != 0 || view.size[1] >= kChunk) return;
  const int64_t period = view.size[1], total = view.size[0] * period;
  if (total == 0) return;
  const int64_t written = std::min(total, (4 * kChunk + period - 1) / period * period);
  storage.resize(written);
  const T* values = static_cast<const T*>(view.data);
  for (int64_t i = 0; i < period; ++i) storage[i] = values[i * view.stride[1]];
  for (int64_t i = period; i < written; i *= 2) {
    std::copy_n(storage.begin(), std::min(i, written - i), storage.begin() + i);
  }
  view.data = storage.data();
  view.size[0] = (total + written - 1) / written;
  view.size[1] = written;
  view.stride[1] = 1;
}

struct Step {
  int64_t count;
  Seed seed;
  double step_size, temperature;
  const Broadcast *mean, *std;  // both null where no base is given
  bool inverted;                // `std` holds 1/std, as Accumulate<T>
};

template <typename T>
void langevin(const Step& p, const T* z, const T* score, T* out) {
  using A = Accumulate<T>;
  const A half_step_size = static_cast<A>(0.5 * p.step_size);
  const A noise_scale = static_cast<A>(std::sqrt(p.step_size * p.temperature));
  const int64_t chunks = (p.count + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, kChunkGrain, [&](int64_t begin, int64_t end) {
    alignas(64) A noise[kChunk] = {}, mean_space[kChunk], inverse_space[kChunk], drift[kChunk];
    alignas(64) A here_space[kChunk], next_space[kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = chunk * kChunk, size = p.count - start < kChunk ? p.count - start : kChunk;
      if (p.temperature > 0) fill_normals(p.seed, start / 4, noise);
      const A* here = widened(z + start, size, here_space);
      const A* slope = widened(score + start, size, drift);
      if (p.mean) {
        const A *mean = p.mean->read<T>(start, size, mean_space), *inverse = inverse_space;
        if (p.inverted) {
          inverse = p.std->read<A>(start, size, inverse_space);
        } else {
          const A* std = p.std->read<T>(start, size, inverse_space);
          for (int64_t i = 0; i < size; ++i) inverse_space[i] = A(1) / std[i];
        }
        for (int64_t i = 0; i < size; ++i) drift[i] = langevin::drift_with_base(here[i], slope[i], mean[i], inverse[i]);
        slope = drift;
      }
      A* next = next_space;
      if constexpr (std::is_same_v<T, A>) next = out + start;
      for (int64_t i = 0; i < size; ++i) {
        next[i] = langevin::step(here[i], slope[i], half_step_size, noise_scale, noise[i]);
      }
      if constexpr (!std::is_same_v<T, A>) narrow(next, size, out + start);
    }
  });
}

// Writes the step from `z` into `out`, contiguous, which may be z itself.
void run(const char* op, const Tensor& z, const Tensor& score, const Tensor& seed, double step_size,
         const std::optional<Tensor>& base_mean, const std::optional<Tensor>& base_std, double temperature,
         const Tensor& out) {
  const ScalarType type = z.scalar_type();
  check_dtype(op, "score", score, type);
  check_shape(op, "score", score, z.sizes());
  check_seed(op, seed);
  STD_TORCH_CHECK(base_mean.has_value() == base_std.has_value(), op,
                  ": base_mean and base_std must be given together, got only one of them");
  const Tensor dense_z = as_contiguous(z), dense_score = as_contiguous(score), dense_seed = as_contiguous(seed);
  const int64_t* words = data<int64_t>(dense_seed);
  dispatch_floating(op, "z", type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    Step step{z.numel(), {words[0], words[1]}, step_size, temperature, nullptr, nullptr, false};
    Broadcast mean, std;
    std::vector<T> mean_storage, std_storage;
    std::vector<A> inverse, inverse_storage;
    if (base_mean) {
      check_dtype(op, "base_mean", *base_mean, type);
      check_dtype(op, "base_std", *base_std, type);
      mean = broadcast(op, "base_mean", *base_mean, z);
      // Few enough to be inverted here by one thread, and shared by many elements.
      step.inverted = base_std->numel() <= kInverted && 16 * base_std->numel() <= step.count;
      const Tensor dense_std = step.inverted ? as_contiguous(*base_std) : *base_std;
      std = broadcast(op, "base_std", dense_std, z);
      repeat_short_block(mean, mean_storage);
      if (step.inverted) {
        inverse.resize(dense_std.numel());
        widen(data<T>(dense_std), dense_std.numel(), inverse.data());
        for (A& value : inverse) value = A(1) / value;
        std.data = inverse.data();
        repeat_short_block(std, inverse_storage);
      } else {
        repeat_short_block(std, std_storage);
      }
      step.mean = &mean;
      step.std = &std;
    }
    langevin<T>(step, data<T>(dense_z), data<T>(dense_score), mutable_data<T>(out));
  });
}

Tensor langevin_step(Tensor z, Tensor score, Tensor seed, double step_size, std::optional<Tensor> base_mean,
                     std::optional<Tensor> base_std, double temperature) {
  const Tensor out = new_tensor(z, z.sizes(), z.scalar_type());
  run("langevin_step", z, score, seed, step_size, base_mean, base_std, temperature, out);
  return out;
}

void langevin_step_(Tensor z, Tensor score, Tensor seed, double step_size, std::optional<Tensor> base_mean,
                    std::optional<Tensor> base_std, double temperature) {
  const Tensor out = z.is_contiguous() ? z : new_tensor(z, z.sizes(), z.scalar_type());
  run("langevin_step_", z, score, seed, step_size, base_mean, base_std, temperature, out);
  if (!z.is_contiguous()) torch::stable::copy_(z, out);
}

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CPU, m) {
  m.impl("langevin_step", TORCH_BOX(&langevin_step));
  m.impl("langevin_step_", TORCH_BOX(&langevin_step_));
}

}  // namespace
}  // namespace ncpvae
