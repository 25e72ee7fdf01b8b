"""Stage one: a VAE with its base prior."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import world_size
from ..critics import Critic
from ..objectives import FreeBits, VAELoss
from ..vae import VAE
from .batches import Data, check_data, mean_over_parts, parts, source
from .checkpoint import described
from .engine import Schedule, TrainResult, train
from .execution import Execution, check_count


@dataclass(frozen=True)
class Aggressive:
    """Aggressive training of the encoder, so that it does not lag behind the decoder.

    For the first `steps` optimiser steps, all but every (inner_steps + 1)-th update the encoder alone, the critic
    with it. He et al. decide when to go on by watching the bound on every few batches, and when to stop altogether by
    the mutual information; with fixed numbers a step is a function of its number, and a resumed run goes on exactly.
    Their step in between is the decoder's alone, and here it is both's.

    Source: He, Spokoyny, Neubig, Berg-Kirkpatrick, "Lagging inference networks and posterior collapse in variational
    autoencoders", ICLR 2019.
    """

    inner_steps: int
    steps: int

    def __post_init__(self) -> None:
        check_count("Aggressive: inner_steps", self.inner_steps)
        check_count("Aggressive: steps", self.steps)

    def encoder_only(self, step: int) -> bool:
        """Whether this step, counted from 0, leaves the decoder as it is."""
        return step < self.steps and step % (self.inner_steps + 1) < self.inner_steps


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
    kl_weight: float | Callable[[int], float] = 1.0,
    critic: Critic | None = None,
    critic_weight: float = 1.0,
    free_bits: FreeBits | None = None,
    aggressive: Aggressive | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Maximise the evidence lower bound (NCP-VAE, Eq. 1) over all of the VAE's parameters, with a critic ELBO + λ·c.

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
        kl_weight: β, on the KL term, or a function from the step, counted from 0, to it, as
            `objectives.LinearAnnealing` and `CyclicalAnnealing` are; validation takes the last step's.
        critic: against posterior collapse; on the VAE's device, trained in place with it. Its negatives are the other
            examples of the batch, of all processes; parts of a batch under gradient accumulation are apart.
        critic_weight: λ, on c, both c and the ELBO being means over the batch.
        free_bits: takes the place of the KL term in training.
        aggressive: train the encoder alone in most of the first steps; in one process only.
        validate_every, patience: in steps, and in validations without improvement before stopping.
        seed: the run is deterministic for a seed; the batch order is a function of seed and step alone.
        execution: precision, accumulation, averaging, checkpoints; see `Execution`.
        folder: for the log and the checkpoints of the run; nothing is written without it.
        resume: "never", "auto" (from the newest checkpoint in the folder, if any), or the path of a checkpoint.
        settings: JSON-able; a checkpoint of a run with others is refused.
        progress: show a progress bar.

    Returns:
        TrainResult with `loss` (the negative bound, with a critic less λ·c), `reconstruction`, `kl` and, with a critic,
        `critic` = c, nats per example.

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
    if aggressive is not None and world_size() > 1:
        raise ValueError(f"fit_vae: aggressive must be None in several processes, got {world_size()} of them")
    device = next(vae.parameters()).device
    transform = transform or (lambda x: x.float())
    batches, examples = source("fit_vae", "data", data, batch_size, seed)
    loss = VAELoss(vae, critic, critic_weight, free_bits)
    bound = VAELoss(vae, critic, critic_weight)  # the same modules; held-out figures are of the ELBO itself
    beta = kl_weight if callable(kl_weight) else lambda step: kl_weight
    decoding = [p for name, p in vae.named_parameters() if not name.startswith("encoder.")]

    def terms(batch: tuple[Any, int]) -> dict[str, Tensor]:
        x, step = transform(examples(batch[0]).to(device, non_blocking=True)), batch[1]
        encoder_only = aggressive is not None and aggressive.encoder_only(step)
        with _without_gradients(decoding) if encoder_only else nullcontext():
            return loss(x, beta(step))

    def held_out_parts() -> Iterable[Tensor]:
        assert validation is not None
        if critic is not None and isinstance(validation, Tensor):  # as many negatives as in training, and never none
            return validation.tensor_split(max(1, min(-(-len(validation) // batch_size), len(validation) // 2)))
        return parts("fit_vae", "validation", validation)

    def validate() -> dict[str, float]:
        prepare = validation_transform or transform
        return mean_over_parts(lambda x: bound(prepare(x.to(device)), beta(steps - 1)), held_out_parts(), seed)

    known: dict[str, Any] = {"stage": "vae", "batch_size": batch_size, "kl_weight": described(kl_weight)}
    known |= {"free_bits": described(free_bits), "aggressive": described(aggressive), "critic": None}
    if critic is not None:  # whose negatives depend on the number of processes too
        known |= {"critic": critic.settings(), "critic_weight": critic_weight, "processes": world_size()}
    return train(
        vae if critic is None else loss,
        terms,
        lambda start: zip(batches(start), count(start), strict=False),
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
        settings={**known, **(settings or {})},
        progress=progress,
        description="VAE",
    )


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """What is computed within gives these parameters no gradient; an optimiser passes over those that have none."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def adamw(weight_decay: float, lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW for `fit_vae(optimizer=…)`; parameters of one element, such as a critic's scale, do not decay."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [[p for p in parameters if p.numel() > 1], [p for p in parameters if p.numel() == 1]]
        decays = [weight_decay, 0.0]
        named = [{"params": g, "weight_decay": decay} for g, decay in zip(groups, decays, strict=True) if g]
        return torch.optim.AdamW(named, lr=lr, fused=True)

    return make
