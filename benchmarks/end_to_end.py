"""What the end-to-end benchmarks share: a module with `cases` and `workload` becomes a script."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from ncpvae.bench import Case, MachineLoaded, run


def alone(module: ModuleType, cases: Sequence[Case]) -> list[SimpleNamespace]:
    """The module as often as there are cases, each time with one of them.

    Memory is measured in a process for each module: what a large case has left behind in its process would be taken
    again by the next, and would be missing from its peak.
    """
    return [
        SimpleNamespace(__name__=module.__name__, workload=module.workload, cases=lambda *_, case=case: [case])
        for case in cases
    ]


def main(name: str, **sizes: str) -> None:
    """Time the cases of the module `name` and print them; exit status 1 on a loaded machine, 2 on bad input.

    Args:
        sizes: further arguments of the module's `cases`, positive integers, and what their flags' help says of them.
    """
    module = __import__(name)
    parser = argparse.ArgumentParser(description=module.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--output", type=Path, help="file for the figures, a JSON object per line")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each contender")
    parser.add_argument("--threads", type=int, help="torch's")
    parser.add_argument("--device", type=torch.device, help="cuda where there is one, by default")
    parser.add_argument("--allow-load", action="store_true", help="accept a machine that others keep busy")
    for size, meaning in sizes.items():
        parser.add_argument(f"--{size}", type=int, help=meaning)
    a = parser.parse_args()
    given = {size: getattr(a, size) for size in sizes if getattr(a, size) is not None}
    for size, value in given.items():
        if value < 1:
            parser.error(f"--{size} must be ≥ 1, got {value}")
    device = a.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        cases = module.cases(device, a.quick, **given)
        run(alone(module, cases), a.quick, a.output, a.seconds, a.threads, device, a.allow_load)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except MachineLoaded as error:
        sys.exit(str(error))
