"""Density and coverage, precision and recall: how true and how varied generated examples are, by nearest neighbours.

Letters: N real and M generated examples, F features, k neighbours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features
from .neighbours import (
    EXAMPLES_AT_ONCE,
    QUERIES_AT_ONCE,
    blocks,
    k_nearest,
    matched_vectors,
    origin_of,
    squared_distances,
)


@dataclass(frozen=True)
class DensityCoverage:
    """Fidelity and diversity of generated examples.

    Attributes:
        density: mean number of real balls around a generated example, over k; 1 for equal distributions, and not
            bounded by it.
        coverage: share of real examples with a generated one in their ball; `coverage_at_equality` is what it is
            on average for equal distributions.
        precision: share of generated examples in a real ball.
        recall: share of real examples in a generated one's ball.
        coverage_at_equality: 1 − Π_i (N − 1 − i) / (N + M − 1 − i), i < k; near 1 − 2⁻ᵏ for N = M.
        protocol: how it was computed.
    """

    density: float
    coverage: float
    precision: float
    recall: float
    coverage_at_equality: float
    protocol: str


@torch.no_grad()
def density_coverage(
    real_features: Tensor | Features,
    generated_features: Tensor | Features,
    k: int = 5,
    device: torch.device | str | None = None,
) -> DensityCoverage:
    """Count the generated examples in balls around the real ones that reach to their k-th real neighbour.

    In a ball is what is strictly nearer than its radius, or equals its centre: so k + 1 equal real examples, whose
    radius is 0, still count a generated one equal to them. Memory is O(N + M); the N × M distances are made, and
    dropped, in blocks.

    Args:
        real_features, generated_features: [N, F] and [M, F] in one fixed feature space, or `Features`. In a model's
            own latent space a collapsed model looks perfect.
        k: neighbours that set the radius, the example itself excluded; < N and < M.
        device: where the distances are computed; where the real features are by default.

    Source: density, coverage: Naeem, Oh, Uh, Choi, Yoo, "Reliable fidelity and diversity metrics for generative
    models", ICML 2020, equations 5 and 6. Precision, recall: Kynkäänniemi, Karras, Laine, Lehtinen, Aila, "Improved
    precision and recall metric for assessing generative models", NeurIPS 2019, there with ≤ for <.
    """
    real, generated, space = matched_vectors("density_coverage", real=real_features, generated=generated_features)
    n, m = len(real), len(generated)
    if not 1 <= k < min(n, m):
        raise ValueError(f"density_coverage: k must be 1 … {min(n, m) - 1} for {n} and {m} examples, got {k}")
    origin = origin_of(real, device)
    radii = k_nearest(real, real, k, exclude_self=True, device=origin.device)[0][:, -1]
    generated_radii = k_nearest(generated, generated, k, exclude_self=True, device=origin.device)[0][:, -1]
    in_real = torch.zeros(m, dtype=torch.bool, device=origin.device)
    pairs = torch.zeros((), dtype=torch.int64, device=origin.device)
    covered, recalled = [], []
    for row, x in blocks(real, QUERIES_AT_ONCE, origin):
        radius = radii[row : row + len(x), None]
        has_sample = torch.zeros(len(x), dtype=torch.bool, device=origin.device)
        in_generated = torch.zeros_like(has_sample)
        for column, y in blocks(generated, EXAMPLES_AT_ONCE, origin):
            columns = slice(column, column + len(y))
            squared = squared_distances(x, y)
            inside = (squared < radius) | (squared == 0)
            pairs += inside.sum()
            has_sample |= inside.any(1)
            in_real[columns] |= inside.any(0)
            in_generated |= ((squared < generated_radii[columns]) | (squared == 0)).any(1)
        covered.append(has_sample.sum())
        recalled.append(in_generated.sum())
    return DensityCoverage(
        int(pairs) / (k * m),
        int(torch.stack(covered).sum()) / n,
        int(in_real.sum()) / m,
        int(torch.stack(recalled).sum()) / n,
        1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k)),
        f"k = {k}, {n} real and {m} generated examples, float64; features: {space}",
    )
