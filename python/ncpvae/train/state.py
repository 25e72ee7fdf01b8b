"""What a run knows of itself beside weights: the state that its checkpoints keep as JSON."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import CheckpointError
from .execution import MAX_HALVINGS, check_count


def new_state() -> dict[str, Any]:
    """The state of a run before its first step."""
    counts = {"step": 0, "seconds": 0.0, "best_value": None, "best_step": 0, "stale": 0}
    return counts | {"history": [], "recoveries": []}


def read_state(saved: dict[str, Any], step: int, steps: int) -> dict[str, Any]:
    """The state at `step` from a checkpoint; one from before there were recoveries has had none.

    Raises:
        KeyError, TypeError, ValueError: where it lacks something, or has what no run of `steps` steps can have.
    """
    saved = {"recoveries": []} | saved
    state = {key: saved[key] for key in new_state()} | {"step": step}
    if step > steps:
        raise ValueError(f"step must be ≤ {steps}, got {step}")
    check_count("best_step", state["best_step"], minimum=0, below=step + 1)
    check_count("stale", state["stale"], minimum=0)
    for name in ("seconds", "best_value"):
        value = 0.0 if name == "best_value" and state[name] is None else state[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if state["best_value"] is not None and state["best_step"] not in _steps_of("history", state["history"]):
        raise ValueError(f"history must hold the best step {state['best_step']}")
    if len(_steps_of("recoveries", state["recoveries"])) > MAX_HALVINGS:
        raise ValueError(f"recoveries must be at most {MAX_HALVINGS}, got {len(state['recoveries'])}")
    return state


def _steps_of(name: str, records: object) -> list[int]:
    rows = records if isinstance(records, list) else [records]
    steps = [r["step"] for r in rows if isinstance(r, dict) and isinstance(r.get("step"), int)]
    if not isinstance(records, list) or len(steps) < len(rows):
        raise TypeError(f"{name} must be a list of records with a step each")
    return steps


def check_best(path: Path, state: dict[str, Any], best: dict[str, Tensor] | None, model: nn.Module) -> None:
    """There are best weights in the checkpoint `path` where there is a best step, and they are those of the model."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in (best or {}).items()}
    if found != (own if state["best_value"] is not None else {}):
        raise CheckpointError(f"{path / 'best.safetensors'} does not hold the weights of this model")
