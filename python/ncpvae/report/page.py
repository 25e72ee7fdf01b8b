"""The page itself: what each section says about its data, put into page.html."""

import math
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random
from .._files import write_atomic
from . import charts, groups, pictures
from .content import Metric, ReportData, flatten
from .numbers import brief, number

FULL, HALF, PAIR, GAP = 952, 468, 104, 12  # CSS pixels for a picture across the page, one of two, one in a row
PAIR_ROWS = 2  # of samples over their neighbours
MAX_DOTS = 5000  # in one scatter plot, and codes of one distribution


def write_report(data: ReportData, path: Path) -> Path:
    """Write `data` as one HTML file that needs nothing else, and return its path. The same data gives the same bytes.

    Raises:
        ImportError: without matplotlib.
        OSError: where the file cannot be written.
    """
    write_atomic(Path(path), render(data).encode("utf-8", "replace"))  # file names need not be text
    return Path(path)


def render(data: ReportData) -> str:
    """The page's HTML."""
    sections = {
        "metrics": _metrics(data.metrics),
        "samples": _samples(data),
        "neighbours": _neighbours(data),
        "reconstructions": _reconstructions(data),
        "latents": _latents(data.latents),
        "weights": _weights(data.log_weights),
        "ess": _ess(data.ess, data.num_proposals),
        "groups": groups.section(data.groups, data.num_proposals),
        "curves": _curves(data),
        "settings": list(flatten(data.settings)) if data.settings else None,
        "environment": dict(data.environment) or None,
        "commands": data.commands or None,
    }
    return filled(
        "page.html",
        title=data.title,
        summary=data.summary,
        notes=data.notes,
        headline=[_row(m) for m in data.metrics if m.comparable and m.lower_is_better is not None][:3],
        **sections,
    )


def filled(template: str, **content: Any) -> str:
    """A template of this folder with its content, the style sheet and counters of figures and tables."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs Jinja2: pip install 'ncpvae[plot]'") from error
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.get_template(template).render(
        style=(folder / "page.css").read_text(encoding="utf-8"),
        next_figure=count(1).__next__,
        next_table=count(1).__next__,
        **content,
    )


# Metrics


def _metrics(metrics: Sequence[Metric]) -> dict[str, Any] | None:
    """Rows, and the footnotes that they refer to by letter."""
    if not metrics:
        return None
    protocols = list(dict.fromkeys(metric.protocol for metric in metrics if metric.protocol))
    rows = [
        _row(metric) | {"note": protocols.index(metric.protocol) if metric.protocol else None} for metric in metrics
    ]
    errors = any(error is not None for metric in metrics for error in (metric.base_error, metric.ncp_error))
    return {"rows": rows, "protocols": protocols, "errors": errors}


def _row(metric: Metric) -> dict[str, Any]:
    values = (metric.base, metric.ncp)
    errors = (metric.base_error, metric.ncp_error)
    decimals = _decimals([v for v in values if v is not None], [e for e in errors if e is not None])
    change = None
    if metric.comparable:
        assert metric.base is not None and metric.ncp is not None
        change = number(metric.ncp - metric.base, decimals)
        if not change.startswith("−") and metric.ncp != metric.base:
            change = f"+{change}"
    return {
        "name": metric.name,
        "unit": metric.unit,
        "lower_is_better": metric.lower_is_better,
        "better": metric.better,
        "change": change,
        **{key: None if v is None else number(v, decimals) for key, v in zip(("base", "ncp"), values, strict=True)},
        **{
            f"{key}_error": None if e is None or v is None else number(e, decimals)
            for key, v, e in zip(("base", "ncp"), values, errors, strict=True)
        },
    }


def _decimals(values: Sequence[float], errors: Sequence[float]) -> int | None:
    """Digits after the point: two significant ones of the smallest error, else about three of the smallest value.

    None for values that are too small or too large for that, to be written like 1.20 × 10⁻⁵.
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    known = [error for error in errors if math.isfinite(error) and error > 0]
    if not sizes:
        return 0
    if max(sizes) < 1e-3 or max(sizes) >= 1e9:
        return None
    if known:
        return min(6, max(0, 1 - math.floor(math.log10(min(known)))))
    size = min(sizes)
    return 1 if size >= 100 else 2 if size >= 1 else min(6, 2 - math.floor(math.log10(size)))


def _hundredths(value: float | Tensor) -> str:
    return number(round(float(value), 2) + 0.0, 2)  # adding 0 makes −0 plain


# Samples, neighbours, reconstructions


def _samples(data: ReportData) -> dict[str, Any] | None:
    if not data.samples:
        return None
    if data.samples[0].base.dim() == 2:
        frame = charts.square(*(_points(part) for entry in data.samples for part in (entry.base, entry.ncp)))
        rows = [
            {
                "temperature": entry.temperature,
                **{
                    key: charts.scatter(
                        _points(getattr(entry, key)),
                        frame,
                        colour,
                        f"{name} samples at temperature {entry.temperature}",
                    )
                    for key, name, colour in (("base", "Base", charts.ORANGE), ("ncp", "NCP", charts.BLUE))
                },
            }
            for entry in data.samples
        ]
        return {"rows": rows, "points": True, "bad": 0, "small": False}
    rows, bad, small = [], 0, False
    for entry in data.samples:
        base, ncp = pictures.prepare(entry.base), pictures.prepare(entry.ncp)
        limit = min(pictures.affordable(images, 2 * len(data.samples) + 3) for images in (base, ncp))
        grids = {key: pictures.grid(images, HALF, limit) for key, images in (("base", base), ("ncp", ncp))}
        rows.append({"temperature": entry.temperature, **grids})
        bad += _not_finite(entry.base[:limit]) + _not_finite(entry.ncp[:limit])
        small = small or base.shape[2:] != entry.base.shape[2:]
    return {"rows": rows, "points": False, "bad": bad, "small": small}


def _neighbours(data: ReportData) -> dict[str, Any] | None:
    if data.neighbours is None:
        return None
    queries, examples, distances = data.neighbours
    distances = distances.detach().double().cpu()
    order = torch.argsort(distances, stable=True)  # not finite ones last
    finite = distances[torch.isfinite(distances)]
    found: dict[str, Any] = {"count": len(distances), "points": queries.dim() == 2, "some": len(finite) > 0}
    if len(finite):
        found |= {"smallest": brief(float(finite.min())), "median": brief(float(finite.median()))}
        found["histogram"] = charts.distances(finite) if len(finite) >= 16 else None
    if queries.dim() == 2:
        first, second = _points(queries)[:500], _points(examples)[:500]
        found["chart"] = charts.arrows(first, second, charts.square(first, second), "Samples and their neighbours")
        return found | {"shown": len(first)}
    width = pictures.displayed_width(pictures.prepare(queries[:1]).shape[3], PAIR)
    order = order[: PAIR_ROWS * ((FULL + GAP) // (width + GAP))]
    above, below = (pictures.prepare(examples[order.to(examples.device)]) for examples in (queries, examples))
    pairs = [
        (pictures.pair(query, example, PAIR), brief(distance))
        for query, example, distance in zip(above, below, distances[order].tolist(), strict=True)
    ]
    return found | {"pairs": pairs, "shown": len(pairs), "width": width}


def _reconstructions(data: ReportData) -> dict[str, Any] | None:
    if data.reconstructions is None:
        return None
    originals, copies = data.reconstructions
    if originals.dim() == 2:
        first, second = _points(copies)[:500], _points(originals)[:500]
        chart = charts.arrows(first, second, charts.square(first, second), "Examples and their reconstructions")
        return {"chart": chart, "shown": len(first)}
    originals, copies = pictures.prepare(originals), pictures.prepare(copies)
    limit = min(48, pictures.affordable(originals, 2 * len(data.samples) + 3))
    return {"picture": pictures.pairs(originals, copies, FULL, limit)}


def _points(points: Tensor) -> Tensor:
    return points[:MAX_DOTS].detach().double().cpu()


def _not_finite(images: Tensor) -> int:
    return int((~torch.isfinite(images)).flatten(1).any(1).sum())


# Latents and weights


def _latents(latents: Any) -> dict[str, Any] | None:
    """Each distribution's draws along the first two principal components of q's codes, and its spread along them."""
    if not latents:
        return None
    codes = {name: _finite_rows(draws[:MAX_DOTS].detach().double().cpu()) for name, draws in latents.items()}
    used = codes["q(z)"]
    if len(used) < 2:
        return None
    mean = used.mean(0)
    dimensions = used.shape[1]
    with _random.scoped(0):
        _, _, components = torch.pca_lowrank(used, q=min(6, *used.shape), niter=8)
    components = components[:, :2] if components.shape[1] >= 2 else torch.nn.functional.pad(components, (0, 1))
    largest = components.abs().argmax(0)
    components = components * torch.where(components.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    flat = {name: ((draws - mean) @ components) for name, draws in codes.items()}
    frame = charts.square(*flat.values())
    panels = [
        (name, charts.latents(draws, flat["q(z)"] if name != "q(z)" else None, frame, name))
        for name, draws in flat.items()
        if len(draws)
    ]
    variance = used.var(0).sum()
    held = float(flat["q(z)"].var(0).sum() / variance) if variance > 0 else math.nan
    rows = [
        {
            "name": name,
            "count": len(flat[name]),
            "moments": [
                (_hundredths(mean), _hundredths(spread))
                for mean, spread in zip(flat[name].mean(0), flat[name].std(0, correction=0), strict=True)
            ],
            "total": _hundredths(codes[name].var(0, correction=0).mean().sqrt()),
        }
        for name in codes
        if len(codes[name])
    ]
    dropped = sum(min(MAX_DOTS, len(latents[name])) - len(codes[name]) for name in codes)
    return {"panels": panels, "rows": rows, "held": held, "dimensions": dimensions, "dropped": dropped}


def _finite_rows(codes: Tensor) -> Tensor:
    return codes[torch.isfinite(codes).all(1)]


def _weights(log_weights: Tensor | None) -> dict[str, Any] | None:
    if log_weights is None or len(log_weights) == 0:
        return None
    values = log_weights.detach().double().cpu()
    known = values[torch.isfinite(values)]
    found: dict[str, Any] = {"count": len(values), "dropped": len(values) - len(known), "chart": None}
    if len(known) == 0:
        return found
    weights = (known - known.max()).exp()
    zero = int((values == -math.inf).sum())  # draws of weight zero count in the mean of r, though not in the chart
    log_z = float(known.logsumexp(0)) - math.log(len(known) + zero)
    effective = float(weights.sum() ** 2 / weights.square().sum())
    chart, left_out = charts.log_weights(known)
    return found | {
        "chart": chart,
        "left_out": left_out,
        "mean": _hundredths(known.mean()),
        "log_z": _hundredths(log_z),
        "ess": brief(effective),
        "share": f"{100 * effective / len(values):.2g}",
    }


def _ess(ess: Tensor | None, num_proposals: int | None) -> dict[str, Any] | None:
    if ess is None or len(ess) == 0:
        return None
    values = ess.detach().double().cpu()
    known = values[torch.isfinite(values) & (values > 0)]
    found: dict[str, Any] = {"count": len(values), "dropped": len(values) - len(known), "chart": None}
    if len(known) == 0:
        return found
    return found | {
        "chart": charts.ess(known, num_proposals),
        "median": brief(float(known.median())),
        "low": brief(float(known.quantile(0.1))),
        "num_proposals": num_proposals,
    }


def _curves(data: ReportData) -> dict[str, Any] | None:
    panels, cut, dropped, longest = [], [], [], 1
    for title, series in data.curves.items():
        drawable = {name: points for name, points in series.items() if any(_drawable(*point) for point in points)}
        dropped += [f"{title} ({name})" for name in series if name not in drawable]
        if drawable:
            chart, block, is_cut = charts.curves(title, drawable)
            panels.append((title, chart))
            longest = max(longest, block)
            cut += [title] if is_cut else []
    return {"panels": panels, "cut": cut, "dropped": dropped, "block": longest} if panels else None


def _drawable(step: float, value: float) -> bool:
    return math.isfinite(step) and math.isfinite(value)
