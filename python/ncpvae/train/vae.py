"""Stage one: a VAE with its base prior."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import objectives
from ..vae import VAE
from .engine import TrainResult, minibatches, train


def fit_vae(
    vae: VAE,
    data: Tensor,
    *,
    validation: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    steps: int = 10_000,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: str = "cosine",
    kl_weight: float = 1.0,
    validate_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Maximise the evidence lower bound (NCP-VAE, Eq. 1) over all of the VAE's parameters.

    Args:
        vae: trained in place, on the device it is on; left in eval mode.
        data: [N, …], kept where it is and in its dtype (uint8 images stay small); batches are moved.
        validation: [N', …]; where given, the weights with its best bound are the ones kept.
        transform: applied to every batch on the VAE's device, dynamic binarisation for example;
            conversion to float32 by default.
        steps, batch_size, lr: of Adam.
        schedule: "cosine" or "constant".
        kl_weight: β, on the KL term.
        validate_every, patience: in steps, and in validations without improvement before stopping.
        seed: the run is deterministic for a seed; the batch order is a function of seed and step alone.
        progress: show a progress bar.

    Returns:
        TrainResult with `loss` (negative bound), `reconstruction` and `kl`, nats per example.

    Raises:
        ValueError: for an empty or non-finite data set.
        TrainingDiverged: where a term becomes NaN or infinite.
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"fit_vae: vae must be a VAE, got {type(vae).__name__}")
    check_data("fit_vae", "data", data)
    device = next(vae.parameters()).device
    transform = transform or (lambda x: x.float())

    def terms(x: Tensor) -> dict[str, Tensor]:
        x = transform(x.to(device, non_blocking=True))
        out = vae(x)
        bound = objectives.elbo(x, out.likelihood, out.posterior, out.prior, out.z, kl_weight)
        return {
            "loss": -bound.elbo.mean(),
            "reconstruction": -bound.log_likelihood.mean(),
            "kl": bound.kl.mean(),
        }

    def validate() -> dict[str, float]:
        assert validation is not None
        chunks = validation.split(1024)
        sums = [{name: float(term) * len(x) for name, term in terms(x).items()} for x in chunks]
        return {name: sum(s[name] for s in sums) / len(validation) for name in sums[0]}

    if validation is not None:
        check_data("fit_vae", "validation", validation)
    return train(
        vae,
        terms,
        (data[i] for i in minibatches(len(data), batch_size, seed)),
        steps=steps,
        lr=lr,
        schedule=schedule,
        validate=validate if validation is not None else None,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
        progress=progress,
        description="VAE",
    )


def check_data(function: str, name: str, data: object, minimum: int = 1) -> None:
    """A tensor of at least `minimum` examples, all finite."""
    if not isinstance(data, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor [N, …], got {type(data).__name__}")
    if data.dim() < 2 or len(data) < minimum:
        raise ValueError(f"{function}: {name} must be [N, …] with N ≥ {minimum}, got shape {tuple(data.shape)}")
    if data.is_complex():
        raise TypeError(f"{function}: {name} must be real, got {data.dtype}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        bad = int((~torch.isfinite(data)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{function}: {name} must be finite, got NaN or infinity in row {bad}")
