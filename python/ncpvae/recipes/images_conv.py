"""Colour images with the convolutional VAE of the RAE paper (NCP-VAE, Table 7)."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ..classifiers import MLPClassifier
from ..data import random_flip, scale
from ..distributions import NormalLikelihood
from ..priors import Normal
from ..vae import VAE, ConvDecoder, ConvEncoder
from .single import StageTwo, VAERecipe


@dataclass(frozen=True)
class ImagesConv(VAERecipe):
    """Colour images, 5×5 stride-2 convolutions with BatchNorm: CelebA-64 as in Table 7, or your own `imagefolder:PATH`.

    From the public code of Ghosh et al. (2020), "From variational to deterministic autoencoders": encoder channels
    128, 256, 512, 1024, latent 64, the decoder from an 8×8 map of 1024 channels by 512, 256 and 128, log-variance
    5·tanh, Adam 1e-4, batch 1,000, 70 epochs (of CelebA's 162 whole batches). Their loss is the squared error summed
    over pixels and averaged over channels plus 0.09024·KL, which is this recipe's likelihood with `decoder_std` = √1.5
    and that β, up to a constant. They halve the rate on plateaus; here it follows a cosine. The classifier of the
    aggregate posterior is left open by the paper.

    Smaller images take fewer channels, one for each halving: `--shape 3 32 32 --channels 128 256 512` for 32×32.
    """

    data: str = "celeba64"
    shape: tuple[int, ...] = (3, 64, 64)
    steps: int = 11_340
    batch_size: int = 1000
    lr: float = 1e-4
    kl_weight: float = 0.09024
    latent_dim: int = 64
    """D"""
    channels: tuple[int, ...] = (128, 256, 512, 1024)
    """of the encoder's stride-2 convolutions; the decoder's, in reverse, start one size larger"""
    encoder_scale: Literal["softplus", "exp", "tanh"] = "tanh"
    """how the encoder's output becomes σ"""
    decoder_std: float = 1.224745
    """σ of the decoder"""
    learn_decoder_std: bool = False
    """train σ with the VAE"""
    flip: bool = True
    """mirror training images at random"""
    prior: StageTwo = field(default_factory=lambda: StageTwo(hidden=(512, 512, 512), steps=20_000))

    def vae(self, mean: Tensor | None = None) -> VAE:
        encoder = ConvEncoder(
            self.shape,  # type: ignore[arg-type]
            self.channels,
            self.latent_dim,
            scale=self.encoder_scale,
            min_kl=self.remedies.min_kl,
        )
        decoder = ConvDecoder(self.latent_dim, self.channels[::-1], self.shape)  # type: ignore[arg-type]
        likelihood = NormalLikelihood(self.decoder_std, self.learn_decoder_std)
        return VAE(encoder, decoder, likelihood, Normal(self.latent_dim))

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.SiLU)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return scale(random_flip(x) if training and self.flip else x)
