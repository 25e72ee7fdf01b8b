"""Stage one for hierarchical VAEs, as NVAE is trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hierarchy import HierarchicalLoss, KLWarmup
from .batches import Data, check_data, mean_over_parts, parts, source
from .checkpoint import described
from .engine import Schedule, TrainResult, train
from .execution import Execution, check_count


@dataclass(frozen=True)
class WarmupCosine:
    """A learning rate that rises linearly, then falls on half a cosine: the factor of each step, counted from 0.

    Args:
        steps: of the whole training.
        warmup_steps: in which it rises to 1.
        minimum: the factor at the end.

    Source: NVAE, whose warm-up takes 5 epochs and whose rate falls from 1e-2 to 1e-4.
    """

    steps: int
    warmup_steps: int = 0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        check_count("WarmupCosine: steps", self.steps)
        check_count("WarmupCosine: warmup_steps", self.warmup_steps, minimum=0, below=self.steps)
        if not 0.0 <= self.minimum <= 1.0:
            raise ValueError(f"WarmupCosine: minimum must be in [0, 1], got {self.minimum!r}")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return self.minimum + (1.0 - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * done))


def adamax(weight_decay: float, lr: float, eps: float = 1e-3) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """NVAE's optimiser for `fit_hierarchical_vae(optimizer=…)`: Adamax with weight decay added to the gradient (L2)."""
    return lambda parameters: torch.optim.Adamax(parameters, lr=lr, eps=eps, weight_decay=weight_decay)


def fit_hierarchical_vae(
    vae: nn.Module,
    data: Data,
    *,
    validation: Data | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation_transform: Callable[[Tensor], Tensor] | None = None,
    steps: int = 10_000,
    batch_size: int = 128,
    lr: float = 1e-2,
    schedule: Schedule | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    kl_weight: float | Callable[[int], float] | None = None,
    balance: bool = True,
    regularization: float = 0.0,
    initial_regularization: float | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Maximise the evidence lower bound of a hierarchical VAE over all of its parameters.

    Args:
        vae: an `nn.Module` with the protocol `hierarchy.HierarchicalVAE`, trained in place on the device it is on;
            left in eval mode.
        data: [N, …], or any iterable of batches; see `fit_vae`.
        validation: held-out data; where given, the weights with its best bound are the ones kept.
        transform, validation_transform: see `fit_vae`.
        steps, batch_size, lr: batch_size is that of all processes together.
        schedule: `WarmupCosine(steps, …)` or what `train.engine.train` takes; a cosine down to lr/100 by default.
        optimizer: parameters → optimiser; `adamax(3e-4, lr)`, NVAE's, by default.
        kl_weight: β, or a function from the step, counted from 0, to it; `KLWarmup(steps)` by default. Validation
            takes 1.
        balance, regularization, initial_regularization: see `HierarchicalLoss`.
        validate_every, patience, seed, execution, folder, resume, settings, progress: see `fit_vae`.

    Returns:
        TrainResult with `loss`, `reconstruction` and `kl`, nats per example, and `regularization` where there is any.

    Raises:
        TypeError, ValueError: for a VAE without the protocol, and for data as `fit_vae` does.
        TrainingDiverged, TrainingInterrupted: see `fit_vae`.

    Source: Vahdat and Kautz, "NVAE: a deep hierarchical variational autoencoder", NeurIPS 2020.
    """
    check_data("fit_hierarchical_vae", "data", data)
    if validation is not None:
        check_data("fit_hierarchical_vae", "validation", validation)
    check_count("fit_hierarchical_vae: steps", steps)
    loss = HierarchicalLoss(
        vae, balance=balance, regularization=regularization, initial_regularization=initial_regularization
    )
    device = next(vae.parameters()).device
    transform = transform or (lambda x: x.float())
    prepare_held_out = validation_transform or transform
    batches, gather = source("fit_hierarchical_vae", "data", data, batch_size, seed)
    weight = KLWarmup(steps) if kl_weight is None else kl_weight
    if not callable(weight) and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
        raise TypeError(f"fit_hierarchical_vae: kl_weight must be a number or a function, got {type(weight).__name__}")
    beta = weight if callable(weight) else lambda step: weight

    def terms(batch: tuple[Any, int]) -> dict[str, Tensor]:
        return loss(transform(gather(batch[0]).to(device, non_blocking=True)), beta(batch[1]))

    def validate() -> dict[str, float]:
        assert validation is not None
        examples = parts("fit_hierarchical_vae", "validation", validation, batch_size)
        return mean_over_parts(lambda x: loss(prepare_held_out(x.to(device))), examples, seed)

    known = {"stage": "hierarchical vae", "batch_size": batch_size, "kl_weight": described(weight)}
    known |= {"balance": balance, "regularization": [loss.initial_regularization, loss.regularization]}
    known |= {"schedule": described(schedule)} if schedule is not None else {}
    return train(
        loss,
        terms,
        lambda start: zip(batches(start), count(start), strict=False),
        steps=steps,
        lr=lr,
        schedule=schedule or WarmupCosine(steps, minimum=0.01),
        optimizer=optimizer or adamax(3e-4, lr),
        validate=validate if validation is not None else None,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        execution=execution,
        folder=folder,
        resume=resume,
        settings={**known, **(settings or {})},
        progress=progress,
        description="VAE",
    )
