"""Experiments as plain dataclasses, one file each; `ncpvae train RECIPE` runs them."""

from .base import Evaluation, Recipe, from_dict, initialised
from .digits import Digits
from .gaussians import Gaussians
from .hierarchical import GroupClassifiers, HierarchicalRecipe
from .images_conv import ImagesConv
from .mnist_mlp import MnistMLP
from .nvae_colour import NvaeCeleba64, NvaeCelebahq256, NvaeCifar10
from .nvae_mnist import NvaeCpu, NvaeMnist, NvaeMnistSmall
from .omniglot_conv import OmniglotConv
from .omniglot_pixelcnn import OmniglotPixelCNN
from .single import CriticSettings, Remedies, StageTwo, VAERecipe
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
    "nvae-cpu": NvaeCpu(),
    "nvae-mnist-small": NvaeMnistSmall(),
    "nvae-mnist": NvaeMnist(),
    "nvae-cifar10": NvaeCifar10(),
    "nvae-celeba64": NvaeCeleba64(),
    "nvae-celebahq256": NvaeCelebahq256(),
}

__all__ = [
    "RECIPES",
    "CriticSettings",
    "Digits",
    "Evaluation",
    "Gaussians",
    "GroupClassifiers",
    "HierarchicalRecipe",
    "ImagesConv",
    "MnistMLP",
    "NvaeCeleba64",
    "NvaeCelebahq256",
    "NvaeCifar10",
    "NvaeCpu",
    "NvaeMnist",
    "NvaeMnistSmall",
    "OmniglotConv",
    "OmniglotPixelCNN",
    "Recipe",
    "Remedies",
    "StageTwo",
    "TextLSTM",
    "ToyGMM",
    "VAERecipe",
    "from_dict",
    "initialised",
]
