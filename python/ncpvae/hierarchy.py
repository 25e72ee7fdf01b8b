"""Hierarchical VAEs: p(z) = Π_k p(z_k | z_<k) over K groups of latent variables, and all that is done with them.

A model makes one walk from the top down. At each group it forms the base p(z_k | z_<k) and a context c_k, asks
`select(k, base, context)` for z_k, and goes on; at the end stands p(x|z). What `select` answers makes the difference:

    Posterior   draws from q(z_k | z_<k, x), and remembers them for the evidence lower bound
    Ancestral   draws from the base, at a temperature
    Given       latents that are there already

Letters: B batch, K groups, C H W feature maps. Groups are numbered from 0 in code and from 1 in messages.
Source: NCP-VAE, sections 2 and 3.4; for the objective Vahdat and Kautz, "NVAE: a deep hierarchical variational
autoencoder", NeurIPS 2020.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn.modules.batchnorm import _BatchNorm

from . import _random
from .distributions import temper
from .nn import SpectralNorms, batch_norm_scales

#: (k, base p(z_k | z_<k), context [B, …] or None) → z_k [B, *event]
Select = Callable[[int, Distribution, Tensor | None], Tensor]


@dataclass(frozen=True)
class Group:
    """One group of latent variables.

    Attributes:
        shape: of z_k for one example, [C, H, W] or [D]; the base's event shape.
        context_shape: of c_k for one example; None where nothing is above the group, and the context is None too.
        scale: the number of its resolution, 1 at the top.
    """

    shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None
    scale: int = 1


@runtime_checkable
class HierarchicalVAE(Protocol):
    """What a model has to have to be trained, sampled from, and given noise contrastive priors group by group."""

    @property
    def groups(self) -> Sequence[Group]:
        """The K groups, from the top."""
        ...

    def encode(self, x: Tensor) -> Any:
        """What the posteriors need to know of x [B, …]."""
        ...

    def posterior(self, k: int, base: Distribution, context: Tensor | None, encoded: Any) -> Distribution:
        """q(z_k | z_<k, x), batch [B], which can be drawn from by `rsample` and has `log_prob` of what it drew."""
        ...

    def walk(self, select: Select, batch: int) -> Distribution:
        """The walk over all groups for B = `batch` examples; p(x|z), batch [B]. Bases have batch [B] too."""
        ...


def check_selected(owner: str, groups: Sequence[Group], k: int, z: Tensor, batch: int) -> Tensor:
    """z, if it is [B, *event] of group k; for `walk` to call on what `select` gives."""
    if not isinstance(z, Tensor) or z.shape != (batch, *groups[k].shape):
        got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"{owner}: z of group {k + 1} of {len(groups)} (scale {groups[k].scale} of {groups[-1].scale}) must be "
            f"{[batch, *groups[k].shape]}, got {got}"
        )
    return z


@dataclass
class Posterior:
    """Select draws z_k ~ q(z_k | z_<k, x), reparameterised, and remember them, group by group.

    Args:
        model, encoded: encoded is `model.encode(x)`.

    Attributes:
        z, bases, posteriors: of every group that the walk has been at.
    """

    model: HierarchicalVAE
    encoded: Any
    z: list[Tensor] = field(default_factory=list)
    bases: list[Distribution] = field(default_factory=list)
    posteriors: list[Distribution] = field(default_factory=list)

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        posterior = self.model.posterior(k, base, context, self.encoded)
        z = posterior.rsample()
        self.z.append(z)
        self.bases.append(base)
        self.posteriors.append(posterior)
        return z

    def kl(self) -> Tensor:
        """KL(q(z_k | z_<k, x) ‖ p(z_k | z_<k)), [B, K] nats: in closed form, or as log q − log p of the draw."""
        return torch.stack([_kl(*part) for part in zip(self.posteriors, self.bases, self.z, strict=True)], dim=1)

    def log_posterior(self) -> Tensor:
        """log q(z_k | z_<k, x) of the draws, [B, K] nats."""
        return torch.stack([q.log_prob(z) for q, z in zip(self.posteriors, self.z, strict=True)], dim=1)

    def log_prior(self) -> Tensor:
        """log p(z_k | z_<k) of the draws, [B, K] nats."""
        return torch.stack([p.log_prob(z) for p, z in zip(self.bases, self.z, strict=True)], dim=1)


def _kl(posterior: Distribution, base: Distribution, z: Tensor) -> Tensor:
    try:
        return kl_divergence(posterior, base)
    except NotImplementedError:
        return posterior.log_prob(z) - base.log_prob(z)


@dataclass(frozen=True)
class Ancestral:
    """Select draws z_k ~ p(z_k | z_<k), with the base's σ times `temperature` (NCP-VAE, section 5.2)."""

    temperature: float = 1.0

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        return temper(base, self.temperature).sample()


@dataclass(frozen=True)
class Given:
    """Select latents that are there already.

    Args:
        z: z_1, z_2, …, from the top.
        otherwise: how those of the groups below them are selected, where there are fewer than K.
    """

    z: Sequence[Tensor]
    otherwise: Select | None = None

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        if k < len(self.z):
            return self.z[k]
        if self.otherwise is None:
            raise ValueError(f"Given: z must have a tensor for every group, or otherwise be set, got {len(self.z)}")
        return self.otherwise(k, base, context)


def infer(model: HierarchicalVAE, x: Tensor) -> tuple[Distribution, Posterior]:
    """p(x|z) at draws z ~ q(z|x), and the draws with their distributions, for x [B, …]."""
    path = Posterior(model, model.encode(x))
    return model.walk(path, len(x)), path


class _Reached(Exception):
    """The walk has come as far as it should."""


def walk_groups(model: HierarchicalVAE, select: Select, batch: int, last: int | None = None) -> None:
    """Walk from the top as far as the group `last`, the lowest by default; p(x|z) is not computed."""
    last = len(model.groups) - 1 if last is None else last

    def select_and_stop(k: int, base: Distribution, context: Tensor | None) -> Tensor:
        z = select(k, base, context)
        if k == last:
            raise _Reached
        return z

    with suppress(_Reached):
        model.walk(select_and_stop, batch)


@torch.no_grad()
def readjust_batch_norm(
    model: HierarchicalVAE,
    batch: int,
    *,
    temperature: float = 1.0,
    draws: int = 500,
    generator: torch.Generator | int | None = None,
) -> None:
    """Replace BatchNorm's running statistics on the way from the top to the image by those of ancestral draws.

    At a temperature other than 1 features have other means and variances than in training. Every layer that the walk
    comes by gets the mean of its statistics over all draws; the encoder's stay.

    Args:
        model: an `nn.Module`, changed in place.
        batch: images in each draw; at 32 or so the variances are noisy no more.
        temperature: of the draws.
        draws: their number; NVAE takes 500.
        generator: or a seed; torch's global generator without one.

    Raises:
        FloatingPointError: where statistics become NaN or infinite; after any error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"readjust_batch_norm: model must be an nn.Module, got {type(model).__name__}")
    if batch < 2 or draws < 1:
        raise ValueError(f"readjust_batch_norm: batch must be ≥ 2 and draws ≥ 1, got {batch} and {draws}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    with _averaging(norms), _random.scoped(generator):
        for _ in range(draws):
            model.walk(Ancestral(temperature), batch)
        if not all(bool(torch.isfinite(tensor).all()) for norm in norms for tensor in norm.buffers()):
            raise FloatingPointError(
                f"readjust_batch_norm: statistics at temperature {temperature} are not finite; those of training are "
                "kept"
            )


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the block these layers are in training mode, and average over all they see from then on.

    Those that have seen nothing have their old statistics afterwards, and all of them after an exception.
    """
    before = [(norm.training, norm.momentum, [tensor.clone() for tensor in norm.buffers()]) for norm in norms]
    seen: list[_BatchNorm] = []
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's sign for an average over everything
        norm.train()
    try:
        yield
        seen = [norm for norm in norms if norm.num_batches_tracked]
    finally:
        for norm, (training, momentum, statistics) in zip(norms, before, strict=True):
            norm.train(training)
            norm.momentum = momentum
            if norm not in seen:
                for tensor, kept in zip(norm.buffers(), statistics, strict=True):
                    tensor.copy_(kept)


@dataclass(frozen=True)
class KLWarmup:
    """The weight of the KL at each step: clip((step − start·T) / (portion·T), minimum, 1), NVAE's warm-up.

    Args:
        steps: T, of the whole training.
        portion: of the steps over which it rises.
        start: of the steps, before it begins to.
        minimum: it is never less.
    """

    steps: int
    portion: float = 0.3
    start: float = 1e-4
    minimum: float = 1e-4

    def __post_init__(self) -> None:
        portions = 0.0 < self.portion <= 1.0 and 0.0 <= self.start < 1.0 and 0.0 <= self.minimum <= 1.0
        if self.steps < 1 or not portions:
            raise ValueError(
                "KLWarmup: steps must be ≥ 1, portion in (0, 1], start in [0, 1) and minimum in [0, 1], "
                f"got {self.steps}, {self.portion}, {self.start}, {self.minimum}"
            )

    def __call__(self, step: int) -> float:
        return min(1.0, max(self.minimum, (step - self.start * self.steps) / (self.portion * self.steps)))


def group_sizes(groups: Sequence[Group]) -> Tensor:
    """α_k [K]: the pixels of a group's resolution over the number of groups that have it, the smallest α being 1."""
    alpha = []
    for group in groups:
        alike = sum(other.scale == group.scale for other in groups)
        alpha.append(math.prod(group.shape[1:]) / alike)
    return torch.tensor(alpha) / min(alpha)


def balance_kl(kl: Tensor, alpha: Tensor) -> Tensor:
    """γ_k·KL_k, [B, K], with γ_k ∝ (E|KL_k| + 0.01) / α_k of mean 1 (NVAE, appendix A).

    Groups with a large KL pay more for it than those with a small one, so that none is given up during warm-up. γ
    carries no gradient.

    Args:
        kl: [B, K], nats.
        alpha: [K], of `group_sizes`.
    """
    gamma = (kl.detach().abs().mean(0) + 0.01) / alpha
    return kl * (gamma / gamma.mean())


class HierarchicalLoss(nn.Module):
    """The loss of stage one for hierarchical VAEs: −E log p(x|z) + β·Σ_k KL_k + regularisation, to be minimised.

    Args:
        vae: an `nn.Module` with the protocol `HierarchicalVAE`; its parameters are this module's.
        balance: weight the groups' KLs by `balance_kl` while β < 1.
        regularization: λ on Σ σ_max(convolutions) + Σ max |γ|(BatchNorm), 0 for none. NVAE has 1e-2 or 1e-1.
        initial_regularization: λ at β = 0, from which it goes to `regularization` on a logarithmic scale as β goes
            to 1; the same all along by default.

    `forward` returns named terms, 0-dimensional: `loss` first, `reconstruction` and `kl` in nats per example, and with
    λ > 0 `regularization`, the sum without λ. In eval mode nothing is balanced or regularised: at β = 1 `loss` is the
    negative bound.

    A training loop should be handed this module, not the VAE alone: it switches its mode, and the vectors of the power
    iteration, without which a run cannot be resumed exactly, are its state.
    """

    alpha: Tensor

    def __init__(
        self,
        vae: nn.Module,
        *,
        balance: bool = True,
        regularization: float = 0.0,
        initial_regularization: float | None = None,
    ):
        super().__init__()
        if not (isinstance(vae, nn.Module) and isinstance(vae, HierarchicalVAE)):
            raise TypeError(
                "HierarchicalLoss: vae must be an nn.Module with groups, encode, posterior and walk, got "
                f"{type(vae).__name__}"
            )
        if not isinstance(balance, bool):
            raise TypeError(f"HierarchicalLoss: balance must be True or False, got {balance!r}")
        first = regularization if initial_regularization is None else initial_regularization
        for name, value in (("regularization", regularization), ("initial_regularization", first)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"HierarchicalLoss: {name} must be finite and ≥ 0, got {value!r}")
        if (regularization == 0) != (first == 0):
            raise ValueError(
                "HierarchicalLoss: regularization and initial_regularization must both be 0 or neither, got "
                f"{regularization} and {first}"
            )
        self.vae, self.balance = vae, balance
        self.regularization, self.initial_regularization = regularization, first
        self.spectral_norms = SpectralNorms(vae) if regularization else None
        self.register_buffer("alpha", group_sizes(vae.groups).to(next(vae.parameters()).device), persistent=False)

    def forward(self, x: Tensor, kl_weight: float = 1.0) -> dict[str, Tensor]:
        """The terms for x [B, …]; `kl_weight` is β."""
        likelihood, path = infer(self.vae, x)
        kl = path.kl()
        charged = balance_kl(kl, self.alpha) if self.balance and self.training and kl_weight < 1.0 else kl
        reconstruction = -likelihood.log_prob(x).mean()
        terms = {"reconstruction": reconstruction, "kl": kl.sum(1).mean()}
        loss = reconstruction + kl_weight * charged.sum(1).mean()
        if self.spectral_norms is not None and self.training:
            terms["regularization"] = self.spectral_norms() + batch_norm_scales(self.vae)
            loss = loss + self.regularization_weight(kl_weight) * terms["regularization"]
        return {"loss": loss, **terms}

    def regularization_weight(self, kl_weight: float) -> float:
        """λ at β: λ₀^(1 − β)·λ₁^β, and λ₁ beyond 1."""
        kl_weight = min(kl_weight, 1.0)
        return self.initial_regularization ** (1.0 - kl_weight) * self.regularization**kl_weight
