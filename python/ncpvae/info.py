"""What this installation is made of and which kernels it uses: `python -m ncpvae.info`."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from .ops import _library

OPS = (
    "sir_resample",
    "sir_update",
    "sir_merge",
    "langevin_step",
    "langevin_step_",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "gaussian_logsumexp",
    "gaussian_logsumexp_backward",
)
DISPATCH_KEYS = ("CPU", "CUDA")


def info() -> str:
    """Versions, devices, the build, and the kernel that serves each op on each kind of device."""
    build, capability, problem = _build()
    lines = [
        f"ncpvae       {_package_version()}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__}, {torch.get_num_threads()} thread(s)",
        f"processor    {capability}",
        *(f"device       {line}" for line in _devices()),
    ]
    if problem:
        lines.append(f"build        none: {problem}")
    else:
        cuda = f"{build['cuda_compiler']} for {build['cuda_architectures']}" if build["cuda_compiler"] else "no CUDA"
        lines.append(f"build        {build['compiler']}, {cuda}, against torch {build['torch']}")
    lines += [f"library      {file} for {key}" for key, file in _library.LOADED.items()]
    lines += ["", f"{'op':<32}{'CPU':<14}CUDA"]
    lines += [f"{op:<32}{kernel_of(op, 'CPU'):<14}{kernel_of(op, 'CUDA')}" for op in OPS]
    lines += [""] * bool(_library.NATIVE_UNAVAILABLE)
    lines += [f"no native {key} kernels: {why}" for key, why in _library.NATIVE_UNAVAILABLE.items()]
    return "\n".join(lines)


def kernel_of(op: str, dispatch_key: str) -> str:
    """'native' where a compiled kernel serves `op` on tensors of the dispatch key, else 'plain torch'."""
    native = torch._C._dispatch_has_kernel_for_dispatch_key(f"ncpvae::{op}", dispatch_key)
    return "native" if native else "plain torch"


def _package_version() -> str:
    try:
        return f"{version('ncpvae')} in {_library.PACKAGE}"
    except PackageNotFoundError:
        return f"not installed, used from {_library.PACKAGE}"


def _build() -> tuple[dict, str, str | None]:
    """Facts from the compiled module, the processor's level, and why there is no such module, if there is none."""
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return {}, platform.machine(), f"ncpvae._C cannot be imported: {error}"
    return _C.build_info(), f"{platform.machine()}, {_C.cpu_capability()}", None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA device"]
    names = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in names]


if __name__ == "__main__":
    sys.stdout.write(info() + "\n")
