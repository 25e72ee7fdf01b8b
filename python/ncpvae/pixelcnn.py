"""An autoregressive likelihood for binary images: p(x|z) = Π_i p(x_i | x_1 … x_{i−1}, z), pixels in raster order.

It takes the place of `ncpvae.BernoulliLikelihood` in a `VAE`, whose decoder then makes of z a feature map rather than
logits. Such a decoder can describe images without z, and a plain VAE with it loses its latent variables.

Letters: B batch, S samples, R rows (images, however they are arranged), C channels, H W height and width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F

from .pretrained import Pretrained

#: rows in one pass without gradients, by device; on a CPU 64 rows take half the time per row that 1,000 take
ROWS_AT_ONCE = {"cpu": 64}
IMAGES_AT_ONCE = 256  # while drawing; each takes channels·H·W numbers per masked convolution


class MaskedConv2d(nn.Module):
    """A k×k convolution that sees, of its window, the pixels that come before the centre in raster order.

    Those are the first k·⌊k/2⌋ + ⌊k/2⌋ places of the window, read row by row. Only their weights exist, and the rows
    below the centre are left out of the arithmetic.

    Args:
        in_channels, out_channels: of [R, C, H, W].
        kernel_size: k, odd.
        centre: whether it sees the centre too: mask "B" of the paper, for every layer but the first, whose is "A".

    Source: van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel recurrent neural networks", ICML 2016, section 3.4.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, centre: bool):
        super().__init__()
        self.kernel_size, self.centre = kernel_size, centre
        visible = kernel_size * (kernel_size // 2) + kernel_size // 2 + centre
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, visible))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1 / math.sqrt(in_channels * visible)  # that of nn.Conv2d, which would count the hidden places too
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        out_channels, in_channels, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={self.kernel_size}, centre={self.centre}"

    def forward(self, x: Tensor) -> Tensor:
        half = self.kernel_size // 2
        hidden = (half + 1) * self.kernel_size - self.weight.shape[2]
        kernel = F.pad(self.weight, (0, hidden)).unflatten(2, (half + 1, self.kernel_size))
        return F.conv2d(F.pad(x, (0, 0, half, 0)), kernel, self.bias, padding=(0, half))


class PixelByPixel:
    """A masked convolution that is evaluated at one pixel after the other and keeps the inputs it has had.

    Drawing an image then costs what one pass over it does: Ramachandran et al., "Fast generation for convolutional
    autoregressive models", 2017.

    Args:
        convolution: evaluated without gradients.
        size: (R, H, W) of the images.
    """

    def __init__(self, convolution: MaskedConv2d, size: tuple[int, int, int]):
        rows, height, width = size
        self.k, self.half = convolution.kernel_size, convolution.kernel_size // 2
        self.weight, self.bias = convolution.weight.transpose(1, 2).flatten(1), convolution.bias  # [C', visible·C]
        padded = (rows, height + self.half, width + 2 * self.half, convolution.weight.shape[1])
        self.past = self.weight.new_zeros(padded)

    def put(self, i: int, j: int, x: Tensor) -> None:
        """Keep the input x [R, C, 1, 1] at row i, column j."""
        self.past[:, i + self.half, j + self.half] = x[:, :, 0, 0]

    def at(self, i: int, j: int) -> Tensor:
        """The output [R, C', 1, 1] there, once all inputs that it depends on are kept."""
        window = self.past[:, i : i + self.half + 1, j : j + self.k].flatten(1)
        return F.linear(window[:, : self.weight.shape[1]], self.weight, self.bias)[:, :, None, None]

    def step(self, i: int, j: int, x: Tensor) -> Tensor:
        """Keep the input there, and return the output there."""
        self.put(i, j, x)
        return self.at(i, j)


class MaskedResidualBlock(nn.Module):
    """ReLU, 1×1 to h channels, ReLU, masked k×k, ReLU, 1×1 back to 2h, and a skip connection.

    Source: van den Oord et al. 2016, Figure 5. There is no BatchNorm: its statistics would tell a pixel of those after
    it while training.

    Args:
        channels: h.
        kernel_size: k, odd.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.narrow = nn.Conv2d(2 * channels, channels, 1)
        self.masked = MaskedConv2d(channels, channels, kernel_size, centre=True)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor, masked: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x [R, 2h, H, W] → the same shape; `masked` takes the place of the masked convolution."""
        narrow = F.relu_(self.narrow(F.relu(x)))
        return x + self.widen(F.relu_((masked or self.masked)(narrow)))


class PixelCNNLikelihood(Pretrained):
    """p(x|z) for binary images [1, H, W] by a PixelCNN that sees a feature map of z: a likelihood for `VAE`.

    The decoder turns z [B, D] into a feature map [B, C, H, W]: `MLPDecoder(D, (), (4, 28, 28))` for instance, a linear
    layer. The first convolution sees x before the pixel (mask "A") and the feature map all around it; residual blocks
    (mask "B") and two 1×1 convolutions follow.

    Args:
        context_channels: C of the feature map.
        channels: h; the residual blocks are 2h wide and their masked convolutions h.
        kernel_sizes: of the masked convolutions, odd, the first ≥ 3. The default stands, with 32 channels and a feature
            map of 4, in the public configuration of He, Spokoyny, Neubig, Berg-Kirkpatrick, "Lagging inference networks
            and posterior collapse in variational autoencoders", ICLR 2019, whose code builds a larger network.

    Pixels above are unseen where they are too far to the right, with 3×3 kernels more columns than rows away: the
    "blind spot" of such masks.

    Source: van den Oord et al. 2016 (masks, blocks); its use in a VAE: Gulrajani et al., "PixelVAE", ICLR 2017.
    """

    def __init__(
        self,
        context_channels: int,
        channels: int = 32,
        kernel_sizes: Sequence[int] = (9, 9, 9, 7, 7, 7, 5, 5, 5, 3, 3, 3),
    ):
        super().__init__()
        if context_channels < 1 or channels < 1:
            raise ValueError(
                f"PixelCNNLikelihood: context_channels and channels must be ≥ 1, got {context_channels}, {channels}"
            )
        if not kernel_sizes or any(k < 1 or k % 2 == 0 for k in kernel_sizes) or kernel_sizes[0] < 3:
            raise ValueError(
                "PixelCNNLikelihood: kernel_sizes must be odd numbers, at least one, the first ≥ 3, "
                f"got {tuple(kernel_sizes)}"
            )
        self.context_channels, first, wide = context_channels, kernel_sizes[0], 2 * channels
        self.see_x = MaskedConv2d(1, wide, first, centre=False)
        self.see_context = nn.Conv2d(context_channels, wide, first, padding=first // 2, bias=False)
        self.blocks = nn.ModuleList(MaskedResidualBlock(channels, k) for k in kernel_sizes[1:])
        self.last = nn.Conv2d(wide, wide, 1)
        self.logit = nn.Conv2d(wide, 1, 1)

    def forward(self, context: Tensor, event_dims: int = 3) -> "AutoregressiveBernoulli":
        """The feature map [..., C, H, W] → p(x|z) with its leading dimensions as batch."""
        if event_dims != 3 or context.dim() < 3 or context.shape[-3] != self.context_channels:
            raise ValueError(
                "PixelCNNLikelihood: context must be feature maps of the decoder, "
                f"[..., {self.context_channels}, H, W], got shape {tuple(context.shape)}, event dimensions {event_dims}"
            )
        return AutoregressiveBernoulli(self, context)

    def logits(self, x: Tensor, context: Tensor) -> Tensor:
        """Logits [..., 1, H, W] of every pixel given the pixels of x [..., 1, H, W] before it, at least float32.

        The leading dimensions of x and of the context [..., C, H, W] are broadcast. Without gradients some rows are
        computed at a time, so that memory does not grow with their number.
        """
        leading = torch.broadcast_shapes(x.shape[:-3], context.shape[:-3])
        x, context = (t.expand(*leading, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (x, context))
        at_once = max(1, len(x)) if torch.is_grad_enabled() else ROWS_AT_ONCE.get(x.device.type, 1024)
        parts = zip(x.split(at_once), context.split(at_once), strict=True)
        logits = torch.cat([self._logits(*part) for part in parts])
        return logits.view(*leading, *logits.shape[1:])

    def _logits(self, x: Tensor, context: Tensor) -> Tensor:
        return self._from_first_layer(self.see_x(x.to(self.see_x.weight.dtype)) + self.see_context(context))

    def _from_first_layer(self, hidden: Tensor, masked: Sequence[Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        """The layers after the first: [R, 2h, H, W] → logits [R, 1, H, W]."""
        if hidden.device.type == "cpu":  # a training step takes 5 to 25 % less time than with channels first
            hidden = hidden.contiguous(memory_format=torch.channels_last)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, masked[number] if masked else None)
        hidden = F.relu(self.last(F.relu(hidden)))
        with torch.autocast(hidden.device.type, enabled=False):  # a logit rounded to 8 bits is coarse
            return self.logit(hidden.to(self.logit.weight.dtype)).to(_at_least_float32(self.logit.weight.dtype))

    @torch.no_grad()
    def draw(self, context: Tensor, uniform: Tensor) -> Tensor:
        """Images [R, 1, H, W] for feature maps [R, C, H, W]: a pixel is 1 where `uniform`, of its shape, is < p."""
        with torch.autocast(context.device.type, enabled=False):
            seen = self.see_context(context.to(self.see_context.weight.dtype))
            rows, _, height, width = seen.shape
            size, x = (rows, height, width), seen.new_zeros(uniform.shape)
            first = PixelByPixel(self.see_x, size)
            blocks = [PixelByPixel(m, size) for m in self.blocks.modules() if isinstance(m, MaskedConv2d)]
            for i in range(height):
                for j in range(width):
                    hidden = first.at(i, j) + seen[:, :, i, j, None, None]
                    logit = self._from_first_layer(hidden, [partial(block.step, i, j) for block in blocks])
                    x[:, :, i, j] = (uniform[:, :, i, j] < logit[:, :, 0, 0].sigmoid()).to(x)
                    first.put(i, j, x[:, :, i, j, None, None])
        return x


class AutoregressiveBernoulli(Distribution):
    """The binary images of a `PixelCNNLikelihood` at given feature maps; events are [1, H, W].

    It has no `mean` in closed form: asking for it raises NotImplementedError.

    Args:
        network: the likelihood.
        context: [..., C, H, W]; the leading dimensions are the batch's.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.independent(constraints.boolean, 3)

    def __init__(self, network: PixelCNNLikelihood, context: Tensor):
        self.network, self.context = network, context
        event_shape = torch.Size([1, *context.shape[-2:]])
        super().__init__(context.shape[:-3], event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x|z), nats, for x [..., 1, H, W] of zeros and ones; leading dimensions are broadcast with the batch's.

        Raises:
            ValueError: for images of another size, and pixels that are neither 0 nor 1.
        """
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"AutoregressiveBernoulli.log_prob: x must be images {tuple(self.event_shape)}, the feature maps' "
                f"size, got shape {tuple(value.shape)}"
            )
        _check_broadcast(value.shape[:-3], self.batch_shape)
        if not ((value == 0) | (value == 1)).all():
            low, high = float(value.min()), float(value.max())
            raise ValueError(
                f"AutoregressiveBernoulli.log_prob: x must be 0 or 1 in every pixel, got values from {low} to {high}"
            )
        logits = self.network.logits(value, self.context)
        target = value.to(logits.dtype).expand_as(logits)
        return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((-3, -2, -1))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Images [*sample_shape, *batch, 1, H, W], drawn pixel by pixel, some of them at a time."""
        shape = self._extended_shape(torch.Size(sample_shape))
        context = self.context.reshape(-1, *self.context.shape[-3:])
        uniform = torch.rand(shape, dtype=_at_least_float32(context.dtype), device=context.device)
        parts = uniform.view(-1, *self.event_shape).split(IMAGES_AT_ONCE)
        rows = torch.arange(shape[:-3].numel(), device=context.device) % max(1, len(context))
        owners = rows.split(IMAGES_AT_ONCE)
        drawn = [self.network.draw(context[owner], part) for owner, part in zip(owners, parts, strict=True)]
        return torch.cat(drawn).view(shape)

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError(
            "AutoregressiveBernoulli: the mean of a pixel has no closed form, being over all images; use sample()"
        )


def _check_broadcast(leading: torch.Size, batch_shape: torch.Size) -> None:
    try:
        torch.broadcast_shapes(leading, batch_shape)
    except RuntimeError as error:
        raise ValueError(
            "AutoregressiveBernoulli.log_prob: x's leading dimensions must go with the batch's, "
            f"{tuple(batch_shape)}, got {tuple(leading)}"
        ) from error


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
