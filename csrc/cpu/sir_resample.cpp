// CPU kernels of sir_resample and sir_update. Contract: python/ncpvae/ops/sir_resample.py.
#include "sir_resample.h"

#include <tuple>
#include <vector>

#include "tensor.h"
#include "vector_math.h"

namespace ncpvae {
namespace {

using sir::kTile;
using sir::Summary;

constexpr int64_t kBlock = 32;  // elements whose sum is kept, so that a pick need not scan the whole tile
constexpr int64_t kBlocks = kTile / kBlock;
constexpr int64_t kDrawGroup = 64;   // draws of a row that are picked together
constexpr int64_t kTileGrain = 16;   // tiles worth a thread of their own
constexpr double kNone = -INFINITY;  // key of a draw without a choice

// One tile of a row: e = exp(w − max w), zero past the end of a short tile, and its partial sums.
template <typename T>
struct Tile {
  alignas(64) T e[kTile];
  double block_sum[kBlocks];
  Summary summary;
};

template <typename A>
void sum_blocks(Tile<A>& tile) {
  double total = 0;
  Lanes<double> squares = {};
  for (int64_t block = 0; block < kBlocks; ++block) {
    const A* values = tile.e + block * kBlock;
    Lanes<double> sum = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; i += sum.width) {
      const Vector<double> e = load_double(values + i);
      sum.part[i / sum.width % sum.parts] += e;
      squares.part[i / sum.width % sum.parts] += e * e;
    }
    tile.block_sum[block] = sum.sum();
    total += tile.block_sum[block];
  }
  tile.summary.total = total;
  tile.summary.total_sq = squares.sum();
}

template <typename T, typename A = Accumulate<T>>
void load_tile(const T* log_weights, int64_t size, Tile<A>& tile) {
  for (int64_t i = 0; i < size; ++i) tile.e[i] = static_cast<A>(log_weights[i]);
  for (int64_t i = size; i < kTile; ++i) tile.e[i] = -static_cast<A>(INFINITY);
  const A max = lane_max(tile.e, kTile);
  const A origin = max == -static_cast<A>(INFINITY) ? A(0) : max;
  for (int64_t i = 0; i < kTile; ++i) tile.e[i] = fast_exp(tile.e[i] - origin);
  sum_blocks(tile);
  tile.summary.log_max = max;
  // A NaN weight is passed over by the maximum and arrives in the sum; +inf − (+inf) is NaN too.
  if (std::isnan(tile.summary.total)) tile.summary = {NAN, NAN, NAN};
}

// The first element at which the cumulative sum exceeds the threshold; where rounding lets none exceed it, the last
// element with positive weight.
template <typename A>
int64_t pick(const Tile<A>& tile, double threshold) {
  int64_t block = 0;
  double before = 0, running = 0;
  for (int64_t b = 0; b < kBlocks; ++b) {
    if (tile.block_sum[b] > 0) {
      block = b;
      before = running;
    }
    running += tile.block_sum[b];
    if (running > threshold) break;
  }
  int64_t last = block * kBlock;
  for (int64_t i = last; i < (block + 1) * kBlock; ++i) {
    if (!(tile.e[i] > 0)) continue;
    last = i;
    before += tile.e[i];
    if (before > threshold) break;
  }
  return last;
}

template <typename T>
struct Problem {
  const T* log_weights;  // [B, M]
  int64_t rows, count, draws;
  Seed seed;
  int64_t next_index, next_tile;

  int64_t tiles() const { return (count + kTile - 1) / kTile; }
  void load(int64_t row, int64_t t, Tile<Accumulate<T>>& tile) const {
    const int64_t start = t * kTile, size = count - start < kTile ? count - start : kTile;
    load_tile(log_weights + row * count + start, size, tile);
  }
};

// What an update reads and writes of a row's state; `index` and `key` hold one entry per draw.
struct State {
  double* key;
  int64_t* index;
  double *log_max, *total, *total_sq;
};

// Decides the draws [first, last) of a row. `tiles` are the summaries of the row's tiles.
template <typename T>
void draw_group(const Problem<T>& p, int64_t row, int64_t first, int64_t last, const Summary* tiles, const State& state,
                Tile<Accumulate<T>>& tile) {
  int64_t winner[kDrawGroup];
  double threshold[kDrawGroup];
  for (int64_t d = first; d < last; ++d) {
    const int64_t row_draw = row * p.draws + d;
    winner[d - first] = -1;
    for (int64_t t = 0; t < p.tiles(); ++t) {
      const sir::Draw draw = sir::draw(p.seed, row_draw, static_cast<uint32_t>(p.next_tile + t), tiles[t]);
      if (draw.key > state.key[row_draw]) {
        state.key[row_draw] = draw.key;
        winner[d - first] = t;
        threshold[d - first] = draw.threshold;
      }
    }
  }
  for (int64_t d = first; d < last; ++d) {
    const int64_t t = winner[d - first];
    if (t < 0) continue;
    p.load(row, t, tile);
    for (int64_t same = d; same < last; ++same) {
      if (winner[same - first] != t) continue;
      winner[same - first] = -1;
      state.index[row * p.draws + same] = p.next_index + t * kTile + pick(tile, threshold[same - first]);
    }
  }
}

template <typename T>
void update(const Problem<T>& p, const State& state) {
  const int64_t tiles = p.tiles(), groups = (p.draws + kDrawGroup - 1) / kDrawGroup;
  std::vector<Summary> storage(p.rows * tiles);
  Summary* summaries = storage.data();
  torch::stable::parallel_for(0, p.rows * tiles, kTileGrain, [&](int64_t begin, int64_t end) {
    Tile<Accumulate<T>> tile;
    for (int64_t i = begin; i < end; ++i) {
      p.load(i / tiles, i % tiles, tile);
      summaries[i] = tile.summary;
    }
  });
  // Tiles are folded in order, so that streaming whole tiles rounds exactly as one call does.
  for (int64_t row = 0; row < p.rows; ++row) {
    Summary sum{state.log_max[row], state.total[row], state.total_sq[row]};
    for (int64_t t = 0; t < tiles; ++t) sum = merge(sum, summaries[row * tiles + t]);
    state.log_max[row] = sum.log_max;
    state.total[row] = sum.total;
    state.total_sq[row] = sum.total_sq;
  }
  torch::stable::parallel_for(0, p.rows * groups, 8, [&](int64_t begin, int64_t end) {
    Tile<Accumulate<T>> tile;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups, first = i % groups * kDrawGroup;
      const int64_t last = first + kDrawGroup < p.draws ? first + kDrawGroup : p.draws;
      if (!std::isnan(state.log_max[row])) {
        draw_group(p, row, first, last, summaries + row * tiles, state, tile);
        continue;
      }
      for (int64_t d = first; d < last; ++d) {
        state.key[row * p.draws + d] = kNone;
        state.index[row * p.draws + d] = -1;
      }
    }
  });
}

Seed check_and_read(const char* op, const Tensor& log_weights, const Tensor& seed) {
  check_matrix(op, "log_weights", log_weights);
  check_seed(op, seed);
  const Tensor dense = as_contiguous(seed);
  return {data<int64_t>(dense)[0], data<int64_t>(dense)[1]};
}

std::tuple<Tensor, Tensor, Tensor> sir_resample(Tensor log_weights, Tensor seed, int64_t num_samples) {
  const Seed words = check_and_read("sir_resample", log_weights, seed);
  STD_TORCH_CHECK(num_samples >= 1, "sir_resample: num_samples must be at least 1, got ", num_samples);
  const int64_t rows = log_weights.size(0), count = log_weights.size(1);
  const ScalarType type = accumulation_type(log_weights.scalar_type());
  Tensor index = new_tensor(log_weights, {rows, num_samples}, ScalarType::Long);
  Tensor log_mean = new_tensor(log_weights, {rows}, type), ess = new_tensor(log_weights, {rows}, type);
  const Tensor dense = as_contiguous(log_weights);
  dispatch_floating("sir_resample", "log_weights", log_weights.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    std::vector<double> key(rows * num_samples, kNone), log_max(rows, kNone), total(rows), total_sq(rows);
    const State state{key.data(), mutable_data<int64_t>(index), log_max.data(), total.data(), total_sq.data()};
    for (int64_t i = 0; i < rows * num_samples; ++i) state.index[i] = -1;
    update(Problem<T>{data<T>(dense), rows, count, num_samples, words, 0, 0}, state);
    for (int64_t row = 0; row < rows; ++row) {
      const Summary sum{log_max[row], total[row], total_sq[row]};
      mutable_data<A>(log_mean)[row] = static_cast<A>(sir::log_mean_weight(sum, count));
      mutable_data<A>(ess)[row] = static_cast<A>(sir::effective_sample_size(sum));
    }
  });
  return {index, log_mean, ess};
}

// A contiguous copy of one field of the state, which the update then works on.
Tensor copy_field(const char* name, const Tensor& field, ScalarType type, std::initializer_list<int64_t> shape) {
  check_dtype("sir_update", name, field, type);
  check_shape("sir_update", name, field, shape);
  Tensor copy = new_tensor(field, shape, type);
  return torch::stable::copy_(copy, field);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sir_update(Tensor log_weights, Tensor seed, Tensor key, Tensor index,
                                                              Tensor log_max, Tensor total, Tensor total_sq,
                                                              int64_t next_index, int64_t next_tile) {
  const Seed words = check_and_read("sir_update", log_weights, seed);
  STD_TORCH_CHECK(key.dim() == 2, "sir_update: key must have 2 dimensions, got shape ", shape_text(key.sizes()));
  const int64_t rows = log_weights.size(0), draws = key.size(1);
  key = copy_field("key", key, ScalarType::Double, {rows, draws});
  index = copy_field("index", index, ScalarType::Long, {rows, draws});
  log_max = copy_field("log_max", log_max, ScalarType::Double, {rows});
  total = copy_field("total", total, ScalarType::Double, {rows});
  total_sq = copy_field("total_sq", total_sq, ScalarType::Double, {rows});
  const State state{mutable_data<double>(key), mutable_data<int64_t>(index), mutable_data<double>(log_max),
                    mutable_data<double>(total), mutable_data<double>(total_sq)};
  const Tensor dense = as_contiguous(log_weights);
  dispatch_floating("sir_update", "log_weights", log_weights.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem{data<T>(dense), rows, log_weights.size(1), draws, words, next_index, next_tile};
    update(problem, state);
  });
  return {key, index, log_max, total, total_sq};
}

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CPU, m) {
  m.impl("sir_resample", TORCH_BOX(&sir_resample));
  m.impl("sir_update", TORCH_BOX(&sir_update));
}

}  // namespace
}  // namespace ncpvae
