"""Omniglot with convolutions and contrastive critics (Menon et al., 2022; the study by Asokan, Table 2)."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..data import binarize
from ..distributions import BernoulliLikelihood
from ..priors import Normal
from ..vae import VAE, StackedConvDecoder, StackedConvEncoder
from .base import Evaluation
from .single import CriticSettings, StageTwo, VAERecipe
from .toy_gmm import STUDY

#: (channels, kernel size, stride) of the encoder's convolutions
LAYERS = ((32, 3, 1), (64, 4, 2), (128, 4, 2), (256, 3, 2), (512, 2, 1))


@dataclass(frozen=True)
class OmniglotConv(VAERecipe):
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

    def published(self) -> dict[str, str]:
        columns = ("NLL", "MI", "AU", "density", "coverage")
        rows = {
            "none": ("64.29 (0.0)", "0.03 (0.03)", "32.0 (0.0)", "0.99 (0.03)", "0.97 (0.0)"),
            "self": ("67.54 (6.48)", "3.86 (0.03)", "32.0 (0.0)", "0.97 (0.11)", "0.87 (0.05)"),
            "hybrid": ("71.77 (0.29)", "3.74 (0.01)", "32.0 (0.0)", "0.91 (0.28)", "0.48 (0.12)"),
            "neural": ("71.29 (0.26)", "3.77 (0.04)", "32.0 (0.0)", "1.02 (0.01)", "0.63 (0.01)"),
        }
        row = rows.get(self.critic.kind)
        return {} if row is None else {**dict(zip(columns, row, strict=True)), "runs": "3", "note": STUDY}
