"""Seeds for the ops' own counter-based randomness."""

import torch
from torch import Tensor

_SEED_END = 2**63 - 1


def draw_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed for one call of an op from torch's generator, so that `torch.manual_seed` governs the ops.

    Args:
        device: where the seed lives; it must be the device of the op's other arguments. Defaults to the
            generator's device, or the CPU.
        generator: the generator to draw from; torch's default one for `device` otherwise.

    Returns:
        int64 tensor [2] = (key, stream). Adding k to the stream gives the seed of the k-th further step of a
        chain. Use a seed for one call only: two ops given the same seed see the same random words.
    """
    source = generator.device if generator is not None else torch.device("cpu" if device is None else device)
    seed = torch.randint(0, _SEED_END, (2,), dtype=torch.int64, device=source, generator=generator)
    return seed if device is None else seed.to(device)
