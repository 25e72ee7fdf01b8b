"""Experiments as plain dataclasses, one file each; `ncpvae train RECIPE` runs them."""

from .base import CriticSettings, Evaluation, Recipe, Remedies, StageTwo, from_dict, initialised
from .digits import Digits
from .gaussians import Gaussians
from .images_conv import ImagesConv
from .mnist_mlp import MnistMLP
from .omniglot_conv import OmniglotConv
from .omniglot_pixelcnn import OmniglotPixelCNN
from .text_lstm import TextLSTM
from .toy_gmm import ToyGMM

#: the names that `ncpvae train` knows
RECIPES: dict[str, Recipe] = {
    "gaussians": Gaussians(),
    "digits": Digits(),
    "mnist-mlp": MnistMLP(),
    "images-conv": ImagesConv(),
    "toy-gmm": ToyGMM(),
    "omniglot-conv": OmniglotConv(),
    "omniglot-pixelcnn": OmniglotPixelCNN(),
    "text-lstm": TextLSTM(),
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
    "OmniglotPixelCNN",
    "Recipe",
    "Remedies",
    "StageTwo",
    "TextLSTM",
    "ToyGMM",
    "from_dict",
    "initialised",
]
