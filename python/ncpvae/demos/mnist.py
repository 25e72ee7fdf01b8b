"""MNIST with the small VAE of LARS and SNIS (NCP-VAE, Table 8)."""

import torch
from torch import Tensor, nn

from ..distributions import BernoulliLikelihood
from ..priors.normal import Normal
from ..vae import VAE, MLPDecoder, MLPEncoder

LATENT_DIM = 50
STAGE_ONE = {"batch_size": 128, "lr": 3e-4, "schedule": "constant", "seed": 0}


def build_vae(train: Tensor, seed: int = 0) -> VAE:
    """Encoder and decoder 300-300 tanh, latent 50, Glorot uniform, input and output centred on the data's mean."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean = train.float().mean(0) / 255
        encoder = MLPEncoder(784, [300, 300], LATENT_DIM, nn.Tanh, scale="softplus", input_mean=mean)
        decoder = MLPDecoder(LATENT_DIM, [300, 300], (1, 28, 28), nn.Tanh)
        for module in [*encoder.modules(), *decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        last = [m for m in decoder if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.copy_(mean.flatten().clamp(0.001, 0.999).logit())
    return VAE(encoder, decoder, BernoulliLikelihood(), Normal(LATENT_DIM))
