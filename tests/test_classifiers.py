import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncpvae import MLPClassifier, NoiseContrastivePrior, Normal, ResidualClassifier
from ncpvae.nn import FactorizedReduction, PackedLinear, ResidualCell, SqueezeExcitation, fused


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
    h = F.conv2d(joined, weight, classifier.stem.bias, padding=1)
    expected = classifier.logit(classifier.cells(h.relu()).mean((2, 3))).view(2, 3)
    torch.testing.assert_close(classifier(z, context), expected, rtol=1e-4, atol=1e-5)


def test_block_b_halves_and_doubles():
    assert ResidualCell(8, downsample=True)(torch.randn(2, 8, 6, 6)).shape == (2, 16, 3, 3)
    assert ResidualCell(8)(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)


def test_factorised_reduction_is_four_convolutions_of_stride_two():
    torch.manual_seed(0)
    reduction, x = FactorizedReduction(4, 8).double(), torch.randn(5, 4, 12, 10).double()
    h = F.silu(x)
    strided = [
        F.conv2d(part, quarter.weight, quarter.bias, stride=2)
        for quarter, part in zip(reduction.quarters, (h, h[..., 1:, 1:], h[..., 1:], h[..., 1:, :]), strict=True)
    ]
    torch.testing.assert_close(reduction(x), torch.cat(strided, dim=1))


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


def residual_with_statistics(**arguments):
    """A classifier whose BatchNorm does something."""
    classifier = ResidualClassifier(6, channels=8, blocks=2, **arguments).eval()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, (low, high) in {
                module.running_mean: (-0.3, 0.3),
                module.running_var: (0.5, 2.0),
                module.weight.data: (0.5, 1.5),
                module.bias.data: (-0.3, 0.3),
            }.items():
                tensor.uniform_(low, high)
    return classifier


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Tanh])
@torch.no_grad()
def test_fused_mlp_is_the_same_function(activation):
    classifier = MLPClassifier(3, (16, 16), activation, context_features=2).eval()
    z, context = torch.randn(4, 5, 3), torch.randn(4, 2)
    torch.testing.assert_close(fused(classifier)(z, context), classifier(z, context))


@torch.no_grad()
def test_fused_residual_is_the_same_function_with_fewer_layers():
    classifier = residual_with_statistics(context_channels=5)
    twin = fused(classifier)
    for seed in (1, 2):  # the second context must not be taken for the first
        torch.manual_seed(seed)
        z, context = torch.randn(2, 3, 6, 8, 8), torch.randn(2, 5, 8, 8)
        torch.testing.assert_close(twin(z, context), classifier(z, context), rtol=1e-4, atol=1e-5)
    count = [sum(isinstance(m, nn.BatchNorm2d) for m in c.modules()) for c in (classifier, twin)]
    assert count[1] == count[0] // 2  # those that come after a convolution are in it


@torch.no_grad()
def test_the_context_is_convolved_once_for_all_parts_of_the_proposals():
    twin, calls = fused(residual_with_statistics(context_channels=5)), []
    twin.context_stem.module.register_forward_hook(lambda *_: calls.append(None))
    context = torch.randn(2, 5, 8, 8)
    for _ in range(3):
        twin(torch.randn(2, 3, 6, 8, 8), context)
    assert len(calls) == 1


def test_fused_leaves_alone_what_it_does_not_know():
    class Doubled(MLPClassifier):
        def forward(self, z, context=None):
            return 2 * super().forward(z, context)

    hooked = nn.Sequential(nn.Linear(2, 3), nn.SiLU()).eval()
    hooked[0].register_forward_hook(lambda *_: None)
    compiled = torch.compile(MLPClassifier(2, (3,)).eval())
    for module in (nn.Tanh().eval(), Doubled(2, (3,)).eval(), MLPClassifier(2, (3,)).train(), compiled):
        assert fused(module) is module
    assert list(fused(hooked)) == list(hooked)


def test_fused_changes_nothing_in_the_classifier():
    classifier = residual_with_statistics()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    strides = {name: value.stride() for name, value in classifier.state_dict().items()}
    fused(classifier, torch.bfloat16)
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name]) and value.stride() == strides[name]


@pytest.mark.skipif(not PackedLinear.serves(nn.Linear(2, 2), torch.bfloat16), reason="needs oneDNN and bfloat16")
@torch.no_grad()
def test_a_logit_is_not_rounded_to_the_dtype_of_the_products():
    twin = fused(MLPClassifier(3, (16,)).eval(), torch.bfloat16)
    logits = twin(torch.randn(100, 3))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_score_is_that_of_autograd_bit_for_bit(activation):
    prior = NoiseContrastivePrior(Normal(3), MLPClassifier(3, (16, 16), activation))
    z = torch.randn(7, 5, 3, requires_grad=True)
    expected = torch.autograd.grad(prior.log_ratio(z).sum(), z)[0]
    assert prior.classifier.score(z) is not None
    assert torch.equal(prior().score(z), expected)


def test_score_is_left_to_autograd_where_it_is_not_known():
    classifier = MLPClassifier(3, (16,), nn.Tanh)
    assert classifier.score(torch.randn(2, 3)) is None
    z = torch.randn(2, 3, requires_grad=True)
    expected = torch.autograd.grad(classifier(z).sum(), z)[0]
    torch.testing.assert_close(NoiseContrastivePrior(Normal(3), classifier)().score(z), expected)


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
