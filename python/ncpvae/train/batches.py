"""What a stage trains on, tensors in memory or any iterable of batches, as the loop's batches and their shards."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from .. import _random
from .._distributed import ranks
from .execution import check_count

Data = Tensor | Iterable[Any]
# positions that draw from streams of their own
FETCH, VALIDATION, EPOCH = -1, -2, -3


def minibatches(
    num_examples: int, batch_size: int, seed: int, start_step: int = 0, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Endless batches of indices on `device`; batch `step` is a pure function of (seed, step).

    Every epoch is a fresh permutation, and its incomplete last batch is dropped (kept when it is the only one).
    """
    check_count("batch_size", batch_size)
    batch_size = min(batch_size, num_examples)
    per_epoch = num_examples // batch_size
    epoch, first = divmod(start_step, per_epoch)
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(num_examples, generator=generator).to(device)
        yield from order[first * batch_size : per_epoch * batch_size].split(batch_size)
        epoch, first = epoch + 1, 0


def source(
    function: str, name: str, data: Data, batch_size: int, seed: int, rows: Tensor | None = None
) -> tuple[Callable[[int], Iterator[Any]], Callable[[Any], Tensor]]:
    """The loop's batches, and the function from one of them to the examples [B, …].

    A tensor stays where it is; its batches are indices on its device, in an order that is a function of seed and
    step, and are gathered there. With `rows`, indices on its device, only those of its rows are used.

    An iterable is gone through again and again, in its own order; what it yields are tensors, or tuples, lists or dicts
    the first of whose tensors is taken. Where it draws from torch's global generators, as a shuffling DataLoader
    does when an epoch begins, that too is a function of seed, epoch and step.
    """
    if isinstance(data, Tensor):
        size, device = len(data if rows is None else rows), data.device
        gather = (lambda i: data[i]) if rows is None else (lambda i: data[rows[i]])
        return lambda start: minibatches(size, batch_size, seed, start, device), gather
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"{function}: {name} must be a tensor [N, …] or an iterable of batches, got {type(data).__name__}"
        )

    def epochs() -> Iterator[Tensor]:
        for epoch in count():
            empty = True
            _random.reseed(_random.derived_seed(seed, EPOCH, epoch))  # a DataLoader draws its order when it is begun
            for batch in data:
                empty = False
                yield first_tensor(function, name, batch)
            if empty:
                raise ValueError(
                    f"{function}: {name} must be an iterable that can be gone through again, got no batches"
                )

    return lambda start: advanced(epochs(), start), lambda x: x


def advanced(batches: Iterable[Any], start: int) -> Iterator[Any]:
    """The batches from `start` on; those before are drawn here and now, so that they take no randomness of a step."""
    iterator = iter(batches)
    deque(islice(iterator, start), maxlen=0)
    return iterator


def first_tensor(function: str, name: str, batch: Any) -> Tensor:
    """The batch itself, or the first tensor in it, [B, …]."""
    found = batch
    while isinstance(found, (tuple, list, dict)) and found:
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    if not isinstance(found, Tensor) or found.dim() < 1:
        raise TypeError(f"{function}: {name} must yield tensors [B, …], got {type(found).__name__}")
    return found


def parts(function: str, name: str, data: Data, size: int = 1024) -> Iterable[Tensor]:
    """All examples once, some at a time."""
    if isinstance(data, Tensor):
        return data.split(size)
    return (first_tensor(function, name, batch) for batch in data)


def check_data(function: str, name: str, data: object, minimum: int = 1) -> None:
    """A tensor of at least `minimum` examples, all finite; an iterable is looked at batch by batch, later."""
    if not isinstance(data, Tensor):
        if isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
            return
        raise TypeError(f"{function}: {name} must be a tensor [N, …] or an iterable of them, got {type(data).__name__}")
    if data.dim() < 2 or len(data) < minimum:
        raise ValueError(f"{function}: {name} must be [N, …] with N ≥ {minimum}, got shape {tuple(data.shape)}")
    if data.is_complex():
        raise TypeError(f"{function}: {name} must be real, got {data.dtype}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        bad = int((~torch.isfinite(data)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{function}: {name} must be finite, got NaN or infinity in row {bad}")


def held_out_split(
    function: str, name: str, examples: Data | None, validation: Data | None, fraction: float, seed: int
) -> tuple[Tensor | None, Data]:
    """Indices of the examples to train on, None for all, and the held-out examples."""
    check_data(function, name, examples, minimum=2)
    assert examples is not None
    if validation is not None:
        check_data(function, "validation", validation)
        return None, validation
    if not isinstance(examples, Tensor):
        raise ValueError(f"{function}: validation must be given where {name} is an iterable, got None")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).to(examples.device)
    size = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    return order[size:], examples[order[:size]]


def mean_over_parts(terms: Callable[[Any], dict[str, Tensor]], parts: Iterable[Any], seed: int) -> dict[str, float]:
    """The terms' means over all rows of the parts, which processes share out: part c draws from (seed, c)."""
    sums: dict[str, float] = {}
    rows, shared = 0, ranks()
    with shared.failing_together("validation"):
        for c, part in enumerate(parts):
            if c % shared.size == shared.rank:
                _random.reseed(_random.derived_seed(seed, VALIDATION, c))
                for name, term in terms(part).items():
                    sums[name] = sums.get(name, 0.0) + float(term) * num_rows(part)
                rows += num_rows(part)
    gathered = shared.gather(sums | {"": float(rows)})
    names = max(gathered, key=len)
    total = {name: sum(part.get(name, 0.0) for part in gathered) for name in names}
    count_all = total.pop("")
    if count_all == 0:
        raise ValueError("validation must be an iterable of batches that can be gone through again, got no batch")
    return {name: value / count_all for name, value in total.items()}


def num_rows(batch: Any) -> int:
    """Rows of a batch: of its first tensor."""
    while not isinstance(batch, Tensor) and isinstance(batch, (tuple, list, dict)) and batch:
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return len(batch) if isinstance(batch, Tensor) and batch.dim() else 1


def shard_of(batch: Any, shard: int, shards: int) -> Any:
    """The rows of shard `shard` of `shards` equal ones; numbers belong to all of them."""
    if shards == 1 or batch is None or isinstance(batch, (int, float)):
        return batch
    if isinstance(batch, dict):
        return {key: shard_of(value, shard, shards) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(shard_of(value, shard, shards) for value in batch)
    if not isinstance(batch, Tensor):
        raise TypeError(f"batches must be tensors to be shared out, got {type(batch).__name__}")
    if len(batch) % shards:
        raise ValueError(
            f"batches must have a multiple of {shards} rows (processes × gradient_accumulation), got {len(batch)}"
        )
    size = len(batch) // shards
    return batch[shard * size : (shard + 1) * size]
