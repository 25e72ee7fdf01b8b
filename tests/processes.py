"""Run a function in several real processes that share a torch.distributed group (gloo, on the CPU)."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

GRACE = 3.0  # seconds that the other ranks have after the first failure, to report theirs


def run_processes(function, world_size: int, *args, timeout: float = 60.0) -> list:
    """`function(*args)` in `world_size` processes at once; what each returned, by rank.

    Function, arguments and results are pickled; the function must be at the top level of a module. It finds the
    default group initialised and torchrun's variables set. The processes are forked from a server that has torch and
    ncpvae loaded and is started once, by the first call: changes of `os.environ` after it are not seen.

    Raises:
        RuntimeError: with the traceback of the rank that failed.
        TimeoutError: naming the ranks that were still running, whose stacks are on stderr; all are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "ncpvae"])
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_run, args=(rank, world_size, folder, call, pipe[1], timeout), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        try:
            for process, (_, sending) in zip(processes, pipes, strict=True):
                process.start()
                sending.close()  # so that a process that dies is seen as the end of its pipe
            return _results([receiving for receiving, _ in pipes], timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.join(0.5)
                    process.kill()
                    process.join()


def _results(pipes: list[Connection], timeout: float) -> list:
    deadline = time.monotonic() + timeout
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready and not failures:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(pipes)} still ran after {timeout} s")
        if not ready:
            break
        for pipe in ready:
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "the process died without a word"
            if succeeded:
                results[waiting[pipe]] = value
            else:
                failures[waiting[pipe]] = value
                deadline = min(deadline, time.monotonic() + GRACE)
    if failures:
        raise RuntimeError("\n".join(f"rank {rank} failed:\n{failures[rank]}" for rank in sorted(failures)))
    return [results[rank] for rank in range(len(pipes))]


def _run(rank: int, world_size: int, folder: str, call: bytes, pipe: Connection, timeout: float) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout - 1.0), exit=False)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # never asked: the group meets in a file
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=Path(folder, "store").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(timeout, 30.0)),
        )
        function, args = pickle.loads(call)
        answer = pickle.dumps((True, function(*args)))
        distributed.destroy_process_group()
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    pipe.send_bytes(answer)
