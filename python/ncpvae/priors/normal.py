"""The standard choice: a diagonal Normal."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..distributions import diagonal_normal
from ..pretrained import Pretrained


class Normal(Pretrained):
    """N(mean, diag(std)²) over z of any shape; N(0, I) unless given otherwise.

    Args:
        shape: D, or the event's shape.
        mean, std: broadcastable to it; std > 0.
        learn: train mean and log std with the VAE.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        learn: bool = False,
    ):
        super().__init__()
        if isinstance(shape, float):
            raise TypeError(f"Normal: shape must be an integer or a tuple of them, got {shape!r}")
        shape = tuple(shape) if isinstance(shape, (tuple, list)) else (int(shape),)
        if min(shape, default=1) < 1:
            raise ValueError(f"Normal: shape must be positive, got {shape}")
        for name, value in (("mean", mean), ("std", std)):
            given = torch.as_tensor(value).shape
            if len(given) > len(shape) or any(g not in (1, s) for g, s in zip(given[::-1], shape[::-1], strict=False)):
                raise ValueError(f"Normal: {name} must broadcast to shape {shape}, got {tuple(given)}")
        mean, std = (torch.as_tensor(v, dtype=torch.get_default_dtype()).expand(shape).clone() for v in (mean, std))
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("Normal: mean must be finite and std finite and > 0")
        if learn:
            self.mean, self.log_std = nn.Parameter(mean), nn.Parameter(std.log())
        else:
            self.register_buffer("mean", mean)
            self.register_buffer("log_std", std.log())

    def forward(self, context: Tensor | None = None) -> Distribution:
        return diagonal_normal(self.mean, self.log_std.exp(), self.mean.dim())

    @classmethod
    def fit(cls, codes: Tensor, per: str = "coordinate") -> "Normal":
        """The Normal with the mean and standard deviation of `codes`.

        Args:
            codes: [N, D], or feature maps [N, C, H, W] and the like.
            per: "coordinate": a mean and a standard deviation for each; "channel": for each of the C, over all N and
                all positions, which few feature maps suffice for. The same where codes are [N, D].
        """
        if not isinstance(codes, Tensor) or not codes.is_floating_point():
            raise TypeError(
                f"Normal.fit: codes must be a floating-point tensor, got {getattr(codes, 'dtype', type(codes))}"
            )
        if codes.dim() < 2 or len(codes) < 2:
            raise ValueError(f"Normal.fit: codes must be [N, …] with N ≥ 2, got shape {tuple(codes.shape)}")
        if not torch.isfinite(codes).all():
            raise ValueError("Normal.fit: codes must be finite, got NaN or infinity")
        if per not in ("coordinate", "channel"):
            raise ValueError(f"Normal.fit: per must be 'coordinate' or 'channel', got {per!r}")
        over = (0,) if per == "coordinate" else (0, *range(2, codes.dim()))
        std, mean = torch.std_mean(codes, over, keepdim=True)
        return cls(tuple(codes.shape[1:]), mean[0], std[0].clamp_min(1e-6))
