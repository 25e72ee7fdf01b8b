"""Measures of models and priors: functions of tensors and distributions."""

from ..objectives import jensen_shannon_divergence
from .active_units import ActiveUnits, active_units, active_units_by_sampled_std
from .decoder_use import DecoderUse, decoder_use
from .density_coverage import DensityCoverage, density_coverage
from .distances import Distance, frechet_distance, kernel_distance
from .features import FeatureClassifier, Features, InceptionFeatures, classification_accuracy, extract_features
from .hierarchical import (
    ConditionalNormalizers,
    GroupKL,
    HierarchicalNormalizer,
    conditional_log_normalizers,
    hierarchical_log_normalizer,
    hierarchical_nll,
    kl_per_group,
)
from .info_nce import InfoNCEBound, info_nce_bound
from .kl import KLPerDimension, kl_per_dimension
from .likelihood import Likelihood, importance_weighted_nll
from .memorization import Memorization, memorization
from .mutual_information import MutualInformation, minibatch_mutual_information, mutual_information
from .neighbours import Neighbours, nearest_neighbours
from .perplexity import Perplexity, perplexity
from .posteriors import Posteriors, collect_posteriors
from .weights import effective_sample_size

__all__ = [
    "ActiveUnits",
    "ConditionalNormalizers",
    "DecoderUse",
    "DensityCoverage",
    "Distance",
    "FeatureClassifier",
    "Features",
    "GroupKL",
    "HierarchicalNormalizer",
    "InceptionFeatures",
    "InfoNCEBound",
    "KLPerDimension",
    "Likelihood",
    "Memorization",
    "MutualInformation",
    "Neighbours",
    "Perplexity",
    "Posteriors",
    "active_units",
    "active_units_by_sampled_std",
    "classification_accuracy",
    "collect_posteriors",
    "conditional_log_normalizers",
    "decoder_use",
    "density_coverage",
    "effective_sample_size",
    "extract_features",
    "frechet_distance",
    "hierarchical_log_normalizer",
    "hierarchical_nll",
    "importance_weighted_nll",
    "info_nce_bound",
    "jensen_shannon_divergence",
    "kernel_distance",
    "kl_per_dimension",
    "kl_per_group",
    "memorization",
    "minibatch_mutual_information",
    "mutual_information",
    "nearest_neighbours",
    "perplexity",
]
