"""The training objectives, as functions of tensors and distributions."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.nn import functional as F

LOG_2 = math.log(2.0)


class ELBOTerms(NamedTuple):
    """The evidence lower bound of each example and its two parts, nats, each [B]."""

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor


def elbo(
    x: Tensor, likelihood: Distribution, posterior: Distribution, prior: Distribution, z: Tensor, kl_weight: float = 1.0
) -> ELBOTerms:
    """E_q[log p(x|z)] − β·KL(q(z|x) ‖ p(z)), by one draw z (NCP-VAE, Eq. 1).

    Args:
        x: [B, …].
        likelihood: p(x|z) at that draw, batch [B].
        posterior: q(z|x), batch [B].
        prior: p(z); a KL without closed form is estimated as log q(z|x) − log p(z).
        z: [B, D], the draw from `posterior`.
        kl_weight: β; the `elbo` returned is a bound only for 1.
    """
    log_likelihood = likelihood.log_prob(x)
    try:
        kl = kl_divergence(posterior, prior)
    except NotImplementedError:
        kl = posterior.log_prob(z) - prior.log_prob(z)
    if log_likelihood.shape != kl.shape:
        raise ValueError(
            f"elbo: likelihood and KL must have one number per example, got shapes {tuple(log_likelihood.shape)} and "
            f"{tuple(kl.shape)}; wrap distributions in torch.distributions.Independent"
        )
    if posterior.event_shape != prior.event_shape:
        raise ValueError(
            f"elbo: posterior and prior must have one event shape, got {tuple(posterior.event_shape)} and "
            f"{tuple(prior.event_shape)}"
        )
    return ELBOTerms(log_likelihood - kl_weight * kl, log_likelihood, kl)


def nce(log_ratio_posterior: Tensor, log_ratio_base: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary noise contrastive loss L = −E_q[log D(z)] − E_p[log(1 − D(z))], D = sigmoid(log r) (NCP-VAE, Eq. 3).

    The two expectations are *summed*: with D = ½ everywhere L = 2·log 2, and at the optimum
    JSD(q ‖ p) = log 2 − ½·L.

    Args:
        log_ratio_posterior: [B], the classifier's logits at draws from q(z).
        log_ratio_base: [B'], its logits at draws from the base prior.
        label_smoothing: ε in [0, 1): targets become 1 − ε/2 and ε/2. It biases log r towards 0; off by default.

    Returns:
        0-dimensional, nats.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"nce: label_smoothing must be in [0, 1), got {label_smoothing}")
    loss = F.softplus(-log_ratio_posterior).mean() + F.softplus(log_ratio_base).mean()
    if label_smoothing:
        loss = loss + 0.5 * label_smoothing * (log_ratio_posterior.mean() - log_ratio_base.mean())
    return loss


def nce_accuracy(log_ratio_posterior: Tensor, log_ratio_base: Tensor) -> Tensor:
    """Share of draws that the classifier assigns to the right side, 0-dimensional; ½ when q and p agree."""
    return 0.5 * ((log_ratio_posterior > 0).float().mean() + (log_ratio_base <= 0).float().mean())


def jensen_shannon_divergence(nce_loss: float | Tensor) -> float | Tensor:
    """JSD(q ‖ p) = log 2 − ½·L* from the optimal noise contrastive loss (NCP-VAE, section 5.3), nats, ≤ log 2.

    With a classifier short of the optimum it is a lower bound.
    """
    return LOG_2 - 0.5 * nce_loss
