"""Stage two: the classifier of a noise contrastive prior, for any VAE."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _random, objectives
from ..priors import NoiseContrastivePrior
from .batches import Data, held_out_split, minibatches, parts, source
from .engine import Schedule, train
from .execution import Execution, check_count

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
    data: Data | None = None,
    validation: Data | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    validation_transform: Callable[[Tensor], Tensor] | None = None,
    validation_fraction: float = 0.1,
    steps: int = 5000,
    batch_size: int = 512,
    lr: float = 1e-3,
    schedule: Schedule = "cosine",
    label_smoothing: float = 0.0,
    validate_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    execution: Execution | None = None,
    folder: Path | None = None,
    resume: str | Path = "never",
    settings: dict[str, Any] | None = None,
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
        data: [N, …], the VAE's input, or any iterable of batches of it. Codes are drawn anew at every step.
        validation: held-out codes, or held-out data where `vae` is given; otherwise the next argument's share. It must
            be given with an iterable.
        transform: applied to every batch of data on the classifier's device; by default the VAE's `prepare` where it
            has one, else conversion to float32.
        validation_transform: the same for held-out data; `transform` by default.
        validation_fraction: share of the examples held out.
        steps, batch_size, lr, schedule: of Adam; the paper's are 512, 1e-3 and cosine.
        label_smoothing: see `objectives.nce`.
        validate_every, patience: in steps, and in validations without improvement before stopping; None never stops.
        seed: the run is deterministic for a seed.
        execution, folder, resume, settings: see `fit_vae`.
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
    encode_held_out = encode
    if vae is not None and validation_transform is not None:
        encode_held_out = _as_encoder(vae, validation_transform, device, dtype)
    if posterior_samples is not None and not isinstance(posterior_samples, Tensor):
        raise TypeError(f"fit_ncp: posterior_samples must be a tensor, got {type(posterior_samples).__name__}")
    examples = data if data is not None else posterior_samples
    name = "data" if vae is not None else "posterior_samples"
    described = "posterior_samples" if vae is None else "the VAE's codes"
    rows, held_out_part = held_out_split("fit_ncp", name, examples, validation, validation_fraction, seed)
    assert examples is not None  # held_out_split has seen to it
    positives, gather = source("fit_ncp", name, examples, batch_size, seed, rows)
    prior.classifier.eval()
    with torch.no_grad(), _random.scoped(seed ^ 0x5EED0FF):  # not the stream that the training steps draw from
        if isinstance(examples, Tensor):
            _check_event(described, encode(examples[:2]), event)
        held_out = torch.cat([encode_held_out(part) for part in parts("fit_ncp", "validation", held_out_part)])
        _check_event("validation" if validation is not None else described, held_out, event)
        negatives, draw, held_out_base = _base_source(
            prior, base_samples, batch_size, len(held_out), validation_fraction, seed
        )
        _check_event("base_samples", held_out_base, event)
        held_out_base = held_out_base.to(device, dtype)
        prior.forward().log_ratio(held_out[:2])  # a classifier of the wrong shape is named before training

    def batches(start: int) -> Iterator[tuple[Any, Any]]:
        return zip(positives(start), negatives(start), strict=False)

    prior.forget_log_normalizer()
    distribution = prior.forward()

    def logits(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        both = distribution.log_ratio(torch.cat([q, p]))  # in one pass: BatchNorm sees both classes together
        return both[: len(q)], both[len(q) :]

    def terms(batch: tuple[Any, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            q = encode(gather(batch[0]))
            p = draw(batch[1], len(q)).to(device, dtype)
        return {"nce": objectives.nce(*logits(q, p), label_smoothing)}

    def validate() -> dict[str, float]:
        q, p = logits(held_out, held_out_base)
        return {"nce": float(objectives.nce(q, p)), "accuracy": float(objectives.nce_accuracy(q, p))}

    result = train(
        prior.classifier,
        terms,
        batches,
        steps=steps,
        lr=lr,
        schedule=schedule,
        validate=validate,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        execution=execution,
        folder=folder,
        resume=resume,
        settings={"stage": "ncp", "batch_size": batch_size, "label_smoothing": label_smoothing, **(settings or {})},
        progress=progress,
        description="NCP",
    )
    best = next((record for record in result.history if record["step"] == result.best_step), {})
    if not {"validation_nce", "validation_accuracy"} <= best.keys():  # a resumed run can have any history
        raise ValueError(f"fit_ncp: the checkpoint's history lacks the held-out loss of step {result.best_step}")
    loss = best["validation_nce"]
    trustworthy = loss >= EASY_LOSS
    if not trustworthy:
        warnings.warn(
            "fit_ncp: the classifier separates posterior and base draws too easily for its ratio to be trusted "
            f"(held-out loss {loss:.3g} of at most 1.386). Bring the base closer first: fit Normal.fit or "
            "GaussianMixture.fit to the codes (Normal.fit(codes, per='channel') to feature maps), or train the VAE "
            "longer with this base.",
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
    transform = transform or getattr(vae, "prepare", None) or (lambda x: x.float())

    def encode(x: Tensor) -> Tensor:
        q = call(transform(x.to(device)))
        if isinstance(q, Distribution):
            return q.sample().to(device, dtype)
        if isinstance(q, Tensor):
            return q.to(device, dtype)
        raise TypeError(f"fit_ncp: vae must return a Distribution or a tensor of draws, got {type(q).__name__}")

    return encode


def _base_source(
    prior, base_samples, batch_size, num_held_out, fraction, seed
) -> tuple[Callable[[int], Iterator], Callable[[Any, int], Tensor], Tensor]:
    """Batches from a step on, the function from one of them and its size to base draws, and the held-out draws."""
    if base_samples is not None:
        rest, held_out = held_out_split("fit_ncp", "base_samples", base_samples, None, fraction, seed)
        assert rest is not None and isinstance(held_out, Tensor)
        return (
            lambda start: minibatches(len(rest), batch_size, seed + 1, start, rest.device),
            lambda i, size: base_samples[rest[i]],
            held_out,
        )
    base = prior.base_distribution()
    if base.batch_shape:
        raise ValueError(f"fit_ncp: prior.base must have no batch shape, got {tuple(base.batch_shape)}")
    held_out = base.sample((max(num_held_out, MIN_BASE_VALIDATION),))
    return lambda start: repeat(None), lambda _, size: base.sample((size,)), held_out


def _check_event(name: str, z: Tensor, event: tuple[int, ...]) -> None:
    if tuple(z.shape[1:]) != event:
        raise ValueError(f"fit_ncp: {name} must have the base's event shape {event} per row, got {tuple(z.shape[1:])}")
