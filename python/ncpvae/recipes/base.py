"""What every recipe says: the numbers of both stages and of the evaluation, and how its models are built.

A recipe is a frozen dataclass; each of its fields is a flag of `ncpvae train`. One file is one experiment, and its
docstring says where each number comes from and what the source leaves open.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .._random import derived_seed
from ..data import Dataset, load
from ..train import Execution
from ..train.engine import Schedule
from ..train.execution import check_count, check_positive


def check_choices(settings: Any, prefix: str = "") -> None:
    """Fields of a dataclass whose type is a Literal hold one of its values.

    Raises:
        ValueError: naming the first that does not, after `prefix`.
    """
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal and getattr(settings, name) not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise ValueError(f"{prefix}{name} must be one of {choices}, got {getattr(settings, name)!r}")


@dataclass(frozen=True)
class ClassifierTraining:
    """How the classifiers are trained that make a base prior a noise contrastive one (NCP-VAE, section 3.2)."""

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
    execution: Execution = field(default_factory=Execution)

    def __post_init__(self) -> None:
        check_choices(self, "prior.")
        for name in ("steps", "batch_size"):
            check_count(f"prior.{name}", getattr(self, name))
        check_positive("prior.lr", self.lr)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"prior.label_smoothing must be in [0, 1), got {self.label_smoothing!r}")

    def options(self) -> dict[str, Any]:
        """These settings as arguments of `fit_ncp` and `fit_hierarchical_ncp`."""
        return {f.name: getattr(self, f.name) for f in fields(ClassifierTraining)}


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
        for temperature in self.temperatures:
            check_positive("temperatures", temperature)


@dataclass(frozen=True)
class Recipe(ABC):
    """An experiment: a data set, a VAE, a noise contrastive prior."""

    maximum: ClassVar[int | None] = 255
    """value of a full pixel in memory, as `transform` takes it; None for vectors and text"""

    data: str
    """name of the data set, see `ncpvae.data.load`"""
    shape: tuple[int, ...]
    """of one example"""
    steps: int
    """optimiser steps of stage one"""
    batch_size: int = 128
    """of all processes together"""
    lr: float = 1e-3
    """of the optimiser"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """of the learning rate"""
    validate_every: int | None = None
    """steps; 20 times over the run by default"""
    patience: int | None = None
    """validations without improvement before stopping; None never stops"""
    seed: int = 0
    """governs all randomness of a run"""
    execution: Execution = field(default_factory=Execution)
    prior: ClassifierTraining = field(default_factory=ClassifierTraining)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch_size"):
            check_count(name, getattr(self, name))
        check_positive("lr", self.lr)
        for name in ("shape", "channels"):
            sizes = getattr(self, name, (1,))
            if isinstance(sizes, tuple) and (not sizes or min(sizes) < 1):
                raise ValueError(f"{name} must hold numbers ≥ 1, got {sizes}")

    def load(self, folder: str | None = None) -> Dataset:
        """The data set, from that folder, `NCPVAE_DATA` or the hub."""
        return load(self.data, folder, self.seed)

    def example(self, count: int) -> Tensor:
        """Some examples as the model sees them, of right shape and kind, for sizes to be counted."""
        return torch.zeros(count, *self.shape)

    @abstractmethod
    def vae(self, mean: Tensor | None = None) -> nn.Module:
        """The untrained VAE.

        Args:
            mean: of the training data as the model sees it, of `shape`; None where only sizes matter.
        """

    @abstractmethod
    def objective(self, vae: Any) -> nn.Module:
        """The loss of stage one for that VAE: a module x → named terms that holds all that is trained."""

    @abstractmethod
    def classifiers(self, vae: Any) -> list[nn.Module]:
        """The untrained classifiers z_k → log r_k, one for each group of latent variables."""

    @abstractmethod
    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        """Examples as they are stored → as the model sees them, on their device; augmented in training alone."""

    def fitting(self) -> dict[str, Any]:
        """How stage one is trained: arguments of `fit_vae` and of `fit_hierarchical_vae`."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "schedule": self.lr_schedule(),
            "validate_every": self.validate_every,
            "patience": self.patience,
            "seed": self.seed,
            "execution": self.execution,
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

    def originals(self, x: Tensor) -> Tensor:
        """Examples as they are stored → what `pictures` makes of a perfect decoder's mean; float32."""
        return x.float() / (self.maximum or 1)


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
