// CPU kernels of langevin_step and langevin_step_. Contract: python/ncpvae/ops/langevin_step.py.
#include "langevin_step.h"

#include <optional>
#include <vector>

#include "tensor.h"
#include "vector_math.h"

namespace ncpvae {
namespace {

constexpr int64_t kChunk = 256;      // elements that a thread works on at a time, in the first-level cache
constexpr int64_t kChunkGrain = 16;  // chunks worth a thread of their own
constexpr int64_t kMaxDims = 64;

// Standard Normals for the kChunk elements from block `first_block` on. Same arithmetic as langevin::normals, laid
// out so that each loop runs over independent blocks.
template <typename T>
void fill_normals(Seed seed, uint64_t first_block, T* noise) {
  constexpr int64_t blocks = kChunk / 4;
  alignas(64) uint32_t words[4][blocks];
  for (int64_t b = 0; b < blocks; ++b) {
    const Words w = random_words(seed, first_block + b, 0);
    for (int64_t i = 0; i < 4; ++i) words[i][b] = w.x[i];
  }
  alignas(64) T normal[4][blocks];
  for (int64_t pair = 0; pair < 4; pair += 2) {
    for (int64_t b = 0; b < blocks; ++b) {
      const T u = static_cast<T>(words[pair][b]) * T(0x1p-32) + T(0x1p-33);
      const T radius = std::sqrt(T(-2) * fast_log(u));
      const T angle = static_cast<T>(words[pair + 1][b]) * static_cast<T>(6.283185307179586 * 0x1p-32);
      T sine, cosine;
      fast_sincos(angle, sine, cosine);
      normal[pair][b] = radius * cosine;
      normal[pair + 1][b] = radius * sine;
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < 4; ++i) noise[4 * b + i] = normal[i][b];
  }
}

// A tensor read as if expanded to z's shape. Dimensions that can be walked as one are joined: what is left for a full
// tensor is one dimension, for a repeated trailing block two, the outer one of stride 0.
struct Broadcast {
  const void* data = nullptr;
  int64_t dims = 0;
  int64_t size[kMaxDims], stride[kMaxDims];

  template <typename T>
  void load(int64_t start, int64_t count, Accumulate<T>* out) const {
    int64_t at[kMaxDims], offset = 0, rest = start;
    for (int64_t d = dims - 1; d >= 0; --d) {
      at[d] = rest % size[d];
      rest /= size[d];
      offset += at[d] * stride[d];
    }
    const T* values = static_cast<const T*>(data);
    const int64_t last = dims - 1, step = stride[last];
    while (count > 0) {
      const int64_t run = count < size[last] - at[last] ? count : size[last] - at[last];
      for (int64_t i = 0; i < run; ++i) out[i] = static_cast<Accumulate<T>>(values[offset + i * step]);
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

// A block repeated many times in a row, written out to at least one chunk: a short one, such as the mean of a
// two-dimensional latent, would otherwise be copied two values at a time.
template <typename T>
void repeat_short_block(Broadcast& view, std::vector<T>& storage) {
  if (view.dims != 2 || view.stride[0] != 0 || view.size[1] >= kChunk || view.size[0] < 4 * kChunk) return;
  const int64_t period = view.size[1], total = view.size[0] * period;
  const int64_t written = (4 * kChunk + period - 1) / period * period;
  storage.resize(written);
  const T* values = static_cast<const T*>(view.data);
  for (int64_t i = 0; i < written; ++i) storage[i] = values[i % period * view.stride[1]];
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
};

template <typename T>
void langevin(const Step& p, const T* z, const T* score, T* out) {
  using A = Accumulate<T>;
  const A half_step_size = static_cast<A>(0.5 * p.step_size);
  const A noise_scale = static_cast<A>(std::sqrt(p.step_size * p.temperature));
  const int64_t chunks = (p.count + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, kChunkGrain, [&](int64_t begin, int64_t end) {
    alignas(64) A noise[kChunk] = {}, mean[kChunk], std[kChunk], drift[kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = chunk * kChunk, size = p.count - start < kChunk ? p.count - start : kChunk;
      if (p.temperature > 0) fill_normals(p.seed, start / 4, noise);
      for (int64_t i = 0; i < size; ++i) drift[i] = static_cast<A>(score[start + i]);
      if (p.mean) {
        p.mean->load<T>(start, size, mean);
        p.std->load<T>(start, size, std);
        for (int64_t i = 0; i < size; ++i) {
          drift[i] = langevin::drift_with_base(static_cast<A>(z[start + i]), drift[i], mean[i], std[i]);
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        const A next = langevin::step(static_cast<A>(z[start + i]), drift[i], half_step_size, noise_scale, noise[i]);
        out[start + i] = static_cast<T>(next);
      }
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
    Step step{z.numel(), {words[0], words[1]}, step_size, temperature, nullptr, nullptr};
    Broadcast mean, std;
    std::vector<T> mean_storage, std_storage;
    if (base_mean) {
      check_dtype(op, "base_mean", *base_mean, type);
      check_dtype(op, "base_std", *base_std, type);
      mean = broadcast(op, "base_mean", *base_mean, z);
      std = broadcast(op, "base_std", *base_std, z);
      repeat_short_block(mean, mean_storage);
      repeat_short_block(std, std_storage);
      step.mean = &mean;
      step.std = &std;
    }
    langevin<T>(step, data<T>(dense_z), data<T>(dense_score), mutable_data<T>(out));
  });
}

Tensor langevin_step(Tensor z, Tensor score, Tensor seed, double step_size, std::optional<Tensor> base_mean,
                     std::optional<Tensor> base_std, double temperature) {
  const Tensor out = torch::stable::new_empty(z, z.sizes());
  run("langevin_step", z, score, seed, step_size, base_mean, base_std, temperature, out);
  return out;
}

void langevin_step_(Tensor z, Tensor score, Tensor seed, double step_size, std::optional<Tensor> base_mean,
                    std::optional<Tensor> base_std, double temperature) {
  const Tensor out = z.is_contiguous() ? z : torch::stable::new_empty(z, z.sizes());
  run("langevin_step_", z, score, seed, step_size, base_mean, base_std, temperature, out);
  if (!z.is_contiguous()) torch::stable::copy_(z, out);
}

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CPU, m) {
  m.impl("langevin_step", TORCH_BOX(&langevin_step));
  m.impl("langevin_step_", TORCH_BOX(&langevin_step_));
}

}  // namespace
}  // namespace ncpvae
