"""Both stages of a run, and what they leave in its folder."""

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import _random
from .._distributed import rank, ranks
from .._files import atomic_file, save_tensors
from ..data import Dataset, save_vocabulary
from ..distributions import diagonal_normal
from ..metrics import collect_posteriors, hierarchical_log_normalizer
from ..pretrained import Pretrained
from ..priors import GaussianMixture, HierarchicalNCP, NoiseContrastivePrior, Normal
from ..recipes import HierarchicalRecipe, Recipe, VAERecipe, initialised
from ..recipes.base import ClassifierTraining
from ..train import (
    HierarchicalNCPResult,
    NCPResult,
    TrainResult,
    fit_hierarchical_ncp,
    fit_hierarchical_vae,
    fit_ncp,
    fit_vae,
)
from ..train.execution import processes
from ..vae import VAE
from .folder import Run, as_json, new_run, open_run, write_json

MIN_VALIDATION = 2000  # codes to validate a classifier on; small data sets are gone through several times
BASE_CODES = 50_000  # codes that a base prior is fitted to


def train(
    folder: Path,
    name: str,
    recipe: Recipe,
    command: str,
    resume: str = "never",
    device: str = "auto",
    data_folder: str | None = None,
    progress: bool = True,
) -> tuple[Run, TrainResult]:
    """Stage one: train the recipe's VAE in `folder` and save it there as `vae/`.

    Every process of a distributed run calls this.

    Args:
        folder: of the run; made where it is missing.
        name: of the recipe.
        recipe: with its settings.
        command: the command line, for the report.
        resume: "never", "auto" or the path of a checkpoint; see `fit_vae`.
        device: "auto", "cpu", "cuda", …
        data_folder: holds data sets; see `ncpvae.data.load`.
        progress: show a progress bar.
    """
    processes(cpu=device == "cpu")
    with ranks().failing_together("train"):
        if rank() == 0:
            new_run(folder, name, recipe, command, device, data_folder)
    run = open_run(folder, device, data_folder)
    dataset = run.dataset
    examples, validation = placed(dataset.splits.train, run.device), placed(dataset.splits.validation, run.device)
    mean = None if dataset.kind == "text" else mean_of(dataset)
    vae = initialised(recipe.seed, lambda: recipe.vae(mean)).to(run.device)
    common: dict[str, Any] = {
        "validation": validation,
        "transform": recipe.transform,
        "validation_transform": recipe.evaluation_transform,
        **recipe.fitting(),
        "folder": folder,
        "resume": resume,
        "settings": {"recipe": name, "data": recipe.data},
        "progress": progress,
    }
    critic = None
    if isinstance(recipe, VAERecipe):
        critic = initialised(recipe.seed, lambda: recipe.build_critic(vae), part=1)
        result = fit_vae(vae, examples, critic=None if critic is None else critic.to(run.device), **common)
    else:
        result = fit_hierarchical_vae(vae, examples, **common)
    if processes().is_main_process:
        vae.save_pretrained(folder / "vae")
        if dataset.vocabulary is not None:
            save_vocabulary(folder / "vocabulary.json", dataset.vocabulary)
        if critic is not None:
            with atomic_file(folder / "critic" / "model.safetensors") as file:
                save_tensors(critic.state_dict(), file)
        run.update(
            data={"source": dataset.source, "caution": dataset.caution},
            stage_one={"steps": result.steps, "best_step": result.best_step, "seconds": result.seconds},
        )
    processes().wait_for_everyone()
    return run, result


def fit_prior(
    run: Run,
    stage: ClassifierTraining | None = None,
    command: str = "",
    resume: str = "never",
    overwrite: bool = False,
    progress: bool = True,
) -> NCPResult | HierarchicalNCPResult:
    """Stage two: train a noise contrastive prior for the run's VAE and save it as `prior/model/`.

    Args:
        run: with a trained VAE.
        stage: settings that take the place of the recipe's.
        command: the command line, for the report.
        resume: see `train`.
        overwrite: delete the prior that the run has, and its checkpoints.
        progress: show a progress bar.
    """
    if stage is not None and type(stage) is not type(run.recipe.prior):
        raise TypeError(f"fit_prior: stage must be {type(run.recipe.prior).__name__}, got {type(stage).__name__}")
    recipe = run.recipe if stage is None else replace(run.recipe, prior=stage)
    dataset, vae = run.dataset, run.nvae() if run.hierarchical else run.vae()
    if overwrite and processes().is_main_process:
        shutil.rmtree(run.prior_folder, ignore_errors=True)
    processes().wait_for_everyone()
    examples, validation = (placed(part, run.device) for part in dataset.splits[:2])
    times = -(-MIN_VALIDATION // len(validation))
    common: dict[str, Any] = {
        "data": examples,
        "validation": validation.repeat_interleave(times, 0),
        "transform": recipe.transform,
        "validation_transform": recipe.evaluation_transform,
        **recipe.prior.options(),
        "seed": recipe.seed,
        "folder": run.prior_folder,
        "resume": resume,
        "progress": progress,
    }
    fit = _fit_groups if isinstance(recipe, HierarchicalRecipe) else _fit_one
    prior, result, log_z = fit(replace(run, recipe=recipe), vae, common)
    figures = {key: value for key, value in dataclasses.asdict(result).items() if key != "history"}
    if processes().is_main_process:
        protocol = {"recipe": run.name, "data": dataset.source, "settings": as_json(recipe.prior), **figures}
        prior.save_pretrained(run.prior_folder / "model", protocol=protocol)
        write_json(run.prior_folder / "result.json", {**figures, "log_normalizer": log_z})
        commands = run.config["commands"]
        run.update(settings=as_json(recipe), commands=[*commands, *([command] if command not in commands else [])])
    processes().wait_for_everyone()
    return result


def _fit_one(run: Run, vae: Any, common: dict[str, Any]) -> tuple[Pretrained, NCPResult, dict[str, Any]]:
    """The classifier of a VAE with one group of latent variables, and log Z."""
    recipe = run.vae_recipe
    base = base_prior(vae, recipe, common["data"])
    prior = NoiseContrastivePrior(base, initialised(recipe.seed, recipe.classifier)).to(run.device)
    settings = {"recipe": run.name, "base": recipe.prior.base, "encode_once": recipe.prior.encode_once}
    encoded = _encoded_once(run, vae, common) if recipe.prior.encode_once else {"vae": vae}
    result = fit_ncp(prior, settings=settings, **(common | encoded))
    with _random.scoped(recipe.seed):
        log_z = prior.estimate_log_normalizer(recipe.prior.log_z_samples, distributed=True)
    return prior, result, log_z._asdict()


def _encoded_once(run: Run, vae: VAE, common: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `fit_ncp` by which its data are the examples' posteriors, [N, 2, …] of mean and log σ."""

    def posteriors(part: str, transform: str) -> Tensor:
        found = collect_posteriors(
            common[part], vae.encode, common[transform], seed=run.recipe.seed, device=run.device, distributed=True
        )
        return torch.stack([found.mean, found.log_std], 1)

    return {
        "vae": lambda posterior: diagonal_normal(posterior[:, 0], posterior[:, 1].exp(), posterior.dim() - 2),
        "data": posteriors("data", "transform"),
        "validation": posteriors("validation", "validation_transform"),
        "transform": None,
        "validation_transform": None,
    }


def _fit_groups(run: Run, vae: Any, common: dict[str, Any]) -> tuple[Pretrained, HierarchicalNCPResult, dict[str, Any]]:
    """The classifiers of all groups of a hierarchical VAE, and log Z of their joint density."""
    recipe = run.hierarchical_recipe
    stage = recipe.prior
    classifiers = initialised(recipe.seed, lambda: recipe.classifiers(vae))
    prior = HierarchicalNCP(vae, classifiers, stage.min_jsd).to(run.device)
    settings = {"recipe": run.name}
    result = fit_hierarchical_ncp(prior, shard_groups=stage.shard_groups, settings=settings, **common)
    log_z = hierarchical_log_normalizer(
        prior, stage.log_z_samples, stage.log_z_repeats, seed=recipe.seed, distributed=True
    )
    repeat_std = log_z.repeat_std if stage.log_z_repeats > 1 else None
    return prior, result, log_z._asdict() | {"repeats": log_z.repeats.tolist(), "repeat_std": repeat_std}


def base_prior(vae: VAE, recipe: VAERecipe, examples: Tensor) -> nn.Module | Distribution:
    """The base that the recipe asks for: the VAE's prior, or one fitted to codes drawn from q(z|x)."""
    if recipe.prior.base == "prior":
        return vae.prior
    with torch.no_grad(), _random.scoped(recipe.seed):
        parts = examples[:BASE_CODES].split(1024)
        device = next(vae.parameters()).device
        codes = torch.cat([vae.encode(recipe.evaluation_transform(x.to(device))).sample() for x in parts])
    return Normal.fit(codes) if recipe.prior.base == "normal" else GaussianMixture.fit(codes, seed=recipe.seed)


def mean_of(dataset: Dataset) -> Tensor:
    """The mean training example, pixels in [0, 1]."""
    examples = dataset.splits.train
    total = sum(part.double().sum(0) for part in examples.split(4096))
    assert isinstance(total, Tensor)
    return (total / len(examples) / (dataset.maximum or 1)).float()


def placed(examples: Tensor, device: torch.device) -> Tensor:
    """The examples on the device where they take at most a quarter of its free memory, else where they are."""
    if device.type != "cuda":
        return examples
    free, _ = torch.cuda.mem_get_info(device)
    return examples.to(device) if examples.nbytes <= free // 4 else examples


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a recipe would need, without reading data: parameters, and an estimate of memory in bytes.

    Weights, gradients and Adam's two moments in float32, and the activations that a step keeps for its backward pass,
    extrapolated from two and four examples to the batch. Workspace of kernels and the framework itself come on top.
    """
    vae = initialised(recipe.seed, recipe.vae)
    classifiers = initialised(recipe.seed, lambda: recipe.classifiers(vae))
    loss = recipe.objective(vae)
    parameters = {"VAE": _count(vae), "classifier": sum(_count(classifier) for classifier in classifiers)}
    parameters |= {"critic": _count(loss) - _count(vae)} if _count(loss) > _count(vae) else {}
    two, four = (_kept_for_backward(loss, recipe.example(count)) for count in (2, 4))
    each = (four - two) // 2
    per_forward = -(-recipe.batch_size // recipe.execution.gradient_accumulation)
    memory = {
        "weights, gradients, optimiser": 16 * _count(loss) + max(0, two - 2 * each),  # with what is made of weights
        "activations of a batch": each * per_forward,
    }
    return {"parameters": parameters, "memory": memory}


def _kept_for_backward(loss: nn.Module, x: Tensor) -> int:
    """Bytes that a step on x keeps for its backward pass, the weights themselves not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in loss.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _random.scoped(0):
        next(iter(loss(x).values())).backward()
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
