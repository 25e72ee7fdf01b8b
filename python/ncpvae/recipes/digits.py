"""scikit-learn's 8×8 digits with a small convolutional VAE."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..distributions import BinomialLikelihood
from ..priors import Normal
from ..vae import VAE, ConvDecoder, ConvEncoder
from .base import Evaluation
from .single import StageTwo, VAERecipe

LEVELS = 16  # a pixel counts the set ones among 4×4


@dataclass(frozen=True)
class Digits(VAERecipe):
    """scikit-learn's digits: real images that ship with a library, and seconds of training.

    No paper stands behind these numbers; they were chosen so that a minute on a CPU shows the whole method.
    """

    maximum: ClassVar[int | None] = LEVELS
    data: str = "digits"
    shape: tuple[int, ...] = (1, 8, 8)
    steps: int = 3000
    latent_dim: int = 10
    """D"""
    channels: tuple[int, ...] = (32, 64)
    """of the encoder's stride-2 convolutions, and in reverse of the decoder's"""
    prior: StageTwo = field(default_factory=lambda: StageTwo(hidden=(128, 128), steps=1500))
    evaluation: Evaluation = field(
        default_factory=lambda: Evaluation(importance_samples=500, snis_proposals=1000, samples=1000)
    )

    def vae(self, mean: Tensor | None = None) -> VAE:
        first, *others = self.channels[::-1]
        encoder = ConvEncoder(self.shape, self.channels, self.latent_dim, kernel_size=3, min_kl=self.remedies.min_kl)  # type: ignore[arg-type]
        up = (first, *others, self.channels[0])
        decoder = ConvDecoder(self.latent_dim, up, self.shape, kernel_size=3)  # type: ignore[arg-type]
        return VAE(encoder, decoder, BinomialLikelihood(LEVELS), Normal(self.latent_dim))

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.SiLU)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return x.float()

    def pictures(self, x: Tensor) -> Tensor:
        return x / LEVELS
