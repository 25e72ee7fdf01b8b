"""Timing shared by the benchmarks: contenders take turns, medians are compared, one JSON line is printed per case."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

import ncpvae
from ncpvae.info import kernel_of
from ncpvae.ops import _library

DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]


def _seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    op: str, case: dict, contenders: dict[str, Callable[[], object]], device: str, seconds: float = 1.0
) -> dict:
    """Time the contenders in turn for about `seconds` each and print and return the record.

    Args:
        op: its name.
        case: shape, dtype and whatever else sets the case apart.
        contenders: name → function; the first, the op itself, is what the others are compared with.
        device: "cpu" or "cuda".
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2):  # warm up
        for function in contenders.values():
            _seconds(function, device)
    deadline = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 5:
        for name, function in contenders.items():
            times[name].append(_seconds(function, device))
    medians = {name: statistics.median(t) for name, t in times.items()}
    own = medians[next(iter(contenders))]
    record = {
        "op": op,
        **case,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "kernel": _library.LOADED.get(device.upper()) or kernel_of(op, device.upper()),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "median_us": {name: round(1e6 * t, 1) for name, t in medians.items()},
        "min_us": {name: round(1e6 * min(t), 1) for name, t in times.items()},
        "ratio": {name: round(t / own, 2) for name, t in medians.items()},
        "repeats": len(next(iter(times.values()))),
        "torch": torch.__version__,
        "ncpvae": ncpvae.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(record), flush=True)
    return record
