"""Network parts: multilayer perceptrons, the residual cells of the NCP-VAE paper's Figure 5, and those of NVAE.

`fused(module)` is the same function in a form that is faster to evaluate without gradients.
Letters: B batch, C channels, H and W height and width. NVAE: Vahdat and Kautz, "NVAE: a deep hierarchical variational
autoencoder", NeurIPS 2020.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)
BACKWARD: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.SiLU: torch.ops.aten.silu_backward,
    nn.ReLU: lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
}  # gradients of activations: (gradient of the output, input) → gradient of the input
ONEDNN_NAMES = {nn.SiLU: ("swish", [1.0]), nn.ReLU: ("relu", [])}  # of activations, and their parameters


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Fully connected layers of the given sizes with `activation` between them, none after the last."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(sizes)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module and its parts are in eval mode; afterwards each is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def full_precision(x: Tensor) -> Tensor:
    """x in float32 where autocast made it shorter: densities and divergences lose too much in 16 bits."""
    shorter = x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type)
    return x.float() if shorter else x


def mlp_gradient(network: nn.Module, x: Tensor) -> Tensor | None:
    """The gradient of the sum of an `mlp`'s outputs with respect to x, without autograd.

    It is bit for bit autograd's, whose bookkeeping takes longer than the arithmetic of a small network. None where a
    layer has hooks or is neither linear nor one of `BACKWARD`, where they are in no plain `nn.Sequential`, or where
    autocast would change the arithmetic.
    """
    if type(network) is not nn.Sequential:
        return None
    layers = list(network)
    known = all((type(layer) is nn.Linear or type(layer) in BACKWARD) and not hooked(layer) for layer in layers)
    if not known or hooked(network) or torch.is_autocast_enabled(x.device.type):
        return None
    with torch.no_grad():
        inputs = []
        for layer in layers:
            inputs.append(x)
            x = layer(x)
        gradient = torch.ones_like(x)
        for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
            gradient = gradient @ layer.weight if isinstance(layer, nn.Linear) else BACKWARD[type(layer)](gradient, x)
    return gradient


class SqueezeExcitation(nn.Module):
    """Per-channel gates from the spatial mean: Hu, Shen, Sun, "Squeeze-and-excitation networks", CVPR 2018.

    Args:
        channels: C of the input [B, C, H, W].
        ratio: the hidden layer has max(C / ratio, 4) units.
    """

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        hidden = max(channels // ratio, 4)
        self.gate = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        return with_fused_children(self, SqueezeExcitation, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3)))[..., None, None]


class FactorizedReduction(nn.Module):
    """Halve height and width by four 1×1 convolutions, each on its own quarter of the pixels, after a swish.

    Args:
        in_channels, out_channels: C before and after; out_channels must be a multiple of 4.
        convolution: their class.

    Raises:
        ValueError: for an odd height or width, which has no such quarters.
    """

    def __init__(self, in_channels: int, out_channels: int, convolution: type[nn.Conv2d] = nn.Conv2d):
        super().__init__()
        if out_channels % 4:
            raise ValueError(f"FactorizedReduction: out_channels must be a multiple of 4, got {out_channels}")
        self.quarters = nn.ModuleList(convolution(in_channels, out_channels // 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"FactorizedReduction: height and width must be even, got input {tuple(x.shape)}")
        x = F.silu(x)
        # Every second pixel, then stride 1: with torch 2.13's oneDNN on an AVX-512 machine the backward pass of 1×1
        # convolutions with stride 2 corrupted the heap.
        offsets = ((0, 0), (1, 1), (0, 1), (1, 0))
        parts = zip(self.quarters, offsets, strict=True)
        return torch.cat([convolution(x[:, :, i::2, j::2]) for convolution, (i, j) in parts], dim=1)


class ResidualCell(nn.Module):
    """BN, swish, 3×3, BN, swish, 3×3, squeeze-excitation, and a skip connection (NCP-VAE, Figure 5).

    Block A keeps C and the size; block B (`downsample=True`) doubles C and halves the size, its skip being
    a factorised reduction.
    """

    def __init__(self, channels: int, downsample: bool = False):
        super().__init__()
        out = 2 * channels if downsample else channels
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out, 3, stride=2 if downsample else 1, padding=1),
            nn.BatchNorm2d(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
            SqueezeExcitation(out),
        )
        self.skip = FactorizedReduction(channels, out) if downsample else nn.Identity()

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        return with_fused_children(self, ResidualCell, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.residual(x)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with NVAE's momentum, over the batch of all processes where they compute on GPUs.

    It does what `nn.SyncBatchNorm` does, without being one: DDP on CPUs, where each process has statistics of its own,
    refuses a model that has any.
    """

    process_group = None  # all of them
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5, momentum=0.05)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        return super().forward(x)


class WeightNormConv2d(nn.Conv2d):
    """A convolution with kernels e^s·w / (‖w‖ + 1e-5), s being learned for each output channel: NVAE's weight norm.

    Source: Salimans and Kingma, "Weight normalization", NeurIPS 2016. The input is padded so that stride 1 keeps H × W.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as in `nn.Conv2d`; kernel_size is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups)
        self.log_scale = nn.Parameter(torch.log(self._norm(self.weight.detach()) + 1e-2))

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)

    def effective_weight(self) -> Tensor:
        """The kernels [C_out, C_in / groups, k, k] that x is convolved with."""
        return self.weight * (self.log_scale.exp() / (self._norm(self.weight) + 1e-5))  # one pass over the kernels

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.effective_weight(), self.bias)


class BottomUpCell(nn.Module):
    """NVAE's residual cell of the encoder: x + 0.1·SE(3×3(swish(BN(3×3(swish(BN(x))))))).

    With `down` it doubles C and halves H and W, the skip connection being a factorised reduction. Convolutions are
    weight-normed.
    """

    def __init__(self, channels: int, down: bool = False):
        super().__init__()
        out = 2 * channels if down else channels
        self.residual = nn.Sequential(
            BatchNorm(channels),
            nn.SiLU(),
            WeightNormConv2d(channels, out, 3, stride=2 if down else 1),
            BatchNorm(out),
            nn.SiLU(),
            WeightNormConv2d(out, out, 3),
            SqueezeExcitation(out),
        )
        self.skip = FactorizedReduction(channels, out, WeightNormConv2d) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + 0.1 * self.residual(x)


class TopDownCell(nn.Module):
    """NVAE's residual cell of the decoder: an inverted residual, wide inside, with a 5×5 depthwise convolution.

    BN, 1×1 to expand·C, BN, swish, depthwise 5×5, BN, swish, 1×1, BN, squeeze-excitation; times 0.1, plus x. With `up`
    it halves C and doubles H and W, by nearest neighbours before the branch and bilinearly in the skip connection.
    """

    def __init__(self, channels: int, expand: int, up: bool = False):
        super().__init__()
        out, hidden = channels // 2 if up else channels, expand * channels
        self.residual = nn.Sequential(
            nn.Upsample(scale_factor=2) if up else nn.Identity(),
            BatchNorm(channels),
            nn.Conv2d(channels, hidden, 1, bias=False),
            BatchNorm(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            BatchNorm(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, out, 1, bias=False),
            BatchNorm(out),
            SqueezeExcitation(out),
        )
        self.skip: nn.Module = nn.Identity()
        if up:
            self.skip = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), WeightNormConv2d(channels, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + 0.1 * self.residual(x)


class Cells(nn.Sequential):
    """Cells one after another; where `recompute` is set, backward computes their activations again to save memory.

    Memory is then that of the cells' outputs and of one cell's inside; BatchNorm's running statistics see a batch once.
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for cell in self:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    cell,
                    x,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=partial(_recomputing, cell),
                )
            else:
                x = cell(x)
        return x


def _recomputing(cell: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds a cell in the forward pass, and when it is computed again."""
    return nullcontext(), _without_statistics(cell)


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm normalises as before, but keeps no account of what it has seen."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class SpectralNorms(nn.Module):
    """The largest singular values of a network's convolutions, by power iteration that goes on from call to call.

    A kernel is the matrix [C_out, C_in·k·k / groups]; those of one shape are worked on together.

    Args:
        network: its `nn.Conv2d` are looked at; it is no part of this module.
        iterations: in each call; there are 40 at the start.

    Source: Yoshida and Miyato, "Spectral norm regularization for improving the generalizability of deep learning",
    2017; NVAE, section 3.2.
    """

    def __init__(self, network: nn.Module, iterations: int = 4):
        super().__init__()
        self.iterations = iterations
        by_shape: dict[torch.Size, list[nn.Conv2d]] = {}
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                by_shape.setdefault(layer.weight.flatten(1).shape, []).append(layer)
        if not by_shape:
            raise ValueError("SpectralNorms: network must have convolutions, got none")
        self._layers = tuple(by_shape.values())  # in a tuple, so that they are not this module's
        generator = torch.Generator().manual_seed(0)
        for number, (shape, layers) in enumerate(by_shape.items()):
            start = torch.randn(len(layers), shape[0], generator=generator)
            self.register_buffer(f"left_{number}", F.normalize(start, dim=1).to(layers[0].weight))
        with torch.no_grad():
            self._iterate(40)

    def forward(self) -> Tensor:
        """Σ σ_max over all convolutions, 0-dimensional; the gradient is that for fixed singular vectors."""
        with torch.autocast(next(self.buffers()).device.type, enabled=False):
            return torch.stack(self._iterate(self.iterations)).sum()

    def _iterate(self, iterations: int) -> list[Tensor]:
        sums = []
        for number, layers in enumerate(self._layers):
            matrices = torch.stack([_kernel(layer).flatten(1) for layer in layers])  # [n, rows, columns]
            left, fixed = getattr(self, f"left_{number}"), matrices.detach()
            for _ in range(iterations):
                right = F.normalize(torch.einsum("nrc,nr->nc", fixed, left), dim=1)
                left = F.normalize(torch.einsum("nrc,nc->nr", fixed, right), dim=1)
            getattr(self, f"left_{number}").copy_(left)
            sums.append(torch.einsum("nr,nrc,nc->", left, matrices, right))
        return sums


def _kernel(layer: nn.Conv2d) -> Tensor:
    return layer.effective_weight() if isinstance(layer, WeightNormConv2d) else layer.weight


def batch_norm_scales(network: nn.Module) -> Tensor:
    """Σ max |γ| over the network's BatchNorm layers, 0-dimensional: the other half of NVAE's regularisation."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.weight is not None]
    return torch.stack([norm.weight.abs().amax() for norm in norms]).sum() if norms else torch.zeros(())


class PackedLinear(nn.Module):
    """A linear layer and the activation after it in one call of oneDNN, with weights in oneDNN's own layout.

    320,000 rows through 50 → 256 → 256 → 1 with SiLU take 0.27 s on two cores of a Zen 4 with it and 0.30 s without it
    in float32, 0.16 and 0.18 s in bfloat16 (torch 2.13, best of four, pieces of 2,048 to 8,192 rows). It cannot be
    trained.

    Args:
        linear: its weights are copied.
        activation: nn.SiLU, nn.ReLU, or None.
        dtype: of the product; the input is converted to it and the output has it. float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear, activation: type[nn.Module] | None, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.dtype = linear.out_features, dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype).contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.activation = ("none", []) if activation is None else ONEDNN_NAMES[activation]

    @staticmethod
    def serves(linear: nn.Linear, dtype: torch.dtype) -> bool:
        """Whether this torch and this processor have it for the layer."""
        onednn = torch.ops.mkldnn
        return (
            linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(onednn, "_linear_pointwise")
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and onednn._is_mkldnn_bf16_supported()))
        )

    def forward(self, x: Tensor) -> Tensor:
        name, parameters = self.activation
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, name, parameters, "")


class FullPrecisionLinear(nn.Module):
    """A linear layer that keeps to the precision of its weights under autocast: a logit rounded to 8 bits is coarse."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(x.to(self.linear.weight.dtype))


def fused(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The same function in a form that is faster to evaluate, for use under `torch.no_grad()`.

    Linear layers are joined with the SiLU or ReLU after them, and BatchNorm is folded into the convolution before it,
    inside `nn.Sequential` and the modules of this package. Any other module, or one in training mode or with hooks, is
    returned as it is. What comes back shares the weights that did not have to change.

    Args:
        dtype: of matrix products, for evaluation under autocast to it; layers with one output stay as they are.
    """
    if module.training or hooked(module):
        return module
    own = getattr(type(module), "fused", None)  # the type's: a compiled module answers with what it was compiled from
    if own is not None:
        return own(module, dtype)
    if type(module) is nn.Sequential:
        return nn.Sequential(*_fused_layers(list(module), dtype)).eval()
    if type(module) is nn.Linear:
        return _fused_linear(module, None, dtype)
    if type(module) is nn.Conv2d and (module.weight.device.type == "cpu" or dtype is not None):
        twin = copy.deepcopy(module)
        twin.weight.data = twin.weight.data.contiguous(memory_format=torch.channels_last)
        return twin
    return module


def with_fused_children(module: M, owner: type[nn.Module], dtype: torch.dtype | None) -> M:
    """A twin of `module` with its children fused; `module` itself where it has a `forward` other than `owner`'s."""
    if type(module).forward is not owner.forward:
        return module
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: None if child is None else fused(child, dtype) for name, child in module._modules.items()
    }
    return twin


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fused_layers(layers: list[nn.Module], dtype: torch.dtype | None) -> list[nn.Module]:
    """The layers of an `nn.Sequential`, joined where two can be one."""
    done: list[nn.Module] = []
    for layer in layers:
        last = done[-1] if done else None
        plain = last is not None and not any(hooked(part) or part.training for part in (last, layer))
        if plain and type(last) is nn.Linear and type(layer) in ONEDNN_NAMES:
            joined = _fused_linear(last, type(layer), dtype)
            done[-1:] = [last, layer] if joined is last else [joined]
        elif plain and type(last) is nn.Conv2d and type(layer) is nn.BatchNorm2d and layer.track_running_stats:
            done[-1] = fuse_conv_bn_eval(last, layer)
        else:
            done.append(layer)
    return [fused(layer, dtype) for layer in done]


def _fused_linear(linear: nn.Linear, activation: type[nn.Module] | None, dtype: torch.dtype | None) -> nn.Module:
    """The layer, packed where that is to be had; the activation is in it if another module than `linear` comes back."""
    product = torch.float32 if dtype is None or linear.out_features == 1 else dtype
    if PackedLinear.serves(linear, product):
        return PackedLinear(linear, activation, product)
    keep = linear.out_features == 1 and dtype is not None and activation is None
    return FullPrecisionLinear(linear) if keep else linear


class Remembered(nn.Module):
    """A module that is not called again while the very same tensor comes: a context beside many sets of proposals.

    What it gives carries no gradient.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            with torch.no_grad():
                self.last = (x, self.module(x))
        return self.last[1]
