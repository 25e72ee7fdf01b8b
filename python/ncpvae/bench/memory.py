"""Peak memory of each contender, measured in a fresh process.

On CUDA by torch's allocator. On a CPU by the resident set, which counts everybody's memory and not torch's alone; Linux
resets its peak on request. The fresh process takes each larger allocation from the system and gives it back, so that
what one contender has freed does not serve the next unseen.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .case import OWN, Absent, Case, Workload

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; setting it stops glibc from raising it


def peaks(module: str, cases: Sequence[Case], device: torch.device) -> list[dict[str, int | None]]:
    """For each case: contender → bytes at the peak of a call beyond those before it, the result included.

    None where a contender cannot be measured, and for all of them where the process ends before its time.

    Args:
        module: that has the cases' `workload`.
        cases: what is measured.
        device: where.
    """
    request = {
        "cases": [case.as_json() for case in cases],
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import answer; answer({module!r})"]
    done = subprocess.run(command, input=json.dumps(request), env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) < len(cases):
        why = (done.stderr.strip() or f"it ended with status {done.returncode}").splitlines()[-1]
        print(f"peak memory of {len(cases) - len(lines)} case(s) is not known: {why}", file=sys.stderr)
    return lines + [{}] * (len(cases) - len(lines))


def measure(workload: Workload, device: torch.device) -> dict[str, int | None]:
    """Contender → peak bytes. What torch.compile makes is left out, since it would be compiled once more."""
    makers: dict[str, Callable[[], Callable[[], Any]]] = {OWN: lambda: workload.own, **workload.peers}
    found: dict[str, int | None] = {}
    for name, make in makers.items():
        if name.startswith("compile"):
            continue
        try:
            found[name] = peak_bytes(make(), device)
        except (Absent, RuntimeError):  # the record says why a contender is absent
            continue
    return found


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Growth of the memory in use at its peak during a second call of `function`; None where it cannot be told."""
    function()  # what libraries keep for themselves after their first call is not counted
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is now what is resident
        before = _status("VmRSS")
        function()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    """Bytes of a field of this process's status, which Linux keeps to about 100 KiB."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def answer(module: str) -> None:
    """What the fresh process does: a line of JSON for each of the cases on standard input."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    device, workload = torch.device(request["device"]), importlib.import_module(module).workload
    for case in request["cases"]:
        torch.manual_seed(0)
        print(json.dumps(measure(workload(Case(**case), device), device)), flush=True)
