"""Named data sets as tensors: `load("mnist")` → `Dataset`, with what turns a batch of it into what a model sees.

    toy.py         what needs no file: mixtures of Gaussians, scikit-learn's digits
    hub.py         images in the Hugging Face hub's layout, from a folder or the hub
    folder.py      a folder of images      arrays.py   an .npz file      corpus.py   text, and vocabularies
    images.py      decoding                transforms.py   on the device: binarise, flip, pad, quantise, scale

Images are uint8 in memory; what a model sees is made from each batch on its device.
"""

from .arrays import npz_file
from .corpus import from_text, load_vocabulary, save_vocabulary, text_lines, to_text
from .dataset import Dataset, Splits
from .folder import image_folder
from .hub import check_folder, mnist
from .names import NAMES, load
from .toy import (
    GAUSSIANS_SPACING,
    GAUSSIANS_STD,
    Entropy,
    digits,
    gaussian_grid_entropy,
    gaussian_grid_means,
    gaussian_mixture_entropy,
    gaussian_mixture_parameters,
    gaussians,
)
from .transforms import Transform, as_is, binarize, compose, pad, quantize, random_flip, scale, to_float

__all__ = [
    "GAUSSIANS_SPACING",
    "GAUSSIANS_STD",
    "NAMES",
    "Dataset",
    "Entropy",
    "Splits",
    "Transform",
    "as_is",
    "binarize",
    "check_folder",
    "compose",
    "digits",
    "from_text",
    "gaussian_grid_entropy",
    "gaussian_grid_means",
    "gaussian_mixture_entropy",
    "gaussian_mixture_parameters",
    "gaussians",
    "image_folder",
    "load",
    "load_vocabulary",
    "mnist",
    "npz_file",
    "pad",
    "quantize",
    "random_flip",
    "save_vocabulary",
    "scale",
    "text_lines",
    "to_float",
    "to_text",
]
