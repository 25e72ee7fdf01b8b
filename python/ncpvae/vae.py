"""Variational autoencoders with one group of latent variables.

`VAE` joins four parts, any of which may be yours: an encoder x → q(z|x), a decoder z → parameters, a
likelihood parameters → p(x|z), and a prior p(z). Letters: B batch, D latent dimension, C H W image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from .distributions import diagonal_normal
from .nn import mlp
from .pretrained import Pretrained


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
        out = self.decoder(z.reshape(-1, z.shape[-1]))
        return self.likelihood(out.view(*leading, *out.shape[1:]), out.dim() - 1)

    def forward(self, x: Tensor) -> VAEOutput:
        posterior = self.encode(x)
        z = posterior.rsample()
        return VAEOutput(self.decode(z), posterior, self.prior_distribution(), z)


class GaussianEncoder(Pretrained):
    """q(z|x) = N(μ(x), diag σ(x)²) from a network that gives 2D numbers per example.

    Args:
        network: x [B, …] → [B, 2D], means first.
        scale: how the second half becomes σ. "softplus": softplus + 1e-5 (LARS and SNIS). "exp": the exponential of
            a log σ clamped to [−10, 10]. "tanh": exp(½·5·tanh), the RAE paper's bounded log-variance.
        input_mean: subtracted from x, broadcastable to it; the data's mean centres the input.
    """

    input_mean: Tensor

    def __init__(self, network: nn.Module, scale: str = "softplus", input_mean: Tensor | None = None):
        super().__init__()
        if scale not in ("softplus", "exp", "tanh"):
            raise ValueError(f"GaussianEncoder: scale must be 'softplus', 'exp' or 'tanh', got {scale!r}")
        self.network, self.scale = network, scale
        self.register_buffer("input_mean", torch.zeros(()) if input_mean is None else input_mean)

    def forward(self, x: Tensor) -> Distribution:
        mean, raw = self.network(x - self.input_mean).chunk(2, dim=1)
        if self.scale == "softplus":
            std = F.softplus(raw) + 1e-5
        elif self.scale == "exp":
            std = raw.clamp(-10.0, 10.0).exp()
        else:
            std = torch.exp(2.5 * torch.tanh(raw))
        return diagonal_normal(mean, std)


class MLPEncoder(GaussianEncoder):
    """Fully connected Gaussian encoder; x of any shape is flattened.

    Args:
        in_features: elements of one x.
        hidden: widths of the hidden layers.
        latent_dim: D.
        activation: the hidden layers' activation module.
        **options: `scale`, `input_mean` of `GaussianEncoder`.
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
        kernel_size: of every convolution; RAE's is 5.
        **options: `scale`, `input_mean` of `GaussianEncoder`.

    Source of the architecture: Ghosh, Sajjadi, Vergari, Black, Schölkopf, "From variational to deterministic
    autoencoders", ICLR 2020 (RAE).
    """

    def __init__(
        self, in_shape: tuple[int, int, int], channels: Sequence[int], latent_dim: int, kernel_size: int = 5, **options
    ):
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
