"""Network parts: multilayer perceptrons and the residual cells of the NCP-VAE paper's Figure 5.

`fused(module)` is the same function in a form that is faster to evaluate without gradients.
Letters: B batch, C channels, H and W height and width.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


def full_precision(x: Tensor) -> Tensor:
    """x in float32 where autocast made it shorter: densities and divergences lose too much in 16 bits."""
    shorter = x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type)
    return x.float() if shorter else x


def mlp_gradient(network: nn.Sequential, x: Tensor) -> Tensor | None:
    """The gradient of the sum of an `mlp`'s outputs with respect to x, without autograd.

    It is bit for bit autograd's, whose bookkeeping takes longer than the arithmetic of a small network. None where a
    layer has hooks or is neither linear nor one of `BACKWARD`, or where autocast would change the arithmetic.
    """
    layers = list(network)
    known = all((type(layer) is nn.Linear or type(layer) in BACKWARD) and not _hooked(layer) for layer in layers)
    if not known or _hooked(network) or torch.is_autocast_enabled(x.device.type):
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

    Raises:
        ValueError: for an odd height or width, which has no such quarters.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        if out_channels % 4:
            raise ValueError(f"FactorizedReduction: out_channels must be a multiple of 4, got {out_channels}")
        self.quarters = nn.ModuleList(nn.Conv2d(in_channels, out_channels // 4, 1, stride=2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"FactorizedReduction: height and width must be even, got input {tuple(x.shape)}")
        x = F.silu(x)
        offsets = ((0, 0), (1, 1), (0, 1), (1, 0))
        parts = zip(self.quarters, offsets, strict=True)
        return torch.cat([convolution(x[:, :, i:, j:]) for convolution, (i, j) in parts], dim=1)


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
    if module.training or _hooked(module):
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


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fused_layers(layers: list[nn.Module], dtype: torch.dtype | None) -> list[nn.Module]:
    """The layers of an `nn.Sequential`, joined where two can be one."""
    done: list[nn.Module] = []
    for layer in layers:
        last = done[-1] if done else None
        plain = last is not None and not any(_hooked(part) or part.training for part in (last, layer))
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
    """A module that is not called again while the very same tensor comes: a context beside many sets of proposals."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not x:
            self.last = (x, self.module(x))
        return self.last[1]
