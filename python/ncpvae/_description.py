"""Descriptions of modules, as `config.json` holds them: how one is had of a module, and a module of one.

A module is described by its class and its constructor's arguments, the modules among these alike:

    {"class": "NoiseContrastivePrior", "arguments": {
        "base": {"class": "Normal", "arguments": {"shape": 8, "mean": {"tensor": [8]}, "std": 1.0, "learn": false}},
        "classifier": {"class": null, "name": "MyNet"}}}

A tensor is told by its shape, since its values are among the weights; an activation is {"type": "torch.nn.Tanh"}; a
module of somebody else's class is null, and whoever loads it hands it in. From a description only the classes and
activations listed below are ever made, and that on the meta device, where sizes take no memory.
"""

import importlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

#: the classes that a description may name, by the module they are in
CLASSES = {
    "nvae": ("NVAE",),
    "vae": (
        *("VAE", "GaussianEncoder", "MLPEncoder", "MLPDecoder", "ConvEncoder", "ConvDecoder"),
        *("StackedConvEncoder", "StackedConvDecoder"),
    ),
    "text_vae": ("TextEncoder", "LatentContext", "TextLikelihood"),
    "pixelcnn": ("PixelCNNLikelihood",),
    "distributions": (
        *("BernoulliLikelihood", "BinomialLikelihood", "NormalLikelihood"),
        *("PixelNormalLikelihood", "LogisticMixtureLikelihood"),
    ),
    "classifiers": ("MLPClassifier", "ResidualClassifier"),
    "priors": ("Normal", "GaussianMixture", "NoiseContrastivePrior", "HierarchicalNCP"),
    "metrics": ("FeatureClassifier",),
    "adapters": ("StandardizedClassifier",),
}
#: the classes of torch.nn that it may name
ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU"),
    *("LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign"),
    *("Tanh", "Tanhshrink"),
)

M = TypeVar("M", bound=nn.Module)


class PartNeeded(ValueError):
    """A module holds a part of a class that is not ncpvae's, which has to be handed to `from_pretrained`."""


def describe_arguments(cls: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, defaults included, in the form of the module's docstring."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    described: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        value = bound.arguments[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            described |= {name: _described(v) for name, v in value.items()}
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            described[parameter.name] = _described(value)
        elif value:
            raise TypeError(f"{cls.__name__}: *{parameter.name} has no names to be described by")
    return described


def _described(value: object) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if isinstance(value, (list, tuple, range)):
        return [_described(v) for v in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return {"tensor": list(value.shape)}
    if isinstance(value, type) and value.__name__ in ACTIVATIONS and getattr(nn, value.__name__) is value:
        return {"type": f"torch.nn.{value.__name__}"}
    return {"class": None, "name": getattr(value, "__qualname__", type(value).__qualname__)}


def describe(module: nn.Module) -> dict[str, Any]:
    """The description of a module as it is now, its parts being its attributes of the arguments' names."""
    name = type(module).__name__
    own = any(name in names for names in CLASSES.values()) and _class(name) is type(module)
    described: dict[str, Any] = {"class": name} if own else {"class": None, "name": type(module).__qualname__}
    arguments = getattr(module, "_arguments", None)  # those of `Pretrained`
    if not isinstance(arguments, dict):
        return described
    described["arguments"] = dict(arguments)
    for argument, value in arguments.items():
        part = getattr(module, argument, None)
        if isinstance(value, dict) and "class" in value and isinstance(part, nn.Module):
            described["arguments"][argument] = describe(part)
        elif isinstance(value, (bool, int, float, str)) and type(part) is type(value):
            described["arguments"][argument] = part  # it may have been changed since
        elif isinstance(part, nn.ModuleList) and isinstance(value, list):
            described["arguments"][argument] = [describe(module) for module in part]
        elif isinstance(part, Distribution):
            raise ValueError(
                f"save_pretrained: {argument} of {name} is a torch Distribution ({type(part).__name__}), which has no "
                "state to be saved; use a module, such as ncpvae.Normal or ncpvae.GaussianMixture"
            )
    return described


class _ValuesUnknown(TorchFunctionMode):
    """On the meta device tensors have no values: a condition on them, such as that of std > 0, counts as met.

    What our constructors do on the way to it is passed over, because at its first elementwise operation on that
    device torch imports its compiler, a second's work; any other operation is right, only slower.
    """

    PASSED_OVER = ("isfinite", "gt", "__gt__", "all", "exp", "log", "clone")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__bool__:
            return True
        if getattr(func, "__name__", None) in self.PASSED_OVER:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass
class Blueprint:
    """Makes modules from descriptions, on the meta device.

    Attributes:
        source: the name of what is described, for errors.
        parts: path → what takes the place of the argument at that path, "prior.classifier" for instance.
        max_parameters: more of them are not made, however large the description's lists and numbers.
    """

    source: str
    parts: Mapping[str, Any]
    max_parameters: int
    used: set[str] = field(default_factory=set)

    def build(self, cls: type[M], description: Any) -> M:
        """The module, which must be a `cls`; its weights are on the meta device, those of the given parts excepted."""
        name = description.get("class") if isinstance(description, dict) else None
        if name is None and isinstance(description, dict) and description.get("name") == cls.__qualname__:
            model = self._make(cls, description, "")  # of the caller's own class, made as that may want it
        else:
            own = self._known_class(description, "")
            if not issubclass(own, cls):
                raise ValueError(
                    f"{self.source} is of the class {name}, not {cls.__name__}: use {name}.from_pretrained"
                )
            with _at_most_parameters(self.max_parameters), torch.device("meta"), _ValuesUnknown():
                model = self._make(own, description, "")
        if unused := set(self.parts) - self.used:
            raise ValueError(
                f"{self.source}: from_pretrained got {', '.join(sorted(unused))}, but {cls.__name__} was saved with no "
                "such argument"
            )
        return model

    def _known_class(self, description: Any, path: str) -> type:
        name = description.get("class") if isinstance(description, dict) else description
        if isinstance(description, dict) and name is None:
            foreign = description.get("name")
            if not path:
                raise PartNeeded(
                    f"{self.source} holds a {foreign!r}, not a class of ncpvae: use its own from_pretrained"
                )
            given = f"{path}=…" if "." not in path else f'**{{"{path}": …}}'
            raise PartNeeded(
                f"{self.source}: its {path} is of the class {foreign!r}, which is not ncpvae's; hand one to "
                f"from_pretrained(…, {given})"
            )
        if not isinstance(name, str) or not any(name in names for names in CLASSES.values()):
            raise ValueError(f"{self.source}: config.json names a class that ncpvae does not have: {str(name)[:100]!r}")
        return _class(name)

    def _make(self, cls: type, description: dict[str, Any], path: str) -> Any:
        arguments = description.get("arguments")
        if not isinstance(arguments, dict):
            raise ValueError(f"{self.source}: config.json must give the arguments of {cls.__name__} as an object")
        values = {name: self._value(value, f"{path}.{name}".lstrip(".")) for name, value in arguments.items()}
        try:
            return cls(**values)
        except Exception as error:  # whatever a constructor says to arguments that nobody has checked
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.source}: no {cls.__name__} can be made with what config.json says: {reason}"
            ) from error

    def _value(self, value: Any, path: str) -> Any:
        if path in self.parts:
            self.used.add(path)
            return self.parts[path]
        if isinstance(value, list):
            return [self._value(v, f"{path}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return self._placeholder(value["tensor"], path)
        if "type" in value:
            package, _, name = str(value["type"]).rpartition(".")
            if package != "torch.nn" or name not in ACTIVATIONS:
                raise ValueError(f"{self.source}: {path} must be an activation of torch.nn, got {str(value)[:100]}")
            return getattr(nn, name)
        return self._make(self._known_class(value, path), value, path)

    def _placeholder(self, shape: Any, path: str) -> Tensor:
        """Ones, which are a mean, a standard deviation and a Cholesky factor's diagonal alike."""
        try:
            return torch.ones([int(size) for size in shape])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.source}: {path} must be a tensor's shape, got {str(shape)[:100]}") from error


def _class(name: str) -> type:
    """One of CLASSES. Imported when it is needed, since its module imports this one."""
    (module,) = (module for module, names in CLASSES.items() if name in names)
    return getattr(importlib.import_module(f".{module}", __package__), name)


@contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Raise a ValueError when this thread makes more parameters than that."""
    made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > limit:
            raise ValueError("it has far more parameters than there are weights")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
