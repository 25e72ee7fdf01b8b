"""Many samples from many processes: blocks of samples, each with a seed of its own, dealt out to the processes.

The samples are the same for any number of processes. For few samples with many proposals each see
`SIR(shard_proposals=True)`. Letters: W processes.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import _distributed, _random
from .samplers import SIR, Diagnostics, Langevin, ReweightedDistribution, Sampler, SampleResult


def sample_blocks(
    distribution: ReweightedDistribution,
    num: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    block_size: int = 256,
) -> Iterator[tuple[int, SampleResult]]:
    """This process's share of `num` samples, block by block: (number of the block's first sample, its samples).

    Every block has a seed of its own, made from `seed` and the block's number, and every W-th block is this process's.
    So no draw is repeated, and a block's samples do not depend on the number of processes. Nothing is communicated.
    torch's global generators are left as they were.

    Args:
        num: samples of all processes together, for each element of the batch.
        sampler: `SIR()` by default.
        seed: 0 … 2⁶³ − 1, the same on every process.
        block_size: samples in a block, the last one excepted; another size gives other samples. A multiple of
            `draws_per_row` where the sampler is `SIR`.

    Example:
        >>> prior = NoiseContrastivePrior(Normal(8), MLPClassifier(8, hidden=(64, 64)))
        >>> [first for first, result in sample_blocks(prior(), 600, SIR(num_proposals=100))]
        [0, 256, 512]
    """
    for name, value in (("num", num), ("block_size", block_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"sample_blocks: {name} must be an integer ≥ 1, got {value!r}")
    _distributed.check_seed("sample_blocks", seed)
    sampler = SIR() if sampler is None else sampler
    if not hasattr(sampler, "sample"):
        raise TypeError(f"sample_blocks: sampler must be SIR(), Langevin() or the like, got {type(sampler).__name__}")
    if isinstance(sampler, SIR) and sampler.shard_proposals:
        raise ValueError("sample_blocks: sampler must not shard its proposals where the samples are sharded")
    if isinstance(sampler, SIR) and block_size % sampler.draws_per_row:
        raise ValueError(
            f"sample_blocks: block_size must be a multiple of the sampler's draws_per_row, got {block_size} "
            f"and {sampler.draws_per_row}"
        )
    return _blocks(distribution, num, sampler, seed, block_size)


def _blocks(
    distribution: ReweightedDistribution, num: int, sampler: Sampler, seed: int, block_size: int
) -> Iterator[tuple[int, SampleResult]]:
    for block in _distributed.ranks().mine(-(-num // block_size)):
        first = block * block_size
        with _random.scoped(_distributed.block_seed(seed, block)):
            result = sampler.sample(distribution, (min(block_size, num - first),))
        yield first, result


def sample_sharded(
    distribution: ReweightedDistribution,
    num: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    block_size: int = 256,
) -> SampleResult:
    """`num` samples [num, *batch, *event], drawn by all processes together and gathered on each of them.

    Arguments and samples are those of `sample_blocks`, the same for any number of processes. Every process of
    torch.distributed's default group must make the call, with the same weights; without a group this one draws all.
    The diagnostics are of all samples, `seconds` excepted.

    Raises:
        ValueError: where the arguments of the processes differ.
        RuntimeError: where another process fails, with its number and message.
    """
    start, ranks = time.perf_counter(), _distributed.ranks()
    share = sample_blocks(distribution, num, sampler, seed, block_size)
    with _random.scoped(seed):
        probe = distribution.base.sample()  # its device is that of the samples, also where no block is this process's
    settings = repr(sampler) if isinstance(sampler, (SIR, Langevin)) else type(sampler).__name__
    call = {"num": num, "sampler": settings, "seed": seed, "block_size": block_size}
    _distributed.check_alike("sample_sharded", ranks.gather(call | {"the base": _distributed.fingerprint(probe)}))
    with ranks.failing_together("sample_sharded"):
        mine = [(first, result if ranks.size == 1 else _moved(result, "cpu")) for first, result in share]
    blocks = sorted((block for part in ranks.gather(mine) for block in part), key=lambda block: block[0])
    results = [_moved(result, probe.device) for _, result in blocks]
    z, diagnostics = torch.cat([r.z for r in results]), _joined([r.diagnostics for r in results])
    return SampleResult(z, replace(diagnostics, seconds=time.perf_counter() - start))


def _joined(blocks: list[Diagnostics]) -> Diagnostics:
    """The diagnostics of several blocks as those of one; a block's log Z counts by its number of base draws."""
    ess = torch.cat([d.ess for d in blocks])
    counts = [len(d.ess) * d.num_proposals for d in blocks]
    log_sums = torch.stack([d.log_normalizer + math.log(n) for d, n in zip(blocks, counts, strict=True)])
    reasons = [d.stopped for d in blocks]
    return Diagnostics(
        ess,
        log_sums.logsumexp(0) - math.log(sum(counts)),
        max(d.num_proposals for d in blocks),
        "max_proposals" if "max_proposals" in reasons else reasons[0],
        sum(d.seconds for d in blocks),
    )


def _moved(result: SampleResult, device: torch.device | str) -> SampleResult:
    d = result.diagnostics
    moved = replace(d, ess=d.ess.to(device), log_normalizer=d.log_normalizer.to(device))
    return SampleResult(result.z.to(device), moved)
