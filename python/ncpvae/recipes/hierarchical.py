"""Recipes for NVAE with a noise contrastive prior for each group of latent variables."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..data import binarize, quantize, random_flip, scale
from ..distributions import BernoulliLikelihood, LogisticMixtureLikelihood, PixelNormalLikelihood
from ..hierarchy import HierarchicalLoss, KLWarmup
from ..nvae import NVAE
from ..priors import group_classifiers
from ..train import WarmupCosine, adamax
from ..train.engine import Schedule
from ..train.execution import check_count, check_positive
from .base import ClassifierTraining, Recipe

Pixels = Literal["bernoulli", "normal", "logistic-mixture"]


@dataclass(frozen=True)
class GroupClassifiers(ClassifierTraining):
    """The classifiers of all groups, trained at once (NCP-VAE, section 3.4), with the networks of its Figure 5."""

    channels: int = 64
    """of a classifier's first blocks; the paper does not state them"""
    blocks: int = 3
    """residual blocks before each halving"""
    min_jsd: float = 0.0
    """nats; a group whose held-out divergence is below this is flat, and its classifier is not asked"""
    shard_groups: bool = False
    """several processes share out the groups instead of the rows of a batch"""
    log_z_samples: int = 1000
    """walks for log Z, as in the paper"""
    log_z_repeats: int = 10
    """independent estimates, from which its error is seen"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "blocks", "log_z_samples", "log_z_repeats"):
            check_count(f"prior.{name}", getattr(self, name))
        if math.isnan(self.min_jsd):
            raise ValueError(f"prior.min_jsd must be a number, got {self.min_jsd!r}")


@dataclass(frozen=True)
class HierarchicalRecipe(Recipe):
    """An experiment with NVAE. What its fields are set to by default is of the published MNIST model."""

    likelihood: Pixels = "bernoulli"
    """of binarised pixels, of colours, or of levels"""
    bits: int = 8
    """of the colours"""
    flip: bool = False
    """mirror training images at random"""
    channels: int = 32
    """of the first feature map"""
    groups_per_scale: tuple[int, ...] = (5, 10)
    """numbers of groups, from the smallest feature maps on"""
    latent_channels: int = 20
    """of every z_k"""
    halvings: int = 2
    """of the image before the ladder"""
    preprocess_cells: int = 3
    """in each block before the ladder"""
    postprocess_cells: int = 3
    """in each block after the ladder"""
    encoder_cells: int = 2
    """for each group"""
    decoder_cells: int = 2
    """for each group"""
    flows: int = 0
    """pairs of inverse autoregressive cells on each posterior"""
    recompute: bool = False
    """activations within cells in the backward pass, to save memory"""
    lr: float = 1e-2
    """of Adamax, which NVAE is trained by"""
    min_lr: float = 1e-4
    """at the end of the cosine"""
    warmup_steps: int = 0
    """in which the learning rate rises"""
    weight_decay: float = 3e-4
    """L2, in Adamax's gradient"""
    kl_warmup: float = 0.3
    """portion of the steps over which β rises"""
    balance: bool = True
    """weight the groups' KLs meanwhile, so that none is given up"""
    regularization: float = 1e-2
    """λ, on spectral norms and BatchNorm's scales; 0 for none"""
    initial_regularization: float | None = None
    """λ at the start, from which it changes while β rises"""
    prior: GroupClassifiers = field(default_factory=GroupClassifiers)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("min_lr", self.min_lr)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be ≤ lr, {self.lr:g}, got {self.min_lr:g}")
        check_count("warmup_steps", self.warmup_steps, minimum=0, below=self.steps)
        check_count("bits", self.bits, below=9)
        if not 0.0 < self.kl_warmup <= 1.0:
            raise ValueError(f"kl_warmup must be in (0, 1], got {self.kl_warmup!r}")
        for name in ("weight_decay", "regularization", "initial_regularization"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and ≥ 0, got {value!r}")

    def vae(self, mean: Tensor | None = None) -> NVAE:
        likelihoods = {
            "bernoulli": BernoulliLikelihood(),
            "normal": PixelNormalLikelihood(),
            "logistic-mixture": LogisticMixtureLikelihood(bits=self.bits),
        }
        model = NVAE(
            self.shape,  # type: ignore[arg-type]
            likelihoods[self.likelihood],
            channels=self.channels,
            groups_per_scale=self.groups_per_scale,
            latent_channels=self.latent_channels,
            halvings=self.halvings,
            preprocess_cells=self.preprocess_cells,
            postprocess_cells=self.postprocess_cells,
            encoder_cells=self.encoder_cells,
            decoder_cells=self.decoder_cells,
            flows=self.flows,
        )
        model.recompute = self.recompute
        return model

    def objective(self, vae: nn.Module) -> nn.Module:
        return HierarchicalLoss(vae, **self._loss())

    def classifiers(self, vae: NVAE) -> list[nn.Module]:
        return group_classifiers(vae, self.prior.channels, self.prior.blocks)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        if self.likelihood == "bernoulli":
            return binarize(x)
        return self._scaled(random_flip(x) if training and self.flip else x)

    def originals(self, x: Tensor) -> Tensor:
        return super().originals(x) if self.likelihood == "bernoulli" else self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return scale(x if self.bits == 8 else quantize(x, self.bits), 2**self.bits - 1)

    def fitting(self) -> dict[str, Any]:
        return {
            **super().fitting(),
            "optimizer": adamax(self.weight_decay, self.lr),
            "kl_weight": KLWarmup(self.steps, self.kl_warmup),
            **self._loss(),
        }

    def lr_schedule(self) -> Schedule:
        minimum = self.min_lr / self.lr if self.schedule == "cosine" else 1.0
        return WarmupCosine(self.steps, self.warmup_steps, minimum)

    def _loss(self) -> dict[str, Any]:
        initial = self.initial_regularization
        return {
            "balance": self.balance,
            "regularization": self.regularization,
            "initial_regularization": initial,
        }
