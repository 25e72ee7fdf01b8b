"""KL divergence of the posteriors from a Normal prior, coordinate by coordinate.

Letters: N examples, D coordinates of z.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from ..distributions import normal_parameters
from ._common import in_float64, mean_and_error
from .posteriors import Posteriors


@dataclass(frozen=True)
class KLPerDimension:
    """Mean KL(q(z_d|x) ‖ p(z_d)) over the data, nats.

    Attributes:
        per_dimension: [D], or of z's shape, float64; near 0 in a coordinate that has collapsed to the prior.
        total: their sum, the KL term of the ELBO in nats per example.
        standard_error: of the total as a mean over examples.
        protocol: how it was computed.
    """

    per_dimension: Tensor = field(repr=False)
    total: float
    standard_error: float
    protocol: str


@torch.no_grad()
def kl_per_dimension(posteriors: Posteriors, prior: Distribution | None = None) -> KLPerDimension:
    """KL(q(z_d|x) ‖ p(z_d)) in closed form, the mean over the data for each coordinate.

    Args:
        posteriors: q(z|x), by `collect_posteriors`.
        prior: Normal with independent coordinates over z; N(0, I) by default.

    Raises:
        TypeError: for another prior, whose KL has no closed form or no parts: `mutual_information` with
            `prior_log_prob` estimates the sum.
    """
    owner = "kl_per_dimension"
    if not isinstance(posteriors, Posteriors):
        raise TypeError(
            f"{owner}: posteriors must be Posteriors, as collect_posteriors gives them, got {type(posteriors).__name__}"
        )
    mean, log_std = in_float64(posteriors.mean), in_float64(posteriors.log_std)
    p = _parameters(owner, prior, mean)
    posterior = Normal(mean, log_std.exp(), validate_args=False)
    kl = kl_divergence(posterior, Normal(*p, validate_args=False))  # [N, D]
    total, error = mean_and_error(kl.flatten(1).sum(1))
    name = "N(0, I)" if prior is None else "the Normal prior"
    return KLPerDimension(kl.mean(0), total, error, f"closed form, mean over {len(mean)} examples, from {name}")


def _parameters(owner: str, prior: Distribution | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The prior's mean and standard deviation, [D], as float64 beside z [N, D]."""
    if prior is None:
        return torch.zeros_like(like[0]), torch.ones_like(like[0])
    parameters = normal_parameters(prior)
    if parameters is None:
        raise TypeError(
            f"{owner}: prior must be a Normal with independent coordinates, got {type(prior).__name__}; "
            "mutual_information with prior_log_prob estimates the KL from any other"
        )
    mean, std = (in_float64(value).to(like.device) for value in parameters)
    if mean.shape != like.shape[1:]:
        raise ValueError(f"{owner}: prior must be over z of shape {tuple(like.shape[1:])}, got {tuple(mean.shape)}")
    return mean, std
