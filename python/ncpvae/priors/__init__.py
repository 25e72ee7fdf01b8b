"""Priors: modules whose `forward(context=None)` returns a torch Distribution over z."""

from .gaussian_mixture import GaussianMixture
from .hierarchical import HierarchicalDraw, HierarchicalNCP, Reweighted, group_classifiers
from .noise_contrastive import LogNormalizer, NoiseContrastive, NoiseContrastivePrior
from .normal import Normal

__all__ = [
    "GaussianMixture",
    "HierarchicalDraw",
    "HierarchicalNCP",
    "LogNormalizer",
    "NoiseContrastive",
    "NoiseContrastivePrior",
    "Normal",
    "Reweighted",
    "group_classifiers",
]
