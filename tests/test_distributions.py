import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Gamma,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from ncpvae.distributions import (
    BernoulliLikelihood,
    DiagonalMixture,
    LogisticMixtureLikelihood,
    NormalLikelihood,
    PixelNormalLikelihood,
    SoftClampedNormal,
    diagonal_normal,
    normal_parameters,
    soft_clamp,
    temper,
)


def mixture(K=4, D=3, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(K, dtype=dtype), torch.randn(K, D, dtype=dtype), torch.rand(K, D, dtype=dtype) + 0.2


def test_diagonal_mixture_density_is_that_of_mixture_same_family():
    log_weight, mean, std = mixture()
    expected = MixtureSameFamily(Categorical(logits=log_weight), Independent(Normal(mean, std), 1))
    z = torch.randn(5, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(DiagonalMixture(log_weight, mean, std).log_prob(z), expected.log_prob(z))


def test_diagonal_mixture_samples_have_its_mean_and_variance():
    distribution = DiagonalMixture(*mixture(dtype=torch.float32))
    z = distribution.sample((200_000,))
    error = distribution.variance.sqrt() / math.sqrt(len(z))
    assert ((z.mean(0) - distribution.mean).abs() < 5 * error).all()
    torch.testing.assert_close(z.var(0), distribution.variance, rtol=0.03, atol=0)


def test_diagonal_mixture_refuses_mismatched_shapes():
    log_weight, mean, std = mixture()
    with pytest.raises(ValueError, match=r"DiagonalMixture: log_weight must be \[K\].*\(3,\)"):
        DiagonalMixture(log_weight[:3], mean, std)


@pytest.mark.parametrize(
    "distribution",
    [
        diagonal_normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])),
        MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.3], [0.3, 2.0]])),
    ],
)
def test_tempering_scales_the_standard_deviation_alone(distribution):
    cooler = temper(distribution, 0.5)
    torch.testing.assert_close(cooler.mean, distribution.mean)
    torch.testing.assert_close(cooler.variance, 0.25 * distribution.variance)


def test_tempering_a_mixture_scales_its_components():
    log_weight, mean, std = mixture()
    cooler = temper(DiagonalMixture(log_weight, mean, std), 0.5)
    torch.testing.assert_close(cooler.component_std, 0.5 * std)
    torch.testing.assert_close(cooler.component_mean, mean)
    full = MixtureSameFamily(Categorical(logits=log_weight), Independent(Normal(mean, std), 1))
    z = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(temper(full, 0.5).log_prob(z), cooler.log_prob(z))


def test_tempering_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="temper: distribution must be.*Gamma"):
        temper(Gamma(torch.tensor(1.0), torch.tensor(1.0)), 0.5)
    with pytest.raises(ValueError, match="temper: temperature must be.*-1"):
        temper(Normal(0.0, 1.0), -1)


def test_likelihood_heads_give_one_number_per_example():
    out = torch.randn(5, 4, 1, 8, 8)
    x = torch.rand(4, 1, 8, 8).round()
    bernoulli = BernoulliLikelihood()(out, 3)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none")
    torch.testing.assert_close(bernoulli.log_prob(x), expected.sum((2, 3, 4)))
    normal = NormalLikelihood(0.3)(out, 3)
    torch.testing.assert_close(normal.log_prob(x), Normal(out, 0.3).log_prob(x).sum((2, 3, 4)))


def test_learned_std_is_a_parameter_and_bad_std_is_refused():
    assert [name for name, _ in NormalLikelihood(0.1, learn_std=True).named_parameters()] == ["log_std"]
    assert not list(NormalLikelihood(0.1).parameters())
    with pytest.raises(ValueError, match="NormalLikelihood: std must be.*0"):
        NormalLikelihood(0.0)


def test_normal_parameters_sees_through_independent():
    mean, std = normal_parameters(diagonal_normal(torch.zeros(3), torch.ones(3)))
    assert mean.shape == std.shape == (3,)
    assert normal_parameters(MultivariateNormal(torch.zeros(2), torch.eye(2))) is None


def colour_mixture(bits=8, components=3, channels=3, batch=2, dtype=torch.float64):
    likelihood = LogisticMixtureLikelihood(components, bits)
    numbers = likelihood.parameter_channels(channels)
    return likelihood(2 * torch.randn(batch, numbers, 1, 1, dtype=dtype))


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("scale", [-9.0, -3.0, 2.0])
def test_the_256_levels_of_a_discretised_logistic_mixture_have_mass_one(components, scale):
    parameters = torch.randn(1, 3 * components, 1, 1, dtype=torch.float64)
    parameters[:, 2 * components :] = scale  # log-scales; −9 is clamped to −7
    distribution = LogisticMixtureLikelihood(components)(parameters)
    levels = torch.arange(256, dtype=torch.float64).view(-1, 1, 1, 1) / 255
    torch.testing.assert_close(distribution.log_prob(levels).exp().sum(), torch.ones((), dtype=torch.float64))


def test_colours_have_mass_one_together_and_depend_on_each_other():
    """All 8³ colours of 3-bit pixels; the mass of a level of green given red is that of the formula."""
    distribution = colour_mixture(bits=3, components=2, batch=1)
    grid = torch.cartesian_prod(*[torch.arange(8, dtype=torch.float64) / 7] * 3).view(-1, 3, 1, 1)
    mass = distribution.log_prob(grid).exp()
    torch.testing.assert_close(mass.sum(), torch.ones((), dtype=torch.float64))
    table = mass.view(8, 8, 8)
    red, red_green = table.sum((1, 2)), table.sum(2)
    weight, mean = distribution.log_weight[0, :, 0, 0].exp(), distribution.component_mean[0, :, :, 0, 0]
    scale, a = distribution.log_scale[0, :, :, 0, 0].exp(), distribution.coefficient[0, :, :, 0, 0]

    def level_mass(level, mean, scale):
        edges = [(2 * (level + shift) / 7 - 1 - mean) / scale for shift in (-0.5, 0.5)]
        low = torch.zeros_like(mean) if level == 0 else edges[0].sigmoid()
        return (torch.ones_like(mean) if level == 7 else edges[1].sigmoid()) - low

    for r, g in ((0, 3), (4, 7), (7, 0)):
        first = weight * level_mass(r, mean[0], scale[0])
        torch.testing.assert_close(first.sum(), red[r])
        both = first * level_mass(g, mean[1] + a[0] * (2 * r / 7 - 1), scale[1])
        torch.testing.assert_close(both.sum(), red_green[r, g])


def test_a_logistic_mixture_draws_colours_as_often_as_their_mass_says():
    distribution = colour_mixture(bits=2, components=2, batch=1, dtype=torch.float32)
    grid = torch.cartesian_prod(*[torch.arange(4.0) / 3] * 3).view(-1, 3, 1, 1)
    expected = distribution.log_prob(grid).exp()
    draws = distribution.sample((40_000,))
    assert draws.shape == (40_000, 1, 3, 1, 1)
    number = ((3 * draws[:, 0, :, 0, 0]).round().long() * torch.tensor([16, 4, 1])).sum(1)
    counts = torch.bincount(number, minlength=64).double()
    error = (40_000 * expected * (1 - expected)).sqrt() + 1
    assert ((counts - 40_000 * expected).abs() < 5 * error).all()


def test_the_mean_of_a_narrow_logistic_mixture_is_that_of_its_draws():
    parameters = torch.zeros(1, 20, 4, 4)
    parameters[:, 2:8] = 0.5 * torch.rand(1, 6, 4, 4) - 0.25  # two components, means of three colours
    parameters[:, 8:14] = -4.0
    parameters[:, 14:] = torch.randn(1, 6, 4, 4)
    distribution = LogisticMixtureLikelihood(2)(parameters)
    torch.testing.assert_close(distribution.sample((20_000,)).mean(0), distribution.mean, rtol=0, atol=5e-3)


def test_logistic_mixture_keeps_precision_and_gradients_in_the_tails():
    parameters = torch.zeros(1, 3, 1, 1)
    parameters[:, 2] = -7.0
    parameters.requires_grad_()
    log_p = LogisticMixtureLikelihood(1)(parameters).log_prob(torch.full((1, 1, 1, 1), 0.8))
    assert -1000 < log_p.item() < -500 and torch.isfinite(torch.autograd.grad(log_p.sum(), parameters)[0]).all()


def test_a_logistic_mixture_refuses_shapes_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"parameters must be \[..., K·\(1 \+ 2C \+ C\(C − 1\)/2\), H, W\] with K = 10"
    ):
        LogisticMixtureLikelihood(10)(torch.zeros(1, 99, 2, 2))
    with pytest.raises(ValueError, match=r"x must be \[..., 3, 1, 1\], got shape \(2, 1, 1, 1\)"):
        colour_mixture().log_prob(torch.zeros(2, 1, 1, 1))
    with pytest.raises(ValueError, match="components must be ≥ 1 and bits 1 … 16, got 0 and 8"):
        LogisticMixtureLikelihood(0)


def test_pixel_normal_is_nvaes_on_the_scale_from_minus_one_to_one():
    parameters, x = torch.randn(2, 6, 4, 4), torch.rand(2, 3, 4, 4)
    likelihood = PixelNormalLikelihood()(parameters)
    mean, log_std = (soft_clamp(p) for p in parameters.chunk(2, dim=1))
    wide = Normal(mean, log_std.exp() + 0.01).log_prob(2 * x - 1).sum((1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(x), wide + 48 * math.log(2))
    torch.testing.assert_close(likelihood.mean, 0.5 * mean + 0.5)


def test_soft_clamp_is_the_identity_at_zero_and_bounded():
    x = torch.tensor([-1e6, -0.01, 0.0, 0.01, 3.0, 1e6], dtype=torch.float64)
    expected = [-5.0, -0.01, 0.0, 0.01, 5 * math.tanh(0.6), 5.0]
    torch.testing.assert_close(soft_clamp(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_residual_normal_adds_to_the_parameters_and_has_its_kl_in_closed_form():
    raw = [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
    base = SoftClampedNormal(raw[0], raw[1])
    posterior = base.residual(raw[2], raw[3])
    mean_p, std_p = soft_clamp(raw[0]), soft_clamp(raw[1]).exp() + 0.01
    mean_q, std_q = soft_clamp(raw[0] + raw[2]), soft_clamp(raw[1] + raw[3]).exp() + 0.01
    torch.testing.assert_close(posterior.mean, mean_q)
    shift, ratio = (mean_q - mean_p) / std_p, std_q / std_p  # NVAE, Eq. 2
    expected = 0.5 * (shift.square() + ratio.square() - ratio.square().log() - 1).sum(1)
    torch.testing.assert_close(kl_divergence(posterior, base), expected)
    torch.testing.assert_close(kl_divergence(base.residual(0 * raw[2], 0 * raw[3]), base), torch.zeros(4).double())
    assert base.expand((7, 4)).sample().shape == (7, 4, 3) and temper(base, 0.5).stddev.equal(0.5 * base.stddev)
