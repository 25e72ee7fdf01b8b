"""The folder of a run: where everything is, and how it is read back.

RUN/config.json          recipe, its settings, data, versions, commands
RUN/metrics.jsonl        stage one as it went
RUN/checkpoints/         its resume state
RUN/vae/                 the VAE: config.json and model.safetensors (`VAE.from_pretrained`, `NVAE.from_pretrained`)
RUN/vocabulary.json      of text, the word of each id
RUN/critic/              the contrastive critic's weights, where one was trained with it
RUN/prior/               stage two: metrics.jsonl, checkpoints/, model/ (`NoiseContrastivePrior.from_pretrained`;
                         `HierarchicalNCP.from_pretrained`, which has the VAE in it)
RUN/samples/             pictures, and the tensors they show
RUN/evaluation.json      figures, each with its protocol
RUN/report.html          all of it on one page
RUN/diagnosis.json       whether the code has collapsed: figures and verdict
RUN/diagnosis.html       the same as a page
"""

import dataclasses
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random, data
from .._files import load_weights, read_json, write_atomic
from ..critics import Critic
from ..data import load_vocabulary
from ..nvae import NVAE
from ..priors import HierarchicalNCP, NoiseContrastivePrior
from ..recipes import RECIPES, HierarchicalRecipe, Recipe, VAERecipe, from_dict
from ..train.execution import processes
from ..vae import VAE

FORMAT, VERSION = "ncpvae-run", 1


@dataclass(frozen=True)
class Run:
    """A run's folder, its recipe, and where its computations happen.

    Attributes:
        folder: the run's.
        name: of the recipe.
        recipe: with the settings of this run.
        device: models and batches go there.
        data_folder: holds data sets; `NCPVAE_DATA` by default, then the hub.
    """

    folder: Path
    name: str
    recipe: Recipe
    device: torch.device
    data_folder: str | None = None

    @property
    def prior_folder(self) -> Path:
        return self.folder / "prior"

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json", "run")

    @cached_property
    def dataset(self) -> data.Dataset:
        """The data set of the recipe.

        Raises:
            ValueError: where its examples do not have the recipe's shape or scale, or its words are not the run's.
        """
        dataset = self.recipe.load(self.data_folder)
        shape = tuple(dataset.splits.train.shape[1:])
        if shape != self.recipe.shape:
            raise ValueError(
                f"shape must be that of the examples of {self.recipe.data!r}, {shape}, got {self.recipe.shape}"
            )
        if dataset.maximum != self.recipe.maximum:
            wanted, got = (_kind_of(maximum) for maximum in (self.recipe.maximum, dataset.maximum))
            raise ValueError(f"data must be {wanted} for {self.name}, got {got} of {self.recipe.data!r}")
        words = self.folder / "vocabulary.json"
        if words.is_file() and load_vocabulary(words) != dataset.vocabulary:
            raise ValueError(
                f"data must have the words that the run was trained with, {words}; those of {self.recipe.data!r} now "
                "differ, or their order does"
            )
        return dataset

    @property
    def hierarchical(self) -> bool:
        """Whether the run's VAE has groups of latent variables, each with a prior of its own."""
        return isinstance(self.recipe, HierarchicalRecipe)

    @property
    def vae_recipe(self) -> VAERecipe:
        """The recipe of a VAE with one group of latent variables; ValueError for another."""
        if not isinstance(self.recipe, VAERecipe):
            raise ValueError(f"run {self.folder} must have a VAE with one group of latent variables, got {self.name}")
        return self.recipe

    @property
    def hierarchical_recipe(self) -> HierarchicalRecipe:
        """The recipe of a hierarchical VAE; ValueError for another."""
        if not isinstance(self.recipe, HierarchicalRecipe):
            raise ValueError(f"run {self.folder} must have a hierarchical VAE, got {self.name}")
        return self.recipe

    def nvae(self) -> NVAE:
        """The trained hierarchical VAE, in eval mode on the run's device."""
        recipe = self.hierarchical_recipe
        vae = NVAE.from_pretrained(self._trained())
        if vae.shape != recipe.shape:
            raise ValueError(f"{self.folder / 'vae'} is not of this run: it makes {vae.shape}, not {recipe.shape}")
        return vae.to(self.device)

    def _trained(self) -> Path:
        if not (self.folder / "vae").is_dir():
            raise OSError(f"run {self.folder} has no trained VAE yet: finish it with --resume auto")
        return self.folder / "vae"

    def vae(self) -> VAE:
        """The trained VAE with one group of latent variables, in eval mode on the run's device."""
        _ = self.vae_recipe
        vae = VAE.from_pretrained(self._trained())
        try:
            with torch.no_grad(), _random.scoped(0):
                shape = tuple(vae.decode(vae.prior_distribution().sample((1,))).event_shape)
        except RuntimeError as error:
            raise ValueError(f"{self.folder / 'vae'} is not of this run: {str(error).splitlines()[0]}") from error
        if shape != self.recipe.shape:
            raise ValueError(f"{self.folder / 'vae'} is not of this run: it makes {shape}, not {self.recipe.shape}")
        return vae.to(self.device)

    def critic(self, vae: VAE) -> Critic | None:
        """The critic that was trained with the run's VAE, in eval mode on the run's device; None without one."""
        critic = self.vae_recipe.build_critic(vae)
        if critic is None:
            return None
        file = self.folder / "critic" / "model.safetensors"
        try:
            critic.load_state_dict(load_weights(file))
        except RuntimeError as error:
            raise ValueError(f"{file} is not of this run: {str(error).splitlines()[0]}") from error
        return critic.eval().to(self.device)

    def has_prior(self) -> bool:
        return (self.prior_folder / "model").is_dir()

    def prior(self) -> NoiseContrastivePrior:
        """The trained noise contrastive prior, in eval mode on the run's device."""
        prior = NoiseContrastivePrior.from_pretrained(self._fitted()).to(self.device)
        own, theirs = (tuple(p.event_shape) for p in (prior.base_distribution(), self.vae().prior_distribution()))
        if own != theirs:
            raise ValueError(f"{self.prior_folder / 'model'} is a prior of {own}, and the VAE has codes of {theirs}")
        return prior

    def hierarchical_prior(self) -> HierarchicalNCP:
        """The trained noise contrastive prior of a hierarchical VAE, with the VAE, on the run's device."""
        weights = self.nvae().state_dict()
        prior = HierarchicalNCP.from_pretrained(self._fitted()).to(self.device)
        own = prior.vae.state_dict()
        same = own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in weights)
        if not same:
            raise ValueError(
                f"{self.prior_folder / 'model'} is a prior of another VAE than {self.folder / 'vae'}: fit it again, "
                f"ncpvae fit-prior {self.folder} --overwrite"
            )
        return prior

    def _fitted(self) -> Path:
        if not self.has_prior():
            raise OSError(f"run {self.folder} has no noise contrastive prior yet: ncpvae fit-prior {self.folder}")
        return self.prior_folder / "model"

    def update(self, **entries: Any) -> None:
        """Put entries into `config.json`, keeping the others."""
        write_json(self.folder / "config.json", self.config | entries)

    def on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def _kind_of(maximum: int | None) -> str:
    return "vectors or text" if maximum is None else f"images with pixels in 0 … {maximum}"


def open_run(folder: Path, device: str = "auto", data_folder: str | None = None) -> Run:
    """The run in `folder`.

    Raises:
        OSError, ValueError: where it is none, or its `config.json` is damaged or of another version.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise OSError(f"{folder} is not the folder of a run: it has no config.json")
    config = read_json(file, "run")
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(
            f"{file}: must be {FORMAT!r} of version {VERSION}, got {config.get('format')!r}, {config.get('version')!r}"
        )
    name = config.get("recipe")
    if name not in RECIPES:
        raise ValueError(f"{file}: recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    kinds = {"settings": dict, "commands": list, "environment": dict}
    kinds |= {key: dict for key in ("data", "stage_one") if key in config}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            wanted = "an object" if kind is dict else "a list"
            raise ValueError(f"{file}: {key} must be {wanted}, got {type(config.get(key)).__name__}")
    return Run(
        folder, name, from_dict(RECIPES[name], config["settings"], str(file)), chosen_device(device), data_folder
    )


def new_run(
    folder: Path, name: str, recipe: Recipe, command: str, device: str = "auto", data_folder: str | None = None
) -> Run:
    """Make the folder of a run; one that is there already must be of the same recipe and settings.

    Raises:
        ValueError: naming the settings that differ. Those of stage two and of the evaluation may, and those of the
            execution, of which the engine asks what must not.
    """
    settings = as_json(recipe)
    begun = (folder / "vae").is_dir() or (folder / "checkpoints").is_dir()
    if begun and (folder / "config.json").is_file():
        run = open_run(folder, device, data_folder)
        before = as_json(run.recipe)
        free = {"prior", "evaluation", "execution"}
        differing = [key for key in settings if key not in free and settings[key] != before.get(key)]
        if run.name != name:
            raise ValueError(f"{folder} is of another run (recipe {run.name}, now {name}); take another --output")
        if differing:
            changed = ", ".join(f"{key} = {before.get(key)!r}, now {settings[key]!r}" for key in differing)
            raise ValueError(f"{folder} is of another run ({changed}); take another --output")
        return run
    config = {"format": FORMAT, "version": VERSION, "recipe": name, "settings": settings, "commands": [command]}
    write_json(folder / "config.json", config | {"environment": environment(chosen_device(device))})
    return open_run(folder, device, data_folder)


def writable(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: where it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output folder {str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def as_json(recipe: Any) -> dict[str, Any]:
    """A recipe as a JSON object: what `from_dict` reads."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def chosen_device(name: str) -> torch.device:
    """ "auto": this process's CUDA device where there is one, else the CPU.

    Raises:
        ValueError: for a device that torch does not know or that is not there.
    """
    state = processes(cpu=name == "cpu")
    if name == "auto":
        return state.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be auto, cpu, cuda, …, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def environment(device: torch.device) -> dict[str, str]:
    """Versions, device and time, for reports."""
    from .. import __version__
    from ..info import kernel_of

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "ncpvae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type}: {where}",
        "threads": str(torch.get_num_threads()),
        "kernels": kernel_of("sir_resample", device.type.upper()),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
