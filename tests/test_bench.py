"""The benchmarks' own machinery, at sizes that take no time: peers compute what the op does, records are whole."""

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from ncpvae import bench
from ncpvae.bench import OWN, Case, MachineLoaded, command, goals, machine, memory, peers, record, timing
from ncpvae.bench.case import BOTH, FORWARD, Workload, require_memory
from ncpvae.cli import main

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = [
    Case("sir_resample", {"B": 3, "M": 200}, settings={"n": 2}),
    Case("sir_resample", {"B": 2, "M": 50}, "bfloat16", settings={"n": 1}),
    Case("langevin_step", {"z": [3, 4, 5]}),
    *(
        Case("similarity_logsumexp", {"N": 9, "K": 9, "D": 4}, "float32", d, {"temperature": 0.07})
        for d in (FORWARD, BOTH)
    ),
    *(Case("gaussian_logsumexp", {"N": 9, "K": 7, "D": 4}, "float32", d, {"std": 1.0}) for d in (FORWARD, BOTH)),
]
KEYS = {
    *("op", "shape", "dtype", "direction", "settings", "device", "isa", "threads", "versions", "date", "quick"),
    *("load", "others_busy_cpus", "load_allowed", "median_us", "min_us", "p90_us", "rounds", "calls_per_round"),
    *("elements", "rate", "bound", "error", "error_of", "ratio", "fastest_eager", "absent"),
}


MEASURED = machine.copy_seconds.__wrapped__, machine.product_rate.__wrapped__


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """What the machine can do takes seconds to measure."""
    monkeypatch.setattr(machine, "copy_seconds", lambda size, device: 1e-6 + size * 1e-9)
    monkeypatch.setattr(machine, "product_rate", lambda device: 1e9)


def workload_of(case: Case) -> Workload:
    return importlib.import_module(f"ncpvae.bench.{case.op}").workload(case, CPU)


def without_compiler(workload: Workload) -> Workload:
    """torch.compile and KeOps need a compiler and half a minute."""
    compiled = ("compile", "pykeops")
    workload.peers = {name: make for name, make in workload.peers.items() if not name.startswith(compiled)}
    return workload


def quiet_measure(case: Case, make=None, **flags) -> dict:
    """A record whatever else runs beside the tests."""
    make = make or (lambda case, device: without_compiler(workload_of(case)))
    return record.measure(case, make, CPU, seconds=0.005, allow_load=True, **flags)


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case}")
def test_records_are_whole_and_all_contenders_are_accurate(case):
    timed = quiet_measure(case)
    assert set(timed) == KEYS
    assert json.loads(json.dumps(timed)) == timed
    assert {name for name in timed["median_us"] if name.startswith("eager")} and timed["fastest_eager"]
    for name, median in timed["median_us"].items():
        assert 0 < timed["min_us"][name] <= median <= timed["p90_us"][name]
    assert set(timed["ratio"]) == set(timed["median_us"]) - {OWN}
    assert timed["bound"]["us"] > 0 and timed["bound"]["is"]
    compared = set(timed["median_us"]) - {"linear_cross_entropy", "torchebm"}
    assert set(timed["error"]) == compared
    assert max(timed["error"].values()) < (0.05 if case.dtype == "bfloat16" else 1e-4)


def test_every_way_to_resample_draws_from_the_softmax(monkeypatch):
    workload = workload_of(Case("sir_resample", {"B": 2, "M": 8}, settings={"n": 4000}))
    log_weights = workload.own.args[0]
    expected = torch.softmax(log_weights, 1)
    error = 5 * (expected * (1 - expected) / 4000).sqrt()
    for name, make in without_compiler(workload).peers.items():
        indices = make()()[0]
        frequency = torch.nn.functional.one_hot(indices, 8).double().mean(1)
        assert ((frequency - expected).abs() < error).all(), name


def similarity_leaves(workload: Workload) -> tuple[torch.Tensor, ...]:
    """What the workload's op is given, from the closure that gives it."""
    held = (cell.cell_contents for cell in workload.own.__closure__)
    return next(leaves for leaves in held if isinstance(leaves, tuple))


def test_cross_entropy_is_the_logsumexp_less_the_diagonal():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    case = next(case for case in TINY if case.op == "similarity_logsumexp" and case.direction == BOTH)
    workload = workload_of(case)
    (rows, columns), gradients = workload.own()
    losses, their_gradients = workload.peers["linear_cross_entropy"]()()
    z, x, scale = similarity_leaves(workload)
    diagonal = scale * (z * x).sum(1)
    torch.testing.assert_close(
        torch.stack(losses), torch.stack([(rows - diagonal).mean(), (columns - diagonal).mean()])
    )
    (expected,) = torch.autograd.grad(-2 * diagonal.mean(), z)
    torch.testing.assert_close(their_gradients[0], gradients[0] + expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in TINY if "logsumexp" in case.op], ids=lambda case: f"{case.op} {case}"
)
def test_keops_computes_the_same(case):
    pytest.importorskip("pykeops")
    workload = workload_of(case)
    assert workload.error(workload.peers["pykeops"]()()) < 1e-4


def test_torchebm_makes_the_same_step():
    pytest.importorskip("torchebm")
    workload = workload_of(next(case for case in TINY if case.op == "langevin_step"))
    steps = []
    for peer in ("eager_formula", "torchebm"):
        step = workload.peers[peer]()
        torch.manual_seed(0)
        steps.append(step())
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("op", bench.OPS)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_different_and_quick_ones_fewer(op, quick):
    module = importlib.import_module(f"ncpvae.bench.{op}")
    cases = module.cases(CPU, quick)
    assert len({json.dumps(case.as_json()) for case in cases}) == len(cases) > 1
    assert all(case.op == op for case in cases)
    assert len(module.cases(CPU, True)) <= len(cases)


def test_goals_have_their_cases_in_both_runs():
    for quick in (True, False):
        cases = [
            c.as_json() for op in bench.OPS for c in importlib.import_module(f"ncpvae.bench.{op}").cases(CPU, quick)
        ]
        for goal in [*goals.SPEED, *goals.OVERHEAD]:
            assert any(goal.shown_by(case) for case in cases), goal


def test_a_quick_run_has_the_peers_of_the_goals_alone():
    goal, other = ({"N": N, "K": N, "D": 32} for N in (4096, 64))
    peers = dict.fromkeys(["eager_two_products", "compile_broadcast", "pykeops"])
    asked = [list(goals.asked_for(Case("gaussian_logsumexp", shape), peers)) for shape in (goal, other)]
    assert asked == [["eager_two_products", "pykeops"], ["eager_two_products"]]


# Timing


def test_contenders_take_turns():
    order = []
    functions = {name: lambda name=name: (order.append(name), time.sleep(0.003)) for name in "ab"}
    timings = timing.interleaved(functions, CPU, seconds=0.02)
    assert timings.calls == {"a": 1, "b": 1}
    turns = order[-2 * len(timings.times["a"]) :]
    assert turns == ["a", "b"] * len(timings.times["a"]) and len(timings.times["a"]) >= timing.MIN_ROUNDS
    assert all(0.003 <= t < 0.1 for times in timings.times.values() for t in times)


def test_a_slow_contender_has_few_turns_and_a_fast_one_many_calls():
    timings = timing.interleaved({"fast": lambda: None, "slow": lambda: time.sleep(0.02)}, CPU, seconds=0.01)
    assert len(timings.times["slow"]) == timing.SLOW_ROUNDS
    assert len(timings.times["fast"]) >= timing.MIN_ROUNDS
    assert timings.calls["fast"] > 100 and timings.calls["slow"] == 1


def test_what_others_do_is_told_from_what_the_benchmark_does(monkeypatch):
    moments = iter([(10.0, 100.0, 7.0), (12.0, 105.0, 9.0)])  # two seconds, five of work, two of them its own
    monkeypatch.setattr(machine.Neighbours, "_now", staticmethod(lambda: next(moments)))
    with machine.Neighbours() as neighbours:
        pass
    assert neighbours.busy == pytest.approx(1.5)
    unknown = machine.Neighbours()
    assert unknown.bearable


def test_a_loaded_machine_is_refused_after_three_attempts(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(machine.Neighbours, "_now", staticmethod(lambda: (t := next(clock), 64.0 * t, 0.0)))
    monkeypatch.setattr(record, "PAUSE_SECONDS", 0.0)
    case = TINY[2]
    with pytest.raises(MachineLoaded, match=r"others kept 64.00 CPUs busy while langevin_step .* --allow-load"):
        record.measure(case, lambda c, d: without_compiler(workload_of(c)), CPU, seconds=0.001)
    assert capsys.readouterr().err.count("once more") == record.ATTEMPTS - 1
    allowed = quiet_measure(case)
    assert allowed["load_allowed"] and allowed["others_busy_cpus"] == 64.0


def test_bounds_are_the_larger_of_copy_and_product():
    moved = Workload(own=int, peers={}, unit="", elements=1, bytes_moved=4000, flops=20)
    assert machine.bound(moved, CPU) == (pytest.approx(5e-6), "copy of as many bytes, measured")
    moved.flops = 20_000
    assert machine.bound(moved, CPU) == (pytest.approx(2e-5), "sgemm at 1 GFLOP/s, measured")


def test_copies_and_products_are_measured(monkeypatch):
    copy_seconds, product_rate = MEASURED
    monkeypatch.setattr(machine, "GEMM_SIZE", 128)
    assert 0 < copy_seconds(1 << 10, CPU) < copy_seconds(1 << 26, CPU)
    assert 1e8 < product_rate(CPU) < 1e14


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("libncpvae_cpu_v4_amx.so", "x86-64-v4-amx"),
        ("libncpvae_cpu_v4.so", "x86-64-v4"),
        ("libncpvae_cpu_v3.so", "x86-64-v3"),
        ("libncpvae_cpu.so", "baseline"),
        (None, "plain torch"),
    ],
)
def test_the_instruction_set_is_that_of_the_library(library, name, monkeypatch):
    monkeypatch.setattr(machine._library, "LOADED", {} if library is None else {"CPU": library})
    assert machine.instruction_set(CPU) == name


# Peers


def test_peers_that_are_missing_or_fail_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pykeops", None)
    monkeypatch.delitem(sys.modules, "pykeops.torch", raising=False)
    gaussian = next(case for case in TINY if case.op == "gaussian_logsumexp")

    def without_compile(case, device):
        workload = workload_of(case)
        return Workload(workload.own, {"pykeops": workload.peers["pykeops"]}, "element", 1, bytes_moved=8)

    timed = quiet_measure(gaussian, without_compile)
    assert timed["absent"]["pykeops"] == "pykeops is not installed: pip install 'ncpvae[bench]'"
    assert "pykeops" not in timed["median_us"]

    def failing(case, device):
        return Workload(workload_of(case).own, {"eager_broken": lambda: lambda: 1 // 0}, "element", 1, bytes_moved=8)

    assert quiet_measure(TINY[2], failing)["absent"] == {
        "eager_broken": "failed: ZeroDivisionError: integer division or modulo by zero"
    }


def test_an_op_that_fails_ends_the_run():
    def failing(case, device):
        return Workload(lambda: 1 // 0, {}, "element", 1, bytes_moved=8)

    with pytest.raises(ZeroDivisionError):
        quiet_measure(TINY[2], failing)


def test_what_does_not_fit_is_absent():
    require_memory(1, CPU, "little")
    with pytest.raises(bench.Absent, match="would hold all of it, 1000000000.0 GB, and"):
        require_memory(10**18, CPU, "all of it")
    broadcast = workload_of(Case("gaussian_logsumexp", {"N": 1 << 10, "K": 1 << 10, "D": 512}, settings={"std": 1.0}))
    with pytest.raises(bench.Absent, match=r"would hold N×K×D numbers, 2\.1 GB"):
        broadcast.peers["eager_broadcast"]()


def test_versions_are_of_what_is_installed():
    assert peers.versions()["numpy"]


# Memory


def test_peak_memory_counts_temporaries_and_result():
    x = torch.ones(1 << 24)
    peak = memory.peak_bytes(lambda: (x + 1) * 2 + x, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak == pytest.approx(2 * x.nbytes, rel=0.05)


def test_memory_of_streaming_does_not_grow_with_the_proposals():
    with memory.FreshProcess("ncpvae.bench.sir_update", CPU) as fresh:
        few, many = (fresh.peaks(Case("sir_update", {"B": 16, "M": M, "D": 8})) for M in (10_000, 100_000))
    assert set(few) == {OWN, "sir_resample", "eager_multinomial"}
    if many[OWN] is None:
        pytest.skip("this system does not tell")
    assert many[OWN] < 2 * few[OWN] + (1 << 20)
    assert many["sir_resample"] > 16 * 100_000 * 9 * 4


@pytest.mark.skipif(os.name == "nt", reason="there is no `false`")
def test_a_process_that_dies_costs_only_the_peaks(capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with memory.FreshProcess("ncpvae.bench.sir_update", CPU) as fresh:
        assert [fresh.peaks(TINY[0]), fresh.peaks(TINY[0])] == [{}, {}]
    message = "peak memory of sir_resample B=3 M=200 n=2 float32 is not known: its process ended with status 1"
    assert capsys.readouterr().err.splitlines() == [message, message]


# Goals


def made_up(ratio: float, isa: str = "x86-64-v4", own_us: float = 100.0) -> dict:
    return {
        "op": "sir_resample",
        "shape": {"B": 64, "M": 5000},
        "settings": {"n": 1},
        "direction": FORWARD,
        "isa": isa,
        "median_us": {OWN: own_us, "eager_multinomial": ratio * own_us, "eager_cumsum": 2 * own_us},
        "ratio": {"eager_multinomial": ratio, "eager_cumsum": 2.0},
        "fastest_eager": "eager_cumsum",
        "absent": {},
    }


def outcome(records: list[dict]) -> goals.Outcome:
    return goals.outcomes(records)[0]


def test_goals_are_met_or_not_and_half_as_high_with_avx2():
    assert outcome([made_up(120.0)]).met is True
    assert outcome([made_up(60.0)]).met is False
    assert outcome([made_up(60.0, "x86-64-v3")]).met is True
    assert outcome([made_up(60.0, "x86-64-v3")]).wanted == "≥ 50 ×"
    assert "fastest eager form eager_cumsum: 2 ×" in outcome([made_up(120.0)]).note
    assert goals.outcomes([made_up(120.0, "plain torch")]) == goals.outcomes([]) == []


def test_a_goal_whose_peer_is_absent_is_not_known():
    timed = made_up(120.0)
    del timed["ratio"]["eager_multinomial"]
    timed["absent"] = {"eager_multinomial": "gone"}
    assert outcome([timed]).met is None and outcome([timed]).note == "gone"
    assert outcome([{**made_up(120.0), "shape": {"B": 1, "M": 2}}]).note == "not timed"


def test_the_worst_size_counts():
    slow = {**made_up(120.0), "shape": {"B": 1, "M": 3}, "ratio": {"eager_cumsum": 0.8}}
    worst = next(o for o in goals.outcomes([made_up(120.0), slow]) if "not slower" in o.goal)
    assert worst.met is False and worst.measured == 0.8 and "worst of 2: B = 1, M = 3" in worst.note


def test_the_time_of_a_tiny_call_has_an_upper_limit():
    tiny = {**made_up(2.0, own_us=9.0), "shape": {"B": 1, "M": 16}}
    assert goals.outcomes([tiny])[-1].met is True
    tiny["median_us"][OWN] = 11.0
    assert goals.outcomes([tiny])[-1].met is False
    text = goals.table(goals.outcomes([tiny]))
    assert "NOT MET" in text and "11 µs" in text and "≤ 10 µs" in text and "not known" in text


# The command


@pytest.fixture
def tiny_langevin(monkeypatch):
    """`ncpvae bench langevin_step` with three tiny cases."""
    from ncpvae.bench import langevin_step

    cases = [Case("langevin_step", {"z": [1, 2]}), *(Case("langevin_step", {"z": [64, size]}) for size in (2, 128))]
    monkeypatch.setattr(langevin_step, "cases", lambda device, quick=False: cases)
    monkeypatch.setattr(memory.FreshProcess, "peaks", lambda self, case, quick: {OWN: 1 << 20})


def test_the_command_prints_records_and_goals_and_keeps_them(tiny_langevin, tmp_path, capsys):
    pytest.importorskip("tyro")
    output = tmp_path / "figures.jsonl"
    flags = ["--quick", "--seconds", "0.01", "--threads", "1", "--device", "cpu", "--allow-load"]
    assert main(["bench", "langevin_step", *flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "langevin_step z=64×128 float32" in printed and "eager_in_place" in printed and "1 thread(s)" in printed
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    records, last = [line for line in lines if "shape" in line], lines[-1]
    assert [r["shape"]["z"] for r in records] == [[1, 2], [64, 2], [64, 128]]
    assert (
        set(records[0]) == KEYS | {"peak_bytes", "allocator_settled"}
        and records[0]["threads"] == 1
        and records[0]["load_allowed"]
    )
    native = records[0]["isa"] in goals.SHARE
    assert ("goals" in last) == native and ("time of a tiny call" in printed) == native


def test_errors_of_the_command_are_named(tmp_path, capsys):
    pytest.importorskip("tyro")
    (tmp_path / "file").touch()
    wrong = [
        (["gaussian"], "bench: op must be one of sir_resample, sir_update, langevin_step, similarity_logsumexp"),
        (["--seconds", "0"], "bench: seconds must be > 0, got 0.0"),
        (["--threads", "0"], "bench: threads must be ≥ 1, got 0"),
        (["--device", "toaster"], "device must be auto, cpu, cuda"),
        (["--output", str(tmp_path)], "bench: --output must be a file, got the folder"),
        (["--output", str(tmp_path / "no" / "file")], "bench: --output must be in a folder that is there"),
        (["--output", str(tmp_path / "file" / "file")], "bench: --output must be in a folder that is there"),
    ]
    for flags, message in wrong:
        assert main(["bench", *flags]) == 2, flags
        assert message in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write anywhere")
def test_a_folder_without_leave_to_write_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot be written"):
        bench.bench(output=tmp_path / "file")


def test_a_loaded_machine_is_a_failure_of_its_own(monkeypatch, capsys, tiny_langevin):
    pytest.importorskip("tyro")

    def loaded(*_):
        raise MachineLoaded("bench: others kept 1.00 CPUs busy")

    monkeypatch.setattr(command, "measure", loaded)
    assert main(["bench", "langevin_step"]) == 1
    assert "others kept 1.00 CPUs busy" in capsys.readouterr().err


# benchmarks/


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("op", bench.OPS)
def test_every_op_has_its_script(op, scripts):
    assert (BENCHMARKS / f"bench_{op}.py").is_file()
    assert scripts(f"bench_{op}").main is main


SAMPLING = [
    Case("prior.sample", {"B": 2, "M": 30, "D": 50}, settings={"classifier": "mlp"}),
    Case("prior.sample", {"B": 2, "M": 3, "C": 20, "H": 8, "W": 8}, settings={"classifier": "residual"}),
    Case("prior.sample", {"B": 2, "M": 3, "C": 20, "H": 8, "W": 8}, settings={"classifier": "residual with context"}),
    *(Case("langevin_chain", {"B": 2, "T": 2}, settings={"energy": energy}) for energy in ("none", "mlp", "conv")),
]


@pytest.mark.parametrize("case", SAMPLING, ids=str)
def test_the_loops_give_samples_like_those_of_the_package(case, scripts):
    workload = scripts("bench_sample").workload(case, CPU)
    own = workload.own()
    assert own.shape[0] == 2 and torch.isfinite(own).all()
    for name, make in workload.peers.items():
        assert make()().shape == own.shape, name
    assert quiet_measure(case, scripts("bench_sample").workload)["rate"]


def test_chains_of_loop_and_sampler_have_the_same_law(scripts):
    """Long chains under the base alone: N(0, 1) to within the noise and the step's own error."""
    module = scripts("bench_sample")
    for chain in (module.chain_of_steps(2000, 1500, (1,), CPU), module.eager_chain(None, 2000, 1500, (1,), CPU)):
        assert abs(float(chain.mean())) < 0.12 and abs(float(chain.std()) - 1) < 0.1


def test_fitting_is_timed_in_both_ways(scripts):
    module = scripts("bench_fit_ncp")
    case = Case("fit_ncp", {"N": 100, "D": 50, "batch": 8, "steps": 2}, settings={"hidden": [4]})
    timed = quiet_measure(case, module.workload)
    assert set(timed["ratio"]) == {"eager_loop"} and timed["rate"]["ns_per_step"] > 0


def test_the_report_has_tables_goals_and_plots(tiny_langevin, scripts, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "ops.jsonl"
    bench.bench(["langevin_step"], output=output, seconds=0.002, allow_load=True, quick=True, say=lambda line: None)
    line = {"goals": [{"op": "x", "goal": "fast", "wanted": "≥ 2 ×", "measured": 1.5, "met": False, "note": ""}]}
    (tmp_path / "more.jsonl").write_text(json.dumps(line) + "\n")
    page, *plots = scripts("report").report(tmp_path)
    text = page.read_text()
    assert "| z=64×128 float32 |" in text and "eager_formula" in text and "1.0 MiB" in text
    assert "| x | fast | ≥ 2 × | 1.5 × | **not met** |" in text
    assert [path.name for path in plots] == ["ops--langevin_step--float32-forward.svg"]
    picture = plots[0].read_text()
    assert "<svg" in picture and f"]({plots[0].name})" in text
    assert scripts("report").report(tmp_path)[1].read_text() == picture, "the same figures give the same file"


def test_the_report_names_what_is_wrong(scripts, tmp_path):
    with pytest.raises(ValueError, match="no figures in"):
        scripts("report").report(tmp_path)
    (tmp_path / "broken.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"broken.jsonl:2 is no JSON"):
        scripts("report").report(tmp_path)


def test_durations_have_their_unit():
    assert [command.duration(t) for t in (12.34, 12_340.0, 1_234_000.0)] == ["12.3 µs", "12.3 ms", "1.23 s"]
    assert math.isclose(record._figures(123456.0), 123500.0)
