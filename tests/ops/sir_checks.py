"""What the tests of sir_resample and sir_update share: weights, the contract worked out in float64, a χ² test."""

import math

import torch
from hypothesis import settings

from ncpvae import ops
from ncpvae.ops import reference
from ncpvae.ops.reference import TILE

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def wide(dtype):
    """What an op computes in, at least: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_weights(rows, columns, dtype=torch.float32, device="cpu", spread=2.0):
    return (torch.randn(rows, columns, dtype=torch.float64) * spread).to(dtype).to(device)


def assert_indices_follow_the_contract(log_weights, seed, index, start=0, start_tile=0):
    """Each index is what the tile-Gumbel rule, worked out here in float64, allows up to rounding.

    Its tile's key is the largest, and the tile's threshold falls inside its interval of the tile's CDF. Only kernels
    that work in float32 may be off, by rounding: 1e-5 of a key or of the tile's mass.
    """
    slack = 1e-12 if log_weights.dtype == torch.float64 else 1e-5
    w, seed, index = log_weights.double().cpu(), seed.cpu(), index.cpu()
    B, M = w.shape
    n = index.shape[1]
    row_draw = torch.arange(B * n).view(B, n)
    keys, below, mass = [], [], []
    for t, tile in enumerate(w.split(TILE, 1)):
        x0, x1, x2, x3 = reference.random_words(seed, row_draw, start_tile + t)
        lse = tile.logsumexp(1)[:, None]
        keys.append(lse - torch.log(-torch.log(reference.uniform52(x0, x1))))
        share = torch.exp(tile - lse)  # [B, tile]
        cdf = share.cumsum(1)
        place = (index - start - t * TILE).clamp(0, tile.shape[1] - 1)
        below.append(reference.uniform52(x2, x3) - (cdf - share).gather(1, place))
        mass.append(share.gather(1, place))
    keys = torch.stack(keys, 2)
    tile = ((index - start) // TILE)[..., None]
    chosen = [torch.stack(v, 2).gather(2, tile).squeeze(2) for v in (below, mass)]
    assert (index >= start).all() and (index < start + M).all()
    assert (w.gather(1, index - start) > -INF).all(), "a proposal of weight zero was drawn"
    scale = keys.gather(2, tile).squeeze(2).abs().clamp(1)
    assert (keys.gather(2, tile).squeeze(2) >= keys.amax(2) - slack * scale).all(), "not the winning tile"
    assert (chosen[0] >= -slack).all() and (chosen[0] <= chosen[1] + slack).all(), "not the CDF's place in the tile"


def p_value(index, p):
    """χ² of the counts of `index` against the probabilities p, the chance of a larger value."""
    counts = torch.bincount(index.flatten(), minlength=p.numel()).double()
    expected = p * index.numel()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_df = torch.tensor((p.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_df, statistic / 2))


def stream(w, seed, n, lengths, first_index=0):
    state = ops.sir_state(w.shape[0], n, w.device, first_index)
    for chunk in w.split(lengths, 1):
        state = ops.sir_update(state, chunk, seed)
    return state
