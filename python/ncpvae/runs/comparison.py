"""`ncpvae compare`: the figures of several runs side by side, those that differ by the seed alone as mean (std)."""

import re
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..recipes import RECIPES, VAERecipe, from_dict
from ..report import Metric
from ..report.content import flatten
from .evaluation import FILE, cautions, cell, read_evaluation, read_figures, read_groups, table
from .figures import AU, CAP, KL, MARGINAL_KL, MI, NLL
from .folder import Run, as_json, open_run, write_json

#: columns of the short table: title → names of a figure, the first that a run has being taken
COLUMNS = {
    "NLL": (NLL, "test NLL"),
    "MI": (MI,),
    "cap": (CAP,),
    "AU": (AU,),
    "KL": (KL,),
    "KL(q(z)‖p)": (MARGINAL_KL,),
    "density": ("density",),
    "coverage": ("coverage",),
}
SHARED = ("MI", "cap", "AU", "KL")  # of the encoder, whatever the prior


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds alone, and what sets them apart from the others."""

    label: str
    runs: list[Run]
    figures: list[dict[str, Metric]]  # of each run, by name and unit


def compare(folders: list[Path], output: Path | None = None) -> str:
    """Tables of the figures of evaluated runs: a short one with a row for each model, then all figures.

    Args:
        folders: of the runs.
        output: a JSON file for the figures of every run, with protocols, settings and environments.
    """
    groups = grouped([open_run(folder) for folder in folders])
    if output is not None:
        write_json(output, record(groups))
    names = figure_names(groups)
    lines = [["", *(f"{group.label}: {prior}" for group in groups for prior in ("base", "NCP"))]]
    for name in names:
        cells = [_cell(group, name, side) for group in groups for side in ("base", "ncp")]
        lines.append([name, *cells])
    several = any(len(group.runs) > 1 for group in groups)
    notes = ["mean (standard deviation) over runs that differ by the seed alone"] if several else []
    notes += remarks(groups, names)
    return "\n".join([table(short(groups)), "", table(lines), *([""] if notes else []), *notes])


def figure_names(groups: list[Group]) -> list[str]:
    """Of all figures that any run has, each once."""
    return list(dict.fromkeys(name for group in groups for figures in group.figures for name in figures))


def record(groups: list[Group]) -> dict[str, Any]:
    """All that was measured, model by model and run by run."""
    return {
        "table": short(groups),
        "remarks": remarks(groups, figure_names(groups)),
        "models": [
            {
                "label": group.label,
                "recipe": group.runs[0].name,
                "runs": [
                    {"seed": run.recipe.seed, "settings": as_json(run.recipe), "environment": run.config["environment"],
                     "stage_one": run.config.get("stage_one"), "figures": [asdict(f) for f in figures.values()],
                     "groups": [asdict(group) for group in read_groups(run)]}
                    for run, figures in zip(group.runs, group.figures, strict=True)
                ],
            }
            for group in groups
        ],
    }  # fmt: skip


def grouped(runs: list[Run]) -> list[Group]:
    """The runs by their settings but for seed and execution; labels are folders' names, or the settings that differ.

    The settings are those that the figures were measured with.
    """
    keys = [_measured_with(run) | {"seed": None, "execution": None, "recipe": run.name} for run in runs]
    found: list[tuple[dict, list[Run]]] = []
    for key, run in zip(keys, runs, strict=True):
        same = [members for known, members in found if known == key]
        repeated = any(run.recipe.seed == other.recipe.seed for members in same for other in members)
        if same and not repeated:
            same[0].append(run)
        else:
            found.append((key, [run]))
    short_names = [members[0].folder.resolve().name for _, members in found]
    unique = len(set(short_names)) == len(short_names)
    labels = short_names if unique else [str(members[0].folder) for _, members in found]
    if any(len(members) > 1 for _, members in found):
        labels = _settings_apart([key for key, _ in found], labels)
    return [
        Group(label, members, [_named(run) for run in members])
        for label, (_, members) in zip(labels, found, strict=True)
    ]


def _measured_with(run: Run) -> dict[str, Any]:
    """The settings, with defaults for what there was not when the run was measured."""
    record = read_evaluation(run)
    if record is None:
        return as_json(run.recipe)
    settings = as_json(from_dict(RECIPES[run.name], record["settings"], str(run.folder / FILE)))
    return settings | {"prior": {**settings["prior"], "execution": None}}


def _settings_apart(keys: list[dict], otherwise: list[str]) -> list[str]:
    flat = [dict(flatten(key)) for key in keys]
    names = [name for name in dict.fromkeys(n for f in flat for n in f) if len({f.get(name) for f in flat}) > 1]
    labels = [", ".join(f"{name} {f[name]}" for name in names if name in f) for f in flat]
    return labels if names and len(set(labels)) == len(labels) else otherwise


def _named(run: Run) -> dict[str, Metric]:
    return {f"{f.name} ({f.unit})" if f.unit else f.name: f for f in read_figures(run)}


def short(groups: list[Group]) -> list[list[str]]:
    """The table of models: one row for each prior of each group, and one of what has been published about it."""
    lines = [["", "runs", *COLUMNS, "seconds"]]
    for group in groups:
        by_name = [{f.name: f for f in figures.values()} for figures in group.figures]
        for side in ("base", "ncp"):
            cells = []
            for title, names in COLUMNS.items():
                found = [next((f[name] for name in names if name in f), None) for f in by_name]
                own = "" if side == "ncp" and title in SHARED else _spread([_value(f, side) for f in found])
                cells.append(own)
            if side == "base" or any(cells):
                stage = [run.config.get("stage_one", {}).get("seconds") for run in group.runs]
                seconds = _spread(stage, ".0f") if side == "base" else ""
                lines.append([group.label if side == "base" else "  with NCP", str(len(group.runs)), *cells, seconds])
        published = _published(group)
        if published:
            row = [published.get(title, "") for title in [*COLUMNS, "seconds"]]
            lines.append(["  published", published.get("runs", ""), *row])
    return lines


def _published(group: Group) -> dict[str, str]:
    """What the recipe's source says of such a model: its remedies are the recipe's, and its critic but for the kind."""
    recipe, own = group.runs[0].recipe, RECIPES[group.runs[0].name]
    if not isinstance(recipe, VAERecipe) or not isinstance(own, VAERecipe):
        return recipe.published()
    alike = replace(own.critic, kind=recipe.critic.kind) == recipe.critic and own.remedies == recipe.remedies
    return recipe.published() if alike else {}


def _differences(group: Group) -> str:
    """Where the training of the group's runs departs from that of the recipe, for which figures were published."""
    ours, own = (dict(flatten(as_json(recipe))) for recipe in (group.runs[0].recipe, RECIPES[group.runs[0].name]))
    free = ("seed", "prior", "evaluation", "execution", "critic", "remedies", "validate_every")
    return ", ".join(
        f"{name} = {ours[name]} ({own.get(name)})"
        for name in ours
        if ours[name] != own.get(name) and name.partition(".")[0] not in free
    )


def _value(figure: Metric | None, side: str) -> float | None:
    return None if figure is None else getattr(figure, side)


def _spread(values: list[float | None], form: str = ".4g") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = format(statistics.fmean(known), form)
    return mean if len(known) == 1 else f"{mean} ({statistics.stdev(known):.2g})"


def _cell(group: Group, name: str, side: str) -> str:
    if len(group.runs) == 1:
        return cell(group.figures[0].get(name), side)
    return _spread([_value(figures.get(name), side) for figures in group.figures])


def remarks(groups: list[Group], names: list[str]) -> list[str]:
    """What is to be said beside the tables: cautions on data, estimators of published figures, unlike protocols."""
    runs = [(group.label, run) for group in groups for run in group.runs]
    notes = [f"{label}: {note}" for label, run in {label: run for label, run in runs}.items() for note in cautions(run)]
    short_names = {name for column in COLUMNS.values() for name in column}
    for name in names:
        found = [(g.label, f[name]) for g in groups for f in g.figures if name in f]
        ways: dict[str, list[str]] = {}
        for label, figure in found:
            if figure.lower_is_better is not None or figure.name in short_names:
                way = re.sub(r"seed \d+", "its seed", figure.protocol)
                ways.setdefault(way, []).append(label)
        if len(ways) > 1:
            told = (f"{', '.join(dict.fromkeys(labels))}: {way}" for way, labels in ways.items())
            notes.append(f"not measured alike, {name}: " + "; ".join(told))
    if len({run.recipe.data for _, run in runs}) > 1:
        notes.append("the runs are of different data: " + ", ".join(dict.fromkeys(run.recipe.data for _, run in runs)))
    for group in groups:
        note, differences = _published(group).get("note", ""), _differences(group)
        notes += [f"published: {note}"] if note else []
        notes += [f"{group.label}: not as published but with {differences}"] if note and differences else []
    return list(dict.fromkeys(notes))
