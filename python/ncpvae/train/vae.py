"""Stage one: a VAE with its base prior."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from ..vae import VAE
from .batches import Data, check_data, mean_over_parts, parts, source
from .engine import Schedule, TrainResult, train
from .execution import Execution


def fit_vae(
    vae: VAE,
    data: Data,
    *,
    validation: Data | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation_transform: Callable[[Tensor], Tensor] | None = None,
    steps: int = 10_000,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: Schedule = "cosine",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    kl_weight: float = 1.0,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Maximise the evidence lower bound (NCP-VAE, Eq. 1) over all of the VAE's parameters.

    Args:
        vae: trained in place, on the device it is on; left in eval mode.
        data: [N, …], kept where it is and in its dtype (uint8 images stay small), batches being moved; or any iterable
            of batches, a DataLoader for example, gone through again and again.
        validation: [N', …] or an iterable; where given, the weights with its best bound are the ones kept.
        transform: applied to every batch on the VAE's device, dynamic binarisation for example;
            conversion to float32 by default.
        validation_transform: the same for validation, where augmentation should not apply; `transform` by default.
        steps, batch_size, lr: of Adam; batch_size is that of all processes together, and of no concern to an iterable.
        schedule, optimizer: see `train.engine.train`.
        kl_weight: β, on the KL term.
        validate_every, patience: in steps, and in validations without improvement before stopping.
        seed: the run is deterministic for a seed; the batch order is a function of seed and step alone.
        execution: precision, accumulation, averaging, checkpoints; see `Execution`.
        folder: for the log and the checkpoints of the run; nothing is written without it.
        resume: "never", "auto" (from the newest checkpoint in the folder, if any), or the path of a checkpoint.
        settings: JSON-able; a checkpoint of a run with others is refused.
        progress: show a progress bar.

    Returns:
        TrainResult with `loss` (negative bound), `reconstruction` and `kl`, nats per example.

    Raises:
        ValueError: for an empty or non-finite data set; as CheckpointError where a checkpoint cannot be gone on from.
        TrainingDiverged: where a term becomes NaN or infinite.
        TrainingInterrupted: after SIGINT or SIGTERM in a run with a folder, once its state is saved.
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"fit_vae: vae must be a VAE, got {type(vae).__name__}")
    check_data("fit_vae", "data", data)
    if validation is not None:
        check_data("fit_vae", "validation", validation)
    device = next(vae.parameters()).device
    transform = transform or (lambda x: x.float())
    batches, examples = source("fit_vae", "data", data, batch_size, seed)

    def terms(x: Tensor, transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        x = transform(x.to(device, non_blocking=True))
        out = vae(x)
        bound = objectives.elbo(x, out.likelihood, out.posterior, out.prior, out.z, kl_weight)
        return {
            "loss": -bound.elbo.mean(),
            "reconstruction": -bound.log_likelihood.mean(),
            "kl": bound.kl.mean(),
        }

    def validate() -> dict[str, float]:
        assert validation is not None
        held_out = parts("fit_vae", "validation", validation)
        return mean_over_parts(lambda x: terms(x, validation_transform or transform), held_out, seed)

    return train(
        vae,
        lambda batch: terms(examples(batch), transform),
        batches,
        steps=steps,
        lr=lr,
        schedule=schedule,
        optimizer=optimizer,
        validate=validate if validation is not None else None,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        execution=execution,
        folder=folder,
        resume=resume,
        settings={"stage": "vae", "batch_size": batch_size, "kl_weight": kl_weight, **(settings or {})},
        progress=progress,
        description="VAE",
    )
