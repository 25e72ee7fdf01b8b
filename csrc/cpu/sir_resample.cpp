// CPU kernels of sir_resample and sir_update. Contract: python/ncpvae/ops/sir_resample.py.
#include "sir_resample.h"

#include <memory>
#include <tuple>
#include <vector>

#include "convert.h"
#include "philox_lanes.h"
#include "tensor.h"
#include "vector_math.h"

namespace ncpvae {
namespace {

using sir::kTile;
using sir::Summary;

constexpr int64_t kBlock = 16;       // elements that a pick passes over at once, in a group
constexpr int64_t kSumGroup = 128;   // elements summed in the weights' own precision, before float64
constexpr int64_t kGroups = kTile / kSumGroup;
constexpr int64_t kDrawGroup = 64;   // draws of a row that are picked together
constexpr int64_t kSideBySide = 8;   // draws of a group from which on they are decided side by side
constexpr int64_t kHeldTiles = 16;   // rows of no more tiles are kept, exponentiated, until their draws are done
constexpr int64_t kTileGrain = 32;   // tiles worth a thread of their own
constexpr double kNone = -INFINITY;  // key of a draw without a choice

// e = exp(w − max w) for the weights w of a tile, zero past their end, and the sums of its groups, lane by lane.
template <typename A>
struct Tile {
  alignas(64) A e[kTile];
  A groups[kGroups][kLanes];
};

// e = exp(w − origin) for kLanes elements, added to the sums of e and e².
template <typename A>
inline void exponentiate_lanes(const A* w, A origin, A* e, Lanes<A>& total, Lanes<A>& squares) {
#pragma GCC unroll 8
  for (int64_t p = 0; p < total.parts; ++p) {
    const Vector<A> value = rough_exp_nonpositive(load(w + p * total.width) - origin);
    store(e + p * total.width, value);
    total.part[p] += value;
    squares.part[p] += value * value;
  }
}

// Fills a tile from its `size` weights, which may be in `tile.e` itself, and sums it up.
template <typename A>
Summary exponentiate_tile(const A* w, int64_t size, Tile<A>& tile) {
  A* const e = tile.e;
  constexpr A none = -static_cast<A>(INFINITY);
  const A max = lane_max(w, size), origin = max == none ? A(0) : max;
  const int64_t whole = size / kLanes * kLanes;
  Lanes<double> total = {}, squares = {};
  for (int64_t start = 0; start < size; start += kSumGroup) {
    Lanes<A> group_total = {}, group_squares = {};
    const auto take = [&](int64_t i) {
      __builtin_prefetch(w + i + kTile);  // the next tile: the processor itself looks no further than a page
      exponentiate_lanes(w + i, origin, e + i, group_total, group_squares);
    };
    if (start + kSumGroup <= whole) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kSumGroup; i += kLanes) take(start + i);
    } else {
      for (int64_t i = start; i < whole; i += kLanes) take(i);
    }
    if (start + kSumGroup > whole && whole < size) {
      A rest[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) rest[l] = whole + l < size ? w[whole + l] : none;
      exponentiate_lanes(rest, origin, e + whole, group_total, group_squares);
    }
    std::memcpy(tile.groups[start / kSumGroup], group_total.part, sizeof group_total.part);
    add_as_double(total, group_total);
    add_as_double(squares, group_squares);
  }
  for (int64_t i = (size + kLanes - 1) / kLanes * kLanes; i < kTile; ++i) e[i] = 0;
  const int64_t filled = (size + kSumGroup - 1) / kSumGroup;
  std::memset(tile.groups + filled, 0, (kGroups - filled) * sizeof tile.groups[0]);
  // A NaN weight is passed over by the maximum and arrives in the sum; +inf − (+inf) is NaN too.
  const Summary summary{max, total.sum(), squares.sum()};
  return std::isnan(summary.total) ? Summary{NAN, NAN, NAN} : summary;
}

template <typename A>
double sum_block(const A* e) {
  static_assert(kBlock == kLanes);
  Lanes<double> sum;
#pragma GCC unroll 8
  for (int64_t p = 0; p < sum.parts; ++p) sum.part[p] = load_double(e + p * sum.width);
  return sum.sum();
}

// The first of `count` parts at which the sum of all so far exceeds the threshold; where rounding lets none exceed it,
// the last with a positive sum. `before` is the sum of all that comes before the parts, and then before the one found.
template <typename SumOf>
int64_t find(int64_t count, double threshold, double& before, SumOf sum_of) {
  int64_t found = 0;
  double running = before;
  for (int64_t i = 0; i < count && !(running > threshold); ++i) {
    const double sum = sum_of(i);
    found = sum > 0 ? i : found;
    before = sum > 0 ? running : before;
    running += sum;
  }
  return found;
}

// The element of a tile at which its cumulative sum first exceeds the threshold: its group, its block, itself.
template <typename A>
int64_t pick(const Tile<A>& tile, double threshold) {
  double before = 0;
  const A* e = tile.e;
  const int64_t g = find(kGroups, threshold, before, [&](int64_t i) { return sum_block(tile.groups[i]); });
  e += g * kSumGroup;
  e += kBlock * find(kSumGroup / kBlock, threshold, before, [&](int64_t i) { return sum_block(e + i * kBlock); });
  return e - tile.e + find(kBlock, threshold, before, [&](int64_t i) { return static_cast<double>(e[i]); });
}

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  const T* log_weights;  // [B, M]
  int64_t rows, count, draws;
  Seed seed;
  int64_t next_index, next_tile;

  int64_t tiles() const { return (count + kTile - 1) / kTile; }

  Summary load(int64_t row, int64_t t, Tile<A>& tile) const {
    const int64_t start = t * kTile, size = count - start < kTile ? count - start : kTile;
    const T* from = log_weights + row * count + start;
    return exponentiate_tile<A>(widened(from, size, tile.e), size, tile);
  }
};

// What an update reads and writes of a row's state; `index` and `key` hold one entry per draw.
struct State {
  double* key;
  int64_t* index;
  double *log_max, *total, *total_sq;
};

// A row's tiles as its draws see them.
template <typename A>
struct Row {
  const Summary* summaries;
  const Tile<A>* held;  // or null where a tile that wins is to be loaded again
};

// What a group of draws has come to: the best key so far, the tile that has it or −1, and where in it the draw falls.
struct Choice {
  alignas(64) double key[kDrawGroup], threshold[kDrawGroup];
  alignas(64) int64_t tile[kDrawGroup];
};

// uniform52 of words side by side
inline Vector<double> uniform52(Wide high, Wide low) {
  const Wide cell = (high & 0xffffffffu) << 20 | (low & 0xffffffffu) >> 12;
  return ((bits_as<Vector<double>>(cell | bits_as<uint64_t>(0x1p52)) - 0x1p52) + 0.5) * 0x1p-52;
}

// Lets a tile compete for `count` draws, the first of which has this number: sir::draw side by side, up to the last bits
// of its logarithms.
void compete(Seed seed, uint64_t first_draw, int64_t count, uint32_t tile_number, const Summary& tile, int64_t t,
             Choice& choice) {
  for (int64_t start = 0; start < count; start += kAbreast) {
    Wide words[kChains][4];
    fill_words(seed, first_draw + static_cast<uint64_t>(start), tile_number, words);
    for (int64_t c = 0; c < kChains; ++c) {
      const int64_t d = start + c * kWideLanes;
      const Vector<double> exponential = -fast_log(uniform52(words[c][0], words[c][1]));
      const Vector<double> key = tile.log_max + fast_log(tile.total / exponential);
      const Vector<double> threshold = uniform52(words[c][2], words[c][3]) * tile.total;
      const Vector<double> best = load(choice.key + d);
      const auto wins = key > best;
      store(choice.key + d, wins ? key : best);
      store(choice.threshold + d, wins ? threshold : load(choice.threshold + d));
      store(choice.tile + d, wins ? Vector<int64_t>{} + t : load(choice.tile + d));
    }
  }
}

// Decides the draws [first, last) of a row; `space` is room for one tile.
template <typename T, typename A = Accumulate<T>>
void draw_group(const Problem<T>& p, int64_t row, const Row<A>& tiles, int64_t first, int64_t last, const State& state,
                Tile<A>& space) {
  const int64_t start = row * p.draws + first, count = last - first;
  Choice choice;
  const bool side_by_side = count >= kSideBySide;
  for (int64_t d = 0; d < count; ++d) choice.key[d] = state.key[start + d], choice.threshold[d] = 0, choice.tile[d] = -1;
  for (int64_t d = count; side_by_side && d % kAbreast != 0; ++d) {
    choice.key[d] = kNone, choice.threshold[d] = 0, choice.tile[d] = -1;
  }
  for (int64_t t = 0; t < p.tiles(); ++t) {
    const auto number = static_cast<uint32_t>(p.next_tile + t);
    if (side_by_side) {
      compete(p.seed, start, count, number, tiles.summaries[t], t, choice);
      continue;
    }
    for (int64_t d = 0; d < count; ++d) {
      const sir::Draw draw = sir::draw(p.seed, start + d, number, tiles.summaries[t]);
      if (draw.key > choice.key[d]) choice.key[d] = draw.key, choice.threshold[d] = draw.threshold, choice.tile[d] = t;
    }
  }
  for (int64_t d = 0; d < count; ++d) {
    const int64_t t = choice.tile[d];
    if (t < 0) continue;
    if (!tiles.held) p.load(row, t, space);
    const Tile<A>& tile = tiles.held ? tiles.held[t] : space;
    for (int64_t same = d; same < count; ++same) {
      if (choice.tile[same] != t) continue;
      choice.tile[same] = -1;
      state.key[start + same] = choice.key[same];
      state.index[start + same] = p.next_index + t * kTile + pick(tile, choice.threshold[same]);
    }
  }
}

// A row's tiles are folded in order, so that streaming whole tiles rounds exactly as one call does.
void fold(const Summary* summaries, int64_t tiles, const State& state, int64_t row) {
  Summary sum{state.log_max[row], state.total[row], state.total_sq[row]};
  for (int64_t t = 0; t < tiles; ++t) sum = merge(sum, summaries[t]);
  state.log_max[row] = sum.log_max;
  state.total[row] = sum.total;
  state.total_sq[row] = sum.total_sq;
}

// The draws of group `group` of a row whose tiles have been folded into the state.
template <typename T, typename A = Accumulate<T>>
void draw(const Problem<T>& p, int64_t row, const Row<A>& tiles, int64_t group, const State& state, Tile<A>& space) {
  const int64_t first = group * kDrawGroup, last = first + kDrawGroup < p.draws ? first + kDrawGroup : p.draws;
  if (!std::isnan(state.log_max[row])) return draw_group(p, row, tiles, first, last, state, space);
  for (int64_t d = first; d < last; ++d) {
    state.key[row * p.draws + d] = kNone;
    state.index[row * p.draws + d] = -1;
  }
}

// Short rows: a thread takes a row from beginning to end, its exponentials in the cache.
template <typename T, typename A = Accumulate<T>>
void update_short_rows(const Problem<T>& p, const State& state) {
  const int64_t tiles = p.tiles(), groups = (p.draws + kDrawGroup - 1) / kDrawGroup;
  torch::stable::parallel_for(0, p.rows, (kTileGrain + tiles - 1) / tiles, [&](int64_t begin, int64_t end) {
    Tile<A> held[kHeldTiles];
    Summary summaries[kHeldTiles];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t t = 0; t < tiles; ++t) summaries[t] = p.load(row, t, held[t]);
      fold(summaries, tiles, state, row);
      for (int64_t group = 0; group < groups; ++group) draw(p, row, Row<A>{summaries, held}, group, state, held[0]);
    }
  });
}

// Long rows: threads share out their tiles, then the draws.
template <typename T, typename A = Accumulate<T>>
void update_long_rows(const Problem<T>& p, const State& state) {
  const int64_t tiles = p.tiles(), groups = (p.draws + kDrawGroup - 1) / kDrawGroup;
  const std::unique_ptr<Summary[]> summaries(new Summary[p.rows * tiles]);
  torch::stable::parallel_for(0, p.rows * tiles, kTileGrain, [&](int64_t begin, int64_t end) {
    Tile<A> tile;
    for (int64_t i = begin; i < end; ++i) summaries[i] = p.load(i / tiles, i % tiles, tile);
  });
  for (int64_t row = 0; row < p.rows; ++row) fold(summaries.get() + row * tiles, tiles, state, row);
  torch::stable::parallel_for(0, p.rows * groups, 1, [&](int64_t begin, int64_t end) {
    Tile<A> tile;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups;
      draw(p, row, Row<A>{summaries.get() + row * tiles, nullptr}, i % groups, state, tile);
    }
  });
}

template <typename T>
void update(const Problem<T>& p, const State& state) {
  if (p.tiles() <= kHeldTiles) {
    update_short_rows(p, state);
  } else {
    update_long_rows(p, state);
  }
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
