"""`ncpvae bench`: the ops' cases timed one after the other, told in lines and kept as JSON lines."""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._files import write_atomic
from . import goals, machine, memory
from .case import OWN, Case
from .record import measure

OPS = ("sir_resample", "sir_update", "langevin_step", "similarity_logsumexp", "gaussian_logsumexp")
Say = Callable[[str], None]


def bench(
    ops: Sequence[str] = (),
    quick: bool = False,
    output: Path | None = None,
    seconds: float = 1.0,
    threads: int | None = None,
    device: torch.device | None = None,
    allow_load: bool = False,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Time ops against their peers; returns the records, one per case.

    Args:
        ops: their names; all where none is given.
        quick: the sizes of the goals and a few small ones, against the peers that the goals name.
        output: file for the records, one JSON object a line; a last line has the goals where there are any.
        seconds: for each contender of a case.
        threads: torch's; as they are by default.
        device: a CUDA device where there is one by default.
        allow_load: accept a machine that others keep busy.
        say: where the lines go.

    Raises:
        ValueError: for an unknown op, for seconds or threads that are not positive.
        OSError: where the output cannot be written.
        MachineLoaded: where others keep the machine busy.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"bench: op must be one of {', '.join(OPS)}, got {op!r}")
    modules = [importlib.import_module(f"{__package__}.{op}") for op in dict.fromkeys(ops or OPS)]
    return run(modules, quick, output, seconds, threads, device, allow_load, say)


def run(
    modules: Sequence[ModuleType],
    quick: bool = False,
    output: Path | None = None,
    seconds: float = 1.0,
    threads: int | None = None,
    device: torch.device | None = None,
    allow_load: bool = False,
    say: Say = print,
) -> list[dict[str, Any]]:
    """`bench` of any modules that have `cases(device, quick)` and `workload(case, device)`."""
    if not seconds > 0:
        raise ValueError(f"bench: seconds must be > 0, got {seconds}")
    if threads is not None and threads < 1:
        raise ValueError(f"bench: threads must be ≥ 1, got {threads}")
    if output is not None:
        _check_writable(output)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settled = machine.settle_allocator()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    records: list[dict[str, Any]] = []
    try:
        for record in _records(modules, quick, seconds, device, allow_load):
            record["allocator_settled"] = settled
            if not records:
                say(_heading(record))
            say(line(record))
            records.append(record)
            _write(output, records)
    finally:
        torch.set_num_threads(before)
    outcomes = goals.outcomes(records)
    if outcomes:
        say("\n" + goals.table(outcomes))
        _write(output, [*records, {"goals": [asdict(o) for o in outcomes]}])
    return records


def _records(
    modules: Sequence[ModuleType], quick: bool, seconds: float, device: torch.device, allow_load: bool
) -> Iterator[dict[str, Any]]:
    for module in modules:
        with memory.FreshProcess(module.__name__, device) as fresh:
            for case in module.cases(device, quick):
                peaks = fresh.peaks(case, quick)
                yield measure(case, module.workload, device, seconds, quick, allow_load) | {"peak_bytes": peaks}


def _check_writable(path: Path) -> None:
    """Before minutes are spent on what could not be kept."""
    folder = path.parent
    if path.is_dir():
        raise OSError(f"bench: --output must be a file, got the folder {str(path)!r}")
    if not folder.is_dir():
        raise OSError(f"bench: --output must be in a folder that is there, got {str(path)!r}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OSError(f"bench: --output {str(path)!r} cannot be written")


def _write(output: Path | None, lines: Sequence[dict[str, Any]]) -> None:
    if output is not None:
        write_atomic(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _heading(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']}, {record['isa']}, {record['threads']} thread(s); {versions}; medians\n"


def line(record: dict[str, Any]) -> str:
    """A record for the eye: time, share of the bound, how many times slower each peer is, and who is absent."""
    case = Case(*(record[name] for name in ("op", "shape", "dtype", "direction", "settings")))
    rate = ", ".join(f"{value:.3g} {unit.replace('_per_', '/')}" for unit, value in record["rate"].items())
    ratios = "  ".join(f"{name} {ratio:.3g}×" for name, ratio in record["ratio"].items())
    absent = "".join(f"\n    without {name}: {why}" for name, why in record["absent"].items())
    peak = record.get("peak_bytes", {}).get(OWN)
    held = "" if peak is None else f", peak {peak / 2**20:.1f} MiB"
    return (
        f"{record['op']} {case}\n    {duration(record['median_us'][OWN])}, {rate}, "
        f"{record['bound']['percent']:.3g} % of {record['bound']['is']}{held}\n    {ratios}{absent}"
    )


def duration(microseconds: float) -> str:
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"
