"""Every op of the package in plain torch: the definition that the native kernels are tested against.

These functions are also the ops' default kernels, so they are what runs where no native kernel is built.
They take checked input (`ncpvae.ops.<op>` does the checking) and favour the shortest statement of the
mathematics; the loops over chunks are there only to bound memory.

Letters: B batch, M proposals per row, n draws per row, N rows and K columns of a pairwise score,
D latent dimension. Everything called `log_…` is in nats.
"""

import math

import torch
from torch import Tensor

TILE = 1024  # proposals per logical tile of SIR; part of the contract, since it decides which uniform goes where
CHUNK_ELEMENTS = 1 << 22  # elements that a chunked loop may hold at once

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------
# Randomness: Philox4x32-10 and the maps from its words to variates
# ---------------------------------------------------------------------------------------------------------


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `multiplier · word`, both below 2³², within int64 arithmetic."""
    high_half, low_half = word >> 16, word & 0xFFFF
    high = (multiplier * high_half + ((multiplier * low_half) >> 16)) >> 16
    return high, (multiplier * word) & MASK32


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with ten rounds: four counter words and two key words to four random words.

    Every word is an int64 tensor holding a value in [0, 2³²); the tensors broadcast against each other.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_high_low(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK32, (k1 + PHILOX_WEYL[1]) & MASK32
    return c0, c1, c2, c3


def random_words(seed: Tensor, index: Tensor, sub: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words at 64-bit position `index` and 32-bit position `sub` under `seed` = (key, stream).

    Counter words: (low and high half of `index`, `sub`, low half of the stream). Key words: the halves of
    the key. Only the stream's low 32 bits count.
    """
    key, stream = seed[0], seed[1]
    sub = torch.as_tensor(sub, dtype=torch.int64, device=seed.device)
    counter = (index & MASK32, (index >> 32) & MASK32, sub, stream & MASK32)
    return philox4x32(counter, (key & MASK32, (key >> 32) & MASK32))


def uniform52(high: Tensor, low: Tensor) -> Tensor:
    """Two words to a float64 uniform strictly inside (0, 1): the midpoints of 2⁵² equal cells."""
    return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel variates by inversion: −log(−log u)."""
    return -torch.log(-torch.log(uniform))


def normal_pair(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two words to two independent standard Normal variates (Box and Muller, 1958) in `dtype` arithmetic."""
    u = first.to(dtype) * 2.0**-32 + 2.0**-33
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), second.to(dtype) * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def standard_normal(shape: torch.Size, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Normal noise: element i, in row-major order, is variate i mod 4 of the block at index i // 4."""
    count = shape.numel()
    block = torch.arange((count + 3) // 4, device=seed.device)
    x0, x1, x2, x3 = random_words(seed, block)
    noise = torch.stack([*normal_pair(x0, x1, dtype), *normal_pair(x2, x3, dtype)], dim=-1)
    return noise.flatten()[:count].view(shape)


# ---------------------------------------------------------------------------------------------------------
# sir_resample, sir_update, sir_merge
# ---------------------------------------------------------------------------------------------------------


def _fold(log_max: Tensor, total: Tensor, total_sq: Tensor, other: tuple[Tensor, Tensor, Tensor]):
    """Join two summaries (max m, Σe^{w−m}, Σe^{2(w−m)}); NaN in either maximum stays NaN."""
    new_max = torch.maximum(log_max, other[0])
    finite_max = torch.where(new_max == -math.inf, 0.0, new_max)
    mine, theirs = torch.exp(log_max - finite_max), torch.exp(other[0] - finite_max)
    return new_max, total * mine + other[1] * theirs, total_sq * mine**2 + other[2] * theirs**2


def sir_update(
    log_weights: Tensor,  # [B, M]
    seed: Tensor,  # [2]
    key: Tensor,  # [B, n]  best perturbed log-weight so far
    index: Tensor,  # [B, n]  the proposal that holds it, −1 for none
    log_max: Tensor,  # [B]
    total: Tensor,  # [B]     Σ exp(w − log_max)
    total_sq: Tensor,  # [B]     Σ exp(2 (w − log_max))
    next_index: int,
    next_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fold M further proposals, numbered from `next_index`, into a resampling state.

    Tile t of the row has Σe = S_t over its weights relative to their maximum m_t. By the Gumbel-max trick
    the tile with the largest m_t + log S_t + Gumbel wins with probability proportional to its weight, and
    inverting the CDF inside the winner then gives each proposal its own weight. A running maximum over
    tiles is all that has to be kept, which is why proposals can be streamed.
    """
    B, M = log_weights.shape
    n = key.shape[1]
    tiles = (M + TILE - 1) // TILE
    w = torch.full((B, tiles * TILE), -math.inf, dtype=torch.float64, device=log_weights.device)
    w[:, :M] = log_weights
    invalid = (w.isnan() | (w == math.inf)).any(1) | log_max.isnan()
    w = w.view(B, tiles, TILE)
    tile_max = w.amax(2)
    e = torch.exp(w - torch.where(tile_max == -math.inf, 0.0, tile_max)[..., None])
    cumulative = e.cumsum(2)
    tile_total, tile_total_sq = cumulative[..., -1], e.square().sum(2)

    # One Philox block per (row, draw, tile): two words perturb the tile's weight, two choose inside it.
    row_draw = torch.arange(B * n, device=seed.device).view(B, n, 1)
    x0, x1, x2, x3 = random_words(seed, row_draw, torch.arange(next_tile, next_tile + tiles, device=seed.device))
    tile_key = (tile_max + tile_total.log())[:, None] + gumbel(uniform52(x0, x1))  # [B, n, tiles]
    threshold = uniform52(x2, x3).transpose(1, 2) * tile_total[..., None]  # [B, tiles, n]
    inside = torch.searchsorted(cumulative, threshold.contiguous(), right=True)
    last_positive = (cumulative < tile_total[..., None]).sum(2, keepdim=True)
    inside = torch.minimum(inside, last_positive).transpose(1, 2)  # [B, n, tiles]

    best_key, best_tile = tile_key.max(2)
    proposal = next_index + best_tile * TILE + inside.gather(2, best_tile[..., None]).squeeze(2)
    wins = best_key > key
    key, index = torch.where(wins, best_key, key), torch.where(wins, proposal, index)

    for t in range(tiles):  # in order, so that streaming whole tiles rounds exactly as one call does
        summary = (tile_max[:, t], tile_total[:, t], tile_total_sq[:, t])
        log_max, total, total_sq = _fold(log_max, total, total_sq, summary)
    nan = torch.where(invalid, math.nan, 0.0).to(total)
    key = torch.where(invalid[:, None], -math.inf, key)
    index = torch.where(invalid[:, None], -1, index)
    return key, index, torch.where(invalid, nan, log_max), total + nan, total_sq + nan


def sir_merge(
    key: Tensor,
    index: Tensor,
    log_max: Tensor,
    total: Tensor,
    total_sq: Tensor,
    other_key: Tensor,
    other_index: Tensor,
    other_log_max: Tensor,
    other_total: Tensor,
    other_total_sq: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Join the states of two disjoint sets of proposals. Associative, and commutative up to exact ties."""
    wins = other_key > key
    key, index = torch.where(wins, other_key, key), torch.where(wins, other_index, index)
    log_max, total, total_sq = _fold(log_max, total, total_sq, (other_log_max, other_total, other_total_sq))
    invalid = log_max.isnan()[:, None]
    return torch.where(invalid, -math.inf, key), torch.where(invalid, -1, index), log_max, total, total_sq


def sir_summary(log_max: Tensor, total: Tensor, total_sq: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(log of the mean weight, effective sample size (Σw)²/Σw²) of `count` weights; −inf and 0 without mass."""
    empty = log_max == -math.inf
    log_mean = torch.where(empty, -math.inf, log_max + total.log() - math.log(max(count, 1)))
    return log_mean, torch.where(empty, 0.0, total.square() / total_sq)


def sir_resample(log_weights: Tensor, seed: Tensor, num_samples: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`num_samples` indices per row from softmax(log_weights), with the row's log-mean weight and ESS."""
    B, M = log_weights.shape
    nothing = torch.full((B,), -math.inf, dtype=torch.float64, device=log_weights.device)
    zero = torch.zeros_like(nothing)
    key = nothing[:, None].expand(B, num_samples)
    index = torch.full_like(key, -1, dtype=torch.int64)
    _, index, log_max, total, total_sq = sir_update(log_weights, seed, key, index, nothing, zero, zero, 0, 0)
    log_mean, ess = sir_summary(log_max, total, total_sq, M)
    dtype = accumulation_dtype(log_weights.dtype)
    return index, log_mean.to(dtype), ess.to(dtype)


# ---------------------------------------------------------------------------------------------------------
# langevin_step
# ---------------------------------------------------------------------------------------------------------


def langevin_step(
    z: Tensor,
    score: Tensor,
    seed: Tensor,
    step_size: float,
    base_mean: Tensor | None = None,
    base_std: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z + ½λ·(score + (mean − z)/std²) + √(λ·temperature)·ε, the base's own gradient left out where none is given."""
    dtype = accumulation_dtype(z.dtype)
    position, drift = z.to(dtype), score.to(dtype)
    if base_mean is not None and base_std is not None:
        std = base_std.to(dtype)
        drift = (
            drift + (base_mean.to(dtype) - position) / std / std
        )  # and not by std², which underflows before it should
    position = position + 0.5 * step_size * drift
    if temperature > 0:
        position = position + math.sqrt(step_size * temperature) * standard_normal(z.shape, seed, dtype)
    return position.to(z.dtype).contiguous()


# ---------------------------------------------------------------------------------------------------------
# similarity_logsumexp
# ---------------------------------------------------------------------------------------------------------


def _row_chunks(rows: int, elements_per_row: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def similarity_logsumexp(z: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column logsumexp of the scores s = scale · z xᵀ."""
    dtype = accumulation_dtype(z.dtype)
    z, x, scale = z.to(dtype), x.to(dtype), scale.to(dtype)
    lse_z, lse_x = [z.new_empty(0)], x.new_full((x.shape[0],), -math.inf)
    for rows in _row_chunks(z.shape[0], x.shape[0]):
        s = scale * (z[rows] @ x.T)
        lse_z.append(s.logsumexp(1))
        lse_x = torch.logaddexp(lse_x, s.logsumexp(0))
    return torch.cat(lse_z), lse_x


def similarity_logsumexp_backward(
    grad_z: Tensor, grad_x: Tensor, z: Tensor, x: Tensor, scale: Tensor, lse_z: Tensor, lse_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ⟨grad_z, lse_z⟩ + ⟨grad_x, lse_x⟩ with respect to z, x and scale.

    ∂/∂s_ij = grad_z_i · exp(s_ij − lse_z_i) + grad_x_j · exp(s_ij − lse_x_j), with s recomputed.
    """
    dtype = accumulation_dtype(z.dtype)
    z_, x_, scale_ = z.to(dtype), x.to(dtype), scale.to(dtype)
    dz, dx, dscale = [z_.new_empty(0, z.shape[1])], torch.zeros_like(x_), torch.zeros_like(scale_)
    for rows in _row_chunks(z.shape[0], x.shape[0]):
        dot = z_[rows] @ x_.T
        s = scale_ * dot
        ds = grad_z[rows, None] * torch.exp(s - lse_z[rows, None]) + grad_x * torch.exp(s - lse_x)
        dz.append(scale_ * (ds @ x_))
        dx = dx + scale_ * (ds.T @ z_[rows])
        dscale = dscale + (ds * dot).sum()
    return torch.cat(dz).to(z.dtype), dx.to(x.dtype).contiguous(), dscale.to(scale.dtype)


# ---------------------------------------------------------------------------------------------------------
# gaussian_logsumexp
# ---------------------------------------------------------------------------------------------------------


def gaussian_logsumexp(z: Tensor, mean: Tensor, log_std: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """log Σ_k w_k N(z_n; mean_k, std_k²), the square formed as ((z − mean)/std)²."""
    dtype = accumulation_dtype(z.dtype)
    z, mean, log_std = z.to(dtype), mean.to(dtype), log_std.to(dtype)
    offset = _component_offset(log_std, log_weight)
    out = [z.new_empty(0)]
    for rows in _row_chunks(z.shape[0], mean.numel()):
        t = (z[rows, None] - mean) * torch.exp(-log_std)  # [n, K, D]
        out.append(torch.logsumexp(offset - 0.5 * t.square().sum(2), dim=1))
    return torch.cat(out)


def _component_offset(log_std: Tensor, log_weight: Tensor | None) -> Tensor:
    """log w_k − Σ_d log std_kd − D/2 · log 2π, [K]."""
    offset = -log_std.sum(1) - 0.5 * log_std.shape[1] * math.log(2 * math.pi)
    return offset if log_weight is None else offset + log_weight.to(offset.dtype)


def gaussian_logsumexp_backward(
    grad: Tensor, z: Tensor, mean: Tensor, log_std: Tensor, log_weight: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ⟨grad, lse⟩ with respect to z, mean, log_std and log_weight.

    With responsibilities ρ_nk = exp(log(w_k N(z_n; k)) − lse_n) and t = (z − mean)/std:
    ∂z = −Σ_k ρ t/std, ∂mean = Σ_n ρ t/std, ∂log_std = Σ_n ρ (t² − 1), ∂log_weight = Σ_n ρ, all times grad_n.
    A row without mass (lse = −inf) has no gradient.
    """
    dtype = accumulation_dtype(z.dtype)
    z_, mean_, log_std_ = z.to(dtype), mean.to(dtype), log_std.to(dtype)
    offset = _component_offset(log_std_, log_weight)
    inverse_std = torch.exp(-log_std_)
    dz, dmean, dlog_std, dlog_weight = (
        [torch.zeros_like(z_[:0])],
        *(torch.zeros_like(v) for v in (mean_, mean_, offset)),
    )
    for rows in _row_chunks(z.shape[0], mean.numel()):
        t = (z_[rows, None] - mean_) * inverse_std  # [n, K, D]
        log_joint = offset - 0.5 * t.square().sum(2)
        safe_lse = torch.where(lse[rows] == -math.inf, 0.0, lse[rows])
        rho = grad[rows, None] * torch.exp(log_joint - safe_lse[:, None])  # [n, K]
        t = t.masked_fill((rho == 0)[..., None], 0.0)  # a t of ∞ belongs to a component without responsibility
        pull = rho[..., None] * t * inverse_std
        dz.append(-pull.sum(1))
        dmean = dmean + pull.sum(0)
        dlog_std = dlog_std + (rho[..., None] * (t.square() - 1)).sum(0)
        dlog_weight = dlog_weight + rho.sum(0)
    weight_dtype = dtype if log_weight is None else log_weight.dtype
    dmean, dlog_std = dmean.to(mean.dtype).contiguous(), dlog_std.to(log_std.dtype).contiguous()
    return torch.cat(dz).to(z.dtype), dmean, dlog_std, dlog_weight.to(weight_dtype)
