"""What is timed: a case is data, a workload the functions and figures made from it on a device."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], Any]
OWN = "ncpvae"  # the contender that the others are compared with
FORWARD, BOTH = "forward", "forward and backward"


@dataclass(frozen=True)
class Case:
    """One size of one op.

    Attributes:
        op: its name.
        shape: sizes by their letter, or the whole shape under the name of a tensor.
        dtype: of the tensors, as torch names it.
        direction: "forward" or "forward and backward".
        settings: whatever else sets the case apart, a temperature for example.
    """

    op: str
    shape: dict[str, Any]
    dtype: str = "float32"
    direction: str = FORWARD
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = [f"{name}={_sized(value)}" for name, value in {**self.shape, **self.settings}.items()]
        return " ".join([*sizes, self.dtype, *([] if self.direction == FORWARD else [self.direction])])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def _sized(value: object) -> str:
    return "×".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Absent(Exception):
    """Why a peer does not take part."""


@dataclass
class Workload:
    """A case's inputs, held by the functions that are timed.

    Attributes:
        own: the package's function.
        peers: name → what makes the function to compare with, or raises `Absent` with the reason. Names that begin
            with "eager" are ways to write it in plain torch.
        unit: what the elements are: "weight", "element", "pair".
        elements: their number.
        bytes_moved: that the op cannot avoid to read and write.
        flops: floating-point operations that the op cannot avoid, a fused multiply-add being two …
        products: … and whether they are matrix products, which tensor cores can do.
        exponentials: that the op cannot avoid.
        error: the output of a contender → its error against float64, None where there is nothing to compare.
        error_of: what that is the error of, and its unit.
        outputs: name → a function to take the error of in place of the timed one.
    """

    own: Function
    peers: dict[str, Callable[[], Function]]
    unit: str
    elements: int
    bytes_moved: int = 0
    flops: int = 0
    products: bool = False
    exponentials: int = 0
    error: Callable[[Any], float | None] | None = None
    error_of: str = ""
    outputs: dict[str, Function] = field(default_factory=dict)


def call(case: Case, function: Callable[..., Any], *inputs: Tensor) -> Function:
    """A call of `function` on `inputs`, with the gradients of the sum of its outputs' means where the case has them.

    Both passes give (outputs, gradients).
    """
    if case.direction == FORWARD:
        arguments = tuple(t.detach() for t in inputs)
        return lambda: function(*arguments)
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)

    def both() -> Any:
        outputs = function(*leaves)
        total = outputs.mean() if isinstance(outputs, Tensor) else torch.stack([o.mean() for o in outputs]).sum()
        return outputs, torch.autograd.grad(total, leaves)

    return both


def largest_error(values: Tensor, truth: Tensor, relative: bool = False) -> float:
    """max |values − truth|, in units of max |truth| where `relative`; NaN stays NaN."""
    difference = (values.double() - truth).detach().abs().max()
    return float(difference / truth.detach().abs().max().clamp_min(1e-300) if relative else difference)


def require_memory(size: int, device: torch.device, what: str) -> None:
    """Raise `Absent` where `size` bytes are more than the device has to spare."""
    free = free_bytes(device)
    if size > 0.8 * free:
        raise Absent(f"would hold {what}, {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def free_bytes(device: torch.device) -> float:
    """Memory that the device has to spare; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
