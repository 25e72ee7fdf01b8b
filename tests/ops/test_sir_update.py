"""sir_update and sir_merge: streaming and merging give the one-shot result."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sir_checks import DTYPES, FEW, INF, NAN, assert_indices_follow_the_contract, p_value, random_weights, stream

from ncpvae import ops
from ncpvae.ops.reference import TILE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[4100], [TILE] * 4 + [4], [2 * TILE, TILE, TILE + 4], [3 * TILE, TILE + 4]], ids=str
)
def test_whole_tiles_stream_to_the_one_shot_result(lengths, dtype, device, make_seed):
    w, seed = random_weights(5, 4100, dtype, device), make_seed(device)
    w[1], w[2, 4000], w[3, 0], w[4, : 2 * TILE] = -INF, NAN, INF, -INF
    state, (index, log_mean, ess) = stream(w, seed, 6, lengths), ops.sir_resample(w, seed, 6)
    assert torch.equal(state.indices, index)
    assert state.num_seen == 4100 and state.log_mean_weight.dtype == torch.float64
    torch.testing.assert_close(state.log_mean_weight.to(log_mean.dtype), log_mean, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(state.ess.to(ess.dtype), ess, rtol=1e-5, atol=0, equal_nan=True)
    if dtype == torch.float64:
        torch.testing.assert_close(state.ess, ess, rtol=1e-14, atol=0, equal_nan=True)
        torch.testing.assert_close(state.log_mean_weight, log_mean, rtol=1e-14, atol=1e-14, equal_nan=True)


def test_streaming_whole_tiles_rounds_the_same_for_any_chunking(device, make_seed):
    w, seed = random_weights(5, 4100, device=device), make_seed(device)
    one = stream(w, seed, 6, [4100])
    for lengths in ([TILE] * 4 + [4], [2 * TILE, 2 * TILE + 4]):
        other = stream(w, seed, 6, lengths)
        assert one[5:] == other[5:] and all(map(torch.equal, one[:5], other[:5]))


@pytest.mark.parametrize("last", [0.0, NAN], ids=["", "with NaN"])
def test_more_than_a_thousand_tiles_round_the_same_for_any_chunking(last, device, make_seed):
    w, seed = random_weights(1, 1030 * TILE + 5, torch.float16, device), make_seed(device)
    w[0, -1] = last
    one, (index, log_mean, ess) = stream(w, seed, 2, w.shape[1]), ops.sir_resample(w, seed, 2)
    other = stream(w, seed, 2, [TILE, 16 * TILE, 17 * TILE, 600 * TILE, 396 * TILE + 5])
    for a, b in zip(one[:5], other[:5], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.indices, index) and one[5:] == other[5:]
    for a, b in ((one.log_mean_weight, log_mean), (one.ess, ess)):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-6, atol=0, equal_nan=True)
    if last == 0:
        torch.testing.assert_close(log_mean.double(), w.double().logsumexp(1) - math.log(w.shape[1]), rtol=0, atol=1e-6)
        assert_indices_follow_the_contract(w, seed, index)


def test_update_leaves_the_given_state_as_it_was(device, make_seed):
    w, seed = random_weights(3, 1500, device=device), make_seed(device)
    state = ops.sir_update(ops.sir_state(3, 2, device), w, seed)
    before = [t.clone() for t in state[:5]]
    ops.sir_update(state, w, seed)
    ops.sir_merge(state, ops.sir_update(ops.sir_state(3, 2, device, 2 * TILE), w, seed))
    assert all(map(torch.equal, state[:5], before))


def test_ragged_chunks_still_draw_by_weight(device, make_seed):
    """Chunk lengths that are no multiples of the tile give another draw, of the same distribution."""
    lengths = [1, 300, 1024, 37, 138]
    w = random_weights(1, sum(lengths), device=device, spread=0.5).clamp(-1, 1)
    p = torch.softmax(w[0].double().cpu(), 0)
    state = stream(w, make_seed(device), 1 << 16, lengths)
    assert state.num_seen == state.next_index == 1500 and state.next_tile == 5
    assert 1e-4 < p_value(state.indices.cpu(), p) < 1 - 1e-4
    torch.testing.assert_close(
        state.log_mean_weight.cpu(), w.double().cpu().logsumexp(1) - math.log(1500), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(state.ess.cpu(), 1 / p.square().sum()[None], rtol=1e-5, atol=0)


@FEW
@given(lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=6), key=st.integers(0, 2**63 - 1))
def test_any_chunking_gives_a_valid_choice_and_the_same_sums(device, lengths, key):
    w, seed = random_weights(2, sum(lengths), torch.float64, device), torch.tensor([key, 0], device=device)
    w[0, ::3] = -INF
    w[0, -1] = 0
    state = stream(w, seed, 3, lengths)
    assert (w.gather(1, state.indices) > -INF).all()
    torch.testing.assert_close(state.log_mean_weight, w.logsumexp(1) - math.log(w.shape[1]))
    torch.testing.assert_close(state.ess, 1 / torch.softmax(w, 1).square().sum(1))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_chunk_spoils_its_row_for_good_and_no_other(bad, device, make_seed):
    w, seed = random_weights(3, 3 * TILE, device=device), make_seed(device)
    clean = stream(w, seed, 4, TILE)
    w[1, TILE + 7] = bad
    state = stream(w, seed, 4, TILE)
    assert (state.indices[1] == -1).all() and state.log_mean_weight[1].isnan() and state.ess[1].isnan()
    assert torch.equal(state.indices[[0, 2]], clean.indices[[0, 2]]) and torch.equal(
        state.ess[[0, 2]], clean.ess[[0, 2]]
    )


def test_chunks_without_mass_change_only_the_count(device, make_seed):
    w, seed = random_weights(2, TILE, device=device), make_seed(device)
    nothing = torch.full_like(w, -INF)
    first = stream(nothing, seed, 4, TILE)
    assert (first.indices == -1).all() and (first.log_mean_weight == -INF).all() and (first.ess == 0).all()
    state = ops.sir_update(ops.sir_update(first, w, seed), nothing, seed)
    assert ((state.indices >= TILE) & (state.indices < 2 * TILE)).all()
    torch.testing.assert_close(
        state.log_mean_weight, w.double().logsumexp(1) - math.log(3 * TILE), rtol=1e-6, atol=1e-6
    )


def parts(w, seed, n, sizes):
    """States over consecutive slices of the proposals, numbered as in the whole row."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [stream(w[:, a : a + m], seed, n, TILE, first_index=a) for a, m in zip(starts, sizes, strict=True)]


def test_merged_states_equal_the_single_one(device, make_seed):
    w, seed = random_weights(5, 5 * TILE + 9, device=device), make_seed(device)
    w[1], w[2, 3 * TILE], w[3, :TILE], w[4, 1] = -INF, NAN, -INF, INF
    whole = stream(w, seed, 6, TILE)
    a, b, c = parts(w, seed, 6, [2 * TILE, TILE, 2 * TILE + 9])
    left = ops.sir_merge(ops.sir_merge(a, b), c)
    right = ops.sir_merge(a, ops.sir_merge(b, c))
    turned = ops.sir_merge(c, ops.sir_merge(a, b))
    for merged in (left, right, turned):
        assert torch.equal(merged.indices, whole.indices)
        assert merged[5:] == whole[5:]
        torch.testing.assert_close(
            merged.log_mean_weight, whole.log_mean_weight, equal_nan=True, rtol=1e-13, atol=1e-13
        )
        torch.testing.assert_close(merged.ess, whole.ess, equal_nan=True, rtol=1e-13, atol=0)
    assert torch.equal(left.key, right.key)


def test_merging_with_an_empty_state_changes_nothing(device, make_seed):
    state = stream(random_weights(3, 1500, device=device), make_seed(device), 2, TILE)
    for merged in (
        ops.sir_merge(state, ops.sir_state(3, 2, device, 2 * TILE)),
        ops.sir_merge(ops.sir_state(3, 2, device, 2 * TILE), state),
    ):
        assert all(map(torch.equal, merged[:5], state[:5])) and merged.num_seen == state.num_seen


def test_merged_ranks_draw_by_weight(device, make_seed):
    """Two ranks of unequal mass, numbered far apart: the choice between them follows their weights."""
    w, seed = random_weights(2, 1000, device=device, spread=0.5).clamp(-1, 1), make_seed(device)
    w[1] += 1
    one = stream(w[:1], seed, 1 << 16, TILE)
    two = stream(w[1:], seed, 1 << 16, TILE, first_index=10 * TILE)
    index = ops.sir_merge(one, two).indices.cpu()
    index = torch.where(index >= 10 * TILE, index - 10 * TILE + 1000, index)
    assert 1e-4 < p_value(index, torch.softmax(w.double().cpu().flatten(), 0)) < 1 - 1e-4


def test_state_numbers_its_proposals_from_first_index(device, make_seed):
    w, seed = random_weights(3, 1500, device=device), make_seed(device)
    state = stream(w, seed, 4, TILE, first_index=7 * TILE)
    assert state.next_index == 7 * TILE + 1500 and state.next_tile == 9 and state.num_seen == 1500
    assert_indices_follow_the_contract(w, seed, state.indices, start=7 * TILE, start_tile=7)
