"""Memorisation: do samples lie nearer to the training examples than held-out examples do?

Letters: S samples, N training and H held-out examples.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .features import Features
from .neighbours import k_nearest, matched_vectors, nearest_neighbours

MIN_IN_CELL = 20  # samples, and held-out examples, for the normal approximation of a cell's rank sum


@dataclass(frozen=True)
class Memorization:
    """How near to the training examples samples are, beside held-out examples.

    Attributes:
        statistic: C_T, the rank-sum z-score of the samples' distances against the held-out examples', averaged
            over cells: far below 0 for copying, far above for samples off the data (underfitting).
        null_std: its standard deviation where samples and held-out examples are from one distribution; 1 for one cell.
        cell_statistics: z-score of each cell, NaN of those left out. Copying in one cell and underfitting in another
            cancel in the mean.
        probability_farther: that a sample is farther from the training set than a held-out example; ½ is ideal. It
            says how much, where the statistic, which grows with the numbers, says how surely.
        share_closer, share_closer_held_out: shares of samples and held-out examples within `threshold`.
        threshold: the quantile of the held-out distances.
        share_identical: samples equal to a training example.
        sample_distances, held_out_distances: [S], [H], to the nearest training example.
        nearest: [S], that training example's index.
        meaning: the statistic in words.
        protocol: how it was computed.
    """

    statistic: float
    null_std: float
    cell_statistics: tuple[float, ...]
    probability_farther: float
    share_closer: float
    share_closer_held_out: float
    threshold: float
    share_identical: float
    sample_distances: Tensor = field(repr=False)
    held_out_distances: Tensor = field(repr=False)
    nearest: Tensor = field(repr=False)
    meaning: str
    protocol: str


@torch.no_grad()
def memorization(
    samples: Tensor | Features,
    train: Tensor | Features,
    held_out: Tensor | Features,
    quantile: float = 0.05,
    num_cells: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Memorization:
    """Compare the distances of samples and of held-out examples to their nearest training example.

    Copies are found by their share within the held-out distances' `quantile`, and by the test of Meehan et al. Where
    the data are denser in one region than in another, what is near in one is far in the other: cells compare like with
    like. Distances are to the whole training set; cells only say which of them are compared.

    Args:
        samples: [S, …] from the model, or `Features`: pixels show copies, features show copies up to small changes.
        train: [N, …], what the model was fitted to.
        held_out: [H, …] from the same source, never seen by it; S, H ≥ 20.
        quantile: of the held-out distances.
        num_cells: k-means cells of the training set (by scikit-learn, where above 1). Cells with fewer than 20
            samples or held-out examples are left out.
        seed: of k-means.
        device: where the distances are computed; where the training examples are by default.

    Source: Meehan, Chaudhuri, Dasgupta, "A non-parametric test to detect data-copying in generative models",
    AISTATS 2020, section 3.
    """
    s, t, h, space = matched_vectors("memorization", samples=samples, train=train, held_out=held_out)
    if not 0 < quantile < 1:
        raise ValueError(f"memorization: quantile must lie between 0 and 1, got {quantile}")
    if not 1 <= num_cells <= len(t):
        raise ValueError(f"memorization: num_cells must be 1 … {len(t)}, the training examples, got {num_cells}")
    if min(len(s), len(h)) < MIN_IN_CELL:
        raise ValueError(
            f"memorization: samples and held_out must hold ≥ {MIN_IN_CELL} examples, got {len(s)} and {len(h)}"
        )
    of_samples, of_held_out = nearest_neighbours(s, t, device=device), nearest_neighbours(h, t, device=device)
    a, b = of_samples.distances[:, 0], of_held_out.distances[:, 0]
    cell_a, cell_b = torch.zeros_like(a, dtype=torch.int64), torch.zeros_like(b, dtype=torch.int64)
    if num_cells > 1:
        centres = _centres(t, num_cells, seed)
        cell_a, cell_b = (k_nearest(x, centres, 1, False, a.device)[1][:, 0] for x in (s, h))
    scores, weights = [math.nan] * num_cells, [0] * num_cells
    for cell in range(num_cells):
        in_a, in_b = a[cell_a == cell], b[cell_b == cell]
        if min(len(in_a), len(in_b)) >= MIN_IN_CELL:
            scores[cell], weights[cell] = rank_sum(in_a, in_b)[0], len(in_b)
    used, total = [(w, z) for w, z in zip(weights, scores, strict=True) if w], sum(weights)
    if not used:
        raise ValueError(
            f"memorization: num_cells must leave a cell {MIN_IN_CELL} samples and held-out examples, got {num_cells}"
        )
    statistic = sum(w * z for w, z in used) / total
    null_std = math.sqrt(sum(w * w for w, _ in used)) / total
    threshold = float(b.sort().values[int(quantile * len(b))])
    cells = f"{len(used)} of {num_cells} cells with {total} held-out examples" if num_cells > 1 else "one cell"
    return Memorization(
        statistic,
        null_std,
        tuple(scores),
        rank_sum(a, b)[1],
        float((a <= threshold).double().mean()),
        float((b <= threshold).double().mean()),
        threshold,
        float((a == 0).double().mean()),
        a,
        b,
        of_samples.indices[:, 0],
        _meaning(statistic, null_std, [z for _, z in used]),
        f"Euclidean distance to the nearest of {len(t)} training examples, {len(s)} samples against {len(h)} held-out "
        f"examples, quantile {quantile:g}, {cells}; features: {space}",
    )


def rank_sum(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mann–Whitney: z-score of a's ranks among a [S] and b [H], and P(a > b); ties count half.

    The variance is corrected for ties; where all values are equal z is 0.
    """
    a, b = a.double(), b.sort().values.double()
    below, below_or_equal = torch.searchsorted(b, a), torch.searchsorted(b, a, right=True)
    wins = float((below + below_or_equal).double().sum()) / 2
    n, pairs = len(a) + len(b), len(a) * len(b)
    ties = torch.cat([a, b]).unique(return_counts=True)[1].double()
    variance = pairs / 12 * (n + 1 - float((ties**3 - ties).sum()) / (n * (n - 1)))
    z = (wins - pairs / 2) / math.sqrt(variance) if variance > 1e-9 * pairs else 0.0
    return z, wins / pairs


def _meaning(statistic: float, null_std: float, of_cells: list[float]) -> str:
    z = statistic / null_std
    figure = f"C_T = {statistic:.2f}, {z:.1f} standard deviations"
    if len(of_cells) > 1:
        figure += f", cells {min(of_cells):.1f} … {max(of_cells):.1f}"
    if z < -3:
        return f"samples lie nearer to training examples than held-out examples do: data-copying ({figure})"
    if z > 3:
        return f"samples lie farther from training examples than held-out examples do: underfitting ({figure})"
    return f"samples are as near to training examples as held-out examples are ({figure})"


def _centres(train: Tensor, num_cells: int, seed: int) -> Tensor:
    """[num_cells, F] k-means centres, float64."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("memorization with cells needs scikit-learn: pip install 'ncpvae[data]'") from error
    means = KMeans(num_cells, n_init=1, random_state=seed % 2**32).fit(train.cpu().float().numpy())
    return torch.from_numpy(means.cluster_centers_).double()
