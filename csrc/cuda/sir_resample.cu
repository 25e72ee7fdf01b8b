// Tile-Gumbel resampling on the GPU, in two launches and one pass over the weights.
//
// 1. `summarise_tiles`: a block per (row, tile of 1,024) reduces its weights to (max, Σe, Σe²) with one exp each.
//    Tiles, not rows, are the unit of work, so a single long row fills the GPU.
// 2. `draw_and_fold`: a warp per (row, draw) perturbs every tile's mass with one Philox call, keeps the largest key,
//    and reads only the winning tile again, to pick inside it by inverse CDF; one further warp per row folds the
//    tile summaries in order, so that streaming whole tiles rounds exactly as one call does.
//
// The reference is `sir_update` in python/ncpvae/ops/reference.py; the arithmetic shared with the CPU is in
// sir_resample.h.
#include "launch.h"
#include "sir_resample.h"

namespace ncpvae::cuda {
namespace {

using sir::kTile;
using sir::Summary;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerThread = kTile / kThreads;  // weights of a tile per thread of a block
constexpr int kPerLane = kTile / kWarp;       // weights of a tile per lane of a warp

template <typename T>
struct Weights {
  const T* data;
  int64_t row_stride;  // columns lie side by side
  int64_t rows, columns, tiles;
  bool aligned;  // every tile starts on a 16-byte boundary

  __device__ const T* tile(int64_t row, int64_t t) const { return data + row * row_stride + t * kTile; }
  __device__ int length(int64_t t) const {
    return static_cast<int>(columns - t * kTile < kTile ? columns - t * kTile : kTile);
  }
};

// tile[first …] to `out`, −inf past the tile's end.
template <typename T, int count>
__device__ void load(const T* tile, int first, int length, bool aligned, Accumulate<T>* out) {
  if (aligned && first + count <= length) {
    const Pack<T, count> pack = *reinterpret_cast<const Pack<T, count>*>(tile + first);
    for (int i = 0; i < count; ++i) out[i] = static_cast<Accumulate<T>>(pack.value[i]);
  } else {
    for (int i = 0; i < count; ++i) {
      out[i] = first + i < length ? static_cast<Accumulate<T>>(tile[first + i]) : -INFINITY;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) summarise_tiles(Weights<T> weights, Summary* summaries) {
  using A = Accumulate<T>;
  constexpr int kVector = 16 / sizeof(T);
  __shared__ A warp_high[kWarps];
  __shared__ double warp_total[kWarps], warp_total_sq[kWarps];
  const int thread = threadIdx.x, warp = thread / kWarp;

  for (int64_t item = blockIdx.x; item < weights.rows * weights.tiles; item += gridDim.x) {
    const int64_t row = item / weights.tiles, t = item - row * weights.tiles;
    A w[kPerThread];
    for (int i = 0; i < kPerThread; i += kVector) {
      load<T, kVector>(weights.tile(row, t), i * kThreads + thread * kVector, weights.length(t), weights.aligned,
                       w + i);
    }

    A high = -INFINITY;  // +inf marks a tile that holds NaN or +inf
    for (const A v : w) {
      const A candidate = v != v ? A(INFINITY) : v;
      high = candidate > high ? candidate : high;
    }
    high = warp_max(high);
    if (thread % kWarp == 0) warp_high[warp] = high;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) high = warp_high[i] > high ? warp_high[i] : high;

    const A origin = high == -INFINITY ? A(0) : high;
    A total = 0, total_sq = 0;  // eight terms in A, the rest in double
    for (const A v : w) {
      const A e = exp(v - origin);
      total += e;
      total_sq += e * e;
    }
    const double sum = warp_sum(static_cast<double>(total)), sum_sq = warp_sum(static_cast<double>(total_sq));
    if (thread % kWarp == 0) {
      warp_total[warp] = sum;
      warp_total_sq[warp] = sum_sq;
    }
    __syncthreads();
    if (thread == 0) {
      Summary s{static_cast<double>(high), 0, 0};
      for (int i = 0; i < kWarps; ++i) {
        s.total += warp_total[i];
        s.total_sq += warp_total_sq[i];
      }
      summaries[item] = high == INFINITY ? Summary{NAN, NAN, NAN} : s;
    }
  }
}

// A resampling state as in ops.SIRState. All null: the state before any proposal, or a state that is not asked for.
struct State {
  double* key;
  int64_t* index;
  double *log_max, *total, *total_sq;
};

template <typename T>
struct Resampling {
  Weights<T> weights;
  const Summary* summaries;  // [rows, tiles]
  const int64_t* seed;
  int64_t draws, next_index, next_tile;
  State before, after;
  Accumulate<T>*log_mean_weight, *ess;  // null where not asked for
};

// Where in a tile with maximum `high` a draw falls: the first weight whose cumulative Σe exceeds the threshold, in
// index order; never a weight of zero, whatever the rounding. Every lane holds 32 neighbouring weights.
template <typename T>
__device__ int pick(const Weights<T>& weights, int64_t row, int64_t t, Accumulate<T> high, double threshold) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  Accumulate<T> e[kPerLane];
  double mass = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i % kVector == 0) {
      load<T, kVector>(weights.tile(row, t), lane * kPerLane + i, weights.length(t), weights.aligned, e + i);
    }
    e[i] = exp(e[i] - high);
    mass += e[i];
  }
  double below = mass;  // of this lane and the lanes before it
  for (int by = 1; by < kWarp; by *= 2) {
    const double other = shuffle_up(below, by);
    if (lane >= by) below += other;
  }
  const unsigned reached = ballot(mass > 0 && below > threshold), massive = ballot(mass > 0);
  const int owner = reached != 0 ? __ffs(static_cast<int>(reached)) - 1 : kWarp - 1 - __clz(static_cast<int>(massive));

  double cumulative = shuffle_up(below, 1);
  if (lane == 0) cumulative = 0;
  int inside = 0;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    cumulative += e[i];
    if (e[i] > 0 && !found) {
      inside = lane * kPerLane + i;
      found = cumulative > threshold;
    }
  }
  return shuffle(inside, owner);
}

// Draw `draw` of a row, by a warp: the lanes share out the tiles.
template <typename T>
__device__ void choose(const Resampling<T>& r, int64_t row, int64_t draw) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row_draw = row * r.draws + draw;
  const Seed seed{r.seed[0], r.seed[1]};
  bool bad = r.before.key != nullptr && std::isnan(r.before.log_max[row]);
  sir::Draw best{-INFINITY, 0};
  int64_t winner = 0;
  for (int64_t t = lane; t < r.weights.tiles; t += kWarp) {
    const Summary s = r.summaries[row * r.weights.tiles + t];
    bad = bad || std::isnan(s.log_max);
    const sir::Draw d = sir::draw(seed, static_cast<uint64_t>(row_draw), static_cast<uint32_t>(r.next_tile + t), s);
    if (d.key > best.key) {
      best = d;
      winner = t;
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {  // the largest key; the lowest tile where keys are equal
    const sir::Draw other{shuffle_xor(best.key, mask), shuffle_xor(best.threshold, mask)};
    const int64_t other_winner = shuffle_xor(winner, mask);
    if (other.key > best.key || (other.key == best.key && other_winner < winner)) {
      best = other;
      winner = other_winner;
    }
  }
  bad = ballot(bad) != 0;

  double key = r.before.key == nullptr ? -INFINITY : r.before.key[row_draw];
  int64_t index = r.before.key == nullptr ? -1 : r.before.index[row_draw];
  if (bad) {
    key = -INFINITY;
    index = -1;
  } else if (best.key > key) {
    const auto high = static_cast<Accumulate<T>>(r.summaries[row * r.weights.tiles + winner].log_max);
    key = best.key;
    index = r.next_index + winner * kTile + pick(r.weights, row, winner, high, best.threshold);
  }
  if (lane == 0) {
    r.after.index[row_draw] = index;
    if (r.after.key != nullptr) r.after.key[row_draw] = key;
  }
}

// A row's summary after `tiles` more tiles, by a warp. The maxima and the factors e^{m − m'} of 32 tiles are found
// side by side; only one multiply-add per tile is left to do in order.
__device__ Summary fold(Summary state, const Summary* summaries, int64_t tiles) {
  const int lane = threadIdx.x % kWarp;
  bool bad = std::isnan(state.log_max);
  for (int64_t first = 0; first < tiles; first += kWarp) {
    const Summary s = first + lane < tiles ? summaries[first + lane] : Summary{-INFINITY, 0, 0};
    bad = bad || std::isnan(s.log_max);
    double high = s.log_max > state.log_max ? s.log_max : state.log_max;  // of the row up to this lane's tile
    for (int by = 1; by < kWarp; by *= 2) {
      const double other = shuffle_up(high, by);
      if (lane >= by && other > high) high = other;
    }
    double before = shuffle_up(high, 1);
    if (lane == 0) before = state.log_max;
    const double origin = high == -INFINITY ? 0.0 : high;
    const double keep = exp(before - origin), take = exp(s.log_max - origin);
    const double total = s.total * take, total_sq = s.total_sq * take * take;
    const int count = static_cast<int>(tiles - first < kWarp ? tiles - first : kWarp);
    for (int i = 0; i < count; ++i) {
      const double factor = shuffle(keep, i);
      state.total = fma(state.total, factor, shuffle(total, i));
      state.total_sq = fma(state.total_sq, factor * factor, shuffle(total_sq, i));
    }
    state.log_max = shuffle(high, kWarp - 1);
  }
  return ballot(bad) != 0 ? Summary{NAN, NAN, NAN} : state;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) draw_and_fold(Resampling<T> r) {
  const int64_t jobs = r.draws + 1;  // per row: its draws, then its fold
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; item < r.weights.rows * jobs;
       item += stride) {
    const int64_t row = item / jobs, job = item - row * jobs;
    if (job < r.draws) {
      choose(r, row, job);
      continue;
    }
    const State& from = r.before;
    const Summary start = from.key == nullptr ? Summary{-INFINITY, 0, 0}
                                              : Summary{from.log_max[row], from.total[row], from.total_sq[row]};
    const Summary s = fold(start, r.summaries + row * r.weights.tiles, r.weights.tiles);
    if (threadIdx.x % kWarp != 0) continue;
    if (r.after.key != nullptr) {
      r.after.log_max[row] = s.log_max;
      r.after.total[row] = s.total;
      r.after.total_sq[row] = s.total_sq;
    }
    if (r.ess != nullptr) {
      r.log_mean_weight[row] = static_cast<Accumulate<T>>(sir::log_mean_weight(s, r.weights.columns));
      r.ess[row] = static_cast<Accumulate<T>>(sir::effective_sample_size(s));
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

struct Request {
  int64_t draws, next_index, next_tile;
  State before, after;
  void *log_mean_weight, *ess;
};

void resample(const char* op, const Tensor& log_weights, const Tensor& seed, const Request& request) {
  const Launcher launcher(op, log_weights);
  const int64_t rows = log_weights.size(0), columns = log_weights.size(1), tiles = ceil_div(columns, kTile);
  const bool side_by_side = columns == 1 || log_weights.stride(1) == 1;
  const Tensor w = side_by_side ? log_weights : as_contiguous(log_weights);
  const Tensor key_stream = as_contiguous(seed);
  const Tensor summaries = new_tensor(w, {rows, tiles, 3}, ScalarType::Double);
  static_assert(sizeof(Summary) == 3 * sizeof(double));

  dispatch_floating(op, "log_weights", w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = aligned_for<T, 16 / sizeof(T)>(data<T>(w)) && w.stride(0) * sizeof(T) % 16 == 0;
    const Weights<T> weights{data<T>(w), w.stride(0), rows, columns, tiles, aligned};
    launcher.launch(summarise_tiles<T>, rows * tiles, kThreads, weights, mutable_data<Summary>(summaries));
    const Resampling<T> resampling{weights,
                                   data<Summary>(summaries),
                                   data<int64_t>(key_stream),
                                   request.draws,
                                   request.next_index,
                                   request.next_tile,
                                   request.before,
                                   request.after,
                                   static_cast<Accumulate<T>*>(request.log_mean_weight),
                                   static_cast<Accumulate<T>*>(request.ess)};
    launcher.launch(draw_and_fold<T>, ceil_div(rows * (request.draws + 1), kWarps), kThreads, resampling);
  });
}

std::tuple<Tensor, Tensor, Tensor> sir_resample(const Tensor& log_weights, const Tensor& seed, int64_t num_samples) {
  const char* op = "sir_resample";
  check_matrix(op, "log_weights", log_weights);
  check_seed(op, seed);
  const int64_t rows = log_weights.size(0);
  const ScalarType type = accumulation_type(log_weights.scalar_type());
  const Tensor index = new_tensor(log_weights, {rows, num_samples}, ScalarType::Long);
  const Tensor log_mean_weight = new_tensor(log_weights, {rows}, type), ess = new_tensor(log_weights, {rows}, type);
  const State after{nullptr, mutable_data<int64_t>(index), nullptr, nullptr, nullptr};
  void *mean_to = mutable_data<void>(log_mean_weight), *ess_to = mutable_data<void>(ess);
  resample(op, log_weights, seed, {num_samples, 0, 0, State{}, after, mean_to, ess_to});
  return {index, log_mean_weight, ess};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sir_update(const Tensor& log_weights, const Tensor& seed,
                                                              const Tensor& key, const Tensor& index,
                                                              const Tensor& log_max, const Tensor& total,
                                                              const Tensor& total_sq, int64_t next_index,
                                                              int64_t next_tile) {
  const char *op = "sir_update", *names[] = {"key", "index", "log_max", "total", "total_sq"};
  check_matrix(op, "log_weights", log_weights);
  check_matrix(op, "key", key);
  check_seed(op, seed);
  const int64_t rows = log_weights.size(0), draws = key.size(1);
  Tensor before[] = {key, index, log_max, total, total_sq}, after[5];
  for (int i = 0; i < 5; ++i) {
    const ScalarType type = i == 1 ? ScalarType::Long : ScalarType::Double;
    check_dtype(op, names[i], before[i], type);
    if (i < 2) {
      check_shape(op, names[i], before[i], {rows, draws});
    } else {
      check_shape(op, names[i], before[i], {rows});
    }
    before[i] = as_contiguous(before[i]);
    after[i] = torch::stable::new_empty(before[i], before[i].sizes());
  }
  const auto state = [](const Tensor* t) {
    return State{mutable_data<double>(t[0]), mutable_data<int64_t>(t[1]), mutable_data<double>(t[2]),
                 mutable_data<double>(t[3]), mutable_data<double>(t[4])};
  };
  resample(op, log_weights, seed, {draws, next_index, next_tile, state(before), state(after), nullptr, nullptr});
  return {after[0], after[1], after[2], after[3], after[4]};
}

}  // namespace
}  // namespace ncpvae::cuda

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CUDA, m) {
  m.impl("sir_resample", TORCH_BOX(&ncpvae::cuda::sir_resample));
  m.impl("sir_update", TORCH_BOX(&ncpvae::cuda::sir_update));
}
