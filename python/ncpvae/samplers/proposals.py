"""Draws of a base prior as proposals: chunk by chunk, the same ones whatever the chunks.

A Normal base is drawn by the ops' own counter-based noise. That takes a fraction of the time of torch's CPU
generator, whose draws come one after the other on one thread, and a chunk can be drawn without those before it.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from .. import _distributed, ops
from ..distributions import normal_parameters

TILE = ops.reference.TILE
MAX_NOISE = 1 << 18  # Normals from one call of the op: 1 MiB in float32, and cheap beside the call


class BaseDraws(Protocol):
    """Draws in chunks; the length of every chunk but the last is a multiple of 1,024, or else other draws come."""

    shape: tuple[int, ...]  # of draws side by side

    @property
    def like(self) -> Tensor:
        """A tensor with the draws' dtype and device; it exists once something was drawn or skipped."""

    def draw(self, count: int) -> Tensor:
        """The next `count` draws [count, *shape, *batch, *event], in a tensor that the next call may overwrite."""

    def skip(self, count: int) -> None:
        """Leave the next `count` draws to another process."""

    def fingerprint(self) -> str:
        """Something that differs where the base does, to be compared between processes."""


def base_draws(base: Distribution, shape: tuple[int, ...] = ()) -> BaseDraws:
    """Draws of `base`, `shape` of them side by side; torch's global generator governs them."""
    innermost = base
    while type(innermost) is Independent:
        innermost = innermost.base_dist
    normal = normal_parameters(base)
    if normal is None or type(innermost) is not Normal:  # a class of one's own may draw in its own way
        return _SequentialDraws(base, shape)
    return _NormalDraws(*normal, shape)


class _NormalDraws:
    """mean + std·ε, with ε from `ops.langevin_step` at z = 0 without score: the draw depends on its number alone."""

    def __init__(self, mean: Tensor, std: Tensor, shape: tuple[int, ...]):
        self.mean, self.std, self.shape, self.unit = mean, std, shape, TILE
        draw = torch.Size((*shape, *mean.shape))
        while self.unit > 1 and self.unit * draw.numel() > MAX_NOISE:
            self.unit //= 2  # stays a divisor of the tile, so that no unit straddles the end of a chunk
        self.zeros, self.held = mean.new_zeros(self.unit, *draw), mean.new_empty(0, *draw)
        self.seed, self.next_tile = ops.draw_seed(mean.device), 0
        self.next_stream = torch.tensor([0, 1], device=mean.device)

    @property
    def like(self) -> Tensor:
        return self.mean

    def draw(self, count: int) -> Tensor:
        if len(self.held) < count:
            # kept, because fresh memory costs about as much as the noise that goes into it
            self.held = self.mean.new_empty(count, *self.held.shape[1:])
        number = self.next_tile * (TILE // self.unit)
        for unit in self.held[:count].split(self.unit):
            zeros, seed = self.zeros[: len(unit)], torch.add(self.seed, self.next_stream, alpha=number)
            torch.addcmul(self.mean, ops.langevin_step(zeros, zeros, seed, 1.0), self.std, out=unit)
            number += 1
        self.skip(count)
        return self.held[:count]

    def skip(self, count: int) -> None:
        self.next_tile += -(-count // TILE)

    def fingerprint(self) -> str:
        return _distributed.fingerprint(torch.stack([self.mean, self.std]))


class _SequentialDraws:
    """Draws by the base's own `sample`, in pieces of at most one tile so that the chunk size moves no random number."""

    def __init__(self, base: Distribution, shape: tuple[int, ...]):
        self.base, self.shape = base, shape
        self.last: Tensor | None = None

    @property
    def like(self) -> Tensor:
        assert self.last is not None
        return self.last

    def draw(self, count: int) -> Tensor:
        pieces = [min(TILE, count - start) for start in range(0, count, TILE)]
        draws = torch.cat([self.base.sample(torch.Size((piece, *self.shape))) for piece in pieces])
        self.last = draws[-1].clone()
        return draws

    def skip(self, count: int) -> None:
        self.draw(count)  # what another process draws must be drawn here too, for the generators to stay in step

    def fingerprint(self) -> str:
        return _distributed.fingerprint(self.like)
