"""What critics and noise contrastive priors do to a model, from the figures that `ncpvae compare --output` wrote.

    python benchmarks/critics_plot.py benchmarks/results/critics-toy.json docs/pictures/critics-toy.png

One panel for each of likelihood, Fréchet distance (where it was measured), density and coverage over the mutual
information: an arrow for each seed leads from the VAE's own prior to the noise contrastive one.
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"none": "tab:gray", "self": "tab:blue", "hybrid": "tab:green", "neural": "tab:orange"}
MARKERS = "os^D"  # by λ, the largest first
PANELS = {
    "test NLL, SNIS bound": "test NLL (nats)",
    "Fréchet distance": "Fréchet distance",
    "density": "density",
    "coverage": "coverage",
}
MI = "mutual information I(x; z)"


def main(source: Path, target: Path) -> None:
    models = json.loads(source.read_text())["models"]
    weights = sorted({model["runs"][0]["settings"]["critic"]["weight"] for model in models}, reverse=True)
    markers = dict(zip(weights, MARKERS, strict=False))
    panels = {name: title for name, title in PANELS.items() if name in by_name(models[0]["runs"][0])}
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for number, (name, title) in enumerate(panels.items()):
        axis = figure.add_subplot(1, len(panels), number + 1)
        for model in models:
            for seed, run in enumerate(model["runs"]):
                kind, weight = run["settings"]["critic"]["kind"], run["settings"]["critic"]["weight"]
                figures = by_name(run)
                x, y = figures[MI]["base"], figures[name]
                label = "plain VAE" if kind == "none" else f"{kind} critic, λ = {weight:g}"
                shown = {"marker": markers[weight], "fillstyle": "none", "label": label if seed == 0 else None}
                axis.plot(x, y["base"], color=COLOURS[kind], linestyle="", **shown)
                axis.annotate(
                    "", (x, y["ncp"]), (x, y["base"]), arrowprops={"arrowstyle": "->", "color": COLOURS[kind]}
                )
                axis.plot(x, y["ncp"], ".", color=COLOURS[kind], markersize=3)
        axis.set(title=title, xlabel="I(x; z), nats")
        if number == 0:
            axis.legend(fontsize=8, title="own prior → NCP", title_fontsize=8)
    figure.savefig(target)


def by_name(run: dict) -> dict[str, dict]:
    """The run's figures by their names, less what these say in parentheses at the end of the features."""
    return {figure["name"].split(" (classifier")[0]: figure for figure in run["figures"]}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: critics_plot.py FIGURES.json PICTURE.png")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
