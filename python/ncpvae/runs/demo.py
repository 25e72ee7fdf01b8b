"""`ncpvae demo`: a recipe from nothing to its page."""

from dataclasses import replace
from pathlib import Path

from ..recipes import RECIPES
from . import evaluation, reporting, sampling, training

DEMOS = {"gaussians": "gaussians", "digits": "digits", "mnist": "mnist-mlp"}


def demo(
    name: str,
    folder: Path,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    data_folder: str | None = None,
    progress: bool = True,
) -> str:
    """Both stages, figures, pictures and page of one recipe in `folder/<recipe>`; the table, and where to look.

    A demo that was interrupted goes on from its newest checkpoint.

    Args:
        name: of `DEMOS`.
        steps: of stage one instead of the recipe's; stage two in proportion, and never more than the recipe's.
        seed, device, data_folder, progress: see `training.train`.
    """
    if name not in DEMOS:
        raise ValueError(f"demo must be one of {', '.join(DEMOS)}, got {name!r}")
    recipe = replace(RECIPES[DEMOS[name]], seed=seed)
    if steps is not None:
        second = min(recipe.prior.steps, max(1, recipe.prior.steps * steps // recipe.steps))
        recipe = replace(recipe, steps=steps, prior=replace(recipe.prior, steps=second))
    command = f"ncpvae demo {name}" + (f" --steps {steps}" if steps is not None else "")
    command += f" --seed {seed}" if seed else ""
    run, _ = training.train(folder / DEMOS[name], DEMOS[name], recipe, command, "auto", device, data_folder, progress)
    training.fit_prior(run, command=command, resume="auto", progress=progress)
    table = evaluation.table_of(evaluation.evaluate(run, command=command))
    picture, page = sampling.overview(run), reporting.report(run)
    return f"\n{name}\n\n{table}\n\npicture: {picture}\npage: {page}"
