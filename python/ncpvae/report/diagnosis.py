"""The page of `ncpvae diagnose`: a verdict, the figures behind it, and what each dimension of the code does."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import write_atomic
from . import charts, pictures
from .content import check_examples
from .page import filled

STRIP = 792  # CSS pixels for a row of pictures beside its name


@dataclass(frozen=True)
class Figure:
    """A row of the table, as it is printed; nats where there is an error.

    Args:
        name: what was measured.
        value: of it.
        error: one standard error; None for a count.
        remark: how to read the value.
        protocol: a sentence on how it was measured; may be empty.
    """

    name: str
    value: str
    error: str | None
    remark: str
    protocol: str


@dataclass(frozen=True)
class Bars:
    """What is shown for each dimension of z, every field [D], in the order of z.

    Args:
        kl: nats.
        variances: of the posterior means.
        rises: of −log p(x|z) where the dimension is another example's, nats.
        rise_errors: their standard errors.
        active: whether the variance is above the threshold.
        used: whether the rise stands out.
        threshold: of the variances.
    """

    kl: Sequence[float]
    variances: Sequence[float]
    rises: Sequence[float]
    rise_errors: Sequence[float]
    active: Sequence[bool]
    used: Sequence[bool]
    threshold: float

    def __post_init__(self) -> None:
        for name in ("kl", "variances", "rises", "rise_errors"):
            values = getattr(self, name)
            if len(values) != len(self.kl) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"Bars: {name} must be finite numbers [{len(self.kl)}], got {list(values)}")
        for name in ("active", "used"):
            if len(getattr(self, name)) != len(self.kl):
                raise ValueError(f"Bars: {name} must be [{len(self.kl)}] as kl, got {len(getattr(self, name))}")


@dataclass(frozen=True)
class Traversals:
    """Decoded codes of one example with one coordinate moved.

    Args:
        dimensions: which coordinates, one for each row.
        steps: [T], where the coordinate was, in standard deviations of q(z) from its mean.
        decoded: [rows, T, C, H, W] pictures in [0, 1], or points [rows, T, 2].
        original: the example, [C, H, W] or [2].
        around: points of other examples [N, 2]; None for pictures.
    """

    dimensions: Sequence[int]
    steps: Sequence[float]
    decoded: Tensor
    original: Tensor
    around: Tensor | None = None

    def __post_init__(self) -> None:
        if self.decoded.shape[:2] != (len(self.dimensions), len(self.steps)):
            raise ValueError(
                f"Traversals: decoded must be [{len(self.dimensions)}, {len(self.steps)}, …], "
                f"got shape {tuple(self.decoded.shape)}"
            )
        check_examples("Traversals", "decoded", self.decoded.flatten(0, 1))
        if (self.around is None) != (self.decoded.dim() == 5):
            raise ValueError("Traversals: around must be given for points, and for points alone")


@dataclass(frozen=True)
class DiagnosisData:
    """All that the page shows.

    Args:
        title: the page's.
        kind: "collapsed", "ignored", "partly collapsed" or "not collapsed".
        headline: the verdict in a sentence.
        findings: sentences with the figures it rests on.
        advice: sentences on what to do; may be empty.
        rules: sentences on how the verdict is reached.
        figures: rows of the table.
        bars: what is shown for each dimension.
        num_examples: behind the figures of the posteriors.
        num_decoded: behind those of the decoder.
        traversals: or a sentence on why there are none.
        notes: sentences below the table.
        environment: versions, device, seed, date, …
        commands: command lines that reproduce the page, in order.
    """

    title: str
    kind: str
    headline: str
    findings: Sequence[str]
    advice: Sequence[str]
    rules: Sequence[str]
    figures: Sequence[Figure]
    bars: Bars
    num_examples: int
    num_decoded: int
    traversals: Traversals | str
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


def write_diagnosis(data: DiagnosisData, path: Path) -> Path:
    """Write `data` as one HTML file that needs nothing else, and return its path. The same data gives the same bytes.

    Raises:
        ImportError: without matplotlib, Pillow or Jinja2.
        OSError: where the file cannot be written.
    """
    write_atomic(Path(path), render(data).encode("utf-8", "replace"))  # file names need not be text
    return Path(path)


def render(data: DiagnosisData) -> str:
    """The page's HTML."""
    shown = data.traversals
    return filled(
        "diagnosis.html",
        data=data,
        advice=[_with_flags(sentence) for sentence in data.advice],
        protocols=list(dict.fromkeys(figure.protocol for figure in data.figures if figure.protocol)),
        panels=_panels(data.bars),
        left_out=shown if isinstance(shown, str) else None,
        traversals=None if isinstance(shown, str) else _traversals(shown, data.bars),
    )


def _with_flags(sentence: str) -> str:
    """The sentence as HTML, with what is to be typed set as such, so that no line breaks within a flag."""
    return re.sub(r"(--[a-z][a-z.-]*[a-z]|ncpvae [a-z-]+ RUN)", r"<code>\1</code>", html.escape(sentence))


def _panels(bars: Bars) -> list[tuple[str, str]]:
    """(title, chart) of KL, variance and rise, the dimensions of all in one order: by KL, the largest first."""
    order = sorted(range(len(bars.kl)), key=lambda number: -bars.kl[number])
    names = [str(number) for number in order]

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[number] for number in order]

    active, used = of(bars.active), of(bars.used)
    kl = "KL of each dimension"
    variance = "Variance of each dimension's posterior mean over the examples"
    rise = "Rise of the reconstruction loss with each dimension exchanged"
    return [
        (kl, charts.bars(of(bars.kl), names, active, kl, "nats")),
        (
            variance,
            charts.bars(of(bars.variances), names, active, variance, "variance", threshold=bars.threshold, log=True),
        ),
        (rise, charts.bars(of(bars.rises), names, used, rise, "nats", errors=of(bars.rise_errors))),
    ]


def _traversals(shown: Traversals, bars: Bars) -> dict[str, Any]:
    names = [f"dimension {number}" for number in shown.dimensions]
    if shown.around is not None:
        lines = dict(zip(names, shown.decoded, strict=True))
        frame = charts.square(shown.around, *shown.decoded)
        label = "Decoded codes with one dimension moved"
        return {"chart": charts.paths(lines, shown.around, shown.original, frame, label)}
    strips = [pictures.strip(pictures.prepare(images), STRIP) for images in shown.decoded]
    width = strips[0].width
    kls = [f"{bars.kl[number]:.2f}" for number in shown.dimensions]
    return {
        "rows": [{"name": n, "kl": kl, "strip": strip} for n, kl, strip in zip(names, kls, strips, strict=True)],
        "width": width,
        "marks": [f"{step:+.3g}".replace("-", "−") if step else "0" for step in shown.steps],
        "original": pictures.strip(pictures.prepare(shown.original[None]), width // len(shown.steps)),
    }
