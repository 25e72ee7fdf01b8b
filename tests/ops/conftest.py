"""What the op tests share: devices, seeds, awkward memory layouts, and one measure of accuracy."""

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    """Every device that is here; `pytest -m cuda` runs the CUDA half alone."""
    return request.param


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Small tensors on a shared machine are fastest on one thread; the tests of threads set their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_seed():
    """(device, key, stream) → a seed with fixed words; use `ops.draw_seed` elsewhere."""
    return lambda device="cpu", key=0x0123_4567_89AB_CDEF, stream=7: torch.tensor([key, stream], device=device)


@pytest.fixture(scope="session")
def layouts():
    """name → function giving the same values in another memory layout."""

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 99.0)], -1)[..., 0]

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def offset(t: Tensor) -> Tensor:
        return torch.cat([t.new_full((3,), 99.0), t.flatten()])[3:].view(t.shape)

    def padded_rows(t: Tensor) -> Tensor:
        return torch.cat([t, torch.full_like(t, 99.0)], -1)[..., : t.shape[-1]] if t.dim() else t

    return {"strided": strided, "transposed": transposed, "offset": offset, "padded_rows": padded_rows}


@pytest.fixture(scope="session")
def assert_accurate():
    """The error against a float64 truth is at most that of eager torch, up to a factor and a few units of rounding."""

    def check(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, factor: float = 4, units: float = 16):
        assert truth.dtype == torch.float64 and actual.shape == truth.shape
        actual, eager, truth = (t.detach().double().cpu() for t in (actual, eager, truth))
        if truth.numel() == 0:
            return
        if dtype == torch.float64:  # the truth is rounded as coarsely as what it judges
            units = max(units, 64)
        error, eager_error = (actual - truth).abs().max(), (eager - truth).abs().max()
        bound = factor * eager_error.nan_to_num(0.0, 0.0) + units * torch.finfo(dtype).eps * truth.abs().max().clamp(1)
        assert error <= bound, f"error {error:.3g}, eager torch {eager_error:.3g}, bound {bound:.3g}"

    return check
