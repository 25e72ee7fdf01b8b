"""Pictures of samples and of latent groups, written as PNG files. Needs matplotlib: pip install 'ncpvae[plot]'."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ._files import atomic_file

INK, FAINT = "#1d2024", "#6b7076"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#56b4e9", "#e69f00")  # Okabe, Ito
MARKERS = "osD^vP"
DASHED = (0, (5, 2))


class LatentGroup(Protocol):
    """What the charts show of a group of latent variables; `ncpvae.report.GroupFigures` has it.

    `number` and `scale` count from 1 at the top; `loss` and `jsd` of its classifier, nats, and `ess` of the sampler are
    not drawn where they are None or not finite.
    """

    @property
    def number(self) -> int: ...
    @property
    def scale(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def jsd(self) -> float | None: ...
    @property
    def ess(self) -> float | None: ...


def image_grid(images: Tensor, columns: int | None = None, padding: int = 1, background: float = 0.5) -> Tensor:
    """Tile images [N, C, H, W] row by row into one picture [C, H', W'].

    Args:
        columns: images per row; about √N by default.
        padding: pixels between them.
        background: value of the pixels in between.
    """
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"image_grid: images must be [N, C, H, W] with N ≥ 1, got shape {tuple(images.shape)}")
    N, C, H, W = images.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = -(-N // columns)
    grid = images.new_full((C, rows * (H + padding) + padding, columns * (W + padding) + padding), background)
    for i, image in enumerate(images):
        top, left = (i // columns) * (H + padding) + padding, (i % columns) * (W + padding) + padding
        grid[:, top : top + H, left : left + W] = image
    return grid


def save_images(path: Path, panels: Sequence[tuple[str, Tensor]], columns: int | None = None) -> Path:
    """One figure with a titled grid for each (title, images [N, C, H, W] in [0, 1])."""
    figure, axes = _figure(len(panels), size=4.0)
    for axis, (title, images) in zip(axes, panels, strict=True):
        grid = image_grid(images.detach().float().cpu().clamp(0, 1), columns)
        axis.imshow(grid.movedim(0, -1).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    return _save(figure, path)


def save_scatter(path: Path, panels: Sequence[tuple[str, Tensor]], limit: float) -> Path:
    """One figure with a titled scatter plot for each (title, points [N, 2]), all axes from −limit to limit."""
    figure, axes = _figure(len(panels), size=3.6)
    for axis, (title, points) in zip(axes, panels, strict=True):
        x, y = points.detach().float().cpu().T.numpy()
        axis.plot(x, y, ".", markersize=1.5, color="tab:blue", alpha=0.6, markeredgewidth=0)
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        axis.title.set_fontsize(10)
    return _save(figure, path)


def save_groups(path: Path, groups: Sequence[LatentGroup], num_proposals: int | None = None) -> Path:
    """One figure of a hierarchical VAE's groups: losses, effective sample sizes, and one against the other.

    Args:
        groups: in the order of their numbers.
        num_proposals: M of SIR, the largest effective sample size there can be.

    Raises:
        ValueError: where no group has both a loss and an effective sample size.

    Source: NCP-VAE, Figure 4.
    """
    if not paired(groups):
        raise ValueError(f"save_groups: groups must have one with a loss and a positive ess, got {len(groups)} without")
    figure, (first, second, third) = _figure(3, size=4.0)
    draw_losses(first, groups)
    draw_ess(second, groups, num_proposals)
    draw_ess_against_loss(third, groups, num_proposals)
    return _save(figure, path)


def paired(groups: Sequence[LatentGroup]) -> list[tuple[LatentGroup, float, float]]:
    """(group, loss, effective sample size) of the groups that have both, the latter on a logarithmic axis."""
    return [
        (group, group.loss, group.ess)
        for group in groups
        if group.loss is not None and group.ess is not None and _drawable(group.loss) and _drawable(group.ess, 0.0)
    ]


def draw_losses(axes: Any, groups: Sequence[LatentGroup]) -> None:
    """Classification loss and Jensen-Shannon divergence of each group over its number."""
    numbers = [group.number for group in groups]
    series = (
        ("classification loss", [_or_gap(group.loss) for group in groups], PALETTE[0], "o", "-"),
        ("JSD", [_or_gap(group.jsd) for group in groups], PALETTE[1], "s", DASHED),
    )
    for name, values, colour, marker, dashes in series:
        if not all(map(math.isnan, values)):
            axes.plot(numbers, values, color=colour, marker=marker, markersize=4, linestyle=dashes, label=name)
    axes.axhline(2 * math.log(2), color=FAINT, linewidth=0.9, linestyle=DASHED)
    axes.annotate("2 log 2", (1, 2 * math.log(2)), (0, 2), ("axes fraction", "data"), "offset points", ha="right")
    axes.margins(y=0.1)
    axes.set(ylabel="nats", ylim=(min(0.0, axes.get_ylim()[0]), None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)  # off the lines
    _over_groups(axes, groups)


def draw_ess(axes: Any, groups: Sequence[LatentGroup], num_proposals: int | None) -> None:
    """Effective sample size of each group, on a logarithmic axis, over its number."""
    sizes = [_or_gap(group.ess, 0.0) for group in groups]
    axes.plot([group.number for group in groups], sizes, color=PALETTE[0], marker="o", markersize=4)
    _over_groups(axes, groups)
    _ess_axis(axes, sizes, num_proposals)


def draw_ess_against_loss(axes: Any, groups: Sequence[LatentGroup], num_proposals: int | None) -> None:
    """A numbered dot for each group: effective sample size, on a logarithmic axis, against classification loss."""
    points = paired(groups)
    scales = sorted({group.scale for group, _, _ in points})
    for i, scale in enumerate(scales):
        losses, sizes = zip(*((loss, ess) for group, loss, ess in points if group.scale == scale), strict=True)
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        axes.plot(losses, sizes, marker, color=colour, markersize=4, label=f"scale {scale}")
    for group, loss, ess in points:
        axes.annotate(str(group.number), (loss, ess), (4, 2), textcoords="offset points", fontsize=7, color=INK)
    if 1 < len(scales) <= len(PALETTE):  # a colour and a marker of its own for each
        axes.legend(loc="best", frameon=False)
    axes.set(xlabel="classification loss, nats")
    axes.margins(x=0.08)
    _ess_axis(axes, [ess for _, _, ess in points], num_proposals)


def _over_groups(axes: Any, groups: Sequence[LatentGroup]) -> None:
    """An axis of group numbers, with a line where the scale changes."""
    numbers = [group.number for group in groups]
    axes.set_xticks(numbers[:: -(-len(numbers) // 15)])  # more have no room
    axes.set(xlabel="group", xlim=(numbers[0] - 0.6, numbers[-1] + 0.6))
    for above, below in pairwise(groups):
        if above.scale != below.scale:
            axes.axvline((above.number + below.number) / 2, color=FAINT, linewidth=1.0, linestyle=(0, (1, 3)))
    axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.35)


def _ess_axis(axes: Any, sizes: Sequence[float], num_proposals: int | None) -> None:
    """A logarithmic axis from the decade of the smallest size to the number of proposals, which has a line."""
    from matplotlib.ticker import LogLocator

    known = [size for size in sizes if math.isfinite(size)]
    low, high = 10.0 ** math.floor(math.log10(min(known))), max([*known, num_proposals or 1])
    axes.set(yscale="log", ylabel="effective sample size", ylim=(low / 1.25, high * 1.5))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.yaxis.set_minor_formatter("")
    if num_proposals is not None:
        axes.axhline(num_proposals, color=FAINT, linewidth=0.9, linestyle=DASHED)
        text = f"{num_proposals:,} proposals"
        axes.annotate(text, (1, num_proposals), (0, 2), ("axes fraction", "data"), "offset points", ha="right")


def _drawable(value: float | None, above: float = -math.inf) -> bool:
    return value is not None and math.isfinite(value) and value > above


def _or_gap(value: float | None, above: float = -math.inf) -> float:
    """The value, or what leaves a gap in a line."""
    return value if value is not None and _drawable(value, above) else math.nan


def _figure(panels: int, size: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ncpvae[plot]'") from error
    figure = Figure(figsize=(size * panels, size + 0.3), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def _save(figure, path: Path) -> Path:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or None)
    return path
