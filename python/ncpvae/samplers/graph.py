"""Steps of a chain captured once as a CUDA graph and replayed."""

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UP = 3  # steps before the capture, in which libraries choose algorithms and take their workspaces
STEPS_PER_GRAPH = 10  # enough for the gap between replays not to count; a longer graph takes longer to capture


class Recorder(Protocol):
    """Captures work as something that can be replayed."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work once, apart from what the device does otherwise."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work without doing it; the function returned does it, on the same memory."""


def replayed(step: Callable[[], None], num_steps: int, recorder: Recorder) -> None:
    """Do `step` `num_steps` times: a few to warm up, then by replays of a graph of several, then what remains.

    The warm-up's steps and the remainder's are steps of the chain like any other; none is thrown away.

    Args:
        step: works in place on tensors that stay where they are.

    Raises:
        RuntimeError: where the step cannot be captured.
    """
    warm_up = min(WARM_UP, num_steps)
    replays, remainder = divmod(num_steps - warm_up, STEPS_PER_GRAPH)
    recorder.warm_up(lambda: _repeat(step, warm_up))
    if replays:
        try:
            replay = recorder.capture(lambda: _repeat(step, STEPS_PER_GRAPH))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"Langevin: cuda_graph cannot hold a step of this chain: {reason}") from error
        _repeat(replay, replays)
    _repeat(step, remainder)


def _repeat(work: Callable[[], None], count: int) -> None:
    for _ in range(count):
        work()


class CUDARecorder:
    """CUDA graphs of a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def warm_up(self, work: Callable[[], None]) -> None:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
        return graph.replay
