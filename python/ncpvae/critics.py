"""Contrastive critics: scores of pairs (x, z) that keep a latent informative about its x.

A critic scores how well a code z fits an example x. Its objective asks that z_n, drawn from q(z|x_n), be told from the
other examples of the batch by the score,

    c(x, z) = E[ log f(x_n, z_n) / Σ_k f(x_k, z_n) ] ≤ 0,

and is maximised together with the ELBO: L = ELBO + λ·c. Since I(x; z) ≥ c + log N, information cannot vanish while c is
high. Gradients flow to critic and encoder alike, through the same reparameterised z that is decoded.

Source: Menon, Blei, Vondrick, "Forget-me-not! Contrastive critics for mitigating posterior collapse", UAI 2022; the
objective is that of van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018.

Letters: N pairs of the batch, D latent dimension, E width in which scores are taken.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from . import _distributed, ops
from .distributions import normal_parameters
from .nn import mlp
from .vae import VAE

LEAST_SYMMETRIC = -10.0  # log σ: errors of the sum over codes were 4e-6 nats there (D = 32), and grow as 1/σ²


class Scores(NamedTuple):
    """log f of a batch of pairs, and what it sums to over the others; each [N], nats."""

    positive: Tensor  # log f(x_n, z_n)
    log_sum_x: Tensor  # log Σ_k f(x_k, z_n): over the examples, the positive one among them
    log_sum_z: Tensor | None  # log Σ_k f(x_n, z_k): over the codes; None where the critic is one-sided


class Layered(Protocol):
    """An encoder whose first layers can be shared, as `GaussianEncoder`."""

    def begin(self, x: Tensor, share: int) -> Any: ...

    def finish(self, h: Any, share: int) -> Distribution: ...

    def remainder(self, share: int) -> nn.Module: ...


class _Held(torch.autograd.Function):
    """x held within limits; at a limit the gradient that leads back inside passes, and none that leads out."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        leads_out = ((x >= high) & (gradient < 0)) | ((x <= low) & (gradient > 0))  # a descent goes against it
        return gradient.masked_fill(leads_out, 0.0), None, None


class Critic(nn.Module, ABC):
    """Scores of the pairs of a batch.

    Args:
        symmetric: also sum over the codes of each example, for the mean of both directions. The paper's objective sums
            over examples alone.

    In training under torch.distributed the other ranks' pairs are negatives too, so that W processes with N pairs each
    have the gradient of one with W·N; every rank must then hold equally many. In eval mode nothing communicates.
    """

    def __init__(self, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric

    def encode(self, vae: VAE, x: Tensor) -> tuple[Distribution, Any]:
        """q(z|x), and what the critic looks at in place of x."""
        return vae.encode(x), x

    def settings(self) -> dict[str, Any]:
        """What it was made with, for checkpoints to be compared by."""
        known = {name: value for name, value in vars(self).items() if isinstance(value, (bool, int, float, str))}
        return {"kind": type(self).__name__} | {name: v for name, v in known.items() if name != "training"}

    @abstractmethod
    def forward(self, seen: Any, posterior: Distribution, z: Tensor) -> Scores:
        """Scores of all pairs.

        Args:
            seen: of x [N, …], as `encode` returned it.
            posterior: q(z|x), batch [N].
            z: [N, D], a draw from it.

        Raises:
            ValueError: for fewer than two pairs, or where x, posterior and z are not of one size.
        """

    def _gathered(self, *rows: Tensor) -> list[Tensor]:
        return [_distributed.gather_rows(part) if self.training else part for part in rows]

    def _check(self, z: Tensor, **others: int) -> None:
        name = type(self).__name__
        if z.dim() != 2:
            raise ValueError(f"{name}: z must be [N, D], got shape {tuple(z.shape)}")
        for argument, rows in others.items():
            if rows != len(z):
                raise ValueError(f"{name}: {argument} must have as many rows as z, {len(z)}, got {rows}")
        if len(z) * (_distributed.world_size() if self.training else 1) < 2:
            raise ValueError(
                f"{name}: a batch must have at least 2 rows for z to be told apart, got {len(z)}; leave out a short "
                "last batch"
            )


class SelfCritic(Critic):
    """log f(x, z) = log q(z|x): the posterior itself, no parameters.

    It rewards codes that lie far apart in units of their σ, and so small σ without end. Below `min_log_std` the score
    takes that value for log σ and rewards it no longer; it remains a score like any other, with its bound on I(x; z).

    For diagonal Gaussians the N × N densities are never held (`ops.gaussian_logsumexp`). Any other posterior that
    broadcasts is evaluated at all pairs, in O(N²·D) memory, without the floor.

    Args:
        min_log_std: floor of log σ in the score; at least −10 where symmetric.
        symmetric: see `Critic`. The sum over codes is taken as a product of features of z and of x in float64, since
            its terms cancel where σ is small; MPS has no float64.
    """

    def __init__(self, min_log_std: float = -5.0, symmetric: bool = False):
        super().__init__(symmetric)
        if not math.isfinite(min_log_std):
            raise ValueError(f"SelfCritic: min_log_std must be finite, got {min_log_std!r}")
        if symmetric and min_log_std < LEAST_SYMMETRIC:
            raise ValueError(
                f"SelfCritic: min_log_std must be ≥ {LEAST_SYMMETRIC:g} where symmetric, whose sum loses its digits "
                f"below, got {min_log_std!r}"
            )
        self.min_log_std = min_log_std

    def forward(self, seen: Any, posterior: Distribution, z: Tensor) -> Scores:
        self._check(z, posterior=posterior.batch_shape[0] if len(posterior.batch_shape) else 1)
        found = normal_parameters(posterior)
        if found is None:
            return self._dense(posterior, z)
        mean, log_std = found[0], found[1].clamp(min=math.exp(self.min_log_std)).log()  # σ may have become 0
        standard = (z - mean) * torch.exp(-log_std)
        positive = -(0.5 * standard.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(1)
        log_sum_x = ops.gaussian_logsumexp(z, *self._gathered(mean, log_std))
        if not self.symmetric:
            return Scores(positive, log_sum_x, None)
        (every_z,) = self._gathered(z)
        return Scores(positive, log_sum_x, _log_sum_over_codes(every_z, mean, log_std).to(z.dtype))

    def _dense(self, posterior: Distribution, z: Tensor) -> Scores:
        if self.training and _distributed.world_size() > 1:
            raise TypeError(
                "SelfCritic: posterior must be a diagonal Normal where several processes train together, got "
                f"{type(posterior).__name__}"
            )
        scores = posterior.log_prob(z[:, None])  # [codes, examples]
        log_sum_z = scores.logsumexp(0) if self.symmetric else None
        return Scores(scores.diagonal(), scores.logsumexp(1), log_sum_z)


def _log_sum_over_codes(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log Σ_k N(z_k; mean_n, std_n²) for every n: [N] float64 from z [K, D] and mean, log_std [N, D]."""
    z, mean, log_std = z.double(), mean.double(), log_std.double()
    precision = torch.exp(-2 * log_std)
    of_codes = torch.cat([z.square(), z], 1)
    of_examples = torch.cat([-0.5 * precision, mean * precision], 1)
    constant = (0.5 * mean.square() * precision + log_std).sum(1) + 0.5 * mean.shape[1] * math.log(2 * math.pi)
    return ops.similarity_logsumexp(of_codes, of_examples, 1.0)[1] - constant


class NeuralCritic(Critic):
    """log f(x, z) = s · cos(h_x(x), h_z(z)), both heads trained, and the scale s too.

    The N × N scores are never held (`ops.similarity_logsumexp`).

    Args:
        x_head: x [N, …] → [N, E]. At the start of training it should tell examples apart: see `started_apart`.
        z_head: z [N, D] → [N, E].
        scale: "exp": s is the exponential of the parameter, as in CLIP. "linear": s is the parameter itself, ≥ 0, which
            starts at log(1/0.07) = 2.66 in the study whose tables are compared with. Both are held at `max_scale`.
        initial_scale: s to start from; 1/0.07 for "exp" and log(1/0.07) for "linear" by default.
        max_scale: largest s.
        symmetric: see `Critic`; it costs nothing more here in one process.

    Weight decay should leave `scale_parameter` alone: `train.adamw` does.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021 (CLIP),
    for the scale.
    """

    def __init__(
        self,
        x_head: nn.Module,
        z_head: nn.Module,
        scale: Literal["exp", "linear"] = "exp",
        initial_scale: float | None = None,
        max_scale: float = 100.0,
        symmetric: bool = False,
    ):
        super().__init__(symmetric)
        if scale not in ("exp", "linear"):
            raise ValueError(f"NeuralCritic: scale must be 'exp' or 'linear', got {scale!r}")
        if initial_scale is None:
            initial_scale = 1 / 0.07 if scale == "exp" else math.log(1 / 0.07)
        if not 0 < initial_scale <= max_scale < math.inf:
            raise ValueError(
                f"NeuralCritic: initial_scale must be > 0 and ≤ max_scale, got {initial_scale!r} and {max_scale!r}"
            )
        self.x_head, self.z_head, self.exponential = x_head, z_head, scale == "exp"
        self.max_scale = max_scale
        initial = math.log(initial_scale) if self.exponential else initial_scale
        self.scale_parameter = nn.Parameter(torch.tensor([initial]))  # not 0-dimensional: FSDP has no place for that

    def scale(self) -> Tensor:
        """s, 0-dimensional."""
        limits = (-math.inf, math.log(self.max_scale)) if self.exponential else (0.0, self.max_scale)
        held = _Held.apply(self.scale_parameter[0], *limits)
        return held.exp() if self.exponential else held

    def forward(self, seen: Any, posterior: Distribution, z: Tensor) -> Scores:
        of_x, of_z = self.x_head(seen).flatten(1), self.z_head(z).flatten(1)
        self._check(z, x=len(of_x), posterior=posterior.batch_shape[0] if len(posterior.batch_shape) else 1)
        if of_x.shape != of_z.shape:
            raise ValueError(
                f"NeuralCritic: x_head and z_head must give features of one shape [N, E], got {tuple(of_x.shape)} and "
                f"{tuple(of_z.shape)}"
            )
        of_x, of_z = (F.normalize(features.to(z.dtype), dim=1) for features in (of_x, of_z))
        scale = self.scale()
        (every_x,) = self._gathered(of_x)
        log_sum_x, log_sum_z = ops.similarity_logsumexp(of_z, every_x, scale)
        if self.symmetric and len(every_x) > len(of_x):
            (every_z,) = self._gathered(of_z)
            log_sum_z = ops.similarity_logsumexp(every_z, of_x, scale)[1]
        return Scores(scale * (of_x * of_z).sum(1), log_sum_x, log_sum_z if self.symmetric else None)


class HybridCritic(Critic):
    """A neural critic that looks at x through the first layers of the VAE's own encoder.

    What those layers compute is used twice and trained by both; after them the critic has a copy of the encoder's
    other layers, with weights of its own, and two fully connected layers. With share = 0 it is a neural critic whose x
    head has the architecture of the encoder.

    Args:
        vae: whose encoder is a `GaussianEncoder`, or offers `begin`, `finish` and `remainder` as that does. Only its
            architecture is used here; give the same VAE to `encode`. Of its layers those that have `reset_parameters`,
            as all of torch's, get new weights in the critic, linear layers and convolutions of the x head those of
            `started_apart`.
        share: layers shared, fewer than the encoder has.
        hidden: width of the hidden layer of the heads' perceptrons.
        width: E.
        **options: of `NeuralCritic`.
    """

    def __init__(self, vae: VAE, share: int, hidden: int = 128, width: int = 64, **options):
        super().__init__(options.get("symmetric", False))
        (latent_dim,) = vae.prior_distribution().event_shape
        encoder = _layered(vae)
        x_head = nn.Sequential(encoder.remainder(share), nn.ReLU(), *mlp([2 * latent_dim, hidden, width], nn.ReLU))
        z_head = mlp([latent_dim, hidden, width], nn.ReLU)
        self.share, self.heads = share, NeuralCritic(started_apart(x_head), z_head, **options)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"heads": self.heads.settings()}

    def encode(self, vae: VAE, x: Tensor) -> tuple[Distribution, Any]:
        encoder = _layered(vae)
        h = encoder.begin(x, self.share)
        return encoder.finish(h, self.share), h

    def forward(self, seen: Any, posterior: Distribution, z: Tensor) -> Scores:
        return self.heads(seen, posterior, z)


def started_apart(network: nn.Module) -> nn.Module:
    """The network with He's initialisation and without biases, so that what it makes of different inputs differs.

    With torch's default a deep network of ReLUs gives nearly the same output for all inputs (after the convolutions of
    `omniglot-pixelcnn` a mean cosine of 0.99999 between examples, and 0.94 with this). A critic whose head does so has
    nothing to contrast for hundreds of steps, in which z may collapse for good.

    Args:
        network: changed in place; its activations should be ReLUs or much like them.

    Source: He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def _layered(vae: VAE) -> Layered:
    encoder: Any = vae.encoder
    if type(vae).encode is not VAE.encode:
        raise TypeError(f"HybridCritic: vae must encode by its encoder, as VAE does, got {type(vae).__name__}")
    if not all(hasattr(encoder, name) for name in ("begin", "finish", "remainder")):
        raise TypeError(
            "HybridCritic: vae.encoder must offer begin, finish and remainder, as GaussianEncoder does, got "
            f"{type(encoder).__name__}"
        )
    return encoder
