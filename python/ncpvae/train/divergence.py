"""Divergence, of which NaN and infinity are the signs: how it is noticed and told, and what a way back needs."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import number_of, whole
from .execution import Execution

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingDiverged(FloatingPointError):
    """A loss term became NaN or infinite; the message names the step, the term and the last good checkpoint.

    Where `Execution.halve_lr` allows it, the loop goes back to that checkpoint instead, with half the learning rate.
    """


def check_way_back(execution: Execution, folder: Path | None, batches: object) -> None:
    """A run that is to go back when it diverges has a folder, and batches that can be had again."""
    if not execution.halve_lr:
        return
    if folder is None:
        raise ValueError(f"execution.halve_lr needs the folder of the run, got {execution.halve_lr} without one")
    if isinstance(batches, Iterator):
        raise TypeError(
            "batches must be a function of the step, or an iterable that can be gone through again, for "
            f"execution.halve_lr = {execution.halve_lr}, got {type(batches).__name__}"
        )


def check_finite(step: int, row: dict[str, float], scaled: bool) -> None:
    """All terms of a step are finite.

    Args:
        step: its number.
        row: its terms.
        scaled: whether fp16's loss scale is found by trial, an infinite gradient norm being its business.

    Raises:
        TrainingDiverged: naming the step and the terms.
    """
    bad = [name for name, value in row.items() if not math.isfinite(value) and not (scaled and name == "grad_norm")]
    if bad:
        also = f" ({', '.join(repr(name) for name in bad[1:])} too)" if bad[1:] else ""
        raise TrainingDiverged(f"training stopped at step {step}: loss term {bad[0]!r} is {row[bad[0]]}{also}")


def way_back(last: Path, found: Sequence[Path], recoveries: Sequence[dict[str, Any]], noticed: int) -> Path:
    """The checkpoint to go back to: the last one, or where that was in vain one from further back.

    Weights can be finite and yet beyond help, at whatever rate. So a run that has come no further than the time
    before goes back beyond the checkpoint that it went back to then, as far as there are any.

    Args:
        last: that the run has saved or was resumed from.
        found: all there are in its folder, oldest first.
        recoveries: records of the ways back so far.
        noticed: step at which the run is known to have diverged now.
    """
    if last not in found or not recoveries or noticed > recoveries[-1]["noticed_at"]:
        return last
    return [found[0], *(path for path in found if number_of(path) < recoveries[-1]["step"])][-1]


def what_is_left(last_checkpoint: Path | None, halvings: int) -> str:
    """The end of the message where there is no way back: what there is to go on from, and what has been tried."""
    found = f"; the last good checkpoint is {last_checkpoint}" if last_checkpoint is not None else ""
    times = "once" if halvings == 1 else f"{halvings} times"
    return found + (f"; the learning rate had been halved {times}" if halvings else "")


def limited_gradients(accelerator: "Accelerator", module: nn.Module, execution: Execution) -> dict[str, Tensor]:
    """Scale gradients down to the largest norm; their norm, and whether it is too large for a step, where asked.

    Nothing in those parts of an accumulated batch after which no step is taken.
    """
    largest, limit = execution.max_grad_norm, execution.skip_grad_norm
    if (largest is None and limit is None) or not accelerator.sync_gradients:
        return {}
    norm = whole(accelerator.clip_grad_norm_(module.parameters(), math.inf if largest is None else largest))
    if limit is None:
        return {"grad_norm": norm}
    taken = norm <= limit
    return {"grad_norm": torch.where(taken, norm, limit), "skipped": (~taken).float()}
