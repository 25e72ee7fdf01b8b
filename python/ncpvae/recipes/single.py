"""Recipes for VAEs with one group of latent variables, which may have a contrastive critic."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..critics import Critic, HybridCritic, SelfCritic
from ..objectives import CyclicalAnnealing, FreeBits, LinearAnnealing, VAELoss
from ..train import Aggressive, adamw
from ..train.execution import check_count, check_positive
from ..vae import VAE
from .base import ClassifierTraining, Recipe, check_choices, initialised


@dataclass(frozen=True)
class CriticSettings:
    """The contrastive critic of stage one (Menon et al., 2022)."""

    kind: Literal["none", "self", "neural", "hybrid"] = "none"
    """log q(z|x) itself, heads of its own, or heads on the encoder's first layers"""
    weight: float = 20.0
    """λ, on the mean of c beside the mean of the ELBO"""
    symmetric: bool = False
    """the mean of both directions instead of the paper's one"""
    scale: Literal["exp", "linear"] = "exp"
    """of the cosine: the exponential of a parameter, or the parameter"""
    share: int = 1
    """layers of the encoder that a hybrid critic shares"""
    hidden: int = 128
    """width of the heads' hidden layers"""
    width: int = 64
    """in which scores are taken"""

    def __post_init__(self) -> None:
        check_choices(self, "critic.")
        check_positive("critic.weight", self.weight)
        for name in ("hidden", "width"):
            check_count(f"critic.{name}", getattr(self, name))
        check_count("critic.share", self.share, minimum=0)


@dataclass(frozen=True)
class Remedies:
    """What else there is against posterior collapse; all of it off by default."""

    annealing: Literal["none", "linear", "cyclical"] = "none"
    """of β, from 0 to 1"""
    annealing_steps: int | None = None
    """optimiser steps of it; by default a third of the run for linear, all of it for cyclical annealing"""
    cycles: int = 4
    """of cyclical annealing, β rising over half of each"""
    free_bits: float | None = None
    """nats of the KL that cost nothing"""
    free_bits_per: Literal["total", "dimension"] = "total"
    """of the whole KL, or of each coordinate's"""
    min_kl: float = 0.0
    """nats that the posterior's σ is bound to cost (δ-VAE)"""
    aggressive_steps: int = 0
    """optimiser steps in the first of which the encoder is trained for itself"""
    inner_steps: int = 10
    """of the encoder alone for each of both, in aggressive training"""

    def __post_init__(self) -> None:
        check_choices(self, "remedies.")
        for name, least in (("annealing_steps", 1), ("cycles", 1), ("aggressive_steps", 0), ("inner_steps", 1)):
            if getattr(self, name) is not None:
                check_count(f"remedies.{name}", getattr(self, name), minimum=least)
        if self.free_bits is not None:
            check_positive("remedies.free_bits", self.free_bits)
        if not 0.0 <= self.min_kl < math.inf:
            raise ValueError(f"remedies.min_kl must be finite and ≥ 0, got {self.min_kl!r}")

    def kl_weight(self, steps: int, final: float) -> Callable[[int], float] | float:
        """β in a run of so many steps, as `fit_vae` takes it."""
        if self.annealing == "none":
            return final
        if self.annealing == "linear":
            return LinearAnnealing(self.annealing_steps or max(1, steps // 3), final)
        return CyclicalAnnealing(self.annealing_steps or steps, self.cycles, final=final)

    def options(self) -> dict[str, Any]:
        """Further arguments of `fit_vae`."""
        free = None if self.free_bits is None else FreeBits(self.free_bits, self.free_bits_per)
        aggressive = Aggressive(self.inner_steps, self.aggressive_steps) if self.aggressive_steps else None
        return {"free_bits": free, "aggressive": aggressive}


@dataclass(frozen=True)
class StageTwo(ClassifierTraining):
    """The classifier that makes the base prior a noise contrastive one (NCP-VAE, section 3.2, stage two)."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """widths of the classifier's hidden layers"""
    base: Literal["prior", "normal", "mixture"] = "prior"
    """the VAE's own prior, or a Normal or a mixture of Gaussians fitted to the aggregate posterior"""
    log_z_samples: int = 100_000
    """base draws for log Z"""
    encode_once: bool = False
    """each example once, codes being drawn from its posterior anew at every step: quicker where encoders are large"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prior.log_z_samples", self.log_z_samples)


@dataclass(frozen=True)
class VAERecipe(Recipe):
    """An experiment with a VAE, a noise contrastive prior, and perhaps a critic."""

    weight_decay: float | None = None
    """of AdamW, which takes the place of Adam"""
    kl_weight: float = 1.0
    """β, on the KL term"""
    critic: CriticSettings = field(default_factory=CriticSettings)
    remedies: Remedies = field(default_factory=Remedies)
    prior: StageTwo = field(default_factory=StageTwo)

    @abstractmethod
    def vae(self, mean: Tensor | None = None) -> VAE:
        """The untrained VAE; see `Recipe.vae`."""

    @abstractmethod
    def classifier(self) -> nn.Module:
        """The untrained classifier z → log r."""

    def classifiers(self, vae: VAE) -> list[nn.Module]:
        return [self.classifier()]

    def objective(self, vae: VAE) -> nn.Module:
        critic = initialised(self.seed, lambda: self.build_critic(vae), part=1)
        return VAELoss(vae, critic, self.critic.weight)

    def build_critic(self, vae: VAE) -> Critic | None:
        """The untrained critic for that VAE, None without one; a neural one's x head is like the encoder."""
        kind, settings = self.critic.kind, self.critic
        if kind == "none":
            return None
        if kind == "self":
            return SelfCritic(symmetric=settings.symmetric)
        share = settings.share if kind == "hybrid" else 0
        return HybridCritic(
            vae, share, settings.hidden, settings.width, scale=settings.scale, symmetric=settings.symmetric
        )

    def fitting(self) -> dict[str, Any]:
        return {
            **super().fitting(),
            "optimizer": None if self.weight_decay is None else adamw(self.weight_decay, self.lr),
            "kl_weight": self.remedies.kl_weight(self.steps, self.kl_weight),
            "critic_weight": self.critic.weight,
            **self.remedies.options(),
        }
