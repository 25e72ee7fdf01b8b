"""Everything that only a machine with a GPU can say of the CUDA kernels, in one JSON file: `make gpu-check`.

    python benchmarks/gpu_check.py [--results FOLDER] [--installed]

Its steps: build with CUDA, the CUDA tests, compute-sanitizer's memcheck and racecheck where it is installed, and every
benchmark. A step that fails costs nothing but itself: the others run, all that is known is written to
`benchmarks/results/gpu-check-<device>.json`, and then the exit status says that something failed. It needs no network:
it runs in the interpreter at hand, which must have torch, pytest and what else the package depends on, and installs
nothing. The kernels are built into python/ncpvae, unless `--installed` says that the installed package is to be used.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: tests that between them launch every kernel, and few enough for a tool that slows them down a hundredfold
SANITIZED = "matches or formula or gradient_error or in_place_is"
TAIL = 4000  # characters of a failed step's output that are kept
LIMIT = 1800.0  # seconds that one command may take
#: runs a command in ROOT → (exit status, what it wrote)
Run = Callable[[Sequence[str]], tuple[int, str]]


def run_and_echo(command: Sequence[str]) -> tuple[int, str]:
    """Shows the output as it comes and returns it."""
    print("$", *command, flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    limit = threading.Timer(LIMIT, process.kill)
    limit.start()
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    limit.cancel()
    return process.wait(), "".join(lines)


FACTS = """
import json, torch, ncpvae
from ncpvae.ops import _library
device = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "device": device and device.name,
    "capability": device and f"{device.major}.{device.minor}",
    "memory_bytes": device and device.total_memory,
    "multiprocessors": device and device.multi_processor_count,
    "torch": torch.__version__, "torch_cuda": torch.version.cuda, "ncpvae": ncpvae.__version__,
    "kernels": _library.LOADED, "kernels_unavailable": _library.NATIVE_UNAVAILABLE,
}))
"""


# --- steps: each runs its commands and returns a record, whose "ok" is False where something is wrong ---------


def _outcome(status: int, output: str, **more: object) -> dict:
    record = {"ok": status == 0, "exit_status": status, **more}
    return record if status == 0 else {**record, "output_tail": output[-TAIL:]}


def describe(run: Run) -> dict:
    """Device, driver and versions; not ok where there is no device, or where the CUDA kernels are not in use."""
    status, output = run([sys.executable, "-c", FACTS])
    facts = _json_object(output.strip().rpartition("\n")[2]) or {}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    for name, command in (("driver", query), ("nvcc", ["nvcc", "--version"])):
        facts[name] = run(command)[1].strip() if shutil.which(command[0]) else None
    status = status or int("CUDA" not in facts.get("kernels", {}))
    return _outcome(status, output, python=platform.python_version(), **facts)


def build(run: Run) -> dict:
    """The kernels, CPU and CUDA, in place: python/ncpvae."""
    configure = ["-S", ".", "-B", "build/gpu-check", f"-DPython_EXECUTABLE={sys.executable}", "-DNCPVAE_CUDA=ON"]
    place = ["-DNCPVAE_INSTALL_DIR=.", f"-DCMAKE_INSTALL_PREFIX={ROOT / 'python' / 'ncpvae'}"]
    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    compile_all = ["--build", "build/gpu-check", "--parallel", str(os.cpu_count())]
    for arguments in ([*configure, *place], compile_all, ["--install", "build/gpu-check"]):
        status, output = run([*cmake, *arguments])
        if status:
            break
    return _outcome(status, output)


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "tests/ops", "tests/test_samplers.py", "-m", "cuda", "-q", *arguments]


def _counts(output: str) -> dict[str, int]:
    """{"passed": 654, "failed": 1, …} from pytest's last words."""
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", "\n".join(output.splitlines()[-3:]))
    return {word.rstrip("s") if word.startswith("error") else word: int(number) for number, word in found}


def tests(run: Run) -> dict:
    status, output = run(_pytest("--tb=short"))
    counts = _counts(output)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return _outcome(status or int(not counts.get("passed")), output, **counts, failed_tests=failed)


def sanitizer(tool: str) -> Callable[[Run], dict]:
    def step(run: Run) -> dict:
        if shutil.which("compute-sanitizer") is None:
            return {"ok": True, "left_out": "compute-sanitizer is not installed"}
        # Without torch's own cache, every tensor is an allocation whose bounds the tool knows.
        command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool]
        command += ["--error-exitcode", "86", *_pytest("-k", SANITIZED)]
        status, output = run(command)
        summary = re.findall(r"={9} ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
        return _outcome(status, output, summary=summary[-1] if summary else None, **_counts(output))

    return step


def benchmarks(run: Run) -> dict:
    """Every file that `make bench` runs; the JSON lines that they write are records, also those before a failure."""
    records, failed = [], {}
    for file in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "records.jsonl"
            status, output = run([sys.executable, f"benchmarks/{file.name}", "--output", str(lines)])
            text = lines.read_text() if lines.exists() else ""
        records += [record for line in text.splitlines() if (record := _json_object(line))]
        if status:
            failed[file.name] = output[-TAIL:]
    return {"ok": not failed and bool(records), "records": records, "failed": failed}


def _json_object(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


STEPS: dict[str, Callable[[Run], dict]] = {
    "build": build,
    "machine": describe,
    "tests": tests,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "benchmarks": benchmarks,
}


# --- all of it ----------------------------------------------------------------------------------------------


def check(steps: dict[str, Callable[[Run], dict]], run: Run, folder: Path) -> tuple[bool, Path]:
    """Run the steps, whatever becomes of each, and write the file after every one: (all is well, the file)."""
    result: dict = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "ok": False, "steps": {}}
    path = folder / "gpu-check-unknown.json"
    folder.mkdir(parents=True, exist_ok=True)
    for name, step in steps.items():
        start = time.monotonic()
        try:
            record = step(run)
        except Exception as error:  # one step's fault must not cost the others' results
            record = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result["steps"][name] = {**record, "seconds": round(time.monotonic() - start, 1)}
        print(f"gpu-check: {name}: {'ok' if record['ok'] else 'FAILED'}", flush=True)
        if record.get("device"):
            path.unlink(missing_ok=True)
            path = folder / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', record['device'].lower()).strip('-')}.json"
        result["ok"] = all(record["ok"] for record in result["steps"].values()) and len(result["steps"]) == len(steps)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return result["ok"], path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--installed", action="store_true", help="use the installed package and build nothing")
    options = parser.parse_args()
    steps = {name: step for name, step in STEPS.items() if name != "build" or not options.installed}
    if not options.installed:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    ok, path = check(steps, run_and_echo, options.results)
    print(f"gpu-check: {'all is well' if ok else 'something FAILED'}; {path}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
