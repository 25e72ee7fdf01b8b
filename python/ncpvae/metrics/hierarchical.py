"""log Z, log-likelihood and per-group diagnostics of hierarchical noise contrastive priors.

Two densities are in use. The *joint* one, Π_k r_k(z_k, c_k) p(z_k | z_<k) / Z, has one Z, which is estimated by draws
of the whole hierarchy from the base. *Ancestral* sampling has a Z_k(z_<k) = E_p[r_k | c_k] for each group and path;
with a finite number of proposals its log-density has a bound that needs no Z. The two densities are the same where
every Z_k is constant.

Letters: N examples or contexts, K groups, M proposals. Source: NCP-VAE, sections 3.4 and 5.1.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _distributed, _random
from ..hierarchy import HierarchicalVAE, Posterior, infer, walk_groups
from ..nn import evaluating
from ..priors import HierarchicalNCP, NoiseContrastive
from ..priors.hierarchical import naming_group
from ..samplers import SIR, TILE, base_draws
from .likelihood import Likelihood, summarized

PROPOSALS = 1  # set apart the draws that only one of the priors needs


class HierarchicalNormalizer(NamedTuple):
    """An estimate of log Z = log E_p[Π_k r_k].

    Attributes:
        value: log of the mean over all draws, nats. On average below log Z (Jensen), so that a likelihood computed
            with it is optimistic, the more so the larger the errors.
        standard_error: of `value`, by the delta method: √(1/ESS − 1/n), n being all draws.
        ess: effective sample size of all draws.
        num_samples: draws of each repeat.
        repeats: [R] nats, the estimate of each repeat alone.
        repeat_std: their standard deviation, the error of an estimate with `num_samples` draws; NaN for one repeat.
    """

    value: float
    standard_error: float
    ess: float
    num_samples: int
    repeats: Tensor
    repeat_std: float


class ConditionalNormalizers(NamedTuple):
    """log E_p[r_k | c_k] of N paths from the top, [N, K] nats, and the effective sample sizes [N, K] out of M.

    Groups that are flat have 0 and M.
    """

    log_mean: Tensor
    ess: Tensor


class GroupKL(NamedTuple):
    """KL(q(z_k | z_<k, x) ‖ p(z_k | z_<k)) of K groups, nats.

    Attributes:
        value: [K], means over examples; their sum is the KL of the evidence lower bound.
        standard_error: [K], of those; NaN for one example.
    """

    value: Tensor
    standard_error: Tensor


@torch.no_grad()
def hierarchical_log_normalizer(
    prior: HierarchicalNCP,
    num_samples: int = 1000,
    repeats: int = 10,
    seed: int = 0,
    block_size: int = 256,
    distributed: bool = False,
) -> HierarchicalNormalizer:
    """Estimate log Z of the joint density by ancestral draws from the base, weighted by the product of all ratios.

    Args:
        num_samples: draws of each repeat. The paper takes 1,000.
        repeats: independent estimates, from which their error is seen; `value` is of all their draws.
        seed: 0 … 2⁶³ − 1.
        block_size: draws in a walk; another size gives other draws.
        distributed: share the walks with the other processes of torch.distributed's default group. All must make the
            same call, and get the figures that one process would get.

    Raises:
        ValueError: for a log-ratio that is NaN or infinite, and for arguments that are off or differ between ranks.
        RuntimeError: where another of the processes fails, with its number and message.
    """
    _check_counts("hierarchical_log_normalizer", num_samples=num_samples, repeats=repeats, block_size=block_size)
    _distributed.check_seed("hierarchical_log_normalizer", seed)
    total = num_samples * repeats
    sizes = [min(block_size, total - first) for first in range(0, total, block_size)]

    def log_ratio(number: int) -> Tensor:
        log_r = torch.zeros(sizes[number], dtype=torch.float64)

        def select(k: int, base: Distribution, context: Tensor | None) -> Tensor:
            z = base.sample()
            log_r.add_(prior.log_ratio(k, base, context, z).double().cpu())
            return z

        walk_groups(prior.vae, select, sizes[number])
        return log_r

    call = {"num_samples": num_samples, "repeats": repeats, "block_size": block_size, "seed": seed}
    log_r = torch.cat(_shared("hierarchical_log_normalizer", prior, len(sizes), log_ratio, seed, call, distributed))
    value, ess = _log_mean(log_r, 0), float((2 * log_r.logsumexp(0) - (2 * log_r).logsumexp(0)).exp())
    if not math.isfinite(value):
        raise ValueError(f"hierarchical_log_normalizer: log r must be finite at base draws, got log Z = {float(value)}")
    each = _log_mean(log_r.view(repeats, num_samples), 1)
    error = math.sqrt(max(0.0, 1 / ess - 1 / total)) if total > 1 else math.nan
    return HierarchicalNormalizer(
        float(value), error, ess, num_samples, each, float(each.std()) if repeats > 1 else math.nan
    )


@torch.no_grad()
def conditional_log_normalizers(
    prior: HierarchicalNCP,
    num_contexts: int = 64,
    num_proposals: int = 1024,
    along: Literal["base", "prior"] = "prior",
    seed: int = 0,
    block_size: int = 16,
    distributed: bool = False,
) -> ConditionalNormalizers:
    """log E_p[r_k | c_k] of every group, by M proposals for each of N paths.

    Where it is 0 throughout, each ratio is normalised by itself and the joint and the ancestral density agree; where it
    varies with the path, ancestral sampling differs from the joint density.

    Args:
        num_contexts: N paths.
        num_proposals: M. The estimates are on average below the truth by about ½(1/ESS − 1/M).
        along: paths drawn from the "base", or from the "prior" by SIR with these M proposals.
        seed, block_size, distributed: see `hierarchical_log_normalizer`.
    """
    owner = "conditional_log_normalizers"
    _check_counts(owner, num_contexts=num_contexts, num_proposals=num_proposals, block_size=block_size)
    _distributed.check_seed(owner, seed)
    if along not in ("base", "prior"):
        raise ValueError(f"{owner}: along must be 'base' or 'prior', got {along!r}")
    sir, flat, count = SIR(num_proposals), prior.flat, len(prior.groups)
    sizes = [min(block_size, num_contexts - first) for first in range(0, num_contexts, block_size)]

    def figures(number: int) -> Tensor:
        found = torch.zeros(2, sizes[number], count)
        found[1] = num_proposals

        def select(k: int, base: Distribution, context: Tensor | None) -> Tensor:
            if k in flat:
                return base.sample()
            with naming_group(prior.groups, k):
                z, diagnostics = sir.sample(prior.conditional(k, base, context))
            found[0, :, k], found[1, :, k] = diagnostics.log_normalizer.cpu(), diagnostics.ess.cpu()
            return base.sample() if along == "base" else z

        walk_groups(prior.vae, select, sizes[number])
        return found

    call = {"num_contexts": num_contexts, "num_proposals": num_proposals, "along": along, "seed": seed}
    call |= {"block_size": block_size}
    log_mean, ess = torch.cat(_shared(owner, prior, len(sizes), figures, seed, call, distributed), dim=1)
    return ConditionalNormalizers(log_mean, ess)


@torch.no_grad()
def kl_per_group(
    vae: HierarchicalVAE,
    data: Tensor,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> GroupKL:
    """What each group of a hierarchical VAE knows of its examples: at 0 it is not used.

    Args:
        vae: an `nn.Module` with the protocol `hierarchy.HierarchicalVAE`.
        data, transform, batch_size, seed, device, distributed: see `hierarchical_nll`.
    """
    owner = "kl_per_group"
    _check_data(owner, data)
    _check_counts(owner, batch_size=batch_size)
    _distributed.check_seed(owner, seed)
    prepare, where = transform or (lambda x: x.float()), _device(vae, device)
    batches = data.split(batch_size)

    def kl(number: int) -> Tensor:
        _, path = infer(vae, prepare(batches[number].to(where)))
        return path.kl().double().cpu()

    call = {"data": _described(data), "batch_size": batch_size, "seed": seed}
    every = torch.cat(_shared(owner, vae, len(batches), kl, seed, call, distributed))  # [N, K]
    error = every.std(0) / math.sqrt(len(every)) if len(every) > 1 else torch.full_like(every[0], math.nan)
    return GroupKL(every.mean(0), error)


@torch.no_grad()
def hierarchical_nll(
    prior: HierarchicalNCP | HierarchicalVAE,
    data: Tensor,
    num_samples: int = 100,
    log_normalizer: float | HierarchicalNormalizer | None = None,
    num_proposals: int | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    device: torch.device | str | None = None,
    distributed: bool = False,
) -> dict[str, Likelihood]:
    """−log p(x) ≤ −E[ log 1/S Σ_s p(x|z_s) p(z_s) / q(z_s|x) ], z_s ~ q(z|x), of the VAE and of its mended prior.

    All figures are of the same draws z_s, so that their differences are not blurred by sampling.

    Args:
        prior: or a VAE alone, for "base" alone.
        data: [N, …].
        num_samples: S draws per example, each a walk.
        log_normalizer: log Z of the joint density, for the figure "log_z". It is optimistic: see there.
        num_proposals: M, for the figure "snis": for every draw and group, the bound on the log-density of the SIR
            sampler with M proposals, log p + log r − log( (r + Σ_{j=2…M} r_j) / M ) given z_<k. It is a valid bound
            for ancestral SIR, and needs M − 1 evaluations of each classifier for each draw.
        transform: applied to each batch of data once, binarisation for example; conversion to float32 by default.
        batch_size: examples at once; another size gives other draws.
        seed: governs all randomness.
        device: where batches of data go first; where the VAE's parameters are by default.
        distributed: share the batches; see `hierarchical_log_normalizer`.

    Returns:
        `Likelihood`s by name: "base", the VAE's own; "log_z" and "snis" where they are asked for.

    Raises:
        ValueError, TypeError: naming what is off, and the group where it is one's.

    Sources: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", ICLR 2016; Lawson, Tucker, Dai,
    Ranganath, "Energy-inspired models: learning with sampler-induced distributions", NeurIPS 2019.
    """
    owner = "hierarchical_nll"
    _check_data(owner, data)
    vae = prior.vae if isinstance(prior, HierarchicalNCP) else prior
    if vae is prior and (log_normalizer is not None or num_proposals is not None):
        raise ValueError(
            f"{owner}: prior must be a HierarchicalNCP for log_normalizer or num_proposals, got {type(prior).__name__}"
        )
    _check_counts(owner, num_samples=num_samples, batch_size=batch_size)
    if num_proposals is not None:
        _check_counts(owner, num_proposals=num_proposals)
    _distributed.check_seed(owner, seed)
    log_z = log_normalizer.value if isinstance(log_normalizer, HierarchicalNormalizer) else log_normalizer
    if log_z is not None and not math.isfinite(log_z):
        raise ValueError(f"{owner}: log_normalizer must be finite, got {log_z}")
    transform = transform or (lambda x: x.float())
    where, batches = _device(vae, device), data.split(batch_size)

    def log_weights(number: int) -> dict[str, Tensor]:
        x = transform(batches[number].to(where))
        encoded = vae.encode(x)
        running: dict[str, Tensor] = {}
        for s in range(num_samples):
            path = Posterior(vae, encoded)
            weighing = None
            if isinstance(prior, HierarchicalNCP):
                weighing = _Weighing(prior, path, num_proposals, _random.derived_seed(seed, PROPOSALS, number, s))
            likelihood = vae.walk(weighing or path, len(x))
            base = likelihood.log_prob(x) + (path.log_prior() - path.log_posterior()).sum(1)
            draws = {"base": base}
            if weighing is not None:
                draws |= {} if log_z is None else {"log_z": base + weighing.log_ratio - log_z}
                draws |= {} if num_proposals is None else {"snis": base + weighing.log_snis}
            running = {n: torch.logaddexp(running[n], v) if n in running else v for n, v in draws.items()}
        return {name: (math.log(num_samples) - total).cpu() for name, total in running.items()}

    call = {"data": _described(data), "num_samples": num_samples, "log_normalizer": log_z}
    call |= {"num_proposals": num_proposals, "batch_size": batch_size, "seed": seed}
    parts = _shared(owner, prior, len(batches), log_weights, seed, call, distributed)
    protocol = f"importance-weighted bound, {num_samples} draws per example, {len(data)} examples"
    told = {
        "base": "",
        "log_z": f", joint density with log Z = {log_z}",
        "snis": f", SIR with {num_proposals} proposals",
    }
    return {name: summarized(torch.cat([part[name] for part in parts]), protocol + told[name]) for name in parts[0]}


@dataclass
class _Weighing:
    """Select what `path` selects, and add up over the groups what the ratios make of it.

    Attributes:
        log_ratio: Σ_k log r_k, [B].
        log_snis: Σ_k of log r_k − log( (r_k + Σ_{j=2…M} r_k(z_j)) / M ), [B]; 0 without M.
    """

    prior: HierarchicalNCP
    path: Posterior
    num_proposals: int | None
    seed: int
    log_ratio: Tensor | float = field(default=0.0)
    log_snis: Tensor | float = field(default=0.0)

    def __post_init__(self) -> None:
        self._flat = self.prior.flat

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        z = self.path(k, base, context)
        if k in self._flat:
            return z
        with naming_group(self.prior.groups, k), _random.scoped(_random.derived_seed(self.seed, k)):
            distribution = self.prior.conditional(k, base, context)
            log_r = distribution.log_ratio(z)
            self.log_ratio = self.log_ratio + log_r
            if self.num_proposals is not None:
                self.log_snis = self.log_snis + log_r - _log_mean_with(distribution, log_r, self.num_proposals)
        return z


def _log_mean_with(distribution: NoiseContrastive, log_r: Tensor, num_proposals: int) -> Tensor:
    """log of the mean of r over a given z, whose log r is [B], and M − 1 draws of the base, [B]; streamed."""
    draws, fast, total = base_draws(distribution.base), distribution.fused(), log_r
    for start in range(0, num_proposals - 1, TILE):
        others = fast.log_ratio(draws.draw(min(TILE, num_proposals - 1 - start)))
        total = torch.logaddexp(total, others.logsumexp(0))
    return total - math.log(num_proposals)


def _log_mean(log_values: Tensor, dim: int) -> Tensor:
    return log_values.logsumexp(dim) - math.log(log_values.shape[dim])


def _shared(
    owner: str,
    model: object,
    count: int,
    work: Callable[[int], object],
    seed: int,
    call: Mapping[str, object],
    distributed: bool,
) -> list:
    """What `work` makes of each number below `count`, block seeds governing it, shared by the processes.

    The model, where it is a module, is in eval mode meanwhile: BatchNorm is not to learn from what is measured.
    """
    ranks = _distributed.ranks(distributed)
    _distributed.check_alike(owner, ranks.gather(call))
    mine: dict[int, object] = {}
    with ranks.failing_together(owner), evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for number in ranks.mine(count):
            with _random.scoped(_distributed.block_seed(seed, number)):
                mine[number] = work(number)
    every = {number: value for part in ranks.gather(mine) for number, value in part.items()}
    return [every[number] for number in range(count)]


def _check_data(owner: str, data: object) -> None:
    if not isinstance(data, Tensor) or data.dim() < 2 or len(data) == 0:
        got = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"{owner}: data must be a tensor [N, …] with N ≥ 1, got {got}")
    if data.is_floating_point() and not torch.isfinite(data).all():
        raise ValueError(f"{owner}: data must be finite, got NaN or infinity")


def _described(data: Tensor) -> str:
    """Tells data of one process from those of another."""
    return f"{list(data.shape)} with ends {_distributed.fingerprint(torch.cat([data[:1], data[-1:]]))}"


def _device(vae: HierarchicalVAE, device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    if not isinstance(vae, nn.Module):
        raise TypeError(f"a hierarchical VAE must be an nn.Module, got {type(vae).__name__}")
    return next(vae.parameters()).device


def _check_counts(owner: str, **counts: object) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer ≥ 1, got {value!r}")
