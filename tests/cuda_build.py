"""What nvcc makes of the kernels: registers, spills and shared memory of each, and the targets a library has code for.

    python tests/cuda_build.py      writes tests/cuda_budgets.csv anew from the present sources and compiler

The table is what test_cuda_build.py holds the kernels to. Write it anew after a change of the kernels, look at what it
changed (`git diff tests/cuda_budgets.csv`), and commit it with them.
"""

import csv
import os
import re
import shutil
import struct
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import compiler

TABLE = Path(__file__).with_name("cuda_budgets.csv")
#: as CMakeLists.txt has them; the last is PTX, for GPUs to come
TARGETS = ["80-real", "90a-real", "100-real", "100-virtual"]
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]


@dataclass(frozen=True)
class Budget:
    """A kernel on a target, and what it takes: `registers` per thread, the rest in bytes (`shared` is static alone)."""

    source: str
    kernel: str
    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def name(self) -> tuple[str, str, str]:
        return self.source, self.kernel, self.target

    def excess(self, allowed: "Budget") -> list[str]:
        """What this one takes more of than it is allowed."""
        amounts = [field.name for field in fields(self) if field.type is int]
        mine, theirs = asdict(self), asdict(allowed)
        return [f"{a}: {mine[a]}, allowed {theirs[a]}" for a in amounts if mine[a] > theirs[a]]


def nvcc() -> str | None:
    return shutil.which("nvcc")


@cache
def version() -> str:
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", text)[0]


def generate(target: str) -> str:
    number, kind = target.split("-")
    code = f"sm_{number}" if kind == "real" else f"compute_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def compile_kernels(source: Path, includes: list[Path]) -> tuple[Path, str]:
    """The object for all targets, and what ptxas said; both are kept in build/tests."""
    command = [*FLAGS, "-Xptxas", "-v", *map(generate, TARGETS), "-c", source]
    headers = sorted(path for folder in includes for path in folder.rglob("*.h"))
    inputs = [f"{version()} {command[:-1]}".encode(), *(path.read_bytes() for path in (source, *headers))]
    folders = [f"-I{folder}" for folder in includes] + ["-isystem", str(compiler.TORCH / "include")]
    made = compiler.make(f"{source.stem}.cuda.o", inputs, [*command, *folders], program=nvcc(), keep_log=True)
    return made, made.with_suffix(".log").read_text()


def plain_names(mangled: list[str]) -> list[str]:
    """`ncpvae::cuda::<a namespace with a hash>::step<c10::Half, ncpvae::Base>(…)` → `step<Half, Base>`."""
    lines = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [re.sub(r"\w+::|\(anonymous namespace\)::", "", line) for line in lines.stdout.splitlines()]


ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)


def budgets_of_log(source: str, log: str) -> list[Budget]:
    """From what `ptxas -v` says."""
    entries = ENTRY.findall(log)
    names = plain_names([mangled for mangled, _, _ in entries])

    def amount(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    return [
        Budget(
            source,
            name,
            target,
            amount(r"Used (\d+) registers", text),
            amount(r"(\d+) bytes spill stores", text),
            amount(r"(\d+) bytes spill loads", text),
            amount(r"(\d+) bytes smem", text),
        )
        for name, (_, target, text) in zip(names, entries, strict=True)
    ]


def present_budgets() -> list[Budget]:
    """Of every kernel in csrc/cuda, on every target."""
    sources = sorted((compiler.CSRC / "cuda").glob("*.cu"))
    logs = compiler.in_parallel(lambda source: compile_kernels(source, [compiler.CSRC])[1], sources)
    budgets = [b for source, log in zip(sources, logs, strict=True) for b in budgets_of_log(source.name, log)]
    return sorted(budgets, key=lambda budget: budget.name)


def write_table(budgets: list[Budget], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# nvcc {version()}; made by `python tests/cuda_build.py`\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Budget)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, budgets))


def read_table(path: Path = TABLE) -> tuple[str, list[Budget]]:
    """The version of nvcc that it was made with, and its rows."""
    first, *lines = path.read_text().splitlines()
    whole = {field.name for field in fields(Budget) if field.type is int}
    rows = [{k: int(v) if k in whole else v for k, v in row.items()} for row in csv.DictReader(lines)]
    return re.findall(r"nvcc ([\d.]+)", first)[0], [Budget(**row) for row in rows]


def violations(present: list[Budget], allowed: list[Budget]) -> list[str]:
    """Kernels that take more than the table allows, that it does not know, or that it knows and that are gone."""
    table, known = {b.name: b for b in allowed}, {b.name for b in present}
    found = [f"{' '.join(b.name)}: not in the table" for b in present if b.name not in table]
    found += [f"{' '.join(name)}: in the table, and not in the sources" for name in table if name not in known]
    for budget in present:
        if budget.name in table:
            found += [f"{' '.join(budget.name)}: {excess}" for excess in budget.excess(table[budget.name])]
    return found


# --- device code in a library -------------------------------------------------------------------------------

FATBIN_MAGIC = 0xBA55ED50
ONE_ARCHITECTURE = 0x100000


def section(library: bytes, name: str) -> bytes:
    """The content of a section of an ELF file (64 bits, little-endian), b"" where there is none."""
    table, size, count, names = *struct.unpack_from("<Q", library, 0x28), *struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", library, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        if library[start : library.index(b"\0", start)].decode() == name:
            return library[header[4] : header[4] + header[5]]
    return b""


def device_code(library: Path) -> list[set[str]]:
    """For each translation unit with device code, the targets: {"80-real", …, "100-virtual"}.

    Section .nv_fatbin is a row of containers, each a header (magic, version, header size, size of the rest) and
    entries: kind (1 PTX, 2 machine code), version, header size, payload size, …, the architecture's number 28 bytes on,
    and flags 40 bytes on, of which one says that the code is for this architecture alone (the "a" of sm_90a). NVIDIA
    does not document this; the test compiles for several targets and sees that they are told apart.
    """
    content, units, position = section(library.read_bytes(), ".nv_fatbin"), [], 0
    while position + 16 <= len(content):
        magic, _, header_size, size = struct.unpack_from("<IHHQ", content, position)
        if magic != FATBIN_MAGIC:
            position += 8  # padding between containers
            continue
        entry, end = position + header_size, position + header_size + size
        targets = set()
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", content, entry)
            (architecture,) = struct.unpack_from("<I", content, entry + 28)
            (flags,) = struct.unpack_from("<Q", content, entry + 40)
            letter = "a" if flags & ONE_ARCHITECTURE else ""
            targets.add(f"{architecture}{letter}-{'virtual' if kind == 1 else 'real'}")
            entry += entry_header + payload
        units.append(targets)
        position = end
    return units


if __name__ == "__main__":
    os.chdir(compiler.ROOT)
    write_table(present_budgets())
    print(f"{TABLE.relative_to(compiler.ROOT)}: {len(read_table()[1])} rows, nvcc {version()}")
