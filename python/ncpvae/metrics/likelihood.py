"""Log-likelihood of held-out data by importance sampling."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from .. import _distributed, _random

DECODED_AT_ONCE = 2048  # rows, whose activations are what takes memory


@dataclass(frozen=True)
class Likelihood:
    """Estimated negative log-likelihood of a data set.

    Attributes:
        nll: mean over the examples, nats per example.
        standard_error: of that mean over examples; it holds neither the error of a log Z nor that of SNIS proposals
            shared between examples.
        per_example: [N], nats.
        protocol: how it was computed.
    """

    nll: float
    standard_error: float
    per_example: Tensor = field(repr=False)
    protocol: str


@torch.no_grad()
def importance_weighted_nll(
    data: Tensor,
    encode: Callable[[Tensor], Distribution],
    decode: Callable[[Tensor], Distribution],
    log_priors: Mapping[str, Callable[[Tensor], Tensor]],
    num_samples: int = 1000,
    max_rows: int = 25_600,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> dict[str, Likelihood]:
    """−log p(x) ≤ −E[ log 1/S Σ_s p(x|z_s) p(z_s) / q(z_s|x) ], z_s ~ q(z|x), for one or more priors at once.

    All priors see the same draws z_s, so that their differences are not blurred by sampling.

    Args:
        data: [N, …].
        encode: x [B, …] → q(z|x) with batch [B].
        decode: z [S, B, …] → p(x|z) with batch [S, B]; called with parts of the draws and examples.
        log_priors: name → function z [S, B, …] → log p(z) [S, B], nats: the base's `log_prob`; the `log_prob` of a
            noise contrastive prior, which with an estimated Z is optimistic; or its `snis_log_prob`, a valid bound.
        num_samples: S draws per example.
        max_rows: rows z held at once, of which the decoder is given at most 2,048 at a time; memory depends on it and
            not on N or S.
        transform: applied to each chunk of data once, binarisation for example; conversion to float32 by default.
        device: where the chunks of data go first; where they are by default.
        seed: governs all randomness, torch's global generators being left as they were; None uses those. What a chunk
            of data draws depends on the seed and the chunk's number alone.
        distributed: share the chunks of data with the other processes of torch.distributed's default group, if there
            is one. All must make the same call, on all the data, and get the figures that one process would get.

    Returns:
        For each name a `Likelihood`.

    Raises:
        ValueError, TypeError: naming the argument that is off, or that differs between the processes.
        RuntimeError: where another of the processes fails, with its number and message.

    Source: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
    """
    if not isinstance(data, Tensor):
        raise TypeError(f"importance_weighted_nll: data must be a tensor [N, …], got {type(data).__name__}")
    if data.dim() < 1 or len(data) == 0:
        raise ValueError(f"importance_weighted_nll: data must be [N, …] with N ≥ 1, got shape {tuple(data.shape)}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        raise ValueError("importance_weighted_nll: data must be finite, got NaN or infinity")
    if num_samples < 1 or max_rows < 1:
        raise ValueError(
            f"importance_weighted_nll: num_samples and max_rows must be ≥ 1, got {num_samples}, {max_rows}"
        )
    if seed is not None:
        _distributed.check_seed("importance_weighted_nll", seed)
    elif distributed:
        raise ValueError("importance_weighted_nll: seed must be an integer where distributed, got None")
    transform = transform or (lambda x: x.float())
    at_once = min(num_samples, max_rows)
    chunks = data.split(max(1, max_rows // at_once))
    ranks = _distributed.ranks(distributed)
    if ranks.size > 1:
        ends = _distributed.fingerprint(torch.cat([data[:1], data[-1:]]))
        call: dict[str, object] = {"data": f"{list(data.shape)} with ends {ends}", "log_priors": list(log_priors)}
        call |= {"num_samples": num_samples, "max_rows": max_rows, "seed": seed}
        _distributed.check_alike("importance_weighted_nll", ranks.gather(call))
    mine: dict[int, dict[str, Tensor]] = {}
    home = torch.device(data.device if device is None else device)
    with ranks.failing_together("importance_weighted_nll"):
        for number in ranks.mine(len(chunks)):
            with _random.scoped(None if seed is None else _distributed.block_seed(seed, number)):
                x = transform(chunks[number] if device is None else chunks[number].to(device))
                values = _chunk_nll(x, encode, decode, log_priors, num_samples, at_once)
            home = x.device
            mine[number] = values if ranks.size == 1 else {name: value.cpu() for name, value in values.items()}
    every = {number: values for part in ranks.gather(mine) for number, values in part.items()}
    protocol = f"importance-weighted bound, {num_samples} draws per example, {len(data)} examples"
    return {
        name: summarized(torch.cat([every[number][name].to(home) for number in range(len(chunks))]), protocol)
        for name in log_priors
    }


def _chunk_nll(
    x: Tensor,
    encode: Callable[[Tensor], Distribution],
    decode: Callable[[Tensor], Distribution],
    log_priors: Mapping[str, Callable[[Tensor], Tensor]],
    num_samples: int,
    at_once: int,
) -> dict[str, Tensor]:
    """The bound on −log p(x) under each prior, [B] nats, for a chunk x [B, …]; `at_once` draws z are held at a time."""
    posterior = encode(x)
    if not isinstance(posterior, Distribution) or posterior.batch_shape != x.shape[:1]:
        got = tuple(posterior.batch_shape) if isinstance(posterior, Distribution) else type(posterior).__name__
        raise ValueError(f"importance_weighted_nll: encode must return q(z|x) with batch [{len(x)}], got {got}")
    running = {name: torch.full((len(x),), -math.inf, device=x.device) for name in log_priors}
    for start in range(0, num_samples, at_once):
        z = posterior.sample((min(at_once, num_samples - start),))
        shared = _log_likelihood(decode, x, z) - posterior.log_prob(z)
        for name, log_prior in log_priors.items():
            of_prior = log_prior(z)
            if of_prior.shape != shared.shape:
                raise ValueError(
                    f"importance_weighted_nll: log_priors[{name!r}] must return log-densities of shape "
                    f"{tuple(shared.shape)}, one for each z, got {tuple(of_prior.shape)}"
                )
            running[name] = torch.logaddexp(running[name], (shared + of_prior).logsumexp(0))
    return {name: math.log(num_samples) - log_sum for name, log_sum in running.items()}


def _log_likelihood(decode: Callable[[Tensor], Distribution], x: Tensor, z: Tensor) -> Tensor:
    """log p(x_b|z_sb), [S, B], for x [B, …] and z [S, B, …]; the decoder is given DECODED_AT_ONCE rows at a time."""

    def part(some: Tensor, codes: Tensor) -> Tensor:
        found = decode(codes).log_prob(some)
        if found.shape != codes.shape[:2]:
            raise ValueError(
                f"importance_weighted_nll: decode must return p(x|z) with batch {tuple(codes.shape[:2])}, "
                f"got log-likelihoods of shape {tuple(found.shape)}"
            )
        return found

    columns = zip(x.split(DECODED_AT_ONCE), z.split(DECODED_AT_ONCE, 1), strict=True)
    return torch.cat(
        [
            torch.cat([part(some, rows) for rows in codes.split(max(1, DECODED_AT_ONCE // len(some)))])
            for some, codes in columns
        ],
        dim=1,
    )


def summarized(per_example: Tensor, protocol: str) -> Likelihood:
    """The figures of a data set from those of its examples, [N] nats."""
    spread = float(per_example.std()) / math.sqrt(len(per_example)) if len(per_example) > 1 else math.nan
    return Likelihood(float(per_example.mean()), spread, per_example, protocol)
