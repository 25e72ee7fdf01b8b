"""The posteriors q(z|x) of a whole data set, computed once and handed to every metric that asks what z holds of x.

Letters: N examples, B batch, D coordinates of z.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _distributed, _random
from ..distributions import normal_parameters
from ._common import check_counts, check_seed, shared_blocks


@dataclass(frozen=True)
class Posteriors:
    """q(z|x) of every example of a data set, Normals with independent coordinates.

    Attributes:
        mean: [N, D], or [N, …] where z has more dimensions; float32 or float64, finite.
        log_std: of mean's shape and dtype, natural logarithm; a standard deviation of 0 has no density and is an error.
    """

    mean: Tensor = field(repr=False)
    log_std: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("log_std", self.log_std)):
            if not isinstance(value, Tensor):
                raise TypeError(f"Posteriors: {name} must be a tensor [N, D], got {type(value).__name__}")
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"Posteriors: {name} must be float32 or float64, got {value.dtype}")
        if self.mean.dim() < 2 or self.mean.numel() == 0:
            raise ValueError(f"Posteriors: mean must be [N, D] with N, D ≥ 1, got shape {tuple(self.mean.shape)}")
        if (self.log_std.shape, self.log_std.dtype) != (self.mean.shape, self.mean.dtype):
            raise ValueError(
                f"Posteriors: log_std must be {tuple(self.mean.shape)} and {self.mean.dtype} as mean, "
                f"got {tuple(self.log_std.shape)} and {self.log_std.dtype}"
            )
        if not torch.isfinite(self.mean).all():
            raise ValueError("Posteriors: mean must be finite, got NaN or infinity")
        if not torch.isfinite(self.log_std.abs().exp()).all():
            raise ValueError(
                f"Posteriors: log_std must be that of a standard deviation which is finite and > 0 in "
                f"{self.mean.dtype}, got NaN, infinity or one past its range"
            )

    def __len__(self) -> int:
        return len(self.mean)


@torch.no_grad()
def collect_posteriors(
    data: Tensor,
    encode: Callable[[Tensor], Distribution],
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> Posteriors:
    """Encode a data set once, batch by batch; the result takes O(N·D) memory.

    Where the transform draws (binarisation on the fly), each example is drawn once: all metrics of the result see the
    same x.

    Args:
        data: [N, …].
        encode: x [B, …] → q(z|x) with batch [B], Normal with independent coordinates. A module should be in
            evaluation mode.
        transform: applied to each batch of data; conversion to float32 by default.
        batch_size: examples encoded at once.
        seed: governs what transform and encode draw, torch's global generators being left as they were; None uses
            those. What a batch draws depends on the seed and the batch's number alone.
        device: where the batches of data go first; where they are by default.
        distributed: share the batches with the other processes of torch.distributed's default group, if there is one.
            All must make the same call, on all the data and with the same weights, and get all the posteriors: on
            `device`, or the CPU where none was named.

    Returns:
        `Posteriors`, in at least float32.

    Raises:
        TypeError: where encode returns another distribution than such a Normal.
        ValueError, TypeError: naming the argument that is off, or that differs between the processes.
        RuntimeError: where another of the processes fails, with its number and message.
    """
    owner = "collect_posteriors"
    if not isinstance(data, Tensor):
        raise TypeError(f"{owner}: data must be a tensor [N, …], got {type(data).__name__}")
    if data.dim() < 1 or len(data) == 0:
        raise ValueError(f"{owner}: data must be [N, …] with N ≥ 1, got shape {tuple(data.shape)}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        raise ValueError(f"{owner}: data must be finite, got NaN or infinity")
    check_counts(owner, batch_size=batch_size)
    check_seed(owner, seed, distributed)
    transform = transform or (lambda x: x.float())
    batches = data.split(batch_size)

    def encoded(number: int) -> Tensor:
        with _random.scoped(None if seed is None else _distributed.block_seed(seed, number)):
            batch = batches[number] if device is None else batches[number].to(device)
            x = transform(batch)
            return _parameters(encode(x), len(batch))

    def call() -> dict[str, object]:
        ends = _distributed.fingerprint(torch.cat([data[:1], data[-1:]]))
        return {"data": f"{list(data.shape)} with ends {ends}", "batch_size": batch_size, "seed": seed}

    mean, log_std = torch.cat(shared_blocks(owner, len(batches), encoded, call, distributed), 1)
    home = mean.device if device is None else torch.device(device)
    return Posteriors(mean.to(home), log_std.to(home))


def _parameters(posterior: Distribution, batch: int) -> Tensor:
    """Mean and log standard deviation of q(z|x), [2, B, …], in at least float32."""
    parameters = normal_parameters(posterior)
    if parameters is None:
        raise TypeError(
            "collect_posteriors: encode must return a Normal with independent coordinates, "
            f"got {type(posterior).__name__}"
        )
    if posterior.batch_shape != (batch,):
        raise ValueError(
            f"collect_posteriors: encode must return q(z|x) with batch [{batch}], got {list(posterior.batch_shape)}; "
            "wrap it in torch.distributions.Independent"
        )
    mean, std = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in parameters)
    return torch.stack([mean, std.log()])
