"""Mutual information, the marginal KL and InfoNCE's bound, against closed forms and float64 brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from torch import distributed
from torch.distributions import Independent, Laplace, LogNormal, Normal

from ncpvae import metrics
from ncpvae.distributions import DiagonalMixture, diagonal_normal
from ncpvae.metrics import (
    Posteriors,
    collect_posteriors,
    info_nce_bound,
    kl_per_dimension,
    minibatch_mutual_information,
    mutual_information,
)


def random_posteriors(seed, n, d, dtype=torch.float64, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = torch.randn(2, n, d, dtype=dtype, generator=generator)
    return Posteriors(spread * mean, 0.5 * log_std - 0.3)


def linear_gaussian(n, d, std):
    """Posteriors N(A x, std² I) of x ~ N(0, I), and I(x; z) = ½ log det(I + A Aᵀ/std²)."""
    a = torch.randn(d, 2 * d)
    information = 0.5 * torch.logdet(torch.eye(d) + a @ a.T / std**2)
    return Posteriors(torch.randn(n, 2 * d) @ a.T, torch.full((n, d), math.log(std))), float(information)


def collapsed(n, d):
    return Posteriors(torch.zeros(n, d), torch.zeros(n, d))


def separated(n, d):
    return Posteriors(100.0 * torch.arange(n)[:, None].expand(n, d), torch.zeros(n, d))


def brute_force(posteriors, z):
    """log q(z|x) − log q(z) and log q(z) [N], from all N × N densities of torch.distributions in float64."""
    mean, std = posteriors.mean.double(), posteriors.log_std.double().exp()
    pairs = Normal(mean, std).log_prob(z.double()[:, None]).sum(-1)  # [z, component]
    log_marginal = torch.logsumexp(pairs, 1) - math.log(len(mean))
    return pairs.diagonal() - log_marginal, log_marginal


def seen_draws(posteriors, **arguments):
    """The z that an estimate evaluates, as its prior sees them, and the estimate."""
    seen = []

    def log_prob(z):
        seen.append(z)
        return Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)

    result = mutual_information(posteriors, log_prob, **arguments)
    return torch.cat(seen), result


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(1, 50))
def test_the_estimate_is_that_of_all_pairs(seed, n, d, num_samples, max_rows):
    posteriors = random_posteriors(seed, n, d)
    z, result = seen_draws(posteriors, num_samples=num_samples, max_rows=max_rows, seed=seed)
    parts = [brute_force(posteriors, draw) for draw in z.view(num_samples, n, d)]
    expected = torch.stack([difference for difference, _ in parts]).mean(0)
    torch.testing.assert_close(result.per_example, expected, rtol=1e-9, atol=1e-9)
    assert result.value == pytest.approx(float(expected.mean()), abs=1e-9)
    marginal = torch.stack([log_q for _, log_q in parts]) - Normal(0.0, 1.0).log_prob(z).sum(1).view(num_samples, n)
    assert result.marginal_kl == pytest.approx(float(marginal.mean()), abs=1e-9)
    if n > 1:
        assert result.standard_error == pytest.approx(float(expected.std()) / math.sqrt(n), rel=1e-7, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 40), st.integers(1, 5), st.data())
def test_no_example_of_the_minibatch_form_passes_its_cap(seed, n, d, data):
    batch_size = data.draw(st.integers(2, n))
    result = minibatch_mutual_information(random_posteriors(seed, n, d), batch_size, seed=seed)
    assert result.per_example.shape == (n,) and result.per_example.max() <= math.log(batch_size) + 1e-9
    assert result.log_n == math.log(batch_size) and f"minibatches of {batch_size} out of {n}" in result.protocol


def test_the_minibatch_form_by_hand(monkeypatch):
    posteriors = random_posteriors(1, 7, 3)
    order = torch.tensor([4, 0, 6, 1, 5, 2, 3])
    monkeypatch.setattr(torch, "randperm", lambda n: order)
    monkeypatch.setattr(torch, "randn", lambda shape, dtype: torch.ones(shape, dtype=dtype))  # z = mean + std
    result = minibatch_mutual_information(posteriors, 3)
    z = posteriors.mean + posteriors.log_std.exp()
    expected = torch.zeros(7, dtype=torch.float64)
    for batch in order.split(3):
        part = Posteriors(posteriors.mean[batch], posteriors.log_std[batch])
        expected[batch] = brute_force(part, z[batch])[0]
    torch.testing.assert_close(result.per_example, expected)
    assert expected[3] == 0  # alone in the last batch


@pytest.mark.parametrize(("d", "std"), [(1, 2.0), (2, 1.5), (4, 3.0), (8, 8.0)])
def test_a_linear_gaussian_has_its_closed_form(d, std):
    posteriors, information = linear_gaussian(4000, d, std)
    result = mutual_information(posteriors)
    assert result.log_n == math.log(4000) and result.standard_error < 0.03
    assert 0.2 < information < 3 and result.value == pytest.approx(information, abs=4 * result.standard_error)


def test_separated_codes_give_log_n_and_the_minibatch_form_log_b():
    whole = mutual_information(separated(300, 2))
    assert whole.value == pytest.approx(math.log(300), abs=1e-5) and whole.standard_error < 1e-6
    assert f"at most log N = {math.log(300):.3f} nats" in whole.protocol
    small = minibatch_mutual_information(separated(300, 2), 30)
    assert small.value == pytest.approx(math.log(30), abs=1e-5)
    assert f"at most log B = {math.log(30):.3f} nats" in small.protocol


def test_the_minibatch_form_stays_under_its_cap_and_below_the_whole_set():
    posteriors, information = linear_gaussian(4096, 4, 1.0)
    assert 3 < information < 5
    whole = mutual_information(posteriors).value
    small = [minibatch_mutual_information(posteriors, size).value for size in (16, 128, 1024)]
    assert small[0] < small[1] < small[2] < whole
    assert small[0] == pytest.approx(math.log(16), abs=0.5) and small[0] <= math.log(16)


def test_a_collapsed_posterior_holds_nothing():
    exact = mutual_information(collapsed(500, 8), diagonal_normal(torch.zeros(8), torch.ones(8)).log_prob)
    assert abs(exact.value) < 1e-5 and abs(exact.marginal_kl) < 1e-5 and exact.standard_error < 1e-6
    nearly = Posteriors(1e-3 * torch.randn(500, 8), 1e-3 * torch.randn(500, 8))
    values = torch.tensor([mutual_information(nearly, seed=seed).value for seed in range(40)])
    assert values.abs().max() < 1e-3 and values.min() < 0  # never clipped


def test_kl_is_the_information_plus_the_marginal_kl():
    posteriors = random_posteriors(2, 400, 3, spread=1.0)
    prior = diagonal_normal(torch.tensor([0.5, 0.0, -0.5]).double(), torch.tensor([1.0, 2.0, 1.5]).double())
    kl = kl_per_dimension(posteriors, prior)
    result = mutual_information(posteriors, prior.log_prob, num_samples=200)
    assert result.value + result.marginal_kl == pytest.approx(kl.total, abs=0.02)
    aggregate = DiagonalMixture(torch.zeros(400).double(), posteriors.mean, posteriors.log_std.exp())
    assert mutual_information(posteriors, aggregate.log_prob).marginal_kl == pytest.approx(0.0, abs=1e-12)


def test_blocks_do_not_change_the_figures():
    posteriors = random_posteriors(3, 101, 4, torch.float32)
    prior = diagonal_normal(torch.zeros(4), torch.ones(4)).log_prob
    one, other = (mutual_information(posteriors, prior, 3, rows) for rows in (7, 4096))
    torch.testing.assert_close(one.per_example, other.per_example)
    assert one.marginal_kl == pytest.approx(other.marginal_kl, rel=1e-5)
    assert (one.protocol, one.log_n) == (other.protocol, other.log_n)


def test_the_seed_governs_and_leaves_the_global_generator():
    posteriors, before = random_posteriors(4, 20, 2), torch.get_rng_state()
    a, b, c = (mutual_information(posteriors, seed=seed).per_example for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())
    unseeded = [mutual_information(posteriors, seed=None).value for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_draws_of_one_example_differ():
    z, _ = seen_draws(Posteriors(torch.zeros(6, 2), torch.zeros(6, 2)), num_samples=5, max_rows=2)
    assert len(z.unique(dim=0)) == 30


def test_the_prior_sees_z_in_its_own_shape():
    mean = torch.randn(9, 2, 3, 4)
    z, result = seen_draws(Posteriors(mean, torch.zeros_like(mean)), max_rows=4)
    assert z.shape == mean.shape
    flat = mutual_information(Posteriors(mean.flatten(1), torch.zeros(9, 24)))
    torch.testing.assert_close(result.per_example, flat.per_example)
    assert kl_per_dimension(Posteriors(mean, torch.zeros_like(mean))).per_dimension.shape == (2, 3, 4)


def test_one_example_and_equal_examples_share_nothing():
    one = mutual_information(random_posteriors(5, 1, 3))
    assert (one.value, one.log_n) == (pytest.approx(0.0, abs=1e-12), 0.0) and math.isnan(one.standard_error)
    same = random_posteriors(6, 1, 3)
    copies = Posteriors(same.mean.expand(50, 3), same.log_std.expand(50, 3))
    assert mutual_information(copies).value == pytest.approx(0.0, abs=1e-12)
    assert minibatch_mutual_information(copies, 10).value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("std", [1e-6, 1e-30])
def test_tiny_standard_deviations_give_finite_figures(std):
    posteriors = Posteriors(torch.randn(200, 4), torch.full((200, 4), math.log(std)))
    assert mutual_information(posteriors).value == pytest.approx(math.log(200), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------
# collect_posteriors
# ---------------------------------------------------------------------------------------------------------


def encode(x):
    return diagonal_normal(x[:, :2], 0.5 + x[:, 2:4].abs())


def test_posteriors_are_those_of_the_encoder_in_any_batches():
    data = torch.randn(53, 4)
    whole = encode(data).base_dist
    for batch_size in (7, 53, 256):
        found = collect_posteriors(data, encode, batch_size=batch_size)
        torch.testing.assert_close(found.mean, whole.loc)
        torch.testing.assert_close(found.log_std, whole.scale.log())
        assert len(found) == 53


def test_a_transform_that_draws_is_asked_once():
    data, calls = torch.randint(0, 256, (30, 4), dtype=torch.uint8), []

    def binarised(x):
        calls.append(len(x))
        return torch.bernoulli(x / 255.0)

    before = torch.get_rng_state()
    first, again = (collect_posteriors(data, encode, binarised, batch_size=8, seed=3) for _ in range(2))
    assert calls == 2 * [8, 8, 8, 6] and torch.equal(first.mean, again.mean)
    assert set(first.mean.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first.mean, collect_posteriors(data, encode, binarised, batch_size=8, seed=4).mean)
    assert torch.equal(before, torch.get_rng_state())
    same = collect_posteriors(data[:1].expand(64, 4), encode, binarised, batch_size=8).mean.view(8, 16)
    assert len(same.unique(dim=0)) > 1  # batches of the same data draw different numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_posteriors_are_in_at_least_float32(dtype):
    found = collect_posteriors(torch.randn(5, 4), encode, lambda x: x.to(dtype))
    assert found.mean.dtype == found.log_std.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_an_event_of_several_dimensions_keeps_its_shape():
    found = collect_posteriors(torch.randn(5, 2, 3, 3), lambda x: diagonal_normal(x, torch.ones_like(x), 3))
    assert found.mean.shape == found.log_std.shape == (5, 2, 3, 3)


# ---------------------------------------------------------------------------------------------------------
# info_nce_bound
# ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_info_nce_is_the_cross_entropy_of_the_pairs(seed, n):
    scores = 3 * torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(n), reduction="none")
    result = info_nce_bound(scores.diagonal(), scores.logsumexp(1))
    assert result.c == pytest.approx(-float(loss.mean()))
    assert result.value == pytest.approx(math.log(n) - float(loss.mean()))
    assert result.standard_error == pytest.approx(float(loss.std()) / math.sqrt(n))
    assert result.value <= result.log_n == math.log(n)


def test_info_nce_with_the_true_ratio_comes_near_the_information():
    """The best critic's bound approaches I as the batch grows (its scores: log q(z|x)); a constant critic's is 0."""
    posteriors, information = linear_gaussian(2000, 2, 2.0)
    z = posteriors.mean + posteriors.log_std.exp() * torch.randn(2000, 2)
    scores = Normal(posteriors.mean, posteriors.log_std.exp()).log_prob(z[:, None]).sum(-1)  # [z, x]
    result = info_nce_bound(scores.diagonal(), scores.logsumexp(1))
    assert result.value == pytest.approx(information, abs=4 * result.standard_error)
    assert info_nce_bound(torch.zeros(20), torch.full((20,), math.log(20))).value == pytest.approx(0.0, abs=1e-6)


def test_info_nce_of_several_batches_names_its_candidates():
    positive, log_sum = torch.zeros(30), torch.full((30,), math.log(10))
    result = info_nce_bound(positive, log_sum, num_candidates=10)
    assert result.value == pytest.approx(0.0, abs=1e-6)
    assert "30 rows, K = 10 candidates" in result.protocol and f"log K = {math.log(10):.3f}" in result.protocol


# ---------------------------------------------------------------------------------------------------------
# several processes
# ---------------------------------------------------------------------------------------------------------


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fails_on_the_last_batch(x):
    if len(x) < 5:
        raise KeyError("a fault of one rank")
    return encode(x)


def every_metric():
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = torch.randn(33, 4, generator=torch.Generator().manual_seed(1))

    def noisy(x):
        return x + 0.1 * torch.randn_like(x)

    def prior(z):  # draws too, as the bound of a noise contrastive prior does
        return Normal(0.0, 1.0).log_prob(z).sum(1) + torch.rand(len(z))

    found = collect_posteriors(data, encode, noisy, batch_size=5, distributed=True)
    shared = {"distributed": True}
    part = torch.arange(33)[rank::world]
    order = torch.cat([torch.arange(33)[start::world] for start in range(world)])
    figures = {
        "posteriors": (found.mean, found.log_std),
        "whole": mutual_information(found, prior, 2, 4, **shared),
        "idle": mutual_information(found, prior, **shared),
        "minibatch": minibatch_mutual_information(found, 6, **shared),
        "info_nce": info_nce_bound(-data[part, 0].exp(), data[part, 1].abs(), across_ranks=True),
        "info_nce alone": info_nce_bound(-data[order, 0].exp(), data[order, 1].abs()),
    }
    calls = {
        "seeds": lambda: mutual_information(found, seed=rank, **shared),
        "posteriors": lambda: mutual_information(Posteriors(found.mean + rank, found.log_std), **shared),
        "no seed": lambda: minibatch_mutual_information(found, 6, seed=None, **shared),
        "data": lambda: collect_posteriors(data + rank, encode, **shared),
        "encoder": lambda: collect_posteriors(data, fails_on_the_last_batch, batch_size=10, **shared),
        "scores": lambda: info_nce_bound(data[:, 0] * (math.nan if rank else 1), data[:, 0] + 9, across_ranks=True),
    }
    return figures, {name: message(call) for name, call in calls.items()} if world > 1 else {}


@pytest.fixture(scope="module")
def run():
    return {world: run_processes(every_metric, world) for world in (1, 2)}


def test_two_processes_give_what_one_gives_to_the_bit(run):
    alone = run[1][0][0]
    for figures, _ in run[2]:
        for ours, theirs in zip(figures["posteriors"], alone["posteriors"], strict=True):
            assert torch.equal(ours, theirs)
        for name in ("whole", "idle", "minibatch"):
            ours, theirs = vars(figures[name]).copy(), vars(alone[name]).copy()
            assert torch.equal(ours.pop("per_example"), theirs.pop("per_example"))
            assert ours == theirs
        assert figures["info_nce"] == figures["info_nce alone"]
        assert figures["info_nce"].value == pytest.approx(alone["info_nce"].value)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "seeds",
            "ValueError: mutual_information: seed must be the same on every rank, got 0 on rank 0 and 1 on rank 1",
        ),
        ("posteriors", "ValueError: mutual_information: posteriors must be the same on every rank"),
        ("no seed", "ValueError: minibatch_mutual_information: seed must be an integer where distributed"),
        ("data", "ValueError: collect_posteriors: data must be the same on every rank"),
        ("encoder", "a fault of one rank"),
        ("scores", "info_nce_bound: positive must be finite, got NaN or infinity"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(run, call, expected):
    for _, messages in run[2]:
        assert expected in messages[call]


# ---------------------------------------------------------------------------------------------------------
# bad input
# ---------------------------------------------------------------------------------------------------------

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Q = Posteriors(X, torch.zeros(6, 4))
NAN = X.clone().fill_(math.nan)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Posteriors(X.tolist(), X), TypeError, r"mean must be a tensor \[N, D\], got list"),
        (lambda: Posteriors(X.long(), X), TypeError, "mean must be float32 or float64, got torch.int64"),
        (lambda: Posteriors(X, X.half()), TypeError, "log_std must be float32 or float64, got torch.float16"),
        (lambda: Posteriors(X[0], X[0]), ValueError, r"mean must be \[N, D\] with N, D ≥ 1, got shape \(4,\)"),
        (lambda: Posteriors(X[:0], X[:0]), ValueError, r"mean must be \[N, D\] with N, D ≥ 1, got shape \(0, 4\)"),
        (
            lambda: Posteriors(X, X[:, :2]),
            ValueError,
            r"log_std must be \(6, 4\) and torch.float32 as mean, got \(6, 2\)",
        ),
        (lambda: Posteriors(X, X.double()), ValueError, "got .* torch.float64"),
        (lambda: Posteriors(NAN, X), ValueError, "Posteriors: mean must be finite, got NaN or infinity"),
        (
            lambda: Posteriors(X, NAN),
            ValueError,
            "log_std must be that of a standard deviation which is finite and > 0",
        ),
        (lambda: Posteriors(X, torch.zeros_like(X).log()), ValueError, "finite and > 0 in torch.float32"),
        (lambda: Posteriors(X, torch.full_like(X, -100)), ValueError, "finite and > 0 in torch.float32"),
        (lambda: collect_posteriors([1.0], encode), TypeError, r"data must be a tensor \[N, …\], got list"),
        (
            lambda: collect_posteriors(X[:0], encode),
            ValueError,
            r"data must be \[N, …\] with N ≥ 1, got shape \(0, 4\)",
        ),
        (lambda: collect_posteriors(NAN, encode), ValueError, "collect_posteriors: data must be finite"),
        (lambda: collect_posteriors(X, encode, batch_size=0), ValueError, "batch_size must be an integer ≥ 1, got 0"),
        (lambda: collect_posteriors(X, encode, seed=-1), ValueError, "seed must be ≥ 0"),
        (lambda: collect_posteriors(X, lambda x: x), TypeError, "encode must return a Normal .*, got Tensor"),
        (
            lambda: collect_posteriors(X, lambda x: Independent(Laplace(x, 1.0), 1)),
            TypeError,
            "encode must return a Normal with independent coordinates, got Independent",
        ),
        (lambda: collect_posteriors(X, lambda x: LogNormal(x, 1.0)), TypeError, "Normal .*, got LogNormal"),
        (lambda: collect_posteriors(X, lambda x: Normal(x, 1.0)), ValueError, r"with batch \[6\], got \[6, 4\]; wrap"),
        (
            lambda: collect_posteriors(X, lambda x: diagonal_normal(NAN, torch.ones_like(x))),
            ValueError,
            "mean must be finite",
        ),
        (
            lambda: collect_posteriors(X, lambda x: diagonal_normal(x, torch.zeros_like(x))),
            ValueError,
            "log_std must be that of a standard deviation",
        ),
        (lambda: mutual_information(X), TypeError, "mutual_information: posteriors must be Posteriors, .* got Tensor"),
        (lambda: mutual_information(Q, num_samples=0), ValueError, "num_samples must be an integer ≥ 1, got 0"),
        (lambda: mutual_information(Q, max_rows=2.5), ValueError, "max_rows must be an integer ≥ 1, got 2.5"),
        (lambda: mutual_information(Q, seed="a"), TypeError, "seed must be an integer, got str"),
        (
            lambda: mutual_information(Q, Normal(0.0, 1.0).log_prob),
            ValueError,
            r"prior_log_prob must return log p\(z\) of shape \(6,\), got \(6, 4\)",
        ),
        (lambda: mutual_information(Q, lambda z: 0.0), ValueError, "prior_log_prob must return .*, got float"),
        (lambda: mutual_information(Q, lambda z: z[:, 0] * math.nan), ValueError, "prior_log_prob must not return NaN"),
        (lambda: minibatch_mutual_information(Q, 7), ValueError, "batch_size must be 2 … 6, .* got 7"),
        (lambda: minibatch_mutual_information(Q, 1), ValueError, "batch_size must be 2 … 6, .* got 1"),
        (lambda: minibatch_mutual_information(X, 2), TypeError, "minibatch_mutual_information: posteriors must be"),
        (lambda: info_nce_bound([0.0], X[:, 0]), TypeError, r"positive must be a tensor \[N\], got list"),
        (
            lambda: info_nce_bound(X[:, 0].long(), X[:, 0]),
            TypeError,
            "positive must be floating point, got torch.int64",
        ),
        (lambda: info_nce_bound(X, X), ValueError, r"positive must be \[N\] with N ≥ 1, got shape \(6, 4\)"),
        (lambda: info_nce_bound(X[:0, 0], X[:0, 0]), ValueError, r"positive must be \[N\] with N ≥ 1"),
        (lambda: info_nce_bound(X[:, 0], NAN[:, 0]), ValueError, "log_sum must be finite, got NaN or infinity"),
        (lambda: info_nce_bound(X[:, 0], X[:5, 0]), ValueError, r"log_sum must be \(6,\) as positive, got \(5,\)"),
        (lambda: info_nce_bound(X[:, 0], X[:, 0] - 1), ValueError, "log_sum must include the positive, .* up to 1"),
        (lambda: info_nce_bound(X[:, 0], X[:, 0], 0), ValueError, "num_candidates must be an integer ≥ 1, got 0"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_every_result_is_exported():
    for name in ("MutualInformation", "Posteriors", "InfoNCEBound", "ActiveUnits", "KLPerDimension", "Perplexity"):
        assert name in metrics.__all__ and hasattr(metrics, name)
