"""The autoencoders of pythae. Needs pythae: pip install 'ncpvae[pythae]'."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from ..distributions import NormalLikelihood, diagonal_normal
from .adapted import AdaptedVAE, Likelihood


class _Embedding(nn.Module):
    """A pythae model by its conventions: the encoder's embedding and log_covariance, the decoder's reconstruction."""

    autoencoder: Any

    def __init__(self, model: nn.Module, gaussian: bool):
        super().__init__()
        self.autoencoder, self.gaussian = model, gaussian

    def encode(self, x: Tensor) -> Distribution | Tensor:
        output = self.autoencoder.encoder(x)
        if not self.gaussian:
            return output["embedding"]
        mean, log_variance = output["embedding"], output["log_covariance"]
        return diagonal_normal(mean, torch.exp(0.5 * log_variance), mean.dim() - 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decoder(z)["reconstruction"]


def _bernoulli(probabilities: Tensor, event_dims: int) -> Distribution:
    return Independent(Bernoulli(probs=probabilities, validate_args=False), event_dims, validate_args=False)


def from_pythae(model: Any, *, likelihood: Likelihood | None = None, name: str | None = None) -> AdaptedVAE:
    """A pythae autoencoder.

    Its VAE and most variants of that have the Gaussian q(z|x) of their encoder; AE, RAE_L2, RAE_GP and WAE_MMD are
    deterministic. Those whose posterior or latent space is another (HVAE, RHVAE, VAE_IAF, VAE_LinNF, PoincareVAE,
    SVAE, VQVAE) are refused. The prior that a VAMP brings is not used.

    Args:
        model: of the classes above.
        likelihood: see `AdaptedVAE`. By default that of config.reconstruction_loss: Bernoulli for "bce", N(·, 1) for
            "mse"; none for deterministic models and for those trained by another loss (Adversarial_AE, MSSSIM_VAE,
            VAEGAN).
        name: the model's class by default.

    Raises:
        ImportError: without pythae.
        TypeError: for any other class, naming it.
    """
    try:
        from pythae import models
    except ImportError as error:
        raise ImportError("from_pythae needs pythae: pip install 'ncpvae[pythae]'") from error
    other = (models.HVAE, models.RHVAE, models.VAE_IAF, models.VAE_LinNF, models.PoincareVAE, models.SVAE, models.VQVAE)
    if not isinstance(model, (models.VAE, models.AE)) or isinstance(model, other):
        raise TypeError(
            "from_pythae: model must be a pythae AE or VAE with a Gaussian or deterministic encoder, got "
            f"{type(model).__name__}; from_callables takes any pair of functions"
        )
    gaussian = isinstance(model, models.VAE) and not getattr(model, "deterministic_posterior", False)
    if (
        likelihood is None
        and gaussian
        and not isinstance(model, (models.Adversarial_AE, models.MSSSIM_VAE, models.VAEGAN))
    ):
        likelihood = _bernoulli if model.model_config.reconstruction_loss == "bce" else NormalLikelihood(1.0)
    core = _Embedding(model, gaussian)
    return AdaptedVAE(core, int(model.latent_dim), likelihood=likelihood, name=name or type(model).__name__)
