"""Any VAE behind one interface: `encode` gives q(z|x), `decode` gives p(x|z), both as distributions.

Where a model has no density, being a deterministic encoder or a decoder without a likelihood, the distribution is a
`PointMass`: it has a mean and draws, and says what is missing when it is asked for a log-density.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

Likelihood = Callable[[Tensor, int], Distribution]  # (decoder's output, event dimensions) → p(x|z)


class PointMass(Distribution):
    """All mass at one point: draws equal `mean`, and there is no density.

    Args:
        value: [*batch, *event].
        event_dims: dimensions of the event.
        missing: what to tell those who ask for `log_prob`.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real

    def __init__(self, value: Tensor, event_dims: int, missing: str = "a point mass has no density"):
        self.value, self.missing = value, missing
        batch_dims = value.dim() - event_dims
        super().__init__(value.shape[:batch_dims], value.shape[batch_dims:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.value

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.value)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
        return self.value.expand(*sample_shape, *self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(f"log_prob: {self.missing}")


class Unflattened(Distribution):
    """A distribution over rows seen with several batch dimensions: batch [R] → [*batch], R their product.

    Args:
        rows: with batch shape [R].
        batch: the shape it gets.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real

    def __init__(self, rows: Distribution, batch: torch.Size):
        self.rows = rows
        super().__init__(batch, rows.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.rows.mean.reshape(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.rows.variance.reshape(*self.batch_shape, *self.event_shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
        shape = torch.Size(sample_shape)
        return self.rows.sample(shape).reshape(*shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """value broadcastable to [..., *batch, *event] → [..., *batch]."""
        one = self.batch_shape + self.event_shape
        value = value.expand(torch.broadcast_shapes(value.shape, one))
        leading = value.shape[: value.dim() - len(one)]
        rows = value.reshape(*leading, self.batch_shape.numel(), *self.event_shape)
        return self.rows.log_prob(rows).reshape(*leading, *self.batch_shape)


class AdaptedVAE(nn.Module):
    """A VAE of any make, with latents in the scale that its prior is for.

    It is what `fit_ncp(vae=…)`, `metrics.importance_weighted_nll` and `codes` take. Made by `from_diffusers`,
    `from_pythae` and `from_callables`.

    Args:
        model: module with `encode`: x [B, …] → q(z|x) or z [B, *latent_shape], and `decode`: z [R, *latent_shape] →
            p(x|z) or x [R, …]. It is put in eval mode. Inputs are moved to its parameters' device and dtype.
        latent_shape: shape of one z.
        likelihood: (decoder's output [R, …], event dimensions) → p(x|z), such as `ncpvae.NormalLikelihood(0.1)`, for
            a `decode` that returns tensors. Without it `decode(z)` has a mean and no density.
        value_range: what black and white are in x.
        name: for tables and messages.
    """

    model: Any  # torch types the attributes of a module as tensors

    def __init__(
        self,
        model: nn.Module,
        latent_shape: int | tuple[int, ...],
        *,
        likelihood: Likelihood | None = None,
        value_range: tuple[float, float] = (0.0, 1.0),
        name: str = "VAE",
    ):
        super().__init__()
        shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
        if not shape or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
            raise ValueError(f"{name}: latent_shape must be one or more positive integers, got {latent_shape!r}")
        if likelihood is not None and not callable(likelihood):
            raise TypeError(
                f"{name}: likelihood must be callable, (decoder's output, event dimensions) → Distribution, "
                f"got {type(likelihood).__name__}"
            )
        low, high = value_range
        if not low < high:
            raise ValueError(f"{name}: value_range must be (low, high) with low < high, got {value_range}")
        self.model, self.latent_shape, self.name = model.eval(), shape, name
        self.likelihood, self.value_range = likelihood, (float(low), float(high))

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x) with batch [B] and event `latent_shape`, for x [B, …] of floats in `value_range`.

        Raises:
            TypeError: for x that is no floating-point tensor; `prepare` converts bytes.
            ValueError: where the codes do not have the shape `latent_shape`.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"{self.name}.encode: x must be a floating-point tensor with values in {self.value_range}, got "
                f"{getattr(x, 'dtype', type(x).__name__)}; prepare(x) converts uint8"
            )
        missing = f"{self.name}'s encoder is deterministic: q(z|x) has no density, and so x has no likelihood"
        q = _distribution(f"{self.name}.encode", self.model.encode(self._as_model(x)), len(x), None, missing)
        if q.event_shape != self.latent_shape:
            raise ValueError(
                f"{self.name}.encode: codes must have the shape latent_shape {self.latent_shape}, got "
                f"{tuple(q.event_shape)} for x of shape {tuple(x.shape)}"
            )
        return q

    def decode(self, z: Tensor) -> Distribution:
        """p(x|z) with batch [...], for z [..., *latent_shape]; its `mean` is the picture.

        Raises:
            ValueError: for z of another shape.
        """
        batch_dims = z.dim() - len(self.latent_shape)
        if batch_dims < 0 or z.shape[batch_dims:] != self.latent_shape:
            wanted = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"{self.name}.decode: z must be [..., {wanted}], got shape {tuple(z.shape)}")
        batch = z.shape[:batch_dims]
        rows = self._as_model(z.reshape(-1, *self.latent_shape))
        missing = f"{self.name}'s decoder has no likelihood; give one, for example likelihood=NormalLikelihood(0.1)"
        p = _distribution(f"{self.name}.decode", self.model.decode(rows), len(rows), self.likelihood, missing)
        return p if batch_dims == 1 else Unflattened(p, batch)

    @torch.no_grad()
    def images(self, z: Tensor, batch_size: int = 256) -> Tensor:
        """The means of p(x|z) for z [N, *latent_shape], shifted and scaled to [0, 1] and clamped: [N, …]."""
        low, high = self.value_range
        return torch.cat([(self.decode(part).mean - low) / (high - low) for part in z.split(batch_size)]).clamp(0, 1)

    def prepare(self, x: Tensor) -> Tensor:
        """uint8 x in 0 … 255 → float32 in `value_range`; floats as they are. For `fit_ncp(transform=vae.prepare)`."""
        if x.is_floating_point():
            return x
        if x.dtype != torch.uint8:
            raise TypeError(f"{self.name}.prepare: x must be uint8 or floating point, got {x.dtype}")
        low, high = self.value_range
        return x.float() * ((high - low) / 255) + low

    def _as_model(self, x: Tensor) -> Tensor:
        """x on the device and in the dtype of the model's parameters, as it is where there are none."""
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        return x if parameter is None else x.to(parameter)


def _distribution(
    function: str, output: Distribution | Tensor, rows: int, likelihood: Likelihood | None, missing: str
) -> Distribution:
    """What a model returned, as a distribution with batch [rows]; halves become float32 on the way."""
    if isinstance(output, Tensor):
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        event_dims = max(0, output.dim() - 1)
        output = PointMass(output, event_dims, missing) if likelihood is None else likelihood(output, event_dims)
    if not isinstance(output, Distribution):
        raise TypeError(f"{function}: the model must return a Distribution or a tensor, got {type(output).__name__}")
    if len(output.batch_shape) > 1:  # coordinates that are independent, such as Normal(mean, std)
        output = Independent(output, len(output.batch_shape) - 1, validate_args=False)
    if output.batch_shape != (rows,):
        raise ValueError(
            f"{function}: the model must return one result for each of {rows} inputs, got batch "
            f"{tuple(output.batch_shape)}"
        )
    return output


class _Callables(nn.Module):
    """Two functions as a module; those of them that are modules move and switch mode with it."""

    def __init__(self, encode: Callable, decode: Callable):
        super().__init__()
        self.encoder, self.decoder = encode, decode

    def encode(self, x: Tensor) -> Distribution | Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Distribution | Tensor:
        return self.decoder(z)


def from_callables(
    encode: Callable[[Tensor], Distribution | Tensor],
    decode: Callable[[Tensor], Distribution | Tensor],
    latent_shape: int | tuple[int, ...],
    *,
    likelihood: Likelihood | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    name: str = "VAE",
) -> AdaptedVAE:
    """Two functions, or modules, as a VAE.

    Args:
        encode: x [B, …] → q(z|x) as a Distribution, or z [B, *latent_shape].
        decode: z [R, *latent_shape] → p(x|z) as a Distribution, or x [R, …].
        latent_shape: D, or the shape of one z.
        likelihood, value_range, name: see `AdaptedVAE`.

    Raises:
        TypeError: for what cannot be called.

    Example:
        >>> vae = from_callables(lambda x: x[:, :2], lambda z: torch.cat([z, -z], 1), 2)
        >>> vae.decode(vae.encode(torch.rand(5, 4)).sample()).mean.shape
        torch.Size([5, 4])
    """
    for argument, function in (("encode", encode), ("decode", decode)):
        if not callable(function):
            raise TypeError(f"from_callables: {argument} must be callable, got {type(function).__name__}")
    model = _Callables(encode, decode)
    return AdaptedVAE(model, latent_shape, likelihood=likelihood, value_range=value_range, name=name)
