"""InfoNCE's lower bound on the mutual information between data and codes, from a critic's scores.

Letters: N rows (pairs that belong together), K candidates of each row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _distributed
from ._common import check_counts, check_numbers, in_float64, mean_and_error

TOLERANCE = 1e-3  # by which a positive may pass its log-sum, by rounding, relative to 1 + |log-sum|


@dataclass(frozen=True)
class InfoNCEBound:
    """A lower bound on I(x; z), nats.

    Attributes:
        value: c + log K; it can be negative, where the critic is worse than none.
        standard_error: of c as a mean over rows, taken as independent, though they share candidates.
        log_n: log K, the largest possible value, whatever x and z share.
        c: mean of positive − log_sum, the critic's objective, ≤ 0.
        protocol: how it was computed.
    """

    value: float
    standard_error: float
    log_n: float
    c: float
    protocol: str


@torch.no_grad()
def info_nce_bound(
    positive: Tensor, log_sum: Tensor, num_candidates: int | None = None, across_ranks: bool = False
) -> InfoNCEBound:
    """I(x; z) ≥ E[log f(x⁺, z⁺) − log Σ_x f(x, z⁺)] + log K, the sum over K candidates x, the positive among them.

    The roles of x and z may be exchanged. In expectation it is a bound for any critic f that has not seen these
    examples.

    Args:
        positive: [N], log f(x_n, z_n).
        log_sum: [N], log of the sum of f over all candidates of row n, its positive included.
        num_candidates: K; by default N, one batch in which every row's candidates are all the rows. For several
            batches of B rows each, one after another, give B.
        across_ranks: every process of torch.distributed gave its own rows, at least one; the figures are those of all
            rows. All processes must call.

    Source: van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018, section 2.3;
    Poole, Ozair, van den Oord, Alemi, Tucker, "On variational bounds of mutual information", ICML 2019, equation 10.
    """
    owner = "info_nce_bound"
    group = _distributed.ranks(across_ranks)
    with group.failing_together(owner):
        check_numbers(owner, "positive", positive)
        check_numbers(owner, "log_sum", log_sum)
        if log_sum.shape != positive.shape:
            raise ValueError(
                f"{owner}: log_sum must be {tuple(positive.shape)} as positive, got {tuple(log_sum.shape)}"
            )
        if num_candidates is not None:
            check_counts(owner, num_candidates=num_candidates)
        differences = in_float64(positive) - in_float64(log_sum)
        if (differences > TOLERANCE * (1 + in_float64(log_sum).abs())).any():
            raise ValueError(
                f"{owner}: log_sum must include the positive, so be at least as large, "
                f"got positive − log_sum up to {float(differences.max()):.4g}"
            )
    differences = torch.cat(group.gather(differences.cpu()))
    candidates = len(differences) if num_candidates is None else num_candidates
    c, error = mean_and_error(differences)
    log_n = math.log(candidates)
    protocol = (
        f"c + log K over {len(differences)} rows, K = {candidates} candidates each; at most log K = {log_n:.3f} nats"
    )
    return InfoNCEBound(c + log_n, error, log_n, c, protocol)
