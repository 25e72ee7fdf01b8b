"""Samplers of a reweighted distribution p(z) ∝ r(z) · base(z).

A sampler needs a distribution with a `base`, `log_ratio(z)`, `batch_shape` and `event_shape`, and nothing else.
Letters: B rows (independent sets of proposals), M proposals per row, n draws kept per row, T steps.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from . import _distributed, _random, ops
from .distributions import normal_parameters

TILE = ops.reference.TILE
MAX_ELEMENTS_HELD = 1 << 24  # of proposals in memory at once, over all rows, where chunks are one tile long


class ReweightedDistribution(Protocol):
    """What samplers ask of a distribution."""

    base: Distribution

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def event_shape(self) -> torch.Size: ...

    def log_ratio(self, z: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Diagnostics:
    """How a sampler fared.

    Attributes:
        ess: [B], effective sample size of each row's base draws, out of `num_proposals`.
        log_normalizer: [*batch], log Z estimated from all base draws, nats; on average below it (Jensen).
        num_proposals: base draws per row; for Langevin dynamics the number of starting draws.
        stopped: "num_proposals", "min_ess", "max_proposals" or "num_steps": what ended the sampling.
        seconds: wall-clock time.
    """

    ess: Tensor
    log_normalizer: Tensor
    num_proposals: int
    stopped: str
    seconds: float


class SampleResult(NamedTuple):
    """Samples [*shape, *batch, *event] and how they came about."""

    z: Tensor
    diagnostics: Diagnostics


class Sampler(Protocol):
    """`SIR`, `Langevin`, or one of your own."""

    def sample(
        self, distribution: ReweightedDistribution, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> SampleResult: ...


def _checked_shape(owner: str, distribution: object, shape: object) -> torch.Size:
    """`shape` as a torch.Size of at least one sample, and a distribution that can be sampled."""
    if not all(hasattr(distribution, name) for name in ("base", "log_ratio", "batch_shape", "event_shape")):
        raise TypeError(
            f"{owner}: distribution must have base and log_ratio, as a prior called like prior() returns it, "
            f"got {type(distribution).__name__}"
        )
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"{owner}: shape must be a tuple of integers, got {shape!r}")
    if min(shape, default=1) < 1:
        raise ValueError(f"{owner}: shape must hold at least one sample, got {tuple(shape)}")
    return torch.Size(shape)


def _number(owner: str, name: str, value: object, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (strict and value == 0):
        raise ValueError(f"{owner}: {name} must be finite and {'>' if strict else '≥'} 0, got {value}")


def _positive_int(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be ≥ 1, got {value}")


@dataclass(frozen=True)
class SIR:
    """Sampling-importance-resampling (NCP-VAE, section 3.3): keep one of M base draws, with probability ∝ r(z).

    Proposals are drawn, weighted and dropped chunk by chunk, so memory does not grow with their number.

    Args:
        num_proposals: M for each sample.
        chunk_size: proposals held per sample at a time; 1,024 by default. Multiples of 1,024 all use the same
            random draws and so, to rounding, give the same samples.
        min_ess: go on drawing until every row's effective sample size is at least this …
        max_proposals: … or it has had this many proposals; 100 · num_proposals by default. The diagnostics say which.
        draws_per_row: samples taken from each set of proposals. Above 1, M is shared: cheaper, each sample still
            has the same distribution, but samples of a set are dependent and may repeat.
        shard_proposals: share the work with the other processes of torch.distributed's default group, if there is
            one. All W must make the same call, with the same weights and their generators in the same state. Each
            draws all proposals, gives the classifier every W-th chunk of them, and gets the samples that one process
            alone would draw. The ratio may not draw random numbers. With `min_ess` the processes meet after every W
            chunks, otherwise once. For few samples with many proposals; many are better shared by `sample_sharded`.
    """

    num_proposals: int = 5000
    chunk_size: int | None = None
    min_ess: float | None = None
    max_proposals: int | None = None
    draws_per_row: int = 1
    shard_proposals: bool = False

    def __post_init__(self) -> None:
        _positive_int("SIR", "num_proposals", self.num_proposals)
        _positive_int("SIR", "draws_per_row", self.draws_per_row)
        for name in ("chunk_size", "max_proposals"):
            if getattr(self, name) is not None:
                _positive_int("SIR", name, getattr(self, name))
        if self.min_ess is not None:
            _number("SIR", "min_ess", self.min_ess, strict=True)
        if not isinstance(self.shard_proposals, bool):
            raise TypeError(f"SIR: shard_proposals must be a bool, got {type(self.shard_proposals).__name__}")
        if self.max_proposals is not None and self.min_ess is None:
            raise ValueError(f"SIR: max_proposals is the limit of min_ess and needs it, got {self.max_proposals} alone")
        if self.max_proposals is not None and self.max_proposals < self.num_proposals:
            raise ValueError(
                f"SIR: max_proposals must be ≥ num_proposals, got {self.max_proposals} < {self.num_proposals}"
            )

    @torch.no_grad()
    def sample(
        self,
        distribution: ReweightedDistribution,
        shape: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> SampleResult:
        """Draw [*shape, *batch, *event] and the diagnostics.

        Raises:
            ValueError: where the log-ratio of a row's proposals is NaN, +inf, or −inf for all of them; where processes
                that share proposals differ in settings, shape, generator or base.
            RuntimeError: where another of these processes fails, with its number and message.
        """
        start = time.perf_counter()
        shape, batch, n = _checked_shape("SIR", distribution, shape), distribution.batch_shape, self.draws_per_row
        sets = -(-shape.numel() // n)  # of proposals, per element of the batch
        per_block = max(1, MAX_ELEMENTS_HELD // (TILE * batch.numel() * distribution.event_shape.numel()))
        ranks = _distributed.ranks(self.shard_proposals)
        call = f"{self} for {list(shape)} × {list(batch)} × {list(distribution.event_shape)}"
        _distributed.check_alike("SIR", ranks.gather({"the call": call}))
        with _random.scoped(generator):
            blocks = [self._block(distribution, min(per_block, sets - i)) for i in range(0, sets, per_block)]
        z = torch.cat([z for z, *_ in blocks])  # [sets, n, *batch, *event]
        z = z.flatten(0, 1)[: shape.numel()].view(*shape, *batch, *distribution.event_shape)
        ess = torch.cat([state.ess for _, state, _ in blocks])
        log_sums = [(s.log_mean_weight + math.log(s.num_seen)).view(-1, *batch) for _, s, _ in blocks]
        count = sum(s.num_seen * (s.log_max.numel() // batch.numel()) for _, s, _ in blocks)
        log_normalizer = torch.cat(log_sums).logsumexp(0) - math.log(count)
        used = max(state.num_seen for _, state, _ in blocks)
        stopped = {s for *_, s in blocks}
        reason = "max_proposals" if "max_proposals" in stopped else stopped.pop()
        return SampleResult(z, Diagnostics(ess, log_normalizer, used, reason, time.perf_counter() - start))

    def _block(self, distribution: ReweightedDistribution, sets: int) -> tuple[Tensor, ops.SIRState, str]:
        """`sets` sets of proposals for each element of the batch: z [sets, n, *batch, *event], state, reason."""
        event, n = distribution.event_shape, self.draws_per_row
        seed = ops.draw_seed()  # before any proposal, so that the chunk size moves no random number
        ranks = _distributed.ranks(self.shard_proposals)
        chunks = self._proposals(distribution, sets)
        if ranks.size == 1:
            state, z = self._streamed(distribution, chunks, seed)
        else:
            state, z = self._shared(distribution, chunks, seed, ranks)
        empty = (state.indices < 0).any(1)
        if empty.any():
            first_empty = int(empty.nonzero()[0])
            raise ValueError(
                f"SIR: log_ratio must be finite for some proposal and never NaN or +inf, got log mean weight "
                f"{float(state.log_mean_weight[first_empty])} for row {first_empty} of {len(z)}"
            )
        batch = distribution.batch_shape
        z = z.view(sets, *batch, n, *event).movedim(1 + len(batch), 1)
        if self.min_ess is None:
            return z, state, "num_proposals"
        return z, state, "min_ess" if self._enough(state) else "max_proposals"

    def _streamed(
        self, distribution: ReweightedDistribution, chunks: Iterator[Tensor], seed: Tensor
    ) -> tuple[ops.SIRState, Tensor]:
        """The state after all proposals and the chosen z [rows, n, *event]; a chunk is [m, sets, *batch, *event]."""
        state: ops.SIRState | None = None
        for proposals in chunks:
            if state is None:
                state, z = self._before(distribution, proposals)
                seed = seed.to(z.device)
            state, z = _fold(state, z, proposals, distribution, seed)
            if self._enough(state):
                break
        assert state is not None
        return state, z

    def _shared(
        self, distribution: ReweightedDistribution, chunks: Iterator[Tensor], seed: Tensor, ranks: _distributed.Ranks
    ) -> tuple[ops.SIRState, Tensor]:
        """`_streamed` by several processes, in rounds after which the processes' states are merged.

        A round is all chunks. With `min_ess` it is W chunks, one for each process, and the states are merged in the
        order of the chunks with a look at the ESS after each, so that the sampling ends where one process would end
        it; what was drawn beyond that is taken back from the generators.
        """
        state: ops.SIRState | None = None
        enough = False
        while not enough:
            share: ops.SIRState | None = None
            random_states = []
            with ranks.failing_together("SIR"):
                for number, proposals in enumerate(islice(chunks, None if self.min_ess is None else ranks.size)):
                    if state is None:
                        state, z = self._before(distribution, proposals)
                        held, seed = state.indices, seed.to(z.device)  # held: numbers of the proposals in z
                    if share is None:
                        share, candidate = self._before(distribution, proposals)
                        share = share._replace(next_index=state.next_index, next_tile=state.next_tile)
                    if number % ranks.size == ranks.rank:
                        share, candidate = _fold(share, candidate, proposals, distribution, seed)
                    else:
                        share = skip_proposals(share, len(proposals))
                    if self.min_ess is not None:
                        random_states.append(_random_state(z.device))
            if share is None:
                break  # no proposals are left; all processes come here at once, having drawn the same ones
            assert state is not None
            drawn = {"the generator's draw": seed.tolist(), "the base": _distributed.fingerprint(proposals[-1])}
            for number, part in enumerate(gather_states("SIR", ranks, share, drawn)):
                state = ops.sir_merge(state, part)
                enough = self._enough(state)
                if enough:
                    _restore(random_states[number], z.device)
                    break
            won = state.indices == share.indices
            held, z = torch.where(won, share.indices, held), torch.where(_like(won, z), candidate, z)
        assert state is not None
        return state, ranks.combine(torch.where(_like(state.indices == held, z), z, 0))

    def _before(self, distribution: ReweightedDistribution, proposals: Tensor) -> tuple[ops.SIRState, Tensor]:
        """The state before any proposal, for chunks such as `proposals`, and room for the chosen z."""
        rows, n = proposals[0].numel() // distribution.event_shape.numel(), self.draws_per_row
        return ops.sir_state(rows, n, proposals.device), proposals.new_zeros(rows, n, *distribution.event_shape)

    def _enough(self, state: ops.SIRState) -> bool:
        """Whether `min_ess` is reached; it is looked at, which waits for the device, only where it is asked for."""
        if self.min_ess is None or state.num_seen < self.num_proposals:
            return False
        return bool((state.ess >= self.min_ess).all())

    def _proposals(self, distribution: ReweightedDistribution, sets: int) -> Iterator[Tensor]:
        """Chunks of base draws, made in pieces of at most one tile so that the chunk size moves no random number."""
        limit = self.num_proposals if self.min_ess is None else self.max_proposals or 100 * self.num_proposals
        chunk = self.chunk_size or TILE
        for start in range(0, limit, chunk):
            stop = min(start + chunk, limit)
            pieces = [min(TILE, stop - i) for i in range(start, stop, TILE)]
            yield torch.cat([distribution.base.sample((m, sets)) for m in pieces])


def _fold(
    state: ops.SIRState, z: Tensor, proposals: Tensor, distribution: ReweightedDistribution, seed: Tensor
) -> tuple[ops.SIRState, Tensor]:
    """The state and the chosen z [rows, n, *event] after a further chunk of proposals [m, sets, *batch, *event]."""
    log_weights = distribution.log_ratio(proposals).flatten(1).T  # [rows, m]
    proposals = proposals.reshape(len(proposals), len(z), *z.shape[2:])
    first, chosen = state.next_index, state.indices
    state = ops.sir_update(state, log_weights, seed)
    row = torch.arange(len(z), device=z.device)[:, None]
    candidate = proposals[(state.indices - first).clamp_min(0), row]  # [rows, n, *event]
    return state, torch.where(_like(state.indices != chosen, z), candidate, z)


def _like(mask: Tensor, z: Tensor) -> Tensor:
    """A mask [rows, n] that broadcasts against z [rows, n, *event]."""
    return mask.view(*mask.shape, *(1,) * (z.dim() - 2))


def skip_proposals(state: ops.SIRState, count: int) -> ops.SIRState:
    """The state with the numbers of the next `count` proposals, one chunk, left to another process."""
    tiles = -(-count // TILE)
    return state._replace(next_index=state.next_index + count, next_tile=state.next_tile + tiles)


def gather_states(
    owner: str, ranks: _distributed.Ranks, state: ops.SIRState, drawn: Mapping[str, object]
) -> list[ops.SIRState]:
    """Every rank's state, in order of rank, on the device of `state`; `drawn` is what they must have in common."""

    def on(device: torch.device | str, state: ops.SIRState) -> ops.SIRState:
        return ops.SIRState._make((*(field.to(device) for field in state[:5]), *state[5:]))

    parts = ranks.gather((drawn, on("cpu", state)))
    _distributed.check_alike(owner, [drawn for drawn, _ in parts])
    return [on(state.key.device, part) for _, part in parts]


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of torch's global generators for the CPU and for `device`."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


@dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin dynamics from a base draw (NCP-VAE, section 3.3): z ← z − ½λ∇E(z) + √λ ε.

    Args:
        num_steps: T.
        step_size: λ > 0, in squared units of z, or of ε where `space` is "epsilon".
        space: "z", or "epsilon": run on ε with z = μ + σε, so that the base's σ scales out. The latter, and the
            fused base gradient in the former, need a base with independent Normal coordinates; other bases are
            differentiated through `log_prob`.
        temperature: scales the noise's variance; 1 samples, 0 climbs to a mode.
    """

    num_steps: int = 1000
    step_size: float = 1e-2
    space: str = "z"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive_int("Langevin", "num_steps", self.num_steps)
        _number("Langevin", "step_size", self.step_size, strict=True)
        _number("Langevin", "temperature", self.temperature)
        if self.space not in ("z", "epsilon"):
            raise ValueError(f"Langevin: space must be 'z' or 'epsilon', got {self.space!r}")

    @torch.no_grad()
    def sample(
        self,
        distribution: ReweightedDistribution,
        shape: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> SampleResult:
        """Draw [*shape, *batch, *event]; ESS and log Z in the diagnostics are those of the starting base draws.

        Raises:
            TypeError: for "epsilon" with a base that is not Normal with independent coordinates.
            ValueError: where a chain leaves the finite numbers, with the advice to take smaller steps.
            RuntimeError: under `torch.inference_mode()`, which forbids the gradients that the steps need.
        """
        start = time.perf_counter()
        shape = _checked_shape("Langevin", distribution, shape)
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Langevin: needs gradients, which torch.inference_mode() forbids; use torch.no_grad()")
        base = distribution.base
        normal = normal_parameters(base)
        if self.space == "epsilon" and normal is None:
            raise TypeError(f"Langevin: space 'epsilon' needs a Normal base, got {type(base).__name__}")
        with _random.scoped(generator):
            z = base.sample(shape).contiguous()
            seed = ops.draw_seed(z.device)
        log_ratio = distribution.log_ratio(z)
        next_step = torch.tensor([0, 1], device=z.device)
        if self.space == "epsilon":
            assert normal is not None
            mean, std = normal
            to_z, state = (lambda e: mean + std * e), (z - mean) / std
            prior = {"base_mean": torch.zeros_like(std), "base_std": torch.ones_like(std)}
        else:
            to_z, state = (lambda v: v), z
            prior = {} if normal is None else {"base_mean": normal[0], "base_std": normal[1]}
        for _ in range(self.num_steps):
            score = self._score(distribution, to_z, state, with_base=normal is None)
            ops.langevin_step_(state, score, seed, self.step_size, **prior, temperature=self.temperature)
            seed = seed + next_step
        z = to_z(state)
        if not torch.isfinite(z).all():
            raise ValueError(f"Langevin: a chain diverged; step_size must be smaller than {self.step_size} here")
        batch, count = distribution.batch_shape, shape.numel()
        rows = log_ratio.reshape(count, -1).T
        base_draws = ops.sir_update(ops.sir_state(len(rows), device=rows.device), rows, ops.draw_seed(rows.device))
        log_normalizer = base_draws.log_mean_weight.view(batch)
        return SampleResult(
            z, Diagnostics(base_draws.ess, log_normalizer, count, "num_steps", time.perf_counter() - start)
        )

    @staticmethod
    def _score(distribution: ReweightedDistribution, to_z, state: Tensor, with_base: bool) -> Tensor:
        """∇ of log r, and of log base where the op does not add it, with respect to the chain's own variable."""
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            z = to_z(state)
            log_p = distribution.log_ratio(z)
            if with_base:
                log_p = log_p + distribution.base.log_prob(z)
            return torch.autograd.grad(log_p.sum(), state)[0].contiguous()
