"""Noise contrastive priors and contrastive critics for variational autoencoders, on fused CPU and CUDA ops.

A prior is a base distribution times a learned reweighting factor, p_NCP(z) ∝ r(z) p(z); a binary classifier's
logit is log r. See `NoiseContrastivePrior`, `fit_ncp`, `SIR` and `Langevin`.
"""

from . import adapters, metrics, objectives, ops
from .classifiers import MLPClassifier, ResidualClassifier
from .critics import Critic, HybridCritic, NeuralCritic, SelfCritic
from .distributions import (
    BernoulliLikelihood,
    BinomialLikelihood,
    DiagonalMixture,
    LogisticMixtureLikelihood,
    NormalLikelihood,
    PixelNormalLikelihood,
    temper,
)
from .hierarchy import HierarchicalLoss
from .nvae import NVAE
from .objectives import VAELoss
from .pixelcnn import PixelCNNLikelihood
from .pretrained import Pretrained
from .priors import (
    GaussianMixture,
    HierarchicalNCP,
    LogNormalizer,
    NoiseContrastive,
    NoiseContrastivePrior,
    Normal,
    group_classifiers,
)
from .samplers import SIR, Diagnostics, Langevin, SampleResult
from .sharding import sample_blocks, sample_sharded
from .text_vae import TextEncoder, TextLikelihood
from .train import (
    CheckpointError,
    Execution,
    NCPResult,
    TrainingDiverged,
    TrainingInterrupted,
    TrainResult,
    fit_hierarchical_ncp,
    fit_hierarchical_vae,
    fit_ncp,
    fit_vae,
)
from .vae import (
    VAE,
    ConvDecoder,
    ConvEncoder,
    GaussianEncoder,
    MLPDecoder,
    MLPEncoder,
    StackedConvDecoder,
    StackedConvEncoder,
    VAEOutput,
)

__version__ = "0.1.0"

__all__ = [
    "NVAE",
    "SIR",
    "VAE",
    "BernoulliLikelihood",
    "BinomialLikelihood",
    "CheckpointError",
    "ConvDecoder",
    "ConvEncoder",
    "Critic",
    "Diagnostics",
    "DiagonalMixture",
    "Execution",
    "GaussianEncoder",
    "GaussianMixture",
    "HierarchicalLoss",
    "HierarchicalNCP",
    "HybridCritic",
    "Langevin",
    "LogNormalizer",
    "LogisticMixtureLikelihood",
    "MLPClassifier",
    "MLPDecoder",
    "MLPEncoder",
    "NCPResult",
    "NeuralCritic",
    "NoiseContrastive",
    "NoiseContrastivePrior",
    "Normal",
    "NormalLikelihood",
    "PixelCNNLikelihood",
    "PixelNormalLikelihood",
    "Pretrained",
    "ResidualClassifier",
    "SampleResult",
    "SelfCritic",
    "StackedConvDecoder",
    "StackedConvEncoder",
    "TextEncoder",
    "TextLikelihood",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "VAELoss",
    "VAEOutput",
    "adapters",
    "fit_hierarchical_ncp",
    "fit_hierarchical_vae",
    "fit_ncp",
    "fit_vae",
    "group_classifiers",
    "metrics",
    "objectives",
    "ops",
    "sample_blocks",
    "sample_sharded",
    "temper",
]
