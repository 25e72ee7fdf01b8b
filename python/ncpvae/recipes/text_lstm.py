"""Text with LSTMs and contrastive critics (the study by Asokan, Table 3)."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._tokens import BOS, EOS, PAD, UNK
from ..classifiers import MLPClassifier
from ..data import Dataset, Splits
from ..data import load as load_data
from ..priors import Normal
from ..text_vae import text_vae
from ..train import Execution
from ..vae import VAE
from .base import Evaluation
from .single import CriticSettings, StageTwo, VAERecipe
from .toy_gmm import STUDY

FREQUENT = 1000  # words, by whose frequencies texts are compared: the ids begin with them


@dataclass(frozen=True)
class TextLSTM(VAERecipe):
    """Documents of Yahoo's answers with one LSTM on either side: the study's Table 3, and its critics.

    From the study and the code of He et al. (2019) that it follows: embedding 512, hidden 1,024, latent 32, dropout ½
    on the decoder's input and output, gradients clipped at 5, batch 32, 15 epochs (4,680 steps of 312), λ = 40, about
    20,000 words, a hybrid critic that shares the embedding. AdamW 1e-3 takes the place of their SGD with a rate halved
    on plateaus. Rows are as long as `shape` says, `<bos>` and `<eos>` included; longer documents are cut.

    War and Peace, whose lines are short: `--data war_and_peace --shape 30`.
    """

    maximum: ClassVar[int | None] = None
    data: str = "yahoo"
    shape: tuple[int, ...] = (202,)
    steps: int = 4680
    batch_size: int = 32
    weight_decay: float | None = 0.01
    schedule: str = "constant"  # type: ignore[assignment]
    critic: CriticSettings = field(default_factory=lambda: CriticSettings(weight=40.0, share=1))
    execution: Execution = field(default_factory=lambda: Execution(max_grad_norm=5.0))
    vocabulary: int = 20_000
    """words and special tokens that have an id; all others are <unk>"""
    latent_dim: int = 32
    """D"""
    embedding_dim: int = 512
    """of a word"""
    hidden_dim: int = 1024
    """of the LSTMs"""
    dropout: float = 0.5
    """on the decoder's input and output"""
    word_dropout: float = 0.0
    """share of the decoder's input words that are <unk> in training"""
    prior: StageTwo = field(default_factory=lambda: StageTwo(steps=5000))
    evaluation: Evaluation = field(
        default_factory=lambda: Evaluation(importance_samples=100, snis_proposals=1000, test_examples=500, samples=1000)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) != 1 or self.shape[0] < 3:
            raise ValueError(f"shape must be one number of tokens ≥ 3 for text, got {self.shape}")

    def load(self, folder: str | None = None) -> Dataset:
        (length,) = self.shape
        dataset = load_data(self.data, folder, max_vocabulary=self.vocabulary, max_length=length - 2)
        padded = [F.pad(part, (0, length - part.shape[1]), value=PAD) for part in dataset.splits]
        return replace(dataset, splits=Splits(*padded))

    def example(self, count: int) -> Tensor:
        x = torch.full((count, *self.shape), UNK)
        x[:, 0] = BOS
        return x

    def vae(self, mean: Tensor | None = None) -> VAE:
        if self.remedies.min_kl:
            raise ValueError("remedies.min_kl must be 0 for text, whose encoder has no such floor")
        return text_vae(
            self.vocabulary,
            self.latent_dim,
            Normal(self.latent_dim),
            embedding_dim=self.embedding_dim,
            hidden_dim=self.hidden_dim,
            max_length=self.shape[0] - 2,
            dropout=self.dropout,
            word_dropout=self.word_dropout,
        )

    def classifier(self) -> nn.Module:
        return MLPClassifier(self.latent_dim, self.prior.hidden, nn.SiLU)

    def transform(self, x: Tensor, training: bool = True) -> Tensor:
        return x

    def comparable(self, x: Tensor) -> Tensor:
        x = x.long()
        words = (x != PAD) & (x != BOS) & (x != EOS)
        counted = (words & (x < FREQUENT)).float()
        counts = counted.new_zeros(len(x), FREQUENT).scatter_add_(1, x.clamp(max=FREQUENT - 1), counted)
        return counts / words.sum(1, keepdim=True).clamp(min=1)

    @property
    def comparable_in(self) -> str:
        return f"each text's frequencies of the {FREQUENT:,} most frequent words"

    def published(self) -> dict[str, str]:
        columns = ("NLL", "MI", "AU", "density", "coverage")
        rows = {
            "none": ("373.45 (1.72)", "0.04 (0.05)", "32.0 (0.0)", "0.07 (0.08)", "0.23 (0.2)"),
            "self": ("433.62 (12.4)", "4.09 (0.02)", "32.0 (0.0)", "0.13 (0.03)", "0.24 (0.06)"),
            "hybrid": ("380.66 (1.37)", "4.07 (0.11)", "32.0 (0.0)", "0.07 (0.05)", "0.21 (0.11)"),
            "neural": ("379.28 (1.62)", "3.95 (0.25)", "32.0 (0.0)", "0.22 (0.12)", "0.38 (0.06)"),
        }
        row = rows.get(self.critic.kind) if self.data == "yahoo" else None
        return {} if row is None else {**dict(zip(columns, row, strict=True)), "runs": "3", "note": STUDY}
