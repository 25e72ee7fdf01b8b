"""What a report's page can hold, checked as it is put together. Every field but the title may be left empty."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

LOWEST, HIGHEST = -0.5, 1.5  # images are in [0, 1]; a decoder's mean may stray a little, other scales lie outside


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    Args:
        name: what was measured, "negative log-likelihood" for example.
        unit: "nats", "bits per dimension", …; may be empty.
        base: its value with the base prior p(z); None where it has none, NaN or ±inf are shown as not finite.
        ncp: its value with p_NCP(z).
        lower_is_better: None for what is only described, not compared.
        base_error: standard error of `base`, ≥ 0, in the same unit.
        ncp_error: standard error of `ncp`.
        protocol: a sentence on how it was measured, shown as a footnote.
        difference_error: standard error of ncp − base where they were measured on the same examples; by default the
            two errors count as independent.
    """

    name: str
    unit: str
    base: float | None
    ncp: float | None
    lower_is_better: bool | None
    base_error: float | None = None
    ncp_error: float | None = None
    protocol: str = ""
    difference_error: float | None = None

    def __post_init__(self) -> None:
        owner = f"Metric {self.name!r}"
        for name in ("base", "ncp", "base_error", "ncp_error", "difference_error"):
            _check_number(owner, name, getattr(self, name), 0.0 if name.endswith("error") else -math.inf)

    @property
    def comparable(self) -> bool:
        """Whether both values are there and finite."""
        return all(value is not None and math.isfinite(value) for value in (self.base, self.ncp))

    @property
    def better(self) -> str | None:
        """ "base" or "ncp"; None where that is not asked, within one combined standard error, or no error is known."""
        errors = (self.base_error, self.ncp_error, self.difference_error)
        if self.lower_is_better is None or not self.comparable or all(error is None for error in errors):
            return None
        assert self.base is not None and self.ncp is not None
        difference = self.ncp - self.base
        error = self.difference_error
        error = math.hypot(self.base_error or 0.0, self.ncp_error or 0.0) if error is None else error
        if difference == 0 or not abs(difference) > error:  # also where the error is not a number
            return None
        return "ncp" if (difference < 0) == self.lower_is_better else "base"


@dataclass(frozen=True)
class Samples:
    """Samples at one temperature: floating-point images [N, C, H, W] in [0, 1] with C = 1 or 3, or points [N, 2].

    The first of them are shown, as many as there is room for.

    Args:
        temperature: by which the standard deviation of the base prior was scaled.
        base: decoded from draws of p(z).
        ncp: decoded from draws of p_NCP(z).
    """

    temperature: float
    base: Tensor
    ncp: Tensor

    def __post_init__(self) -> None:
        owner = f"Samples at temperature {self.temperature}"
        for name in ("base", "ncp"):
            check_examples(owner, name, getattr(self, name))
        if self.base.shape[1:] != self.ncp.shape[1:]:
            raise ValueError(
                f"{owner}: base and ncp must be of one kind, got shapes {tuple(self.base.shape)} "
                f"and {tuple(self.ncp.shape)}"
            )


@dataclass(frozen=True)
class GroupFigures:
    """One of the K groups of a hierarchical VAE's latent variables. What is None was not measured.

    Numbers may be NaN or ±inf, and are shown as not finite then.

    Args:
        number: 1 … K, from the top.
        scale: the number of its resolution, 1 at the top.
        shape: of z_k for one example, [C, H, W] or [D].
        kl: KL(q(z_k | z_<k, x) ‖ p(z_k | z_<k)), nats, mean over examples.
        loss: held-out noise contrastive loss of its classifier, ≥ 0 nats; 2·log 2 = 1.386 where base and posterior
            agree (NCP-VAE, Eq. 4).
        jsd: Jensen-Shannon divergence of posterior and base, ≤ log 2 = 0.693 nats; as log 2 − ½·loss it is an
            estimate, and may be below 0.
        accuracy: of the classifier, held out, 0 … 1.
        ess: effective sample size of SIR's proposals, ≥ 0, mean over paths from the top; None where SIR has not been
            asked for this group, as it is not for flat ones.
        log_mean: log E_p[r_k | c_k], nats, mean over paths.
        log_mean_std: its standard deviation over paths.
        flat: whether r_k is taken as constant and the classifier skipped.
    """

    number: int
    scale: int
    shape: Sequence[int]
    kl: float | None = None
    loss: float | None = None
    jsd: float | None = None
    accuracy: float | None = None
    ess: float | None = None
    log_mean: float | None = None
    log_mean_std: float | None = None
    flat: bool = False

    def __post_init__(self) -> None:
        for name in ("number", "scale"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"GroupFigures: {name} must be an integer ≥ 1, got {getattr(self, name)!r}")
        owner = f"GroupFigures of group {self.number}"
        shape = self.shape
        if not isinstance(shape, (tuple, list)) or len(shape) not in (1, 3) or not all(map(_is_count, shape)):
            raise ValueError(f"{owner}: shape must be [C, H, W] or [D], integers ≥ 1, got {shape}")
        for name in ("kl", "log_mean"):
            _check_number(owner, name, getattr(self, name))
        for name in ("loss", "ess", "log_mean_std"):
            _check_number(owner, name, getattr(self, name), 0.0)
        _check_number(owner, "accuracy", self.accuracy, 0.0, 1.0)
        _check_number(owner, "jsd", self.jsd, high=math.log(2) + 1e-6)  # of float32, it may be rounded up
        if self.flat and self.ess is not None:
            raise ValueError(f"{owner}: ess must be None for a flat group, which takes no proposals, got {self.ess}")
        if self.log_mean is None and self.log_mean_std is not None:
            raise ValueError(f"{owner}: log_mean must be given where log_mean_std is, got None")


@dataclass(frozen=True)
class ReportData:
    """All that a page shows. What is None or empty is left out, and named as left out at the page's end.

    Args:
        title: the page's.
        summary: one paragraph below it.
        commands: command lines that reproduce the run, in order.
        settings: fields of the recipe, nested in mappings or dataclasses as deep as you like.
        environment: versions, device, seed, date, …
        curves: title of a chart → name of a series → (step, value) pairs. A title may end in a unit: "loss, nats".
        samples: one entry per temperature.
        reconstructions: originals and their reconstructions, both [N, C, H, W] in [0, 1] or both [N, 2].
        neighbours: samples of the NCP, for each the nearest training example (same shape), and the Euclidean
            distances [N] between them.
        log_weights: [M], log r(z) at draws of the base prior, nats.
        ess: [n], effective sample size of the base draws behind each sample.
        num_proposals: the number of base draws behind each sample, of every group where there are groups.
        latents: "q(z)", and any of "p(z)" and "p_NCP(z)" → draws [N, D], of which the first
            5,000 are used.
        groups: of a hierarchical VAE, by their numbers; a part of them will do.
        metrics: rows of the table.
        notes: sentences on protocols, below the table.
    """

    title: str
    summary: str = ""
    commands: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, list[tuple[float, float]]]] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    reconstructions: tuple[Tensor, Tensor] | None = None
    neighbours: tuple[Tensor, Tensor, Tensor] | None = None
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    num_proposals: int | None = None
    latents: Mapping[str, Tensor] | None = None
    groups: list[GroupFigures] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("commands", "samples", "groups", "metrics", "notes"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"ReportData: {name} must be a list, got a string")
        if self.num_proposals is not None and self.num_proposals < 1:
            raise ValueError(f"ReportData: num_proposals must be ≥ 1, got {self.num_proposals}")
        shapes = {tuple(entry.base.shape[1:]) for entry in self.samples}
        if len(shapes) > 1:
            raise ValueError(
                f"ReportData: samples must be of one kind at all temperatures, got shapes {sorted(shapes)}"
            )
        for name in ("log_weights", "ess"):
            if getattr(self, name) is not None:
                _check_vector(name, getattr(self, name))
        if self.reconstructions is not None:
            _check_length("reconstructions", self.reconstructions, 2)
            _check_pair("reconstructions", *self.reconstructions)
        if self.neighbours is not None:
            _check_length("neighbours", self.neighbours, 3)
            queries, examples, distances = self.neighbours
            _check_pair("neighbours", queries, examples)
            _check_vector("neighbours' distances", distances, len(queries))
        if self.latents:
            _check_latents(self.latents)
        _check_groups(self.groups, self.num_proposals)
        for chart, series in self.curves.items():
            for name, points in series.items():
                if any(len(point) != 2 for point in points):
                    raise ValueError(f"ReportData: curves[{chart!r}][{name!r}] must be (step, value) pairs")


def check_examples(owner: str, name: str, examples: object) -> None:
    """Images [N, C, H, W] in [0, 1] or points [N, 2], N ≥ 1; TypeError or ValueError for anything else."""
    if not isinstance(examples, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(examples).__name__}")
    shape = tuple(examples.shape)
    is_image = len(shape) == 4 and shape[1] in (1, 3)
    if not (is_image or (len(shape) == 2 and shape[1] == 2)) or 0 in shape:
        raise ValueError(f"{owner}: {name} must be images [N, 1 or 3, H, W] or points [N, 2], N ≥ 1, got shape {shape}")
    if not examples.is_floating_point():
        raise TypeError(f"{owner}: {name} must be floating point, got {examples.dtype}")
    known = examples[torch.isfinite(examples)]
    if is_image and len(known) and not (known.min() >= LOWEST and known.max() <= HIGHEST):
        raise ValueError(
            f"{owner}: images in {name} must be in [0, 1], got values from {known.min():.3g} to {known.max():.3g}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_number(owner: str, name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """None, or a number that is not out of bounds; NaN is not."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number or None, got {type(value).__name__}")
    if value < low or value > high:
        bounds = [f"≥ {low:g}"] * (low > -math.inf) + [f"≤ {high:.3g}"] * (high < math.inf)
        raise ValueError(f"{owner}: {name} must be {' and '.join(bounds)}, got {value}")


def _check_length(name: str, parts: Sequence, length: int) -> None:
    if not isinstance(parts, (tuple, list)) or len(parts) != length:
        got = len(parts) if isinstance(parts, (tuple, list)) else type(parts).__name__
        raise ValueError(f"ReportData: {name} must be a tuple of {length} tensors, got {got}")


def _check_pair(name: str, first: Tensor, second: Tensor) -> None:
    check_examples("ReportData", name, first)
    check_examples("ReportData", name, second)
    if first.shape != second.shape:
        raise ValueError(f"ReportData: {name} must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")


def _check_vector(name: str, values: object, length: int | None = None) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"ReportData: {name} must be a tensor, got {type(values).__name__}")
    if values.dim() != 1 or length not in (None, len(values)):
        expected = "[N]" if length is None else f"[{length}]"
        raise ValueError(f"ReportData: {name} must be {expected}, got shape {tuple(values.shape)}")


def _check_latents(latents: Mapping[str, Tensor]) -> None:
    if "q(z)" not in latents:
        raise ValueError(f"ReportData: latents must hold 'q(z)', whose axes are shown, got {sorted(latents)}")
    for name, codes in latents.items():
        if not isinstance(codes, Tensor):
            raise TypeError(f"ReportData: latents[{name!r}] must be a tensor, got {type(codes).__name__}")
        expected = latents["q(z)"].shape[1:]
        if codes.dim() != 2 or 0 in codes.shape or codes.shape[1:] != expected:
            wanted = f"[N, {expected[0]}] like 'q(z)'" if len(expected) == 1 else "[N, D]"
            raise ValueError(f"ReportData: latents[{name!r}] must be {wanted}, N ≥ 1, got {tuple(codes.shape)}")
    if len(latents["q(z)"]) < 2:
        raise ValueError("ReportData: latents['q(z)'] must hold two codes or more to have principal components")


def _check_groups(groups: Sequence[GroupFigures], num_proposals: int | None) -> None:
    for entry in groups:
        if not isinstance(entry, GroupFigures):
            raise TypeError(f"ReportData: groups must be a list of GroupFigures, got {type(entry).__name__} in it")
        if num_proposals is not None and entry.ess is not None and entry.ess > num_proposals * (1 + 1e-5):  # rounding
            raise ValueError(
                f"ReportData: groups: ess of group {entry.number} must be ≤ num_proposals, {num_proposals}, "
                f"got {entry.ess}"
            )
    numbers = [entry.number for entry in groups]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"ReportData: groups must be in the order of their numbers, each once, got {numbers}")


def flatten(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings and dataclasses as (dotted name, value) pairs."""
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = {item.name: getattr(settings, item.name) for item in fields(settings)}
    if isinstance(settings, Mapping) and (settings or not prefix):
        for name, value in settings.items():
            yield from flatten(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, str(settings)
