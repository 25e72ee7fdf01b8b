import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from ncpvae import metrics, ops
from ncpvae.distributions import diagonal_normal


class LinearGaussian:
    """x = W z + σε with z ~ N(0, I): p(x) and p(z|x) in closed form. The encoder is deliberately imperfect."""

    def __init__(self, sigma=0.5, blur=1.3):
        torch.manual_seed(0)
        self.W, self.sigma, self.blur = torch.randn(4, 2), sigma, blur

    def marginal(self):
        return MultivariateNormal(torch.zeros(4), self.W @ self.W.T + self.sigma**2 * torch.eye(4))

    def encode(self, x):
        covariance = torch.linalg.inv(torch.eye(2) + self.W.T @ self.W / self.sigma**2)
        mean = x @ self.W @ covariance / self.sigma**2
        return diagonal_normal(mean, (self.blur * covariance.diagonal().sqrt()).expand(mean.shape))

    def decode(self, z):
        return Independent(Normal(z @ self.W.T, self.sigma), 1)


PRIOR = diagonal_normal(torch.zeros(2), torch.ones(2))


def test_nll_converges_to_the_closed_form():
    model = LinearGaussian()
    x = model.marginal().sample((200,))
    result = metrics.importance_weighted_nll(x, model.encode, model.decode, {"p": PRIOR.log_prob}, 5000)["p"]
    truth = -model.marginal().log_prob(x)
    torch.testing.assert_close(result.per_example, truth, atol=0.15, rtol=0)
    assert result.nll == pytest.approx(truth.mean().item(), abs=0.01)
    assert result.standard_error == pytest.approx(truth.std().item() / math.sqrt(200), rel=0.05)


def test_few_samples_give_a_looser_bound():
    model = LinearGaussian()
    x = model.marginal().sample((500,))
    nll = [
        metrics.importance_weighted_nll(x, model.encode, model.decode, {"p": PRIOR.log_prob}, S)["p"].nll
        for S in (1, 10, 1000)
    ]
    assert nll[0] > nll[1] > nll[2]


def test_chunks_and_draws_do_not_mix_examples():
    """The result does not depend, beyond sampling, on how rows are grouped; each example keeps its place."""
    model = LinearGaussian()
    x = model.marginal().sample((37,))
    arguments = (x, model.encode, model.decode, {"p": PRIOR.log_prob}, 3000)
    small, large = (metrics.importance_weighted_nll(*arguments, max_rows=r)["p"].per_example for r in (700, 100_000))
    torch.testing.assert_close(small, large, atol=0.25, rtol=0)
    assert torch.corrcoef(torch.stack([small, large]))[0, 1] > 0.99


def test_all_priors_see_the_same_draws():
    model = LinearGaussian()
    x = model.marginal().sample((20,))
    both = metrics.importance_weighted_nll(
        x, model.encode, model.decode, {"a": PRIOR.log_prob, "b": lambda z: PRIOR.log_prob(z) + 2.5}, 7
    )
    torch.testing.assert_close(both["a"].per_example - both["b"].per_example, torch.full((20,), 2.5))


def test_transform_is_applied_once_and_seed_governs():
    model, calls = LinearGaussian(), []
    x = torch.randint(0, 5, (10, 4), dtype=torch.uint8)

    def transform(chunk):
        calls.append(len(chunk))
        return chunk.float()

    arguments = {"num_samples": 5, "transform": transform, "seed": 3}
    first, again = (
        metrics.importance_weighted_nll(x, model.encode, model.decode, {"p": PRIOR.log_prob}, **arguments)["p"]
        for _ in range(2)
    )
    assert sum(calls) == 20
    assert torch.equal(first.per_example, again.per_example)
    assert "5 draws per example, 10 examples" in first.protocol


@pytest.mark.parametrize("at_once", [1, 7, 30])
def test_the_decoder_is_given_few_rows_at_a_time(at_once, monkeypatch):
    model, x, rows = LinearGaussian(), torch.randn(13, 4), []

    def decode(z):
        rows.append(z.shape[0] * z.shape[1])
        return model.decode(z)

    arguments = {"num_samples": 5, "max_rows": 50, "seed": 3}
    expected = metrics.importance_weighted_nll(x, model.encode, model.decode, {"p": PRIOR.log_prob}, **arguments)["p"]
    monkeypatch.setattr("ncpvae.metrics.likelihood.DECODED_AT_ONCE", at_once)
    found = metrics.importance_weighted_nll(x, model.encode, decode, {"p": PRIOR.log_prob}, **arguments)["p"]
    torch.testing.assert_close(found.per_example, expected.per_example)
    assert max(rows) <= at_once and sum(rows) == 5 * 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(0, 4)}, r"data must be \[N, …\] with N ≥ 1"),
        ({"data": torch.full((2, 4), math.nan)}, "data must be finite"),
        ({"encode": lambda x: x}, "encode must return q"),
        (
            {"num_samples": 2, "decode": lambda z: Independent(Normal(torch.zeros(3, 4), 1.0), 1)},
            r"decode must return p\(x\|z\) with batch \(2, 3\), got",
        ),
        ({"num_samples": 0}, "num_samples and max_rows must be ≥ 1, got 0"),
        (
            {"num_samples": 1, "log_priors": {"p": lambda z: PRIOR.base_dist.log_prob(z)}},
            r"log_priors\['p'\] must return log-densities of shape \(1, 3\), one for each z, got \(1, 3, 2\)",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    model = LinearGaussian()
    arguments = {"data": torch.zeros(3, 4), "encode": model.encode, "decode": model.decode, "log_priors": {}} | change
    with pytest.raises(ValueError, match=message):
        metrics.importance_weighted_nll(**arguments)


def test_effective_sample_size_is_the_ops():
    log_weights = torch.randn(3, 500, dtype=torch.float64) * 3
    torch.testing.assert_close(
        metrics.effective_sample_size(log_weights), ops.sir_resample(log_weights, ops.draw_seed())[2]
    )
    assert metrics.effective_sample_size(torch.zeros(7)).item() == pytest.approx(7)
    assert metrics.effective_sample_size(torch.full((7,), -math.inf)).item() == 0
