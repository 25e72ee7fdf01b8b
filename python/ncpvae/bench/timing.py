"""Contenders that take turns, so that whatever slows the machine for a while slows all of them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

BLOCK_SECONDS = 2e-3  # calls shorter than this are timed many at once
MIN_ROUNDS = 5
SLOW_ROUNDS = 3  # of a contender one call of which takes more than its share of the time
MAX_ROUNDS = 2000


class Timings(NamedTuple):
    """Seconds per call, in order of measurement, and the calls that each figure is the mean of, by contender."""

    times: dict[str, list[float]]
    calls: dict[str, int]


def interleaved(contenders: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> Timings:
    """Time each contender for about `seconds`, a block of calls of one after a block of the other.

    Args:
        contenders: name → function, called a few times before it is timed.
        device: what to wait for at the end of a block.
        seconds: on average over the contenders; at least five rounds are made, three of slow contenders.
    """
    with _cheap_garbage_collection():
        calls = {name: _calls_per_block(function, device) for name, function in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        taking_turns, left = dict(contenders), seconds * len(contenders)
        for round_number in range(MAX_ROUNDS):
            if not taking_turns or (round_number >= MIN_ROUNDS and left < 0):
                break
            for name, function in list(taking_turns.items()):
                block = _block(function, calls[name], device)
                times[name].append(block / calls[name])
                if block <= seconds:
                    left -= block
                elif len(times[name]) >= SLOW_ROUNDS:
                    del taking_turns[name]
    return Timings(times, calls)


def _calls_per_block(function: Callable[[], Any], device: torch.device) -> int:
    estimate = _block(function, 1, device)
    if estimate < 10 * BLOCK_SECONDS:  # the first call may have had to fetch its data, a second one tells more
        estimate = _block(function, 1, device)
    if estimate < BLOCK_SECONDS:
        count = max(1, round(BLOCK_SECONDS / estimate))
        estimate = _block(function, count, device) / count
    return max(1, round(BLOCK_SECONDS / estimate))


def _block(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds for so many calls; short ones after a further one that brings their data back to the cache."""
    if calls > 1:
        function()
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _cheap_garbage_collection() -> Iterator[None]:
    """What is there by now is left out of collections; what contenders leave behind still is collected."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
