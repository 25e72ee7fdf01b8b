"""Noise contrastive priors of hierarchical VAEs: p_NCP(z_k | z_<k) ∝ r_k(z_k, c_k) p(z_k | z_<k) for K groups.

Every group has a classifier of its own, told draws of q(z_k | z_<k, x) from draws of the base under the same context
c_k = c(z_<k); its logit is log r_k. Samples come by the model's own walk from the top down, in which `Reweighted`
selects each z_k by sampling-importance-resampling, by Langevin dynamics, or from the base.

Letters: B batch, K groups, M proposals. Groups are numbered from 0 in code and from 1 in messages.
Source: NCP-VAE, section 3.4; Figure 5 for the classifiers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from .. import _distributed, _random
from ..classifiers import MLPClassifier, ResidualClassifier
from ..distributions import SoftClampedNormal, temper
from ..hierarchy import Group, HierarchicalVAE
from ..pretrained import Pretrained
from ..samplers import SIR, Diagnostics, Sampler
from .noise_contrastive import NoiseContrastive


def group_classifiers(
    vae: HierarchicalVAE, channels: int = 64, blocks: int = 3, hidden: Sequence[int] = (256, 256, 256)
) -> list[nn.Module]:
    """A classifier for each group: the paper's for feature maps [C, H, W], a fully connected one for vectors [D].

    Args:
        vae: whose groups tell the shapes of z_k and of the context.
        channels, blocks: see `ResidualClassifier`; the paper does not state its width.
        hidden: see `MLPClassifier`.
    """
    classifiers: list[nn.Module] = []
    for k, group in enumerate(vae.groups):
        context = group.context_shape[0] if group.context_shape else 0
        if len(group.shape) == 3:
            classifiers.append(ResidualClassifier(group.shape[0], channels, context, blocks))
        elif len(group.shape) == 1:
            classifiers.append(MLPClassifier(group.shape[0], hidden, context_features=context))
        else:
            raise ValueError(
                f"group_classifiers: group {k + 1} of {len(vae.groups)} must have the shape [C, H, W] or [D], got "
                f"{list(group.shape)}"
            )
    return classifiers


class HierarchicalDraw(NamedTuple):
    """What one walk under a hierarchical noise contrastive prior gave.

    Attributes:
        likelihood: p(x|z), batch [B]; its mean and its samples are pictures.
        z: of every group, from the top, each [B, *event].
        diagnostics: of every group's sampler, with ESS and log E_p[r_k | c_k] for each of the B examples; None where
            z_k came from the base.
    """

    likelihood: Distribution
    z: list[Tensor]
    diagnostics: list[Diagnostics | None]


class HierarchicalNCP(Pretrained):
    """A hierarchical VAE and the classifiers that mend the priors of its K groups.

    Args:
        vae: an `nn.Module` with the protocol `hierarchy.HierarchicalVAE`. It is put in eval mode and not trained here.
        classifiers: a list of K modules (z_k, context=None) → log r_k, from `ncpvae.classifiers` or your own. The
            context is that of the walk, [B, …]; a group whose `context_shape` is None is called without.
        min_jsd: a group whose held-out Jensen-Shannon divergence, in nats, is below this counts as flat: its
            log r_k is taken as 0 everywhere and its classifier is not asked. At 0 these are the groups whose classifier
            does no better on held-out draws than none.

    Attributes:
        jsd: [K] nats, of stage two (`fit_hierarchical_ncp`); NaN for groups that have not been trained.

    Example:
        >>> vae = NVAE((1, 16, 16), channels=4, groups_per_scale=(2,), latent_channels=2, halvings=1)
        >>> draw = HierarchicalNCP(vae, group_classifiers(vae, channels=8)).draw(4, SIR(num_proposals=100))
        >>> draw.likelihood.mean.shape
        torch.Size([4, 1, 16, 16])

    Source: "NCP-VAE: variational autoencoders with noise contrastive priors", ICLR 2021 submission, section 3.4; Aneja,
    Schwing, Kautz, Vahdat, "A contrastive learning approach for training variational autoencoder priors", NeurIPS 2021.
    """

    jsd: Tensor

    def __init__(self, vae: nn.Module, classifiers: Sequence[nn.Module], min_jsd: float = 0.0):
        super().__init__()
        if not (isinstance(vae, nn.Module) and isinstance(vae, HierarchicalVAE)):
            raise TypeError(
                f"HierarchicalNCP: vae must be an nn.Module with groups, encode, posterior and walk, got "
                f"{type(vae).__name__}"
            )
        if not isinstance(classifiers, (list, tuple)):
            raise TypeError(f"HierarchicalNCP: classifiers must be a list of modules, got {type(classifiers).__name__}")
        if len(classifiers) != len(vae.groups):
            raise ValueError(
                f"HierarchicalNCP: classifiers must be one for each of {len(vae.groups)} groups, got {len(classifiers)}"
            )
        for k, classifier in enumerate(classifiers):
            if not isinstance(classifier, nn.Module):
                got = type(classifier).__name__
                raise TypeError(f"HierarchicalNCP: the classifier of group {k + 1} must be a module, got {got}")
        if isinstance(min_jsd, bool) or not isinstance(min_jsd, (int, float)) or math.isnan(min_jsd):
            raise ValueError(f"HierarchicalNCP: min_jsd must be a number, got {min_jsd!r}")
        self.vae, self.classifiers = vae.eval(), nn.ModuleList(classifiers).eval()  # BatchNorm is for training alone
        self.min_jsd = min_jsd
        self.register_buffer("jsd", torch.full((len(classifiers),), math.nan, dtype=torch.float32))

    @property
    def groups(self) -> Sequence[Group]:
        return self.vae.groups

    @property
    def flat(self) -> frozenset[int]:
        """The groups whose classifier is not asked, numbered from 0."""
        return frozenset((self.jsd < self.min_jsd).nonzero().flatten().tolist())

    def conditional(
        self, k: int, base: Distribution, context: Tensor | None, temperature: float = 1.0
    ) -> NoiseContrastive:
        """p_NCP(z_k | z_<k) without its Z: r_k(·, context) times the walk's base [B], its σ scaled by `temperature`.

        The part of the classifier that is of the context alone is computed once for all that is asked of it. No
        gradient goes to that part's weights or to the context: training asks the classifier itself.
        """
        classifier = self.classifiers[k]
        if callable(remembering := getattr(classifier, "remembering", None)):
            classifier = remembering()
        with naming_group(self.groups, k):
            return NoiseContrastive(temper(_plain(base), temperature), classifier, context)

    def log_ratio(self, k: int, base: Distribution, context: Tensor | None, z: Tensor) -> Tensor:
        """log r_k(z_k, c_k), [B] nats, for z_k [B, *event]; 0 where the group is flat."""
        if k in self.flat:
            return z.new_zeros(len(z))
        with naming_group(self.groups, k):
            return self.conditional(k, base, context).log_ratio(z)

    @torch.no_grad()
    def draw(
        self,
        batch: int,
        sampler: "Sampler | Sequence[Sampler | None] | None" = None,
        temperature: float = 1.0,
        generator: torch.Generator | int | None = None,
    ) -> HierarchicalDraw:
        """B = `batch` samples by one walk from the top, each group given those above it.

        Args:
            batch: B, at a time: a group holds B proposals of each number in its chunk, whatever M is.
            sampler: for all groups, or a list with one for each group, None standing for the base; `SIR()` by default.
                `SIR(min_ess=…)` draws as many proposals for a group as that takes.
            temperature: of the bases; other than 1 for pictures only (NCP-VAE, section 5.2).
            generator: or a seed; torch's global generators without one.

        Raises:
            ValueError, TypeError: naming the group and what is wrong there.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"draw: batch must be an integer ≥ 1, got {batch!r}")
        select = Reweighted(self, sampler, temperature)
        with _random.scoped(generator):
            likelihood = self.vae.walk(select, batch)
        return HierarchicalDraw(likelihood, select.z, select.diagnostics)

    def draw_blocks(
        self,
        num: int,
        sampler: "Sampler | Sequence[Sampler | None] | None" = None,
        temperature: float = 1.0,
        seed: int = 0,
        block_size: int = 16,
    ) -> Iterator[tuple[int, HierarchicalDraw]]:
        """This process's share of `num` samples: (number of the block's first sample, its walk).

        Every block has a seed of its own, so that the samples are the same for any number of processes, of which each
        takes every W-th block. Nothing is communicated.

        Args:
            seed: 0 … 2⁶³ − 1.
            block_size: B of a walk; another size gives other samples.
        """
        for name, value in (("num", num), ("block_size", block_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"draw_blocks: {name} must be an integer ≥ 1, got {value!r}")
        _distributed.check_seed("draw_blocks", seed)
        for each in sampler if isinstance(sampler, (list, tuple)) else [sampler]:
            if isinstance(each, SIR) and each.shard_proposals:
                raise ValueError("draw_blocks: sampler must not shard its proposals where the samples are shared out")
        Reweighted(self, sampler, temperature)  # what is wrong with these is said now, not at the first block
        return (
            (first, self.draw(min(block_size, num - first), sampler, temperature, _distributed.block_seed(seed, block)))
            for block, first in enumerate(range(0, num, block_size))
            if block in _distributed.ranks().mine(-(-num // block_size))
        )


@dataclass
class Reweighted:
    """Select draws z_k ~ p_NCP(z_k | z_<k), group by group.

    Args:
        prior: whose ratios they are.
        sampler: for all groups, or a list with one for each, None standing for the base; `SIR()` by default.
        temperature: scales the σ of every base.

    Attributes:
        z, diagnostics: of every group that the walk has been at; see `HierarchicalDraw`.
    """

    prior: HierarchicalNCP
    sampler: Sampler | Sequence[Sampler | None] | None = None
    temperature: float = 1.0
    z: list[Tensor] = field(default_factory=list)
    diagnostics: list[Diagnostics | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._samplers, self._flat = _one_for_each(self.sampler, len(self.prior.groups)), self.prior.flat

    def __call__(self, k: int, base: Distribution, context: Tensor | None) -> Tensor:
        sampler = None if k in self._flat else self._samplers[k]
        with naming_group(self.prior.groups, k):
            if sampler is None:
                z, diagnostics = temper(base, self.temperature).sample(), None
            else:
                z, diagnostics = sampler.sample(self.prior.conditional(k, base, context, self.temperature), ())
        self.z.append(z)
        self.diagnostics.append(diagnostics)
        return z


def _one_for_each(sampler: Sampler | Sequence[Sampler | None] | None, count: int) -> list[Sampler | None]:
    if sampler is None:
        return [SIR()] * count
    samplers = list(sampler) if isinstance(sampler, (list, tuple)) else [sampler] * count
    if len(samplers) != count:
        raise ValueError(f"sampler must be one, or one for each of {count} groups, got {len(samplers)}")
    for k, one in enumerate(samplers):
        if one is not None and not hasattr(one, "sample"):
            raise TypeError(
                f"sampler of group {k + 1} of {count} must be SIR(), Langevin() or the like, or None for the base, got "
                f"{type(one).__name__}"
            )
    return samplers  # type: ignore[return-value]


def _plain(base: Distribution) -> Distribution:
    """The base; NVAE's Normal as the plain Normal that it is, whose proposals are drawn by the ops' own noise."""
    if isinstance(base, SoftClampedNormal):
        return Independent(base.base_dist, base.reinterpreted_batch_ndims, validate_args=False)
    return base


@contextmanager
def naming_group(groups: Sequence[Group], k: int) -> Iterator[None]:
    """Errors within the block name the group and its scale."""
    try:
        yield
    except (ValueError, TypeError) as error:
        place = f"group {k + 1} of {len(groups)} (scale {groups[k].scale} of {groups[-1].scale})"
        if str(error).startswith(place):  # the block was in another
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}: {error}") from error
