"""Tables and plots of the figures in `results/`, written beside them: `python benchmarks/report.py [FOLDER]`."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ncpvae.bench import OWN, Case
from ncpvae.bench.command import duration

RESULTS = Path(__file__).resolve().parent / "results"
RESOLUTION = 1 << 17  # bytes; the resident set is not known better than this
Record = dict[str, Any]


class Axis(NamedTuple):
    """What an op is plotted against, and the sizes that must agree within a plot."""

    label: str
    of: Callable[[Record], int]
    fixed: tuple[str, ...] = ()


AXES = {
    "sir_resample": Axis("weights, B·M", lambda r: r["elements"], ("n",)),
    "sir_update": Axis("proposals for each row, M", lambda r: r["shape"]["M"], ("B", "D")),
    "langevin_step": Axis("elements", lambda r: r["elements"]),
    "similarity_logsumexp": Axis("N = K", lambda r: r["shape"]["N"], ("D", "temperature")),
    "gaussian_logsumexp": Axis("pairs, N·K", lambda r: r["shape"]["N"] * r["shape"]["K"], ("D", "std")),
    "prior.sample": Axis("proposals for each sample, M", lambda r: r["shape"]["M"], ("B", "classifier")),
    "hierarchical.draw": Axis("proposals for each sample, M", lambda r: r["shape"]["M"], ("B",)),
    "langevin_chain": Axis("steps, T", lambda r: r["shape"]["T"], ("B", "energy")),
}


def read(folder: Path) -> tuple[list[Record], list[Record]]:
    """All records of a folder's JSON lines, and the lines of goals, each with its file's name."""
    records, goals = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no JSON: {error}") from error
            if "goals" in line:
                goals.append(line | {"file": path.name})
            elif "median_us" in line and "bound" in line:
                records.append(line | {"file": path.name})
    return records, goals


# ---------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record], goals: Sequence[Record], plots: Sequence[Path]) -> str:
    parts = [
        "# Benchmarks",
        "Written by `python benchmarks/report.py` from the JSON lines beside it; see ../README.md for what is compared "
        "and how. Times are medians; the columns of peers say how many times slower than ncpvae they are.",
    ]
    parts += [_goal_table(line) for line in goals]
    for (file, op), group in groupby(sorted(records, key=_section), key=_section):
        timed = list(group)
        parts += [f"## {op}", _machine(timed[0]), _op_table(timed)]
        stem = plot_stem(file, op)
        parts += [f"![{path.stem}]({path.name})" for path in plots if path.name.startswith(stem + "--")]
        absent = {f"- {name}: {why}" for record in timed for name, why in record["absent"].items()}
        if absent:
            parts.append("\n".join(["Left out:", "", *sorted(absent)]))
    return "\n\n".join(parts) + "\n"


def _section(record: Record) -> tuple[str, str]:
    return record["file"], record["op"]


def plot_stem(file: str, op: str) -> str:
    return f"{file.partition('.')[0]}--{op}"


def _machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['device']}, {record['isa']}, {record['threads']} thread(s), {record['date']}; {versions}. "
        f"[{record['file']}]({record['file']})"
    )


def _goal_table(line: Record) -> str:
    words = {True: "met", False: "**not met**", None: "not known"}
    rows = []
    for goal in line["goals"]:
        unit = goal["wanted"].rpartition(" ")[2]
        measured = "–" if goal["measured"] is None else f"{goal['measured']:.3g} {unit}"
        rows.append([goal["op"], goal["goal"], goal["wanted"], measured, words[goal["met"]], goal["note"]])
    return f"## Goals, {line['file']}\n\n" + _markdown(["op", "goal", "wanted", "measured", "", "note"], rows)


def _op_table(records: Sequence[Record]) -> str:
    peers = list(dict.fromkeys(name for record in records for name in record["ratio"]))
    heading = ["case", OWN, "of the bound", "peak memory", "error", "eager's error", *peers]
    rows = []
    for record in records:
        case = Case(*(record[name] for name in ("op", "shape", "dtype", "direction", "settings")))
        peak, error = record["peak_bytes"].get(OWN), record["error"]
        ratios = [f"{record['ratio'][peer]:.3g} ×" if peer in record["ratio"] else "" for peer in peers]
        rows.append(
            [
                str(case),
                duration(record["median_us"][OWN]),
                f"{record['bound']['percent']:.3g} % ({record['bound']['is']})",
                "" if peak is None else _megabytes(peak),
                _scientific(error.get(OWN)),
                _scientific(error.get(record["fastest_eager"])),
                *ratios,
            ]
        )
    errors = sorted({record["error_of"] for record in records} - {""})
    note = f"\n\nErrors against float64: {'; '.join(errors)}." if errors else ""
    return _markdown(heading, rows) + note


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= RESOLUTION else "< 0.1 MiB"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """A figure for each op and each set of fixed sizes that three sizes or more were timed of."""
    written = []
    drawn = [record for record in records if record["op"] in AXES]
    for _, group in groupby(sorted(drawn, key=_series), key=_series):
        line = sorted(group, key=lambda record: AXES[record["op"]].of(record))
        sizes = {AXES[record["op"]].of(record) for record in line}
        if len(sizes) >= 3:
            written.append(_figure(line, folder))
    return written


def _series(record: Record) -> tuple[str, ...]:
    """What records that belong in one figure have in common."""
    sizes = record["shape"] | record["settings"]
    fixed = (f"{name}={sizes[name]}" for name in AXES[record["op"]].fixed)
    return (record["file"], record["op"], record["dtype"], record["direction"], *fixed)


def _figure(line: Sequence[Record], folder: Path) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file, op, *rest = _series(line[0])
    axis = AXES[op]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    times, memory = figure.subplots(1, 2)
    for name in dict.fromkeys(name for record in line for name in record["median_us"]):
        style = {"marker": "o", "markersize": 4, "linewidth": 2.2 if name == OWN else 1.0, "label": name}
        timed = [(axis.of(r), r["median_us"][name] / 1e6) for r in line if name in r["median_us"]]
        held = [(axis.of(r), r["peak_bytes"].get(name)) for r in line]
        known = [(size, max(peak, RESOLUTION) / 2**20) for size, peak in held if peak is not None]
        (drawn,) = times.plot(*zip(*timed, strict=True), **style)
        if known:
            memory.plot(*zip(*known, strict=True), **style, color=drawn.get_color())
    bound = [(axis.of(record), record["bound"]["us"] / 1e6) for record in line]
    times.plot(*zip(*bound, strict=True), "k--", linewidth=1.2, label="bound")
    times.set(title=f"{op}: time, s", xlabel=axis.label, xscale="log", yscale="log")
    memory.set(title="peak memory, MiB", xlabel=axis.label, xscale="log", yscale="log")
    times.legend(fontsize=8)
    figure.suptitle(f"{', '.join(rest)}; {line[0]['device']}, {line[0]['isa']}, {line[0]['date']}", fontsize=9)
    words = "-".join(rest).replace(" ", "-").replace("=", "")
    path = folder / f"{plot_stem(file, op)}--{words}.svg"
    with rc_context({"svg.hashsalt": op, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def report(folder: Path) -> list[Path]:
    """Write the folder's tables and plots; returns their files.

    Raises:
        ValueError: where it has no figures, or a line that is no JSON.
        OSError: where it cannot be read or written.
    """
    records, goals = read(folder)
    if not records:
        raise ValueError(f"report: no figures in {folder}: run ncpvae bench --output {folder}/ops-cpu.jsonl")
    try:
        plots = plot(records, folder)
    except ImportError:
        print("no plots: pip install 'ncpvae[plot]'", file=sys.stderr)
        plots = []
    page = folder / "tables.md"
    page.write_text(tables(records, goals, plots))
    return [page, *plots]


if __name__ == "__main__":
    try:
        for written in report(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS):
            print(written)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
