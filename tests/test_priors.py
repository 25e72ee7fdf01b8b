import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal
from torch.distributions import Normal as TorchNormal
from toy import LOG_Z, ExactRatio, exact_prior, expected_ess_fraction, target_log_prob

from ncpvae import GaussianMixture, MLPClassifier, NoiseContrastivePrior, Normal, ResidualClassifier


def test_density_is_the_ratio_times_the_base():
    prior, z = exact_prior(), torch.randn(50, 2)
    torch.testing.assert_close(prior.unnormalized_log_prob(z), target_log_prob(z) + LOG_Z)
    torch.testing.assert_close(prior.energy(z), -prior.unnormalized_log_prob(z))


def test_log_normalizer_its_error_and_its_ess_are_right():
    prior, n = exact_prior(), 50_000
    estimates = [prior.estimate_log_normalizer(n) for _ in range(20)]
    values = torch.tensor([e.value for e in estimates])
    error = estimates[0].standard_error
    assert abs(values.mean() - LOG_Z) < 4 * error / math.sqrt(20)
    assert 0.5 * error < values.std() < 2 * error
    assert estimates[0].ess / n == pytest.approx(expected_ess_fraction(2), rel=0.05)


def test_log_prob_is_the_normalized_density_once_z_is_known():
    prior, z = exact_prior(), torch.randn(50, 2)
    with pytest.raises(RuntimeError, match="estimate_log_normalizer"):
        prior.log_prob(z)
    estimate = prior.estimate_log_normalizer(100_000)
    torch.testing.assert_close(prior.log_prob(z), target_log_prob(z), atol=5 * estimate.standard_error, rtol=0)
    prior.forget_log_normalizer()
    with pytest.raises(RuntimeError, match="estimate_log_normalizer"):
        prior.log_prob(z)


def test_log_normalizer_travels_with_the_state():
    prior, copy = exact_prior(), exact_prior()
    estimate = prior.estimate_log_normalizer(1000)
    copy.load_state_dict(prior.state_dict())
    assert copy().log_normalizer == estimate.value


def test_snis_bound_lies_below_the_sampler_density_and_tightens():
    """Its mean over the proposals rises with K towards log p_NCP, and K = 1 is the base."""
    prior = exact_prior()
    z = torch.randn(20, 2) * 0.6 + 0.5
    torch.testing.assert_close(prior.snis_log_prob(z, 1), prior.base_distribution().log_prob(z))
    means = [torch.stack([prior.snis_log_prob(z, K) for _ in range(400)]).mean() for K in (2, 16, 256)]
    assert means[0] < means[1] < means[2] < target_log_prob(z).mean() + 0.01
    assert means[2] == pytest.approx(target_log_prob(z).mean().item(), abs=0.05)


def test_snis_bound_is_a_density():
    """E over proposals of exp(bound) integrates to 1: it is the exact density of SIR's output."""
    prior = exact_prior(1)
    z = torch.linspace(-6, 6, 2001)[:, None]
    density = torch.stack([prior.snis_log_prob(z, 4).exp() for _ in range(3000)]).mean(0)
    assert torch.trapezoid(density, z[:, 0]).item() == pytest.approx(1.0, abs=0.02)


def test_generator_governs_and_leaves_torch_alone():
    prior = exact_prior()
    before = torch.get_rng_state()
    first = prior.sample((3,), generator=torch.Generator().manual_seed(5))
    again = prior.sample((3,), generator=torch.Generator().manual_seed(5))
    other = prior.sample((3,), generator=torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_temperature_scales_the_base_and_forgets_z():
    prior = NoiseContrastivePrior(Normal(2), ExactRatio())
    prior.estimate_log_normalizer(1000)
    cooler = prior().tempered(0.5)
    assert cooler.base.variance[0] == pytest.approx(0.25)
    with pytest.raises(RuntimeError):
        cooler.log_prob(torch.zeros(2))
    assert prior().tempered(1.0).log_normalizer is not None
    spread = prior.sample((2000,), temperature=0.5).std(0)
    precision = 1 / 0.36 - 1 + 1 / 0.25  # of N(0.5, 0.6²)/N(0, 1) · N(0, ½²)
    torch.testing.assert_close(spread, torch.full((2,), precision**-0.5), rtol=0.08, atol=0)


def test_a_distribution_serves_as_base_and_a_context_reaches_both():
    plain = NoiseContrastivePrior(Independent(TorchNormal(torch.zeros(2), torch.ones(2)), 1), ExactRatio())
    assert plain.sample((4,)).shape == (4, 2)

    class Conditional(nn.Module):
        def forward(self, context):
            return Independent(TorchNormal(context, torch.ones_like(context)), 1)

    prior = NoiseContrastivePrior(Conditional(), MLPClassifier(2, (8,), context_features=2))
    context = torch.randn(3, 2)
    distribution = prior(context)
    z = distribution.sample((5,))
    assert z.shape == (5, 3, 2)
    expected = torch.stack([prior.classifier(z[s], context) for s in range(5)])
    torch.testing.assert_close(distribution.log_ratio(z), expected)
    with pytest.raises(ValueError, match="the base must have no batch"):
        distribution.estimate_log_normalizer(10)


def test_feature_map_latents_work_end_to_end():
    prior = NoiseContrastivePrior(Normal((3, 4, 4)), ResidualClassifier(3, channels=8, blocks=1).eval())
    assert prior.sample((2,)).shape == (2, 3, 4, 4)
    assert math.isfinite(prior.estimate_log_normalizer(100).value)


def test_large_batches_are_split_without_changing_the_result(monkeypatch):
    prior, z = exact_prior(), torch.randn(100, 2)
    whole = prior.log_ratio(z)
    monkeypatch.setattr("ncpvae.priors.noise_contrastive.ROWS_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(prior.log_ratio(z), whole)


def test_snis_gradient_knows_that_the_scale_of_r_cancels():
    """Adding a constant to log r changes nothing, so its gradient is zero."""
    prior = NoiseContrastivePrior(Normal(2), MLPClassifier(2, (8,)))
    prior.snis_log_prob(torch.randn(40, 2), 16).sum().backward()
    assert abs(prior.classifier.network[-1].bias.grad.item()) < 1e-4


def test_snis_draws_anew_for_slices_of_z():
    z = torch.zeros(32, 2)
    values = exact_prior().snis_log_prob(z, 8)
    assert 10 < len(values.unique()) <= 16


def test_a_base_that_ignores_the_context_is_named():
    prior = NoiseContrastivePrior(Normal(3), MLPClassifier(3, (8,), context_features=4))
    with pytest.raises(ValueError, match=r"base must have the context's batch \(6,\) as its batch shape, got \(\)"):
        prior(torch.randn(6, 4))


def test_contexts_are_evaluated_in_parts_without_changing_the_result(monkeypatch):
    context = torch.randn(3, 2)
    base = Independent(TorchNormal(context, torch.ones(3, 2)), 1)
    distribution = NoiseContrastivePrior(base, MLPClassifier(2, (8,), context_features=2))(context)
    z = torch.randn(5, 7, 3, 2)
    whole = distribution.log_ratio(z)
    monkeypatch.setattr("ncpvae.priors.noise_contrastive.ROWS_AT_ONCE", 9)
    with torch.no_grad():
        torch.testing.assert_close(distribution.log_ratio(z), whole)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_gaussian_mixture_fit_recovers_two_clusters(covariance):
    pytest.importorskip("sklearn")
    codes = torch.cat([torch.randn(4000, 2) * 0.3 - 2, torch.randn(2000, 2) * 0.5 + 1])
    distribution = GaussianMixture.fit(codes, 2, covariance)()
    truth = torch.logaddexp(
        math.log(2 / 3) + MultivariateNormal(torch.full((2,), -2.0), 0.09 * torch.eye(2)).log_prob(codes),
        math.log(1 / 3) + MultivariateNormal(torch.ones(2), 0.25 * torch.eye(2)).log_prob(codes),
    )
    assert distribution.log_prob(codes).mean() == pytest.approx(truth.mean().item(), abs=0.02)
    assert distribution.sample((3,)).shape == (3, 2)


def test_normal_fit_matches_moments():
    codes = torch.randn(5000, 3) * 2 + 1
    distribution = Normal.fit(codes)()
    torch.testing.assert_close(distribution.mean, codes.mean(0))
    torch.testing.assert_close(distribution.stddev, codes.std(0))


def test_normal_fit_per_channel_pools_positions():
    codes = torch.randn(500, 3, 4, 4) * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 1
    distribution = Normal.fit(codes, per="channel")()
    assert distribution.event_shape == (3, 4, 4)
    columns = codes.movedim(1, 0).flatten(1)  # [C, N·H·W]
    for moment, expected in ((distribution.mean, columns.mean(1)), (distribution.stddev, columns.std(1))):
        torch.testing.assert_close(moment, expected[:, None, None].expand(3, 4, 4))


def test_normal_fit_per_channel_of_vectors_is_per_coordinate():
    codes = torch.randn(50, 3)
    assert torch.equal(Normal.fit(codes, per="channel").mean, Normal.fit(codes).mean)
    assert torch.equal(Normal.fit(codes, per="channel").log_std, Normal.fit(codes).log_std)


class TwoLogits(nn.Module):
    def forward(self, z, context=None):
        return torch.zeros(*z.shape[:-1], 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: NoiseContrastivePrior("normal", ExactRatio()),
            TypeError,
            "base must be a Distribution or a module, got str",
        ),
        (lambda: NoiseContrastivePrior(Normal(2), lambda z: z), TypeError, "classifier must be a module, got function"),
        (lambda: exact_prior().log_ratio(torch.randn(3, 5)), ValueError, r"z must be \[..., 2\], got shape \(3, 5\)"),
        (
            lambda: NoiseContrastivePrior(Normal(2), TwoLogits()).log_ratio(torch.randn(3, 2)),
            ValueError,
            r"one logit per z, shape \(3,\), got \(3, 2\)",
        ),
        (
            lambda: NoiseContrastivePrior(TorchNormal(torch.zeros(2), torch.ones(2)), ExactRatio())(),
            ValueError,
            "base must have an event shape",
        ),
        (lambda: NoiseContrastivePrior(Normal(3), MLPClassifier(4)).sample(), ValueError, r"D = 4\], got shape"),
        (
            lambda: NoiseContrastivePrior(Normal(3), nn.Linear(4, 1)).sample(),
            ValueError,
            "classifier does not take z of shape",
        ),
        (lambda: exact_prior().sample(sampler="sir"), TypeError, "sampler must be a sampler such as SIR.*got str"),
        (lambda: exact_prior().sample(5), TypeError, "SIR: shape must be a tuple of integers, got 5"),
        (
            lambda: Normal(2, mean=torch.zeros(3)),
            ValueError,
            r"Normal: mean must broadcast to shape \(2,\), got \(3,\)",
        ),
        (lambda: Normal(0), ValueError, "Normal: shape must be positive"),
        (lambda: Normal.fit([1.0]), TypeError, "Normal.fit: codes must be a floating-point tensor"),
        (lambda: GaussianMixture.fit(torch.zeros(9, 2).long(), 2), TypeError, "codes must be a floating-point tensor"),
        (
            lambda: GaussianMixture(torch.zeros(1), torch.zeros(1, 2), -torch.ones(1, 2)),
            ValueError,
            "scale must be > 0",
        ),
        (lambda: exact_prior().estimate_log_normalizer(1), ValueError, "num_samples must be an integer ≥ 2, got 1"),
        (
            lambda: exact_prior().snis_log_prob(torch.zeros(2), 0),
            ValueError,
            "num_proposals must be an integer ≥ 1, got 0",
        ),
        (lambda: Normal(2, std=-1.0), ValueError, "std finite and > 0"),
        (lambda: Normal(3.0), TypeError, "shape must be an integer or a tuple of them, got 3.0"),
        (lambda: Normal.fit(torch.full((3, 2), math.nan)), ValueError, "Normal.fit: codes must be finite"),
        (
            lambda: GaussianMixture(torch.zeros(2), torch.zeros(2), torch.ones(2, 2)),
            ValueError,
            r"mean \[K, D\] and scale .* got shapes \(2,\), \(2,\), \(2, 2\)",
        ),
        (
            lambda: GaussianMixture(torch.tensor([0.0, math.nan]), torch.zeros(2, 1), torch.ones(2, 1)),
            ValueError,
            "log_weight and mean must be finite",
        ),
        (lambda: Normal.fit(torch.zeros(1, 2)), ValueError, r"Normal.fit: codes must be \[N, …\] with N ≥ 2"),
        (
            lambda: Normal.fit(torch.zeros(3, 2), per="pixel"),
            ValueError,
            "per must be 'coordinate' or 'channel', got 'pixel'",
        ),
        (lambda: GaussianMixture.fit(torch.zeros(3, 2), 5), ValueError, "K = 5"),
        (lambda: GaussianMixture.fit(torch.full((9, 2), math.nan), 2), ValueError, "codes must be finite"),
        (
            lambda: GaussianMixture.fit(torch.zeros(9, 2), 2, "tied"),
            ValueError,
            "covariance must be 'diag' or 'full', got 'tied'",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nan_ratio_is_refused_where_it_matters():
    prior = NoiseContrastivePrior(Normal(2), ExactRatio(log_z=math.nan))
    with pytest.raises(ValueError, match="log_ratio must be finite at base draws"):
        prior.estimate_log_normalizer(100)
    with pytest.raises(ValueError, match="SIR: log_ratio must be finite"):
        prior.sample((2,))
