"""The section on the latent groups of a hierarchical VAE: how well posterior and base agree in each, and what SIR
makes of it (NCP-VAE, Figure 4)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plots
from . import charts
from .content import GroupFigures
from .numbers import brief, number

NAMES = {
    "kl": "KL",
    "loss": "classification loss",
    "jsd": "JSD",
    "accuracy": "accuracy",
    "ess": "effective sample size",
    "log_mean": "log E[r]",
}
DECIMALS = {"kl": 2, "loss": 3, "jsd": 3, "accuracy": 3, "log_mean": 3}


class Correlation(NamedTuple):
    """Of losses and effective sample sizes.

    Attributes:
        groups: their number.
        pearson: Pearson's coefficient of the loss and the logarithm of the effective sample size.
        spearman: Spearman's of the two, which is Pearson's of their ranks; equal values share the mean of their ranks.
    """

    groups: int
    pearson: float
    spearman: float


def correlation(losses: Sequence[float], ess: Sequence[float]) -> Correlation | None:
    """How losses and effective sample sizes go together; None for fewer than three groups, or where all agree in one.

    Args:
        losses: [K], finite.
        ess: [K], finite and positive.
    """
    if len(losses) != len(ess):
        raise ValueError(f"correlation: losses and ess must be of one length, got {len(losses)} and {len(ess)}")
    if not all(math.isfinite(loss) for loss in losses) or not all(0 < size < math.inf for size in ess):
        raise ValueError(
            f"correlation: losses must be finite, and ess finite and positive, got {list(losses)} and {list(ess)}"
        )
    x, y = torch.tensor(losses, dtype=torch.float64), torch.tensor(ess, dtype=torch.float64).log()
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return None
    return Correlation(len(x), _pearson(x, y), _pearson(_ranks(x), _ranks(y)))


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x / x.norm() @ (y / y.norm())).clamp(-1, 1))


def _ranks(values: Tensor) -> Tensor:
    """[K] from 1; equal values have the mean of their places."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1).double() / 2


def section(groups: Sequence[GroupFigures], num_proposals: int | None) -> dict[str, Any] | None:
    """What the page shows of the groups; None where there are none."""
    if not groups:
        return None
    given = [key for key in NAMES if any(getattr(group, key) is not None for group in groups)]
    points = plots.paired(groups)
    found = correlation([loss for _, loss, _ in points], [ess for _, _, ess in points])
    return {
        "columns": given,
        "rows": [_row(group, given) for group in groups],
        "missing": [name for key, name in NAMES.items() if key not in given],
        "scales": len({group.scale for group in groups}),
        "flat": [group.number for group in groups if group.flat],
        "num_proposals": num_proposals,
        "panels": _panels(groups, num_proposals),
        "undrawn": _undrawn(groups),
        "correlation": found
        and {"groups": found.groups, "pearson": number(found.pearson, 3), "spearman": number(found.spearman, 3)},
    }


def _row(group: GroupFigures, columns: Sequence[str]) -> dict[str, Any]:
    shape = " × ".join(str(size) for size in group.shape)
    cells = [_cell(group, column) for column in columns]
    return {"number": group.number, "scale": group.scale, "shape": shape, "flat": group.flat, "cells": cells}


def _cell(group: GroupFigures, column: str) -> str:
    value = getattr(group, column)
    if value is None:
        return "flat" if column == "ess" and group.flat else "–"
    if column == "ess":
        return brief(value)
    text = number(value + 0.0, DECIMALS[column])  # adding 0 makes −0 plain
    if column == "log_mean" and group.log_mean_std is not None:
        text += f" ({number(group.log_mean_std, DECIMALS[column])})"
    return text


def _panels(groups: Sequence[GroupFigures], num_proposals: int | None) -> dict[str, str]:
    """Charts by name, those for which there are values."""
    panels = {}
    if any(value is not None and math.isfinite(value) for group in groups for value in (group.loss, group.jsd)):
        panels["losses"] = charts.drawn(
            lambda axes: plots.draw_losses(axes, groups),
            "Classification loss and Jensen-Shannon divergence of each group",
        )
    if any(group.ess is not None and 0 < group.ess < math.inf for group in groups):
        panels["ess"] = charts.drawn(
            lambda axes: plots.draw_ess(axes, groups, num_proposals), "Effective sample size of each group"
        )
    if plots.paired(groups):
        panels["both"] = charts.drawn(
            lambda axes: plots.draw_ess_against_loss(axes, groups, num_proposals),
            "Effective sample size against classification loss, a dot for each group",
        )
    return panels


def _undrawn(groups: Sequence[GroupFigures]) -> list[str]:
    """The values that no chart can show, by name and group."""
    undrawn = []
    for key in ("loss", "jsd", "ess"):
        for group in groups:
            value = getattr(group, key)
            if value is not None and (not math.isfinite(value) or (key == "ess" and value == 0)):
                undrawn.append(f"{NAMES[key]} of group {group.number}")
    return undrawn
