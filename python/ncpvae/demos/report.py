"""What a demo leaves behind: a table on the terminal, the same as JSON, and pictures, all in one folder."""

import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


def output_folder(path: str | os.PathLike) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: where it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output folder {str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder


@dataclass
class Report:
    """A demo's results in the making.

    Attributes:
        name: the demo's.
        folder: where the JSON file and the pictures go.
        columns: heads of the table's columns.
        protocol: sentences on how the figures came about.
    """

    name: str
    folder: Path
    columns: tuple[str, ...]
    protocol: list[str] = field(default_factory=list)
    rows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def row(self, label: str, *cells: str) -> None:
        """A line of the table; missing cells stay empty."""
        self.rows.append((label, cells + ("",) * (len(self.columns) - len(cells))))

    def figure(self, **values: float) -> None:
        """Numbers for the JSON file."""
        self.figures.update({name: float(value) for name, value in values.items()})

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def finish(self) -> Path:
        """Write `<name>.json` and return its path."""
        record = {
            "name": self.name,
            "figures": self.figures | {"seconds": round(self.seconds, 1)},
            "protocol": self.protocol,
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        self.row("seconds, all together", f"{self.seconds:.0f}")
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return path

    def __str__(self) -> str:
        table = [("", self.columns), *self.rows]
        first = max(len(label) for label, _ in table)
        widths = [max(len(cells[i]) for _, cells in table) for i in range(len(self.columns))]
        lines = ["", self.name, "=" * len(self.name)]
        for label, cells in table:
            lines.append(
                "  ".join([label.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip()
            )
        lines += ["", *self.protocol, "", *(f"picture: {path}" for path in self.pictures)]
        return "\n".join(lines)
