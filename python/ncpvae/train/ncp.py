"""Stage two: the classifier of a noise contrastive prior, for any VAE."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _random, objectives
from ..priors import NoiseContrastivePrior
from .engine import check_count, minibatches, train
from .vae import check_data

#: a held-out loss below this (of at most 2·log 2 = 1.386) means the classes hardly overlap
EASY_LOSS = 0.1
MIN_BASE_VALIDATION = 4096  # base draws are cheap: at least this many steady the held-out loss


@dataclass(frozen=True)
class NCPResult:
    """What stage two found out.

    Attributes:
        loss: held-out noise contrastive loss, nats, 2·log 2 where base and posterior agree (NCP-VAE, Eq. 3).
        jsd: log 2 − ½·loss, nats: a lower bound on JSD(q(z) ‖ p(z)), up to the held-out sample's noise.
        accuracy: held-out accuracy of the classifier; ½ where base and posterior agree.
        trustworthy: False where the classes separate so easily that the ratio cannot be trusted.
        steps, seconds, best_step, stopped_early, history: of the run, see `TrainResult`.
    """

    loss: float
    jsd: float
    accuracy: float
    trustworthy: bool
    steps: int
    seconds: float
    best_step: int
    stopped_early: bool
    history: list[dict[str, float]] = field(repr=False)


def fit_ncp(
    prior: NoiseContrastivePrior,
    posterior_samples: Tensor | None = None,
    base_samples: Tensor | None = None,
    *,
    vae: Callable[[Tensor], Distribution | Tensor] | nn.Module | None = None,
    data: Tensor | None = None,
    validation: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation_fraction: float = 0.1,
    steps: int = 5000,
    batch_size: int = 512,
    lr: float = 1e-3,
    schedule: str = "cosine",
    label_smoothing: float = 0.0,
    validate_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    progress: bool = True,
) -> NCPResult:
    """Train the prior's classifier to tell the aggregate posterior from the base (NCP-VAE, section 3.2, stage two).

    The positive draws come either from `posterior_samples`, codes that you have drawn, or from a VAE of any make
    and its data, encoded anew at every step. The negative draws come from the prior's base unless given. A part of
    the data is held out; the weights with the lowest held-out loss are kept.

    Args:
        prior: its classifier is trained in place and left in eval mode; its base is not touched.
        posterior_samples: [N, *event], draws from q(z).
        base_samples: [N', *event], draws from p(z); fresh draws from the base at every step by default.
        vae: instead of posterior_samples: a function or module x → q(z|x) as a Distribution, or → draws [B, *event];
            a module with an `encode` method is asked by that. It is run without gradients; one that is a module
            is put in eval mode.
        data: [N, …], the VAE's input. Codes are drawn anew at every step.
        validation: held-out codes, or held-out data where `vae` is given; otherwise the next argument's share.
        transform: applied to every batch of data on the classifier's device; conversion to float32 by default.
        validation_fraction: share of the examples held out.
        steps, batch_size, lr, schedule: of Adam; the paper's are 512, 1e-3 and cosine.
        label_smoothing: see `objectives.nce`.
        validate_every, patience: in steps, and in validations without improvement before stopping; None never stops.
        seed: the run is deterministic for a seed.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument that is off, samples that do not fit the base among them.
        TrainingDiverged: where the loss becomes NaN or infinite.

    Warns:
        RuntimeWarning: where the held-out loss is so small that the base is too far from the posterior.
    """
    if not isinstance(prior, NoiseContrastivePrior):
        raise TypeError(f"fit_ncp: prior must be a NoiseContrastivePrior, got {type(prior).__name__}")
    if (posterior_samples is None) == (vae is None):
        raise ValueError("fit_ncp: exactly one of posterior_samples and vae must be given")
    if (vae is None) != (data is None):
        raise ValueError("fit_ncp: vae and data must be given together")
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"fit_ncp: validation_fraction must be between 0 and 1, got {validation_fraction}")
    parameters = [p for p in prior.classifier.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("fit_ncp: prior.classifier must have parameters to train, got none that require gradients")
    check_count("fit_ncp: seed", seed, minimum=0, below=1 << 62)
    check_count("fit_ncp: batch_size", batch_size)
    device, dtype = parameters[0].device, parameters[0].dtype
    event = tuple(prior.base_distribution().event_shape)

    def as_given(codes: Tensor) -> Tensor:
        return codes.to(device, dtype)

    encode = as_given if vae is None else _as_encoder(vae, transform, device, dtype)
    examples = data if data is not None else posterior_samples
    source = "posterior_samples" if vae is None else "the VAE's codes"
    rest, held_out_part = _split(
        "data" if vae is not None else "posterior_samples", examples, validation, validation_fraction, seed
    )
    assert examples is not None  # _split has seen to it
    prior.classifier.eval()
    with torch.no_grad(), _random.scoped(seed ^ 0x5EED0FF):  # not the stream that the training steps draw from
        _check_event(source, encode(examples[:2]), event)
        held_out = torch.cat([encode(part) for part in held_out_part.split(1024)])
        _check_event("validation" if validation is not None else source, held_out, event)
        base_batches, held_out_base = _base_source(
            prior, base_samples, batch_size, len(held_out), validation_fraction, seed
        )
        _check_event("base_samples", held_out_base, event)
        held_out_base = held_out_base.to(device, dtype)
        prior.forward().log_ratio(held_out[:2])  # a classifier of the wrong shape is named before training
    positive_batches = (examples[rest[i]] for i in minibatches(len(rest), batch_size, seed))
    prior.forget_log_normalizer()
    distribution = prior.forward()

    def logits(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        both = distribution.log_ratio(torch.cat([q, p]))  # in one pass: BatchNorm sees both classes together
        return both[: len(q)], both[len(q) :]

    def terms(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            q = encode(batch[0])
        return {"nce": objectives.nce(*logits(q, batch[1].to(device, dtype)), label_smoothing)}

    def validate() -> dict[str, float]:
        q, p = logits(held_out, held_out_base)
        return {"nce": float(objectives.nce(q, p)), "accuracy": float(objectives.nce_accuracy(q, p))}

    result = train(
        prior.classifier,
        terms,
        zip(positive_batches, base_batches, strict=False),
        steps=steps,
        lr=lr,
        schedule=schedule,
        validate=validate,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        progress=progress,
        description="NCP",
    )
    best = next(record for record in result.history if record["step"] == result.best_step)
    loss = best["validation_nce"]
    trustworthy = loss >= EASY_LOSS
    if not trustworthy:
        warnings.warn(
            "fit_ncp: the classifier separates posterior and base draws too easily for its ratio to be trusted "
            f"(held-out loss {loss:.3g} of at most 1.386). Bring the base closer first: fit Normal.fit or "
            "GaussianMixture.fit to the codes, or train the VAE longer with this base.",
            RuntimeWarning,
            stacklevel=2,
        )
    return NCPResult(
        loss,
        float(objectives.jensen_shannon_divergence(loss)),
        best["validation_accuracy"],
        trustworthy,
        result.steps,
        result.seconds,
        result.best_step,
        result.stopped_early,
        result.history,
    )


def _as_encoder(vae, transform, device, dtype) -> Callable[[Tensor], Tensor]:
    """x [B, …] → one draw of z per example, from whatever `vae` is."""
    if isinstance(vae, nn.Module):
        vae.eval()
    call = getattr(vae, "encode", vae)
    if not callable(call):
        raise TypeError(f"fit_ncp: vae must be a function, or a module with an encode method, got {type(vae).__name__}")
    transform = transform or (lambda x: x.float())

    def encode(x: Tensor) -> Tensor:
        q = call(transform(x.to(device)))
        if isinstance(q, Distribution):
            return q.sample().to(device, dtype)
        if isinstance(q, Tensor):
            return q.to(device, dtype)
        raise TypeError(f"fit_ncp: vae must return a Distribution or a tensor of draws, got {type(q).__name__}")

    return encode


def _split(
    name: str, examples: Tensor | None, validation: Tensor | None, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Indices of the examples to train on, and the held-out examples."""
    check_data("fit_ncp", name, examples, minimum=2)
    assert examples is not None
    if validation is not None:
        check_data("fit_ncp", "validation", validation)
        return torch.arange(len(examples)), validation
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    return order[count:], examples[order[:count].to(examples.device)]


def _base_source(prior, base_samples, batch_size, num_held_out, fraction, seed) -> tuple[Iterator[Tensor], Tensor]:
    """Endless batches of base draws, and the held-out ones."""
    if base_samples is not None:
        rest, held_out = _split("base_samples", base_samples, None, fraction, seed)
        return (base_samples[rest[i]] for i in minibatches(len(rest), batch_size, seed + 1)), held_out
    base = prior.base_distribution()
    if base.batch_shape:
        raise ValueError(f"fit_ncp: prior.base must have no batch shape, got {tuple(base.batch_shape)}")
    held_out = base.sample((max(num_held_out, MIN_BASE_VALIDATION),))

    def draws() -> Iterator[Tensor]:
        while True:
            yield base.sample((batch_size,))

    return draws(), held_out


def _check_event(name: str, z: Tensor, event: tuple[int, ...]) -> None:
    if tuple(z.shape[1:]) != event:
        raise ValueError(f"fit_ncp: {name} must have the base's event shape {event} per row, got {tuple(z.shape[1:])}")
