"""The torch library: every op is there, and what cannot be loaded costs speed and one warning, nothing else."""

import importlib
import os
import shutil
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.utils.checkpoint

import ncpvae.ops
from ncpvae.ops import _library

OPS = [
    "sir_resample",
    "sir_update",
    "sir_merge",
    "langevin_step",
    "langevin_step_",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "gaussian_logsumexp",
    "gaussian_logsumexp_backward",
]
NATIVE = [name for name in OPS if name != "sir_merge"]  # its O(B·n) work needs no kernel of its own
ALL_OPS_RUN = """
import torch
from ncpvae import ops
z, seed = torch.randn(4, 3), ops.draw_seed()
ops.sir_resample(z, seed)
ops.sir_merge(ops.sir_update(ops.sir_state(4), z, seed), ops.sir_update(ops.sir_state(4, first_index=1024), z, seed))
ops.langevin_step_(ops.langevin_step(z, z, seed, 0.1), z, seed, 0.1)
leaf = z.clone().requires_grad_()
(ops.gaussian_logsumexp(leaf, z, z).sum() + sum(o.sum() for o in ops.similarity_logsumexp(leaf, z, 1.0))).backward()
assert leaf.grad.isfinite().all()
print("all ops ran;", ops._library.NATIVE_UNAVAILABLE.get("CPU", "native"))
"""


@pytest.mark.parametrize("name", OPS)
def test_op_is_in_torchs_library_with_a_kernel_for_every_device(name):
    assert hasattr(torch.ops.ncpvae, name)
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.ncpvae, name).default.tags
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"ncpvae::{name}", "CompositeExplicitAutograd")
    for key in ("CPU", "CUDA") if name in NATIVE else ():
        assert has_kernel(f"ncpvae::{name}", key) == (key not in _library.NATIVE_UNAVAILABLE)


def test_native_kernels_are_loaded_where_they_are_promised():
    if os.environ.get("NCPVAE_REQUIRE_NATIVE", "0") != "1":
        pytest.skip("NCPVAE_REQUIRE_NATIVE is not 1")
    assert "CPU" not in _library.NATIVE_UNAVAILABLE, _library.NATIVE_UNAVAILABLE["CPU"]


@pytest.mark.parametrize("level", _library.CPU_CAPABILITIES)
def test_every_instruction_set_makes_the_same_draws(level):
    """Indices and noise of each build of the CPU kernels that can run here are those of the reference."""
    if "CPU" in _library.NATIVE_UNAVAILABLE:
        pytest.skip("native CPU kernels are not in use")
    program = """
import torch
from ncpvae import ops
print(ops._library.LOADED["CPU"])
seed = torch.tensor([3, 5])
w = torch.randn(16, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
assert torch.equal(ops.sir_resample(w, seed, 8)[0], ops.reference.sir_resample(w, seed, 8)[0])
z = torch.zeros(1001)
torch.testing.assert_close(ops.langevin_step(z, z, seed, 1.0), ops.reference.langevin_step(z, z, seed, 1.0))
"""
    environment = {**os.environ, "NCPVAE_CPU_CAPABILITY": level}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if run.returncode and "on this processor" in run.stderr:
        pytest.skip(f"this processor has no {level}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith("libncpvae_cpu" + _library.CPU_CAPABILITIES[level] + ".")


def test_an_unknown_instruction_set_is_named():
    environment = {**os.environ, "NCPVAE_CPU_CAPABILITY": "avx9", "NCPVAE_DISABLE_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", "import ncpvae"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    assert "NCPVAE_CPU_CAPABILITY must be one of baseline" in run.stderr and "got 'avx9'" in run.stderr


# --- load_native on a package folder of our making ----------------------------------------------------------


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load_native on an empty package folder: what it warned of the CPU, and the reasons it noted."""
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(_library, "NATIVE_UNAVAILABLE", {})
    monkeypatch.setattr(_library, "LOADED", {})
    monkeypatch.delenv("NCPVAE_DISABLE_NATIVE", raising=False)

    def load_and_listen():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _library.load_native()
        return [w for w in caught if "CUDA ops" not in str(w.message)], _library.NATIVE_UNAVAILABLE

    return load_and_listen


def test_a_library_that_was_not_built_is_one_warning(load):
    caught, unavailable = load()
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "libncpvae_cpu was not built" in str(caught[0].message) and "plain torch" in str(caught[0].message)
    assert "was not built" in unavailable["CPU"] and "CUDA" in unavailable


def test_a_level_that_no_library_was_built_for_takes_the_next_lower(tmp_path, monkeypatch):
    """A compiler may not have known the highest."""
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.delenv("NCPVAE_CPU_CAPABILITY", raising=False)
    processor = types.SimpleNamespace(cpu_capability=lambda: list(_library.CPU_CAPABILITIES)[-1])
    monkeypatch.setattr(importlib, "import_module", lambda name: processor)
    found = [_library._cpu_library()]
    for end in _library.CPU_CAPABILITIES.values():
        (tmp_path / f"libncpvae_cpu{end}.so").touch()
        found.append(_library._cpu_library())
    assert found == ["libncpvae_cpu", *(f"libncpvae_cpu{end}" for end in _library.CPU_CAPABILITIES.values())]


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + 100 * b"\0"], ids=["empty", "text", "torn"])
def test_a_broken_library_is_one_warning_that_says_so(load, tmp_path, content):
    (tmp_path / "libncpvae_cpu.so").write_bytes(content)
    caught, unavailable = load()
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "libncpvae_cpu.so failed to load: " in str(caught[0].message)
    assert "failed to load" in unavailable["CPU"] and "\n" not in unavailable["CPU"]


def test_disabled_libraries_are_not_even_looked_for(load, tmp_path, monkeypatch):
    (tmp_path / "libncpvae_cpu.so").write_bytes(b"not a library")
    monkeypatch.setenv("NCPVAE_DISABLE_NATIVE", "1")
    caught, unavailable = load()
    assert not caught
    assert all("NCPVAE_DISABLE_NATIVE" in unavailable[key] for key in ("CPU", "CUDA"))


@pytest.mark.parametrize("value", ["", "0"])
def test_disabling_can_be_switched_off(load, monkeypatch, value):
    monkeypatch.setenv("NCPVAE_DISABLE_NATIVE", value)
    caught, unavailable = load()
    assert len(caught) == 1 and "NCPVAE_DISABLE_NATIVE" not in unavailable["CPU"]


# --- the whole package, in a process of its own -------------------------------------------------------------


@pytest.mark.parametrize("state", ["no library", "broken library", "disabled"])
def test_all_ops_run_without_native_kernels(state, tmp_path):
    source = _library.PACKAGE
    shutil.copytree(source, tmp_path / "ncpvae", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if state != "no library":
        (tmp_path / "ncpvae" / "libncpvae_cpu.so").write_bytes(b"not a library")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NCPVAE_DISABLE_NATIVE": str(int(state == "disabled"))}
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", ALL_OPS_RUN]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reason = {"no library": "was not built", "broken library": "failed to load", "disabled": "NCPVAE_DISABLE_NATIVE"}
    assert run.stdout.startswith("all ops ran; ") and reason[state] in run.stdout, run.stdout
    assert run.stderr.count("RuntimeWarning: ncpvae runs its CPU ops") == int(state != "disabled"), run.stderr


def test_no_gradient_is_lost_where_the_gradients_layer_is_passed_by():
    """Without a gradient to compute, ops skip torch's Python layer for it; other ways of asking for one must not."""
    means = torch.randn(5, 3)

    def total(z):
        return ncpvae.ops.gaussian_logsumexp(z, means, torch.zeros_like(means)).sum()

    z = torch.randn(4, 3)
    leaf = z.clone().requires_grad_()
    assert not total(z).requires_grad
    assert total(leaf).requires_grad
    with torch.no_grad():
        assert not total(leaf).requires_grad
    with pytest.raises(RuntimeError):  # torch's function transforms do not take gradients registered from Python
        torch.func.grad(total)(z)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        total(torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)))


SEED = torch.tensor([3, 4])
DIFFERENTIABLE = {
    "sir_resample": lambda a, b: ((a, SEED, 2), [1, 2]),
    "langevin_step": lambda a, b: ((a, b, SEED, 0.3, b[0], b[0].exp(), 1.0), [0]),
    "similarity_logsumexp": lambda a, b: ((a, b, a.sum()), [0, 1]),
    "gaussian_logsumexp": lambda a, b: ((a, b, 0.1 * b, b[:, 0]), [0]),
}


def test_every_op_with_a_gradient_is_compared():
    assert {op.name().removeprefix("ncpvae::") for op in _library.DIFFERENTIABLE} == set(DIFFERENTIABLE)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_both_ways_to_a_gradient_agree(name):
    """Calls record a function of autograd's own; compilers get the gradient that is registered with the op."""
    torch.manual_seed(0)
    leaves = [torch.randn(5, 3).requires_grad_() for _ in range(2)]
    found = []
    for function in (getattr(ncpvae.ops, name), getattr(torch.ops.ncpvae, name)):
        arguments, differentiable = DIFFERENTIABLE[name](*leaves)
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert [out.requires_grad for out in outputs] == [i in differentiable for i in range(len(outputs))]
        value = sum(
            (outputs[i] * torch.arange(outputs[i].numel()).view(outputs[i].shape)).sum() for i in differentiable
        )
        found.append((outputs, torch.autograd.grad(value, leaves, allow_unused=True)))
    assert found[0][0][differentiable[0]].grad_fn.name() == f"ncpvae_{name}Backward"
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointing_and_tracing(name):
    torch.manual_seed(0)
    leaves = [torch.randn(5, 3).requires_grad_() for _ in range(2)]

    def function(*leaves):
        arguments, differentiable = DIFFERENTIABLE[name](*leaves)
        outputs = getattr(ncpvae.ops, name)(*arguments)
        return outputs[differentiable[-1]] if isinstance(outputs, tuple) else outputs

    kept = torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)
    computed_again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    found = torch.autograd.grad(computed_again.sum(), leaves, allow_unused=True)
    torch.testing.assert_close(found, kept, rtol=0, atol=0)
    assert f"ncpvae::{name}" in str(torch.jit.trace(function, leaves, check_trace=False).graph)  # and can be saved


def test_the_plain_kernels_keep_their_precision_under_autocast():
    x = torch.nn.functional.normalize(torch.randn(64, 8), dim=1)
    kernel = _library._in_own_precision(ncpvae.ops.reference.similarity_logsumexp)
    expected = kernel(x, x, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = kernel(x, x, torch.tensor(100.0))
        rounded = ncpvae.ops.reference.similarity_logsumexp(x, x, torch.tensor(100.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (rounded[0] - expected[0]).abs().max() > 1e-2  # what autocast would do to it
