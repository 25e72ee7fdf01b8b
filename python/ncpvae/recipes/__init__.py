"""Experiments as plain dataclasses, one file each; `ncpvae train RECIPE` runs them."""

from .base import Evaluation, Recipe, StageTwo, from_dict, initialised
from .digits import Digits
from .gaussians import Gaussians
from .images_conv import ImagesConv
from .mnist_mlp import MnistMLP

#: the names that `ncpvae train` knows
RECIPES: dict[str, Recipe] = {
    "gaussians": Gaussians(),
    "digits": Digits(),
    "mnist-mlp": MnistMLP(),
    "images-conv": ImagesConv(),
}

__all__ = [
    "RECIPES",
    "Digits",
    "Evaluation",
    "Gaussians",
    "ImagesConv",
    "MnistMLP",
    "Recipe",
    "StageTwo",
    "from_dict",
    "initialised",
]
