"""Feature spaces in which sets of pictures are compared, named so that every figure can say which one it used.

An extractor is any `nn.Module` that takes images [B, C, H, W] to features [B, F]; its `name`, or its class's, is
what figures carry. `nn.Flatten()` compares the values themselves.

Letters: N examples, B batch, F features, C H W image.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import _distributed
from ..pretrained import Pretrained

Images = Tensor | Iterable[Tensor]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends with the start of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
RANGE_TOLERANCE = 1e-3  # by which images in [0, 1] may leave it, by rounding


@dataclass(frozen=True)
class Features:
    """Features of a set of examples, and where they come from.

    Attributes:
        values: [N, F], floating point and finite.
        extractor: the extractor's name.
    """

    values: Tensor = field(repr=False)
    extractor: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"Features: values must be a tensor [N, F], got {type(self.values).__name__}")
        if self.values.dim() != 2 or 0 in self.values.shape:
            raise ValueError(f"Features: values must be [N, F] with N, F ≥ 1, got shape {tuple(self.values.shape)}")
        if not self.values.is_floating_point():
            raise TypeError(f"Features: values must be floating point, got {self.values.dtype}")
        if not torch.isfinite(self.values).all():
            raise ValueError(f"Features: values of {self.extractor!r} must be finite, got NaN or infinity")

    def __len__(self) -> int:
        return len(self.values)


def extractor_name(extractor: nn.Module) -> str:
    """Its `name` where it has one, its class's otherwise."""
    name = getattr(extractor, "name", None)
    return name if isinstance(name, str) and name else type(extractor).__name__


@torch.no_grad()
def extract_features(
    images: Images,
    extractor: nn.Module,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    across_ranks: bool = False,
) -> Features:
    """Features of all images, batch by batch, in evaluation mode; extract once and hand them to every metric.

    Args:
        images: [N, …], or any iterable of batches [B, …].
        extractor: images [B, …] → [B, F]; of a `FeatureClassifier` its penultimate layer is taken.
        batch_size: images given to the extractor at once.
        device: where the batches go; where the extractor's parameters are by default.
        across_ranks: every process of torch.distributed gave its own part, at least one image, and receives the
            features of all parts, in the order of the ranks. All processes must call.

    Raises:
        RuntimeError: where another process that shares the work fails, with its number and message.
    """
    if not isinstance(extractor, nn.Module):
        raise TypeError(f"extract_features: extractor must be a torch.nn.Module, got {type(extractor).__name__}")
    if batch_size < 1:
        raise ValueError(f"extract_features: batch_size must be ≥ 1, got {batch_size}")
    if device is None:
        device = next((p.device for p in extractor.parameters()), None)
    compute = extractor.features if isinstance(extractor, FeatureClassifier) else extractor
    parts, group = [], _distributed.ranks(across_ranks)
    with group.failing_together("extract_features"), _evaluating(extractor):
        for batch in _batches(images, batch_size):
            values = compute(batch if device is None else batch.to(device))
            if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != len(batch):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"extract_features: extractor must return [B, F] with B = {len(batch)}, got {got}")
            parts.append(values if values.is_floating_point() else values.float())
        if not parts:
            raise ValueError("extract_features: images must hold at least one image, got none")
    values = torch.cat(parts)
    if group.size > 1:
        values = torch.cat(group.gather(values.cpu())).to(values.device)
    return Features(values, extractor_name(extractor))


def _batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    if not isinstance(images, Tensor) and not isinstance(images, Iterable):
        raise TypeError(
            f"extract_features: images must be a tensor or an iterable of tensors, got {type(images).__name__}"
        )
    for chunk in [images] if isinstance(images, Tensor) else images:
        if not isinstance(chunk, Tensor):
            raise TypeError(f"extract_features: images must give tensors [B, …], got {type(chunk).__name__}")
        if chunk.dim() < 2:
            raise ValueError(f"extract_features: images must be [N, …] or batches of it, got {tuple(chunk.shape)}")
        yield from (batch for batch in chunk.split(batch_size) if len(batch))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block, every part's own mode after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def torchmetrics_module(name: str) -> ModuleType:
    """`torchmetrics.<name>`, imported where a metric needs it."""
    try:
        return import_module(f"torchmetrics.{name}")
    except ImportError as error:
        raise ImportError("this metric needs torchmetrics: pip install 'ncpvae[metrics]'") from error


def _unit_images(owner: str, x: Tensor, channels: Sequence[int], maximum: int = 255) -> Tensor:
    """uint8 0 … maximum or floating point [0, 1] images, checked → floating point in [0, 1]."""
    if x.dim() != 4 or x.shape[1] not in channels:
        wanted = " or ".join(str(c) for c in channels)
        raise ValueError(f"{owner}: images must be [B, C, H, W] with C = {wanted}, got shape {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x.float() / maximum
    if not x.is_floating_point():
        raise TypeError(f"{owner}: images must be uint8 or floating point, got {x.dtype}")
    low, high = x.aminmax()
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"{owner}: floating-point images must lie in [0, 1], got {float(low):g} … {float(high):g}")
    return x.clamp(0, 1)


class FeatureClassifier(Pretrained):
    """A small convolutional classifier whose penultimate layer is a feature space for one kind of data.

    For each width: 3×3 convolution, BN, SiLU, 3×3 convolution with stride 2, BN, SiLU; then the mean over the
    picture, which is the features, and one linear layer of logits. All arguments are plain values, so that they
    can be saved as JSON and the classifier be built again.

    Args:
        in_shape: (C, H, W) of the images.
        num_classes: of the labels.
        channels: widths; the last one is F.
        maximum: what a white uint8 pixel holds. Floating-point images are in [0, 1] whatever it is.
        dataset: name of what it was trained on …
        test_accuracy: … and its share of right answers on held-out examples; see `trained`.

    Example:
        >>> classifier = FeatureClassifier((1, 28, 28), 10).trained("mnist", 0.991)
        >>> classifier.name
        'classifier trained on mnist, 99.1 % test accuracy'
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128),
        maximum: int = 255,
        dataset: str | None = None,
        test_accuracy: float | None = None,
    ):
        super().__init__()
        if len(in_shape) != 3 or min(in_shape) < 1:
            raise ValueError(f"FeatureClassifier: in_shape must be (C, H, W), each ≥ 1, got {tuple(in_shape)}")
        if num_classes < 2 or not channels or min(channels) < 1 or maximum < 1:
            raise ValueError(
                "FeatureClassifier: num_classes must be ≥ 2, channels not empty and ≥ 1, maximum ≥ 1, got "
                f"{num_classes}, {tuple(channels)}, {maximum}"
            )
        if test_accuracy is not None and not 0 <= test_accuracy <= 1:
            raise ValueError(f"FeatureClassifier: test_accuracy must be a share in [0, 1], got {test_accuracy}")
        self.in_shape, self.num_classes, self.channels = list(in_shape), num_classes, list(channels)
        self.maximum, self.dataset, self.test_accuracy = maximum, dataset, test_accuracy
        layers: list[nn.Module] = []
        for before, width in zip([in_shape[0], *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.logits = nn.Linear(channels[-1], num_classes)

    @property
    def num_features(self) -> int:
        """F."""
        return self.channels[-1]

    @property
    def name(self) -> str:
        """What figures computed with its features carry."""
        if self.dataset is None:
            return "classifier without a record of its training"
        measured = self.test_accuracy is not None
        accuracy = f"{100 * (self.test_accuracy or 0):.1f} % test accuracy" if measured else "accuracy not measured"
        return f"classifier trained on {self.dataset}, {accuracy}"

    def trained(self, dataset: str, test_accuracy: float | None) -> "FeatureClassifier":
        """A copy that records what it was trained on and how well: its weights are these, in evaluation mode."""
        arguments = (self.in_shape, self.num_classes, self.channels, self.maximum)
        copy = FeatureClassifier(*arguments, dataset=dataset, test_accuracy=test_accuracy)
        copy.load_state_dict(self.state_dict())
        return copy.to(self.logits.weight).eval()

    def features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], uint8 or floating point in [0, 1] → [B, F]."""
        if tuple(x.shape[1:]) != tuple(self.in_shape):
            raise ValueError(
                f"FeatureClassifier: images must be [B, {', '.join(map(str, self.in_shape))}], got {tuple(x.shape)}"
            )
        x = _unit_images("FeatureClassifier", x, self.in_shape[:1], self.maximum)
        return self.body(x.to(self.logits.weight.dtype)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.logits(self.features(x))


@torch.no_grad()
def classification_accuracy(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> float:
    """Share of images [N, …] whose largest logit is that of their label [N], in evaluation mode."""
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            "classification_accuracy: labels must be [N] for images [N, …] with N ≥ 1, got shapes "
            f"{tuple(labels.shape)} and {tuple(images.shape)}"
        )
    if device is None:
        device = next((p.device for p in classifier.parameters()), images.device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    with _evaluating(classifier):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            right += (classifier(x.to(device)).argmax(1) == y.to(device)).sum()
    return int(right) / len(images)


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of Inception-v3 that FID is defined by, with the reference's bilinear resize.

    Images [B, 1 or 3, H, W], uint8 or floating point in [0, 1], which is rounded to uint8; one channel is repeated.
    Weights are read from disk and never downloaded.

    Args:
        weights: the file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity; by default the one in the
            torch hub's cache.

    Raises:
        FileNotFoundError: where there is none, with what to do about it.
        ValueError: where the file is another one: with other weights the figure would be no FID.
        ImportError: without torchmetrics, or without torch-fidelity, which holds the network.

    Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs trained by a two time-scale update rule
    converge to a local Nash equilibrium", NeurIPS 2017; weights converted by Obukhov et al., torch-fidelity, 2020.
    """

    name: ClassVar[str] = "Inception-v3, torch-fidelity weights, 2048 features"
    num_features: ClassVar[int] = 2048

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        path = _inception_weights(weights)
        fid = torchmetrics_module("image.fid")
        try:
            import torch_fidelity  # noqa: F401
        except ImportError as error:
            raise ImportError("InceptionFeatures needs torch-fidelity: pip install torch-fidelity") from error
        self.network = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (_unit_images("InceptionFeatures", x, (1, 3)) * 255).round().to(torch.uint8)
        return self.network(x.expand(-1, 3, -1, -1))


def _inception_weights(weights: str | os.PathLike | None) -> Path:
    """The checked path of Inception's weights."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"InceptionFeatures: no weights at {str(path)!r}, and nothing is downloaded unasked. Fetch {INCEPTION_URL} "
            "(91 MB) and put it there, or give its path as weights=…; or use the features of a classifier trained "
            "with `ncpvae train-features`, in which case figures are not called FID"
        )
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    expected = Path(INCEPTION_FILE).stem.rsplit("-", 1)[1]
    if not digest.hexdigest().startswith(expected):
        raise ValueError(
            f"InceptionFeatures: {str(path)!r} must be torch-fidelity's {INCEPTION_FILE} (SHA-256 {expected}…), "
            f"got SHA-256 {digest.hexdigest()[:8]}…"
        )
    try:  # torch-fidelity unpickles without restrictions: only what the restricted unpickler reads may reach it
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"InceptionFeatures: {str(path)!r} must hold tensors alone, got a file that does not"
        ) from error
    return path
