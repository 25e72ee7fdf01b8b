// One Langevin step on the GPU: a thread per four elements, which is what one Philox call makes Normals for. The op
// is bound by memory, so z and the score are read once and the base prior's gradient is formed on the way.
//
// The reference is `langevin_step` in python/ncpvae/ops/reference.py; the arithmetic shared with the CPU is in
// langevin_step.h.
#include "langevin_step.h"
#include "launch.h"

namespace ncpvae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;

// No tensor that fits in memory has more runs of alternating broadcast and real dimensions of two or more.
constexpr int kMaxRuns = 40;

// A contiguous tensor broadcast over z: z's row-major shape, last dimension first, with neighbouring dimensions
// joined where the tensor's stride allows. A tensor of z's trailing shape is one run; a scalar is one of stride 0.
struct Broadcast {
  const void* data;
  int runs;
  Divisor size[kMaxRuns];
  int64_t stride[kMaxRuns];
  bool together;  // no quad of z crosses the end of the innermost run
  bool aligned;   // and those that start a quad of the tensor may be read at once
};

// The tensor's element under element `element` of z.
__device__ __forceinline__ int64_t offset_of(const Broadcast& b, int64_t element) {
  int64_t offset = 0;
  for (int run = 0; run < b.runs; ++run) {
    int64_t position;
    element = b.size[run].divide(element, position);
    offset += position * b.stride[run];
  }
  return offset;
}

// data[first …] to `out`, `count` of them.
template <typename T>
__device__ __forceinline__ void load(const T* data, int64_t first, int count, bool aligned,
                                     Accumulate<T> (&out)[kQuad]) {
  if (aligned && count == kQuad) {
    const auto pack = *reinterpret_cast<const Pack<T, kQuad>*>(data + first);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = static_cast<Accumulate<T>>(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < count) out[i] = static_cast<Accumulate<T>>(data[first + i]);
    }
  }
}

// The values under z's elements first … first + count − 1. Where the innermost run is a multiple of four long, no
// quad crosses its end, so that one index serves all four.
template <typename T>
__device__ __forceinline__ void load(const Broadcast& b, int64_t first, int count, Accumulate<T> (&out)[kQuad]) {
  const T* data = static_cast<const T*>(b.data);
  const int64_t offset = offset_of(b, first);
  if (b.together && b.stride[0] == 1) {
    load(data, offset, count, b.aligned, out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (i >= count) break;
    const int64_t at = b.together || i == 0 ? offset : offset_of(b, first + i);
    out[i] = static_cast<Accumulate<T>>(data[at]);
  }
}

struct NoBase {};
struct NormalBase {
  Broadcast mean, std;
};

template <typename T>
struct Step {
  const T *z, *score;
  T* out;  // may be z
  const int64_t* seed;
  int64_t count;
  Accumulate<T> half_step_size, noise_scale;
  bool aligned;  // z, score and out take quads at once
};

template <typename T, typename Base>
__global__ void __launch_bounds__(kThreads, 3) step_kernel(Step<T> s, const Base base) {
  using A = Accumulate<T>;
  const Seed seed{s.seed[0], s.seed[1]};
  const int64_t quads = (s.count + kQuad - 1) / kQuad, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t quad = blockIdx.x * int64_t{kThreads} + threadIdx.x; quad < quads; quad += stride) {
    const int64_t first = quad * kQuad;
    const int count = s.count - first < kQuad ? static_cast<int>(s.count - first) : kQuad;
    A z[kQuad] = {}, drift[kQuad] = {}, noise[kQuad] = {};
    load<T>(s.z, first, count, s.aligned, z);
    load<T>(s.score, first, count, s.aligned, drift);
    if constexpr (std::is_same_v<Base, NormalBase>) {
      A mean[kQuad] = {}, std[kQuad] = {1, 1, 1, 1};
      load<T>(base.mean, first, count, mean);
      load<T>(base.std, first, count, std);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        drift[i] = langevin::drift_with_base(z[i], drift[i], mean[i], fast_reciprocal(std[i]));
      }
    }
    if (s.noise_scale > 0) langevin::normals(seed, static_cast<uint64_t>(quad), noise);
    Pack<T, kQuad> result;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      result.value[i] = static_cast<T>(langevin::step(z[i], drift[i], s.half_step_size, s.noise_scale, noise[i]));
    }
    if (s.aligned && count == kQuad) {
      *reinterpret_cast<Pack<T, kQuad>*>(s.out + first) = result;
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (i < count) s.out[first + i] = result.value[i];
      }
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

Broadcast broadcast(const char* op, const char* name, const Tensor& tensor, const Tensor& z) {
  check_dtype(op, name, tensor, z.scalar_type());
  bool fits = tensor.dim() <= z.dim();
  Broadcast b{};
  b.data = tensor.const_data_ptr();
  int64_t own_stride = 1;  // of the contiguous tensor's dimension at hand
  for (int64_t back = 1; fits && back <= z.dim(); ++back) {
    const int64_t want = z.size(z.dim() - back), have = back <= tensor.dim() ? tensor.size(tensor.dim() - back) : 1;
    fits = have == 1 || have == want;
    if (want == 1) continue;
    const int64_t stride = have == 1 ? 0 : own_stride;
    own_stride *= have;
    const int last = b.runs - 1;
    if (last >= 0 && (stride == 0) == (b.stride[last] == 0)) {
      b.size[last] = Divisor(static_cast<int64_t>(b.size[last].value) * want);
      continue;
    }
    fits = fits && b.runs < kMaxRuns;
    if (!fits) break;
    b.size[b.runs] = Divisor(want);
    b.stride[b.runs++] = stride;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must broadcast to z's shape ", shape_text(z.sizes()), ", got ",
                  shape_text(tensor.sizes()));
  if (b.runs > 0 && b.stride[b.runs - 1] == 0) --b.runs;  // what is left of the index needs no division
  b.together = b.runs == 0 || b.size[0].value % kQuad == 0;
  b.aligned = reinterpret_cast<uintptr_t>(b.data) % std::min<uintptr_t>(16, kQuad * tensor.element_size()) == 0;
  return b;
}

struct Arguments {
  Tensor z, score, seed;
  std::optional<Tensor> mean, std;
  double step_size, temperature;
};

Arguments check(const char* op, const Tensor& z, const Tensor& score, const Tensor& seed, double step_size,
                const std::optional<Tensor>& mean, const std::optional<Tensor>& std, double temperature) {
  check_dtype(op, "score", score, z.scalar_type());
  check_shape(op, "score", score, z.sizes());
  check_seed(op, seed);
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), op, ": base_mean and base_std must be given together");
  Arguments a{as_contiguous(z), as_contiguous(score), as_contiguous(seed), std::nullopt, std::nullopt,
              step_size,        temperature};
  if (mean.has_value()) {
    a.mean = as_contiguous(*mean);
    a.std = as_contiguous(*std);
  }
  return a;
}

void run(const char* op, const Arguments& a, const Tensor& out) {
  if (a.z.numel() == 0) return;
  const Launcher launcher(op, a.z);
  dispatch_floating(op, "z", a.z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const T *z = data<T>(a.z), *score = data<T>(a.score);
    T* to = mutable_data<T>(out);
    const bool aligned = aligned_for<T, kQuad>(z) && aligned_for<T, kQuad>(score) && aligned_for<T, kQuad>(to);
    const auto half_step_size = static_cast<A>(0.5 * a.step_size);
    const auto noise_scale = static_cast<A>(std::sqrt(a.step_size * a.temperature));
    const Step<T> step{z, score, to, data<int64_t>(a.seed), a.z.numel(), half_step_size, noise_scale, aligned};
    const int64_t blocks = ceil_div(step.count, kQuad * kThreads);
    if (a.mean.has_value()) {
      const NormalBase base{broadcast(op, "base_mean", *a.mean, a.z), broadcast(op, "base_std", *a.std, a.z)};
      launcher.launch(step_kernel<T, NormalBase>, blocks, kThreads, step, base);
    } else {
      launcher.launch(step_kernel<T, NoBase>, blocks, kThreads, step, NoBase{});
    }
  });
}

Tensor langevin_step(const Tensor& z, const Tensor& score, const Tensor& seed, double step_size,
                     const std::optional<Tensor>& base_mean, const std::optional<Tensor>& base_std,
                     double temperature) {
  const Arguments a = check("langevin_step", z, score, seed, step_size, base_mean, base_std, temperature);
  const Tensor out = torch::stable::new_empty(a.z, z.sizes());
  run("langevin_step", a, out);
  return out;
}

// Whether a kernel that writes z as it goes may still read `other`: they lie apart, or element on element.
bool independent(const Tensor& z, const std::optional<Tensor>& other) {
  if (!other.has_value()) return true;
  const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + static_cast<uintptr_t>(t.numel()) * t.element_size(); };
  if (end(z) <= begin(*other) || end(*other) <= begin(z)) return true;
  return begin(z) == begin(*other) && z.numel() == other->numel();
}

void langevin_step_(const Tensor& z, const Tensor& score, const Tensor& seed, double step_size,
                    const std::optional<Tensor>& base_mean, const std::optional<Tensor>& base_std, double temperature) {
  const Arguments a = check("langevin_step_", z, score, seed, step_size, base_mean, base_std, temperature);
  const bool in_place = z.is_contiguous() && independent(z, a.score) && independent(z, a.mean) && independent(z, a.std);
  const Tensor out = in_place ? z : torch::stable::new_empty(a.z, z.sizes());
  run("langevin_step_", a, out);
  Tensor target = z;
  if (!in_place) torch::stable::copy_(target, out);
}

}  // namespace
}  // namespace ncpvae::cuda

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CUDA, m) {
  m.impl("langevin_step", TORCH_BOX(&ncpvae::cuda::langevin_step));
  m.impl("langevin_step_", TORCH_BOX(&ncpvae::cuda::langevin_step_));
}
