"""NVAE, a hierarchical VAE of residual cells at several resolutions, in plain torch.

    x ─ stem ─ preprocessing ─ encoder cells ……… feature of every group, from the bottom up
                                                     │
    learned constant ─ [cells ─ s_k ─ p(z_k | s_k) ─ select z_k ─ combine] for k = 1 … K ─ postprocessing ─ p(x|z)

s_k is the context c(z_<k) of a noise contrastive prior. Letters: B batch, C H W image or feature map, K groups.
Source: Vahdat and Kautz, "NVAE: a deep hierarchical variational autoencoder", NeurIPS 2020; NCP-VAE, appendix D.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints
from torch.nn import functional as F

from .distributions import BernoulliLikelihood, SoftClampedNormal, diagonal_normal
from .hierarchy import Group, Posterior, Select, check_selected, infer
from .nn import BottomUpCell, Cells, TopDownCell, WeightNormConv2d, full_precision
from .pretrained import Pretrained


def adaptive_groups(scales: int, groups: int, minimum: int = 1) -> tuple[int, ...]:
    """The numbers of groups per scale, from the top: `groups` at the largest resolution, halved at each above it."""
    if scales < 1 or groups < 1 or minimum < 1:
        raise ValueError(f"adaptive_groups: scales, groups and minimum must be ≥ 1, got {scales}, {groups}, {minimum}")
    return tuple(max(minimum, groups // 2**i) for i in reversed(range(scales)))


class NVAE(Pretrained):
    """NVAE for images [C, H, W] in [0, 1], of any size: the image is padded to what the halvings need.

    It has the protocol `hierarchy.HierarchicalVAE`.

    Args:
        shape: (C, H, W) of x.
        likelihood: module (parameters, event_dims) → p(x|z) with `parameter_channels`; Bernoulli by default.
            `LogisticMixtureLikelihood` and `PixelNormalLikelihood` are for colours.
        channels: of the first feature map; they double with each halving of the resolution.
        groups_per_scale: numbers of groups, from the top, the smallest feature maps, down; see `adaptive_groups`.
        latent_channels: of every z_k.
        halvings: of the image before the ladder, one in each block of preprocessing cells.
        preprocess_cells, postprocess_cells: in each block before and after the ladder.
        encoder_cells, decoder_cells: for each group.
        flows: pairs of inverse autoregressive cells on the posterior of each group.
        residual: posteriors relative to the prior, "residual Normals".

    Attributes:
        groups: shapes of the K groups, from the top.
        recompute: set it to save memory in training: activations inside of cells are computed once more in backward.
    """

    levels: Sequence["Level"]

    def __init__(
        self,
        shape: tuple[int, int, int],
        likelihood: nn.Module | None = None,
        *,
        channels: int = 32,
        groups_per_scale: Sequence[int] = (5, 10),
        latent_channels: int = 20,
        halvings: int = 2,
        preprocess_cells: int = 3,
        postprocess_cells: int = 3,
        encoder_cells: int = 2,
        decoder_cells: int = 2,
        flows: int = 0,
        residual: bool = True,
    ):
        super().__init__()
        counts = {"channels": channels, "latent_channels": latent_channels}
        if halvings:
            counts |= {"preprocess_cells": preprocess_cells, "postprocess_cells": postprocess_cells}
        _check_counts(counts, minimum=1)
        optional = {"halvings": halvings, "encoder_cells": encoder_cells, "decoder_cells": decoder_cells}
        _check_counts({**optional, "flows": flows}, minimum=0)
        _check_sizes(shape, groups_per_scale, channels, halvings)
        self.likelihood = BernoulliLikelihood() if likelihood is None else likelihood
        if not hasattr(self.likelihood, "parameter_channels"):
            raise TypeError(
                f"NVAE: likelihood must have a method parameter_channels, got {type(self.likelihood).__name__}"
            )
        self.shape, self.residual = tuple(shape), residual
        factor = 2 ** (halvings + len(groups_per_scale) - 1)
        height, width = (-(-size // factor) for size in shape[1:])  # of the top, rounded up
        top, left = ((n * factor - size) // 2 for n, size in zip((height, width), shape[1:], strict=True))
        self.padding = (left, width * factor - shape[2] - left, top, height * factor - shape[1] - top)
        bottom = channels * 2**halvings
        widths = [
            bottom * 2**i for i in reversed(range(len(groups_per_scale)))
        ]  # channels of every scale, from the top

        self.stem = WeightNormConv2d(shape[0], channels, 3)
        self.preprocess = Cells(*_halving_blocks(channels, halvings, preprocess_cells))
        self.encoder = nn.ModuleList(_encoder_towers(widths, groups_per_scale, encoder_cells))
        self.encoder_top = nn.Sequential(nn.ELU(), WeightNormConv2d(widths[0], widths[0], 1), nn.ELU())

        self.groups = _groups(widths, groups_per_scale, latent_channels, (height, width))
        self.top = nn.Parameter(torch.rand(widths[0], height, width))
        self.levels = nn.ModuleList(_levels(widths, self.groups, decoder_cells, flows))  # type: ignore[assignment]
        self.postprocess = Cells(*_doubling_blocks(bottom, halvings, postprocess_cells))
        parameters = self.likelihood.parameter_channels(shape[0])  # type: ignore[operator]
        self.head = nn.Sequential(nn.ELU(), WeightNormConv2d(channels, parameters, 3))

    @property
    def recompute(self) -> bool:
        return self.postprocess.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, Cells):
                module.recompute = value

    def encode(self, x: Tensor) -> list[Tensor]:
        """The encoder's features of every group, from the top, for x [B, C, H, W]."""
        if x.dim() != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"NVAE: x must be [B, {', '.join(map(str, self.shape))}], got shape {tuple(x.shape)}")
        feature = self.preprocess(_laid_out(self.stem(2.0 * F.pad(x, self.padding) - 1.0)))
        features = []
        for tower in self.encoder:
            feature = tower(feature)
            features.append(feature)
        return [self.encoder_top(feature), *features[-2::-1]]

    def posterior(self, k: int, base: Distribution, context: Tensor | None, encoded: Sequence[Tensor]) -> Distribution:
        """q(z_k | z_<k, x), batch [B], event [C, H, W]; `encoded` is what `encode` returned."""
        level, feature = self.levels[k], encoded[k]
        if context is not None:
            feature = feature + level.see(context)
        mean, log_std = full_precision(level.posterior(feature)).chunk(2, dim=1)
        normal = SoftClampedNormal(mean, log_std, 3)
        if self.residual and k > 0:
            if not isinstance(base, SoftClampedNormal):
                raise TypeError(f"NVAE: base of group {k + 1} must be the walk's own, got {type(base).__name__}")
            normal = base.residual(mean, log_std)
        if not level.flows:
            return normal
        return TransformedDistribution(normal, [AutoregressiveFlow(shift) for shift in level.flows])

    def walk(self, select: Select, batch: int) -> Distribution:
        """From the top to p(x|z), batch [B]; z_k [B, C, H, W] is `select(k, p(z_k | z_<k), context)`."""
        state = _laid_out(self.top.expand(batch, -1, -1, -1))
        for k, level in enumerate(self.levels):
            state = level.cells(state)
            if k == 0:
                zero = torch.zeros((batch, *self.groups[0].shape), device=state.device, dtype=self.top.dtype)
                base, context = diagonal_normal(zero, torch.ones_like(zero), 3), None
            else:
                mean, log_std = full_precision(level.prior(state)).chunk(2, dim=1)
                base, context = SoftClampedNormal(mean, log_std, 3), state
            z = check_selected("NVAE", self.groups, k, select(k, base, context), batch)
            state = level.combine(torch.cat([state, z.to(state.dtype)], dim=1))
        (_, height, width), (left, _, top, _) = self.shape, self.padding
        parameters = full_precision(self.head(self.postprocess(state)))
        return self.likelihood(parameters[..., top : top + height, left : left + width], 3)

    def forward(self, x: Tensor) -> tuple[Distribution, Posterior]:
        """p(x|z) at a draw z ~ q(z|x), and the draw with its distributions: `hierarchy.infer`."""
        return infer(self, x)


def _laid_out(x: Tensor) -> Tensor:
    """x in the layout in which its device is fast: on a CPU a training step takes 1.6 s so, and 2.7 s otherwise."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _check_counts(counts: dict[str, int], minimum: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"NVAE: {name} must be an integer ≥ {minimum}, got {value!r}")


def _check_sizes(shape: Sequence[int], groups_per_scale: Sequence[int], channels: int, halvings: int) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"NVAE: shape must be (C, H, W), each ≥ 1, got {tuple(shape)}")
    if not groups_per_scale or min(groups_per_scale) < 1:
        raise ValueError(f"NVAE: groups_per_scale must be a number ≥ 1 for each scale, got {tuple(groups_per_scale)}")
    reductions = halvings + len(groups_per_scale) - 1
    if reductions and channels % 2:
        raise ValueError(f"NVAE: channels must be even for {reductions} factorised reductions, got {channels}")


def _halving_blocks(channels: int, blocks: int, cells: int) -> Iterator[nn.Module]:
    """Preprocessing: the last cell of every block doubles the channels and halves the size."""
    for block in range(blocks):
        for number in range(cells):
            yield BottomUpCell(channels * 2**block, down=number == cells - 1)


def _doubling_blocks(channels: int, blocks: int, cells: int) -> Iterator[nn.Module]:
    """Postprocessing: the first cell of every block halves the channels and doubles the size."""
    for block in range(blocks):
        for number in range(cells):
            yield TopDownCell(channels // 2 ** (block + (number > 0)), 3, up=number == 0)


def _encoder_towers(widths: Sequence[int], groups_per_scale: Sequence[int], cells: int) -> Iterator[Cells]:
    """The cells before the feature of each group, from the bottom; the first of a further scale reduces."""
    for scale in reversed(range(len(widths))):
        for number in range(groups_per_scale[scale]):
            reduce = number == 0 and scale < len(widths) - 1
            down = [BottomUpCell(widths[scale + 1], down=True)] if reduce else []
            yield Cells(*down, *(BottomUpCell(widths[scale]) for _ in range(cells)))


def _groups(
    widths: Sequence[int], groups_per_scale: Sequence[int], latent_channels: int, top: tuple[int, int]
) -> tuple[Group, ...]:
    """Shapes of all groups, from the top, where height and width are `top`."""
    groups: list[Group] = []
    for scale, count in enumerate(groups_per_scale):
        size = (top[0] * 2**scale, top[1] * 2**scale)
        for _ in range(count):
            context = (widths[scale], *size) if groups else None
            groups.append(Group((latent_channels, *size), context, scale + 1))
    return tuple(groups)


def _levels(widths: Sequence[int], groups: Sequence[Group], cells: int, flows: int) -> Iterator["Level"]:
    """The networks of all groups, from the top; cells that begin a further scale double the size."""
    before = groups[0]
    for group in groups:
        wide, first = widths[group.scale - 1], group is groups[0]
        up = [TopDownCell(2 * wide, 6, up=True)] if group.scale > before.scale else []
        own = [] if first else [TopDownCell(wide, 6) for _ in range(cells)]
        yield Level(wide, group.shape[0], Cells(*up, *own), flows, first)
        before = group


class Level(nn.Module):
    """The networks of one group: cells to the state s, s → p(z|s), (feature, s) → q(z|x, s), (s, z) → the next state.

    Args:
        channels: of s.
        latent_channels: of z.
        cells: before the group.
        flows: pairs of autoregressive shifts, each with the pixels in order, then in reverse.
        first: at the top, where the prior is N(0, I) and the posterior sees the encoder alone.
    """

    def __init__(self, channels: int, latent_channels: int, cells: Cells, flows: int, first: bool):
        super().__init__()
        self.cells = cells
        if not first:
            self.prior = nn.Sequential(nn.ELU(), WeightNormConv2d(channels, 2 * latent_channels, 1))
            self.see = WeightNormConv2d(channels, channels, 1)
        self.posterior = WeightNormConv2d(channels, 2 * latent_channels, 3)
        self.flows = nn.ModuleList(AutoregressiveShift(latent_channels, bool(i % 2)) for i in range(2 * flows))
        self.combine = WeightNormConv2d(channels + latent_channels, channels, 1)


class AutoregressiveConv2d(WeightNormConv2d):
    """A convolution whose output at a pixel sees the pixels before it, in reading order, and channels before its own.

    Channels of in and out are taken to be the z's in equal shares, in order.

    Args:
        in_channels, out_channels, kernel_size, groups: of the convolution.
        latent_channels: of z; in_channels and out_channels are multiples of it.
        strict: an output does not see its own z.
        mirror: the order is the reverse, of pixels and of channels.
        gain: the first kernels are those of `nn.Conv2d` times this.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        latent_channels: int,
        strict: bool = False,
        mirror: bool = False,
        groups: int = 1,
        gain: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel_size, groups=groups)
        share = in_channels // groups
        target = torch.arange(out_channels) * latent_channels // out_channels
        source = torch.arange(in_channels).view(groups, share) * latent_channels // in_channels
        source = source.repeat_interleave(out_channels // groups, dim=0)  # [C_out, C_in / groups]
        distance = target[:, None] - source
        distance = -distance if mirror else distance
        mask, centre = torch.zeros(kernel_size, kernel_size), kernel_size // 2
        mask[:centre] = 1.0
        mask[centre, :centre] = 1.0
        mask = (mask.flip(0, 1) if mirror else mask).expand(out_channels, share, -1, -1).clone()
        mask[:, :, centre, centre] = (distance > 0 if strict else distance >= 0).float()
        self.register_buffer("mask", mask)
        self.log_scale = nn.Parameter(torch.log(gain * (self._norm(self.weight.detach() * mask) + 1e-2)))

    def effective_weight(self) -> Tensor:
        masked = self.weight * self.mask
        return masked * (self.log_scale.exp() / (self._norm(masked) + 1e-5))


class AutoregressiveShift(nn.Sequential):
    """μ(z), of which every element depends on the elements of z before it: NVAE's inverse autoregressive cell.

    Masked 3×3 to 6·C channels, ELU, masked depthwise 5×5, ELU, ELU, masked 1×1.
    """

    def __init__(self, channels: int, mirror: bool):
        convolution, hidden = partial(AutoregressiveConv2d, latent_channels=channels, mirror=mirror), 6 * channels
        super().__init__(
            convolution(channels, hidden, 3, strict=True),
            nn.ELU(),
            convolution(hidden, hidden, 5, groups=hidden),
            nn.ELU(),
            nn.ELU(),
            convolution(hidden, channels, 1, gain=0.1),
        )


class AutoregressiveFlow(Transform):
    """z ↦ z − μ(z): its Jacobian is triangular with ones on the diagonal, so that densities keep their values.

    The inverse is found by iteration, exactly, after at most as many steps as z has elements.

    Source: Kingma et al., "Improved variational inference with inverse autoregressive flow", NeurIPS 2016.
    """

    domain = codomain = constraints.independent(constraints.real, 3)
    bijective = True

    def __init__(self, shift: nn.Module):
        super().__init__(cache_size=1)  # the density of a draw needs no inverse
        self.shift = shift

    def with_cache(self, cache_size: int = 1) -> "AutoregressiveFlow":
        return self

    def _mean(self, z: Tensor) -> Tensor:
        return full_precision(self.shift(z.reshape(-1, *z.shape[-3:]))).view(z.shape)

    def _call(self, x: Tensor) -> Tensor:
        return x - self._mean(x)

    def _inverse(self, y: Tensor) -> Tensor:
        z = y
        for _ in range(y.shape[-3:].numel()):
            z, before = y + self._mean(z), z
            if torch.equal(z, before):
                break
        return z

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-3])
