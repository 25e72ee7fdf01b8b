"""Pictures of samples, written as PNG files. Needs matplotlib: pip install 'ncpvae[plot]'."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


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
    figure.savefig(path)
    return path
