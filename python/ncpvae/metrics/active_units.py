"""Active units: how many coordinates of the code depend on the data.

Letters: N examples, D coordinates of z.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _distributed, _random
from ._common import check_seed, in_float64
from .posteriors import Posteriors


@dataclass(frozen=True)
class ActiveUnits:
    """Coordinates of z whose variance over the data exceeds a threshold.

    Attributes:
        count: how many.
        variances: [D], or of z's shape, over the data, float64, with divisor N − 1.
        threshold: what they were compared with, by >.
        protocol: how it was computed, and the variance of what.
    """

    count: int
    variances: Tensor = field(repr=False)
    threshold: float
    protocol: str


@torch.no_grad()
def active_units(posteriors: Posteriors, threshold: float = 0.01) -> ActiveUnits:
    """The coordinates whose posterior *mean* varies over the data: Var_x(E_q(z|x)[z_d]) > threshold.

    Args:
        posteriors: of N ≥ 2 examples, by `collect_posteriors`.
        threshold: on the variance, in squared units of z.

    Source: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, section 5.
    """
    _check("active_units", posteriors, "threshold", threshold)
    variances = in_float64(posteriors.mean).var(0)
    protocol = f"variance over {len(posteriors)} examples of the posterior mean > {threshold:g}"
    return ActiveUnits(int((variances > threshold).sum()), variances, threshold, protocol)


@torch.no_grad()
def active_units_by_sampled_std(
    posteriors: Posteriors, std_threshold: float = 0.1, seed: int | None = 0
) -> ActiveUnits:
    """The coordinates whose *sampled* z, one draw per example, has a standard deviation above std_threshold.

    Only to compare with figures computed so: they do not measure collapse, since a posterior that ignores x and equals
    the prior N(0, 1) counts as active in every coordinate.

    Args:
        posteriors: of N ≥ 2 examples.
        std_threshold: the result's `threshold` is its square.
        seed: of the draws, torch's global generators being left as they were; None uses those.
    """
    _check("active_units_by_sampled_std", posteriors, "std_threshold", std_threshold)
    check_seed("active_units_by_sampled_std", seed, distributed=False)
    mean, log_std = posteriors.mean, posteriors.log_std
    with _random.scoped(None if seed is None else _distributed.block_seed(seed, 0)):
        noise = torch.randn(mean.shape, dtype=mean.dtype).to(mean.device)
    variances = in_float64(mean + log_std.exp() * noise).var(0)
    count = int((variances > std_threshold**2).sum())
    protocol = f"standard deviation over {len(mean)} examples of one sampled z each > {std_threshold:g}, seed {seed}"
    return ActiveUnits(count, variances, std_threshold**2, protocol)


def _check(owner: str, posteriors: object, name: str, threshold: float) -> None:
    if not isinstance(posteriors, Posteriors):
        raise TypeError(
            f"{owner}: posteriors must be Posteriors, as collect_posteriors gives them, got {type(posteriors).__name__}"
        )
    if len(posteriors) < 2:
        raise ValueError(f"{owner}: posteriors must be of ≥ 2 examples for a variance, got {len(posteriors)}")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"{owner}: {name} must be finite and ≥ 0, got {threshold}")
