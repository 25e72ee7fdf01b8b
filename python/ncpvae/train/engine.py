"""The one training loop: a loss function and its batches; everything else is here once.

A loss function maps a batch to named terms, tensors without dimensions; the first is what is minimised.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _random

CHECK_EVERY = 50  # steps between looks at the losses: one device synchronisation each


class TrainingDiverged(FloatingPointError):
    """A loss term became NaN or infinite; the message names the step and the term."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps taken.
        seconds: wall-clock time.
        history: one dict per evaluation: `step`, the training terms averaged since the last one, and the
            held-out terms as `validation_<name>`.
        best_step: the step whose weights the model now has.
        stopped_early: whether patience ran out before the steps did.
    """

    steps: int
    seconds: float
    history: list[dict[str, float]] = field(repr=False)
    best_step: int
    stopped_early: bool


def minibatches(num_examples: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices; batch `step` is a pure function of (seed, step).

    Every epoch is a fresh permutation, and its incomplete last batch is dropped (kept when it is the only one).
    """
    check_count("batch_size", batch_size)
    batch_size = min(batch_size, num_examples)
    per_epoch = num_examples // batch_size
    epoch, first = divmod(start_step, per_epoch)
    while True:
        order = torch.randperm(
            num_examples, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        )
        for i in range(first, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
        epoch, first = epoch + 1, 0


def learning_rate_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at each step: "constant", or "cosine" to zero (Loshchilov, Hutter, 2017)."""
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))
    raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")


def train(
    model: nn.Module,
    loss: Callable[[Any], dict[str, Tensor]],
    batches: Iterable[Any],
    *,
    steps: int,
    lr: float,
    schedule: str = "cosine",
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "training",
) -> TrainResult:
    """Minimise the loss with Adam over the model's parameters that require gradients.

    Args:
        model: trained in place; in train mode during steps, eval mode during `validate` and afterwards.
        loss: batch → named 0-dimensional terms, the first one minimised.
        batches: at least `steps` of them.
        steps, lr, schedule: Adam's.
        validate: called without gradients; its first value is compared, lower being better, and the weights with
            the lowest are the ones the model ends with.
        validate_every: steps between validations; 20 validations over the run by default.
        patience: stop after this many validations without improvement.
        seed: governs all randomness of the loss; torch's global generators are left as they were.
        progress: show a progress bar.
        description: its label.

    Raises:
        TrainingDiverged: naming step and term, when one is NaN or infinite.
    """
    check_count("steps", steps)
    for name, optional in (("validate_every", validate_every), ("patience", patience)):
        if optional is not None:
            check_count(name, optional)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and > 0, got {lr!r}")
    check_count("seed", seed, minimum=0, below=1 << 62)
    progress = progress and os.environ.get("RANK", "0") == "0"  # torchrun's rank
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(schedule, steps))
    validate_every = validate_every or max(1, steps // 20)
    start = time.perf_counter()
    history: list[dict[str, float]] = []
    best_value, best_step = math.inf, 0
    best_weights: dict[str, Tensor] | None = None
    pending: list[dict[str, Tensor]] = []
    window: list[dict[str, float]] = []
    stale, step = 0, 0
    model.train()
    try:
        with _random.scoped(seed), tqdm(total=steps, desc=description, disable=not progress, leave=False) as bar:
            for step, batch in zip(range(1, steps + 1), batches, strict=False):
                terms = loss(batch)
                optimizer.zero_grad(set_to_none=True)
                next(iter(terms.values())).backward()
                optimizer.step()
                scheduler.step()
                pending.append({name: term.detach() for name, term in terms.items()})
                validating = step % validate_every == 0 or step == steps
                if step % CHECK_EVERY == 0 or validating:
                    window += _collect(pending, step)
                    bar.update(len(pending))
                    bar.set_postfix({name: f"{value:.4g}" for name, value in window[-1].items()}, refresh=False)
                    pending.clear()
                if not validating:
                    continue
                record = {"step": step} | {k: sum(w[k] for w in window) / len(window) for k in window[0]}
                window.clear()
                if validate is not None:
                    model.eval()
                    with torch.no_grad():
                        held_out = validate()
                    model.train()
                    record |= {f"validation_{name}": value for name, value in held_out.items()}
                    value = next(iter(held_out.values()))
                    if not math.isfinite(value):
                        raise TrainingDiverged(
                            f"{description}: validation {next(iter(held_out))} is {value} at step {step}"
                        )
                    stale += 1
                    if value < best_value:
                        stale, best_value, best_step = 0, value, step
                        best_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                history.append(record)
                if patience is not None and stale >= patience:
                    break
    finally:  # also after a failure the model is left usable, with the best weights there were
        if best_weights is not None:
            model.load_state_dict(best_weights)
        model.eval()
    best_step = step if best_weights is None else best_step
    return TrainResult(step, time.perf_counter() - start, history, best_step, step < steps)


def check_count(name: str, value: object, minimum: int = 1, below: float = math.inf) -> None:
    """`value` is an integer from `minimum` on, `below` a limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not minimum <= value < below:
        limit = "" if below == math.inf else f" and < {below}"
        raise ValueError(f"{name} must be ≥ {minimum}{limit}, got {value}")


def _collect(pending: list[dict[str, Tensor]], last_step: int) -> list[dict[str, float]]:
    """The pending terms as numbers, fetched in one transfer; raises at the first that is not finite."""
    names = list(pending[0])
    values = torch.stack([terms[name].double() for terms in pending for name in names]).view(-1, len(names)).tolist()
    for row, step in zip(values, range(last_step - len(values) + 1, last_step + 1), strict=True):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise TrainingDiverged(f"training stopped at step {step}: loss term '{name}' is {value}")
    return [dict(zip(names, row, strict=True)) for row in values]
