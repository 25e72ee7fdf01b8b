"""MNIST with the small VAE of LARS and SNIS (NCP-VAE, Table 8)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..data import binarize
from ..distributions import BernoulliLikelihood
from ..priors import Normal
from ..train.engine import Schedule
from ..vae import VAE, MLPDecoder, MLPEncoder
from .base import Evaluation
from .single import StageTwo, VAERecipe


@dataclass(frozen=True)
class MnistMLP(VAERecipe):
    """Dynamically binarised MNIST, fully connected: the setting in which LARS, SNIS and NCP are compared.

    From the public code of Lawson et al. (2019): latent 50, encoder and decoder 300-300 tanh, energy 100-100 tanh,
    batch 128, Adam 3e-4 divided by 3 after 1,000,000 steps of up to 10,000,000, no KL annealing, Glorot uniform
    weights, softplus scale ≥ 1e-5, input and decoder bias centred on the data's mean, the first 50,000 training
    images; 1,024 proposals and 1,000 importance samples. Left open by the paper: how long the classifier is
    trained; 50,000 steps here, on a cosine schedule, with the weights best on the other 10,000 images. The 10,000 steps
    of stage one are this recipe's own default, cut short for a first look: a full run is `--steps 10000000`.
    """

    data: str = "mnist"
    shape: tuple[int, ...] = (1, 28, 28)
    steps: int = 10_000
    lr: float = 3e-4
    schedule: Literal["cosine", "constant"] = "constant"
    lr_drop_step: int = 1_000_000
    """after which a constant learning rate is a third"""
    validate_every: int | None = 5000
    latent_dim: int = 50
    """D"""
    hidden: tuple[int, ...] = (300, 300)
    """widths of the hidden layers of encoder and decoder"""
    prior: StageTwo = field(
        default_factory=lambda: StageTwo(
            hidden=(100, 100), steps=50_000, batch_size=128, lr=3e-4, log_z_samples=1_000_000
        )
    )
    evaluation: Evaluation = field(default_factory=Evaluation)

    def vae(self, mean: Tensor | None = None) -> VAE:
        mean = torch.zeros(self.shape) if mean is None else mean
        features = torch.Size(self.shape).numel()
        encoder = MLPEncoder(
            features,
            self.hidden,
            self.latent_dim,
            nn.Tanh,
            scale="softplus",
            input_mean=mean,
            min_kl=self.remedies.min_kl,
        )
        decoder = MLPDecoder(self.latent_dim, self.hidden, self.shape, nn.Tanh)
        linears = [m for network in (encoder, decoder) for m in network.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            linears[-1].bias.copy_(mean.flatten().clamp(0.001, 0.999).logit())
        return VAE(encoder, decoder, BernoulliLikelihood(), Normal(self.latent_dim))

    def lr_schedule(self) -> Schedule:
        if self.schedule == "constant":
            return lambda step: 1.0 if step < self.lr_drop_step else 1 / 3
        return self.schedule

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.Tanh)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return binarize(x)
