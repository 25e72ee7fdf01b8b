import pytest
import torch

from ncpvae import MLPClassifier, ResidualClassifier
from ncpvae.nn import FactorizedReduction, ResidualCell, SqueezeExcitation


def test_mlp_gives_one_logit_per_z():
    classifier = MLPClassifier(3, (8,))
    z = torch.randn(4, 5, 3)
    assert classifier(z).shape == (4, 5)
    torch.testing.assert_close(classifier(z)[1], classifier(z[1]))


def test_mlp_context_is_shared_by_the_proposals_of_its_row():
    classifier = MLPClassifier(3, (8,), context_features=2)
    z, context = torch.randn(4, 5, 3), torch.randn(4, 2)
    together = classifier(z, context)
    one_by_one = torch.stack([classifier(z[:, m], context) for m in range(5)], dim=1)
    torch.testing.assert_close(together, one_by_one)


def test_residual_gives_one_logit_per_map_and_reaches_one_pixel_at_4x4():
    classifier = ResidualClassifier(6, channels=8, blocks=1).eval()
    assert classifier(torch.randn(2, 3, 6, 4, 4)).shape == (2, 3)
    assert classifier.cells(torch.randn(2, 8, 4, 4)).shape == (2, 32, 1, 1)


def test_residual_context_equals_convolving_the_concatenation():
    classifier = ResidualClassifier(6, channels=8, context_channels=5, blocks=1).eval()
    z, context = torch.randn(2, 3, 6, 8, 8), torch.randn(2, 5, 8, 8)
    joined = torch.cat([z, context[:, None].expand(-1, 3, -1, -1, -1)], dim=2).flatten(0, 1)
    weight = torch.cat([classifier.stem.weight, classifier.context_stem.weight], dim=1)
    h = torch.nn.functional.conv2d(joined, weight, classifier.stem.bias, padding=1)
    expected = classifier.logit(classifier.cells(h.relu()).mean((2, 3))).view(2, 3)
    torch.testing.assert_close(classifier(z, context), expected, rtol=1e-4, atol=1e-5)


def test_block_b_halves_and_doubles():
    assert ResidualCell(8, downsample=True)(torch.randn(2, 8, 6, 6)).shape == (2, 16, 3, 3)
    assert ResidualCell(8)(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)


def test_factorized_reduction_sees_every_pixel():
    reduction = FactorizedReduction(1, 4)
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    reduction(x).sum().backward()
    assert (x.grad != 0).all()


def test_squeeze_excitation_gates_between_zero_and_one():
    x = torch.rand(2, 8, 3, 3) + 0.1
    gate = SqueezeExcitation(8)(x) / x
    assert ((gate > 0) & (gate < 1)).all()
    torch.testing.assert_close(gate, gate[:, :, :1, :1].expand_as(gate))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLPClassifier(3)(torch.randn(2, 4)), r"MLPClassifier: z must be \[..., D = 3\], got shape \(2, 4\)"),
        (lambda: MLPClassifier(3)(torch.randn(2, 3), torch.randn(2, 1)), "MLPClassifier: context must be none"),
        (lambda: MLPClassifier(3, context_features=2)(torch.randn(2, 3)), "MLPClassifier: context must be .* got none"),
        (lambda: ResidualClassifier(3, 8)(torch.randn(2, 4, 8, 8)), r"ResidualClassifier: z must be .*C = 3, H, W"),
        (lambda: ResidualClassifier(3, 8)(torch.randn(2, 3, 6, 8)), "multiples of 4, got 6×8"),
        (
            lambda: FactorizedReduction(4, 8)(torch.randn(1, 4, 5, 4)),
            "FactorizedReduction: height and width must be even",
        ),
        (lambda: FactorizedReduction(4, 6), "FactorizedReduction: out_channels must be a multiple of 4, got 6"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
