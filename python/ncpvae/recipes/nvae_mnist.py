"""NVAE on MNIST: the paper of NVAE, the likelihoods of NCP-VAE, and a small one for a CPU."""

from dataclasses import dataclass, field

from .base import Evaluation
from .hierarchical import GroupClassifiers, HierarchicalRecipe


@dataclass(frozen=True)
class NvaeMnist(HierarchicalRecipe):
    """Dynamically binarised MNIST with the NVAE of its authors' own experiment: two scales, 5 groups of 4×4, 10 of 8×8.

    From NVAE's public instructions: 32 channels, 20 latent channels, two blocks of three cells before and after the
    ladder, no flows, λ = 1e-2, batch 200, 400 epochs, learning rate 1e-2 to 1e-4 after five epochs of warm-up. 100,000
    steps are 400 epochs of the first 50,000 training images; theirs are of all 60,000. The image is padded to 32×32
    and the likelihood is of its 28×28 pixels.

    The classifiers' width, their batches (512 here) and how long they are trained are left open by NCP-VAE.
    """

    data: str = "mnist"
    shape: tuple[int, ...] = (1, 28, 28)
    steps: int = 100_000
    batch_size: int = 200
    warmup_steps: int = 1250
    prior: GroupClassifiers = field(default_factory=lambda: GroupClassifiers(steps=20_000))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(importance_samples=1000, test_examples=1000))


@dataclass(frozen=True)
class NvaeMnistSmall(NvaeMnist):
    """MNIST with ten groups of 4×4: the model whose likelihoods NCP-VAE reports (section 5.1).

    One scale after three halvings; everything else as in `nvae-mnist`, which is this recipe's choice. The paper
    estimates log Z by 1,000 samples; how many draws its likelihoods take it does not say: 1,000 here, of the first
    1,000 test images.
    """

    groups_per_scale: tuple[int, ...] = (10,)
    halvings: int = 3


@dataclass(frozen=True)
class NvaeCpu(NvaeMnist):
    """MNIST with four small groups of 4×4, for a CPU: both stages and all figures in some minutes.

    Nothing here is of the papers' sizes. The learning rate is 5e-3, because at 1e-2 NVAE is known to diverge with small
    batches.
    """

    steps: int = 1500
    batch_size: int = 64
    lr: float = 5e-3
    warmup_steps: int = 50
    validate_every: int | None = 500
    channels: int = 8
    groups_per_scale: tuple[int, ...] = (4,)
    latent_channels: int = 8
    halvings: int = 3
    preprocess_cells: int = 1
    postprocess_cells: int = 1
    encoder_cells: int = 1
    decoder_cells: int = 1
    prior: GroupClassifiers = field(
        default_factory=lambda: GroupClassifiers(steps=1500, batch_size=128, channels=32, blocks=1)
    )
    evaluation: Evaluation = field(
        default_factory=lambda: Evaluation(
            importance_samples=20, snis_proposals=100, sir_proposals=500, test_examples=500
        )
    )
