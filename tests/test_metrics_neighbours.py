import importlib
import math

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from ncpvae.metrics import Features, density_coverage, memorization, nearest_neighbours, neighbours
from ncpvae.metrics.memorization import rank_sum

density_module = importlib.import_module("ncpvae.metrics.density_coverage")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not divide the sets, so that every seam is crossed."""
    for module in (neighbours, density_module):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
        monkeypatch.setattr(module, "EXAMPLES_AT_ONCE", 11)


def exact_distances(x, y):
    return (x.double()[:, None] - y.double()).norm(dim=-1)


def brute_force(x, y, k):
    """Density, coverage, precision and recall from N × N matrices."""

    def radii(points):
        return exact_distances(points, points).sort(1).values[:, k : k + 1]  # the 0-th is the point itself

    distance = exact_distances(x, y)  # [N, M]
    in_real, in_generated = distance < radii(x), distance < radii(y).T
    return (
        in_real.double().sum(0).mean() / k,
        in_real.any(1).double().mean(),
        in_real.any(0).double().mean(),
        in_generated.any(1).double().mean(),
    )


def test_nearest_neighbours_are_those_of_all_distances(small_blocks):
    queries, examples = torch.randn(23, 5), torch.randn(50, 5)
    distances, indices = exact_distances(queries, examples).sort(1)
    found = nearest_neighbours(queries, examples, 4)
    torch.testing.assert_close(found.distances, distances[:, :4])
    assert torch.equal(found.indices, indices[:, :4])


def test_an_example_is_not_its_own_neighbour(small_blocks):
    x = torch.randn(30, 3)
    x[4] = x[17]
    found = nearest_neighbours(x, x, 29, exclude_self=True)
    assert all(i not in row for i, row in enumerate(found.indices.tolist()))
    assert found.indices[4, 0] == 17 and found.distances[4, 0] == 0
    assert torch.equal(nearest_neighbours(x, x).distances, torch.zeros(30, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_rows_are_at_distance_zero_and_others_are_not(dtype):
    x = (torch.randn(40, 700) * 3 + 100).to(dtype)
    found = nearest_neighbours(x.flip(0), x, 2)
    assert torch.equal(found.distances[:, 0], torch.zeros(40, dtype=torch.float64))
    assert torch.equal(found.indices[:, 0], torch.arange(39, -1, -1))
    torch.testing.assert_close(found.distances[:, 1], exact_distances(x.flip(0), x).sort(1).values[:, 1])


def test_an_offset_costs_no_accuracy():
    x = torch.randn(40, 20, dtype=torch.float64)
    plain, moved = nearest_neighbours(x, x, 3, True), nearest_neighbours(x + 2.0**20, x + 2.0**20, 3, True)
    torch.testing.assert_close(moved.distances, plain.distances, rtol=1e-8, atol=0)
    assert torch.equal(moved.indices, plain.indices)


def test_bytes_are_compared_exactly(small_blocks):
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    near = images.clone()
    near[:, 0, 0, 0] ^= 1  # one level of one pixel
    found = nearest_neighbours(near, images)
    assert torch.equal(found.distances, torch.ones(30, 1, dtype=torch.float64))
    assert torch.equal(found.indices[:, 0], torch.arange(30))


@pytest.mark.parametrize(("n", "m", "k", "shift"), [(60, 60, 5, 0.0), (40, 75, 3, 0.7), (75, 31, 1, -1.0)])
def test_density_and_coverage_are_those_of_all_distances(small_blocks, n, m, k, shift):
    x, y = torch.randn(n, 4), 0.8 * torch.randn(m, 4) + shift
    result = density_coverage(x, y, k)
    found = (result.density, result.coverage, result.precision, result.recall)
    assert found == pytest.approx([float(v) for v in brute_force(x, y, k)], abs=1e-12)
    assert 0 < result.coverage < 1 and 0 < result.precision < 1


def test_equal_distributions():
    """Density is 1 and coverage 1 − Π (N − 1 − i) / (N + M − 1 − i) on average."""
    results = [density_coverage(torch.randn(150, 3), torch.randn(100, 3), k=3) for _ in range(40)]
    density = torch.tensor([r.density for r in results])
    coverage = torch.tensor([r.coverage for r in results])
    expected = results[0].coverage_at_equality
    assert expected == pytest.approx(1 - 149 * 148 * 147 / (249 * 248 * 247))
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(40)
    assert abs(coverage.mean() - expected) < 4 * coverage.std() / math.sqrt(40)
    assert density_coverage(torch.randn(900, 2), torch.randn(900, 2)).coverage_at_equality == pytest.approx(
        1 - 2**-5, abs=1e-3
    )


def test_disjoint_sets_score_nothing_and_a_mode_left_out_is_not_covered():
    x = torch.randn(100, 2)
    nothing = density_coverage(x, x + 1000)
    assert (nothing.density, nothing.coverage, nothing.precision, nothing.recall) == (0, 0, 0, 0)
    two_modes = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 1000])
    half = density_coverage(two_modes, torch.randn(200, 2))
    assert half.density > 0.9 and half.precision > 0.9
    assert half.coverage == pytest.approx(0.5, abs=0.02) and half.recall <= 0.5


def test_identical_points_are_in_each_other_s_balls():
    """Balls of radius 0 still hold what equals their centre."""
    same = torch.full((20, 3), 0.1)
    result = density_coverage(same, same[:10], k=5)
    assert (result.density, result.coverage, result.precision, result.recall) == (20 / 5, 1, 1, 1)
    apart = density_coverage(same, same[:10] + 1, k=5)
    assert (apart.density, apart.coverage, apart.precision, apart.recall) == (0, 0, 0, 0)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_memory_is_linear_in_the_examples(monkeypatch):
    """The largest tensor on the way is that of the features; N × M would be 60 times as large."""
    for module in (neighbours, density_module):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 64)
        monkeypatch.setattr(module, "EXAMPLES_AT_ONCE", 64)
    x, y = torch.randn(600, 10), torch.randn(600, 10)
    with LargestTensor() as largest:
        density_coverage(x, y)
        nearest_neighbours(x, y, 5)
    assert largest.elements == 600 * 10


def test_rank_sum_is_mann_whitney_s():
    for a, b in ((torch.randn(40), torch.randn(25) + 0.3), (torch.randint(0, 4, (40,)), torch.randint(1, 5, (30,)))):
        z, probability = rank_sum(a, b)
        expected = stats.mannwhitneyu(a.numpy(), b.numpy(), use_continuity=False, method="asymptotic")
        assert probability == pytest.approx(expected.statistic / (len(a) * len(b)))
        assert 2 * stats.norm.sf(abs(z)) == pytest.approx(expected.pvalue)
        assert (z > 0) == (probability > 0.5)
    assert rank_sum(torch.ones(5), torch.ones(7)) == (0.0, 0.5)


def test_copies_are_found():
    train, held_out = torch.randn(300, 6), torch.randn(200, 6)
    copies = train[torch.randint(0, 300, (150,))]
    result = memorization(copies, train, held_out)
    assert result.statistic < -10 and result.null_std == 1
    assert result.share_closer == result.share_identical == 1 and result.probability_farther == 0
    assert result.share_closer_held_out == pytest.approx(0.05, abs=0.01)
    assert "data-copying" in result.meaning
    assert torch.equal(train[result.nearest], copies)


def test_near_copies_are_found_though_none_is_identical():
    train, held_out = torch.randn(300, 6), torch.randn(200, 6)
    result = memorization(train[:150] + 0.05 * torch.randn(150, 6), train, held_out)
    assert result.statistic < -10 and result.share_closer > 0.9 and result.share_identical == 0


def test_some_copies_among_honest_samples_are_found():
    train, held_out = torch.randn(1000, 6), torch.randn(1000, 6)
    result = memorization(torch.cat([train[:200], torch.randn(800, 6)]), train, held_out)
    assert result.share_identical == 0.2 and "data-copying" in result.meaning
    assert result.share_closer == pytest.approx(0.24, abs=0.04)


def test_honest_samples_are_not_accused_and_bad_ones_called_underfitted():
    train, held_out = torch.randn(500, 6), torch.randn(400, 6)
    honest = memorization(torch.randn(400, 6), train, held_out)
    assert abs(honest.statistic) < 3.5
    assert honest.probability_farther == pytest.approx(0.5, abs=0.1)
    assert honest.share_closer == pytest.approx(0.05, abs=0.06)
    assert "underfitting" in memorization(2 * torch.randn(400, 6), train, held_out).meaning


def test_the_statistic_is_standard_normal_for_honest_samples():
    z = torch.tensor([_honest().statistic for _ in range(100)])
    assert abs(z.mean()) < 4 / 10 and 0.7 < z.std() < 1.3


def test_the_mean_over_cells_has_the_stated_spread():
    pytest.importorskip("sklearn")
    results = [_honest(num_cells=3) for _ in range(30)]
    z = torch.tensor([r.statistic / r.null_std for r in results])
    assert abs(z.mean()) < 4 / math.sqrt(30) and 0.6 < z.std() < 1.4
    assert max(r.null_std for r in results) < 0.8


def _honest(**options):
    train, held_out, samples = torch.randn(3, 120, 2)
    return memorization(samples, train, held_out, **options)


def test_cells_compare_like_with_like():
    """Near-copies of a wide mode look far beside held-out examples of a narrow one: one global test sees nothing."""
    pytest.importorskip("sklearn")

    def modes(wide, narrow):
        return torch.cat([torch.randn(wide, 3), 0.01 * torch.randn(narrow, 3) + 50])

    train, held_out = modes(300, 300), modes(300, 300)
    samples = train[:300] + 0.05 * torch.randn(300, 3)
    one = memorization(samples, train, held_out)
    assert "data-copying" not in one.meaning and len(one.cell_statistics) == 1
    two = memorization(samples, train, held_out, num_cells=2)
    assert "data-copying" in two.meaning and two.null_std == 1
    assert sorted(map(math.isnan, two.cell_statistics)) == [False, True]
    assert "1 of 2 cells with 300 held-out examples" in two.protocol
    again = memorization(samples, train, held_out, num_cells=2)
    assert (again.statistic, again.cell_statistics[0]) == pytest.approx(
        (two.statistic, two.cell_statistics[0]), nan_ok=True
    )


def test_each_cell_has_its_figure():
    """Copying in one mode and underfitting in the other may cancel in the mean; the cells tell."""
    pytest.importorskip("sklearn")
    train, held_out = (torch.cat([torch.randn(300, 3), torch.randn(300, 3) + 50]) for _ in range(2))
    samples = torch.cat([train[:300], 4 * torch.randn(300, 3) + 50])
    result = memorization(samples, train, held_out, num_cells=2)
    assert "data-copying" not in result.meaning
    assert min(result.cell_statistics) < -10 and max(result.cell_statistics) > 10
    assert result.statistic == pytest.approx(sum(result.cell_statistics) / 2)
    assert result.null_std == pytest.approx(math.sqrt(0.5))
    assert f"cells {min(result.cell_statistics):.1f} … {max(result.cell_statistics):.1f}" in result.meaning


def test_features_carry_their_space_into_the_protocol():
    x = Features(torch.randn(30, 3), "an extractor")
    assert density_coverage(x, x).protocol.endswith("features: an extractor")
    assert memorization(x, x, x).protocol.endswith("features: an extractor")
    assert nearest_neighbours(x, x).distances.shape == (30, 1)


X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest_neighbours(X, X, 31), ValueError, "nearest_neighbours: k must be 1 … 30, got 31"),
        (lambda: nearest_neighbours(X, X, 30, True), ValueError, "nearest_neighbours: k must be 1 … 29, got 30"),
        (lambda: nearest_neighbours(X[:3], X, 1, True), ValueError, "needs queries = examples, got 3 and 30 rows"),
        (lambda: nearest_neighbours(X, X[:, :2]), ValueError, "one space, got queries: the values themselves, F = 3;"),
        (lambda: nearest_neighbours(X, X.byte()), ValueError, "examples: the integer values themselves, F = 3"),
        (lambda: nearest_neighbours(X, Features(X, "a")), ValueError, "one space, got .* examples: a, F = 3"),
        (
            lambda: nearest_neighbours(X[:0], X),
            ValueError,
            r"queries must be \[N, …\] and not empty, got shape \(0, 3\)",
        ),
        (lambda: nearest_neighbours([1.0], X), TypeError, "queries must be a tensor .* or Features, got list"),
        (lambda: nearest_neighbours(X > 0, X), TypeError, "queries must hold real numbers, got torch.bool"),
        (lambda: density_coverage(X * torch.nan, X), ValueError, "density_coverage: real must be finite, got NaN"),
        (lambda: density_coverage(X, X[:5]), ValueError, "k must be 1 … 4 for 30 and 5 examples, got 5"),
        (lambda: density_coverage(X, X, 0), ValueError, "density_coverage: k must be 1 … 29"),
        (lambda: memorization(X, X, X[:10]), ValueError, "samples and held_out must hold ≥ 20 examples, got 30 and 10"),
        (lambda: memorization(X, X, X, quantile=1.0), ValueError, "quantile must lie between 0 and 1, got 1.0"),
        (lambda: memorization(X, X, X, num_cells=0), ValueError, "num_cells must be 1 … 30, the training examples"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_many_cells_leave_nothing_to_compare():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="num_cells must leave a cell 20 samples and held-out examples, got 20"):
        memorization(X, X, X, num_cells=20)
