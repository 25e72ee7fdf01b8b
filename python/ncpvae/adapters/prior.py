"""From a VAE and its data to a noise contrastive prior that fits its codes, however far from N(0, I) they lie."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from .. import _random
from ..classifiers import MLPClassifier, ResidualClassifier
from ..pretrained import Pretrained
from ..priors import NoiseContrastivePrior, Normal

HALVINGS = 4  # ResidualClassifier takes H and W that are multiples of this


@torch.no_grad()
def codes(
    vae: Callable[[Tensor], Distribution | Tensor] | nn.Module,
    data: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 256,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = 0,
) -> Tensor:
    """One draw z ~ q(z|x) for each example, [N, *latent_shape], encoded `batch_size` at a time without gradients.

    Args:
        vae: as for `fit_ncp`: a function or module x → q(z|x) as a Distribution, or → draws; a module with an `encode`
            method is asked by that, is put in eval mode, and gets its inputs on its own device.
        data: [N, …], N ≥ 1, or any iterable of batches [B, …], taken as they come.
        transform: applied to every batch; the VAE's `prepare` where it has one (`AdaptedVAE`), otherwise conversion to
            float32.
        seed: governs the draws, torch's global generators being left as they were; None uses those.

    Raises:
        TypeError, ValueError: naming the argument that is off.
    """
    encode = getattr(vae, "encode", vae)
    if not callable(encode):
        raise TypeError(f"codes: vae must be a function, or a module with an encode method, got {type(vae).__name__}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"codes: batch_size must be an integer ≥ 1, got {batch_size!r}")
    if not isinstance(data, Iterable):
        raise TypeError(f"codes: data must be a tensor [N, …] or batches [B, …], got {type(data).__name__}")
    transform = transform or getattr(vae, "prepare", None) or Tensor.float
    if isinstance(vae, nn.Module):
        vae.eval()
    device = next((p.device for p in vae.parameters()), None) if isinstance(vae, nn.Module) else None
    drawn = []
    with _random.scoped(seed):
        for x in data.split(batch_size) if isinstance(data, Tensor) else data:
            if not isinstance(x, Tensor) or x.dim() < 2:
                got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"codes: data must be a tensor [N, …] or batches [B, …], got {got}")
            q = encode(transform(x if device is None else x.to(device)))
            z = q.sample() if isinstance(q, Distribution) else q
            if not isinstance(z, Tensor) or z.shape[:1] != x.shape[:1]:
                got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"codes: vae must return one code for each of {len(x)} examples, got {got}")
            drawn.append(z)
    if sum(map(len, drawn)) == 0:
        raise ValueError("codes: data must hold one example at least, got none")
    return torch.cat(drawn)


class StandardizedClassifier(Pretrained):
    """A classifier that sees (z − mean) / std, so that it learns as fast whatever the scale of the codes.

    Args:
        classifier: (z, context=None) → log r.
        mean, std: broadcastable to one z; std > 0.
        multiple: of feature maps [..., C, H, W], H and W are padded by zeros to multiples of this; 1 pads nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, mean: Tensor, std: Tensor, multiple: int = 1):
        super().__init__()
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError("StandardizedClassifier: mean must be finite and std finite and > 0")
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise ValueError(f"StandardizedClassifier: multiple must be an integer ≥ 1, got {multiple!r}")
        self.classifier, self.multiple = classifier, multiple
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z = (z - self.mean) / self.std
        if self.multiple > 1:
            height, width = z.shape[-2:]
            z = F.pad(z, (0, -width % self.multiple, 0, -height % self.multiple))
        return self.classifier(z) if context is None else self.classifier(z, context)


def prior_for_codes(
    codes: Tensor,
    base: str | nn.Module | Distribution = "channel",
    classifier: nn.Module | None = None,
) -> NoiseContrastivePrior:
    """A noise contrastive prior over such codes, for `fit_ncp` to train: a Gaussian fitted to them, and a classifier.

    A base that is far from the codes, as N(0, I) is from those of most autoencoders, leaves the classifier nothing to
    learn a ratio from (`fit_ncp` warns of it). The classifier sees the codes standardised.

    Args:
        codes: [N, D] or [N, C, H, W], N ≥ 2, for example from `codes`.
        base: "channel" or "coordinate", see `Normal.fit`; or a base prior of your own.
        classifier: by default `ResidualClassifier(C)` for feature maps, zero-padded where H and W are no multiples of
            4, and `MLPClassifier(D)` for vectors.

    Raises:
        TypeError, ValueError: for codes that are no such tensor, a base that is none, or codes of another shape without
            a classifier.

    Example:
        >>> prior = prior_for_codes(torch.randn(100, 4, 7, 7), classifier=ResidualClassifier(4, channels=8, blocks=1))
        >>> prior.sample((2,)).shape
        torch.Size([2, 4, 7, 7])
    """
    spread = Normal.fit(codes, per="channel")
    if isinstance(base, str):
        base = spread if base == "channel" else Normal.fit(codes, per=base)
    if classifier is None and codes.dim() == 2:
        classifier = MLPClassifier(codes.shape[1])
    elif classifier is None and codes.dim() == 4:
        classifier = ResidualClassifier(codes.shape[1])
    elif classifier is None:
        raise ValueError(
            "prior_for_codes: codes must be [N, D] or [N, C, H, W] where no classifier is given, "
            f"got shape {tuple(codes.shape)}"
        )
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"prior_for_codes: classifier must be a module, got {type(classifier).__name__}")
    multiple = HALVINGS if isinstance(classifier, ResidualClassifier) else 1
    standardized = StandardizedClassifier(classifier, spread.mean.clone(), spread.log_std.exp(), multiple)
    return NoiseContrastivePrior(base, standardized).to(codes.device)
