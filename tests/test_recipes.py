"""Settings of recipes that cannot be."""

from dataclasses import replace

import pytest

from ncpvae.recipes import RECIPES, CriticSettings, Remedies, StageTwo
from ncpvae.runs import sampling


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CriticSettings(kind="contrastive"),
            "critic.kind must be one of none, self, neural, hybrid, got",
        ),
        (
            lambda: Remedies(annealing="cosine"),
            "remedies.annealing must be one of none, linear, cyclical, got",
        ),
        (lambda: StageTwo(base="gaussian"), "prior.base must be one of prior, normal, mixture, got 'gaussian'"),
        (lambda: sampling.Sampling(sampler="lagevin"), "sampler must be one of sir, langevin, got 'lagevin'"),
        (lambda: replace(RECIPES["digits"], schedule="step"), "schedule must be one of cosine, constant, got 'step'"),
    ],
)
def test_choices_that_there_are_not_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_temperatures_are_positive():
    with pytest.raises(ValueError, match=r"temperatures must be finite and > 0, got 0\.0"):
        replace(RECIPES["digits"].evaluation, temperatures=(1.0, 0.0))
