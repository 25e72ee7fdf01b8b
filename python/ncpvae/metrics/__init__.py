"""Measures of models and priors: functions of tensors and distributions."""

from ..objectives import jensen_shannon_divergence
from .likelihood import Likelihood, importance_weighted_nll
from .weights import effective_sample_size

__all__ = ["Likelihood", "effective_sample_size", "importance_weighted_nll", "jensen_shannon_divergence"]
