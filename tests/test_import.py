"""Importing the package changes nothing but `sys.modules`, and takes little longer than importing torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "python"
#: every module of ours that needs torch alone
MODULES = ["ncpvae", "ncpvae.ops", "ncpvae.distributions", "ncpvae.nn", "ncpvae.vae", "ncpvae.nvae", "ncpvae.text_vae"]
MODULES += ["ncpvae.pixelcnn"]
MODULES += ["ncpvae.classifiers", "ncpvae.critics", "ncpvae.samplers", "ncpvae.priors", "ncpvae.objectives"]

SCRIPT = """
import importlib, importlib.util, json, logging, os, random, signal, sys, time, warnings
started = time.process_time()
import torch
torch_seconds = time.process_time() - started
import numpy

def state():
    backends = torch.backends
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "torch generator": torch.get_rng_state().tolist(),
        "python generator": hash(random.getstate()),
        "numpy generator": numpy.random.get_state()[1].tolist(),
        "numpy error handling": numpy.geterr(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "float32 precision": torch.get_float32_matmul_precision(),
        "tf32": (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "reduced precision": backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "print options": vars(torch._tensor_str.PRINT_OPTS),
        "warnings filters": list(warnings.filters),
        "showwarning": warnings.showwarning.__module__ + warnings.showwarning.__name__,
        "root logger": (logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable),
        "environment": dict(os.environ),
        "excepthook": repr(sys.excepthook),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "recursion limit": sys.getrecursionlimit(),
        "cuda initialised": torch.cuda.is_initialized(),
        "path": list(sys.path),
    }

before, filters, seconds = state(), list(warnings.filters), {}
for name in json.loads(sys.argv[1]):
    if name.count(".") and importlib.util.find_spec(name) is None:
        continue
    started = time.process_time()
    importlib.import_module(name)
    seconds[name] = time.process_time() - started
after = state()
loggers = logging.root.manager.loggerDict.items()
own = [(name, l.handlers) for name, l in loggers if name.startswith("ncpvae") and getattr(l, "handlers", [])]
print(json.dumps({
    "changed": {k: [str(before[k])[:300], str(after[k])[:300]] for k in before if before[k] != after[k]},
    "handlers": str(own) if own else "",
    "torch_seconds": torch_seconds,
    "seconds": seconds,
    "modules": sorted(sys.modules),
}))
"""


def run(modules, native: bool):
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "NCPVAE_DISABLE_NATIVE": str(int(not native))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(modules)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module", params=[True, False], ids=["native", "native disabled"])
def imported(request):
    return run(MODULES, request.param)


def test_import_changes_no_global_state(imported):
    report, _ = imported
    assert "ncpvae.ops" in report["seconds"]
    assert not report["changed"]
    assert not report["handlers"], "a library adds no log handlers"


def test_import_prints_nothing_and_warns_of_missing_kernels_at_most(imported):
    _, done = imported
    assert len(done.stdout.splitlines()) == 1
    for line in done.stderr.splitlines():
        assert "ncpvae runs its" in line or line.startswith("  "), done.stderr


def test_import_leaves_heavy_modules_alone(imported):
    """Deterministic half of the import time: none of these is needed before it is used."""
    heavy = ["torch._dynamo", "torch._inductor", "matplotlib", "datasets", "sklearn", "torchmetrics", "pandas", "tyro"]
    assert not set(heavy) & set(imported[0]["modules"])


def test_import_takes_little_longer_than_torchs_own():
    """In processor time, and the least of a few tries, since the machine may be busy with something else."""
    for _ in range(3):
        report, _ = run(["ncpvae", "ncpvae.ops"], native=True)
        ours, torchs = sum(report["seconds"].values()), report["torch_seconds"]
        if ours < 0.5 + 0.3 * torchs:
            return
    pytest.fail(f"importing ncpvae.ops took {ours:.2f} s on top of torch's {torchs:.2f} s")
