"""draw_seed: torch's generators, and nothing else, decide the seed."""

import pytest
import torch

from ncpvae import ops


def test_seed_is_two_nonnegative_int64_on_the_device(device):
    seed = ops.draw_seed(device)
    assert seed.dtype == torch.int64 and seed.shape == (2,) and seed.device.type == device
    assert (seed >= 0).all()


def test_manual_seed_governs(device):
    torch.manual_seed(5)
    first, second = ops.draw_seed(device), ops.draw_seed(device)
    torch.manual_seed(5)
    assert torch.equal(ops.draw_seed(device), first)
    assert torch.equal(ops.draw_seed(device), second)
    assert not torch.equal(first, second)


def test_generator_governs_and_the_default_one_is_left_alone(device):
    def draw():
        return ops.draw_seed(device, torch.Generator(device).manual_seed(9))

    torch.manual_seed(1)
    first, before = draw(), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(draw(), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_generator_serves_any_device(device):
    seed = ops.draw_seed(device, torch.Generator().manual_seed(3))
    assert seed.device.type == device
    assert torch.equal(seed.cpu(), ops.draw_seed(generator=torch.Generator().manual_seed(3)))


def test_every_bit_below_the_sign_is_random():
    seeds = torch.stack([ops.draw_seed() for _ in range(400)])
    ones = (seeds[..., None] >> torch.arange(63) & 1).double().mean(0)
    assert ((ones - 0.5).abs() < 6 * 0.5 / 400**0.5).all()


def test_seeds_do_not_repeat():
    assert len({tuple(ops.draw_seed().tolist()) for _ in range(200)}) == 200


@pytest.mark.parametrize("argument", [None, "cpu", torch.device("cpu")])
def test_device_may_be_given_in_any_form(argument):
    assert ops.draw_seed(argument).device.type == "cpu"


def test_compiles_and_stays_governed_by_manual_seed(device):
    compiled = torch.compile(lambda: ops.draw_seed(device), fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    first, second = compiled(), compiled()
    torch.manual_seed(5)
    assert torch.equal(compiled(), first) and not torch.equal(first, second)
