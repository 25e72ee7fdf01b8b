"""The training objectives, as functions of tensors and distributions."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence
from torch.nn import functional as F

from .critics import Critic
from .vae import VAE

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


def info_nce(positive: Tensor, log_sum: Tensor, log_sum_other: Tensor | None = None) -> Tensor:
    """c = E[ log f(x_n, z_n) − log Σ_k f(x_k, z_n) ], a critic's objective, to be maximised.

    c ≤ 0 where the sum holds the positive pair, and I(x; z) ≥ c + log N. Sources: Menon, Blei, Vondrick, UAI 2022; van
    den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018.

    Args:
        positive: [N], log f of the pairs, nats.
        log_sum: [N], log of the sum over the candidates of each pair, the pair itself included.
        log_sum_other: [N], the same over candidates of the other kind; the mean of both directions is returned then.

    Returns:
        0-dimensional; NaN where a score is NaN.
    """
    sums = [log_sum] if log_sum_other is None else [log_sum, log_sum_other]
    for other in sums:
        if other.shape != positive.shape or positive.dim() != 1:
            raise ValueError(
                "info_nce: positive and the log-sums must be [N] alike, got shapes "
                f"{[tuple(t.shape) for t in (positive, *sums)]}"
            )
    return torch.stack([(positive - other).mean() for other in sums]).mean()


def kl_per_dimension(posterior: Distribution, prior: Distribution) -> Tensor:
    """KL(q(z_d|x) ‖ p(z_d)) of every coordinate, [B, D] nats, for independent coordinates with a closed form."""
    parts = []
    for name, distribution in (("posterior", posterior), ("prior", prior)):
        if not (isinstance(distribution, Independent) and len(distribution.event_shape) == 1):
            raise TypeError(
                f"kl_per_dimension: {name} must have independent coordinates, got {type(distribution).__name__}"
            )
        parts.append(distribution.base_dist)
    return kl_divergence(*parts)


@dataclass(frozen=True)
class FreeBits:
    """A part of the KL that costs nothing, so that nothing is gained by collapsing below it.

    The mean is over the batch at hand, a part of it under gradient accumulation and in several processes.

    Args:
        nats: the part: of the whole KL, or of each coordinate's.
        per: "total": max(nats, KL), KL being the mean over the minibatch. "dimension": Σ_d max(nats, KL_d), the form of
            Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improved variational inference with inverse
            autoregressive flow", NeurIPS 2016, Eq. 15, each coordinate being a group.
    """

    nats: float
    per: Literal["total", "dimension"] = "total"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nats) and self.nats > 0):
            raise ValueError(f"FreeBits: nats must be finite and > 0, got {self.nats!r}")
        if self.per not in ("total", "dimension"):
            raise ValueError(f"FreeBits: per must be 'total' or 'dimension', got {self.per!r}")

    def __call__(self, posterior: Distribution, prior: Distribution, kl: Tensor) -> Tensor:
        """The KL term of the loss, 0-dimensional, from kl [B]."""
        if self.per == "total":
            return kl.mean().clamp(min=self.nats)
        return kl_per_dimension(posterior, prior).mean(0).clamp(min=self.nats).sum()


@dataclass(frozen=True)
class LinearAnnealing:
    """β from 0 to `final` over the first `steps` steps: step → β (Bowman et al., 2016)."""

    steps: int
    final: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"LinearAnnealing: steps must be ≥ 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        return self.final * min(1.0, step / self.steps)


@dataclass(frozen=True)
class CyclicalAnnealing:
    """β from 0 to `final` again and again: in each cycle over its first `ratio`; `final` after `steps`.

    Source: Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical annealing schedule: a simple approach to mitigating KL
    vanishing", NAACL 2019.
    """

    steps: int
    cycles: int = 4
    ratio: float = 0.5
    final: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.cycles <= self.steps:
            raise ValueError(f"CyclicalAnnealing: cycles must be 1 … steps, got {self.cycles} for {self.steps} steps")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"CyclicalAnnealing: ratio must be > 0 and ≤ 1, got {self.ratio!r}")

    def __call__(self, step: int) -> float:
        period = self.steps / self.cycles
        rising = (step % period) / (period * self.ratio)
        return self.final if step >= self.steps else self.final * min(1.0, rising)


class VAELoss(nn.Module):
    """The loss of stage one: −ELBO − λ·c, with any critic, to be minimised in your loop or in `fit_vae`.

    Both the ELBO and c are means over the examples of the batch. (Menon et al. add the *sum* of the ELBO to the mean c:
    their λ is ours times the batch size.)

    Args:
        vae: its parameters are this module's.
        critic: likewise; None for the ELBO alone.
        critic_weight: λ ≥ 0.
        free_bits: takes the place of the KL term.

    `forward` returns named terms, 0-dimensional: `loss` first, then `reconstruction` = −E log p(x|z), `kl`, and with a
    critic `critic` = c, all in nats per example. c depends on how many examples it tells z apart from: those of figures
    that are compared must be equally many.
    """

    def __init__(
        self, vae: VAE, critic: Critic | None = None, critic_weight: float = 1.0, free_bits: FreeBits | None = None
    ):
        super().__init__()
        if not isinstance(vae, VAE):
            raise TypeError(f"VAELoss: vae must be a VAE, got {type(vae).__name__}")
        if critic is not None and not isinstance(critic, Critic):
            raise TypeError(f"VAELoss: critic must be a Critic, got {type(critic).__name__}")
        if not (math.isfinite(critic_weight) and critic_weight >= 0):
            raise ValueError(f"VAELoss: critic_weight must be finite and ≥ 0, got {critic_weight!r}")
        self.vae, self.critic, self.critic_weight, self.free_bits = vae, critic, critic_weight, free_bits

    def forward(self, x: Tensor, kl_weight: float = 1.0) -> dict[str, Tensor]:
        """The terms for x [B, …]; `kl_weight` is β, on the KL term."""
        seen = None
        if self.critic is None:
            out = self.vae(x)
        else:
            posterior, seen = self.critic.encode(self.vae, x)
            out = self.vae(x, posterior)
        bound = elbo(x, out.likelihood, out.posterior, out.prior, out.z, kl_weight)
        loss, kl = -bound.elbo.mean(), bound.kl.mean()
        if self.free_bits is not None:
            loss = kl_weight * self.free_bits(out.posterior, out.prior, bound.kl) - bound.log_likelihood.mean()
        terms = {"reconstruction": -bound.log_likelihood.mean(), "kl": kl}
        if self.critic is not None:
            c = info_nce(*self.critic(seen, out.posterior, out.z))
            loss, terms["critic"] = loss - self.critic_weight * c, c
        return {"loss": loss, **terms}
