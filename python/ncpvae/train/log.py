"""What a run leaves to read while it goes on: `metrics.jsonl`, one JSON object a line, and a progress bar."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import write_atomic

FILE = "metrics.jsonl"
RECOVERY = "recovery"  # the split of a record that tells of a way back, and of no batch


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a crash is left out.

    Raises:
        ValueError: for a line that is no JSON object, naming file and line.
    """
    records, lines = [], path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline after it: the write was cut short
                continue
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: must be a JSON object with a step")
        records.append(record)
    return records


class MetricsLog:
    """Appends records to `folder/metrics.jsonl`; does nothing without a folder.

    Args:
        folder: the run's, or None.
        step: the step a run goes on from: records of later steps, which will be made again, are dropped.
        recoveries: records of the ways back that the run has taken until then. The log is made to have these.
    """

    def __init__(self, folder: Path | None, step: int = 0, recoveries: Sequence[dict[str, Any]] = ()):
        self.path = None if folder is None else folder / FILE
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if self.path is not None and (self.path.exists() or recoveries):
            found = read_metrics(self.path) if self.path.exists() else []
            kept = [r for r in found if r in recoveries or (r["step"] <= step and r.get("split") != RECOVERY)]
            kept += [r for r in recoveries if r not in kept]  # the run was killed before it was written
            write_atomic(self.path, "".join(_line(record) for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))

    def sync(self) -> None:
        """Bring what was written to the disk, before a checkpoint that counts on it."""
        if self.path is not None and self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


class Means:
    """Running means of named numbers. The order of additions is all that counts, so a resumed one goes on exactly."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0):
        self.sums, self.count = dict(sums or {}), count
        if not all(isinstance(value, (int, float)) for value in (*self.sums.values(), count)):
            raise TypeError("running means must be numbers")

    def add(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means so far; it starts anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}
