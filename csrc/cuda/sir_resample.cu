// Tile-Gumbel resampling on the GPU, in one pass over the weights and one or two launches.
//
// A warp reduces a tile of 1,024 weights to (max, Σe, Σe²), one exponential each, and keeps the sums of its eight
// sections of 128, so that a draw that picks in the tile reads one section and not the tile again. A draw is a group of
// lanes that share out the row's tiles: each perturbs its tiles' masses with one Philox call, and the largest key wins.
//
// 1. `whole_rows`: rows of few tiles. A block does all of a row, and nothing but the result leaves the multiprocessor.
// 2. `summarise_tiles`, then `draw_and_fold`: longer rows. Tiles, not rows, are the unit of work of the first, so that
//    a single long row fills the GPU.
//
// The reference is `sir_update` in python/ncpvae/ops/reference.py; the arithmetic shared with the CPU is in
// sir_resample.h.
#include "sir_tiles.h"

namespace ncpvae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFewTiles = 16, kFewDraws = 1024;  // of a row that one block does alone
constexpr int kFewestLanes = 8;                  // of a draw

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 4)
    summarise_tiles(Weights<T> weights, Divisor tiles, Tiles<Accumulate<T>> to) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; item < weights.rows * weights.tiles;
       item += stride) {
    int64_t t;
    const int64_t row = tiles.divide(item, t);
    summarise(weights, row, t, to.from(item));
  }
}

// ---- draws ---------------------------------------------------------------------------------------------------

// A resampling state as in ops.SIRState. All null: the state before any proposal, or a state that is not asked for.
struct State {
  double* key;
  int64_t* index;
  double *log_max, *total, *total_sq;
};

template <typename T>
struct Resampling {
  Weights<T> weights;
  const int64_t* seed;
  int64_t draws, next_index, next_tile;
  State before, after;
  Accumulate<T>*log_mean_weight, *ess;  // null where not asked for
  int lanes;                            // of a draw: a power of two, a warp's at most

  __device__ uint32_t number(int64_t t) const { return static_cast<uint32_t>(next_tile + t); }
};

// The bits of `condition` of this lane's group of `lanes`.
__device__ __forceinline__ unsigned group_ballot(bool condition, int lanes) {
  const int first = threadIdx.x % kWarp / lanes * lanes;
  return ballot(condition) >> first & (kFullWarp >> (kWarp - lanes));
}

// Where in a tile with maximum `high` a draw falls: the first weight whose cumulative Σe exceeds the threshold, in
// index order; never a weight of zero, whatever the rounding. By a group of lanes that share out one section.
template <typename T>
__device__ int pick(const Weights<T>& weights, int64_t row, int64_t t, const Accumulate<T>* sections,
                    Accumulate<T> high, double threshold, int lanes) {
  using A = Accumulate<T>;
  int section = 0;
  double before = 0, running = 0;  // of the sections
  for (int i = 0; i < kSections && !(running > threshold); ++i) {
    if (sections[i] > 0) {
      section = i;
      before = running;
    }
    running += sections[i];
  }

  const int lane = threadIdx.x % lanes, share = kSection / lanes, first = section * kSection + lane * share;
  const auto exponentials = [&](int i, A(&e)[kVector<T>]) {
    load(weights.tile(row, t), first + i, weights.length(t), weights.aligned, e);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) e[j] = fast_exp(e[j] - high);
  };
  A e[kVector<T>];
  double mass = 0;
  for (int i = 0; i < share; i += kVector<T>) {
    exponentials(i, e);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) mass += e[j];
  }
  double below = mass;  // of this lane and those before it
  for (int by = 1; by < lanes; by *= 2) {
    const double other = shuffle_up(below, by);
    if (lane >= by) below += other;
  }
  const unsigned reached = group_ballot(mass > 0 && before + below > threshold, lanes);
  const unsigned massive = group_ballot(mass > 0, lanes);
  int owner = 0;
  if (massive != 0) owner = kWarp - 1 - __clz(static_cast<int>(massive));
  if (reached != 0) owner = __ffs(static_cast<int>(reached)) - 1;

  const double preceding = shuffle_up(below, 1);
  double cumulative = lane == 0 ? before : before + preceding;
  int inside = first;
  bool found = false;
  for (int i = 0; i < share; i += kVector<T>) {
    exponentials(i, e);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      cumulative += e[j];
      if (e[j] > 0 && !found) {
        inside = first + i + j;
        found = cumulative > threshold;
      }
    }
  }
  return shuffle(inside, static_cast<int>(threadIdx.x) % kWarp / lanes * lanes + owner);
}

// The uniform of two words, relative to whose size its error is float's.
__device__ __forceinline__ float rough_uniform(uint32_t high, uint32_t low) {
  return fmaf(static_cast<float>(low >> 12) + 0.5f, 0x1p-52f, static_cast<float>(high) * 0x1p-32f);
}

// sir_resample.h's Gumbel noise to 1e-4, without the two double logarithms. Close to one, −log u is the series of
// v = 1 − u, for which the complements of the words are the uniform.
__device__ __forceinline__ float rough_gumbel(const Words& words) {
  constexpr float kLogTwo = 0.693147181f;
  const float u = rough_uniform(words.x[0], words.x[1]), v = rough_uniform(~words.x[0], ~words.x[1]);
  const float series = v * fmaf(v, fmaf(v, fmaf(v, 0.25f, 0.33333333f), 0.5f), 1.0f);
  return -kLogTwo * fast_log2(v < 0.0625f ? series : -kLogTwo * fast_log2(u));
}

constexpr double kRoughness = 0x1p-10;  // more than two rough keys can be off together

// The tile with the largest key, by a group of lanes that share out the tiles, and whether one of them is bad. Most
// tiles are out of the running by their rough keys, so that double logarithms are taken of one tile per lane at most,
// or of all where a lane has two that are close.
struct Winner {
  sir::Draw draw;
  int64_t tile;
  bool bad;
};

template <typename T>
__device__ __forceinline__ Winner largest_key(const Resampling<T>& r, const Tiles<Accumulate<T>>& tiles,
                                              uint64_t row_draw) {
  const int lane = threadIdx.x % r.lanes;
  const Seed seed{r.seed[0], r.seed[1]};
  Winner winner{{-INFINITY, 0}, 0, false};
  double first = -INFINITY, second = -INFINITY;
  for (int64_t t = lane; t < r.weights.tiles; t += r.lanes) {
    const double key = tiles.rough_mass[t] + rough_gumbel(random_words(seed, row_draw, r.number(t)));
    winner.bad = winner.bad || std::isnan(key);
    if (key > first) {
      second = first;
      first = key;
      winner.tile = t;
    } else if (key > second) {
      second = key;
    }
  }
  double top = first;
  for (int mask = r.lanes / 2; mask > 0; mask /= 2) {
    const double other = shuffle_xor(top, mask);
    top = other > top ? other : top;
  }
  // Keys far from zero are rounded in double as well.
  const double bar = top > -INFINITY ? top - kRoughness - fabs(top) * 0x1p-50 : INFINITY;
  const auto exact = [&](int64_t t) {
    const sir::Draw draw = sir::draw(seed, row_draw, r.number(t), tiles.summary[t]);
    if (draw.key > winner.draw.key) {
      winner.draw = draw;
      winner.tile = t;
    }
  };
  if (second >= bar) {
    for (int64_t t = lane; t < r.weights.tiles; t += r.lanes) exact(t);
  } else if (first >= bar) {
    exact(winner.tile);
  }
  for (int mask = r.lanes / 2; mask > 0; mask /= 2) {  // the lowest tile where keys are equal
    const sir::Draw other{shuffle_xor(winner.draw.key, mask), shuffle_xor(winner.draw.threshold, mask)};
    const int64_t other_tile = shuffle_xor(winner.tile, mask);
    if (other.key > winner.draw.key || (other.key == winner.draw.key && other_tile < winner.tile)) {
      winner.draw = other;
      winner.tile = other_tile;
    }
  }
  winner.bad = group_ballot(winner.bad, r.lanes) != 0;
  return winner;
}

// Draw `draw` of a row, by a group of lanes; all of the warp's groups come here together, with `exists` false where
// there is nothing left to draw.
template <typename T>
__device__ __forceinline__ void choose(const Resampling<T>& r, const Tiles<Accumulate<T>>& tiles, int64_t row,
                                       int64_t draw, bool exists) {
  const int64_t row_draw = row * r.draws + draw;
  const bool fresh = r.before.key == nullptr;
  const Winner winner = largest_key(r, tiles, static_cast<uint64_t>(row_draw));
  double key = fresh ? -INFINITY : r.before.key[row_draw];
  int64_t index = fresh ? -1 : r.before.index[row_draw];
  const bool wins = winner.draw.key > key;
  if (ballot(wins) != 0) {
    const auto high = static_cast<Accumulate<T>>(tiles.summary[winner.tile].log_max);
    const int inside = pick(r.weights, row, winner.tile, tiles.section + winner.tile * kSections, high,
                            winner.draw.threshold, r.lanes);
    if (wins) {
      key = winner.draw.key;
      index = r.next_index + winner.tile * kTile + inside;
    }
  }
  if (winner.bad || (!fresh && std::isnan(r.before.log_max[row]))) {
    key = -INFINITY;
    index = -1;
  }
  if (exists && threadIdx.x % r.lanes == 0) {
    r.after.index[row_draw] = index;
    if (r.after.key != nullptr) r.after.key[row_draw] = key;
  }
}

// ---- the fold of the tiles -----------------------------------------------------------------------------------

struct FoldScratch {
  double warp_high[kWarps];
  double factor[2][kThreads], term[2][kThreads];
};

// A row's summary after `count` more tiles, by a block; thread 0 has it. The tiles are folded in order, so that
// streaming whole tiles rounds exactly as one call does: the maxima and factors e^{m − m'} of 256 tiles are found side
// by side, and one multiply-add per tile is left, by thread 0 for Σe and by thread 1 for Σe².
__device__ Summary fold(const Summary& state, const Summary* tiles, int64_t count, FoldScratch& scratch) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const bool bad = std::isnan(state.log_max);
  double high = bad ? -INFINITY : state.log_max, sum = thread == 0 ? state.total : state.total_sq;
  for (int64_t first = 0; first < count; first += threads) {
    const Summary tile = first + thread < count ? tiles[first + thread] : Summary{-INFINITY, 0, 0};
    double upto = std::isnan(tile.log_max) ? -INFINITY : tile.log_max;  // the row's maximum up to this tile
    for (int by = 1; by < kWarp; by *= 2) {
      const double other = shuffle_up(upto, by);
      if (lane >= by && other > upto) upto = other;
    }
    if (lane == kWarp - 1) scratch.warp_high[warp] = upto;
    __syncthreads();
    double before = high;
    for (int w = 0; w < warps; ++w) {
      const double other = scratch.warp_high[w];
      if (w < warp && other > before) before = other;
      if (other > high) high = other;
    }
    if (before > upto) upto = before;
    const double neighbour = shuffle_up(upto, 1);
    if (lane > 0) before = neighbour;

    const double origin = upto == -INFINITY ? 0.0 : upto;
    const double keep = exp(before - origin), take = exp(tile.log_max - origin);  // a bad tile's sums become NaN
    scratch.factor[0][thread] = keep;
    scratch.factor[1][thread] = keep * keep;
    scratch.term[0][thread] = tile.total * take;
    scratch.term[1][thread] = tile.total_sq * take * take;
    __syncthreads();
    if (thread < 2) {
      const int here = static_cast<int>(count - first < threads ? count - first : threads);
      const double *factor = scratch.factor[thread], *term = scratch.term[thread];
#pragma unroll 8
      for (int i = 0; i < here; ++i) sum = fma(sum, factor[i], term[i]);
    }
    __syncthreads();
  }
  const double total_sq = shuffle(sum, 1);
  return bad || std::isnan(sum) ? Summary{NAN, NAN, NAN} : Summary{high, sum, total_sq};
}

template <typename T>
__device__ __forceinline__ void fold_row(const Resampling<T>& r, const Tiles<Accumulate<T>>& tiles, int64_t row,
                                         FoldScratch& scratch) {
  const State& from = r.before;
  const Summary start = from.key == nullptr ? Summary{-INFINITY, 0, 0}
                                            : Summary{from.log_max[row], from.total[row], from.total_sq[row]};
  const Summary s = fold(start, tiles.summary, r.weights.tiles, scratch);
  if (threadIdx.x != 0) return;
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

// ---- kernels that draw ---------------------------------------------------------------------------------------

// Rows of kFewTiles tiles at most, a block each.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) whole_rows(Resampling<T> r) {
  using A = Accumulate<T>;
  __shared__ Summary summary[kFewTiles];
  __shared__ double rough_mass[kFewTiles];
  __shared__ A section[kFewTiles * kSections];
  __shared__ FoldScratch scratch;
  const Tiles<A> tiles{summary, rough_mass, section};
  const int threads = static_cast<int>(blockDim.x), warp = threadIdx.x / kWarp, groups = threads / r.lanes;
  for (int64_t row = blockIdx.x; row < r.weights.rows; row += gridDim.x) {
    for (int64_t t = warp; t < r.weights.tiles; t += threads / kWarp) summarise(r.weights, row, t, tiles.from(t));
    __syncthreads();
    for (int64_t first = warp * (kWarp / r.lanes); first < r.draws; first += groups) {
      const int64_t draw = first + threadIdx.x % kWarp / r.lanes;
      const bool exists = draw < r.draws;
      choose(r, tiles, row, exists ? draw : first, exists);
    }
    fold_row(r, tiles, row, scratch);  // its barriers come after the last use of the tiles
  }
}

// Blocks fold a row each, then draw; neighbouring draws of a row are one block's, where they find its tiles in cache.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    draw_and_fold(Resampling<T> r, Divisor draws, Tiles<Accumulate<T>> tiles) {
  __shared__ FoldScratch scratch;
  const int64_t groups = kThreads / r.lanes, rows = r.weights.rows, count = rows * r.draws;
  const int64_t jobs = rows + (count + groups - 1) / groups;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    if (job < rows) {
      fold_row(r, tiles.from(job * r.weights.tiles), job, scratch);
      continue;
    }
    const int64_t item = (job - rows) * groups + threadIdx.x / r.lanes;
    const bool exists = item < count;
    int64_t draw;
    const int64_t row = draws.divide(exists ? item : count - 1, draw);
    choose(r, tiles.from(row * r.weights.tiles), row, draw, exists);
  }
}

// ---- host ----------------------------------------------------------------------------------------------------

struct Request {
  int64_t draws, next_index, next_tile;
  State before, after;
  void *log_mean_weight, *ess;
};

// As many lanes as a row has tiles, within a warp.
int lanes_per_draw(int64_t tiles) {
  int lanes = kFewestLanes;
  while (lanes < kWarp && lanes < tiles) lanes *= 2;
  return lanes;
}

template <typename T>
void resample(const Launcher& launcher, const Tensor& w, const Resampling<T>& r) {
  using A = Accumulate<T>;
  const int64_t rows = r.weights.rows, tiles = r.weights.tiles, count = rows * tiles;
  if (tiles <= kFewTiles && r.draws <= kFewDraws) {
    const int64_t warps = std::max(tiles, ceil_div(r.draws * r.lanes, kWarp));
    launcher.launch(whole_rows<T>, rows, kWarp * static_cast<int>(std::min<int64_t>(warps, kWarps)), r);
    return;
  }
  static_assert(sizeof(Summary) == 3 * sizeof(double));
  const Tensor masses = new_tensor(w, {4, count}, ScalarType::Double);  // summaries, then rough masses
  const Tensor sections = new_tensor(w, {count, kSections}, accumulation_type(w.scalar_type()));
  double* const mass = mutable_data<double>(masses);
  const Tiles<A> to{reinterpret_cast<Summary*>(mass), mass + 3 * count, mutable_data<A>(sections)};
  launcher.launch(summarise_tiles<T>, ceil_div(count, kWarps), kThreads, r.weights, Divisor(tiles), to);
  const int64_t blocks = rows + ceil_div(rows * r.draws, kThreads / r.lanes);
  launcher.launch(draw_and_fold<T>, rows == 0 ? 0 : blocks, kThreads, r, Divisor(r.draws), to);
}

void resample(const char* op, const Tensor& log_weights, const Tensor& seed, const Request& request) {
  const Launcher launcher(op, log_weights);
  const int64_t rows = log_weights.size(0), columns = log_weights.size(1), tiles = ceil_div(columns, kTile);
  const bool side_by_side = columns == 1 || log_weights.stride(1) == 1;
  const Tensor w = side_by_side ? log_weights : as_contiguous(log_weights);
  const Tensor key_stream = as_contiguous(seed);
  dispatch_floating(op, "log_weights", w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const bool aligned = aligned_for<T, kVector<T>>(data<T>(w)) && w.stride(0) % kVector<T> == 0;
    const Weights<T> weights{data<T>(w), w.stride(0), rows, columns, tiles, aligned};
    const Resampling<T> r{weights,
                          data<int64_t>(key_stream),
                          request.draws,
                          request.next_index,
                          request.next_tile,
                          request.before,
                          request.after,
                          static_cast<A*>(request.log_mean_weight),
                          static_cast<A*>(request.ess),
                          lanes_per_draw(tiles)};
    resample(launcher, w, r);
  });
}

std::tuple<Tensor, Tensor, Tensor> sir_resample(const Tensor& log_weights, const Tensor& seed, int64_t num_samples) {
  const char* op = "sir_resample";
  check_matrix(op, "log_weights", log_weights);
  check_seed(op, seed);
  STD_TORCH_CHECK(num_samples >= 1, op, ": num_samples must be at least 1, got ", num_samples);
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
