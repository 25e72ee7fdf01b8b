import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncpvae import VAE, MLPDecoder, MLPEncoder, Normal, NormalLikelihood, objectives
from ncpvae.distributions import diagonal_normal
from ncpvae.priors import GaussianMixture


def test_nce_is_the_sum_of_two_cross_entropies():
    q, p = torch.randn(50, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    expected = -torch.sigmoid(q).log().mean() - (1 - torch.sigmoid(p)).log().mean()
    torch.testing.assert_close(objectives.nce(q, p), expected)


def test_nce_of_an_ignorant_classifier_is_two_log_two():
    zero = torch.zeros(3)
    assert objectives.nce(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert objectives.jensen_shannon_divergence(2 * math.log(2)) == pytest.approx(0.0)
    assert objectives.jensen_shannon_divergence(0.0) == pytest.approx(math.log(2))


def test_label_smoothing_is_cross_entropy_against_soft_targets():
    q, p = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    soft = F.binary_cross_entropy_with_logits(q, torch.full_like(q, 0.9))
    soft = soft + F.binary_cross_entropy_with_logits(p, torch.full_like(p, 0.1))
    torch.testing.assert_close(objectives.nce(q, p, label_smoothing=0.2), soft)
    with pytest.raises(ValueError, match=r"nce: label_smoothing must be in \[0, 1\), got 1.5"):
        objectives.nce(q, p, label_smoothing=1.5)


def test_nce_stays_finite_at_extreme_logits():
    big = torch.tensor([1e4, -1e4])
    assert torch.isfinite(objectives.nce(big, big))


def test_accuracy_counts_both_sides():
    assert objectives.nce_accuracy(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 3.0])).item() == 0.75


# --- against posterior collapse -------------------------------------------------------------------------------------


def test_linear_annealing_rises_to_one_and_stays():
    beta = objectives.LinearAnnealing(10)
    assert [beta(step) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert objectives.LinearAnnealing(10, final=0.4)(99) == objectives.CyclicalAnnealing(10, final=0.4)(99) == 0.4
    with pytest.raises(ValueError, match=r"LinearAnnealing: steps must be ≥ 1, got 0"):
        objectives.LinearAnnealing(0)


def test_cyclical_annealing_rises_in_the_first_part_of_each_cycle():
    beta = objectives.CyclicalAnnealing(400, cycles=4, ratio=0.5)
    assert [beta(step) for step in (0, 25, 50, 99, 100, 125, 350, 399, 400, 10_000)] == [
        0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0,
    ]  # fmt: skip
    for options in ({"cycles": 0}, {"cycles": 401}, {"ratio": 0.0}, {"ratio": 1.1}):
        with pytest.raises(ValueError, match=r"CyclicalAnnealing: (cycles|ratio) must be"):
            objectives.CyclicalAnnealing(400, **options)


def test_kl_per_dimension_sums_to_the_kl():
    posterior = diagonal_normal(torch.randn(7, 3), torch.rand(7, 3) + 0.1)
    prior = Normal(3)()
    parts = objectives.kl_per_dimension(posterior, prior)
    assert parts.shape == (7, 3)
    torch.testing.assert_close(parts.sum(1), torch.distributions.kl_divergence(posterior, prior))
    with pytest.raises(TypeError, match=r"kl_per_dimension: prior must have independent coordinates"):
        objectives.kl_per_dimension(posterior, GaussianMixture.fit(torch.randn(50, 3), 2)())


def test_free_bits_cost_nothing_below_the_limit():
    mean = torch.tensor([[0.0, 2.0], [0.0, 2.0]], requires_grad=True)  # KL 0 and 2 nats
    posterior, prior = diagonal_normal(mean, torch.ones(2, 2)), Normal(2)()
    kl = torch.distributions.kl_divergence(posterior, prior)
    assert objectives.FreeBits(1.5)(posterior, prior, kl).item() == pytest.approx(2.0)
    assert objectives.FreeBits(3.0)(posterior, prior, kl).item() == pytest.approx(3.0)
    assert objectives.FreeBits(0.5, per="dimension")(posterior, prior, kl).item() == pytest.approx(2.5)
    (gradient,) = torch.autograd.grad(objectives.FreeBits(3.0)(posterior, prior, kl), mean)
    assert not gradient.any()
    for options, message in (({"nats": 0.0}, "nats must be"), ({"nats": 1.0, "per": "group"}, "per must be")):
        with pytest.raises(ValueError, match=message):
            objectives.FreeBits(**options)


def test_the_loss_with_free_bits_is_flat_in_a_small_kl():
    vae = VAE(MLPEncoder(4, [8], 2), MLPDecoder(2, [8], (4,)), NormalLikelihood(), Normal(2))
    x = torch.randn(6, 4)
    loss = objectives.VAELoss(vae, free_bits=objectives.FreeBits(50.0))
    terms = loss(x, 0.5)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.5 * 50.0)
    for arguments, error in (
        ((vae, "self"), TypeError),
        ((vae, None, -1.0), ValueError),
        ((nn.Linear(2, 2),), TypeError),
    ):
        with pytest.raises(error, match=r"VAELoss: (critic|critic_weight|vae) must be"):
            objectives.VAELoss(*arguments)
