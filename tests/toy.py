"""A noise contrastive prior whose every quantity is known: base N(0, I), target N(mean, std² I)."""

import math

import torch
from torch import Tensor, nn

from ncpvae import NoiseContrastivePrior, Normal
from ncpvae.distributions import diagonal_normal

MEAN, STD, LOG_Z = 0.5, 0.6, 1.7


class ExactRatio(nn.Module):
    """log r = log N(z; mean, std²) − log N(z; 0, 1) + log Z, summed over the event."""

    def __init__(self, event_dims: int = 1, log_z: float = LOG_Z):
        super().__init__()
        self.event_dims, self.log_z = event_dims, log_z
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        mean = torch.as_tensor(MEAN).to(z)
        target = diagonal_normal(mean.expand(z.shape), torch.full_like(z, STD), self.event_dims)
        base = diagonal_normal(torch.zeros_like(z), torch.ones_like(z), self.event_dims)
        return target.log_prob(z) - base.log_prob(z) + self.log_z


def exact_prior(dim: int = 2) -> NoiseContrastivePrior:
    return NoiseContrastivePrior(Normal(dim), ExactRatio())


def expected_ess_fraction(dim: int) -> float:
    """1 / E_p[(q/p)²] for q = N(mean, std²), p = N(0, 1) in `dim` dimensions."""
    precision = 2 / STD**2 - 1  # of q²/p
    linear = 2 * MEAN / STD**2
    log_second_moment = -2 * math.log(STD) - MEAN**2 / STD**2 + linear**2 / (2 * precision) - 0.5 * math.log(precision)
    return math.exp(-dim * log_second_moment)


def target_log_prob(z: Tensor) -> Tensor:
    return diagonal_normal(torch.full_like(z, MEAN), torch.full_like(z, STD)).log_prob(z)
