"""`ncpvae train-features`: a classifier whose features images are compared in, where Inception's do not fit."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import data
from .._distributed import world_size
from ..metrics import FeatureClassifier, classification_accuracy
from ..recipes import initialised
from ..train.batches import minibatches
from ..train.engine import train
from ..train.execution import check_count
from .folder import chosen_device, writable
from .training import placed


def train_features(
    name: str,
    output: Path,
    steps: int = 5000,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    data_folder: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> FeatureClassifier:
    """Train a classifier of a labelled data set, keep the weights best on its validation part, and save it.

    Args:
        name: of the data set; its test accuracy is kept with the classifier, whose name carries it.
        output: the folder for it.
        steps, batch_size, lr, seed: of Adam.
        device, data_folder, progress: see `runs.training.train`.
        overwrite: a classifier that is there already.

    Raises:
        ValueError: for a data set without images or without one class per image.
    """
    check_count("batch_size", batch_size)
    if (output / "config.json").exists() and not overwrite:
        raise ValueError(f"train-features: {output} holds a model already; --overwrite replaces it")
    dataset, where = data.load(name, data_folder), chosen_device(device)
    labels = dataset.labels
    if dataset.kind != "image" or labels is None or labels.train.dim() != 1 or labels.train.dtype == torch.bool:
        raise ValueError(f"train-features: data must be images with one class each, got {name!r}")
    images, targets = ([placed(part, where) for part in parts] for parts in (dataset.splits, labels))
    shape, classes = list(images[0].shape[1:]), int(targets[0].max()) + 1
    if classes > len(images[0]):
        raise ValueError(
            f"train-features: labels must be classes 0, 1, …, fewer than the {len(images[0])} training images, got "
            f"{classes - 1} in {name!r}"
        )
    for split, part in zip(labels._fields, targets, strict=True):
        if int(part.min()) < 0 or int(part.max()) >= classes:
            raise ValueError(
                f"train-features: labels must be classes 0 … {classes - 1}, those of the training images, got "
                f"{int(part.min())} … {int(part.max())} in split {split!r} of {name!r}"
            )
    writable(output)
    model = initialised(seed, lambda: FeatureClassifier(shape, classes, maximum=dataset.maximum or 255)).to(where)

    def loss(index: Tensor) -> dict[str, Tensor]:
        x, y = images[0][index].to(where), targets[0][index].to(where)
        logits = model(dataset.augment(x))
        return {"cross_entropy": F.cross_entropy(logits, y), "accuracy": (logits.argmax(1) == y).float().mean()}

    def validate() -> dict[str, float]:
        accuracy = classification_accuracy(model, images[1], targets[1], device=where)
        return {"error": 1.0 - accuracy}

    train(
        model,
        loss,
        lambda start: minibatches(len(images[0]), batch_size, seed, start, images[0].device),
        steps=steps,
        lr=lr,
        validate=validate,
        seed=seed,
        progress=progress,
        description="features",
    )
    accuracy = classification_accuracy(model, images[2], targets[2], device=where)
    trained = model.trained(dataset.source, accuracy)
    if world_size() == 1 or torch.distributed.get_rank() == 0:
        trained.save_pretrained(output)
    return trained
