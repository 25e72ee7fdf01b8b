"""Mutual information between data and codes, I(x; z) = E[log q(z|x) − log q(z)], and the marginal KL(q(z) ‖ p(z)).

Letters: N examples, B of a minibatch, R rows of a block, D coordinates of z, S draws per example.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .. import _distributed, _random, ops
from ._common import check_counts, check_seed, mean_and_error, shared_blocks
from .posteriors import Posteriors


@dataclass(frozen=True)
class MutualInformation:
    """Estimated mutual information between the examples of a data set and their codes, nats.

    Attributes:
        value: mean over the examples. Where the posterior has collapsed it lies around 0, a little below it too.
        standard_error: of that mean over examples.
        log_n: the largest possible value: log N, of the minibatch form log B. A value near it says only that the codes
            can be told apart; how much more they hold, a larger N would show.
        per_example: [N], means over the draws of log q(z|x) − log q(z).
        marginal_kl: KL(q(z) ‖ p(z)), what is left of the mean KL(q(z|x) ‖ p(z)) = I(x; z) + KL(q(z) ‖ p(z)); it is 0
            where the prior fits the codes. None where no prior was given.
        marginal_kl_standard_error: of that mean over examples; None likewise.
        protocol: how it was computed.
    """

    value: float
    standard_error: float
    log_n: float
    per_example: Tensor = field(repr=False)
    marginal_kl: float | None
    marginal_kl_standard_error: float | None
    protocol: str


@torch.no_grad()
def mutual_information(
    posteriors: Posteriors,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    num_samples: int = 1,
    max_rows: int = 4096,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> MutualInformation:
    """I(x; z) = E[log q(z|x) − log q(z)] with q(z) = 1/N Σ_n q(z|x_n) over the whole data set.

    For these N examples the estimate is unbiased, and it cannot exceed log N. As an estimate for the distribution that
    the examples come from it is good only well below log N. Both densities are taken at the same draw: their
    difference has no noise where all posteriors are equal, and none where they are far apart.

    Time is O(S·N²·D), memory O(N·D). Apart from what prior_log_prob may draw, and but for rounding, neither
    max_rows nor the device changes the figures; the number of processes does not at all.

    Args:
        posteriors: q(z|x_n) of the data set, by `collect_posteriors`.
        prior_log_prob: z [R, D] → log p(z) [R], nats, to get the marginal KL too: the `log_prob` of a base, of a noise
            contrastive prior, or its `snis_log_prob`, with which the KL is an upper bound.
        num_samples: S draws z per example.
        max_rows: R, the most rows z given to the op and to prior_log_prob at once, and what processes share.
        seed: of the draws, torch's global generators being left as they were; None uses those.
        device: where the densities are computed; where the posteriors are by default.
        distributed: share the blocks of rows with the other processes of torch.distributed's default group, if there
            is one. All must make the same call, and get the figures that one process would get.

    Raises:
        ValueError, TypeError: naming the argument that is off, or that differs between the processes.
        RuntimeError: where another of the processes fails, with its number and message.

    Source: Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016
    (q(z), the index of the example and the sum of two KLs).
    """
    owner = "mutual_information"
    _check(owner, posteriors, seed, distributed, num_samples=num_samples, max_rows=max_rows)
    n = len(posteriors)
    everything = slice(0, n)
    blocks = [(slice(start, min(start + max_rows, n)), everything) for start in range(0, n, max_rows)]
    terms = _terms(owner, posteriors, blocks, prior_log_prob, num_samples, seed, device, distributed)
    protocol = (
        f"mean of log q(z|x) − log q(z), q(z) over all {n} examples, {num_samples} draws per example, seed {seed}; "
        f"at most log N = {math.log(n):.3f} nats"
    )
    return _summary(terms, n, protocol)


@torch.no_grad()
def minibatch_mutual_information(
    posteriors: Posteriors,
    batch_size: int,
    num_samples: int = 1,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> MutualInformation:
    """E[log q(z|x) − log q_B(z)] with q_B(z) = 1/B Σ q(z|x_n) over a minibatch of B examples, x among them.

    Only to compare with published figures: much of the literature on posterior collapse prints this as the mutual
    information. It cannot exceed log B, whatever z holds, and near that says more of the batch size than of the model.
    On 10,000 linear-Gaussian posteriors with an information of 36.8 nats in 32 dimensions it gave 3.46, 4.16 and 6.91
    at B = 32, 64 and 1024 (whole set: 9.21 = log N), with one of 3 nats in 4 dimensions 2.41, 2.63 and 2.96 (whole
    set: 3.00).

    The published form takes the mean of log q(z|x) in closed form; at the draws themselves its expectation is the same
    and its noise less.

    Args:
        batch_size: B, 2 … N; the examples are shuffled by the seed and taken B at a time, the last batch being smaller
            where B does not divide N.
        posteriors, num_samples, seed, device, distributed: as for `mutual_information`; processes share batches.

    Source: the code published with He, Spokoyny, Neubig, Berg-Kirkpatrick, "Lagging inference networks and posterior
    collapse in variational autoencoders", ICLR 2019.
    """
    owner = "minibatch_mutual_information"
    _check(owner, posteriors, seed, distributed, num_samples=num_samples, batch_size=batch_size)
    n = len(posteriors)
    if not 2 <= batch_size <= n:
        raise ValueError(f"{owner}: batch_size must be 2 … {n}, the number of examples, got {batch_size}")
    with _random.scoped(None if seed is None else _distributed.block_seed(seed, num_samples)):
        order = torch.randperm(n).to(posteriors.mean.device)
    shuffled = Posteriors(posteriors.mean[order], posteriors.log_std[order])
    batches = [slice(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    blocks = [(batch, batch) for batch in batches]
    terms = _terms(owner, shuffled, blocks, None, num_samples, seed, device, distributed)
    in_order = terms[:, order.argsort().to(terms.device)]
    protocol = (
        f"mean of log q(z|x) − log q(z), q(z) over minibatches of {batch_size} out of {n} examples only, {num_samples} "
        f"draws per example, seed {seed}; at most log B = {math.log(batch_size):.3f} nats, whatever the codes hold"
    )
    return _summary(in_order, batch_size, protocol)


def _terms(
    owner: str,
    posteriors: Posteriors,
    blocks: list[tuple[slice, slice]],
    prior_log_prob: Callable[[Tensor], Tensor] | None,
    num_samples: int,
    seed: int | None,
    device: torch.device | str | None,
    distributed: bool,
) -> Tensor:
    """log q(z|x) − log q(z), and log q(z) − log p(z) where there is a prior: [1 or 2, N], means over the draws.

    A block is the rows of the posteriors that are drawn from, and the rows that are the components of its q(z).
    """
    home = torch.device(posteriors.mean.device if device is None else device)
    mean, log_std = (value.flatten(1).to(home) for value in (posteriors.mean, posteriors.log_std))  # [N, D]

    @lru_cache(maxsize=1)
    def draws(sample: int) -> Tensor:
        # For all rows at once, and on the CPU: the draws depend on neither the blocks nor the device.
        with _random.scoped(None if seed is None else _distributed.block_seed(seed, sample)):
            noise = torch.randn(mean.shape, dtype=mean.dtype).to(home)
        return mean + log_std.exp() * noise

    def of_block(number: int) -> Tensor:
        sample, block = divmod(number, len(blocks))
        rows, components = blocks[block]
        z = draws(sample)[rows]  # [R, D]
        log_posterior = _log_normal(z, mean[rows], log_std[rows])
        log_marginal = ops.gaussian_logsumexp(z, mean[components], log_std[components])
        log_marginal = log_marginal - math.log(components.stop - components.start)
        terms = [log_posterior - log_marginal]
        if prior_log_prob is not None:
            with _random.scoped(None if seed is None else _distributed.block_seed(seed, num_samples + number)):
                log_prior = prior_log_prob(z.view(-1, *posteriors.mean.shape[1:]))
            _check_log_prior(owner, log_prior, len(z))
            terms.append(log_marginal - log_prior)
        return torch.stack(terms)

    def call() -> dict[str, object]:
        marks = f"{_distributed.fingerprint(mean)}, {_distributed.fingerprint(log_std)}"
        described = {"posteriors": marks, "blocks": len(blocks), "num_samples": num_samples, "seed": seed}
        return described | {"whether there is a prior": prior_log_prob is not None}

    every = shared_blocks(owner, num_samples * len(blocks), of_block, call, distributed)
    terms = torch.cat(every, 1).to(home)  # [1 or 2, S·N]
    return terms.view(len(terms), num_samples, -1).mean(1)


def _log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(z; mean, std²) row by row, [R], rounded as in `ops.gaussian_logsumexp`."""
    squares = ((z - mean) * torch.exp(-log_std)).square()
    return -0.5 * squares.sum(1) - log_std.sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def _check(owner: str, posteriors: object, seed: int | None, distributed: bool, **counts: object) -> None:
    if not isinstance(posteriors, Posteriors):
        raise TypeError(
            f"{owner}: posteriors must be Posteriors, as collect_posteriors gives them, got {type(posteriors).__name__}"
        )
    check_counts(owner, **counts)
    check_seed(owner, seed, distributed)


def _check_log_prior(owner: str, log_prior: Tensor, rows: int) -> None:
    if not isinstance(log_prior, Tensor) or log_prior.shape != (rows,):
        got = tuple(log_prior.shape) if isinstance(log_prior, Tensor) else type(log_prior).__name__
        raise ValueError(f"{owner}: prior_log_prob must return log p(z) of shape {(rows,)}, got {got}")
    if log_prior.isnan().any():
        raise ValueError(f"{owner}: prior_log_prob must not return NaN")


def _summary(terms: Tensor, components: int, protocol: str) -> MutualInformation:
    value, error = mean_and_error(terms[0])
    marginal_kl, marginal_error = mean_and_error(terms[1]) if len(terms) > 1 else (None, None)
    return MutualInformation(value, error, math.log(components), terms[0], marginal_kl, marginal_error, protocol)
