"""Other people's VAEs: diffusers', pythae's, or any two functions, behind the interface that the rest of ncpvae uses.

    vae = from_diffusers(model)                   # or from_pythae(model), from_callables(encode, decode, latent_shape)
    prior = prior_for_codes(codes(vae, images))   # a Gaussian fitted to the codes, and a classifier
    fit_ncp(prior, vae=vae, data=images, transform=vae.prepare)
    pictures = vae.images(prior.sample((64,)))

An `AdaptedVAE` gives distributions with one mean and one log-density for a Gaussian encoder, and says what is missing
where there is no density.
"""

from .adapted import AdaptedVAE, PointMass, from_callables
from .diffusers_vae import from_diffusers
from .prior import StandardizedClassifier, codes, prior_for_codes
from .pythae_vae import from_pythae

__all__ = [
    "AdaptedVAE",
    "PointMass",
    "StandardizedClassifier",
    "codes",
    "from_callables",
    "from_diffusers",
    "from_pythae",
    "prior_for_codes",
]
