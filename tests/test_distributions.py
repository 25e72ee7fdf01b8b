import math

import pytest
import torch
from torch.distributions import Categorical, Gamma, Independent, MixtureSameFamily, MultivariateNormal, Normal

from ncpvae.distributions import (
    BernoulliLikelihood,
    DiagonalMixture,
    NormalLikelihood,
    diagonal_normal,
    normal_parameters,
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
