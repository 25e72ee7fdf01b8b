"""The benchmarks of hierarchical VAEs: what the package is timed against computes the same."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ncpvae import NVAE, SIR, HierarchicalLoss, HierarchicalNCP, group_classifiers
from ncpvae.bench import OWN, Case, machine, memory, record

CPU = torch.device("cpu")
SMALL = {"channels": 4, "latent_channels": 2, "preprocess_cells": 1, "postprocess_cells": 1}
TWO_SCALES = SMALL | {"groups_per_scale": (1, 2), "halvings": 1, "encoder_cells": 1, "decoder_cells": 1}


@pytest.fixture
def module(monkeypatch):
    """The script, its networks made small."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    module = importlib.import_module("bench_nvae")
    monkeypatch.setattr(module, "TRAINED", SMALL | {"groups_per_scale": (2,), "halvings": 3})
    return module


def small_vae() -> NVAE:
    torch.manual_seed(0)
    return NVAE((1, 10, 12), **TWO_SCALES)  # padded to 12 × 12


def images(count: int) -> Tensor:
    return torch.bernoulli(torch.full((count, 1, 10, 12), 0.3))


# A step of training


@pytest.mark.parametrize("regularization", [0.0, 1e-2])
@pytest.mark.parametrize("kl_weight", [0.3, 0.9])
def test_both_forms_have_the_same_loss_and_gradients_from_the_same_noise(module, regularization, kl_weight):
    vae = small_vae()
    package = HierarchicalLoss(vae, regularization=regularization)
    plain = module.WithoutHooks(copy.deepcopy(vae), regularization)
    x, terms = images(5), []
    for loss in (package, plain):
        torch.manual_seed(1)
        terms.append(loss(x, kl_weight))
        terms[-1]["loss"].backward()
    for name in ("loss", "reconstruction", "kl"):
        torch.testing.assert_close(terms[1][name], terms[0][name], rtol=1e-5, atol=1e-5)
    assert terms[0]["kl"] > 0.01, "the divergences are there to be compared"
    for (name, one), (_, other) in zip(vae.named_parameters(), plain.vae.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_both_forms_train_alike(module):
    vae = small_vae()
    x, plain = images(5), module.WithoutHooks(copy.deepcopy(vae), 1e-2)
    losses = []
    for loss in (HierarchicalLoss(vae, regularization=1e-2), plain):
        torch.manual_seed(2)
        once = module.step(loss, x)
        losses.append(torch.stack([once() for _ in range(4)]))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0.0)


# Sampling


def test_a_convolution_over_z_and_context_together_is_the_split_one(module):
    vae = NVAE((1, 16, 16), **SMALL, groups_per_scale=(2,), halvings=2)
    z, context = torch.randn(3, 5, 2, 4, 4), torch.randn(3, 16, 4, 4)
    first, second = (classifier.eval() for classifier in group_classifiers(vae, 8))
    torch.testing.assert_close(module.Unsplit(first)(z.flatten(0, 1)), first(z).flatten())
    beside = torch.cat([z.flatten(0, 1), context.repeat_interleave(5, 0)], dim=1)
    torch.testing.assert_close(module.Unsplit(second)(beside), second(z, context).flatten())


class Tilt(nn.Module):
    """log r = a·Σz, a = ±½ by the sign of a number of the context: r times N(μ, σ²) is ∝ N(μ + aσ², σ²)."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            return 0.5 * z.sum((-3, -2, -1))
        slope = tilt(context)
        return slope.view(-1, *(1,) * (z.dim() - 4)) * z.sum((-3, -2, -1))


def tilt(context: Tensor) -> Tensor:
    return 0.5 * context[:, 5, 0, 0].sign()


@torch.no_grad()
def test_the_plain_loop_and_the_package_draw_from_the_reweighted_base(module):
    torch.manual_seed(0)
    vae = NVAE((1, 4, 4), **SMALL | {"latent_channels": 1}, groups_per_scale=(2,), halvings=1).eval()
    B, M = 600, 300

    def beside(inputs: Tensor) -> Tensor:
        return Tilt()(inputs[:, :1], inputs[:, 1:] if inputs.shape[1] > 1 else None)

    plain = module.all_at_once(vae, [beside, beside], B, M)[1]
    package = HierarchicalNCP(vae, [Tilt(), Tilt()]).draw(B, SIR(M), generator=4).z
    for z in (plain, package):
        slopes, shifts = [], []

        def look(k, base, context, z=z, slopes=slopes, shifts=shifts):
            slopes.append(torch.full((B,), 0.5) if context is None else tilt(context))
            shifts.append((z[k] - base.mean) / base.variance)  # on average the slope
            return z[k]

        vae.walk(look, B)
        assert {-0.5, 0.5} == set(slopes[1].tolist()), "both signs are there"
        for slope, shift in zip(slopes, shifts, strict=True):
            error = (shift.mean((1, 2, 3)) - slope) * slope.sign()
            assert abs(float(error.mean())) < 5 * float(error.std()) / B**0.5 + 0.02


def test_memory_of_draws_does_not_grow_with_the_proposals(module):
    with memory.FreshProcess("bench_nvae", CPU) as fresh:
        few, many = (fresh.peaks(Case("hierarchical.draw", {"B": 1, "M": M})) for M in (1024, 2048))
    if many[OWN] is None:
        pytest.skip("this system does not tell")
    assert many[OWN] < 1.2 * few[OWN] + (1 << 20)
    assert many["eager_all_at_once"] > 2048 * (8 + 64) * 16 * 4, "z and context side by side"


# The script


@pytest.mark.parametrize(
    "case",
    [
        Case("nvae_step", {"B": 2}, direction="forward and backward", settings={"regularization": 1e-2}),
        Case("hierarchical.draw", {"B": 2, "M": 3}),
    ],
    ids=str,
)
def test_records_have_both_contenders(case, module, monkeypatch):
    monkeypatch.setattr(machine, "product_rate", lambda device: 1e9)
    timed = record.measure(case, module.workload, CPU, seconds=0.005, quick=True, allow_load=True)
    assert len(timed["ratio"]) == 1 and not timed["absent"] and timed["rate"]["TFLOP_per_s"] >= 0
    assert timed["bound"]["us"] > 1e-3, "its arithmetic was counted"


def test_cases_are_different_and_the_batch_can_be_chosen(module):
    for quick in (True, False):
        cases = module.cases(CPU, quick)
        assert len({json.dumps(case.as_json()) for case in cases}) == len(cases) == (6 if quick else 5)
        assert any(case.shape == {"B": 16, "M": 5000} for case in cases)
        assert {c.shape["B"] for c in module.cases(CPU, quick, batch=3) if c.op == "nvae_step"} == {3}


def test_the_batch_is_a_flag(module, monkeypatch, capsys):
    end_to_end, timed = importlib.import_module("end_to_end"), []
    monkeypatch.setattr(end_to_end, "run", lambda modules, *_: timed.extend(m.cases(CPU, False) for m in modules))
    monkeypatch.setattr(sys, "argv", ["bench_nvae.py", "--batch", "3", "--device", "cpu"])
    end_to_end.main("bench_nvae", batch="examples")
    assert timed == [[case] for case in module.cases(CPU, batch=3)], "each case by itself"
    monkeypatch.setattr(sys, "argv", ["bench_nvae.py", "--batch", "0"])
    with pytest.raises(SystemExit):
        end_to_end.main("bench_nvae", batch="examples")
    assert "--batch must be ≥ 1, got 0" in capsys.readouterr().err
