"""The CUDA kernels on the CPU: csrc/cuda compiled as C++ against cuda_emulation/, and the ops' tests run on them.

    python tests/emulation.py [--flavour plain|address|races] [arguments of pytest]

Flavours: `plain` is fast; `address` has AddressSanitizer and UndefinedBehaviorSanitizer; `races` watches every access
to memory, see cuda_emulation/races.cpp. Of the tests that are named, those run that take the `device` fixture.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import compiler

TESTS = Path(__file__).resolve().parent
SHIM = TESTS / "cuda_emulation"
FLAVOURS = {
    "plain": ["-O2"],
    "address": ["-O1", *compiler.ADDRESS_SANITIZER],
    "races": ["-O1", "-fsanitize=thread", "-fdata-sections"],
}

#: tests that between them reach every kernel and every dtype; the slower builds run these alone
CORE = (
    "matches or formula or any_shape or gradient_error or layout or bad or in_place or no_rows or empty or whole_tiles"
)


def build(flavour: str = "plain", csrc: Path = compiler.CSRC, machine_flags: tuple[str, ...] = ()) -> list[Path]:
    """A library for each file of `csrc`/cuda."""
    flags = [*compiler.KERNEL_FLAGS, "-Wno-unknown-pragmas", "-Wno-attributes", *FLAVOURS[flavour]]
    without_hooks = [flag for flag in flags if flag != "-fsanitize=thread"] + list(machine_flags)
    machine = [SHIM / "fibres.cpp"] + ([SHIM / "races.cpp"] if flavour == "races" else [])
    script = f"-Wl,-T,{SHIM / 'shared_memory.ld'}"
    link_flags = {"address": compiler.ADDRESS_SANITIZER, "races": [script]}.get(flavour, [])

    def library(source: Path) -> Path:
        return compiler.link_kernels(
            f"emulated-{source.stem}", [compiler.compile_object(source, flags, [SHIM, csrc]), *parts], link_flags
        )

    parts = compiler.in_parallel(lambda source: compiler.compile_object(source, without_hooks, [SHIM]), machine)
    return compiler.in_parallel(library, sorted((csrc / "cuda").glob("*.cu")))


def environment(libraries: list[Path], flavour: str = "plain") -> dict[str, str]:
    """For a pytest with `-p emulated_kernels`."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **(compiler.sanitized_environment() if flavour == "address" else {}),
        "PYTHONPATH": os.pathsep.join(paths),
        "NCPVAE_DISABLE_NATIVE": "1",
        "NCPVAE_TEST_KERNELS": os.pathsep.join(map(str, libraries)),
    }


def pytest_command(*arguments: str) -> list[str]:
    # --capture=sys leaves what a sanitizer writes to stderr where it can be seen although the process ends at once.
    plugins = ["-p", "emulated_kernels", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *plugins, "--capture=sys", "-q", *arguments]


def run_tests(libraries: list[Path], *arguments: str, flavour="plain", **variables: str) -> subprocess.CompletedProcess:
    """The ops' tests on these kernels, in a process of its own."""
    command = pytest_command("--tb=short", *arguments)
    variables = {**environment(libraries, flavour), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=compiler.ROOT, env=variables, capture_output=True, text=True)


def assert_passed(run: subprocess.CompletedProcess, at_least: int) -> None:
    """Every test that ran passed, and no fewer ran than there should be."""
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert passed and int(passed[1]) >= at_least, run.stdout[-500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavour", choices=FLAVOURS, default="plain")
    options, arguments = parser.parse_known_args()
    libraries = build(options.flavour)
    command = pytest_command(*(arguments or ["tests/ops"]))
    return subprocess.run(command, cwd=compiler.ROOT, env=environment(libraries, options.flavour)).returncode


if __name__ == "__main__":
    sys.exit(main())
