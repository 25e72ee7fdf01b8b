"""SIGINT and SIGTERM as a wish to stop after the step in hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, its state saved; the message says where, and how to go on."""


class StopRequest:
    """Which signal has come, if any."""

    signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def catch_signals(active: bool) -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of dying by them, where `active` and in the main thread.

    A second signal has its usual effect at once.
    """
    request = StopRequest()
    if not active or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: object) -> None:
        request.signal_name = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
