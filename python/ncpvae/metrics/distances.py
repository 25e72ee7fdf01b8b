"""Fréchet and kernel distance between real and generated examples in a feature space, by torchmetrics.

Both are called FID and KID only where the features are Inception's; every other figure carries its extractor's name.

Letters: N examples, F features.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _random
from .features import Features, Images, InceptionFeatures, extract_features, extractor_name, torchmetrics_module

ROWS_AT_ONCE = 1 << 12  # features made float64 at a time


@dataclass(frozen=True)
class Distance:
    """A distance between two sets of examples.

    Attributes:
        name: "FID" or "KID" for Inception's features, "Fréchet distance (…)" or "kernel distance (…)" with the
            extractor's name for all others. Figures of different extractors cannot be compared.
        value: ≥ 0 for Fréchet; an unbiased kernel distance may be negative.
        standard_error: of the value; NaN where it is not estimated.
        extractor: name of the feature space.
        num_real, num_generated: examples on either side.
        protocol: how it was computed.
    """

    name: str
    value: float
    standard_error: float
    extractor: str
    num_real: int
    num_generated: int
    protocol: str


class _Float64(nn.Module):
    """Extractor for torchmetrics of features already there: float64, measured from `origin`."""

    def __init__(self, num_features: int, origin: Tensor):
        super().__init__()
        self.num_features, self.origin = num_features, origin

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.origin.device).double() - self.origin


def frechet_distance(
    real: Images | Features,
    generated: Images | Features,
    extractor: nn.Module | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Distance:
    """‖m − m'‖² + tr(S + S' − 2 (S S')^½) of the two sets' means and covariances in the extractor's features.

    Sums and covariances are float64 and taken about the first real example, which the distance does not depend on.

    Args:
        real, generated: images [N, C, H, W], or iterables of batches of them, in the form the extractor takes; or
            `Features`, as `extract_features` returns them.
        extractor: `InceptionFeatures`, a trained `FeatureClassifier`, or any module images → [B, F]; not needed
            for `Features`.
        batch_size, device: of the extraction.

    Warns:
        UserWarning: with N ≤ F on either side: a covariance is singular and the value far too high. It is biased
            upwards at every N: compare only figures with the same N.

    Source: Dowson, Landau, "The Fréchet distance between multivariate normal distributions", 1982; Heusel et al.,
    "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017.
    """
    a, b = _both("frechet_distance", real, generated, extractor, batch_size, device)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet_distance: real and generated must hold ≥ 2 examples, got {len(a)} and {len(b)}")
    num_features = a.values.shape[1]
    if min(len(a), len(b)) <= num_features:
        warnings.warn(
            f"frechet_distance: {len(a)} real and {len(b)} generated examples give a singular covariance of "
            f"{num_features} features, and a value far too high: take more than {num_features} of each, "
            f"better {10 * num_features}",
            stacklevel=2,
        )
    origin = _with_float64(a.values[0]).double()
    metric = torchmetrics_module("image.fid").FrechetInceptionDistance(
        feature=_Float64(num_features, origin), sync_on_compute=False
    )
    metric = metric.to(origin.device)
    for features, is_real in ((a, True), (b, False)):
        for chunk in features.values.split(ROWS_AT_ONCE):
            metric.update(chunk, real=is_real)
    value = max(float(metric.compute()), 0.0)  # below it only by rounding
    return Distance(
        "FID" if a.extractor == InceptionFeatures.name else f"Fréchet distance ({a.extractor})",
        value,
        math.nan,
        a.extractor,
        len(a),
        len(b),
        f"Fréchet distance of Gaussians fitted to {num_features} features of {len(a)} real and {len(b)} generated "
        f"examples, float64; features: {a.extractor}",
    )


def kernel_distance(
    real: Images | Features,
    generated: Images | Features,
    extractor: nn.Module | None = None,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int | None = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Distance:
    """Unbiased squared MMD with the kernel (x·y / F + 1)³, the mean over random subsets.

    The standard error is the delete-d jackknife's over the subsets, s² m / (N − m) with m = subset_size and N the
    smaller side, plus s² / num_subsets for their number. The subsets' bare s / √num_subsets, often quoted, leaves
    out that they share examples. It is NaN for m = N or one subset, and too large where the distributions are equal.

    Args:
        real, generated, extractor, batch_size, device: as for `frechet_distance`.
        subset_size: m examples of either side in a subset, at most N.
        num_subsets: drawn one independently of the other, so that they share examples.
        seed: of the subsets; None draws from torch's global generator.

    Source: Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", ICLR 2018; Shao, Wu, "A general theory
    for jackknife variance estimation", 1989.
    """
    a, b = _both("kernel_distance", real, generated, extractor, batch_size, device)
    smaller = min(len(a), len(b))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"kernel_distance: subset_size must be 2 … {smaller}, the smaller set's examples, got {subset_size}"
        )
    if num_subsets < 1:
        raise ValueError(f"kernel_distance: num_subsets must be ≥ 1, got {num_subsets}")
    origin = _with_float64(torch.zeros_like(a.values[0])).double()  # the kernel depends on where zero is
    kid = torchmetrics_module("image.kid").KernelInceptionDistance
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        metric = kid(
            feature=_Float64(a.values.shape[1], origin),
            subsets=num_subsets,
            subset_size=subset_size,
            sync_on_compute=False,
        )
    metric = metric.to(origin.device)
    metric.update(a.values, real=True)
    metric.update(b.values, real=False)
    with _random.scoped(seed):
        mean, spread = metric.compute()
    return Distance(
        "KID" if a.extractor == InceptionFeatures.name else f"kernel distance ({a.extractor})",
        float(mean),
        _jackknife_error(float(spread), subset_size, num_subsets, smaller),
        a.extractor,
        len(a),
        len(b),
        f"unbiased squared MMD, cubic kernel, mean of {num_subsets} subsets of {subset_size} (seed {seed}) out of "
        f"{len(a)} real and {len(b)} generated examples, float64; features: {a.extractor}",
    )


def _jackknife_error(spread: float, subset_size: int, num_subsets: int, num_examples: int) -> float:
    """Standard error of the mean over subsets, from their standard deviation with divisor num_subsets."""
    if num_subsets < 2 or subset_size == num_examples:
        return math.nan
    variance = spread**2 * num_subsets / (num_subsets - 1)
    return math.sqrt(variance * (subset_size / (num_examples - subset_size) + 1 / num_subsets))


def _with_float64(x: Tensor) -> Tensor:
    """Where float64 can be computed with: MPS has none."""
    return x.cpu() if x.device.type == "mps" else x


def _both(
    owner: str,
    real: Images | Features,
    generated: Images | Features,
    extractor: nn.Module | None,
    batch_size: int,
    device: torch.device | str | None,
) -> tuple[Features, Features]:
    """Features of both sides, of one extractor and width."""

    def features(name: str, side: Images | Features) -> Features:
        if isinstance(side, Features):
            if extractor is not None and extractor_name(extractor) != side.extractor:
                raise ValueError(
                    f"{owner}: {name} holds features of {side.extractor!r}, which extractor must be or be left out, "
                    f"got {extractor_name(extractor)!r}"
                )
            return side
        if extractor is None:
            raise TypeError(
                f"{owner}: {name} must be Features, or extractor given, got {type(side).__name__} without an extractor"
            )
        return extract_features(side, extractor, batch_size, device)

    a, b = features("real", real), features("generated", generated)
    if a.extractor != b.extractor or a.values.shape[1] != b.values.shape[1]:
        raise ValueError(
            f"{owner}: real and generated must be features of one extractor, got {a.extractor!r} with "
            f"F = {a.values.shape[1]} and {b.extractor!r} with F = {b.values.shape[1]}"
        )
    return a, b
