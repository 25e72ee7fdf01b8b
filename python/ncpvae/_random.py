"""Randomness that a `torch.Generator` or a seed governs, for code that has no generator argument to pass on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
