"""Input checks shared by the ops: each error names the op, the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(op: str, name: str, value: object, dims: int | None = None) -> None:
    """`value` is a float16, bfloat16, float32 or float64 tensor, with `dims` dimensions where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimension(s), got shape {tuple(value.shape)}")


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {tuple(expected)}, got {tuple(value.shape)}")


def at_least_one(op: str, name: str, value: Tensor, dim: int, letter: str) -> None:
    if value.shape[dim] < 1:
        raise ValueError(f"{op}: {name} must have {letter} ≥ 1 in dimension {dim}, got shape {tuple(value.shape)}")


def like(op: str, name: str, value: object, other_name: str, other: Tensor) -> None:
    """`value` is a tensor with the dtype and device of `other`, whose dtype has been checked."""
    if isinstance(value, Tensor) and value.dtype == other.dtype and value.device == other.device:
        return
    floating(op, name, value)
    assert isinstance(value, Tensor)
    if value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")
    same_device(op, name, value, other_name, other)


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other_name}'s device {other.device}, got {value.device}")


def seed(op: str, value: object, other_name: str, other: Tensor) -> None:
    """`value` is what `draw_seed` returns, on `other`'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: seed must be an int64 tensor from draw_seed, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be int64, got {value.dtype}")
    shape(op, "seed", value, (2,), "(key, stream)")
    same_device(op, "seed", value, other_name, other)


def number(op: str, name: str, value: object, minimum: float, strict: bool = False) -> None:
    """`value` is a finite Python number, at least (`strict`: above) `minimum`."""
    if type(value) is float and minimum < value < math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    finite = -math.inf < value < math.inf  # math.isfinite does not take torch.compile's symbolic numbers
    if not finite or value < minimum or (strict and value == minimum):
        raise ValueError(f"{op}: {name} must be finite and {'>' if strict else '≥'} {minimum:g}, got {value}")


def count(op: str, name: str, value: object, minimum: int = 1) -> None:
    """`value` is an integer, at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be ≥ {minimum}, got {value}")
