"""Rows of figures that runs of all kinds have."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random, metrics
from ..metrics import FeatureClassifier, InceptionFeatures, Likelihood
from ..report import Metric
from .folder import Run

MI, CAP, AU = "mutual information I(x; z)", "its cap, log N", "active units"
KL, MARGINAL_KL = "KL(q(z|x) ‖ p(z))", "KL(q(z) ‖ p(z))"
NLL, JSD = "test NLL, SNIS bound", "JSD(q(z) ‖ base)"  # the headlines
AT_ONCE = 1 << 12  # training examples turned into floating point, four times their size, at once


def compared_likelihoods(nll: dict[str, Likelihood], unit: str, protocol: str, ways: dict[str, str]) -> list[Metric]:
    """Likelihoods of the base and of the noise contrastive prior by the ways there are, and the gain by one of them.

    Args:
        nll: "base", and "log_z" and "snis" where there is a noise contrastive prior, of the same draws.
        unit: of a likelihood.
        protocol: of all.
        ways: what is to be said of "log_z" and "snis".
    """
    base: dict[str, Any] = {"base": nll["base"].nll, "base_error": nll["base"].standard_error}
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
            ncp_error=nll[key].standard_error,
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


def fidelity(run: Run, means: bool, base: Tensor, ncp: Tensor | None, features: str | None, seed: int) -> list[Metric]:
    """Distances between samples and test examples, density and coverage, and the memorisation check.

    Args:
        means: whether samples are the decoder's means, as against draws from it.
        base, ncp: samples of both priors.
        features: see `evaluation.evaluate`.
    """
    dataset, e = run.dataset, run.recipe.evaluation
    scale = dataset.levels or 1
    sides = {"base": base, "ncp": ncp}
    test, train = dataset.splits.test, dataset.splits.train
    if not means:
        with _random.scoped(seed):  # draws of binary pixels are compared with data binarised alike
            test, train = (run.recipe.pictures(run.recipe.evaluation_transform(part)) for part in (test, train))
    extractor = None if len(run.recipe.shape) != 3 else _extractor(features, run)

    def space(x: Tensor, maximum: int = 1) -> Any:
        if extractor is None:
            return run.recipe.comparable(x.float() / maximum)
        parts = (run.recipe.comparable(part.float() / maximum) for part in x.split(AT_ONCE))
        return metrics.extract_features(parts, extractor, device=run.device)

    where = run.recipe.comparable_in if extractor is None else str(extractor.name)
    if len(run.recipe.shape) == 3:
        where += ", samples being " + (
            "the decoder's means, which are smoother than data" if means else "draws, as data"
        )
    where += f"; seed {seed}"
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[: e.samples]
    real, known = (space(part, scale if means else 1) for part in (test, train))
    part = real[some] if isinstance(real, Tensor) else replace(real, values=real.values[some])
    found = {side: space(x) for side, x in sides.items() if x is not None}
    rows: list[Metric] = []
    if extractor is not None:
        subset = min(1000, len(test) // 2, e.samples // 2)
        for distance in (metrics.frechet_distance, partial(metrics.kernel_distance, subset_size=subset)):
            both = {side: distance(real, x) for side, x in found.items()}
            how = f"{both['base'].protocol}; {where}"
            rows.append(row(both["base"].name, "", both, "value", True, how, "standard_error"))
    cover = {side: metrics.density_coverage(part, x, device=run.device) for side, x in found.items()}
    for name in ("density", "coverage"):
        rows.append(row(name, "", cover, name, False, f"{cover['base'].protocol}; {where}"))
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


def _extractor(features: str | None, run: Run) -> torch.nn.Module | None:
    if features is None:
        return None
    kind, _, file = features.partition(":")
    if kind == "inception":
        return InceptionFeatures(file or None).to(run.device)
    return FeatureClassifier.from_pretrained(Path(features)).to(run.device)
