"""Peak memory of each contender, measured in a fresh process.

On CUDA by torch's allocator. On a CPU by the resident set, which counts everybody's memory and not torch's alone; Linux
resets its peak on request. The fresh process takes each larger allocation from the system and gives it back, so that
what one contender has freed does not serve the next unseen.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from .case import OWN, Absent, Case, Workload
from .goals import asked_for

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; setting it stops glibc from raising it


class FreshProcess:
    """A process that measures the peaks of one case after the other, and waits in between; to be used by `with`.

    Args:
        module: that has the cases' `workload`.
        device: where.
    """

    def __init__(self, module: str, device: torch.device) -> None:
        self.module, self.device = module, device
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "FreshProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def peaks(self, case: Case, quick: bool = False) -> dict[str, int | None]:
        """Contender → bytes at the peak of a call beyond those before it, the result included.

        With `quick` of those alone that goals are about. Contenders that cannot be measured are missing or None; all
        of them are where the process comes to its end.
        """
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"case": case.as_json(), "quick": quick}), file=process.stdin, flush=True)
        answer = next((line for line in process.stdout if line.startswith("{")), None)  # a peer may print, too
        if answer is None:
            status = process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with status {status}"
            print(f"peak memory of {case.op} {case} is not known: {reason}", file=sys.stderr)
            self._end()
        return {} if answer is None else json.loads(answer)

    def _start(self) -> "subprocess.Popen[str]":
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        call = f"answer({self.module!r}, {str(self.device)!r}, {torch.get_num_threads()})"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import answer; {call}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()  # the end of its input is the end of its work
            self._errors.close()
            self._process = None


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


def answer(module: str, device: str, threads: int) -> None:
    """What the fresh process does: a line of JSON for each line, a case, on standard input."""
    torch.set_num_threads(threads)
    make = importlib.import_module(module).workload
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(0)
        case = Case(**request["case"])
        workload = make(case, torch.device(device))
        if request["quick"]:
            workload.peers = asked_for(case, workload.peers)
        print(json.dumps(measure(workload, torch.device(device))), flush=True)
