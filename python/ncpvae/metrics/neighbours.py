"""Nearest neighbours by exhaustive search in blocks: exact, on any device, memory linear in the numbers of examples.

Letters: Q queries, N examples, F coordinates, k neighbours, B and n rows of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .features import Features

QUERIES_AT_ONCE = 1 << 9  # a block of distances fits a processor's cache: 2.5 times as fast as 1,024 × 8,192
EXAMPLES_AT_ONCE = 1 << 11
ELEMENTS_AT_ONCE = 1 << 24  # coordinates of a block held in float64, where rows are long


class Neighbours(NamedTuple):
    """The k nearest examples of each query, the nearest first; equally near ones are in no particular order.

    Attributes:
        distances: [Q, k], Euclidean, float64.
        indices: [Q, k], int64, rows of the examples.
    """

    distances: Tensor
    indices: Tensor


@torch.no_grad()
def nearest_neighbours(
    queries: Tensor | Features,
    examples: Tensor | Features,
    k: int = 1,
    exclude_self: bool = False,
    device: torch.device | str | None = None,
) -> Neighbours:
    """The k nearest examples of each query by Euclidean distance.

    Args:
        queries: [Q, …], flattened, or `Features`.
        examples: [N, …] likewise.
        k: ≤ N.
        exclude_self: queries are the examples, and none is its own neighbour; k < N.
        device: where the distances are computed; where the examples are by default. The result is there too.
    """
    q, e, _ = matched_vectors("nearest_neighbours", queries=queries, examples=examples)
    if not 1 <= k <= len(e) - exclude_self:
        raise ValueError(f"nearest_neighbours: k must be 1 … {len(e) - exclude_self}, got {k}")
    if exclude_self and len(q) != len(e):
        raise ValueError(f"nearest_neighbours: exclude_self needs queries = examples, got {len(q)} and {len(e)} rows")
    squared, indices = k_nearest(q, e, k, exclude_self, device)
    return Neighbours(squared.sqrt(), indices)


def k_nearest(
    queries: Tensor, examples: Tensor, k: int, exclude_self: bool, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Squared distances [Q, k], float64, and indices [Q, k] of the k nearest rows of examples [N, F]."""
    origin = origin_of(examples, device)
    squared, indices = [], []
    for row, q in blocks(queries, QUERIES_AT_ONCE, origin):
        best = torch.full((len(q), k), torch.inf, dtype=q.dtype, device=q.device)
        where = torch.full((len(q), k), -1, device=q.device)
        for column, e in blocks(examples, EXAMPLES_AT_ONCE, origin):
            d = squared_distances(q, e)
            columns = torch.arange(column, column + len(e), device=d.device)
            if exclude_self:
                rows = torch.arange(row, row + len(q), device=d.device)
                d.masked_fill_(rows[:, None] == columns, torch.inf)
            candidates = torch.cat([where, columns.expand(len(q), -1)], dim=1)
            best, chosen = torch.cat([best, d], dim=1).topk(k, dim=1, largest=False)
            where = candidates.gather(1, chosen)
        squared.append(best)
        indices.append(where)
    return torch.cat(squared), torch.cat(indices)


def origin_of(examples: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The first example [F] in float64, on the device to compute on; distances are measured from there.

    So a common offset costs no accuracy, and integers stay exact.
    """
    device = torch.device(examples.device if device is None else device)
    return examples[0].to("cpu" if device.type == "mps" else device).double()  # MPS has no float64


def blocks(rows: Tensor, at_once: int, origin: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, rows [B, F] in float64 measured from the origin), block by block."""
    at_once = max(1, min(at_once, ELEMENTS_AT_ONCE // rows.shape[1]))
    for start in range(0, len(rows), at_once):
        yield start, rows[start : start + at_once].to(origin.device).double() - origin


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² [B, n] of x [B, F] and y [n, F], float64, by one matrix product.

    What is below its rounding error is 0, so that equal rows are at distance 0 exactly.
    """
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    rounding = 8 * torch.finfo(x.dtype).eps * x.shape[1] ** 0.5
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    return squared.masked_fill_(squared <= rounding * norms, 0.0)


def matched_vectors(owner: str, **sets: Tensor | Features) -> tuple:
    """Each named set as rows [N, F], checked to lie in one space, and at the end the name of that space."""
    vectors, spaces = [], {}
    for name, given in sets.items():
        x = given.values if isinstance(given, Features) else given
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor [N, …] or Features, got {type(x).__name__}")
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(f"{owner}: {name} must be [N, …] and not empty, got shape {tuple(x.shape)}")
        if x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{owner}: {name} must hold real numbers, got {x.dtype}")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"{owner}: {name} must be finite, got NaN or infinity")
        vectors.append(x.flatten(1))
        kind = "the values themselves" if x.is_floating_point() else "the integer values themselves"
        spaces[name] = (given.extractor if isinstance(given, Features) else kind, vectors[-1].shape[1])
    if len(set(spaces.values())) > 1:
        found = "; ".join(f"{name}: {space}, F = {width}" for name, (space, width) in spaces.items())
        raise ValueError(f"{owner}: all sets must lie in one space, got {found}")
    return (*vectors, next(iter(spaces.values()))[0])
