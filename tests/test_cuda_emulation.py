"""The CUDA kernels' own sources, run on the CPU: see emulation.py. What it cannot show is said in CONTRIBUTING.md.

- every test that a CUDA device would be given passes on them;
- a part of those, under AddressSanitizer and UndefinedBehaviorSanitizer, and under a race detector;
- mutants: the same tests fail once a bug is planted in the sources, so that passing means something.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import compiler
import emulation
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler found"),
]


def test_every_test_of_a_cuda_device_passes_on_the_cuda_kernels():
    run = emulation.run_tests(emulation.build(), "tests/ops", NCPVAE_TEST_DRAWS_PART="4")
    emulation.assert_passed(run, at_least=600)


@pytest.mark.parametrize("flavour", ["address", "races"])
def test_the_core_of_them_passes_where_memory_is_watched(flavour):
    run = emulation.run_tests(emulation.build(flavour), "tests/ops", "-k", emulation.CORE, flavour=flavour)
    emulation.assert_passed(run, at_least=300)


def test_blocks_that_take_several_shares_do_not_race():
    """A grid of two blocks, so that every kernel loops and uses its shared memory again."""
    run = emulation.run_tests(
        emulation.build("races"), "tests/ops", "-k", "matches or formula or gradient_error", CUDA_EMULATION_BLOCKS="2"
    )
    emulation.assert_passed(run, at_least=200)


def test_the_portable_switch_of_fibres_works_too():
    libraries = emulation.build(machine_flags=("-DEMULATION_UCONTEXT",))
    run = emulation.run_tests(libraries, "tests/ops/test_sir_resample.py", "-k", "matches")
    emulation.assert_passed(run, at_least=20)


# --- mutants ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A bug: in the one file among `files` that has `pattern` once, `pattern` becomes `replacement`."""

    files: str
    pattern: str
    replacement: str
    tests: str  # an expression for pytest -k
    caught_by: str  # what is in the output then
    flavour: str = "plain"


MUTANTS = {
    "off by one in a tile": Mutant(
        "cuda/tile.h",
        r"dims = min_int\(matrix\.dims - first_dim, kDepth\)",
        "dims = min_int(matrix.dims - first_dim - 1, kDepth)",
        "matches",
        "AssertionError: error ",
    ),
    "dropped lane in a warp's sum": Mutant(
        "cuda/launch.h",
        r"mask > 0(; mask /= 2\) value \+= shuffle_xor)",
        r"mask > 1\1",
        "sir_resample and matches",
        "AssertionError",
    ),
    "read past the end of a row": Mutant(
        "cuda/sir_*",
        r"first \+ i < length",
        "first + i <= length",
        "sir_resample and matches",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
    "shared memory taken for zero": Mutant(
        "cuda/similarity_logsumexp*",
        r"columns\[c\] = \{-INFINITY, 0\};",
        ";",
        "similarity and matches",
        "AssertionError: error nan",
        "races",
    ),
}


def barrier_mutants() -> dict[str, Mutant]:
    """For each source with barriers: without its first one."""
    first = re.compile(r"\A((?:(?!__syncthreads\(\);).)*)__syncthreads\(\);", re.DOTALL)
    sources = [path for path in sorted((compiler.CSRC / "cuda").iterdir()) if first.match(path.read_text())]
    return {
        f"missing barrier in {path.name}": Mutant(
            f"cuda/{path.name}", first.pattern, r"\1", "matches or gradient_error", "race in shared memory", "races"
        )
        for path in sources
    }


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc with the bug in it."""
    csrc = folder / "csrc"
    shutil.copytree(compiler.CSRC, csrc)
    found = {}
    for path in csrc.glob(mutant.files):
        text, count = re.subn(mutant.pattern, mutant.replacement, path.read_text(), flags=re.DOTALL)
        found |= {path: (text, count)} if count else {}
    counts = {path.name: count for path, (_, count) in found.items()}
    assert list(counts.values()) == [1], (
        f"{mutant.pattern!r} must be once in {mutant.files}, and is: {counts or 'nowhere'}. "
        "Where the kernels have changed, the mutant must be given another place."
    )
    ((path, (text, _)),) = found.items()
    path.write_text(text)
    return csrc


@pytest.mark.parametrize("name", [*MUTANTS, *barrier_mutants()])
def test_a_planted_bug_is_found(name, tmp_path):
    """Without the bug these tests pass: they are among those that the tests above run."""
    mutant = (MUTANTS | barrier_mutants())[name]
    libraries = emulation.build(mutant.flavour, plant(mutant, tmp_path))
    run = emulation.run_tests(libraries, "tests/ops", "-x", "-k", mutant.tests, flavour=mutant.flavour)
    assert run.returncode not in (0, 2, 3, 4, 5), f"the bug was not found:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    assert mutant.caught_by in run.stdout + run.stderr, run.stdout[-4000:] + run.stderr[-4000:]


def test_a_mutant_whose_text_is_gone_says_so(tmp_path):
    with pytest.raises(AssertionError, match="nowhere.*another place"):
        plant(Mutant("cuda/launch.h", "this is not in it", "", "", ""), tmp_path)
