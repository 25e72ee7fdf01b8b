"""The torch library `ncpvae`: schemas defined from Python, kernels added by the compiled libraries.

The plain-torch function of an op is its default kernel (`CompositeExplicitAutograd`), so every op works on
every device that torch knows. `libncpvae_cpu` and `libncpvae_cuda` add kernels for their dispatch key to the
same schema when they are loaded; torch's dispatcher does the choosing.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

LIBRARY = torch.library.Library("ncpvae", "DEF")
PACKAGE = Path(__file__).resolve().parent.parent
#: why the native kernels of a dispatch key are not in use; a key that is missing here has its library loaded
NATIVE_UNAVAILABLE: dict[str, str] = {}
#: each op's gradient for autograd to record
DIFFERENTIABLE: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}
#: the library file in use for a dispatch key
LOADED: dict[str, str] = {}
#: levels of the x86-64 instruction set that the CPU kernels are compiled for, and the ends of the library's name
CPU_CAPABILITIES = {"baseline": "", "x86-64-v3": "_v3", "x86-64-v4": "_v4", "x86-64-v4-amx": "_v4_amx"}


def define(schema: str, reference: Callable, fake: Callable | None = None) -> None:
    """Define an op from its schema, with its plain-torch kernel and its shape function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _in_own_precision(reference), "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"ncpvae::{name}", fake, lib=LIBRARY)


def _in_own_precision(reference: Callable) -> Callable:
    """The same under autocast as without: as the compiled kernels, an op accumulates in float32 at least."""

    @functools.wraps(reference)
    def kernel(*arguments):
        device = next(argument.device.type for argument in arguments if isinstance(argument, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return reference(*arguments)
        with torch.autocast(device, enabled=False):
            return reference(*arguments)

    return kernel


def autograd(name: str, backward: Callable, setup_context: Callable) -> torch._ops.OpOverload:
    """Register the gradient of the op `name`, which is returned."""
    torch.library.register_autograd(f"ncpvae::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    op = getattr(torch.ops.ncpvae, name).default

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        setup_context(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    DIFFERENTIABLE[op] = type(f"ncpvae_{name}", (torch.autograd.Function,), methods)  # grad_fn shows the name
    return op


def call(op: torch._ops.OpOverload, *arguments):
    """`op(*arguments)`, all of them given, past its gradient's registration.

    A gradient registered from Python costs every call 5 μs, as much as a small kernel, and one that is recorded 20:
    where nobody can ask for a gradient none is prepared, and else the same formulas are recorded by a function of
    autograd's own. Compilers, tracers and function transforms get the op as it is, and so do tensors with a
    `__torch_function__` of their own.

    Raises:
        NotImplementedError: for forward-mode gradients, which would be lost without a word.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return op(*arguments)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
        raise NotImplementedError(f"{op.name()}: forward-mode gradients are not implemented, use reverse mode")
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return (op if has_torch_function(arguments) else DIFFERENTIABLE[op].apply)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _has_tangent(argument: object) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def load_native() -> None:
    """Load the compiled kernels that can run here; warn once where one that should load does not."""
    if os.environ.get("NCPVAE_DISABLE_NATIVE", "0") not in ("", "0"):
        NATIVE_UNAVAILABLE.update(CPU="NCPVAE_DISABLE_NATIVE is set", CUDA="NCPVAE_DISABLE_NATIVE is set")
        return
    _load("CPU", _cpu_library(), warn=True)
    if torch.version.cuda is None:
        NATIVE_UNAVAILABLE["CUDA"] = "this torch is built without CUDA"
    else:
        _load("CUDA", "libncpvae_cuda", warn=torch.cuda.is_available())


def _cpu_library() -> str:
    """The CPU library for this processor, or for the lower level that `NCPVAE_CPU_CAPABILITY` names."""
    try:
        highest = importlib.import_module(f"{__package__.rpartition('.')[0]}._C").cpu_capability()
    except ImportError:
        highest = "baseline"
    levels = list(CPU_CAPABILITIES)[: list(CPU_CAPABILITIES).index(highest) + 1]
    wanted = os.environ.get("NCPVAE_CPU_CAPABILITY") or highest
    if wanted not in levels:
        warnings.warn(
            f"NCPVAE_CPU_CAPABILITY must be one of {', '.join(levels)} on this processor, got {wanted!r}: "
            f"using {highest}",
            RuntimeWarning,
            stacklevel=2,
        )
        wanted = highest
    for level in reversed(levels[: levels.index(wanted) + 1]):  # a compiler may not have known the highest
        stem = "libncpvae_cpu" + CPU_CAPABILITIES[level]
        if any(PACKAGE.glob(f"{stem}.*")):
            return stem
    return "libncpvae_cpu"


def _load(dispatch_key: str, stem: str, warn: bool) -> None:
    found = sorted(PACKAGE.glob(f"{stem}.*"))
    if not found:
        compiler = "CUDA" if dispatch_key == "CUDA" else "C++"
        reason = f"{stem} was not built: no {compiler} compiler or no torch headers at install time"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            LOADED[dispatch_key] = found[0].name
            return
        except OSError as error:
            cause = str(error.__cause__ or error)  # torch wraps the linker's own words
            reason = f"{found[0].name} failed to load: {cause.splitlines()[0]}"
    NATIVE_UNAVAILABLE[dispatch_key] = reason
    if warn:
        warnings.warn(
            f"ncpvae runs its {dispatch_key} ops on plain torch, slower than its own kernels: {reason}. "
            "`python -m ncpvae.info` tells more.",
            RuntimeWarning,
            stacklevel=2,
        )
