"""What torch.distributions lacks here: likelihood heads, fast diagonal mixtures, and tempering.

A *likelihood* is a module that turns a decoder's output into the distribution p(x|z); a decoder that returns
a distribution itself needs none.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    constraints,
)

from . import ops
from .pretrained import Pretrained


def diagonal_normal(mean: Tensor, std: Tensor, event_dims: int = 1) -> Independent:
    """Normal with independent coordinates over the last `event_dims` dimensions of `mean`."""
    return Independent(Normal(mean, std, validate_args=False), event_dims, validate_args=False)


class BernoulliLikelihood(Pretrained):
    """p(x|z) for binary x: the decoder's output are logits, one per element of x."""

    def forward(self, logits: Tensor, event_dims: int) -> Independent:
        return Independent(Bernoulli(logits=logits, validate_args=False), event_dims, validate_args=False)


class BinomialLikelihood(Pretrained):
    """p(x|z) for counts x in 0 … total_count: the decoder's output are logits, one per element of x."""

    def __init__(self, total_count: int):
        super().__init__()
        if total_count < 1:
            raise ValueError(f"BinomialLikelihood: total_count must be ≥ 1, got {total_count}")
        self.total_count = total_count

    def forward(self, logits: Tensor, event_dims: int) -> Independent:
        return Independent(Binomial(self.total_count, logits=logits, validate_args=False), event_dims, False)


class NormalLikelihood(Pretrained):
    """p(x|z) = N(decoder output, σ²), one σ for all elements, fixed or learned.

    Args:
        std: σ > 0, in units of x; the initial value where it is learned.
        learn_std: train log σ with the VAE, the maximum-likelihood choice of Rybkin, Daniilidis and Levine,
            "Simple and effective VAE training with calibrated decoders", 2021.
    """

    def __init__(self, std: float = 1.0, learn_std: bool = False):
        super().__init__()
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"NormalLikelihood: std must be finite and > 0, got {std}")
        log_std = torch.tensor(math.log(std))
        if learn_std:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def forward(self, mean: Tensor, event_dims: int) -> Independent:
        return diagonal_normal(mean, self.log_std.exp().expand(mean.shape), event_dims)


class DiagonalMixture(Distribution):
    """Mixture of K Gaussians with diagonal covariance, its density computed by `ops.gaussian_logsumexp`.

    The N×K×D broadcast that `MixtureSameFamily` makes is never held.

    Args:
        log_weight: [K], nats; normalised here.
        mean, std: [K, D].
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    def __init__(self, log_weight: Tensor, mean: Tensor, std: Tensor):
        if mean.dim() != 2 or std.shape != mean.shape or log_weight.shape != mean.shape[:1]:
            raise ValueError(
                "DiagonalMixture: log_weight must be [K] and mean and std [K, D], got shapes "
                f"{tuple(log_weight.shape)}, {tuple(mean.shape)}, {tuple(std.shape)}"
            )
        self.log_weight, self.component_mean, self.component_std = log_weight.log_softmax(0), mean, std
        super().__init__(event_shape=mean.shape[1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        log_p = ops.gaussian_logsumexp(flat, self.component_mean, self.component_std.log(), self.log_weight)
        return log_p.view(value.shape[:-1])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            k = Categorical(logits=self.log_weight, validate_args=False).sample(torch.Size(sample_shape))
            return self.component_mean[k] + self.component_std[k] * torch.randn_like(self.component_mean[k])

    @property
    def mean(self) -> Tensor:
        return self.log_weight.exp() @ self.component_mean

    @property
    def variance(self) -> Tensor:
        second_moment = self.component_std.square() + self.component_mean.square()
        return self.log_weight.exp() @ second_moment - self.mean.square()


def temper(distribution: Distribution, temperature: float) -> Distribution:
    """The distribution with its standard deviations multiplied by `temperature`, means unchanged.

    Defined for Normal, MultivariateNormal, mixtures of them, and `Independent` around these: the scaling of
    a prior's σ that NCP-VAE section 5.2 uses for pictures. 1 returns the distribution itself.
    """
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temper: temperature must be a finite number > 0, got {temperature!r}")
    if temperature == 1.0:
        return distribution
    if isinstance(distribution, Independent):
        base = temper(distribution.base_dist, temperature)
        return Independent(base, distribution.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(distribution, Normal):
        return Normal(distribution.loc, distribution.scale * temperature, validate_args=False)
    if isinstance(distribution, MultivariateNormal):
        scale = distribution.scale_tril * temperature
        return MultivariateNormal(distribution.loc, scale_tril=scale, validate_args=False)
    if isinstance(distribution, DiagonalMixture):
        scaled = distribution.component_std * temperature
        return DiagonalMixture(distribution.log_weight, distribution.component_mean, scaled)
    if isinstance(distribution, MixtureSameFamily):
        components = temper(distribution.component_distribution, temperature)
        return MixtureSameFamily(distribution.mixture_distribution, components, validate_args=False)
    raise TypeError(
        "temper: distribution must be a Normal, a MultivariateNormal or a mixture of them to be scaled, "
        f"got {type(distribution).__name__}"
    )


def normal_parameters(distribution: Distribution) -> tuple[Tensor, Tensor] | None:
    """(mean, std) of a Normal with independent coordinates; None for any other distribution."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return (distribution.loc, distribution.scale) if isinstance(distribution, Normal) else None
