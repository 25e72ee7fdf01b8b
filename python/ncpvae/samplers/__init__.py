"""Samplers of a reweighted distribution p(z) ∝ r(z) · base(z), one per file.

A sampler needs a distribution with a `base`, `log_ratio(z)`, `batch_shape` and `event_shape`, and nothing else.
Letters: B rows (independent sets of proposals), M proposals per row, n draws kept per row, T steps.
"""

from .base import Diagnostics, ReweightedDistribution, Sampler, SampleResult
from .langevin import Langevin, gradient_of
from .proposals import TILE, BaseDraws, base_draws
from .sir import SIR, gather_states, skip_proposals

__all__ = [
    "SIR",
    "TILE",
    "BaseDraws",
    "Diagnostics",
    "Langevin",
    "ReweightedDistribution",
    "SampleResult",
    "Sampler",
    "base_draws",
    "gather_states",
    "gradient_of",
    "skip_proposals",
]
