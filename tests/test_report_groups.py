import math
import re

import pytest
import torch

pytest.importorskip("matplotlib")

from ncpvae import plots
from ncpvae.report import GroupFigures, ReportData, groups
from ncpvae.report.page import render

LOSSES = (1.35, 0.9, 1.1, 0.4, 0.2)
SIZES = (900.0, 120.0, 300.0, 11.0, 2.5)


def hierarchy(**changes):
    """Five groups of two scales, with something in every field; `changes` replace a field in all of them."""
    return [
        GroupFigures(
            **{
                "number": k + 1,
                "scale": 1 if k < 2 else 2,
                "shape": (20, 4, 4) if k < 2 else (20, 8, 8),
                "kl": 3.25 + k,
                "loss": loss,
                "jsd": math.log(2) - loss / 2,
                "accuracy": 0.5 + 0.1 * k,
                "ess": ess,
                "log_mean": -0.125 * k,
                "log_mean_std": 0.25,
                **changes,
            }
        )
        for k, (loss, ess) in enumerate(zip(LOSSES, SIZES, strict=True))
    ]


def page(entries, num_proposals=1000):
    return render(ReportData("x", groups=entries, num_proposals=num_proposals))


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html[html.index("<section") :]))


def rows(html):
    """The cells of the table's body."""
    body = re.search(r"<tbody>(.*?)</tbody>", html, re.DOTALL)[1]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("</tr>")[:-1]]


def heads(html):
    head = re.search(r"<thead>(.*?)</thead>", html, re.DOTALL)[1]
    return [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<th[^>]*>(.*?)</th>", head, re.DOTALL)]


# The table


def test_the_table_has_every_value_of_every_group():
    html = page(hierarchy())
    assert heads(html) == ["Group", "Scale", "Shape", "KL", "Loss", "JSD", "Accuracy", "ESS", "log Ep[rk]"]
    assert rows(html) == [
        ["1", "1", "20 × 4 × 4", "3.25", "1.350", "0.018", "0.500", "900", "0.000 (0.250)"],
        ["2", "1", "20 × 4 × 4", "4.25", "0.900", "0.243", "0.600", "120", "−0.125 (0.250)"],
        ["3", "2", "20 × 8 × 8", "5.25", "1.100", "0.143", "0.700", "300", "−0.250 (0.250)"],
        ["4", "2", "20 × 8 × 8", "6.25", "0.400", "0.493", "0.800", "11.0", "−0.375 (0.250)"],
        ["5", "2", "20 × 8 × 8", "7.25", "0.200", "0.593", "0.900", "2.50", "−0.500 (0.250)"],
    ]
    text = words(html)
    assert "Not given" not in text and "Flat" not in text and "not drawn" not in text
    assert "of the 1,000 proposals" in text


def test_flat_groups_are_named_and_have_no_ess():
    entries = [GroupFigures(1, 1, (8,), 0.1, 1.386, 0.0, 0.5, flat=True), *hierarchy()[1:]]
    html = page(entries)
    assert rows(html)[0] == ["1", "1", "8", "0.10", "1.386", "0.000", "0.500", "flat", "–"]
    assert "Flat groups have no effective sample size: 1." in words(html) and "Over 4 groups" in words(html)
    assert rows(page(entries[:1]))[0][0] == "1 (flat)"  # where there is no such column


def test_before_stage_two_there_is_the_table_of_the_vae_alone():
    html = page([GroupFigures(k, 1, (2, 4, 4), float(k)) for k in (1, 2, 3)], None)
    assert heads(html) == ["Group", "Scale", "Shape", "KL"] and html.count("<svg") == 0
    text = words(html)
    assert "Not given for any group: classification loss, JSD, accuracy, effective sample size, log E[r]." in text
    absent = text.split("nothing to show there: ")[1]
    assert "training" in absent and "latent" not in absent and "weights" not in absent  # groups have none of their own


@pytest.mark.parametrize(
    ("missing", "charts", "said"),
    [
        ({"ess": None}, 1, "Not given for any group: effective sample size."),
        ({"loss": None}, 2, "Not given for any group: classification loss."),
        ({"loss": None, "jsd": None}, 1, "Not given for any group: classification loss, JSD."),
        ({"jsd": None, "accuracy": None}, 3, "Not given for any group: JSD, accuracy."),
        ({"log_mean": None, "log_mean_std": None, "kl": None}, 3, "Not given for any group: KL, log E[r]."),
    ],
    ids=str,
)
def test_what_is_missing_is_named(missing, charts, said):
    html = page(hierarchy(**missing))
    assert html.count("<svg") == charts and said in words(html)
    assert ("no group has both" in words(html)) == bool({"ess", "loss"} & set(missing))


def test_values_that_cannot_be_drawn_are_named():
    entries = hierarchy()
    entries[1] = GroupFigures(2, 1, (2,), math.nan, math.inf, math.nan, math.nan, 0.0, -math.inf, math.nan)
    html = page(entries)
    assert rows(html)[1][3:] == [*["not finite"] * 4, "0", "not finite (not finite)"]
    undrawn = "classification loss of group 2; JSD of group 2; effective sample size of group 2."
    assert f"Zero or not finite, and so not drawn: {undrawn}" in words(html)
    assert html.count("<svg") == 3 and "Over 4 groups" in words(html)


# The charts


def drawn(draw, *arguments):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw(axes, *arguments)
    return axes


def named(axes):
    """The points of every line with a name."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_losses_and_divergences_are_drawn_over_the_group_numbers():
    entries = [*hierarchy()[:2], GroupFigures(3, 1, (8,)), *hierarchy()[3:]]
    lines = named(drawn(plots.draw_losses, entries))
    for name, key in (("classification loss", "loss"), ("JSD", "jsd")):
        points = {int(x): y for x, y in lines[name]}
        assert math.isnan(points.pop(3))  # a gap
        assert points == {entry.number: getattr(entry, key) for entry in entries if entry.number != 3}
    assert list(named(drawn(plots.draw_losses, hierarchy(jsd=None)))) == ["classification loss"]


def test_sizes_are_drawn_on_a_logarithmic_axis_that_reaches_the_number_of_proposals():
    axes = drawn(plots.draw_ess, hierarchy(), 1000)
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] <= 1 and axes.get_ylim()[1] > 1000
    assert axes.lines[0].get_xydata().tolist() == [[k + 1, ess] for k, ess in enumerate(SIZES)]
    assert [text.get_text() for text in axes.texts] == ["1,000 proposals"]


def test_every_group_has_a_numbered_dot_in_the_colour_of_its_scale():
    axes = drawn(plots.draw_ess_against_loss, hierarchy(), 1000)
    points = [list(point) for point in zip(LOSSES, SIZES, strict=True)]
    assert named(axes) == {"scale 1": points[:2], "scale 2": points[2:]}
    labels = {text.get_text(): list(text.xy) for text in axes.texts}
    assert {str(k + 1): point for k, point in enumerate(points)}.items() <= labels.items()


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("ess", [1.0, 0.2, 4999.0])
def test_any_number_of_groups_can_be_shown(count, ess):
    html = page([GroupFigures(k, k, (8,), loss=1.0, jsd=0.2, ess=ess) for k in range(1, count + 1)], 5000)
    assert html.count("<svg") == 3 and "No correlation is given" in words(html)


def test_the_page_names_its_colours_by_variables_and_charts_by_labels():
    html = page(hierarchy())
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len({re.search('aria-label="([^"]+)"', chart)[1] for chart in charts}) == 3
    for chart in charts:
        assert "var(--c0)" in chart and not any(colour in chart for colour in (*plots.PALETTE, plots.INK))
    assert page(hierarchy()) == html


def test_the_figure_is_a_png_file(tmp_path):
    assert plots.save_groups(tmp_path / "a.png", hierarchy(), 1000).read_bytes()[:4] == b"\x89PNG"
    for entries in ([], hierarchy(ess=None), hierarchy(loss=math.nan)):
        with pytest.raises(ValueError, match=f"save_groups: groups must have .* got {len(entries)} without"):
            plots.save_groups(tmp_path / "b.png", entries)


# Correlations


def test_correlations_of_exact_relations_are_one():
    falling = groups.correlation([0.1, 0.5, 0.9, 1.3], [math.exp(-2 * loss) for loss in (0.1, 0.5, 0.9, 1.3)])
    assert falling == (4, pytest.approx(-1.0), pytest.approx(-1.0))
    curved = groups.correlation([1.0, 2.0, 3.0, 4.0], [1.0, 1.1, 1.2, 5000.0])  # in order, not on a line
    assert curved.spearman == pytest.approx(1.0) and curved.pearson < 0.9


def test_correlations_are_those_of_closed_forms():
    # log ESS = 0, 2, 1 for losses 0, 1, 2: covariance 1, both sums of squares 2. The ranks are the same numbers.
    assert groups.correlation([0.0, 1.0, 2.0], [1.0, math.exp(2), math.e]) == (
        3,
        pytest.approx(0.5),
        pytest.approx(0.5),
    )
    # Ranks 1½, 1½, 3, 4 and 2, 1, 3, 4: covariance 4½, sums of squares 4½ and 5.
    tied = groups.correlation([0.3, 0.3, 0.4, 0.9], [7.0, 2.0, 8.0, 9.0])
    assert tied.spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlations_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        losses = torch.rand(9, generator=generator, dtype=torch.float64).mul(8).round().tolist()  # with ties
        sizes = torch.randn(9, generator=generator, dtype=torch.float64).exp().tolist()
        found = groups.correlation(losses, sizes)
        assert found.pearson == pytest.approx(stats.pearsonr(losses, [math.log(size) for size in sizes])[0])
        assert found.spearman == pytest.approx(stats.spearmanr(losses, sizes)[0])


@pytest.mark.parametrize(
    ("losses", "sizes"),
    [([], []), ([1.0, 2.0], [1.0, 2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])],
    ids=str,
)
def test_correlations_that_are_undefined_are_left_out(losses, sizes):
    assert groups.correlation(losses, sizes) is None


@pytest.mark.parametrize(
    ("losses", "sizes", "message"),
    [
        ([1.0, 2.0], [1.0], "one length, got 2 and 1"),
        ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0], r"finite and positive, got \[1.0, nan, 2.0\]"),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 3.0], r"got .* and \[1.0, 0.0, 3.0\]"),
    ],
)
def test_correlations_of_bad_input_are_errors(losses, sizes, message):
    with pytest.raises(ValueError, match=f"correlation: .*{message}"):
        groups.correlation(losses, sizes)


def test_the_caption_has_the_correlations():
    found = groups.correlation(LOSSES, SIZES)
    text = words(page(hierarchy()))
    assert f"sample size is {found.pearson:.3f} (Pearson), that of their ranks {found.spearman:.3f} (Spearman)" in text
    assert found.spearman == pytest.approx(1.0) and 0.9 < found.pearson < 1


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 0}, "GroupFigures: number must be an integer ≥ 1, got 0"),
        ({"number": 1.0}, "GroupFigures: number must be an integer ≥ 1, got 1.0"),
        ({"scale": True}, "GroupFigures: scale must be an integer ≥ 1, got True"),
        ({"shape": (4, 4)}, r"of group 3: shape must be \[C, H, W\] or \[D\], integers ≥ 1, got \(4, 4\)"),
        ({"shape": (4, 0, 4)}, r"shape must be .*, got \(4, 0, 4\)"),
        ({"shape": 8}, "shape must be .*, got 8"),
        ({"kl": "1"}, "of group 3: kl must be a number or None, got str"),
        ({"loss": torch.tensor(1.0)}, "loss must be a number or None, got Tensor"),
        ({"loss": -0.1}, "loss must be ≥ 0, got -0.1"),
        ({"jsd": 0.7}, "jsd must be ≤ 0.693, got 0.7"),
        ({"accuracy": 93.0}, "accuracy must be ≥ 0 and ≤ 1, got 93.0"),
        ({"ess": -1.0}, "ess must be ≥ 0, got -1.0"),
        ({"log_mean": 0.0, "log_mean_std": -1.0}, "log_mean_std must be ≥ 0, got -1.0"),
        ({"log_mean_std": 1.0}, "log_mean must be given where log_mean_std is, got None"),
        ({"flat": True, "ess": 50.0}, "ess must be None for a flat group, which takes no proposals, got 50.0"),
    ],
    ids=str,
)
def test_bad_figures_are_named_with_their_group(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GroupFigures(**{"number": 3, "scale": 1, "shape": (4,), **changes})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("groups", "groups must be a list, got a string"),
        ([{"number": 1}], "groups must be a list of GroupFigures, got dict in it"),
        ([GroupFigures(2, 1, (8,)), GroupFigures(1, 1, (8,))], r"order of their numbers, each once, got \[2, 1\]"),
        ([GroupFigures(1, 1, (8,)), GroupFigures(1, 1, (8,))], r"order of their numbers, each once, got \[1, 1\]"),
        ([GroupFigures(4, 1, (8,), ess=60.0)], "ess of group 4 must be ≤ num_proposals, 50, got 60.0"),
    ],
)
def test_bad_lists_of_groups_are_named(entries, message):
    with pytest.raises((TypeError, ValueError), match=f"ReportData: .*{message}"):
        ReportData("x", groups=entries, num_proposals=50)


def test_divergences_and_sizes_of_single_precision_may_be_rounded_up():
    largest = float(torch.tensor(math.log(2), dtype=torch.float32))
    assert largest > math.log(2)
    entry = GroupFigures(1, 1, (8,), jsd=largest, ess=50 * (1 + 2**-20))
    assert ReportData("x", groups=[entry], num_proposals=50).groups == [entry]
