"""The machine that a benchmark runs on: what it is, how busy others keep it, and what it can do at best."""

import ctypes
import os
import platform
import time
from functools import cache

import torch

from ..ops import _library
from .case import Workload
from .peers import versions
from .timing import interleaved

# What one H200 can do, for bounds: bytes/s copied, bf16 matrix products, float32 multiply-adds, and exponentials.
H200_BYTES, H200_PRODUCTS, H200_FLOPS, H200_EXPONENTIALS = 4.3e12, 790e12, 67e12, 3.7e12
H200_LAUNCH = 3e-6
GEMM_SIZE = 2048
# glibc's mallopt: parameters, and the values that it arrives at by itself once a tensor of 32 MiB has been freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
SETTLED = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def description(device: torch.device) -> dict[str, object]:
    """What every record says of machine and software."""
    from .. import __version__

    return {
        "device": device_name(device),
        "isa": instruction_set(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "ncpvae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **versions(),
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instruction_set(device: torch.device) -> str:
    """Of the CPU library that is loaded, or the CUDA architecture; "plain torch" where no kernel is."""
    loaded = _library.LOADED.get(device.type.upper())
    if loaded is None:
        return "plain torch"
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    stem = loaded.partition(".")[0]
    ends = {end: name for name, end in _library.CPU_CAPABILITIES.items() if end}
    return next((name for end, name in ends.items() if stem.endswith(end)), "baseline")


def settle_allocator() -> bool:
    """Give glibc's allocator the state of a process that has run for a while; False for other systems' allocators.

    Until then it takes each tensor above a threshold from the system, page by page, and raises the threshold as tensors
    are freed: the time of whatever makes temporaries, which plain torch does, would depend on what ran before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTLED.items())


class Neighbours:
    """How many CPUs other processes kept busy while this was entered, a hypervisor's other guests among them.

    The load average will not do: it remembers the benchmark's own last minute.

    Attributes:
        busy: that number; None where the system does not tell.
        limit: what is bearable: a tenth of the benchmark's own CPUs, or half of those that it leaves idle.
    """

    def __init__(self) -> None:
        idle = (os.cpu_count() or 1) - torch.get_num_threads()
        self.busy: float | None = None
        self.limit = max(0.1 * torch.get_num_threads(), 0.5 * idle)

    def __enter__(self) -> "Neighbours":
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        (start, all_before, own_before), (end, everything, own) = self._before, self._now()
        if all_before is not None and everything is not None:
            self.busy = max(0.0, (everything - all_before - (own - own_before)) / max(end - start, 1e-9))

    @property
    def bearable(self) -> bool:
        return self.busy is None or self.busy <= self.limit

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Time, and the CPU seconds used so far by all processes and by this one."""
        own = os.times()
        return time.perf_counter(), _busy_seconds(), own.user + own.system


def _busy_seconds() -> float | None:
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, irq, soft_irq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft_irq + steal) / CLOCK_TICKS


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def bound(workload: Workload, device: torch.device) -> tuple[float, str]:
    """Seconds that the workload cannot beat, and what says so: the larger of its memory's and its arithmetic's.

    On an H200 from the figures above, elsewhere from what is measured now: a copy of as many bytes as the op moves,
    which lie in a cache where they fit one, and the rate of a float32 matrix product, which is that of the
    multiply-adds. Exponentials are not counted in the latter.
    """
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        rate = H200_PRODUCTS if workload.products else H200_FLOPS
        limits = {
            "copy at 4.3 TB/s and a launch": workload.bytes_moved / H200_BYTES + H200_LAUNCH,
            f"{rate / 1e12:.0f} TFLOP/s": workload.flops / rate,
            "3.7e12 exponentials/s": workload.exponentials / H200_EXPONENTIALS if workload.flops else 0.0,
        }
    else:
        rate = product_rate(device) if workload.flops else 1.0
        limits = {
            "copy of as many bytes, measured": copy_seconds(workload.bytes_moved, device),
            f"sgemm at {rate / 1e9:.0f} GFLOP/s, measured": workload.flops / rate,
        }
    which = max(limits, key=lambda name: limits[name])
    return limits[which], which


@cache
def copy_seconds(size: int, device: torch.device) -> float:
    """Best time of a copy that reads and writes `size` bytes together."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return min(interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.1).times["copy"])


@cache
def product_rate(device: torch.device) -> float:
    """FLOP/s of a square float32 matrix product."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))
    result = torch.empty_like(a)
    times = interleaved({"product": lambda: torch.mm(a, b, out=result)}, device, seconds=0.5).times
    return 2 * GEMM_SIZE**3 / min(times["product"])
