"""The autoencoders of Hugging Face diffusers. Needs diffusers: pip install 'ncpvae[diffusers]'."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..distributions import diagonal_normal
from .adapted import AdaptedVAE, Likelihood

SUPPORTED = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "VQModel")


class _ScaledLatents(nn.Module):
    """A diffusers model whose latents are z = (latent − shift) · scale, as its pipelines give them to a prior.

    Args:
        model: with `encode` and `decode`.
        shift, scale: [C, 1, 1].
    """

    autoencoder: Any
    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, shift: Tensor, scale: Tensor):
        super().__init__()
        self.autoencoder = model
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def encode(self, x: Tensor) -> Distribution | Tensor:
        """x [B, C, H, W] → q(z|x) with event [C, h, w], or z [B, C, h, w] of a deterministic encoder."""
        channels = self.autoencoder.config.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{type(self.autoencoder).__name__}.encode: x must be [B, {channels}, H, W], got {tuple(x.shape)}"
            )
        latent = self.autoencoder.encode(x, return_dict=False)[0]
        if isinstance(latent, Tensor):
            return (_wide(latent) - self.shift) * self.scale
        std = torch.exp(0.5 * _wide(latent.logvar))  # again from logvar: in half precision `latent.std` underflows
        return diagonal_normal((_wide(latent.mean) - self.shift) * self.scale, std * self.scale, 3)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] → x [B, C, H, W]."""
        return self.autoencoder.decode((z / self.scale + self.shift).to(z.dtype), return_dict=False)[0]


def from_diffusers(
    model: Any,
    image_size: int | tuple[int, int] | None = None,
    *,
    likelihood: Likelihood | None = None,
    name: str | None = None,
) -> AdaptedVAE:
    """A diffusers autoencoder of images, with latents [C, h, w] scaled as its diffusion pipelines scale them.

    z = (latent − shift) · scale with `shift_factor` and `scaling_factor` of the model's config, or, where it has
    `latents_mean` and `latents_std`, with those and scale = scaling_factor / latents_std. `decode` undoes it. x is in
    [−1, 1], diffusers' convention.

    Args:
        model: AutoencoderKL or AsymmetricAutoencoderKL (q(z|x) is Gaussian), AutoencoderDC or AutoencoderTiny
            (deterministic), VQModel (its code before quantisation, deterministic; `decode` quantises it).
        image_size: of x, H = W or (H, W), on which the latents' h and w depend; config.sample_size by default.
        likelihood: see `AdaptedVAE`; `ncpvae.NormalLikelihood(σ)` for example.
        name: the model's class by default.

    Raises:
        ImportError: without diffusers.
        TypeError: for any other class, naming it.
        ValueError: for an image size that is missing or does not fit, or a scaling factor that is not positive.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("from_diffusers needs diffusers: pip install 'ncpvae[diffusers]'") from error
    supported = any(isinstance(model, getattr(diffusers, kind)) for kind in SUPPORTED)
    if not supported:
        raise TypeError(
            f"from_diffusers: model must be one of diffusers' {', '.join(SUPPORTED)}, got {type(model).__name__}; "
            "from_callables takes any pair of functions"
        )
    shift, scale = _shift_and_scale(model.config)
    latent_shape = (_latent_channels(model.config), *_latent_size(model.config, image_size))
    return AdaptedVAE(
        _ScaledLatents(model, *(v.to(next(model.parameters()).device) for v in (shift, scale))),
        latent_shape,
        likelihood=likelihood,
        value_range=(-1.0, 1.0),
        name=name or type(model).__name__,
    )


def _shift_and_scale(config) -> tuple[Tensor, Tensor]:
    """shift and scale, each [C, 1, 1] or [1, 1, 1]."""
    factor, shift = config.scaling_factor, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if not factor or factor < 0:
        raise ValueError(f"from_diffusers: config.scaling_factor must be > 0, got {factor}")
    if mean is None or std is None:  # as the pipelines, which use the two only together
        return torch.full((1, 1, 1), float(shift)), torch.full((1, 1, 1), float(factor))
    if shift:
        raise ValueError(f"from_diffusers: config must have shift_factor or latents_mean, got both ({shift}, {mean})")
    return torch.tensor(mean).view(-1, 1, 1), factor / torch.tensor(std).view(-1, 1, 1)


def _latent_channels(config) -> int:
    return config.get("vq_embed_dim") or config.latent_channels


def _latent_size(config, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) of the latents of images of a size."""
    size = config.get("sample_size") if image_size is None else image_size
    if size is None:
        raise ValueError("from_diffusers: image_size must be given, for config has no sample_size to take it from")
    height, width = (size, size) if isinstance(size, int) else size
    names = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")
    stages = next(config[name] for name in names if config.get(name))
    ratio = 2 ** (len(stages) - 1)
    if height < 1 or width < 1 or height % ratio or width % ratio:
        raise ValueError(f"from_diffusers: image_size must be multiples of {ratio}, got {height}×{width}")
    return height // ratio, width // ratio


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
