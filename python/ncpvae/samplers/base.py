"""What every sampler gives and asks: results, diagnostics, and the checks of what it is given."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution


class ReweightedDistribution(Protocol):
    """What samplers ask of a distribution."""

    base: Distribution

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def event_shape(self) -> torch.Size: ...

    def log_ratio(self, z: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Diagnostics:
    """How a sampler fared.

    Attributes:
        ess: [B], effective sample size of each row's base draws, out of `num_proposals`.
        log_normalizer: [*batch], log Z estimated from all base draws, nats; on average below it (Jensen).
        num_proposals: base draws per row; for Langevin dynamics the number of starting draws.
        stopped: "num_proposals", "min_ess", "max_proposals" or "num_steps": what ended the sampling.
        seconds: wall-clock time.
    """

    ess: Tensor
    log_normalizer: Tensor
    num_proposals: int
    stopped: str
    seconds: float


class SampleResult(NamedTuple):
    """Samples [*shape, *batch, *event] and how they came about."""

    z: Tensor
    diagnostics: Diagnostics


class Sampler(Protocol):
    """`SIR`, `Langevin`, or one of your own."""

    def sample(
        self, distribution: ReweightedDistribution, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> SampleResult: ...


def checked_shape(owner: str, distribution: object, shape: object) -> torch.Size:
    """`shape` as a torch.Size of at least one sample, and a distribution that can be sampled."""
    if not all(hasattr(distribution, name) for name in ("base", "log_ratio", "batch_shape", "event_shape")):
        raise TypeError(
            f"{owner}: distribution must have base and log_ratio, as a prior called like prior() returns it, "
            f"got {type(distribution).__name__}"
        )
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"{owner}: shape must be a tuple of integers, got {shape!r}")
    if min(shape, default=1) < 1:
        raise ValueError(f"{owner}: shape must hold at least one sample, got {tuple(shape)}")
    return torch.Size(shape)


def check_number(owner: str, name: str, value: object, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (strict and value == 0):
        raise ValueError(f"{owner}: {name} must be finite and {'>' if strict else '≥'} 0, got {value}")


def check_positive_int(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be ≥ 1, got {value}")


def check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {type(value).__name__}")


def keep_freed_memory() -> None:
    """Let glibc keep what the classifier's layers free instead of asking the system for it again at every layer.

    It returns freed memory beyond a threshold, which rises when a larger block, of up to 32 MiB, is freed. This one
    is never written to and so takes no memory.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8, device="cpu")
