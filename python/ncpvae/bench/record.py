"""From a case to its record: one JSON object with all that was measured."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import goals, machine
from .case import OWN, Case, Function, Workload
from .peers import reason
from .timing import Timings, interleaved

ATTEMPTS, PAUSE_SECONDS = 3, 10.0


class MachineLoaded(RuntimeError):
    """Others keep the machine too busy for figures that mean anything."""


def measure(
    case: Case,
    make: Callable[[Case, torch.device], Workload],
    device: torch.device,
    seconds: float,
    quick: bool = False,
    allow_load: bool = False,
) -> dict[str, Any]:
    """Time a case's contenders and return its record; `peak_bytes`, measured elsewhere, is added by the caller.

    Args:
        case: what is timed.
        make: its workload.
        device: where.
        seconds: for each contender, on average.
        quick: leave out peers that no goal is about.
        allow_load: accept a machine that others keep busy; the record says so.

    Raises:
        MachineLoaded: where it is, three times in a row.
    """
    torch.manual_seed(0)
    workload = make(case, device)
    if quick:
        workload.peers = goals.asked_for(case, workload.peers)
    functions, absent = _present(workload)
    bound, bound_is = machine.bound(workload, device)
    timings, neighbours = _undisturbed(case, functions, device, seconds, allow_load)
    medians = {name: statistics.median(times) for name, times in timings.times.items()}
    own = medians[OWN]
    eager = [name for name in medians if name.startswith("eager")]
    return {
        **case.as_json(),
        **machine.description(device),
        "quick": quick,
        "load": machine.load_average(),
        "others_busy_cpus": None if neighbours.busy is None else round(neighbours.busy, 3),
        "load_allowed": allow_load,
        "median_us": {name: _us(value) for name, value in medians.items()},
        "min_us": {name: _us(min(times)) for name, times in timings.times.items()},
        "p90_us": {name: _us(_p90(times)) for name, times in timings.times.items()},
        "rounds": len(timings.times[OWN]),
        "calls_per_round": timings.calls,
        "elements": workload.elements,
        "rate": _rate(workload, own),
        "bound": {"us": _us(bound), "percent": _figures(100 * bound / own), "is": bound_is},
        "error": _errors(workload, functions),
        "error_of": workload.error_of,
        "ratio": {name: _figures(value / own) for name, value in medians.items() if name != OWN},
        "fastest_eager": min(eager, key=lambda name: medians[name]) if eager else None,
        "absent": absent,
    }


def _present(workload: Workload) -> tuple[dict[str, Function], dict[str, str]]:
    """The contenders that run, each called once, and why the others do not."""
    functions, absent = {OWN: workload.own}, {}
    for name, make in workload.peers.items():
        try:
            function = make()
            function()
        except Exception as error:  # a peer that fails, in whatever way, must not end the run
            absent[name] = reason(error)
        else:
            functions[name] = function
    return functions, absent


def _undisturbed(
    case: Case, functions: dict[str, Function], device: torch.device, seconds: float, allow_load: bool
) -> tuple[Timings, machine.Neighbours]:
    """Timings during which others left the machine alone."""
    for attempt in range(ATTEMPTS):
        neighbours = machine.Neighbours()
        with neighbours:
            timings = interleaved(functions, device, seconds)
        if neighbours.bearable or allow_load:
            return timings, neighbours
        if attempt + 1 < ATTEMPTS:
            print(f"{case.op} {case}: others kept {neighbours.busy:.2f} CPUs busy, once more", file=sys.stderr)
            time.sleep(PAUSE_SECONDS)
    raise MachineLoaded(
        f"bench: others kept {neighbours.busy:.2f} CPUs busy while {case.op} {case} was timed, more than "
        f"{neighbours.limit:.2f}, {ATTEMPTS} times in a row: end what else is running, or accept it by --allow-load"
    )


def _rate(workload: Workload, seconds: float) -> dict[str, float]:
    rate = {f"ns_per_{workload.unit}": _figures(1e9 * seconds / workload.elements)}
    if workload.flops:
        rate["TFLOP_per_s"] = _figures(workload.flops / seconds / 1e12)
    elif workload.bytes_moved:
        rate["GB_per_s"] = _figures(workload.bytes_moved / seconds / 1e9)
    return rate


def _errors(workload: Workload, functions: dict[str, Function]) -> dict[str, float]:
    """Each contender's error against float64."""
    if workload.error is None:
        return {}
    torch.manual_seed(0)
    errors = {name: workload.error(f()) for name, f in (workload.outputs or functions).items() if name in functions}
    return {name: float(f"{error:.3g}") for name, error in errors.items() if error is not None}


def _p90(times: list[float]) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[-1]


def _us(seconds: float) -> float:
    return _figures(1e6 * seconds)


def _figures(value: float) -> float:
    return float(f"{value:.4g}")
