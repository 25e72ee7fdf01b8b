"""What torch.distributions lacks here: likelihood heads, fast diagonal mixtures, and tempering.

A *likelihood* is a module that turns a decoder's output into the distribution p(x|z); a decoder that returns
a distribution itself needs none. `parameter_channels(C)` is how many channels a likelihood of images with C takes.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    constraints,
)
from torch.nn import functional as F

from . import ops
from .pretrained import Pretrained


def diagonal_normal(mean: Tensor, std: Tensor, event_dims: int = 1) -> Independent:
    """Normal with independent coordinates over the last `event_dims` dimensions of `mean`."""
    return Independent(Normal(mean, std, validate_args=False), event_dims, validate_args=False)


class BernoulliLikelihood(Pretrained):
    """p(x|z) for binary x: the decoder's output are logits, one per element of x."""

    def parameter_channels(self, channels: int) -> int:
        return channels

    def forward(self, logits: Tensor, event_dims: int) -> Independent:
        return Independent(Bernoulli(logits=logits, validate_args=False), event_dims, validate_args=False)


class BinomialLikelihood(Pretrained):
    """p(x|z) for counts x in 0 … total_count: the decoder's output are logits, one per element of x."""

    def __init__(self, total_count: int):
        super().__init__()
        if total_count < 1:
            raise ValueError(f"BinomialLikelihood: total_count must be ≥ 1, got {total_count}")
        self.total_count = total_count

    def parameter_channels(self, channels: int) -> int:
        return channels

    def forward(self, logits: Tensor, event_dims: int) -> Independent:
        return Independent(Binomial(self.total_count, logits=logits, validate_args=False), event_dims, False)


class NormalLikelihood(Pretrained):
    """p(x|z) = N(decoder output, σ²), one σ for all elements, fixed or learned.

    Args:
        std: σ > 0, in units of x; the initial value where it is learned.
        learn_std: train log σ with the VAE, the maximum-likelihood choice of Rybkin, Daniilidis and Levine,
            "Simple and effective VAE training with calibrated decoders", 2021.
    """

    def __init__(self, std: float = 1.0, learn_std: bool = False):
        super().__init__()
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"NormalLikelihood: std must be finite and > 0, got {std}")
        log_std = torch.tensor(math.log(std))
        if learn_std:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def parameter_channels(self, channels: int) -> int:
        return channels

    def forward(self, mean: Tensor, event_dims: int) -> Independent:
        return diagonal_normal(mean, self.log_std.exp().expand(mean.shape), event_dims)


def soft_clamp(x: Tensor, limit: float = 5.0) -> Tensor:
    """limit·tanh(x / limit): x near zero, and never beyond ±limit."""
    return limit * torch.tanh(x / limit)


class SoftClampedNormal(Independent):
    """N(c(mean), σ²) with σ = exp(c(log_std)) + 1e-2, c being `soft_clamp`: NVAE's Normal, which cannot degenerate.

    Args:
        mean, log_std: [..., *event], before they are clamped; any real numbers.
        event_dims: the number of dimensions of the event.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, event_dims: int = 1):
        self.raw_mean, self.raw_log_std = mean, log_std
        normal = Normal(soft_clamp(mean), soft_clamp(log_std).exp() + 1e-2, validate_args=False)
        super().__init__(normal, event_dims, validate_args=False)

    def residual(self, mean: Tensor, log_std: Tensor) -> "SoftClampedNormal":
        """The residual Normal of NVAE, section 3.2: its parameters are this one's and these, added before clamping."""
        dims = self.reinterpreted_batch_ndims
        return SoftClampedNormal(self.raw_mean + mean, self.raw_log_std + log_std, dims)

    def expand(self, batch_shape, _instance=None) -> Independent:
        return Independent(self.base_dist, self.reinterpreted_batch_ndims, validate_args=False).expand(batch_shape)


class PixelNormalLikelihood(Pretrained):
    """p(x|z) for images x in [0, 1]: a Normal for each pixel, with its own mean and σ (NCP-VAE, appendix D).

    The decoder's output [..., 2C, H, W], means first, are the raw parameters of a `SoftClampedNormal` over 2x − 1.
    """

    def parameter_channels(self, channels: int) -> int:
        return 2 * channels

    def forward(self, parameters: Tensor, event_dims: int = 3) -> Independent:
        mean, log_std = parameters.chunk(2, dim=-3)
        wide = SoftClampedNormal(mean, log_std, event_dims).base_dist
        return diagonal_normal(0.5 * (wide.loc + 1.0), 0.5 * wide.scale, event_dims)


class LogisticMixtureLikelihood(Pretrained):
    """p(x|z) for images of `bits` bits, x = level / (2^bits − 1), by a mixture of discretised logistics.

    Args:
        components: of the mixture, K.
        bits: of the data, 1 … 16.

    See `DiscretizedLogisticMixture` for the decoder's output.
    """

    def __init__(self, components: int = 10, bits: int = 8):
        super().__init__()
        if components < 1 or not 1 <= bits <= 16:
            raise ValueError(
                f"LogisticMixtureLikelihood: components must be ≥ 1 and bits 1 … 16, got {components} and {bits}"
            )
        self.components, self.bits = components, bits

    def parameter_channels(self, channels: int) -> int:
        return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def forward(self, parameters: Tensor, event_dims: int = 3) -> "DiscretizedLogisticMixture":
        return DiscretizedLogisticMixture(parameters, self.components, self.bits)


class DiscretizedLogisticMixture(Distribution):
    """Images [C, H, W] of 2^bits levels in [0, 1], each pixel a mixture of K discretised logistics.

    In component k of a pixel, channel c has mean μ_c + Σ_{j<c} tanh(a_cj)·x_j on the scale 2x − 1, so that a channel is
    conditional on those before it. The probability of a level is the logistic's mass from half a level below it to half
    a level above; the first and last level have the tails. log-scales are ≥ −7.

    Args:
        parameters: [..., K·(1 + 2C + C(C − 1)/2), H, W]: logits [K], means [C, K], log-scales [C, K], then a
            [C(C − 1)/2, K].
        components: K.
        bits: of the data.

    Source: Salimans, Karpathy, Chen, Kingma, "PixelCNN++", ICLR 2017, sections 2.1 and 2.2.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.independent(constraints.unit_interval, 3)

    def __init__(self, parameters: Tensor, components: int, bits: int = 8):
        per_component = parameters.shape[-3] // components
        channels = next((c for c in range(1, per_component) if 1 + 2 * c + c * (c - 1) // 2 >= per_component), 0)
        numbers = 1 + 2 * channels + channels * (channels - 1) // 2
        if not channels or numbers * components != parameters.shape[-3]:
            raise ValueError(
                "DiscretizedLogisticMixture: parameters must be [..., K·(1 + 2C + C(C − 1)/2), H, W] with "
                f"K = {components}, got shape {tuple(parameters.shape)}"
            )
        self.levels = 2**bits
        split = parameters.unflatten(-3, (numbers, components))  # [..., numbers, K, H, W]
        parts = split.split((1, channels, channels, numbers - 1 - 2 * channels), dim=-4)
        self.log_weight = parts[0].squeeze(-4).log_softmax(-3)  # [..., K, H, W]
        self.component_mean, self.log_scale = parts[1], parts[2].clamp(min=-7.0)  # [..., C, K, H, W]
        self.coefficient = parts[3].tanh()
        event_shape = torch.Size([channels, *parameters.shape[-2:]])
        super().__init__(parameters.shape[:-3], event_shape, validate_args=False)

    def _mean(self, channel: int, before: Tensor) -> Tensor:
        """Component means [..., K, H, W] of a channel, given 2x − 1 of those before it, [..., C', K or 1, H, W]."""
        start = channel * (channel - 1) // 2
        coefficient = self.coefficient[..., start : start + channel, :, :, :]
        return self.component_mean[..., channel, :, :, :] + (coefficient * before).sum(-4)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x), nats, [...], for x [..., C, H, W], which is taken to the nearest level."""
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"DiscretizedLogisticMixture: x must be [..., {', '.join(map(str, self.event_shape))}], got shape "
                f"{tuple(value.shape)}"
            )
        level = (value * (self.levels - 1)).round()
        x = (2.0 * level / (self.levels - 1) - 1.0).unsqueeze(-3)  # [..., C, 1, H, W]
        mean = torch.stack([self._mean(c, x[..., :c, :, :, :]) for c in range(x.shape[-4])], dim=-4)
        inverse_scale, half = torch.exp(-self.log_scale), 1.0 / (self.levels - 1)
        above, below = ((x - mean + sign * half) * inverse_scale for sign in (1.0, -1.0))
        # σ(a) − σ(b) = σ(a)·σ(−b)·(1 − e^(b − a)), of which nothing cancels; a tail is one of the first two factors
        log_mass = -F.softplus(-above) - F.softplus(below) + torch.log(-torch.expm1(-2.0 * half * inverse_scale))
        level = level.unsqueeze(-3)
        log_mass = torch.where(level <= 0, -F.softplus(-above), log_mass)
        log_mass = torch.where(level >= self.levels - 1, -F.softplus(below), log_mass)
        return torch.logsumexp(self.log_weight + log_mass.sum(-4), dim=-3).sum((-2, -1))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Images [*sample_shape, ..., C, H, W]."""
        sample_shape = torch.Size(sample_shape)
        pixel = Categorical(logits=self.log_weight.movedim(-3, -1), validate_args=False)  # [..., H, W] of K
        chosen = pixel.sample(sample_shape).unsqueeze(-3)  # [*sample_shape, ..., 1, H, W]
        leading = chosen.shape[:-3]
        channels: list[Tensor] = []
        for c in range(self.event_shape[0]):
            before = torch.stack(channels, dim=-4) if channels else self.log_weight.new_zeros(())
            both = self._mean(c, before), self.log_scale[..., c, :, :, :]
            mean, log_scale = (t.expand(*leading, *t.shape[-3:]).gather(-3, chosen) for t in both)
            uniform = torch.rand_like(mean).clamp(1e-7, 1.0 - 1e-7)
            x = mean + log_scale.exp() * torch.logit(uniform)
            level = (0.5 * (x + 1.0) * (self.levels - 1)).round().clamp(0, self.levels - 1)
            channels.append(2.0 * level / (self.levels - 1) - 1.0)
        return 0.5 * (torch.cat(channels, dim=-3) + 1.0)

    @property
    def mean(self) -> Tensor:
        """The components' means within [0, 1], mixed: what the cut-off tails add to a mean is left out."""
        channels: list[Tensor] = []
        for c in range(self.event_shape[0]):
            before = torch.stack(channels, dim=-4) if channels else self.log_weight.new_zeros(())
            channels.append(self._mean(c, before).clamp(-1.0, 1.0))
        mixed = (self.log_weight.exp().unsqueeze(-4) * torch.stack(channels, dim=-4)).sum(-3)
        return 0.5 * (mixed + 1.0)


class DiagonalMixture(Distribution):
    """Mixture of K Gaussians with diagonal covariance, its density computed by `ops.gaussian_logsumexp`.

    The N×K×D broadcast that `MixtureSameFamily` makes is never held.

    Args:
        log_weight: [K], nats; normalised here.
        mean, std: [K, D].
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    def __init__(self, log_weight: Tensor, mean: Tensor, std: Tensor):
        if mean.dim() != 2 or std.shape != mean.shape or log_weight.shape != mean.shape[:1]:
            raise ValueError(
                "DiagonalMixture: log_weight must be [K] and mean and std [K, D], got shapes "
                f"{tuple(log_weight.shape)}, {tuple(mean.shape)}, {tuple(std.shape)}"
            )
        self.log_weight, self.component_mean, self.component_std = log_weight.log_softmax(0), mean, std
        super().__init__(event_shape=mean.shape[1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.reshape(-1, value.shape[-1])
        log_p = ops.gaussian_logsumexp(flat, self.component_mean, self.component_std.log(), self.log_weight)
        return log_p.view(value.shape[:-1])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            k = Categorical(logits=self.log_weight, validate_args=False).sample(torch.Size(sample_shape))
            return self.component_mean[k] + self.component_std[k] * torch.randn_like(self.component_mean[k])

    @property
    def mean(self) -> Tensor:
        return self.log_weight.exp() @ self.component_mean

    @property
    def variance(self) -> Tensor:
        second_moment = self.component_std.square() + self.component_mean.square()
        return self.log_weight.exp() @ second_moment - self.mean.square()


def temper(distribution: Distribution, temperature: float) -> Distribution:
    """The distribution with its standard deviations multiplied by `temperature`, means unchanged.

    Defined for Normal, MultivariateNormal, mixtures of them, and `Independent` around these: the scaling of
    a prior's σ that NCP-VAE section 5.2 uses for pictures. 1 returns the distribution itself.
    """
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temper: temperature must be a finite number > 0, got {temperature!r}")
    if temperature == 1.0:
        return distribution
    if isinstance(distribution, Independent):
        base = temper(distribution.base_dist, temperature)
        return Independent(base, distribution.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(distribution, Normal):
        return Normal(distribution.loc, distribution.scale * temperature, validate_args=False)
    if isinstance(distribution, MultivariateNormal):
        scale = distribution.scale_tril * temperature
        return MultivariateNormal(distribution.loc, scale_tril=scale, validate_args=False)
    if isinstance(distribution, DiagonalMixture):
        scaled = distribution.component_std * temperature
        return DiagonalMixture(distribution.log_weight, distribution.component_mean, scaled)
    if isinstance(distribution, MixtureSameFamily):
        components = temper(distribution.component_distribution, temperature)
        return MixtureSameFamily(distribution.mixture_distribution, components, validate_args=False)
    raise TypeError(
        "temper: distribution must be a Normal, a MultivariateNormal or a mixture of them to be scaled, "
        f"got {type(distribution).__name__}"
    )


def normal_parameters(distribution: Distribution) -> tuple[Tensor, Tensor] | None:
    """(mean, std) of a Normal with independent coordinates; None for any other distribution."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return (distribution.loc, distribution.scale) if isinstance(distribution, Normal) else None
