"""Sampling-importance-resampling: indices from softmax(log_weights), at once or streamed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, _library, reference
from .reference import TILE

_library.define(
    "sir_resample(Tensor log_weights, Tensor seed, SymInt num_samples=1) -> (Tensor, Tensor, Tensor)",
    reference.sir_resample,
    lambda log_weights, seed, num_samples=1: (
        log_weights.new_empty((log_weights.shape[0], num_samples), dtype=torch.int64),
        log_weights.new_empty(log_weights.shape[0], dtype=reference.accumulation_dtype(log_weights.dtype)),
        log_weights.new_empty(log_weights.shape[0], dtype=reference.accumulation_dtype(log_weights.dtype)),
    ),
)
_STATE = "Tensor {0}key, Tensor {0}index, Tensor {0}log_max, Tensor {0}total, Tensor {0}total_sq"
_STATE_OUT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_library.define(
    f"sir_update(Tensor log_weights, Tensor seed, {_STATE.format('')}, SymInt next_index, SymInt next_tile)"
    f" -> {_STATE_OUT}",
    reference.sir_update,
    lambda log_weights, seed, *state: tuple(torch.empty_like(s) for s in state[:5]),
)
_library.define(
    f"sir_merge({_STATE.format('')}, {_STATE.format('other_')}) -> {_STATE_OUT}",
    reference.sir_merge,
    lambda *states: tuple(torch.empty_like(s) for s in states[:5]),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[2])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx, _grad_index, grad_log_mean, grad_ess):
    """∂ log-mean/∂w = p and ∂ESS/∂w = 2·ESS·(p − p²/Σp²) with p = softmax(w); zero for rows that drew nothing."""
    log_weights, ess = ctx.saved_tensors
    p = torch.softmax(log_weights.to(ess.dtype), dim=1)
    usable = (ess > 0)[:, None]
    p, ess = torch.where(usable, p, 0.0), torch.where(usable[:, 0], ess, 0.0)
    dess = 2 * ess[:, None] * (p - p.square() * ess[:, None])
    grad = grad_log_mean[:, None] * p + grad_ess[:, None] * dess
    return grad.to(log_weights.dtype), None, None


_OP = _library.autograd("sir_resample", _backward, _setup_context)


def _check_weights(op: str, log_weights: Tensor, seed: Tensor) -> None:
    _check.floating(op, "log_weights", log_weights, dims=2)
    _check.at_least_one(op, "log_weights", log_weights, 1, "M")
    _check.seed(op, seed, "log_weights", log_weights)


def sir_resample(log_weights: Tensor, seed: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Draw proposals in proportion to their weights, with replacement (the resampling step of SIR).

    Args:
        log_weights: [B, M], nats, unnormalised; float16, bfloat16, float32 or float64. −inf is weight zero. Noise of
            order 1 is added in float64, so an offset common to all weights should stay below about 1e14.
        seed: int64 [2] from `draw_seed`. The same seed gives the same indices on every kernel.
        num_samples: n, draws kept per row.

    Returns:
        indices [B, n] int64, distributed exactly as softmax(log_weights);
        log_mean_weight [B], logsumexp(log_weights) − log M, which estimates log Z when the weights are r(z)
        at draws from the base; and ess [B], (Σw)²/Σw², the effective sample size (Owen 2013).
        A row of only −inf gives −1, −inf, 0. A row holding NaN or +inf gives −1, NaN, NaN. Other rows are
        untouched. The last two are differentiable, float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError: naming the argument that is off.

    Source: Rubin, "The calculation of posterior distributions by data augmentation: comment", 1987; used in
    NCP-VAE, section 3.3. Tile-wise Gumbel-max: see `ncpvae.ops.reference.sir_update`.
    """
    _check_weights("sir_resample", log_weights, seed)
    _check.count("sir_resample", "num_samples", num_samples)
    return _library.call(_OP, log_weights, seed, num_samples)


class SIRState(NamedTuple):
    """What streamed resampling remembers of the proposals seen: O(B·n) however many there were."""

    key: Tensor  # [B, n] float64, perturbed log-weight of the current choice
    indices: Tensor  # [B, n] int64, number of the chosen proposal, −1 for none
    log_max: Tensor  # [B] float64, largest log-weight
    total: Tensor  # [B] float64, Σ exp(w − log_max)
    total_sq: Tensor  # [B] float64, Σ exp(2 (w − log_max))
    num_seen: int  # proposals folded in
    next_index: int  # number of the next proposal
    next_tile: int  # number of the next tile of 1,024

    @property
    def log_mean_weight(self) -> Tensor:
        """[B] float64, logsumexp of the log-weights seen − log of their number."""
        return reference.sir_summary(self.log_max, self.total, self.total_sq, self.num_seen)[0]

    @property
    def ess(self) -> Tensor:
        """[B] float64, effective sample size of the proposals seen."""
        return reference.sir_summary(self.log_max, self.total, self.total_sq, self.num_seen)[1]


def sir_state(
    rows: int, num_samples: int = 1, device: torch.device | str | None = None, first_index: int = 0
) -> SIRState:
    """The state before any proposal.

    Args:
        rows: B.
        num_samples: n, draws kept per row.
        device: where the log-weights will be.
        first_index: number of the first proposal, a multiple of 1,024. States that will be merged must
            number their proposals apart, or they would share random words.
    """
    _check.count("sir_state", "rows", rows, minimum=0)
    _check.count("sir_state", "num_samples", num_samples)
    _check.count("sir_state", "first_index", first_index, minimum=0)
    if first_index % TILE:
        raise ValueError(f"sir_state: first_index must be a multiple of {TILE}, got {first_index}")
    if first_index >= TILE << 32:
        raise ValueError(f"sir_state: first_index must be below {TILE}·2³², where tiles run out, got {first_index}")
    key = torch.full((rows, num_samples), -math.inf, dtype=torch.float64, device=device)
    index = torch.full((rows, num_samples), -1, dtype=torch.int64, device=device)
    log_max = torch.full((rows,), -math.inf, dtype=torch.float64, device=device)
    zero = torch.zeros(rows, dtype=torch.float64, device=device)
    return SIRState(key, index, log_max, zero, zero.clone(), 0, first_index, first_index // TILE)


def _check_state(op: str, name: str, value: object) -> None:
    if not isinstance(value, SIRState):
        raise TypeError(f"{op}: {name} must be an SIRState from sir_state or sir_update, got {type(value).__name__}")


def sir_update(state: SIRState, log_weights: Tensor, seed: Tensor) -> SIRState:
    """Fold a further chunk of proposals into a resampling state; the state given is left as it was.

    Args:
        state: from `sir_state` or an earlier `sir_update`.
        log_weights: [B, m], nats: the chunk's m proposals, numbered on from the last chunk's.
        seed: the same seed for every chunk of one resampling.

    Chunks whose lengths are multiples of 1,024 (the last one free) give exactly `sir_resample`'s result on
    all proposals together; other lengths give a draw that is as valid but not the same. Not differentiable.
    """
    _check_state("sir_update", "state", state)
    _check_weights("sir_update", log_weights, seed)
    _check.same_device("sir_update", "state", state.key, "log_weights", log_weights)
    _check.shape("sir_update", "log_weights", log_weights, (state.key.shape[0], log_weights.shape[1]), "[B, m]")
    fields = torch.ops.ncpvae.sir_update(log_weights.detach(), seed, *state[:5], state.next_index, state.next_tile)
    m = log_weights.shape[1]
    tiles = (m + TILE - 1) // TILE
    counters = (state.num_seen + m, state.next_index + m, state.next_tile + tiles)
    return SIRState._make((*fields, *counters))


def sir_merge(state: SIRState, other: SIRState) -> SIRState:
    """Join two states of the same rows over disjoint proposals, from two ranks for example. Associative.

    The two must have been updated with the same seed and start from different `first_index`.
    """
    _check_state("sir_merge", "state", state)
    _check_state("sir_merge", "other", other)
    _check.same_device("sir_merge", "other", other.key, "state", state.key)
    _check.shape("sir_merge", "other.key", other.key, tuple(state.key.shape), "[B, n]")
    fields = torch.ops.ncpvae.sir_merge(*state[:5], *other[:5])
    counters = (
        state.num_seen + other.num_seen,
        max(state.next_index, other.next_index),
        max(state.next_tile, other.next_tile),
    )
    return SIRState._make((*fields, *counters))
