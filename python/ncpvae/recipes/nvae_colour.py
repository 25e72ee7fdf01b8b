"""NVAE on colour images, at the sizes of NCP-VAE's experiments (its Tables 1 to 3)."""

from dataclasses import dataclass, field

from .base import Evaluation
from .hierarchical import GroupClassifiers, HierarchicalRecipe, Pixels

#: likelihoods of colour images are not what the paper measures; a few test images give an idea
FEW = Evaluation(importance_samples=10, snis_proposals=100, test_examples=100, samples=10_000)


@dataclass(frozen=True)
class NvaeCifar10(HierarchicalRecipe):
    """CIFAR-10 with 30 groups of 16×16.

    From NVAE's public instructions: one scale after one halving, 128 channels, one block of two cells before and after
    the ladder, one pair of flows, batch 32 on each of eight GPUs, 400 epochs, learning rate 1e-2, images mirrored.
    The NCP paper has a Normal decoder, for which the public commands of VAEBM have λ = 1e-1. 78,125 steps are 400
    epochs of CIFAR-10's 50,000 images, of which the last 5,000 are held out here.
    """

    data: str = "cifar10"
    shape: tuple[int, ...] = (3, 32, 32)
    steps: int = 78_125
    batch_size: int = 256
    likelihood: Pixels = "normal"
    flip: bool = True
    channels: int = 128
    groups_per_scale: tuple[int, ...] = (30,)
    halvings: int = 1
    preprocess_cells: int = 2
    postprocess_cells: int = 2
    flows: int = 1
    warmup_steps: int = 1000
    regularization: float = 1e-1
    prior: GroupClassifiers = field(default_factory=lambda: GroupClassifiers(steps=20_000))
    evaluation: Evaluation = FEW


@dataclass(frozen=True)
class NvaeCeleba64(NvaeCifar10):
    """CelebA at 64×64 with three scales of five groups: 15, as in the NCP paper's Figure 4.

    Its Table 1 is of 30 groups, which are `--groups-per-scale 10 10 10`.
    48 channels, batch 32 for a GPU, 50 epochs, one pair of flows, λ = 1e-1, a Normal decoder: the public commands of
    VAEBM, whose numbers of groups match the paper's. Eight GPUs, 31,800 steps for 50 epochs of 162,770 images, and two
    cells before the ladder are this recipe's choices, as are the classifiers' batches of 256.
    """

    data: str = "celeba64"
    shape: tuple[int, ...] = (3, 64, 64)
    steps: int = 31_800
    channels: int = 48
    groups_per_scale: tuple[int, ...] = (5, 5, 5)
    warmup_steps: int = 3180
    prior: GroupClassifiers = field(default_factory=lambda: GroupClassifiers(steps=20_000, batch_size=256))


@dataclass(frozen=True)
class NvaeCelebahq256(NvaeCifar10):
    """CelebA-HQ at 256×256 and 5 bits, with five scales of four groups, the NCP paper's 20.

    32 channels, batch 8 for a GPU, 200 epochs, learning rate 6e-3, two pairs of flows, λ from 10 to 1e-2 while β rises,
    a Normal decoder: the public commands of VAEBM. Eight GPUs, and 84,375 steps for 200 epochs of 27,000 images, are
    this recipe's choices, as are the classifiers' batches of 128. Activations are computed once more in the backward
    pass, to save memory.
    """

    data: str = "celebahq256"
    shape: tuple[int, ...] = (3, 256, 256)
    bits: int = 5
    steps: int = 84_375
    batch_size: int = 64
    lr: float = 6e-3
    channels: int = 32
    groups_per_scale: tuple[int, ...] = (4, 4, 4, 4, 4)
    flows: int = 2
    warmup_steps: int = 2100
    regularization: float = 1e-2
    initial_regularization: float | None = 10.0
    recompute: bool = True
    prior: GroupClassifiers = field(default_factory=lambda: GroupClassifiers(steps=20_000, batch_size=128))
