"""VAEs of text: an LSTM encoder, and an LSTM decoder that is a likelihood.

x holds token ids, int64 [B, T]: `<bos>`, the words, `<eos>`, then `<pad>`, as `ncpvae.data.text_lines` makes them. A
word outside the vocabulary is `<unk>`, which counts in the likelihood as any other word does.

The parameters of an autoregressive p(x|z) depend on x, so the decoder of such a VAE cannot hand them on. Here z itself
is what the likelihood gets: `TextLikelihood` makes of it a `TextDistribution`, whose `log_prob` runs the network with
teacher forcing, and whose `sample`, `greedy` and `beam` run it on what it has said so far.

Letters: B batch, N rows, T tokens of a row, V vocabulary, E embedding, H hidden state, D latent dimension, K texts of a
beam.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from . import ops
from ._tokens import BOS, EOS, PAD, SPECIAL, UNK
from .distributions import diagonal_normal
from .pretrained import Pretrained
from .vae import VAE

MAX_ELEMENTS = 1 << 25  # of the tensors that are made in parts where no gradient is needed: 128 MiB in float32

State = tuple[Tensor, Tensor]  # an LSTM's, each [1, N, H]


def text_vae(
    vocabulary_size: int,
    latent_dim: int,
    prior: nn.Module | Distribution,
    *,
    embedding_dim: int = 512,
    hidden_dim: int = 1024,
    max_length: int = 100,
    dropout: float = 0.5,
    word_dropout: float = 0.0,
) -> VAE:
    """A VAE of text with one LSTM on either side.

    Args:
        vocabulary_size: V, the four special tokens included.
        latent_dim: D.
        prior: p(z) with event [D], as `VAE` takes it.
        embedding_dim, hidden_dim: E and H, of the encoder and of the decoder.
        max_length, dropout, word_dropout: see `TextLikelihood`.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating sentences from a continuous space", CoNLL
    2016; dropout and z at every step as He, Spokoyny, Neubig, Berg-Kirkpatrick, "Lagging inference networks and
    posterior collapse in variational autoencoders", ICLR 2019, have them.
    """
    sizes = (vocabulary_size, embedding_dim, hidden_dim, latent_dim)
    likelihood = TextLikelihood(*sizes, max_length=max_length, dropout=dropout, word_dropout=word_dropout)
    return VAE(TextEncoder(*sizes), LatentContext(), likelihood, prior)


def check_tokens(where: str, x: Tensor, vocabulary_size: int) -> Tensor:
    """The number of tokens of each row of x [..., T] before its padding, [...].

    An id outside the vocabulary is found here because on a GPU its lookup would end the process.

    Raises:
        TypeError, ValueError: for what is not token ids, or rows that are not as the module's docstring has them, with
            the first such place.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be token ids, int64 [B, T], got {got}")
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"{where}: x must be [B, T] with T ≥ 1, got shape {tuple(x.shape)}")
    padding, first = x == PAD, torch.arange(x.shape[-1], device=x.device) == 0
    wrong = {
        f"hold ids of the vocabulary, 0 … {vocabulary_size - 1}": (x < 0) | (x >= vocabulary_size),
        "hold more than <pad>": padding & first,
        f"begin with <bos>, {BOS}": (x != BOS) & first,
        "hold <bos> only at its beginning": (x == BOS) & ~first,
        "hold <pad> only at its end": ~padding & padding.roll(1, -1) & ~first,
        "hold nothing but <pad> after <eos>": ~padding & (x == EOS).roll(1, -1) & ~first,
    }
    any_wrong = torch.stack([places.any() for places in wrong.values()]).tolist()  # on a GPU one wait for all of them
    for (must, places), is_wrong in zip(wrong.items(), any_wrong, strict=True):
        if is_wrong:
            row, column = places.flatten(0, -2).nonzero()[0].tolist()
            token = int(x.flatten(0, -2)[row, column])
            raise ValueError(f"{where}: every row of x must {must}; row {row} has {token} at position {column}")
    return x.shape[-1] - padding.sum(-1)


# The encoder


class Embedded(NamedTuple):
    """Rows of text after an embedding."""

    tokens: Tensor  # [B, T, E]
    lengths: Tensor  # [B], int64; what follows a row's first so many tokens is padding


class TextEmbedding(nn.Module):
    """Token ids [B, T] → `Embedded`."""

    def __init__(self, vocabulary_size: int, embedding_dim: int):
        super().__init__()
        self.embedding = token_embedding(vocabulary_size, embedding_dim)

    def forward(self, x: Tensor) -> Embedded:
        lengths = check_tokens("TextEncoder", x, self.embedding.num_embeddings)
        if x.dim() != 2 or len(x) == 0:
            raise ValueError(f"TextEncoder: x must be [B, T] with B ≥ 1, got shape {tuple(x.shape)}")
        return Embedded(self.embedding(x), lengths)


class LastState(nn.Module):
    """`Embedded` → the hidden state [B, H] of an LSTM after each row's last token."""

    def __init__(self, embedding_dim: int, hidden_dim: int):
        super().__init__()
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)

    def forward(self, embedded: Embedded) -> Tensor:
        lengths = embedded.lengths.cpu()
        packed = pack_padded_sequence(embedded.tokens, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return hidden[0]


class TextEncoder(Pretrained):
    """q(z|x) = N(μ(x), diag σ(x)²) from the last state of an LSTM; log σ is clamped to [−10, 10].

    Its three layers are the embedding, the LSTM and a linear layer. A critic can share the first ones:
    `finish(begin(x, share), share)` is `forward(x)` for any `share`.

    Args:
        vocabulary_size: V, the four special tokens included.
        embedding_dim, hidden_dim, latent_dim: E, H and D.
    """

    def __init__(self, vocabulary_size: int, embedding_dim: int, hidden_dim: int, latent_dim: int):
        super().__init__()
        sizes = {"vocabulary_size": vocabulary_size, "embedding_dim": embedding_dim, "hidden_dim": hidden_dim}
        check_sizes("TextEncoder", **sizes, latent_dim=latent_dim)
        self.sizes = (vocabulary_size, embedding_dim, hidden_dim, latent_dim)
        self.layers = encoder_layers(*self.sizes)

    @property
    def num_layers(self) -> int:
        """3: the embedding, the LSTM, the linear layer."""
        return len(self.layers)

    def forward(self, x: Tensor) -> Distribution:
        return self.finish(self.begin(x, 0), 0)

    def begin(self, x: Tensor, share: int) -> Tensor | Embedded:
        """What the first `share` layers make of x [B, T]: x itself, `Embedded`, or the last state [B, H]."""
        return self.layers[: self._checked(share)](x)

    def finish(self, h: Tensor | Embedded, share: int) -> Distribution:
        """q(z|x) from what `begin` returned."""
        mean, log_std = at_least_float32(self.layers[self._checked(share) :](h)).chunk(2, dim=1)
        return diagonal_normal(mean, log_std.clamp(-10.0, 10.0).exp())

    def remainder(self, share: int) -> nn.Module:
        """The layers after the first `share` once more, with new weights: what `begin` returned → [B, 2D]."""
        weight = next(self.parameters())
        return encoder_layers(*self.sizes)[self._checked(share) :].to(weight.device, weight.dtype)

    def _checked(self, share: int) -> int:
        if isinstance(share, bool) or not isinstance(share, int) or not 0 <= share < self.num_layers:
            raise ValueError(
                f"TextEncoder: share must be an integer in 0 … {self.num_layers - 1}, since the encoder has "
                f"{self.num_layers} layers, the last of which is q's own, got {share!r}"
            )
        return share


def encoder_layers(vocabulary_size: int, embedding_dim: int, hidden_dim: int, latent_dim: int) -> nn.Sequential:
    """Token ids [B, T] → [B, 2D], means first."""
    embedding, state = TextEmbedding(vocabulary_size, embedding_dim), LastState(embedding_dim, hidden_dim)
    return nn.Sequential(embedding, state, nn.Linear(hidden_dim, 2 * latent_dim))


def token_embedding(vocabulary_size: int, embedding_dim: int) -> nn.Embedding:
    """An embedding that begins small: of N(0, 1), torch's own, a wide one would saturate the gates of the LSTM."""
    embedding = nn.Embedding(vocabulary_size, embedding_dim)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    return embedding


def at_least_float32(x: Tensor) -> Tensor:
    """x, of which autocast may have made 16 bits a number."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_sizes(where: str, vocabulary_size: int, **sizes: int) -> None:
    """ValueError naming the size that is too small."""
    for name, value, least in (("vocabulary_size", vocabulary_size, len(SPECIAL)), *((*s, 1) for s in sizes.items())):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{where}: {name} must be an integer ≥ {least}, got {value!r}")


# The decoder


class LatentContext(Pretrained):
    """The decoder of a VAE whose likelihood takes z itself."""

    def forward(self, z: Tensor) -> Tensor:
        return z


class TextLikelihood(Pretrained):
    """p(x|z) by an LSTM that gets z with every token, its first state being made of z too.

    Args:
        vocabulary_size: V, the four special tokens included. `<pad>` and `<bos>` have probability 0.
        embedding_dim, hidden_dim, latent_dim: E, H and D.
        max_length: words that are generated at most; it does not bound the rows that `log_prob` takes.
        dropout: probability with which, in training, elements of the embedded tokens and of the LSTM's output are set
            to 0.
        word_dropout: probability with which, in training, a token that the LSTM gets is `<unk>` instead. Those that it
            has to predict stay. It makes the decoder depend on z (Bowman et al., section 3.1).

    Source: see `text_vae`.
    """

    impossible: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        embedding_dim: int,
        hidden_dim: int,
        latent_dim: int,
        max_length: int = 100,
        dropout: float = 0.5,
        word_dropout: float = 0.0,
    ):
        super().__init__()
        sizes = {"embedding_dim": embedding_dim, "hidden_dim": hidden_dim, "latent_dim": latent_dim}
        check_sizes("TextLikelihood", vocabulary_size, **sizes, max_length=max_length)
        for name, value in (("dropout", dropout), ("word_dropout", word_dropout)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"TextLikelihood: {name} must be in [0, 1], got {value!r}")
        self.max_length, self.dropout, self.word_dropout = max_length, dropout, word_dropout
        self.embedding = token_embedding(vocabulary_size, embedding_dim)
        self.first_cell = nn.Linear(latent_dim, hidden_dim)
        self.lstm = nn.LSTM(embedding_dim + latent_dim, hidden_dim, batch_first=True)
        self.output = nn.Linear(hidden_dim, vocabulary_size)
        impossible = torch.zeros(vocabulary_size, dtype=torch.bool)
        impossible[[PAD, BOS]] = True
        self.register_buffer("impossible", impossible)

    @property
    def vocabulary_size(self) -> int:
        return self.output.out_features

    @property
    def latent_dim(self) -> int:
        return self.first_cell.in_features

    def forward(self, context: Tensor, event_dims: int = 1) -> "TextDistribution":
        """p(x|z) for z [..., D]."""
        if event_dims != 1 or context.shape[-1] != self.latent_dim:
            raise ValueError(
                f"TextLikelihood: context must be z [..., {self.latent_dim}] with event_dims 1, "
                f"got shape {tuple(context.shape)} with event_dims {event_dims}"
            )
        return TextDistribution(self, context)

    def first_state(self, z: Tensor) -> State:
        """z [N, D] → the state before `<bos>`."""
        cell = self.first_cell(z)[None]
        return cell.tanh(), cell

    def advance(self, tokens: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:
        """One token [N] further, without dropout: logits [N, V] of the next one, and the state.

        Raises:
            ValueError: where these are not finite, for which there is no next token.
        """
        inputs = torch.cat([self.embedding(tokens), z], dim=-1)
        hidden, state = self.lstm(inputs[:, None], state)
        logits = self.logits(hidden[:, 0])
        if not logits.amax(1).isfinite().all():
            raise ValueError("TextLikelihood: z and the weights must be finite to generate text, got NaN or infinity")
        return logits, state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] → [..., V]."""
        bias = self.output.bias.masked_fill(self.impossible, -math.inf)
        return at_least_float32(F.linear(hidden, self.output.weight, bias))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), nats [N], of rows x [N, T] that have been checked, for z [N, D]."""
        before, after = x[:, :-1], x[:, 1:]
        embedded = F.dropout(self.embedding(self._with_words_dropped(before)), self.dropout, self.training)
        inputs = torch.cat([embedded, z[:, None].expand(-1, before.shape[1], -1)], dim=-1)
        hidden, _ = self.lstm(inputs, self.first_state(z))
        counts = after != PAD
        hidden = F.dropout(hidden[counts], self.dropout, self.training)  # [tokens, H]
        log_p = self._token_log_prob(hidden, after[counts])
        return log_p.new_zeros(after.shape).masked_scatter(counts, log_p).sum(1)

    def _with_words_dropped(self, before: Tensor) -> Tensor:
        if not (self.training and self.word_dropout):
            return before
        dropped = torch.rand(before.shape, device=before.device) < self.word_dropout
        return before.masked_fill(dropped & (before != BOS), UNK)

    def _token_log_prob(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log p of each token [M] from the hidden states [M, H] before it, by a part of the logits [M, V] at a time."""
        if torch.is_grad_enabled():  # all of them are kept for the backward pass anyway
            return -F.cross_entropy(self.logits(hidden), tokens, reduction="none")
        parts = zip(*(t.split(max(1, MAX_ELEMENTS // self.vocabulary_size)) for t in (hidden, tokens)), strict=True)
        return torch.cat([-F.cross_entropy(self.logits(h), t, reduction="none") for h, t in parts])


class TextDistribution(Distribution):
    """p(x|z) over rows of token ids, bound to the network and to z [..., D], whose leading dimensions are its batch.

    Rows are generated as data have them: `<bos>`, at most `max_length` words, `<eos>`, then `<pad>` up to the event
    shape [max_length + 2]. A row that reaches the limit is given its `<eos>` there. Dropout has no part in that.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, network: TextLikelihood, context: Tensor):
        self.network, self.context = network, context
        super().__init__(context.shape[:-1], torch.Size([network.max_length + 2]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x|z), nats: the sum over the tokens after `<bos>`, `<eos>` included and `<pad>` not.

        Of a row without `<eos>` it is the probability of a text that begins so.

        Args:
            value: x [..., T], any T, int64; its leading dimensions and the batch are broadcast.

        Raises:
            TypeError, ValueError: for what is not rows of token ids, or leading dimensions that do not fit.
        """
        lengths = check_tokens("TextDistribution.log_prob", value, self.network.vocabulary_size)
        try:
            shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"TextDistribution.log_prob: x [..., T] must have leading dimensions that go with the batch "
                f"{tuple(self.batch_shape)}, got shape {tuple(value.shape)}"
            ) from error
        longest = int(lengths.max()) if lengths.numel() else 1
        if 0 in shape or longest == 1:  # there are no rows, or nothing after <bos>
            return self.context.new_zeros(shape)
        x = value[..., :longest].expand(*shape, -1).flatten(0, -2)
        z = self.context.expand(*shape, -1).flatten(0, -2)
        if torch.is_grad_enabled():
            return self.network.log_prob(x, z).view(shape)
        rows = max(1, MAX_ELEMENTS // (longest * self.network.lstm.hidden_size))
        parts = zip(x.split(rows), z.split(rows), strict=True)
        return torch.cat([self.network.log_prob(*part) for part in parts]).view(shape)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = (), temperature: float = 1.0) -> Tensor:
        """Ancestral draws, int64 [*sample_shape, *batch, max_length + 2].

        Args:
            sample_shape: draws for each z.
            temperature: divides the logits of every step; 1 draws from p(x|z).
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"TextDistribution.sample: temperature must be finite and > 0, got {temperature!r}")

        def draw(logits: Tensor) -> Tensor:
            log_weights = (logits - logits.amax(1, keepdim=True)) / temperature  # ≤ 0, so that none is divided to +inf
            return ops.sir_resample(log_weights, ops.draw_seed(logits.device), 1)[0][:, 0]

        shape = torch.Size(sample_shape) + self.batch_shape
        return self._in_parts(shape, 1, partial(generate, self.network, draw))

    def greedy(self) -> Tensor:
        """The most probable token at every step, int64 [*batch, max_length + 2]."""
        return self._in_parts(self.batch_shape, 1, partial(generate, self.network, lambda logits: logits.argmax(1)))

    def beam(self, width: int, length_penalty: float = 0.0) -> Tensor:
        """The best text that beam search finds, int64 [*batch, max_length + 2].

        Args:
            width: texts that are kept at every step, finished ones included; 1 is `greedy`.
            length_penalty: α ≥ 0. Texts are ranked by log p / lengthᵅ, `<eos>` counted: 0 ranks by p(x|z), which
                favours short texts, and 1 by the mean per token.
        """
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"TextDistribution.beam: width must be an integer ≥ 1, got {width!r}")
        if not (math.isfinite(length_penalty) and length_penalty >= 0):
            raise ValueError(f"TextDistribution.beam: length_penalty must be finite and ≥ 0, got {length_penalty!r}")
        search = partial(beam_search, self.network, width=width, length_penalty=length_penalty)
        return self._in_parts(self.batch_shape, width, search)

    def _in_parts(self, shape: torch.Size, width: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [*shape, T] of `decode`: z [N, D] → [N, T], which holds `width` logits [N, V] at a time."""
        if 0 in shape:
            return torch.full((*shape, *self.event_shape), PAD, device=self.context.device)
        z = self.context.expand(*shape, -1).reshape(-1, self.context.shape[-1])
        rows = max(1, MAX_ELEMENTS // (width * self.network.vocabulary_size))
        with torch.no_grad():
            return torch.cat([decode(part) for part in z.split(rows)]).view(*shape, -1)


def generate(network: TextLikelihood, choose: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Rows [N, max_length + 2] for z [N, D], every next token being what `choose` makes of logits [N, V]."""
    x = torch.full((len(z), network.max_length + 2), PAD, device=z.device)
    x[:, 0] = BOS
    state = network.first_state(z)
    unfinished = torch.ones(len(z), dtype=torch.bool, device=z.device)
    for t in range(1, network.max_length + 1):
        logits, state = network.advance(x[:, t - 1], z, state)
        x[:, t] = choose(logits).where(unfinished, PAD)
        unfinished &= x[:, t] != EOS
        if not unfinished.any():
            break
    x[unfinished, -1] = EOS
    return x


class Beams(NamedTuple):
    """The K texts that a beam search keeps for each of N rows, the best first."""

    x: Tensor  # [N, K, max_length + 2]
    log_p: Tensor  # [N, K], nats; −inf where there are not yet K different texts
    length: Tensor  # [N, K], tokens after <bos>
    finished: Tensor  # [N, K], whether a text has its <eos>


def beam_search(network: TextLikelihood, z: Tensor, width: int, length_penalty: float) -> Tensor:
    """Rows [N, max_length + 2] for z [N, D]: the best of each row's `width` = K texts."""
    shape = (len(z), width)
    x = torch.full((*shape, network.max_length + 2), PAD, device=z.device)
    x[..., 0] = BOS
    log_p = torch.full(shape, -math.inf, device=z.device)
    log_p[:, 0] = 0.0  # K times <bos> is one text
    beams = Beams(x, log_p, torch.zeros_like(log_p), torch.zeros_like(log_p, dtype=torch.bool))
    first = torch.arange(len(z), device=z.device)[:, None] * width  # of each beam among the N·K texts
    z = z.repeat_interleave(width, 0)  # [N·K, D]
    state = network.first_state(z)
    for t in range(1, network.max_length + 2):
        logits, state = network.advance(beams.x[..., t - 1].flatten(), z, state)
        beams, parents = prolonged(beams, t, logits.log_softmax(-1).view(*shape, -1), length_penalty)
        if beams.finished.all():
            break
        rows = (first + parents).flatten()
        state = (state[0][:, rows], state[1][:, rows])
    return beams.x[:, 0]


def prolonged(beams: Beams, t: int, log_p: Tensor, length_penalty: float) -> tuple[Beams, Tensor]:
    """The best K of all texts that are one token, with log p [N, K, V], longer; and which text each comes from [N, K].

    A finished text competes with them as it is, its one continuation being `<pad>`.
    """
    width, token = log_p.shape[1], torch.arange(log_p.shape[2], device=log_p.device)
    if t == beams.x.shape[-1] - 1:
        log_p = log_p.masked_fill(token != EOS, -math.inf)
    only_pad = torch.zeros_like(log_p[0, 0]).masked_fill(token != PAD, -math.inf)
    log_p = beams.log_p[..., None] + only_pad.where(beams.finished[..., None], log_p)
    length = beams.length + ~beams.finished
    best = (log_p / length[..., None] ** length_penalty).flatten(1).topk(width).indices  # [N, K] of K·V
    parents, tokens = best // len(token), best % len(token)
    x = beams.x.gather(1, parents[..., None].expand_as(beams.x))
    x[..., t] = tokens
    finished = beams.finished.gather(1, parents) | (tokens == EOS)
    return Beams(x, log_p.flatten(1).gather(1, best), length.gather(1, parents), finished), parents
