"""nvcc compiles the kernels for every target within their budgets, and the library carries device code for each."""

import importlib
import os
import subprocess
from dataclasses import replace

import compiler
import cuda_build
import pytest

from ncpvae.ops import _library

needs_nvcc = pytest.mark.skipif(cuda_build.nvcc() is None, reason="no CUDA compiler (nvcc) found")

# --- registers, spills, shared memory -----------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_keeps_its_budget_on_every_target():
    made_with, allowed = cuda_build.read_table()
    if made_with != cuda_build.version():
        pytest.skip(f"{cuda_build.TABLE.name} is for nvcc {made_with}, and this is {cuda_build.version()}")
    found = cuda_build.violations(cuda_build.present_budgets(), allowed)
    assert not found, "\n".join([*found, "", str(cuda_build.__doc__)])


@pytest.fixture
def allowed() -> list[cuda_build.Budget]:
    return cuda_build.read_table()[1]


def test_the_table_allows_itself_and_no_spills(allowed):
    assert allowed and not cuda_build.violations(allowed, allowed)
    assert {b.target for b in allowed} == {f"sm_{t.split('-')[0]}" for t in cuda_build.TARGETS if "real" in t}


@pytest.mark.parametrize("amount", ["registers", "spill_stores", "spill_loads", "shared"])
def test_an_excess_is_named(amount, allowed):
    worse = replace(allowed[3], **{amount: getattr(allowed[3], amount) + 8})
    (found,) = cuda_build.violations([*allowed[:3], worse, *allowed[4:]], allowed)
    assert worse.kernel in found and f"{amount}: {getattr(worse, amount)}, allowed" in found


def test_a_kernel_without_a_budget_and_a_budget_without_a_kernel_are_named(allowed):
    (found,) = cuda_build.violations(allowed, allowed[1:])
    assert allowed[0].kernel in found and "not in the table" in found
    (found,) = cuda_build.violations(allowed[1:], allowed)
    assert allowed[0].kernel in found and "not in the sources" in found


SPILLS = """
__global__ void __launch_bounds__(1024) spills(float* x) {
  float v[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = v[199 - i] * v[i];
}
"""


@needs_nvcc
def test_a_kernel_that_spills_is_seen_to_spill(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    budgets = cuda_build.budgets_of_log("spills.cu", cuda_build.compile_kernels(source, [])[1])
    assert {b.target for b in budgets} == {"sm_80", "sm_90a", "sm_100"}
    assert all(b.kernel == "spills" and b.registers == 64 and b.spill_stores > 0 and b.spill_loads > 0 for b in budgets)


# --- device code --------------------------------------------------------------------------------------------


def assert_code_for(targets: list[str], library) -> None:
    """Every translation unit of the library has code for every target."""
    units = cuda_build.device_code(library)
    assert units, f"{library.name} holds no device code at all"
    for unit in units:
        assert not set(targets) - unit, f"{library.name} has no code for {sorted(set(targets) - unit)}: {sorted(unit)}"


def test_the_library_carries_device_code_for_every_target():
    promised = os.environ.get("NCPVAE_REQUIRE_NATIVE") == "1" and cuda_build.nvcc() is not None
    found = sorted(_library.PACKAGE.glob("libncpvae_cuda.*"))
    if not found and not promised:
        pytest.skip("the CUDA library is not built")
    assert found, "there is a CUDA compiler, and the CUDA library was not built"
    assert len(cuda_build.device_code(found[0])) == len(list((compiler.CSRC / "cuda").glob("*.cu")))
    built_for = importlib.import_module("ncpvae._C").build_info()["cuda_architectures"].split()
    assert_code_for(built_for, found[0])
    if promised:
        assert_code_for(cuda_build.TARGETS, found[0])


@pytest.fixture
def build_small(tmp_path):
    """An object with one empty kernel, for the targets given."""

    def build(*targets: str):
        source, built = tmp_path / "small.cu", tmp_path / f"{'_'.join(targets)}.o"
        source.write_text("__global__ void nothing() {}\nvoid launch() { nothing<<<1, 1>>>(); }\n")
        subprocess.run(
            [str(cuda_build.nvcc()), *map(cuda_build.generate, targets), "-c", source, "-o", built], check=True
        )
        return built

    return build


@needs_nvcc
@pytest.mark.parametrize("targets", [["80-real"], ["90a-real", "100-real"], ["90-real", "100-virtual"]], ids=str)
def test_targets_are_told_apart(targets, build_small):
    library = build_small(*targets)
    assert cuda_build.device_code(library) == [set(targets)]
    assert_code_for(targets, library)
    with pytest.raises(AssertionError, match="has no code for"):
        assert_code_for(cuda_build.TARGETS, library)


def test_a_library_without_device_code_is_seen_to_have_none():
    with pytest.raises(AssertionError, match="no device code at all"):
        assert_code_for(["80-real"], next(compiler.TORCH.glob("lib/libtorch.so")))
