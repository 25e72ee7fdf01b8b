"""Saving, loading and sharing modules by huggingface_hub's conventions: a folder of safetensors and JSON.

`model.safetensors` holds the state, `config.json` the description (see `_description.py`), the protocol, and the names
that are tied. The weights' header holds the content of `config.json` too: with that one file both are replaced at once,
so that a save that was cut short leaves the old module or the new one.
"""

import errno
import json
import os
import types
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from ._description import Blueprint, PartNeeded, describe, describe_arguments
from ._files import (
    MAX_JSON_BYTES,
    atomic_file,
    atomic_folder,
    check_depth,
    open_weights,
    parse_json,
    read_json,
    save_tensors,
    write_atomic,
)

FORMAT, VERSION = "ncpvae", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

MODEL_CARD = """---
{{ card_data }}
---

A `{{ class_name | default("module") }}` of [ncpvae](https://pypi.org/project/ncpvae/), to be loaded by its class's
`from_pretrained`. `config.json` describes it and how it was trained, `model.safetensors` holds its weights.
"""

P = TypeVar("P", bound="Pretrained")


class Pretrained(nn.Module, ModelHubMixin, library_name="ncpvae", model_card_template=MODEL_CARD):
    """A module with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    What is described is the call of the constructor that made it. A class of your own may be derived from this one: the
    arguments of its constructor should be numbers, strings, lists of them, tensors that are kept in the state, and
    modules that are kept as attributes of the arguments' names.

    Attributes:
        protocol: how the module was trained, any JSON object; saved with it.
    """

    protocol: dict | None = None
    _hub_mixin_config: Any = types.MappingProxyType({})  # not None: the library need not record the arguments once more
    _arguments: dict[str, Any]

    def __new__(cls, *args, **kwargs):
        module = super().__new__(cls)
        with suppress(TypeError):  # __init__ tells better which argument is wrong
            module._arguments = describe_arguments(cls, args, kwargs)
        return module

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        protocol: dict | None = None,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, where there is none, a model card into a folder.

        The folder's other files stay. Whatever interrupts it, the folder can be loaded as it was before or as it is
        afterwards; a new folder appears when it is complete.

        Args:
            save_directory: the folder, made where it is not there.
            protocol: replaces `self.protocol`.
            config: must be None; the description is made here.
            repo_id, push_to_hub, model_card_kwargs, **push_to_hub_kwargs: as in huggingface_hub's `ModelHubMixin`.

        Returns:
            With `push_to_hub`, the URL of the commit.

        Raises:
            ValueError: for a part that cannot be described: a torch Distribution, or a module that was changed after
                it was made. Nothing has been written then.
            TypeError: for a protocol that is not JSON.
        """
        if config is not None:
            raise TypeError("save_pretrained: config must be None; hand a dict of your own as protocol")
        if protocol is not None:
            self.protocol = protocol
        folder, card = Path(save_directory), model_card_kwargs or {}
        if folder.is_dir():
            self._save_pretrained(folder, **card)
        else:
            with atomic_folder(folder) as new:
                self._save_pretrained(new, **card)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id=repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path, **model_card_kwargs) -> None:
        from . import __version__

        tensors, tied = _without_sharing(self.state_dict())
        description = describe(self)
        if "arguments" not in description:
            name = type(self).__name__
            raise ValueError(f"save_pretrained: {name} was made with *args, which have no names to be described by")
        _check_description(description, tensors, tied)
        config = {"format": FORMAT, "version": VERSION, "library_version": __version__, "model": description}
        config |= {"tied": tied} if tied else {}
        config |= {} if self.protocol is None else {"protocol": _json("protocol", self.protocol)}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        readme = None
        if not (save_directory / CARD).exists():
            readme = str(self.generate_model_card(**{"class_name": type(self).__name__, **model_card_kwargs}))
        with atomic_file(save_directory / WEIGHTS) as temporary:
            save_tensors(tensors, temporary, {"config": text})
        write_atomic(save_directory / CONFIG, text)
        if readme is not None:
            write_atomic(save_directory / CARD, readme)

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str | torch.device = "cpu",
        **parts: Any,
    ) -> P:
        """The module that `save_pretrained` wrote, in evaluation mode, in the dtypes it had.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a model on the hub.
            force_download, token, cache_dir, local_files_only, revision: as huggingface_hub has them.
            map_location: the device to load it to.
            **parts: arguments of the constructor, above all modules of classes that are not ncpvae's, into which their
                weights are loaded: `classifier=MyNet()`; `**{"prior.classifier": MyNet()}` further down.

        Returns:
            A `cls` or a subclass of it; `Pretrained.from_pretrained` takes whatever the folder holds.

        Raises:
            OSError: where a file is missing or cannot be read.
            ValueError: for files that are damaged, of another class, of a newer version, or do not fit each other; a
                `PartNeeded` where a module has to be handed in. Nothing in a file is ever executed.
        """
        source = pretrained_model_name_or_path
        hub = {"force_download": force_download, "token": token, "cache_dir": cache_dir, "revision": revision}
        hub["local_files_only"] = local_files_only
        config_path, path = (_file(source, name, hub) for name in (CONFIG, WEIGHTS))
        with open_weights(path) as file:
            config = _config(config_path, path, file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            blueprint = Blueprint(str(source), parts, max_parameters=2 * (len(shapes) + len(config["tied"])) + 1000)
            model = blueprint.build(cls, config.get("model"))
            _check_shapes(path, model, shapes, config["tied"])
            weights = {name: file.get_tensor(name).clone() for name in shapes}
        _fill(path, model, weights, config["tied"])
        model.protocol = config.get("protocol")
        return model.to(map_location).eval()


def _file(source: str | Path, name: str, hub: Mapping[str, Any]) -> Path:
    """Where the file `name` of a folder, or of a model on the hub, lies on this machine."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name
    if isinstance(source, Path) or folder.exists() or str(source).startswith((".", "/", "~")):
        raise NotADirectoryError(errno.ENOTDIR, "no folder that save_pretrained wrote", str(source))
    return Path(hf_hub_download(repo_id=source, filename=name, **hub))


def _check_description(description: dict[str, Any], tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Raise a ValueError where the module could not be loaded again, as far as that can be told without its parts."""
    check_depth(description, 80)
    with suppress(PartNeeded):
        blueprint = Blueprint("the module", {}, max_parameters=2 * (len(tensors) + len(tied)) + 1000)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        try:
            _check_shapes("save_pretrained", blueprint.build(Pretrained, description), shapes, tied)
        except PartNeeded:
            raise
        except ValueError as error:
            raise ValueError(
                f"save_pretrained: {description['class']} is not what its arguments make any more; a part that was "
                f"changed must be of a class of its own, or save its state_dict() ({error})"
            ) from error


def _json(name: str, value: object) -> Any:
    """`value` as it will be read back."""
    try:
        if not isinstance(value, dict):
            raise TypeError(f"it is a {type(value).__name__} and not a dict")
        text = json.dumps(value, ensure_ascii=False)
        if len(text.encode()) > MAX_JSON_BYTES // 2:
            raise TypeError(f"it is longer than {MAX_JSON_BYTES // 2} bytes")
        check_depth(value, 80)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"save_pretrained: {name} must be a JSON object: {error}") from error
    return json.loads(text)


def _without_sharing(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, each in memory of its own, and the names that are another name for one of them."""
    kept: dict[tuple, str] = {}
    tied, tensors, storages = {}, {}, set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save_pretrained: {name} of the state must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name} has no values, being on the meta device")
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in kept:
            tied[name] = kept[identity]
            continue
        kept[identity] = name
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        shared = storage in storages or not whole
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor
        storages.add(storage)
    return tensors, tied


def _config(config_path: Path, path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The checked content of config.json; that in the weights' header, where another tool has not left it out."""
    inside, config = metadata.get("config"), {}
    if inside is None or os.path.lexists(config_path):
        config = _checked(read_json(config_path, "config"), f"config {config_path}")
    if inside is None:
        return config
    header = f"config in the header of {path}"
    own = _checked(parse_json(inside, header), header)
    if config and json.dumps(config, sort_keys=True) != json.dumps(own, sort_keys=True):
        warnings.warn(f"{config_path} is not what {path} was saved with and holds too, which is used", stacklevel=3)
    return own


def _checked(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The config with `tied` in it, if it is one that this version reads; the description is checked as it is used."""
    if config.get("format") != FORMAT:
        raise ValueError(f"{source}: format must be {FORMAT!r}, got {str(config.get('format'))[:100]!r}")
    version = config.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{source}: version must be an integer ≥ 1, got {str(version)[:100]!r}")
    if version > VERSION:
        newer = str(config.get("library_version"))[:100]
        raise ValueError(f"{source}: version {version} is of a newer ncpvae ({newer}); this one reads {VERSION}")
    tied = config.setdefault("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise ValueError(f"{source}: tied must map names of weights to names of weights")
    if not isinstance(config.get("protocol"), (dict, type(None))):
        raise ValueError(f"{source}: protocol must be an object")
    return config


def _check_shapes(
    path: str | Path, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> None:
    """Raise a ValueError unless the weights, tied ones included, are those of the model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {**shapes, **{name: shapes.get(kept) for name, kept in tied.items()}}
    both = expected.keys() & given.keys()
    wrong = [f"{name} must be {expected[name]}, got {given[name]}" for name in both if expected[name] != given[name]]
    problems = {"missing": expected.keys() - given.keys(), "too many": given.keys() - expected.keys(), "shape": wrong}
    told = [f"{what}: {_few(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{path}: not the weights of this {type(model).__name__}; {'; '.join(told)}")


def _few(names: Any, most: int = 4) -> str:
    names = sorted(names)
    return ", ".join(name[:200] for name in names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _fill(path: Path, model: nn.Module, weights: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    """Give the model its weights, names that are tied the same tensor."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"{path}: {name} must be of a kind with {own[name].dtype}, got {tensor.dtype}")
    state: dict[str, Tensor] = {}
    for name, parameter in own.items():
        kept = tied.get(name, name)
        if isinstance(own[kept], nn.Parameter) and not isinstance(weights[kept], nn.Parameter):
            weights[kept] = nn.Parameter(weights[kept], requires_grad=own[kept].requires_grad)
        state[name] = weights[kept] if isinstance(parameter, nn.Parameter) else weights[kept].detach()
    try:
        model.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not the weights of this {type(model).__name__}: {error}") from error
    if left := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise ValueError(f"{path}: {type(model).__name__} keeps {_few(left)} outside of its state")
