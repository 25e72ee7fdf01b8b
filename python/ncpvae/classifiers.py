"""Binary classifiers whose logit is log r(z), the log reweighting factor.

A classifier is any module (z, context=None) → log r that maps z [..., *event] to [...]. With a context [B, …] the
leading dimension of z is B: z [B, *event] or, M proposals per context, z [B, M, *event].

A classifier may have a method `fused(dtype)`, which returns the same function in a form that is faster to evaluate
many times without gradients (see `nn.fused`), and a method `widest(event)`, the number of elements of its largest
activation for one z, by which proposals are cut into pieces that stay in the processor's cache. A
method `score(z)` may return ∇ log r(z) by a faster way than autograd, or None; it is asked where there is no context.
A method `remembering()` may return the same function for repeated calls with one context, which does the part that is
of the context alone once.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import Remembered, ResidualCell, hooked, mlp, mlp_gradient, with_fused_children
from .pretrained import Pretrained


def _check_event(name: str, z: Tensor, event: tuple[int | None, ...], meaning: str) -> None:
    given = tuple(z.shape[-len(event) :]) if z.dim() >= len(event) else ()
    if len(given) != len(event) or any(want not in (None, have) for want, have in zip(event, given, strict=True)):
        raise ValueError(f"{name}: z must be [..., {meaning}], got shape {tuple(z.shape)}")


def _check_context(name: str, context: Tensor | None, features: int, letter: str) -> None:
    given = None if context is None else context.shape[1] if context.dim() > 1 else 0
    if (given or 0) != features:
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        wanted = f"[B, {features}, …]" if features else "none"
        raise ValueError(f"{name}: context must be {wanted} ({letter} = {features}), got {got}")


class MLPClassifier(Pretrained):
    """Fully connected classifier of z [..., D] → log r [...].

    Args:
        latent_dim: D.
        hidden: widths of the hidden layers.
        activation: the hidden layers' activation module.
        context_features: E of an optional context [B, E], 0 for none.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        activation: type[nn.Module] = nn.SiLU,
        context_features: int = 0,
    ):
        super().__init__()
        self.latent_dim, self.context_features = latent_dim, context_features
        self.network = mlp([latent_dim + context_features, *hidden, 1], activation)

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        return with_fused_children(self, MLPClassifier, dtype)

    def score(self, z: Tensor) -> Tensor | None:
        _check_event("MLPClassifier", z, (self.latent_dim,), f"D = {self.latent_dim}")
        _check_context("MLPClassifier", None, self.context_features, "E")
        plain = type(self).forward is MLPClassifier.forward and not hooked(self)
        return mlp_gradient(self.network, z) if plain else None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        _check_event("MLPClassifier", z, (self.latent_dim,), f"D = {self.latent_dim}")
        _check_context("MLPClassifier", context, self.context_features, "E")
        if context is not None:
            if z.dim() < 2 or context.dim() != 2 or len(context) != len(z):
                raise ValueError(
                    f"MLPClassifier: context must be [B, E] with z's B first, got shapes {tuple(context.shape)} and "
                    f"{tuple(z.shape)}"
                )
            between = z.dim() - context.dim()
            context = context.view(context.shape[0], *(1,) * between, -1).expand(*z.shape[:-1], -1)
            z = torch.cat([z, context], dim=-1)
        return self.network(z).squeeze(-1)


class ResidualClassifier(Pretrained):
    """The paper's classifier of feature maps z [..., C, H, W] → log r [...] (NCP-VAE, Figure 5).

    3×3 convolution and ReLU; residual blocks A A A, B, A A A, B; global average pooling; one linear logit. The
    paper concatenates z and context before the first convolution. Here that convolution is written as the sum of
    one over z and one over the context, which is the same function and lets M proposals share the second.

    Args:
        in_channels: C of z. H and W must be multiples of 4, for the two halvings.
        channels: channels after the first convolution, a multiple of 2; the paper does not state its width.
        context_channels: C of an optional context [B, C, H, W], 0 for none.
        blocks: blocks A before each block B.
    """

    def __init__(self, in_channels: int, channels: int = 64, context_channels: int = 0, blocks: int = 3):
        super().__init__()
        self.in_channels, self.context_channels = in_channels, context_channels
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.context_stem = (
            nn.Conv2d(context_channels, channels, 3, padding=1, bias=False) if context_channels else None
        )
        cells: list[nn.Module] = []
        for width in (channels, 2 * channels):
            cells += [ResidualCell(width) for _ in range(blocks)]
            cells.append(ResidualCell(width, downsample=True))
        self.cells = nn.Sequential(*cells)
        self.logit = nn.Linear(4 * channels, 1)

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """See the head of the module. The part of the first convolution that is over the context is done once."""
        twin = with_fused_children(self, ResidualClassifier, dtype)
        if twin is not self and twin.context_stem is not None:
            twin._modules["context_stem"] = Remembered(twin.context_stem)
        return twin

    def remembering(self) -> "ResidualClassifier":
        """See the head of the module. For sampling: the weights of the part over the context get no gradient."""
        if self.context_stem is None:
            return self
        twin = copy.copy(self)
        twin.__dict__["_modules"] = dict(self._modules)
        twin._modules["context_stem"] = Remembered(self.context_stem).train(self.training)
        return twin

    def widest(self, event: torch.Size) -> int:
        return self.stem.out_channels * event[1:].numel()

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        _check_event("ResidualClassifier", z, (self.in_channels, None, None), f"C = {self.in_channels}, H, W")
        _check_context("ResidualClassifier", context, self.context_channels, "C")
        leading, (height, width) = z.shape[:-3], z.shape[-2:]
        if height % 4 or width % 4:
            raise ValueError(f"ResidualClassifier: z's H and W must be multiples of 4, got {height}×{width}")
        h = self.stem(z.reshape(-1, *z.shape[-3:]))
        if self.context_stem is not None and context is not None:
            if context.dim() != 4 or context.shape[2:] != z.shape[-2:] or len(context) != len(z):
                raise ValueError(
                    f"ResidualClassifier: context must be [B, C, H, W] with z's B, H and W, got shapes "
                    f"{tuple(context.shape)} and {tuple(z.shape)}"
                )
            c = self.context_stem(context)
            h = h.view(c.shape[0], -1, *c.shape[1:]).add(c[:, None]).flatten(0, 1)
        h = self.cells(F.relu(h))
        return self.logit(h.mean((2, 3))).view(leading)
