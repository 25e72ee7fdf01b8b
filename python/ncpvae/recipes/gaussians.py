"""25 Gaussians on a grid (NCP-VAE, Appendix I)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..distributions import NormalLikelihood
from ..priors import Normal
from ..vae import VAE, MLPDecoder, MLPEncoder
from .base import Evaluation
from .single import StageTwo, VAERecipe


@dataclass(frozen=True)
class Gaussians(VAERecipe):
    """25 Gaussians on a grid: the prior hole in two dimensions.

    From Appendix I: the data, a 20-dimensional latent, encoder and decoder of four fully connected layers of 256,
    20,000 base draws for log Z. Left open there: the activation, the decoder's σ (the data's own here), steps, batch
    sizes, learning rates and the classifier's width.
    """

    maximum: ClassVar[int | None] = None
    data: str = "gaussians"
    shape: tuple[int, ...] = (2,)
    steps: int = 10_000
    lr: float = 2e-3
    latent_dim: int = 20
    """D"""
    hidden: tuple[int, ...] = (256, 256, 256)
    """widths of the hidden layers of encoder and decoder"""
    decoder_std: float = 0.05
    """σ of the decoder; the likelihoods depend on it"""
    prior: StageTwo = field(
        default_factory=lambda: StageTwo(steps=10_000, batch_size=256, lr=4e-3, patience=None, log_z_samples=20_000)
    )
    evaluation: Evaluation = field(
        default_factory=lambda: Evaluation(
            importance_samples=32, snis_proposals=1000, sir_proposals=1000, samples=3000, pictures=3000
        )
    )

    def vae(self, mean: Tensor | None = None) -> VAE:
        features = torch.Size(self.shape).numel()
        encoder = MLPEncoder(features, self.hidden, self.latent_dim, nn.LeakyReLU, min_kl=self.remedies.min_kl)
        decoder = MLPDecoder(self.latent_dim, self.hidden, self.shape, nn.LeakyReLU)
        return VAE(encoder, decoder, NormalLikelihood(self.decoder_std), Normal(self.latent_dim))

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.LeakyReLU)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return x.float()
