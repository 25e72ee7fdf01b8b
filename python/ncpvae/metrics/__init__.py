"""Measures of models and priors: functions of tensors and distributions."""

from ..objectives import jensen_shannon_divergence
from .density_coverage import DensityCoverage, density_coverage
from .distances import Distance, frechet_distance, kernel_distance
from .features import FeatureClassifier, Features, InceptionFeatures, classification_accuracy, extract_features
from .likelihood import Likelihood, importance_weighted_nll
from .memorization import Memorization, memorization
from .neighbours import Neighbours, nearest_neighbours
from .weights import effective_sample_size

__all__ = [
    "DensityCoverage",
    "Distance",
    "FeatureClassifier",
    "Features",
    "InceptionFeatures",
    "Likelihood",
    "Memorization",
    "Neighbours",
    "classification_accuracy",
    "density_coverage",
    "effective_sample_size",
    "extract_features",
    "frechet_distance",
    "importance_weighted_nll",
    "jensen_shannon_divergence",
    "kernel_distance",
    "memorization",
    "nearest_neighbours",
]
