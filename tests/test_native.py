"""What C++ there is besides the CUDA kernels: the headers against known answers, the CPU kernels under sanitizers."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

import compiler
import emulation
import pytest

pytestmark = pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler found")
PROGRAMS = Path(__file__).parent / "native"
#: as CMakeLists.txt compiles the CPU kernels
CPU_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
LEVELS = {
    "baseline": [],
    "x86-64-v3": ["-march=x86-64-v3"],
    "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
AMX = "x86-64-v4-amx"
LEVELS[AMX] = [*LEVELS["x86-64-v4"], "-mamx-tile", "-mamx-bf16"]
CAPABILITY = """
#include <cstdio>
#include "cpu/capability.h"
int main() { std::puts(ncpvae::cpu_capability()); }
"""


def run_program(source: Path, *flags: str) -> str:
    """Compile and run; what it printed."""
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror", *flags]
    program = compiler.link_program(
        source.stem, [compiler.compile_object(source, strict, [compiler.CSRC, PROGRAMS])], flags
    )
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> list[str]:
    """The instruction set levels that the CPU kernels are compiled for and this processor has."""
    source = tmp_path_factory.mktemp("capability") / "capability.cpp"
    source.write_text(CAPABILITY)
    return list(LEVELS)[: list(LEVELS).index(run_program(source).strip()) + 1]


# --- headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*_test.cpp")))
def test_header_under_sanitizers(name):
    run_program(PROGRAMS / f"{name}.cpp", "-O1", *compiler.ADDRESS_SANITIZER)


def test_vector_math_keeps_its_bounds_on_every_instruction_set(levels):
    """And its sums are the same on all, bit for bit."""
    source = PROGRAMS / "vector_math_test.cpp"
    digests = {level: run_program(source, "-O3", *CPU_FLAGS, *LEVELS[level]) for level in levels}
    assert len(set(digests.values())) == 1, digests


def test_products_on_the_registers_of_the_processor(levels):
    """As in the test of the header, which has arrays in their place."""
    if AMX not in levels:
        pytest.skip("this processor has no AMX")
    run_program(PROGRAMS / "tiles_test.cpp", "-O3", *CPU_FLAGS, *LEVELS[AMX])


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("volatile int four[4] = {}; volatile int* p = four; p += 4; return *p;", "stack-buffer-overflow"),
        ("volatile int big = 2147483647, more = big + 1; return more;", "signed integer overflow"),
    ],
    ids=["address", "undefined"],
)
def test_the_sanitizers_are_there(fault, found, tmp_path):
    source = tmp_path / "fault.cpp"
    source.write_text(f"int main() {{ {fault} }}\n")
    flags = ["-O0", *compiler.ADDRESS_SANITIZER]
    program = compiler.link_program("fault", [compiler.compile_object(source, flags, [])], flags)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode != 0 and found in run.stderr


# --- CPU kernels --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS if level != AMX])
def test_cpu_kernels_under_sanitizers(level, levels):
    if level not in levels:
        pytest.skip(f"this processor has no {level}")
    library = sanitized((compiler.CSRC / "cpu").glob("*.cpp"), LEVELS[level])
    run = emulation.run_tests(
        [library], "tests/ops", "-k", "matches or gradient_error or in_place or edge", flavour="address"
    )
    emulation.assert_passed(run, at_least=200)


@pytest.mark.slow
@pytest.mark.parametrize("registers", ["arrays", AMX])
def test_products_on_tiles_under_sanitizers(registers, levels):
    """The one op that makes use of AMX; with arrays in place of its registers what they load is watched as well."""
    if registers == AMX and AMX not in levels:
        pytest.skip("this processor has no AMX")
    flags = LEVELS[AMX] if registers == AMX else ["-DNCPVAE_EMULATED_TILES"]
    library = sanitized([compiler.CSRC / "cpu" / "similarity_logsumexp.cpp"], flags)
    run = emulation.run_tests(
        [library], "tests/ops/test_similarity_logsumexp.py", "-k", "not opcheck and not compiles", flavour="address"
    )
    emulation.assert_passed(run, at_least=500)


def sanitized(sources: Iterable[Path], flags: list[str]) -> Path:
    """A library of these kernels that watches its own memory and arithmetic."""
    flags = [*compiler.KERNEL_FLAGS, "-O1", *CPU_FLAGS, *flags, *compiler.ADDRESS_SANITIZER]
    objects = compiler.in_parallel(lambda path: compiler.compile_object(path, flags, [compiler.CSRC]), sorted(sources))
    return compiler.link_kernels("sanitized-cpu", objects, compiler.ADDRESS_SANITIZER)
