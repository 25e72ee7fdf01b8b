"""Rows of figures that runs of all kinds have."""

import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random, metrics
from ..metrics import FeatureClassifier, InceptionFeatures, Likelihood
from ..metrics.memorization import MIN_IN_CELL
from ..report import Metric
from .folder import Run

MI, CAP, AU = "mutual information I(x; z)", "its cap, log N", "active units"
KL, MARGINAL_KL = "KL(q(z|x) ‖ p(z))", "KL(q(z) ‖ p(z))"
NLL, JSD = "test NLL, SNIS bound", "JSD(q(z) ‖ base)"  # the headlines
NEIGHBOURS = 5  # k of density and coverage
AT_ONCE = 1 << 12  # training examples turned into floating point, four times their size, at once


def compared_likelihoods(nll: dict[str, Likelihood], unit: str, protocol: str, ways: dict[str, str]) -> list[Metric]:
    """Likelihoods of the base and of the noise contrastive prior by the ways there are, and the gain by one of them.

    Args:
        nll: "base", and "log_z" and "snis" where there is a noise contrastive prior, of the same draws.
        unit: of a likelihood.
        protocol: of all.
        ways: what is to be said of "log_z" and "snis".
    """
    base: dict[str, Any] = {"base": nll["base"].nll, "base_error": finite(nll["base"].standard_error)}
    if "snis" not in nll:
        return [Metric("test NLL", unit, ncp=None, lower_is_better=True, protocol=protocol, **base)]
    gains = {key: nll["base"].per_example - nll[key].per_example for key in ways}
    spreads = {key: float(g.std()) / math.sqrt(len(g)) if len(g) > 1 else None for key, g in gains.items()}
    rows = [
        Metric(
            NLL if key == "snis" else "test NLL, log Ẑ",
            unit,
            ncp=nll[key].nll,
            lower_is_better=True,
            ncp_error=finite(nll[key].standard_error),
            protocol=f"{protocol}; NCP {how}; compared example by example",
            difference_error=spreads[key],
            **base,
        )
        for key, how in ways.items()
    ]
    gain, spread = float(gains["snis"].mean()), spreads["snis"]
    name, how = "gain per example, SNIS bound", "base NLL − NCP NLL, paired by example"
    rows.append(Metric(name, unit, base=None, ncp=gain, lower_is_better=None, ncp_error=spread, protocol=how))
    return rows


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def fidelity(
    run: Run, means: bool, base: Tensor, ncp: Tensor | None, extractor: torch.nn.Module | None, seed: int
) -> list[Metric]:
    """Distances between samples and test examples, density and coverage, and the memorisation check.

    Args:
        means: whether samples are the decoder's means, as against draws from it.
        base, ncp: samples of both priors.
        extractor: of the features that images are compared by, see `feature_extractor`; None for pixels.
    """
    dataset, e = run.dataset, run.recipe.evaluation
    sides = {"base": base, "ncp": ncp}
    test, train = dataset.splits.test, dataset.splits.train
    if not means:
        with _random.scoped(seed):  # draws of binary pixels are compared with data binarised alike
            test, train = (run.recipe.pictures(run.recipe.evaluation_transform(part)) for part in (test, train))

    def space(x: Tensor, stored: bool = False) -> Any:
        parts = (run.recipe.comparable(run.recipe.originals(part) if stored else part) for part in x.split(AT_ONCE))
        if extractor is None:
            return torch.cat(list(parts))
        return metrics.extract_features(parts, extractor, device=run.device)

    where = run.recipe.comparable_in if extractor is None else str(extractor.name)
    if len(run.recipe.shape) == 3:
        where += ", samples being " + (
            "the decoder's means, which are smoother than data" if means else "draws, as data"
        )
    where += f"; seed {seed}"
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[: e.samples]
    real, known = (space(part, stored=means) for part in (test, train))
    part = real[some] if isinstance(real, Tensor) else replace(real, values=real.values[some])
    found = {side: space(x) for side, x in sides.items() if x is not None}
    rows: list[Metric] = []
    if extractor is not None and min(len(test), e.samples) < 4:
        warnings.warn(f"distances need 4 images, there are {min(len(test), e.samples)}", stacklevel=2)
    elif extractor is not None:
        subset = min(1000, len(test) // 2, e.samples // 2)
        for distance in (metrics.frechet_distance, partial(metrics.kernel_distance, subset_size=subset)):
            both = {side: distance(real, x) for side, x in found.items()}
            how = f"{both['base'].protocol}; {where}"
            rows.append(row(both["base"].name, "", both, "value", True, how, "standard_error"))
    few = min(len(some), len(base))
    if few <= NEIGHBOURS:
        warnings.warn(f"density, coverage and C_T need more than {NEIGHBOURS} examples, there are {few}", stacklevel=2)
        return rows
    cover = {side: metrics.density_coverage(part, x, NEIGHBOURS, device=run.device) for side, x in found.items()}
    for name in ("density", "coverage"):
        rows.append(row(name, "", cover, name, False, f"{cover['base'].protocol}; {where}"))
    if few < MIN_IN_CELL:
        warnings.warn(f"memorisation C_T needs {MIN_IN_CELL} examples, there are {few}", stacklevel=2)
        return rows
    copies = {side: metrics.memorization(x, known, part, device=run.device) for side, x in found.items()}
    meaning = "; ".join(f"{'NCP' if side == 'ncp' else side}: {m.meaning}" for side, m in copies.items())
    rows.append(
        row("memorisation C_T", "", copies, "statistic", None, f"{copies['base'].protocol}; {where}; {meaning}")
    )
    return rows


def row(
    name: str, unit: str, both: dict[str, Any], field: str, lower: bool | None, protocol: str, error: str | None = None
) -> Metric:
    values = {side: float(getattr(m, field)) for side, m in both.items()}
    errors = {side: float(getattr(m, error)) for side, m in both.items()} if error else {}
    errors = {side: value for side, value in errors.items() if math.isfinite(value)}
    return Metric(name, unit, values["base"], values.get("ncp"), lower, errors.get("base"), errors.get("ncp"), protocol)


def check_test_examples(run: Run, owner: str) -> None:
    """ValueError where there is but one test example, of which nothing can be said."""
    if len(run.dataset.splits.test) < 2:
        raise ValueError(f"{owner}: the test split of {run.recipe.data!r} must hold 2 examples or more, got 1")


def feature_extractor(features: str | None, run: Run) -> torch.nn.Module | None:
    """What gives the features that images are compared by, tried on an example; None for pixels.

    Args:
        features: see `evaluation.evaluate`.
        run: whose images.
    """
    if features is None:
        return None
    if len(run.recipe.shape) != 3:
        raise ValueError(
            f"evaluate: features must be None for {run.name}, whose examples are no images, got {features!r}"
        )
    kind, _, file = features.partition(":")
    if kind == "inception":
        extractor: torch.nn.Module = InceptionFeatures(file or None).to(run.device)
    else:
        extractor = FeatureClassifier.from_pretrained(Path(features)).to(run.device)
    metrics.extract_features([run.recipe.originals(run.dataset.splits.test[:2])], extractor, device=run.device)
    return extractor
