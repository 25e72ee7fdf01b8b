"""Omniglot with convolutions and contrastive critics (Menon et al., 2022; the study by Asokan, Table 2)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..data import binarize
from ..distributions import BernoulliLikelihood
from ..priors import Normal
from ..vae import VAE, StackedConvDecoder, StackedConvEncoder
from .base import CriticSettings, Evaluation, Recipe, StageTwo

#: (channels, kernel size, stride) of the encoder's convolutions
LAYERS = ((32, 3, 1), (64, 4, 2), (128, 4, 2), (256, 3, 2), (512, 2, 1))


@dataclass(frozen=True)
class OmniglotConv(Recipe):
    """Omniglot, five convolutions and their mirror image: the study's Table 2, and its critics.

    From the study and its public code: the convolutions, latent 32, a Bernoulli decoder, images binarised on the fly,
    AdamW 2e-4, batch 50, 30 epochs (13,380 steps of 446), λ = 20, a hybrid critic that shares four convolutions, heads
    of two layers. Left open there: padding, activations (ReLU here), the decoder's first feature map (512 at 3×3, the
    encoder's last), the heads' widths, and which weights are kept (the best on validation here).
    """

    data: str = "omniglot"
    shape: tuple[int, ...] = (1, 28, 28)
    steps: int = 13_380
    batch_size: int = 50
    lr: float = 2e-4
    weight_decay: float | None = 0.01
    schedule: str = "constant"  # type: ignore[assignment]
    critic: CriticSettings = field(default_factory=lambda: CriticSettings(share=4))
    latent_dim: int = 32
    """D"""
    prior: StageTwo = field(default_factory=lambda: StageTwo(steps=10_000))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(importance_samples=500))

    def vae(self, mean: Tensor | None = None) -> VAE:
        shape = (self.shape[0], self.shape[1], self.shape[2])
        encoder = StackedConvEncoder(shape, LAYERS, self.latent_dim, scale="exp", min_kl=self.remedies.min_kl)
        decoder = StackedConvDecoder(self.latent_dim, LAYERS, shape)
        return VAE(encoder, decoder, BernoulliLikelihood(), Normal(self.latent_dim))

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.SiLU)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return binarize(x)
