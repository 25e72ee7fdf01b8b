"""The hierarchical half, end to end: a training step of an NVAE, and samples from its noise contrastive priors.

`nvae_step` is forward, backward and Adamax on one batch of binary images, through the package, whose walk asks a hook
for every latent variable and builds distributions, against the same modules called in a loop written for the purpose.
`hierarchical.draw` is sampling-importance-resampling in all groups against the loop that holds all proposals at once.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from bench_sample import flops_of
from end_to_end import main
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ncpvae import NVAE, SIR, HierarchicalLoss, HierarchicalNCP, ResidualClassifier, group_classifiers
from ncpvae.bench import Case, Function, Workload, require_memory
from ncpvae.bench.case import BOTH
from ncpvae.hierarchy import balance_kl, group_sizes
from ncpvae.nn import SpectralNorms, batch_norm_scales

IMAGE = (1, 28, 28)
# the NVAE of the likelihood experiment on MNIST, 10 groups of 4×4, and one that two cores train in minutes
TRAINED = {"groups_per_scale": (10,), "channels": 32, "latent_channels": 20, "halvings": 3}
TRAINED |= {"preprocess_cells": 3, "postprocess_cells": 3}
DRAWN = {"groups_per_scale": (4,), "channels": 8, "latent_channels": 8, "halvings": 3}
DRAWN |= {"preprocess_cells": 1, "postprocess_cells": 1, "encoder_cells": 1, "decoder_cells": 1}
CLASSIFIER_CHANNELS = 16
KL_WEIGHT = 0.5  # in the warm-up, where the groups' divergences are balanced
REGULARIZATION = 1e-2
PROPOSALS = (1000, 5000, 20_000)


def cases(device: torch.device, quick: bool = False, batch: int | None = None) -> list[Case]:
    """Steps with and without regularisation, and draws over M; in a quick run B is 16 at M = 5,000 alone."""
    examples = batch or (200 if device.type == "cuda" else 8 if quick else 16)
    steps = [
        Case("nvae_step", {"B": examples}, direction=BOTH, settings={"regularization": λ})
        for λ in (0.0, REGULARIZATION)
    ]
    sizes = [(16, 5000), *((1, M) for M in PROPOSALS)] if quick else [(16, M) for M in PROPOSALS]
    return [*steps, *(Case("hierarchical.draw", {"B": B, "M": M}) for B, M in sizes)]


def workload(case: Case, device: torch.device) -> Workload:
    torch.manual_seed(0)
    return _training(case, device) if case.op == "nvae_step" else _sampling(case, device)


# ---------------------------------------------------------------------------------------------------------
# A step of training
# ---------------------------------------------------------------------------------------------------------


def _training(case: Case, device: torch.device) -> Workload:
    x = torch.bernoulli(torch.full((case.shape["B"], *IMAGE), 0.15, device=device))
    vae, weight = NVAE(IMAGE, **TRAINED).to(device), case.settings["regularization"]
    plain = step(WithoutHooks(copy.deepcopy(vae), weight), x)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        WithoutHooks(copy.deepcopy(vae), 0.0)(x, KL_WEIGHT)
    return Workload(
        own=step(HierarchicalLoss(vae, regularization=weight), x),
        peers={"eager_without_hooks": lambda: plain},
        unit="example",
        elements=len(x),
        flops=3 * counted.get_total_flops(),  # torch counts a depthwise backward pass as that of a dense convolution
        products=True,
    )


def step(loss: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A function that makes one training step and returns the loss before it."""
    optimizer = torch.optim.Adamax(loss.parameters(), lr=1e-3, eps=1e-3, weight_decay=3e-4)

    def once() -> Tensor:
        total = loss(x, KL_WEIGHT)["loss"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return total.detach()

    return once


class WithoutHooks(nn.Module):
    """`HierarchicalLoss` of an NVAE with Bernoulli pixels, as one writes it for this network and this loss alone.

    There is no walk, no `select` and no distribution: densities and divergences are formulas where they are needed.

    Args:
        vae: an `NVAE` without flows, with residual Normals, in training mode.
        regularization: λ.
    """

    def __init__(self, vae: NVAE, regularization: float = 0.0):
        super().__init__()
        self.vae, self.regularization = vae, regularization
        self.spectral_norms = SpectralNorms(vae) if regularization else None
        self.register_buffer("alpha", group_sizes(vae.groups).to(vae.top.device))

    def forward(self, x: Tensor, kl_weight: float) -> dict[str, Tensor]:
        logits, kl = self.reconstruct(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3)).mean()
        loss = reconstruction + kl_weight * balance_kl(kl, self.alpha).sum(1).mean()
        if self.spectral_norms is not None:
            loss = loss + self.regularization * (self.spectral_norms() + batch_norm_scales(self.vae))
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl.sum(1).mean()}

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of x [B, C, H, W] at a draw from the posterior, and the groups' divergences [B, K], nats."""
        vae, features, divergences = self.vae, self.encode(x), []
        state = laid_out(vae.top.expand(len(x), -1, -1, -1))
        for k, level in enumerate(vae.levels):
            state = level.cells(state)
            if k == 0:
                mean, log_std = level.posterior(features[0]).chunk(2, dim=1)
                mean, std = clamp(mean), clamp(log_std).exp() + 1e-2
                kl = 0.5 * (mean.square() + std.square() - 1.0) - std.log()
            else:
                base_mean, base_log_std = level.prior(state).chunk(2, dim=1)
                shift, log_factor = level.posterior(features[k] + level.see(state)).chunk(2, dim=1)
                mean, std = clamp(base_mean + shift), clamp(base_log_std + log_factor).exp() + 1e-2
                base_std = clamp(base_log_std).exp() + 1e-2
                distance = (mean - clamp(base_mean)).square()
                kl = (base_std / std).log() + 0.5 * ((std.square() + distance) / base_std.square() - 1.0)
            z = mean + std * torch.randn(mean.shape, device=mean.device)
            divergences.append(kl.sum((1, 2, 3)))
            state = level.combine(torch.cat([state, z], dim=1))
        left, _, top, _ = vae.padding
        logits = vae.head(vae.postprocess(state))[..., top : top + x.shape[2], left : left + x.shape[3]]
        return logits, torch.stack(divergences, dim=1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The encoder's features of every group, from the top."""
        feature = self.vae.preprocess(laid_out(self.vae.stem(2.0 * F.pad(x, self.vae.padding) - 1.0)))
        features = []
        for tower in self.vae.encoder:
            feature = tower(feature)
            features.append(feature)
        return [self.vae.encoder_top(feature), *features[-2::-1]]


def laid_out(x: Tensor) -> Tensor:
    """Channels last on a CPU, as the package has it: layouts are not what is compared."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def clamp(x: Tensor) -> Tensor:
    return 5.0 * torch.tanh(x / 5.0)


# ---------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------


def _sampling(case: Case, device: torch.device) -> Workload:
    B, M = case.shape["B"], case.shape["M"]
    vae = NVAE(IMAGE, **DRAWN).to(device)
    prior = HierarchicalNCP(vae, group_classifiers(vae, CLASSIFIER_CHANNELS)).to(device)
    return Workload(
        own=lambda: prior.draw(B, SIR(num_proposals=M)),
        peers={"eager_all_at_once": lambda: eager(prior, B, M, device)},
        unit="proposal",
        elements=B * M,
        flops=B * M * sum(flops_for_proposals(prior)),
        products=True,
    )


def eager(prior: HierarchicalNCP, B: int, M: int, device: torch.device) -> Function:
    """The plain loop, where its memory is to be had: z and context side by side, and two activations."""
    shapes = [(group.shape, group.context_shape or group.shape) for group in prior.groups]
    numbers = max(
        math.prod(z) + math.prod(context) + 2 * CLASSIFIER_CHANNELS * math.prod(z[1:]) for z, context in shapes
    )
    require_memory(4 * B * M * numbers, device, f"the activations of {B * M:,} proposals")
    classifiers = [Unsplit(classifier) for classifier in prior.classifiers]
    return lambda: all_at_once(prior.vae, classifiers, B, M)


def flops_for_proposals(prior: HierarchicalNCP) -> list[int]:
    """Of each group, what the classifier must compute for a proposal: all but the part of the context."""
    counts = []
    for group, classifier in zip(prior.groups, prior.classifiers, strict=True):
        like = next(classifier.parameters())
        z, context = like.new_zeros(1, *group.shape), None
        shared = 0
        if group.context_shape is not None:
            context = like.new_zeros(1, *group.context_shape)
            shared = flops_of(classifier.context_stem, context)
        counts.append(flops_of(classifier, z, context) - shared)
    return counts


class Unsplit(nn.Module):
    """A `ResidualClassifier` as in the paper's Figure 5: one convolution over z and context together.

    Args:
        classifier: its weights are used.
    """

    def __init__(self, classifier: ResidualClassifier):
        super().__init__()
        self.cells, self.logit = classifier.cells, classifier.logit
        split = [layer for layer in (classifier.stem, classifier.context_stem) if layer is not None]
        weight = torch.cat([layer.weight.detach() for layer in split], dim=1)
        self.stem = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        self.stem.weight, self.stem.bias = nn.Parameter(weight), classifier.stem.bias

    def forward(self, z: Tensor) -> Tensor:
        """log r [N] for z and context side by side, [N, C, H, W]."""
        return self.logit(self.cells(F.relu(self.stem(z))).mean((2, 3)))[:, 0]


@torch.no_grad()
def all_at_once(
    vae: NVAE, classifiers: Sequence[Callable[[Tensor], Tensor]], B: int, M: int
) -> tuple[Distribution, list[Tensor]]:
    """The loop without chunks: in each group all M·B proposals beside their contexts, softmax, multinomial, gather.

    p(x|z), and z of every group, from the top.
    """
    rows, chosen = torch.arange(B, device=vae.top.device), []

    def select(k: int, base: Distribution, context: Tensor | None) -> Tensor:
        z = base.sample((M,))  # [M, B, C, H, W]
        inputs = z.flatten(0, 1)
        if context is not None:
            inputs = torch.cat([inputs, context.repeat(M, 1, 1, 1)], dim=1)
        log_ratio = classifiers[k](inputs).view(M, B)
        chosen.append(z[torch.multinomial(torch.softmax(log_ratio.T, 1), 1)[:, 0], rows])
        return chosen[-1]

    return vae.walk(select, B), chosen


if __name__ == "__main__":
    main("bench_nvae", batch="examples in a training step")
