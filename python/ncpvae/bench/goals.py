"""The package's own goals for speed, and whether the records of a run meet them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .case import BOTH, FORWARD, Case

Record = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        text: what is asked for.
        wanted: the limit.
        unit: "×", at least so many times faster than the peer, or "µs", at most.
        op, shape, direction: of the record that shows it, `shape` being a part of its sizes and settings.
        peer: that the ratio is to.
    """

    text: str
    wanted: float
    op: str
    shape: dict[str, Any]
    peer: str = ""
    direction: str = FORWARD
    unit: str = "×"

    def shown_by(self, record: Record) -> bool:
        """Whether a record, or a case as JSON, is the one."""
        sizes = record["shape"] | record["settings"]
        same = all(sizes.get(name) == value for name, value in self.shape.items())
        return record["op"] == self.op and record["direction"] == self.direction and same


RESAMPLE = {"B": 64, "M": 5000, "n": 1}
GAUSSIAN = {"N": 4096, "K": 4096, "D": 32}
SIMILARITY = {"N": 4096, "K": 4096, "D": 128}
SPEED = [
    Goal(
        "against softmax, multinomial, logsumexp, ESS", 100, "sir_resample", {"B": 64, "M": 5000}, "eager_multinomial"
    ),
    Goal("against the faster eager form", 6, "langevin_step", {"z": [64, 5120]}, "fastest_eager"),
    Goal("against the matmul form, two products", 10, "gaussian_logsumexp", GAUSSIAN, "eager_two_products"),
    Goal("against KeOps", 15, "gaussian_logsumexp", GAUSSIAN, "pykeops"),
    Goal("against the matmul form, two products", 5, "gaussian_logsumexp", GAUSSIAN, "eager_two_products", BOTH),
    Goal("against the faster eager form", 4, "similarity_logsumexp", SIMILARITY, "fastest_eager", BOTH),
]
TINY: dict[str, dict[str, Any]] = {
    "sir_resample": {"B": 1, "M": 16, "n": 1},
    "langevin_step": {"z": [1, 2]},
    "similarity_logsumexp": {"N": 2, "K": 2, "D": 2},
    "gaussian_logsumexp": {"N": 2, "K": 2, "D": 2},
}
OVERHEAD = [Goal("time of a tiny call", 10, op, shape, unit="µs") for op, shape in TINY.items()]
# of the ratios wanted with AVX-512, for each instruction set
SHARE = {"x86-64-v4-amx": 1.0, "x86-64-v4": 1.0, "x86-64-v3": 0.5}


@dataclass(frozen=True)
class Outcome:
    """A line of the table of goals: `measured` and `met` are None where the run does not show them."""

    op: str
    goal: str
    wanted: str
    measured: float | None
    met: bool | None
    note: str = ""


def asked_for(case: Case, peers: dict[str, Any]) -> dict[str, Any]:
    """Those of a case's peers that a goal is about: plain torch always, all at once for streaming, others by name."""
    named = {goal.peer for goal in SPEED if goal.shown_by(case.as_json())}
    return {name: peer for name, peer in peers.items() if name.startswith(("eager", "sir_")) or name in named}


def outcomes(records: Iterable[Record]) -> list[Outcome]:
    """The goals for a CPU of those ops that the records are of.

    No goals are set for other devices, nor for the plain-torch kernels and the baseline instruction set.
    """
    records = list(records)
    share = SHARE.get(records[0]["isa"]) if records else None
    if share is None:
        return []
    ops = {record["op"] for record in records}
    speed = [_outcome(goal, records, share) for goal in SPEED if goal.op in ops]
    never_slower = [_never_slower(op, records) for op in TINY if op in ops]
    return speed + never_slower + [_outcome(goal, records, 1.0) for goal in OVERHEAD if goal.op in ops]


def _outcome(goal: Goal, records: list[Record], share: float) -> Outcome:
    shape = ", ".join(f"{name} = {value}" for name, value in goal.shape.items())
    text = f"{shape}{', ' + goal.direction if goal.direction == BOTH else ''}: {goal.text}"
    limit = goal.wanted * share
    wanted = f"≥ {limit:g} ×" if goal.unit == "×" else f"≤ {limit:g} µs"
    record = next(filter(goal.shown_by, records), None)
    if record is None:
        return Outcome(goal.op, text, wanted, None, None, "not timed")
    if goal.unit == "µs":
        measured = record["median_us"]["ncpvae"]
        return Outcome(goal.op, text, wanted, measured, measured <= limit)
    fastest = record["fastest_eager"]
    peer = fastest if goal.peer == "fastest_eager" else goal.peer
    if peer not in record["ratio"]:
        return Outcome(goal.op, text, wanted, None, None, record["absent"].get(peer, "not timed"))
    measured = record["ratio"][peer]
    note = "" if peer == fastest else f"fastest eager form {fastest}: {record['ratio'][fastest]:.3g} ×"
    return Outcome(goal.op, text, wanted, measured, measured >= limit, note)


def _never_slower(op: str, records: list[Record]) -> Outcome:
    """The smallest ratio to the fastest eager form among all sizes."""
    timed = [record for record in records if record["op"] == op and record["fastest_eager"]]
    text = "any size: not slower than the fastest eager form"
    if not timed:
        return Outcome(op, text, "≥ 1 ×", None, None, "not timed")
    worst = min(timed, key=_against_fastest)
    sizes = ", ".join(f"{name} = {value}" for name, value in worst["shape"].items())
    note = f"worst of {len(timed)}: {sizes}, {worst['direction']}, {worst['fastest_eager']}"
    return Outcome(op, text, "≥ 1 ×", _against_fastest(worst), _against_fastest(worst) >= 1, note)


def _against_fastest(record: Record) -> float:
    return record["ratio"][record["fastest_eager"]]


def table(outcomes: Iterable[Outcome]) -> str:
    """The goals as aligned text, one line each."""
    words = {True: "met", False: "NOT MET", None: "not known"}
    lines = []
    for o in outcomes:
        measured = "–" if o.measured is None else f"{o.measured:.3g} {o.wanted.rpartition(' ')[2]}"
        note = f" ({o.note})" if o.note else ""
        lines.append(f"{words[o.met]:<10}{measured:>9}  {o.wanted:<8}  {o.op}, {o.goal}{note}")
    return "\n".join(lines)
