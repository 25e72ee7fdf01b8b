"""Variational autoencoders with one group of latent variables.

`VAE` joins four parts, any of which may be yours: an encoder x → q(z|x), a decoder z → parameters, a
likelihood parameters → p(x|z), and a prior p(z). Letters: B batch, D latent dimension, C H W image.
"""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from .distributions import diagonal_normal
from .nn import full_precision, mlp
from .pretrained import Pretrained

MAX_KL = 80.0  # nats of one coordinate, beyond which σ is no normal number in float32


class VAEOutput(NamedTuple):
    """One pass through a VAE: everything the objectives need."""

    likelihood: Distribution  # p(x|z), batch [B]
    posterior: Distribution  # q(z|x), batch [B], event [D]
    prior: Distribution  # p(z), event [D]
    z: Tensor  # [B, D], a reparameterised draw from the posterior


class VAE(Pretrained):
    """A variational autoencoder from any encoder, decoder, likelihood and prior.

    Args:
        encoder: module x [B, …] → distribution over z with batch [B]; `GaussianEncoder` makes one of a network.
        decoder: module z [B, D] → tensor [B, …] of likelihood parameters.
        likelihood: module (parameters, event_dims) → p(x|z), from `ncpvae.distributions`.
        prior: module whose forward() returns p(z), or a Distribution with event [D].

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014; NCP-VAE, Eq. 1.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: nn.Module, prior: nn.Module | Distribution):
        super().__init__()
        self.encoder, self.decoder, self.likelihood, self.prior = encoder, decoder, likelihood, prior

    def prior_distribution(self) -> Distribution:
        """p(z)."""
        return self.prior if isinstance(self.prior, Distribution) else self.prior()

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x) for x [B, …]."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Distribution:
        """p(x|z) for z [..., D]; its batch shape is z's leading dimensions."""
        leading = z.shape[:-1]
        out = full_precision(self.decoder(z.reshape(-1, z.shape[-1])))
        return self.likelihood(out.view(*leading, *out.shape[1:]), out.dim() - 1)

    def forward(self, x: Tensor, posterior: Distribution | None = None) -> VAEOutput:
        """One pass; a posterior that has been computed already is taken as it is."""
        posterior = self.encode(x) if posterior is None else posterior
        z = posterior.rsample()
        return VAEOutput(self.decode(z), posterior, self.prior_distribution(), z)


class GaussianEncoder(Pretrained):
    """q(z|x) = N(μ(x), diag σ(x)²) from a network that gives 2D numbers per example.

    A critic can share its first layers: `finish(begin(x, share), share)` is `forward(x)`, for any `share`.

    Args:
        network: x [B, …] → [B, 2D], means first.
        scale: how the second half becomes σ. "softplus": softplus + 1e-5 (LARS and SNIS). "exp": the exponential of
            a log σ clamped to [−10, 10]. "tanh": exp(½·5·tanh), the RAE paper's bounded log-variance.
        input_mean: subtracted from x, broadcastable to it; the data's mean centres the input.
        min_kl: a floor under KL(q(z|x) ‖ N(0, I)), nats: σ is kept below the value at which each coordinate costs
            min_kl / D whatever its mean, the committed rate of Razavi, van den Oord, Poole, Vinyals, "Preventing
            posterior collapse with delta-VAEs", ICLR 2019.
    """

    input_mean: Tensor

    def __init__(
        self, network: nn.Module, scale: str = "softplus", input_mean: Tensor | None = None, min_kl: float = 0.0
    ):
        super().__init__()
        if scale not in ("softplus", "exp", "tanh"):
            raise ValueError(f"GaussianEncoder: scale must be 'softplus', 'exp' or 'tanh', got {scale!r}")
        if not 0.0 <= min_kl < math.inf:
            raise ValueError(f"GaussianEncoder: min_kl must be finite and ≥ 0, got {min_kl!r}")
        self.network, self.scale, self.min_kl = network, scale, min_kl
        self.register_buffer("input_mean", torch.zeros(()) if input_mean is None else input_mean)

    def forward(self, x: Tensor) -> Distribution:
        return self.finish(self.begin(x, 0), 0)

    @property
    def num_layers(self) -> int:
        """Layers with weight matrices or kernels; one that is no `nn.Sequential` counts as a single layer."""
        return len(self._weighted()) if isinstance(self.network, nn.Sequential) else 1

    def begin(self, x: Tensor, share: int) -> Tensor:
        """What the first `share` layers and their activations make of x; x itself, centred, for 0."""
        return self._cut(share)[0](x - self.input_mean)

    def finish(self, h: Tensor, share: int) -> Distribution:
        """q(z|x) from what `begin` returned."""
        mean, raw = full_precision(self._cut(share)[1](h)).chunk(2, dim=1)
        if self.scale == "softplus":
            std = F.softplus(raw) + 1e-5
        elif self.scale == "exp":
            std = raw.clamp(-10.0, 10.0).exp()
        else:
            std = torch.exp(2.5 * torch.tanh(raw))
        if self.min_kl:
            limit = largest_std(self.min_kl / mean.shape[1])
            std = limit * -torch.expm1(-std / limit)  # below the limit, and σ itself far below it
        return diagonal_normal(mean, std)

    def remainder(self, share: int) -> nn.Module:
        """A copy of the layers after the first `share`, h → [B, 2D]; those with `reset_parameters` get new weights."""
        rest = copy.deepcopy(self._cut(share)[1])
        for module in rest.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return rest

    def _weighted(self) -> list[int]:
        """Where in the sequence the layers with weights are; a norm's scales, vectors, do not count."""
        return [i for i, layer in enumerate(self.network.children()) if any(p.dim() > 1 for p in layer.parameters())]

    def _cut(self, share: int) -> tuple[nn.Module, nn.Module]:
        """The network before and after the end of layer `share`."""
        if isinstance(share, bool) or not isinstance(share, int) or not 0 <= share < self.num_layers:
            raise ValueError(
                f"GaussianEncoder: share must be an integer in 0 … {self.num_layers - 1} for an encoder of "
                f"{self.num_layers} layers, the last of which is q's own, got {share!r}"
            )
        if share == 0 or not isinstance(self.network, nn.Sequential):
            return nn.Identity(), self.network
        end = self._weighted()[share]
        return self.network[:end], self.network[end:]


def largest_std(kl: float) -> float:
    """The σ ≤ 1 with KL(N(0, σ²) ‖ N(0, 1)) = ½(σ² − 1) − log σ = `kl` nats; every smaller σ costs more."""
    if kl > MAX_KL:
        raise ValueError(f"GaussianEncoder: min_kl must be ≤ {MAX_KL:g} nats for each coordinate, got {kl:g}")
    low, high = math.exp(-kl - 0.5), 1.0  # ½(σ² − 1) ≥ −½ bounds it from below
    for _ in range(60):
        middle = 0.5 * (low + high)
        costs_more = 0.5 * (middle**2 - 1.0) - math.log(middle) > kl
        low, high = (middle, high) if costs_more else (low, middle)
    return low


class MLPEncoder(GaussianEncoder):
    """Fully connected Gaussian encoder; x of any shape is flattened.

    Args:
        in_features: elements of one x.
        hidden: widths of the hidden layers.
        latent_dim: D.
        activation: the hidden layers' activation module.
        **options: `scale`, `input_mean`, `min_kl` of `GaussianEncoder`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        latent_dim: int,
        activation: type[nn.Module] = nn.SiLU,
        **options,
    ):
        network = nn.Sequential(nn.Flatten(), *mlp([in_features, *hidden, 2 * latent_dim], activation))
        super().__init__(network, **options)


class MLPDecoder(nn.Sequential, Pretrained):
    """Fully connected decoder: z [B, D] → [B, *out_shape].

    Args:
        latent_dim: D.
        hidden: widths of the hidden layers.
        out_shape: shape of one x.
        activation: the hidden layers' activation module.
    """

    def __init__(
        self, latent_dim: int, hidden: Sequence[int], out_shape: Sequence[int], activation: type[nn.Module] = nn.SiLU
    ):
        features = int(torch.Size(out_shape).numel())
        super().__init__(*mlp([latent_dim, *hidden, features], activation), nn.Unflatten(1, tuple(out_shape)))


class ConvEncoder(GaussianEncoder):
    """Strided convolutions, BatchNorm and ReLU, then one linear layer.

    Args:
        in_shape: (C, H, W) of x.
        channels: output channels of each stride-2 convolution; the RAE paper's are (128, 256, 512, 1024).
        latent_dim: D.
        kernel_size: odd, of every convolution; RAE's is 5.
        **options: `scale`, `input_mean`, `min_kl` of `GaussianEncoder`.

    Source of the architecture: Ghosh, Sajjadi, Vergari, Black, Schölkopf, "From variational to deterministic
    autoencoders", ICLR 2020 (RAE).
    """

    def __init__(
        self, in_shape: tuple[int, int, int], channels: Sequence[int], latent_dim: int, kernel_size: int = 5, **options
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvEncoder: kernel_size must be odd, got {kernel_size}")
        layers: list[nn.Module] = []
        (before, height, width), padding = in_shape, kernel_size // 2
        for after in channels:
            convolution = nn.Conv2d(before, after, kernel_size, stride=2, padding=padding, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
            before, height, width = after, (height + 1) // 2, (width + 1) // 2
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * height * width, 2 * latent_dim))
        super().__init__(network, **options)


class ConvDecoder(Pretrained):
    """A linear layer to a small feature map, then transposed convolutions, BatchNorm and ReLU.

    Args:
        latent_dim: D.
        channels: channels of the first feature map and after each stride-2 transposed convolution; RAE's are
            (1024, 512, 256, 128).
        out_shape: (C, H, W) of x; H and W must be multiples of 2 to the number of upsamplings.
        kernel_size: odd, of every convolution; RAE's is 5.
    """

    def __init__(self, latent_dim: int, channels: Sequence[int], out_shape: tuple[int, int, int], kernel_size: int = 5):
        super().__init__()
        out_channels, height, width = out_shape
        factor, padding = 2 ** (len(channels) - 1), kernel_size // 2
        if height % factor or width % factor:
            raise ValueError(
                f"ConvDecoder: out_shape's height and width must be multiples of {factor} "
                f"for {len(channels) - 1} upsamplings, got {tuple(out_shape)}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvDecoder: kernel_size must be odd, got {kernel_size}")
        small = (channels[0], height // factor, width // factor)
        layers: list[nn.Module] = [nn.Linear(latent_dim, torch.Size(small).numel()), nn.Unflatten(1, small)]
        layers += [nn.BatchNorm2d(channels[0]), nn.ReLU()]
        for before, after in pairwise(channels):
            up = nn.ConvTranspose2d(before, after, kernel_size, 2, padding, output_padding=1, bias=False)
            layers += [up, nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.Conv2d(channels[-1], out_channels, kernel_size, padding=padding))
        self.network = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


class StackedConvEncoder(GaussianEncoder):
    """Convolutions one by one, each with its own kernel and stride, ReLU between them, then one linear layer.

    Args:
        in_shape: (C, H, W) of x.
        layers: (channels, kernel size, stride) of each convolution, padded by (kernel − 1) // 2.
        latent_dim: D.
        **options: `scale`, `input_mean`, `min_kl` of `GaussianEncoder`.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], layers: Sequence[tuple[int, int, int]], latent_dim: int, **options
    ):
        sizes = _stacked_sizes("StackedConvEncoder", in_shape, layers)
        network: list[nn.Module] = []
        for (before, *_), (channels, kernel, stride) in zip(sizes, layers, strict=False):
            network += [nn.Conv2d(before, channels, kernel, stride, (kernel - 1) // 2), nn.ReLU()]
        last = nn.Linear(torch.Size(sizes[-1]).numel(), 2 * latent_dim)
        super().__init__(nn.Sequential(*network, nn.Flatten(), last), **options)


class StackedConvDecoder(nn.Sequential, Pretrained):
    """The mirror image of `StackedConvEncoder`: a linear layer, then transposed convolutions back to `out_shape`.

    Args:
        latent_dim: D.
        layers: of the encoder, in the encoder's order.
        out_shape: (C, H, W) of x.
    """

    def __init__(self, latent_dim: int, layers: Sequence[tuple[int, int, int]], out_shape: tuple[int, int, int]):
        sizes = _stacked_sizes("StackedConvDecoder", out_shape, layers)
        network: list[nn.Module] = [nn.Linear(latent_dim, torch.Size(sizes[-1]).numel()), nn.Unflatten(1, sizes[-1])]
        for large, small, (_, kernel, stride) in reversed([*zip(sizes, sizes[1:], layers, strict=False)]):
            padding = (kernel - 1) // 2
            rows, columns = (
                w + 2 * padding - kernel - (v - 1) * stride for v, w in zip(small[1:], large[1:], strict=True)
            )
            up = nn.ConvTranspose2d(small[0], large[0], kernel, stride, padding, (rows, columns))
            network += [nn.ReLU(), up]
        super().__init__(*network)


def _stacked_sizes(
    owner: str, shape: tuple[int, int, int], layers: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """(C, H, W) before the first convolution and after each."""
    sizes = [(shape[0], shape[1], shape[2])]
    for number, (channels, kernel, stride) in enumerate(layers):
        padding = (kernel - 1) // 2
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in sizes[-1][1:])
        if min(channels, kernel, stride, height, width) < 1:
            raise ValueError(
                f"{owner}: layers must leave something of {tuple(shape)}, got {(channels, kernel, stride)} as layer "
                f"{number} on {tuple(sizes[-1])}"
            )
        sizes.append((channels, height, width))
    return sizes
