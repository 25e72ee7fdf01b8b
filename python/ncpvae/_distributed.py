"""Several processes, by torch.distributed's default group; without one, everything here is of one process and idle.

Letters: W processes ("world size"). Nothing communicates unless its caller was told to share the work.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from . import _random

T = TypeVar("T")
BLOCKS = 0x626C6F636B  # the position in `derived_seed` that sets block seeds apart from others of the same seed


_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process counts as the only one: it does a piece of shared work that is wholly its own."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_initialized() -> bool:
    """Whether torch.distributed has a default group, as under `torchrun` once a script or accelerate has set it up."""
    return not _alone.get() and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 … W − 1."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if is_initialized() else 1


def leave_group() -> None:
    """End this process's part in the default group; a process that ends with its threads running may be aborted."""
    if is_initialized():
        dist.destroy_process_group()


def block_seed(seed: int, block: int) -> int:
    """The seed of a block of work, the same whichever process does it; 0 … 2⁶³ − 1.

    The blocks of one seed differ in the low 32 bits, all that torch's CPU generator looks at, up to 2³² of them.
    """
    return (_random.derived_seed(seed, BLOCKS) + block) % 2**63


def check_seed(owner: str, seed: object) -> None:
    """`seed` is an integer that `block_seed` takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{owner}: seed must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{owner}: seed must be ≥ 0 and < 2⁶³, got {seed}")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a piece of work, seen from one of them; every method is idle where `size` is 1."""

    rank: int
    size: int

    def mine(self, count: int) -> range:
        """Which of `count` blocks of work are this process's: every W-th."""
        return range(self.rank, count, self.size)

    def gather(self, part: T) -> list[T]:
        """Every rank's part, on all ranks, in order of rank. Tensors should be on the CPU: they travel pickled."""
        if self.size == 1:
            return [part]
        parts: list = [None] * self.size
        dist.all_gather_object(parts, part)
        return parts

    def combine(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape and dtype in which no element is set on two ranks, put together bit for bit.

        "Not set" is +0, all of whose bits are zero: bytes are added, so that −0, NaN and every dtype survive.
        """
        if self.size == 1:
            return tensor
        wire = tensor.contiguous().flatten().view(torch.uint8).to(_wire_device(tensor.device), copy=True)
        dist.all_reduce(wire)
        return wire.to(tensor.device).view(tensor.dtype).view(tensor.shape)

    @contextmanager
    def failing_together(self, owner: str) -> Iterator[None]:
        """What one rank raises within the block all raise after it, instead of waiting for that rank for ever.

        The block must not communicate.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for number, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"{owner}: failed on rank {number}: {message}")


def ranks(shared: bool = True) -> Ranks:
    """All processes of the default group; this one alone where there is no group or the work is not shared."""
    return Ranks(rank(), world_size()) if shared else Ranks(0, 1)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward, a rank's rows get what every rank's loss has to say about them."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.first, ctx.count = rank() * len(rows), len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """[N, …] on each rank → [W·N, …], in order of rank; N must be the same everywhere.

    It is differentiable. When every rank's loss is a mean over its own rows and gradients are averaged over the
    ranks, as DistributedDataParallel does, they are those of the mean over all rows.
    """
    if world_size() == 1:
        return rows
    if rows.device.type == "cpu":  # gloo would end the process; on a GPU the host would have to wait for the counts
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
        dist.all_gather(counts, torch.tensor([len(rows)]))
        if len({int(count) for count in counts}) > 1:
            numbers = ", ".join(str(int(count)) for count in counts)
            raise ValueError(f"gather_rows: every process must have equally many rows, got {numbers}")
    return _GatherRows.apply(rows)


def check_alike(owner: str, parts: Sequence[Mapping[str, object]]) -> None:
    """Every rank's part of a `gather` names the same values.

    Raises:
        ValueError: naming the first value that is not, and the ranks whose value is not that of rank 0.
    """
    for name, value in parts[0].items():
        others = [number for number, part in enumerate(parts) if part[name] != value]
        if others:
            raise ValueError(
                f"{owner}: {name} must be the same on every rank, got {value} on rank 0 and "
                f"{parts[others[0]][name]} on rank {', '.join(map(str, others))}"
            )


def fingerprint(tensor: Tensor) -> str:
    """Shape, dtype and a digest of the bits of a tensor, to compare between ranks."""
    wire = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.blake2b(wire.numpy().tobytes(), digest_size=4).hexdigest()
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {digest}"


def _wire_device(device: torch.device) -> torch.device:
    """Where a tensor of `device` goes for a collective: stays if a backend serves it there, CPU or GPU otherwise."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    if backends.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))
