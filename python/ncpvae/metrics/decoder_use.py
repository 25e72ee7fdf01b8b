"""What the decoder makes of the code: how much worse it reconstructs an example from another example's code.

Letters: N examples, B batch, D coordinates of z.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _distributed, _random
from ._common import check_counts, check_seed, in_float64, mean_and_error, shared_blocks


@dataclass(frozen=True)
class DecoderUse:
    """Reconstruction by an example's own code, by that of another example, and by its own with one coordinate changed.

    Attributes:
        nll: mean of −log p(x|z), z ~ q(z|x), nats per example.
        standard_error: of nll over examples.
        rise: how much larger that is with another example's code; 0 where the decoder ignores z.
        rise_standard_error: of the mean difference, example by example, taken as independent.
        rise_per_dimension: [D], z flattened, float64: the rise where that coordinate alone comes from another
            example; exactly 0 for one that the decoder ignores. The parts need not sum to `rise`.
        rise_per_dimension_standard_error: likewise.
        protocol: how it was computed.
    """

    nll: float
    standard_error: float
    rise: float
    rise_standard_error: float
    rise_per_dimension: Tensor = field(repr=False)
    rise_per_dimension_standard_error: Tensor = field(repr=False)
    protocol: str


@torch.no_grad()
def decoder_use(
    data: Tensor,
    encode: Callable[[Tensor], Distribution],
    decode: Callable[[Tensor], Distribution],
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> DecoderUse:
    """Permutation test of a decoder: the rise of −log p(x|z) when z, or one coordinate of it, is another example's.

    It is the permutation importance of the code, and of each coordinate, for the reconstruction. Within a batch every
    example gets the code of its neighbour, so the data should be in random order. D + 2 batches are decoded for each
    batch of data.

    Args:
        data: [N, …], N ≥ 2.
        encode: x [B, …] → q(z|x) with batch [B]. A module should be in evaluation mode.
        decode: z [B, D] → p(x|z) with batch [B].
        transform: applied to each batch of data once; conversion to float32 by default.
        batch_size: ≥ 2, examples decoded at once; the data are cut into N // batch_size batches of about equal size.
        seed: governs what transform and encode draw, torch's global generators being left as they were; None uses
            those. What a batch draws depends on the seed and the batch's number alone.
        device: where the batches of data go first; where they are by default.
        distributed: share the batches with the other processes of torch.distributed's default group, if there is one.
            All must make the same call, on all the data and with the same weights, and get the same figures.

    Raises:
        ValueError, TypeError: naming the argument that is off, or that differs between the processes.
        RuntimeError: where another of the processes fails, with its number and message.

    Source: Breiman, "Random forests", Machine Learning 2001, section 10, for permutation importance.
    """
    owner = "decoder_use"
    if not isinstance(data, Tensor):
        raise TypeError(f"{owner}: data must be a tensor [N, …], got {type(data).__name__}")
    if data.dim() < 1 or len(data) < 2:
        raise ValueError(f"{owner}: data must be [N, …] with N ≥ 2 to exchange codes, got shape {tuple(data.shape)}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        raise ValueError(f"{owner}: data must be finite, got NaN or infinity")
    check_counts(owner, batch_size=batch_size)
    if batch_size < 2:
        raise ValueError(f"{owner}: batch_size must be ≥ 2 to exchange codes, got {batch_size}")
    check_seed(owner, seed, distributed)
    transform = transform or (lambda x: x.float())
    batches = data.tensor_split(max(1, len(data) // batch_size))

    def of_batch(number: int) -> Tensor:
        with _random.scoped(None if seed is None else _distributed.block_seed(seed, number)):
            x = transform(batches[number] if device is None else batches[number].to(device))
            posterior = encode(x)
            if not isinstance(posterior, Distribution) or posterior.batch_shape != (len(x),):
                got = list(posterior.batch_shape) if isinstance(posterior, Distribution) else type(posterior).__name__
                raise ValueError(f"{owner}: encode must return q(z|x) with batch [{len(x)}], got {got}")
            return _losses(owner, x, posterior.sample(), decode)

    def call() -> dict[str, object]:
        ends = _distributed.fingerprint(torch.cat([data[:1], data[-1:]]))
        return {"data": f"{list(data.shape)} with ends {ends}", "batch_size": batch_size, "seed": seed}

    losses = torch.cat(shared_blocks(owner, len(batches), of_batch, call, distributed))  # [N, 2 + D]
    nll, error = mean_and_error(losses[:, 0])
    rises = losses[:, 1:] - losses[:, :1]
    means, errors = rises.mean(0), rises.std(0) / len(rises) ** 0.5
    protocol = (
        f"−log p(x|z) of {len(data)} examples, one draw z ~ q(z|x) each, against the code of the neighbour within "
        f"batches of about {batch_size}, seed {seed}"
    )
    return DecoderUse(nll, error, float(means[0]), float(errors[0]), means[1:], errors[1:], protocol)


def _losses(owner: str, x: Tensor, z: Tensor, decode: Callable[[Tensor], Distribution]) -> Tensor:
    """−log p(x|z) with z as it is, another example's, and with each coordinate in turn another's: [B, 2 + D].

    All are decoded in batches of one size, so that a coordinate without influence leaves every bit as it was.
    """
    flat = z.flatten(1)  # [B, D]
    others = flat.roll(1, 0)

    def loss(codes: Tensor) -> Tensor:
        value = -decode(codes.view(z.shape)).log_prob(x)
        if value.shape != (len(x),):
            raise ValueError(
                f"{owner}: decode must return p(x|z) with batch [{len(x)}], got log-likelihoods of shape "
                f"{tuple(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{owner}: decode must give finite log-likelihoods, got NaN or infinity")
        return in_float64(value)

    columns = [loss(flat), loss(others)]
    for d in range(flat.shape[1]):
        changed = flat.clone()
        changed[:, d] = others[:, d]
        columns.append(loss(changed))
    return torch.stack(columns, 1)
