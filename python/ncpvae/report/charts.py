"""Charts as SVG that sits inside the page, drawn by matplotlib.

Text stays text in the page's own font, and the colours become CSS variables, so that one chart serves light and dark
pages and paper. The same data gives the same bytes.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from ..plots import FAINT, INK, PALETTE

BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = PALETTE
COLOURS = {INK: "--ink", FAINT: "--faint"} | {colour: f"--c{i}" for i, colour in enumerate(PALETTE)}
DASHES = ("-", (0, (5, 2)), "-.", (0, (1, 1.2)))
MAX_POINTS = 400  # of a curve; more are averaged in blocks
BINS = 48
OF_LATENTS = {"q(z)": GREEN, "p(z)": ORANGE, "p_NCP(z)": BLUE}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.3,
    "path.simplify": True,
    "text.parse_math": False,  # the name of a series may hold dollar signs
}


@contextmanager
def _figure(width: float, height: float, arranged: bool = True) -> Iterator:
    """An empty figure of `width` × `height` inches, in this module's style; `arranged`: its axes are placed to fit."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install 'ncpvae[plot]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what a user's matplotlibrc says is for the user's own figures
        matplotlib.rcParams.update(STYLE)
        yield Figure(figsize=(width, height), layout="constrained" if arranged else None, facecolor="none")


def _svg(figure, label: str) -> str:
    """The figure as an <svg> element without anything that a page does not need; `label` is read to the blind."""
    import matplotlib

    for axes in figure.axes:
        axes.set_facecolor("none")
    matplotlib.rcParams["svg.hashsalt"] = label
    text = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", dpi=220, transparent=True, metadata=nothing)
    body = re.sub(r"<style.*?</style>", "", text.getvalue(), flags=re.DOTALL)
    box, body = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', body, re.DOTALL).groups()  # type: ignore[union-attr]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # only what is referred to keeps its name
    body = re.sub(r'style="font: ([\d.]+px)[^;"]*', r'style="font-size: \1', body)  # the shorthand of older versions
    body = re.sub(r'; font-family: [^;"]*', "", body)
    for colour, variable in COLOURS.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg viewBox="{box}" role="img" aria-label="{_escape(label)}">{body.strip()}</svg>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def drawn(draw: Callable[[Any], None], label: str) -> str:
    """What `draw` puts on the axes that it is given."""
    with _figure(4.6, 2.75) as figure:
        draw(figure.add_subplot())
        return _svg(figure, label)


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[str, int, bool]:
    """A line per series; how many logged values a point is the mean of; whether the first steps lie out of the frame.

    Every series needs one finite value at least.
    """
    lines, block, cut = {}, 1, False
    for name, points in series.items():
        values = torch.tensor([[float(step), float(value)] for step, value in points], dtype=torch.float64)
        lines[name], length = _thinned(values)
        block = max(block, length)
    with _figure(4.6, 2.75) as figure:
        axes = figure.add_subplot()
        for i, (name, line) in enumerate(lines.items()):
            marker = "o" if len(line) < 25 else ""
            colour, dashes = PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]
            label = f"\u200b{name}" if name.startswith("_") else name  # matplotlib hides the former
            axes.plot(*line.T.tolist(), color=colour, linestyle=dashes, marker=marker, markersize=2.5, label=label)
        values = torch.cat([line[:, 1] for line in lines.values()])
        values = values[torch.isfinite(values)]
        if _spans_decades(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_general)
            axes.yaxis.set_minor_formatter("")
        elif (limits := _late_limits(lines)) is not None:
            axes.set_ylim(*limits)
            cut = True
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(_thousands)
        axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.35)
        if len(lines) > 1:
            axes.legend(loc="best", handlelength=2.2)
        return _svg(figure, f"{title} against training step"), block, cut


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def _general(value: float, _: int | None = None) -> str:
    return f"{value:g}".replace("-", "−")


def _thousands(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _thinned(points: Tensor) -> tuple[Tensor, int]:
    """The (step, value) points [n, 2] as at most MAX_POINTS means over blocks of finite values; the blocks' length."""
    block = -(-len(points) // MAX_POINTS)
    points = points.where(torch.isfinite(points), math.nan)
    return torch.stack([part.nanmean(0) for part in points.split(block)]), block


def _spans_decades(values: Tensor) -> bool:
    """Whether 90 % of the values are positive and spread over three orders of magnitude or more."""
    if len(values) < 2 or values.min() <= 0:
        return False
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=values.dtype))
    return bool(high > 1e3 * low)


def _late_limits(lines: Mapping[str, Tensor]) -> tuple[float, float] | None:
    """Limits for the values after the first tenth of the steps, where the first steps would dwarf them fivefold."""
    points = torch.cat(list(lines.values()))
    points = points[torch.isfinite(points).all(1)]
    first, last = points[:, 0].min(), points[:, 0].max()
    late = points[points[:, 0] >= first + 0.1 * (last - first), 1]
    if len(late) == 0:
        return None
    low, high = float(late.min()), float(late.max())
    spread = float(points[:, 1].max() - points[:, 1].min())
    if high == low or spread < 5 * (high - low):
        return None
    margin = 0.12 * (high - low)
    return low - margin, high + margin


def log_weights(values: Tensor) -> tuple[str, int]:
    """Two histograms of finite log r [M]: of the base draws as they are, and with the weights r.

    The second result counts the draws to the left of the frame, at most 0.5 %, which are left there where they would
    take up 40 % of the frame or more.
    """
    lowest = values.sort().values[len(values) // 200]
    far = bool(values.max() - lowest < 0.6 * (values.max() - values.min()))
    left_out = int((values < lowest).sum()) if far else 0
    edges = _edges(values[values >= lowest] if far else values)
    density = torch.histogram(values, edges, density=True).hist
    weights = (values - values.max()).exp()
    weighted = torch.histogram(values, edges, weight=weights / weights.sum(), density=True).hist
    with _figure(4.6, 2.75) as figure:
        axes = figure.add_subplot()
        parts = ((density, "draws of p(z)", ORANGE), (weighted, "weighted by r(z)", BLUE))
        for heights, name, colour in parts:
            axes.stairs(heights, edges, fill=True, alpha=0.3, color=colour, linewidth=0)
            axes.stairs(heights, edges, color=colour, label=name, linewidth=1.1)
        axes.set(xlabel="log r(z), nats", ylabel="density")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.xaxis.set_major_formatter(_thousands)
        axes.legend(loc="upper left")
        axes.set_ylim(0, 1.22 * float(torch.cat([density, weighted]).max()))
        return _svg(figure, "Histogram of log r at draws of the base prior, plain and weighted by r"), left_out


def ess(values: Tensor, num_proposals: int | None) -> str:
    """Histogram of positive effective sample sizes [n] on a logarithmic axis that ends at the number of proposals."""
    high = max(float(values.max()), float(num_proposals or 1), 1.1)
    low = min(1.0, float(values.min()))
    edges = torch.logspace(math.log10(low), math.log10(high), 37, dtype=torch.float64)
    counts = torch.histogram(values.clamp(edges[0], edges[-1]), edges).hist
    median = float(values.median())
    with _figure(4.6, 2.75) as figure:
        axes = figure.add_subplot()
        axes.stairs(counts, edges, fill=True, alpha=0.3, color=BLUE, linewidth=0)
        axes.stairs(counts, edges, color=BLUE, linewidth=1.1)
        axes.axvline(median, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_ylim(0, 1.18 * float(counts.max()))
        place = (4, "left") if math.log(median / low) < 0.7 * math.log(high / low) else (-4, "right")
        text = f"median {_thousands(float(f'{median:.3g}'))}"
        axes.annotate(
            text,
            (median, 1),
            (place[0], -2),
            ("data", "axes fraction"),
            "offset points",
            ha=place[1],
            va="top",
            color=INK,
        )
        axes.set(xscale="log", xlabel="effective sample size", ylabel="samples")
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(low, high * (high / low) ** 0.02)
        return _svg(figure, "Histogram of the effective sample size behind each sample")


def distances(values: Tensor) -> str:
    """Histogram of finite distances [N]."""
    edges = _edges(values)
    with _figure(4.6, 2.75) as figure:
        axes = figure.add_subplot()
        counts = torch.histogram(values, edges).hist
        axes.stairs(counts, edges, fill=True, alpha=0.3, color=BLUE, linewidth=0)
        axes.stairs(counts, edges, color=BLUE, linewidth=1.1)
        axes.set(xlabel="distance to the nearest training example", ylabel="samples")
        return _svg(figure, "Histogram of the distances to the nearest training example")


def _edges(values: Tensor) -> Tensor:
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    return torch.linspace(low, high, BINS + 1, dtype=values.dtype)


def square(*sets: Tensor) -> tuple[float, float, float, float]:
    """The square (left, right, bottom, top) around all finite points [N, 2], with a margin."""
    points = torch.cat([points[torch.isfinite(points).all(1)] for points in sets])
    if len(points) == 0:
        return -1.0, 1.0, -1.0, 1.0
    low, high = points.min(0).values, points.max(0).values
    half = max(0.53 * float((high - low).max()), 1e-6)
    x, y = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def scatter(points: Tensor, frame: tuple[float, float, float, float], colour: str, label: str) -> str:
    """Points [N, 2] in a square frame."""
    with _figure(4.6, 4.6, arranged=False) as figure:
        axes = figure.add_axes((0.075, 0.06, 0.91, 0.925))
        _dots(axes, points, frame, colour)
        return _svg(figure, label)


def arrows(first: Tensor, second: Tensor, frame: tuple[float, float, float, float], label: str) -> str:
    """Each point of `first` [N, 2], joined to its partner in `second` [N, 2]."""
    with _figure(4.6, 4.6, arranged=False) as figure:
        axes = figure.add_axes((0.075, 0.06, 0.91, 0.925))
        _dots(axes, second, frame, ORANGE, size=5.0, alpha=0.9)
        _dots(axes, first, frame, BLUE, size=3.0, alpha=0.9)
        pairs = torch.stack([first, second], 1)
        pairs = pairs[torch.isfinite(pairs).flatten(1).all(1)]
        for x, y in pairs.transpose(1, 2).tolist():
            axes.plot(x, y, color=FAINT, linewidth=0.7, rasterized=True, zorder=1)
        return _svg(figure, label)


def latents(codes: Tensor, reference: Tensor | None, frame: tuple[float, float, float, float], name: str) -> str:
    """Codes [N, 2] with a marginal histogram along each axis, and the reference's marginals as outlines."""
    colour = OF_LATENTS.get(name, PURPLE)
    with _figure(3.1, 3.1, arranged=False) as figure:
        axes = figure.add_axes((0.145, 0.125, 0.66, 0.66))
        _dots(axes, codes, frame, colour)
        axes.set(xlabel="first principal component", ylabel="second principal component")
        above = figure.add_axes((0.145, 0.80, 0.66, 0.17), sharex=axes)
        beside = figure.add_axes((0.82, 0.125, 0.17, 0.66), sharey=axes)
        for i, (margin, orientation) in enumerate(((above, "vertical"), (beside, "horizontal"))):
            low, high = frame[2 * i : 2 * i + 2]
            edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
            heights = torch.histogram(codes[:, i].double(), edges, density=True).hist
            margin.stairs(heights, edges, orientation=orientation, fill=True, alpha=0.35, color=colour, linewidth=0)
            margin.stairs(heights, edges, orientation=orientation, color=colour, linewidth=0.9)
            if reference is not None:
                heights = torch.histogram(reference[:, i].double(), edges, density=True).hist
                margin.stairs(
                    heights, edges, orientation=orientation, color=INK, linewidth=0.8, linestyle=(0, (3.5, 1.5))
                )
            margin.set_axis_off()
        return _svg(figure, f"Draws of {name} along the first two principal components of q(z)")


def bars(
    values: Sequence[float],
    names: Sequence[str],
    marked: Sequence[bool],
    label: str,
    unit: str,
    errors: Sequence[float] | None = None,
    threshold: float | None = None,
    log: bool = False,
) -> str:
    """A bar across the page for each of the finite values, blue where marked and grey elsewhere, from left to right.

    On a logarithmic axis what is 0 or below has no bar.
    """
    places, heights = range(len(values)), list(values)
    with _figure(9.4, 2.15) as figure:
        axes = figure.add_subplot()
        if log:
            positive = [value for value in [*values, threshold] if value is not None and value > 0]
            low, high = min(positive, default=1.0) / 3, max(positive, default=1.0) * 3
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.yaxis.set_minor_formatter("")
            axes.yaxis.set_major_formatter(_general)
            heights = [max(value, low) for value in values]
        colours = [BLUE if mark else FAINT for mark in marked]
        axes.bar(places, heights, width=0.72, color=colours, linewidth=0)
        if errors is not None:
            axes.errorbar(places, heights, yerr=list(errors), fmt="none", ecolor=INK, elinewidth=0.8)
        if not log:
            axes.axhline(0, color=FAINT, linewidth=0.6)
            axes.margins(y=0.08)
        if threshold is not None:
            axes.axhline(threshold, color=ORANGE, linewidth=1.0, linestyle=(0, (4, 2)))
        step = -(-len(values) // 40)  # names need room
        axes.set_xticks(places[::step], list(names)[::step])
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.set(xlabel="dimension", ylabel=unit)
        axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.35)
        axes.set_axisbelow(True)
        return _svg(figure, label)


def paths(
    lines: Mapping[str, Tensor], around: Tensor, start: Tensor, frame: tuple[float, float, float, float], label: str
) -> str:
    """A line through points [T, 2] for each name, over dots `around` [N, 2], with a ring at `start` [2]."""
    with _figure(6.4, 4.9) as figure:
        axes = figure.add_subplot()
        _dots(axes, around, frame, FAINT, alpha=0.5)
        for i, (name, points) in enumerate(lines.items()):
            colour, dashes = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
            axes.plot(*points.double().T.tolist(), color=colour, linestyle=dashes, label=name)
        x, y = start.tolist()
        axes.plot([x], [y], "o", markersize=7, markerfacecolor="none", markeredgecolor=INK)
        axes.set_aspect("equal")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=2.2)
        return _svg(figure, label)


def _dots(axes, points: Tensor, frame: Sequence[float], colour: str, size: float | None = None, alpha=None) -> None:
    """Dots, as pixels inside the vector chart, since each would be an element of its own there."""
    count = len(points)
    size = size or (3.2 if count <= 500 else 2.6 if count <= 2000 else 2.1)
    alpha = alpha or (0.75 if count <= 500 else 0.6 if count <= 2000 else 0.45)
    x, y = points.double().T.tolist()
    axes.plot(x, y, ".", markersize=size, color=colour, alpha=alpha, markeredgewidth=0, rasterized=True)
    axes.set(xlim=frame[:2], ylim=frame[2:])
    axes.xaxis.set_major_locator(_few_ticks())
    axes.yaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(_thousands)
    axes.yaxis.set_major_formatter(_thousands)
