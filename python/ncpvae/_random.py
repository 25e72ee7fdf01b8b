"""Randomness that a `torch.Generator` or a seed governs, for code that has no generator argument to pass on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MASK = 2**64 - 1


@contextmanager
def scoped(generator: torch.Generator | int | None) -> Iterator[None]:
    """Within the block torch's global generators run from `generator` (or seed) and are restored after it.

    torch.distributions and the layers of torch.nn draw from the global generators only. A generator is
    advanced by one draw, the block's seed. None leaves everything as it is.
    """
    if generator is None:
        yield
        return
    if isinstance(generator, torch.Generator):
        draw = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, generator=generator, device=generator.device)
        seed = int(draw)
    else:
        seed = generator
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        yield


def derived_seed(seed: int, *position: int) -> int:
    """A seed for each position, (step, shard) for example, of a run with `seed`; 0 … 2⁶³ − 1.

    Every number goes through the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014), so that neighbouring positions have unrelated seeds. torch's CPU generator looks at the
    low 32 bits alone: of n positions about n² / 2³³ pairs share a stream.
    """
    value = seed & MASK
    for number in position:
        value = (value + 0x9E3779B97F4A7C15 * (number + 1)) & MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        value ^= value >> 31
    return value >> 1


def reseed(seed: int) -> None:
    """Set the global generators of the CPU and of a CUDA device in use: `torch.manual_seed` at a hundredth the cost."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
