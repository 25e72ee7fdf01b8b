"""Active units, KL per dimension, perplexity, density and coverage, against float64 brute force and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Laplace, Normal, kl_divergence

from ncpvae.distributions import diagonal_normal
from ncpvae.metrics import (
    Likelihood,
    Posteriors,
    active_units,
    active_units_by_sampled_std,
    density_coverage,
    kl_per_dimension,
    perplexity,
)


def random_posteriors(seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 0, d)  # some coordinates active, some not
    mean, log_std = torch.randn(2, n, d, generator=generator)
    return Posteriors(scale * mean + 50, 0.3 * log_std)


SEEDS = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 40), st.integers(1, 8), st.sampled_from([0.0, 0.01, 0.3]))
def test_active_units_are_those_of_the_variance_of_means(seed, n, d, threshold):
    posteriors = random_posteriors(seed, n, d)
    means = posteriors.mean.tolist()
    averages = [math.fsum(row[i] for row in means) / n for i in range(d)]
    variances = [math.fsum((row[i] - averages[i]) ** 2 for row in means) / (n - 1) for i in range(d)]
    result = active_units(posteriors, threshold)
    assert result.variances.tolist() == pytest.approx(variances, rel=1e-9, abs=1e-15)
    assert result.count == sum(v > threshold for v in variances)
    assert f"variance over {n} examples of the posterior mean > {threshold:g}" == result.protocol


def test_a_collapsed_posterior_has_no_active_unit_though_its_samples_vary():
    collapsed = Posteriors(torch.zeros(1000, 32), torch.zeros(1000, 32))
    assert active_units(collapsed).count == 0
    sampled = active_units_by_sampled_std(collapsed)
    assert sampled.count == 32 and sampled.threshold == pytest.approx(0.01)
    assert "of one sampled z each > 0.1, seed 0" in sampled.protocol


def test_the_sampled_form_measures_the_variance_of_draws():
    posteriors = Posteriors(
        torch.randn(20_000, 2) * torch.tensor([3.0, 0.01]), torch.tensor([0.5, 0.02]).log().expand(20_000, 2)
    )
    result = active_units_by_sampled_std(posteriors)  # its seed 0 must not repeat the draws of torch's seed 0
    expected = torch.tensor([9.25, 0.0005], dtype=torch.float64)
    torch.testing.assert_close(result.variances, expected, rtol=0.05, atol=0)
    assert result.count == 1
    assert torch.equal(active_units_by_sampled_std(posteriors).variances, result.variances)
    assert not torch.equal(active_units_by_sampled_std(posteriors, seed=1).variances, result.variances)


def test_the_threshold_itself_is_not_active():
    posteriors = Posteriors(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))
    assert active_units(posteriors).variances.tolist() == [0.5]
    assert active_units(posteriors, 0.5).count == 0 and active_units(posteriors, 0.4999).count == 1


def test_equal_examples_have_no_active_unit():
    assert active_units(Posteriors(torch.full((30, 3), 7.3), torch.zeros(30, 3)), 0.0).count == 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(1, 6))
def test_kl_is_the_closed_form_of_each_coordinate(seed, n, d):
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = torch.randn(2, n, d, dtype=torch.float64, generator=generator)
    prior_mean, prior_log_std = torch.randn(2, d, dtype=torch.float64, generator=generator)
    result = kl_per_dimension(Posteriors(mean, log_std), diagonal_normal(prior_mean, prior_log_std.exp()))
    variance_ratio = (2 * (log_std - prior_log_std)).exp()
    shift = ((mean - prior_mean) / prior_log_std.exp()).square()
    expected = 0.5 * (variance_ratio + shift - 1 - variance_ratio.log())
    torch.testing.assert_close(result.per_dimension, expected.mean(0), rtol=1e-9, atol=1e-12)
    assert result.total == pytest.approx(float(expected.sum(1).mean()))
    if n > 1:
        assert result.standard_error == pytest.approx(float(expected.sum(1).std()) / math.sqrt(n))


def test_kl_is_from_the_standard_normal_by_default_and_0_at_collapse():
    posteriors = Posteriors(
        torch.randn(20, 3) * torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-1.0, 0.0, 0.5]).expand(20, 3)
    )
    result = kl_per_dimension(posteriors)
    standard = kl_divergence(
        diagonal_normal(posteriors.mean, posteriors.log_std.exp()), diagonal_normal(torch.zeros(3), torch.ones(3))
    )
    assert result.total == pytest.approx(float(standard.mean()), rel=1e-5)
    assert result.per_dimension[1] == 0 and result.per_dimension[0] > result.per_dimension[2] > 0
    assert result.protocol == "closed form, mean over 20 examples, from N(0, I)"
    assert (
        "from the Normal prior" in kl_per_dimension(posteriors, diagonal_normal(torch.zeros(3), torch.ones(3))).protocol
    )


# ---------------------------------------------------------------------------------------------------------
# perplexity
# ---------------------------------------------------------------------------------------------------------


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    """Texts of 3, 1 and 7 words, each with its </s> and every word at 1/V."""
    num_words = torch.tensor([4, 2, 8])
    result = perplexity(num_words * math.log(20_000.0), num_words)
    assert result.value == pytest.approx(20_000, rel=1e-5) and result.num_words == 14
    assert result.nll_per_word == pytest.approx(math.log(20_000))
    assert result.standard_error == pytest.approx(0, abs=0.1)
    assert result.protocol == "exp(total nats / 14 words) of 3 texts, </s> counted and <s> not; nats: as given"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 300), st.integers(1, 60)), min_size=1, max_size=20))
def test_perplexity_divides_the_totals(texts):
    nll, words = zip(*texts, strict=True)
    expected = math.fsum(nll) / sum(words)
    result = perplexity(torch.tensor(nll, dtype=torch.float64), torch.tensor(words))
    assert result.nll_per_word == pytest.approx(expected)
    assert result.value == pytest.approx(math.exp(expected))


def test_its_standard_error_is_that_of_repeated_samples():
    generator = torch.Generator().manual_seed(0)

    def sample(texts):
        words = torch.randint(2, 30, (texts,), generator=generator)
        rate = 3 + 0.5 * torch.randn(texts, generator=generator)
        return perplexity(rate * words, words)

    values = torch.tensor([sample(300).value for _ in range(300)])
    assert sample(300).standard_error == pytest.approx(float(values.std()), rel=0.25)
    equally_long = perplexity(torch.tensor([8.0, 12.0, 13.0]), torch.tensor([4, 4, 4]))  # delta method by hand
    by_hand = equally_long.value * torch.tensor([8.0, 12.0, 13.0]).std() / math.sqrt(3) / 4
    assert equally_long.standard_error == pytest.approx(float(by_hand))
    assert math.isnan(perplexity(torch.ones(1), torch.ones(1, dtype=torch.int64)).standard_error)


def test_perplexity_keeps_the_protocol_of_its_likelihoods():
    nll = Likelihood(
        30.0, 1.0, torch.tensor([20.0, 40.0]), "importance-weighted bound, 500 draws per example, 2 examples"
    )
    result = perplexity(nll, torch.tensor([10, 20]))
    assert result.value == pytest.approx(math.exp(2)) and result.protocol.endswith("nats: " + nll.protocol)


def test_a_hopeless_model_has_infinite_perplexity():
    assert perplexity(torch.tensor([5e5]), torch.tensor([3])).value == math.inf


# ---------------------------------------------------------------------------------------------------------
# density and coverage
# ---------------------------------------------------------------------------------------------------------


def published(real, generated, k):
    """Precision, recall, density, coverage as the papers write them, from N × M distances in float64."""

    def distances(a, b):
        return (a[:, None] - b).square().sum(-1).sqrt()

    radius = distances(real, real).kthvalue(k + 1, dim=1).values  # the example itself is the first
    generated_radius = distances(generated, generated).kthvalue(k + 1, dim=1).values
    between = distances(real, generated)
    in_ball = between < radius[:, None]
    return {
        "precision": float(in_ball.any(0).double().mean()),
        "recall": float((between < generated_radius).any(1).double().mean()),
        "density": float(in_ball.sum()) / (k * len(generated)),
        "coverage": float((between.min(1).values < radius).double().mean()),
    }


def random_sets(seed, n, m, d, shift):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return real, 0.8 * torch.randn(m, d, dtype=torch.float64, generator=generator) + shift


def figures(real, generated, k):
    result = density_coverage(real, generated, k)
    return {name: getattr(result, name) for name in ("precision", "recall", "density", "coverage")}


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(8, 60), st.integers(8, 60), st.integers(1, 6), st.integers(1, 6), st.floats(-2, 2))
def test_density_and_coverage_are_the_published_formulas(seed, n, m, d, k, shift):
    real, generated = random_sets(seed, n, m, d, shift)
    assert figures(real, generated, k) == pytest.approx(published(real, generated, k), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "k", "shift"), [(60, 60, 5, 0.0), (40, 75, 3, 0.7), (75, 31, 1, -1.0)])
def test_density_and_coverage_are_those_of_the_package_prdc(n, m, k, shift, capsys):
    prdc = pytest.importorskip("prdc")
    real, generated = random_sets(1, n, m, 4, shift)
    theirs = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    assert figures(real, generated, k) == pytest.approx({name: float(v) for name, v in theirs.items()}, abs=1e-12)


def test_identical_points_have_defined_density_and_coverage():
    same = torch.full((20, 3), 1.5)
    result = density_coverage(same, same[:12])
    assert (result.coverage, result.precision, result.recall) == (1.0, 1.0, 1.0)
    assert result.density == pytest.approx(20 / 5)  # every real ball, of radius 0, holds every generated example
    apart = density_coverage(same, same + 1)
    assert (apart.density, apart.coverage, apart.precision, apart.recall) == (0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------
# bad input
# ---------------------------------------------------------------------------------------------------------

Q = Posteriors(torch.zeros(6, 4), torch.zeros(6, 4))
ONE = Posteriors(torch.zeros(1, 4), torch.zeros(1, 4))
NLL, WORDS = torch.ones(3), torch.tensor([2, 3, 4])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: active_units(Q.mean), TypeError, "active_units: posteriors must be Posteriors, .* got Tensor"),
        (lambda: active_units(ONE), ValueError, "posteriors must be of ≥ 2 examples for a variance, got 1"),
        (lambda: active_units(Q, math.nan), ValueError, "threshold must be finite and ≥ 0, got nan"),
        (
            lambda: active_units_by_sampled_std(ONE),
            ValueError,
            "active_units_by_sampled_std: posteriors must be of ≥ 2",
        ),
        (lambda: active_units_by_sampled_std(Q, -1.0), ValueError, "std_threshold must be finite and ≥ 0, got -1.0"),
        (lambda: active_units_by_sampled_std(Q, seed=1.5), TypeError, "seed must be an integer, got float"),
        (lambda: kl_per_dimension(Q.mean), TypeError, "kl_per_dimension: posteriors must be Posteriors"),
        (
            lambda: kl_per_dimension(Q, Independent(Laplace(torch.zeros(4), 1.0), 1)),
            TypeError,
            "prior must be a Normal .*, got Independent; mutual_information with prior_log_prob estimates",
        ),
        (lambda: kl_per_dimension(Q, "N"), TypeError, "prior must be a Normal .*, got str"),
        (
            lambda: kl_per_dimension(Q, Normal(torch.zeros(3), 1.0)),
            ValueError,
            r"prior must be over z of shape \(4,\), got \(3,\)",
        ),
        (lambda: perplexity([1.0], WORDS), TypeError, r"perplexity: nll must be a tensor \[N\], got list"),
        (lambda: perplexity(WORDS, WORDS), TypeError, "nll must be floating point, got torch.int64"),
        (lambda: perplexity(NLL * math.nan, WORDS), ValueError, "perplexity: nll must be finite, got NaN"),
        (lambda: perplexity(NLL[:0], WORDS[:0]), ValueError, r"nll must be \[N\] with N ≥ 1, got shape \(0,\)"),
        (lambda: perplexity(NLL, [2, 3, 4]), TypeError, r"num_words must be a tensor \[N\], got list"),
        (lambda: perplexity(NLL, NLL), TypeError, "num_words must be integers, got torch.float32"),
        (lambda: perplexity(NLL, WORDS[:2]), ValueError, r"num_words must be \(3,\) as nll, got shape \(2,\)"),
        (lambda: perplexity(NLL, WORDS - 2), ValueError, "num_words must be ≥ 1, since </s> counts, got 0"),
        (lambda: density_coverage(torch.randn(6, 2), torch.randn(9, 2), 6), ValueError, "k must be 1 … 5 .* got 6"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
