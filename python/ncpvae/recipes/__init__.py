"""Experiments as plain dataclasses, one file each; `ncpvae train RECIPE` runs them."""

from .base import CriticSettings, Evaluation, Recipe, Remedies, StageTwo, from_dict, initialised
from .digits import Digits
from .gaussians import Gaussians
from .images_conv import ImagesConv
from .mnist_mlp import MnistMLP
from .omniglot_conv import OmniglotConv

#: the names that `ncpvae train` knows
RECIPES: dict[str, Recipe] = {
    "gaussians": Gaussians(),
    "digits": Digits(),
    "mnist-mlp": MnistMLP(),
    "images-conv": ImagesConv(),
    "omniglot-conv": OmniglotConv(),
}

__all__ = [
    "RECIPES",
    "CriticSettings",
    "Digits",
    "Evaluation",
    "Gaussians",
    "ImagesConv",
    "MnistMLP",
    "OmniglotConv",
    "Recipe",
    "Remedies",
    "StageTwo",
    "from_dict",
    "initialised",
]
