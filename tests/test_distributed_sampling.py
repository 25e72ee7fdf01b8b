"""Sampling and metrics by several processes give what one gives. All results come from one run per world size."""

import functools
import os
import re
import time

import pytest
import torch
from processes import run_processes
from torch import distributed
from torch.distributions import Independent
from torch.distributions import Normal as TorchNormal
from toy import LOG_Z, MEAN, STD, ExactRatio, exact_prior

from ncpvae import SIR, Langevin, MLPClassifier, NoiseContrastivePrior, Normal, metrics, ops, samplers
from ncpvae._distributed import block_seed, fingerprint, rank, ranks, world_size
from ncpvae.distributions import diagonal_normal
from ncpvae.sharding import sample_blocks, sample_sharded

WORLDS = (2, 3)
SIR_CASES = {
    "plain": {"num_proposals": 5000},
    "one chunk": {"num_proposals": 700},
    "long chunks": {"num_proposals": 5000, "chunk_size": 2048},
    "odd chunks": {"num_proposals": 500, "chunk_size": 37},
    "shared sets": {"num_proposals": 3000, "draws_per_row": 3},
    "min_ess": {"num_proposals": 500, "min_ess": 4500.0, "max_proposals": 30_000},
    "min_ess in one chunk": {"num_proposals": 2000, "min_ess": 1.0},
    "max_proposals": {"num_proposals": 500, "min_ess": 1e6, "max_proposals": 4500},
}


class CountedRatio(torch.nn.Module):
    """An MLP's ratio that counts the z it has seen; it depends on the context where there is one."""

    def __init__(self):
        super().__init__()
        self.count, self.network = 0, MLPClassifier(2, hidden=(16,))

    def forward(self, z, context=None):
        self.count += z[..., 0].numel()
        log_ratio = self.network(z.flatten(0, -2)).view(z.shape[:-1])
        return log_ratio if context is None else log_ratio * context


def counted_prior():
    torch.manual_seed(5)
    return NoiseContrastivePrior(Normal(2), CountedRatio())


def sampled(prior, case, context=None):
    """What SIR gives, and the next random number after it, which tells whether the generators were left alike."""
    torch.manual_seed(7)
    result = SIR(**case).sample(prior(context), (7,))
    d = result.diagnostics
    return {
        "z": result.z.numpy().tobytes(),
        "shape": tuple(result.z.shape),
        "log_normalizer": d.log_normalizer,
        "ess": d.ess,
        "num_proposals": d.num_proposals,
        "stopped": d.stopped,
        "next": torch.rand(()).item(),
    }


def sir(shard_proposals):
    cases = {name: case | {"shard_proposals": shard_proposals} for name, case in SIR_CASES.items()}
    results = {name: sampled(counted_prior(), case) for name, case in cases.items()}
    base = diagonal_normal(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), torch.ones(3, 2))
    conditional = NoiseContrastivePrior(base, counted_prior().classifier)
    context = torch.tensor([0.5, 1.0, 2.0])[:, None]
    results["contexts"] = sampled(conditional, cases["shared sets"], context)
    held = samplers.sir.MAX_ELEMENTS_HELD
    samplers.sir.MAX_ELEMENTS_HELD = 3 * 2 * samplers.TILE  # three sets in a block
    results["blocks"] = sampled(counted_prior(), cases["min_ess"])
    samplers.sir.MAX_ELEMENTS_HELD = held
    return results


def classified():
    """z seen by this rank's classifier for 10 chunks of 1,024 proposals."""
    prior = counted_prior()
    SIR(10_240, shard_proposals=True).sample(prior(), (2,), torch.Generator().manual_seed(0))
    return prior.classifier.count


def normalizer():
    prior = counted_prior()
    alone, shared = (
        prior.estimate_log_normalizer(100_000, torch.Generator().manual_seed(1), distributed=d) for d in (False, True)
    )
    return {"alone": alone, "shared": shared, "kept": prior().log_normalizer, "count": prior.classifier.count}


def sharded():
    def pack(result):
        d = result.diagnostics
        return result.z, d.ess, d.log_normalizer, d.num_proposals, d.stopped

    before = torch.get_rng_state()
    exact = exact_prior()()
    blocks = [(first, r.z) for first, r in sample_blocks(exact, 60, SIR(50), seed=3, block_size=8)]
    gathered = {
        "SIR": pack(sample_sharded(exact, 60, SIR(50), seed=3, block_size=8)),
        "Langevin": pack(sample_sharded(exact, 60, Langevin(3), seed=3, block_size=8)),
        "idle": pack(sample_sharded(exact, 5, SIR(50), seed=3, block_size=8)),
        "many": pack(sample_sharded(exact, 3000, SIR(400), seed=4)),
    }
    return {"blocks": blocks, "gathered": gathered, "unmoved": torch.equal(before, torch.get_rng_state())}


def decode(z):
    return Independent(TorchNormal(torch.cat([z, z], -1), 0.5), 1)


def encode(x):
    return diagonal_normal(x[:, :2], torch.ones(len(x), 2))


def nll(**change):
    exact = exact_prior()
    data = torch.randn(23, 4, generator=torch.Generator().manual_seed(2))
    log_priors = {"base": exact.base_distribution().log_prob, "snis": lambda z: exact.snis_log_prob(z, 20)}
    arguments = {"data": data, "num_samples": 30, "max_rows": 100, "distributed": True} | change
    arguments["transform"] = lambda x: x + 0.1 * torch.randn_like(x)  # draws too, as a binarisation would
    results = metrics.importance_weighted_nll(
        encode=encode, decode=decode, log_priors=log_priors, device="cpu", **arguments
    )
    return {name: (r.nll, r.standard_error, r.per_example, r.protocol) for name, r in results.items()}


class FailsOn(ExactRatio):
    def __init__(self, failing):
        super().__init__()
        self.failing = failing

    def forward(self, z, context=None):
        if rank() == self.failing:
            raise KeyError("a fault of one rank")
        return super().forward(z)


class NaNFar(ExactRatio):
    """NaN in the far tail, which only some chunk has."""

    def forward(self, z, context=None):
        return torch.where(z[..., 0] > 3.4, torch.nan, super().forward(z))


def errors():
    """The messages of calls that must fail on every rank: nobody may be left waiting."""
    by_rank, exact = rank(), exact_prior()
    fails, nans = NoiseContrastivePrior(Normal(2), FailsOn(1)), NoiseContrastivePrior(Normal(2), NaNFar())
    other_base = NoiseContrastivePrior(Normal(2, mean=float(by_rank)), ExactRatio())
    shared, generator = SIR(3000, shard_proposals=True), torch.Generator

    calls = {
        "sir seeds": lambda: shared.sample(exact(), (2,), generator().manual_seed(by_rank)),
        "sir call": lambda: SIR(100 + by_rank, shard_proposals=True).sample(exact(), (2,), generator()),
        "sir shape": lambda: shared.sample(exact(), (2 + by_rank,), generator()),
        "sir base": lambda: shared.sample(other_base(), (2,), generator()),
        "sir failure": lambda: shared.sample(fails(), (2,), generator()),
        "sir nan": lambda: shared.sample(nans(), (2,), generator().manual_seed(1)),
        "normalizer seeds": lambda: exact.estimate_log_normalizer(100, generator().manual_seed(by_rank), True),
        "normalizer num": lambda: exact.estimate_log_normalizer(100 + by_rank, generator(), True),
        "normalizer failure": lambda: fails.estimate_log_normalizer(40_000, generator(), True),
        "normalizer nan": lambda: nans.estimate_log_normalizer(100_000, generator(), True),
        "sharded seeds": lambda: sample_sharded(exact(), 10, SIR(5), seed=by_rank),
        "sharded sampler": lambda: sample_sharded(exact(), 10, SIR(5 + by_rank)),
        "sharded base": lambda: sample_sharded(other_base(), 10, SIR(5)),
        "sharded failure": lambda: sample_sharded(fails(), 10, SIR(5), block_size=2),
        "nll seeds": lambda: nll(seed=by_rank),
        "nll data": lambda: nll(data=torch.full((9, 4), float(by_rank))),
        "nll no seed": lambda: nll(seed=None),
    }
    return {name: message(call) for name, call in calls.items()}


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everything():
    return {
        "world": (rank(), world_size()),
        "sir alone": sir(shard_proposals=False),
        "sir": sir(shard_proposals=True),
        "classified": classified(),
        "normalizer": normalizer(),
        "sharded": sharded(),
        "nll": {"chunks": nll(), "one chunk": nll(max_rows=10_000), "alone": nll(distributed=False)},
        "errors": errors() if world_size() > 1 else {},
        "combined": combined(),
    }


def combined():
    """Every rank holds every W-th element; −0, NaN and several dtypes must come through."""
    whole = torch.tensor([1.5, -0.0, torch.nan, -torch.inf, 0.0, 3.0, -2.0])
    mine = torch.zeros(7, dtype=torch.bool)
    mine[rank() :: world_size()] = True
    tensors = [whole, whole.bfloat16(), whole.double().view(7, 1), mine.new_ones(7), torch.arange(7)]
    held = [torch.where(mine.view(t.shape), t, torch.zeros_like(t)) for t in tensors]
    return [fingerprint(t) for t in tensors], [fingerprint(ranks().combine(t)) for t in held]


@pytest.fixture(scope="module")
def run():
    """What each rank of 1, 2 and 3 measured; one rank has one thread too, so that its results can agree to the bit."""
    return {world: run_processes(everything, world) for world in (1, *WORLDS)}


def each_rank(run):
    return [(world, result) for world in WORLDS for result in run[world]]


def test_every_rank_has_its_number(run):
    for world in WORLDS:
        assert [result["world"] for result in run[world]] == [(number, world) for number in range(world)]


@pytest.mark.parametrize("case", [*SIR_CASES, "contexts", "blocks"])
def test_shared_proposals_give_the_samples_of_one_process(run, case):
    alone = run[1][0]["sir alone"][case]
    for _, result in each_rank(run):
        assert result["sir alone"][case]["z"] == alone["z"]
        shared = result["sir"][case]
        for name in ("z", "shape", "num_proposals", "stopped", "next"):
            assert shared[name] == alone[name], name
        torch.testing.assert_close(shared["ess"], alone["ess"], rtol=1e-12, atol=0)
        torch.testing.assert_close(shared["log_normalizer"], alone["log_normalizer"], rtol=1e-12, atol=1e-12)


def test_the_cases_of_min_ess_end_where_their_names_say(run):
    results = run[1][0]["sir alone"]
    assert results["min_ess"]["stopped"] == "min_ess" and results["min_ess"]["num_proposals"] == 5 * 1024
    assert results["max_proposals"]["stopped"] == "max_proposals"
    assert len(results["blocks"]["ess"]) == 7


def test_each_rank_classifies_its_own_chunks_alone(run):
    assert run[1][0]["classified"] == 2 * 10_240
    for world in WORLDS:
        counts = [result["classified"] for result in run[world]]
        assert sum(counts) == 2 * 10_240 and max(counts) == 2 * 1024 * -(-10 // world)


def test_log_normalizer_is_that_of_one_process(run):
    alone = run[1][0]["normalizer"]
    assert alone["alone"] == alone["shared"]
    for world, result in each_rank(run):
        result = result["normalizer"]
        assert result["alone"] == alone["alone"]
        assert result["shared"] == pytest.approx(alone["alone"], rel=1e-12)
        assert result["kept"] == result["shared"].value
        assert result["count"] <= 100_000 + 16 * 1024 * -(-7 // world)


def test_sharded_samples_do_not_depend_on_the_number_of_processes(run):
    alone = run[1][0]["sharded"]["gathered"]
    for _, result in each_rank(run):
        assert result["sharded"]["unmoved"]
        for name, expected in alone.items():
            for ours, theirs in zip(result["sharded"]["gathered"][name], expected, strict=True):
                assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_blocks_are_dealt_out_once_and_repeat_no_draw(run):
    for world in WORLDS:
        blocks = [block for result in run[world] for block in result["sharded"]["blocks"]]
        assert sorted(first for first, _ in blocks) == list(range(0, 60, 8))
        z = torch.cat([z for _, z in sorted(blocks, key=lambda block: block[0])])
        assert torch.equal(z, run[1][0]["sharded"]["gathered"]["SIR"][0])
        assert len(z.unique(dim=0)) == len(z) == 60


def test_sharded_samples_are_of_the_target(run):
    stats = pytest.importorskip("scipy.stats")
    z, ess, log_normalizer, num_proposals, stopped = run[2][1]["sharded"]["gathered"]["many"]
    assert (z.shape, ess.shape, num_proposals, stopped) == ((3000, 2), (3000,), 400, "num_proposals")
    assert len(z.unique(dim=0)) == 3000
    for coordinate in z.T:
        assert stats.kstest(coordinate, "norm", args=(MEAN, STD)).pvalue > 1e-4
    assert abs(torch.corrcoef(torch.stack([z[:-256, 0], z[256:, 0]]))[0, 1]) < 0.1  # block against next block
    assert float(log_normalizer) == pytest.approx(LOG_Z, abs=0.02)


def test_diagnostics_of_blocks_are_those_of_all_draws():
    one = SIR(200).sample(exact_prior()(), (600,)).diagnostics
    many = sample_sharded(exact_prior()(), 600, SIR(200), block_size=7).diagnostics
    assert (many.num_proposals, many.stopped, many.ess.shape) == (one.num_proposals, one.stopped, one.ess.shape)
    assert float(many.log_normalizer) == pytest.approx(float(one.log_normalizer), abs=0.02)
    with_blocks = [r.diagnostics for _, r in sample_blocks(exact_prior()(), 600, SIR(200), block_size=7)]
    draws = torch.tensor([200.0 * len(d.ess) for d in with_blocks]).double()
    weighted = (draws * torch.stack([d.log_normalizer for d in with_blocks]).exp()).sum() / draws.sum()
    assert float(many.log_normalizer) == pytest.approx(float(weighted.log()), rel=1e-9)


def test_likelihood_is_that_of_one_process_to_the_bit(run):
    alone = run[1][0]["nll"]
    for _, result in each_rank(run):
        for case, estimates in result["nll"].items():
            for name, (mean, spread, per_example, protocol) in estimates.items():
                expected = alone[case][name]
                assert (mean, spread, protocol) == (expected[0], expected[1], expected[3])
                assert torch.equal(per_example, expected[2]) and per_example.shape == (23,)
        for name, estimate in result["nll"]["alone"].items():
            assert torch.equal(estimate[2], result["nll"]["chunks"][name][2])


def test_a_chunk_draws_by_seed_and_number_alone():
    data = torch.randn(12, 4)
    whole, first = (nll(data=d, distributed=False)["base"][2] for d in (data, data[:6]))  # three examples in a chunk
    assert torch.equal(whole[:6], first)
    same = nll(data=data[:3].repeat(4, 1), distributed=False)["base"][2].view(4, 3)
    assert len(same.unique(dim=0)) == 4  # chunks of the same data draw different numbers


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("sir seeds", r"ValueError: SIR: the generator's draw must be the same on every rank, got \[\d.*on rank 1"),
        ("sir call", r"ValueError: SIR: the call must be the same.*num_proposals=100,.*rank 0 and.*num_proposals=101,"),
        ("sir shape", r"ValueError: SIR: the call must be the same.*for \[2\] ×.*rank 0.*for \[3\] ×"),
        ("sir base", "ValueError: SIR: the base must be the same on every rank"),
        ("sir failure", "KeyError: 'a fault of one rank'"),
        ("sir nan", "ValueError: SIR: log_ratio must be finite for some proposal and never NaN"),
        (
            "normalizer seeds",
            "ValueError: estimate_log_normalizer: the generator's draw must be the same on every rank",
        ),
        ("normalizer num", "num_samples must be the same on every rank, got 100 on rank 0 and 101 on rank 1"),
        ("normalizer failure", "KeyError: 'a fault of one rank'"),
        ("normalizer nan", "ValueError: estimate_log_normalizer: log_ratio must be finite at base draws"),
        ("sharded seeds", "ValueError: sample_sharded: seed must be the same on every rank, got 0 on rank 0 and 1 on"),
        ("sharded sampler", r"ValueError: sample_sharded: sampler must be the same on every rank, got SIR\(.*=5,"),
        ("sharded base", "ValueError: sample_sharded: the base must be the same on every rank"),
        ("sharded failure", "KeyError: 'a fault of one rank'"),
        (
            "nll seeds",
            "ValueError: importance_weighted_nll: seed must be the same on every rank, got 0 on rank 0 and 1",
        ),
        ("nll data", "ValueError: importance_weighted_nll: data must be the same on every rank"),
        ("nll no seed", "ValueError: importance_weighted_nll: seed must be an integer where distributed, got None"),
    ],
)
def test_what_one_rank_does_wrong_every_rank_reports(run, call, expected):
    for world in WORLDS:
        for number, result in enumerate(run[world]):
            text = result["errors"][call]
            if call.endswith("failure") and number != 1:
                assert "RuntimeError" in text and "failed on rank 1: KeyError: 'a fault of one rank'" in text
            else:
                assert re.search(expected, text), text


def test_the_rank_of_every_difference_is_named(run):
    assert "and 2 on rank" not in run[3][0]["errors"]["sharded seeds"]
    assert run[3][0]["errors"]["sharded seeds"].endswith("got 0 on rank 0 and 1 on rank 1, 2")


def test_tensors_held_in_parts_are_put_together_bit_for_bit(run):
    for _, result in each_rank(run):
        whole, combined = result["combined"]
        assert combined == whole


def test_without_a_group_everything_is_of_one_process():
    assert (rank(), world_size(), distributed.is_initialized()) == (0, 1, False)
    draw = functools.partial(SIR, 3000)
    alone, shared = (
        draw(shard_proposals=s).sample(exact_prior()(), (3,), torch.Generator().manual_seed(0)).z for s in (False, True)
    )
    assert torch.equal(alone, shared)
    z = torch.randn(3)
    assert ranks().combine(z) is z and ranks().gather(z)[0] is z and list(ranks().mine(3)) == [0, 1, 2]
    with pytest.raises(KeyError, match="as it is"), ranks().failing_together("test"):
        raise KeyError("as it is")


@pytest.mark.parametrize("lengths", [(1024, 2048, 1024, 500), (300, 300, 300, 7)])
def test_chunks_left_to_another_process_keep_their_numbers(lengths):
    seed, chunks = ops.draw_seed(), [torch.randn(5, m) for m in lengths]
    whole = ops.sir_state(5, 4)
    shares = [ops.sir_state(5, 4) for _ in range(3)]
    for number, chunk in enumerate(chunks):
        whole = ops.sir_update(whole, chunk, seed)
        for r, share in enumerate(shares):
            mine = number % 3 == r
            shares[r] = ops.sir_update(share, chunk, seed) if mine else samplers.skip_proposals(share, chunk.shape[1])
    merged = functools.reduce(ops.sir_merge, shares)
    assert torch.equal(merged.indices, whole.indices) and torch.equal(merged.key, whole.key)
    assert merged[5:] == whole[5:]
    torch.testing.assert_close(merged.ess, whole.ess, rtol=1e-12, atol=0)


def test_block_seeds_differ_where_the_cpu_generator_looks():
    seeds = [block_seed(seed, block) for seed in (0, 1, 2) for block in range(20_000)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in [*seeds, block_seed(2**63 - 1, 2**32)])


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda p: sample_blocks(p, 0), ValueError, "sample_blocks: num must be an integer ≥ 1, got 0"),
        (lambda p: sample_blocks(p, 5, block_size=2.5), ValueError, "block_size must be an integer ≥ 1, got 2.5"),
        (lambda p: sample_blocks(p, 5, seed=-1), ValueError, "sample_blocks: seed must be ≥ 0 and < 2⁶³, got -1"),
        (lambda p: sample_blocks(p, 5, seed="a"), TypeError, "sample_blocks: seed must be an integer, got str"),
        (lambda p: sample_blocks(p, 5, "SIR"), TypeError, "sampler must be .*, got str"),
        (lambda p: sample_blocks(p, 5, SIR(9, shard_proposals=True)), ValueError, "must not shard its proposals"),
        (lambda p: sample_blocks(p, 5, SIR(draws_per_row=3)), ValueError, "multiple of the sampler's draws_per_row"),
        (lambda p: SIR(5, shard_proposals=1), TypeError, "SIR: shard_proposals must be a bool, got int"),
        (lambda p: nll(seed=1.5, distributed=False), TypeError, "importance_weighted_nll: seed must be an integer"),
    ],
)
def test_bad_input_is_named(call, error, expected):
    with pytest.raises(error, match=expected):
        call(exact_prior()())


def fail_on_rank_one():
    if rank() == 1:
        raise ValueError("here")
    distributed.barrier()


def die_on_rank_one():
    if rank() == 1:
        os._exit(3)
    distributed.barrier()


def hang_on_rank_one():
    if rank() == 1:
        time.sleep(60)


def test_a_failure_of_one_process_ends_the_run():
    with pytest.raises(RuntimeError, match="rank 1 failed:\n(.|\n)*ValueError: here"):
        run_processes(fail_on_rank_one, 2)
    with pytest.raises(RuntimeError, match="rank 1 failed:\nthe process died without a word"):
        run_processes(die_on_rank_one, 2)


def test_a_process_that_hangs_is_named_and_killed():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[(0, )?1\] of 2 still ran after 2"):
        run_processes(hang_on_rank_one, 2, timeout=2)
    assert time.monotonic() - start < 10
