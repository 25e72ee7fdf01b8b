"""What every recipe says: the numbers of both stages and of the evaluation, and how its models are built.

A recipe is a frozen dataclass; each of its fields is a flag of `ncpvae train`. One file is one experiment, and its
docstring says where each number comes from and what the source leaves open.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._random import derived_seed
from ..critics import Critic, HybridCritic, SelfCritic
from ..data import Dataset, load
from ..objectives import CyclicalAnnealing, FreeBits, LinearAnnealing
from ..train import Aggressive, Execution, adamw
from ..train.engine import Schedule
from ..train.execution import check_count, check_positive
from ..vae import VAE


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
class StageTwo:
    """The classifier that makes the base prior a noise contrastive one (NCP-VAE, section 3.2, stage two)."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """widths of the classifier's hidden layers"""
    base: Literal["prior", "normal", "mixture"] = "prior"
    """the VAE's own prior, or a Normal or a mixture of Gaussians fitted to the aggregate posterior"""
    steps: int = 5000
    """optimiser steps"""
    batch_size: int = 512
    """draws from q(z) and from p(z) in one step, over all processes"""
    lr: float = 1e-3
    """of Adam"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rate"""
    label_smoothing: float = 0.0
    """biases log r towards 0"""
    validate_every: int | None = None
    """steps; 20 times over the run by default"""
    patience: int | None = 5
    """validations without improvement before stopping; None never stops"""
    log_z_samples: int = 100_000
    """base draws for log Z"""
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_z_samples"):
            check_count(f"prior.{name}", getattr(self, name))
        check_positive("prior.lr", self.lr)


@dataclass(frozen=True)
class Evaluation:
    """How figures and pictures come about."""

    importance_samples: int = 1000
    """draws from q(z|x) per test example in the importance-weighted likelihood"""
    snis_proposals: int = 1024
    """K of the SNIS bound"""
    sir_proposals: int = 5000
    """M of sampling-importance-resampling"""
    test_examples: int | None = None
    """of the test set, from its start; all by default"""
    samples: int = 2000
    """drawn from each prior for distances, density, coverage and the memorisation check"""
    pictures: int = 64
    """samples in a grid"""
    temperatures: tuple[float, ...] = (1.0, 0.7)
    """of the base prior in the grids"""

    def __post_init__(self) -> None:
        for name in ("importance_samples", "snis_proposals", "sir_proposals", "test_examples", "samples", "pictures"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))


@dataclass(frozen=True)
class Recipe(ABC):
    """An experiment: a data set, a VAE, a noise contrastive prior."""

    data: str
    """name of the data set, see `ncpvae.data.load`"""
    shape: tuple[int, ...]
    """of one example"""
    steps: int
    """optimiser steps of stage one"""
    batch_size: int = 128
    """of all processes together"""
    lr: float = 1e-3
    """of Adam"""
    weight_decay: float | None = None
    """of AdamW, which then takes Adam's place"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rate"""
    kl_weight: float = 1.0
    """β, on the KL term"""
    critic: CriticSettings = field(default_factory=CriticSettings)
    remedies: Remedies = field(default_factory=Remedies)
    validate_every: int | None = None
    """steps; 20 times over the run by default"""
    patience: int | None = None
    """validations without improvement before stopping; None never stops"""
    seed: int = 0
    """governs all randomness of a run"""
    execution: Execution = field(default_factory=Execution)
    prior: StageTwo = field(default_factory=StageTwo)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_count(name, getattr(self, name))
        check_positive("lr", self.lr)
        for name in ("shape", "channels"):
            if not getattr(self, name, (1,)) or min(getattr(self, name, (1,))) < 1:
                raise ValueError(f"{name} must hold numbers ≥ 1, got {getattr(self, name)}")

    def load(self, folder: str | None = None) -> Dataset:
        """The data set, from that folder, `NCPVAE_DATA` or the hub."""
        return load(self.data, folder, self.seed)

    def example(self, count: int) -> Tensor:
        """Some examples as the model sees them, of right shape and kind, for sizes to be counted."""
        return torch.zeros(count, *self.shape)

    @abstractmethod
    def vae(self, mean: Tensor | None = None) -> VAE:
        """The untrained VAE.

        Args:
            mean: of the training data as the model sees it, of `shape`; None where only sizes matter.
        """

    @abstractmethod
    def classifier(self) -> nn.Module:
        """The untrained classifier z → log r."""

    @abstractmethod
    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        """Examples as they are stored → as the model sees them, on their device; augmented in training alone."""

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
        """How stage one is trained: arguments of `fit_vae`."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "schedule": self.lr_schedule(),
            "optimizer": None if self.weight_decay is None else adamw(self.weight_decay, self.lr),
            "kl_weight": self.remedies.kl_weight(self.steps, self.kl_weight),
            "critic_weight": self.critic.weight,
            "validate_every": self.validate_every,
            "patience": self.patience,
            "seed": self.seed,
            "execution": self.execution,
            **self.remedies.options(),
        }

    def evaluation_transform(self, x: Tensor) -> Tensor:
        """`transform` without augmentation."""
        return self.transform(x, training=False)

    def lr_schedule(self) -> Schedule:
        """The schedule of stage one, as `fit_vae` takes it."""
        return self.schedule

    def comparable(self, x: Tensor) -> Tensor:
        """Examples or samples [N, …] → what distances between them are taken of, in `comparable_in`."""
        return x

    @property
    def comparable_in(self) -> str:
        """The name of that space."""
        return "pixels" if len(self.shape) == 3 else "data space"

    def published(self) -> dict[str, str]:
        """Figures of the source for these settings, by the titles of `ncpvae compare`'s columns, and a `note`."""
        return {}

    def pictures(self, x: Tensor) -> Tensor:
        """What the decoder returns → images in [0, 1], or points as they are."""
        return x


def initialised(seed: int, build, part: int = 0) -> Any:
    """`build()` with weights drawn from `seed`, torch's global generators being left as they were.

    Parts of one model that are built apart take numbers of their own, lest layers of equal shape have equal weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, part) if part else seed)
        return build()


def from_dict(template: Any, values: dict[str, Any], owner: str) -> Any:
    """The recipe like `template`, with the values of a JSON object for its fields.

    Raises:
        ValueError: naming fields that are unknown, or that have the wrong kind of value.
    """
    known = {f.name: getattr(template, f.name) for f in fields(template)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{owner}: {', '.join(unknown)} is no field of {type(template).__name__}")
    arguments = {}
    for name, value in values.items():
        default = known[name]
        if is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{owner}: {name} must be an object, got {type(value).__name__}")
            arguments[name] = from_dict(default, value, owner)
        elif isinstance(default, tuple):
            if not isinstance(value, list):
                raise ValueError(f"{owner}: {name} must be a list, got {type(value).__name__}")
            arguments[name] = tuple(value)
        else:
            numbers = (int, float) if isinstance(default, float) else type(default)
            if default is not None and value is not None and not isinstance(value, numbers):
                raise ValueError(f"{owner}: {name} must be like {default!r}, got {value!r}")
            arguments[name] = value
    return type(template)(**{**known, **arguments})
