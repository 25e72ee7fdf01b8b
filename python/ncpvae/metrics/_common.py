"""What several metrics share: blocks of work dealt out to processes, and a mean with its error."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _distributed


def shared_blocks(
    owner: str,
    count: int,
    compute: Callable[[int], Tensor],
    describe: Callable[[], dict[str, object]],
    distributed: bool,
) -> list[Tensor]:
    """`compute(number)` of blocks 0 … count − 1, in order, on every process that shares the work.

    Args:
        describe: the arguments of the call, which must be the same on every process; asked only where there are more.
        distributed: every process of torch.distributed's default group computes its share; their tensors come back on
            the CPU. All must call.
    """
    ranks = _distributed.ranks(distributed)
    if ranks.size == 1:
        return [compute(number) for number in range(count)]
    _distributed.check_alike(owner, ranks.gather(describe()))
    mine: dict[int, Tensor] = {}
    with ranks.failing_together(owner):
        for number in ranks.mine(count):
            mine[number] = compute(number).cpu()
    every = {number: block for part in ranks.gather(mine) for number, block in part.items()}
    return [every[number] for number in range(count)]


def check_counts(owner: str, **counts: object) -> None:
    """Every named argument is an integer ≥ 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{owner}: {name} must be an integer ≥ 1, got {count!r}")


def check_seed(owner: str, seed: int | None, distributed: bool) -> None:
    """`seed` is one that `block_seed` takes, or None where this process works alone."""
    if seed is not None:
        _distributed.check_seed(owner, seed)
    elif distributed:
        raise ValueError(f"{owner}: seed must be an integer where distributed, got None")


def check_numbers(owner: str, name: str, values: object) -> None:
    """`values` is a tensor [N], N ≥ 1, of finite floating-point numbers."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor [N], got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{owner}: {name} must be floating point, got {values.dtype}")
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{owner}: {name} must be [N] with N ≥ 1, got shape {tuple(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError(f"{owner}: {name} must be finite, got NaN or infinity")


def in_float64(values: Tensor) -> Tensor:
    """The values in float64, on the CPU where their device has none of it."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of values [N] over examples and its standard error, NaN for one example."""
    values = in_float64(values)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
