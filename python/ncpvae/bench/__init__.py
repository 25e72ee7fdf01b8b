"""Benchmarks of the ops: `ncpvae bench`, and `benchmarks/` for what is timed end to end.

A case (`case.py`) is data; the module named as the op lists its cases and makes each into a workload: the op, its
peers, what it has to move and compute, and its error. `timing.py` lets contenders take turns, `memory.py` measures
their peaks in a fresh process, `machine.py` knows what the machine can do, `record.py` makes one JSON object of it all,
`goals.py` holds it against what the package wants to be.
"""

from .case import OWN, Absent, Case, Function, Workload, require_memory
from .command import OPS, bench, run
from .goals import Outcome, outcomes
from .peers import compiled
from .record import MachineLoaded

__all__ = [
    "OPS",
    "OWN",
    "Absent",
    "Case",
    "Function",
    "MachineLoaded",
    "Outcome",
    "Workload",
    "bench",
    "compiled",
    "outcomes",
    "require_memory",
    "run",
]
