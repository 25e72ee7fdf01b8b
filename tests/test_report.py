import base64
import math
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch

pytest.importorskip("matplotlib")

from ncpvae.report import GroupFigures, Metric, ReportData, Samples, charts, pictures, write_report
from ncpvae.report.content import flatten
from ncpvae.report.page import brief, number, render

VOID = {"meta", "img", "link", "br", "hr"}
FETCHED = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """Tags in order, text by the innermost tag, ids, and what the tags refer to; fails where tags do not match."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.words, self.alts = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in FETCHED]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def page(data):
    return Page(render(data))


def full(kind="images"):
    """A report with something in every field."""
    generator = torch.Generator().manual_seed(3)

    def examples(n):
        shape = (n, 1, 8, 8) if kind == "images" else (n, 2)
        return torch.rand(shape, generator=generator)

    return ReportData(
        title="A run",
        summary="What it was.",
        commands=["ncpvae train digits --seed 0", "ncpvae fit-prior runs/x"],
        settings={"vae": {"latent_dim": 10, "hidden": (3, 4)}, "seed": 0},
        environment={"torch": "2.13", "seed": "0"},
        curves={
            "loss, nats": {"train": [(i, 5 / (i + 1)) for i in range(40)], "validation": [(0, 3.0), (39, 1.0)]},
            "learning rate": {"vae": [(0, 1e-3), (39, 1e-4)]},
        },
        samples=[Samples(t, examples(20), examples(20)) for t in (0.7, 1.0)],
        reconstructions=(examples(20), examples(20)),
        neighbours=(examples(20), examples(20), torch.linspace(2.0, 1.0, 20)),
        log_weights=torch.randn(500, generator=generator),
        ess=1 + 99 * torch.rand(64, generator=generator),
        num_proposals=100,
        latents={name: torch.randn(200, 10, generator=generator) for name in ("q(z)", "p(z)", "p_NCP(z)")},
        groups=[GroupFigures(k, 1, (2, 4, 4), 1.0, 1.2, 0.1, 0.6, 10.0 + k, -0.1, 0.1) for k in range(1, 4)],
        metrics=[
            Metric("likelihood", "nats", -90.0, -80.0, False, 0.5, 0.5, "By importance sampling."),
            Metric("distance", "", 3.0, 4.0, True, protocol="In features."),
            Metric("again", "", 3.0, 4.0, None, protocol="By importance sampling."),
        ],
        notes=["One run."],
    )


def test_everything_has_its_place_and_number(tmp_path):
    path = write_report(full(), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    found = Page(path.read_text(encoding="utf-8"))
    sections = ["metrics", "samples", "neighbours", "reconstructions", "latents", "weights", "groups"]
    sections += ["curves", "settings"]
    assert [name for name in found.ids if name in sections] == sections
    assert {"environment", "commands"} < set(found.ids)
    numbered = "Table 1, Figure 1, Figure 2, Figure 3, Figure 4, Table 2, Figure 5, Table 3, Figure 6, Figure 7"
    assert ", ".join(re.findall(r"(?:Figure|Table) \d", found.text)) == numbered
    assert (
        found.count("img") == 4 + 16 + 1
    )  # two grids for each temperature, a picture for each of the 16 closest pairs
    assert found.count("svg") == 3 + 2 + 3 + 2  # latents, weights, groups, curves
    for words in ("What it was.", "vae.latent_dim", "ncpvae fit-prior runs/x", "2.13", "One run.", "temperature 0.7"):
        assert words in found.text
    assert "Not on this page" not in found.text
    targets = {value[1:] for value in found.references if value.startswith("#")}
    assert targets <= set(found.ids) and len(set(found.ids)) == len(found.ids)


def test_points_are_drawn_as_scatter_plots():
    found = page(full("points"))
    assert found.count("img") == 0
    assert found.count("svg") == 4 + 2 + 1 + 3 + 2 + 3 + 2
    assert "Each point is a sample" in found.text


@pytest.mark.parametrize("kind", ["images", "points"])
def test_nothing_is_fetched_and_nothing_runs(kind):
    html = render(full(kind))
    found = Page(html)
    assert {value[:10] for value in found.references if not value.startswith("#")} == {"data:image"}
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?:|@import|url\((?!#)|<!DOCTYPE svg|<\?xml", html)
    assert "default-src 'none'" in html


def test_text_is_escaped_wherever_it_comes_from():
    evil = "<script>alert('&\"')</script> $\\frac --> ]]>"
    data = ReportData(
        title=evil,
        summary=evil,
        commands=[evil],
        settings={evil: {evil: evil}},
        environment={evil: evil},
        curves={evil: {evil: [(0, 1.0), (1, 2.0)], "_hidden": [(0, 2.0)]}, "empty" + evil: {evil: [(0, math.nan)]}},
        latents={"q(z)": torch.randn(9, 3), evil: torch.randn(9, 3)},
        metrics=[Metric(evil, evil, 1.0, 2.0, True, protocol=evil)],
        notes=[evil],
    )
    html = render(data)
    found = Page(html)
    assert "script" not in {tag for tag, _ in found.tags}
    assert html.count("<script") == 0
    # In title and headings; a chart's title, legend and dropped series; and so on, whole each time.
    assert found.text.count(evil) >= 13
    assert "_hidden" in found.text


@pytest.mark.parametrize("kind", ["images", "points"])
def test_the_same_data_gives_the_same_bytes_and_leaves_no_trace(kind, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.size", 31.0)
    before, state = dict(matplotlib.rcParams), torch.get_rng_state()
    first = write_report(full(kind), tmp_path / "a.html").read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 10.0)
    torch.manual_seed(77)
    assert write_report(full(kind), tmp_path / "b.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


FIELDS = {
    "metrics": "metrics",
    "samples": "samples",
    "neighbours": "nearest training examples",
    "reconstructions": "reconstructions",
    "latents": "latent space",
    "groups": "latent groups",
    "curves": "training",
    "settings": "settings",
    "environment": "environment",
    "commands": "commands",
}


ALL = [*list(FIELDS.values())[:5], "weights", *list(FIELDS.values())[5:]]


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_alone_is_shown_and_the_others_named_as_missing(field):
    found = page(ReportData("x", **{field: getattr(full(), field)}))
    assert field in found.ids and f"#{field}" in found.references
    others = [name for key, name in FIELDS.items() if key != field]
    assert set(FIELDS) & set(found.ids) == {field}
    named = found.text.split("nothing to show there: ")[1]
    unasked = {"latents": ["latent groups"], "groups": ["latent space", "weights"]}.get(field, [])  # of other models
    expected = [name for name in ALL if name in [*others, "weights"] and name not in unasked]
    assert named.strip().rstrip(".").split(", ") == expected


def test_a_report_of_nothing_but_a_title():
    found = page(ReportData("Alone"))
    assert "Alone" in found.text and found.count("section") == 0
    assert ", ".join(ALL) in found.text


def test_weights_and_ess_stand_alone():
    for field, words in (("log_weights", "Effective sample size"), ("ess", "The weights log")):
        both = ReportData("x", log_weights=torch.zeros(9), ess=torch.ones(9))
        found = page(replace(both, **{field: None}))
        assert found.count("svg") == 1 and words in found.text and "Left:" not in found.text
    assert "Left:" in page(both).text


# Metrics


def metric(base, ncp, lower=True, base_error=None, ncp_error=None):
    return Metric("m", "", base, ncp, lower, base_error, ncp_error)


@pytest.mark.parametrize(
    ("row", "better"),
    [
        (metric(2.0, 1.0), None),  # no error is known
        (metric(2.0, 1.0, True, 0.1, 0.1), "ncp"),
        (metric(2.0, 1.0, False, 0.1), "base"),
        (metric(1.0, 2.0, True, None, 0.1), "base"),
        (replace(metric(2.0, 1.0, True, 3.0, 3.0), difference_error=0.1), "ncp"),  # paired
        (replace(metric(2.0, 1.0, True, 0.1, 0.1), difference_error=1.5), None),
        (metric(1.0, 2.0, lower=None), None),
        (metric(1.0, 1.0), None),
        (metric(None, 1.0), None),
        (metric(2.0, 1.0, True, 0.5, 0.5), "ncp"),
        (metric(2.0, 1.0, True, 0.8, 0.8), None),
        (metric(2.0, 1.0, True, math.nan, 0.1), None),
        (metric(math.nan, 1.0), None),
        (metric(2.0, math.nan), None),
        (metric(2.0, -math.inf), None),
        (metric(math.inf, 1.0), None),
    ],
)
def test_which_value_is_better(row, better):
    assert row.better == better
    found = page(ReportData("x", metrics=[row]))
    marked = [tag for tag, attributes in found.tags if tag == "td" and "better" in attributes.get("class", "").split()]
    assert len(marked) == (better is not None)
    assert ("(better)" in found.text) == (better is not None)


def test_values_that_are_not_finite_say_so():
    rows = [metric(math.nan, math.inf), metric(-math.inf, 1.0, True, math.nan, math.inf)]
    found = page(ReportData("x", metrics=rows))
    assert found.text.count("not finite") == 5
    assert not re.search(r"\b(nan|inf)\b", found.text, re.IGNORECASE)


def test_footnotes_are_shared_by_rows_of_one_protocol():
    html = render(ReportData("x", metrics=full().metrics))
    assert html.count("By importance sampling.") == 1
    assert html.count("<sup>a</sup>") == 3 and html.count("<sup>b</sup>") == 2  # by the rows, and at the notes


def test_differences_and_errors_have_the_digits_of_the_error():
    text = page(ReportData("x", metrics=[metric(84.9213, 82.8123, True, 0.252, 0.248)])).text
    assert "84.92" in text and "82.81" in text and "± 0.25" in text and "−2.11" in text
    assert "± 0.252" not in text


@pytest.mark.parametrize(
    ("value", "decimals", "printed"),
    [
        (1234567.891, 1, "1,234,567.9"),
        (-2.5, 2, "−2.50"),
        (0.0, 2, "0.00"),
        (1.2e-5, None, "1.20 × 10⁻⁵"),
        (-1.2e-5, 2, "−1.20 × 10⁻⁵"),
        (math.inf, 2, "not finite"),
    ],
)
def test_numbers_as_they_are_printed(value, decimals, printed):
    assert number(value, decimals) == printed


def test_numbers_in_running_text_have_three_significant_digits():
    assert [brief(v) for v in (0.0, 0.12345, 9.999, 212.34, 12345.6, 4e-7)] == [
        *("0", "0.123", "10.0", "212", "12,346", "4.00 × 10⁻⁷")
    ]


# What is hard to draw


def test_weights_that_are_not_finite_are_counted():
    weights = torch.tensor([0.0, 0.0, -math.inf, -math.inf, math.nan])
    text = page(ReportData("x", log_weights=weights)).text
    assert "3 draws whose weight is zero or not finite" in text
    assert f"{math.log(0.5):.2f}".replace("-", "−") in text  # log Z: draws of weight zero are draws too
    assert "None of the 2 log-weights is finite" in page(ReportData("x", log_weights=weights[-2:])).text


def test_the_weighted_histogram_is_that_of_the_weights():
    svg, left_out = charts.log_weights(torch.cat([torch.zeros(90), torch.ones(10)]))
    assert left_out == 0
    curves = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="fill: none; stroke: var\(--c([01])\)', svg)
    tops = {colour: sorted({float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)}) for path, colour in curves}
    ground = tops["1"][-1]
    plain, weighted = ([ground - y for y in tops[colour][:2]] for colour in "10")
    assert plain[1] / plain[0] == pytest.approx(1 / 9, rel=1e-3)
    assert weighted[1] / weighted[0] == pytest.approx(math.e / 9, rel=1e-3)


def test_outlying_log_weights_do_not_flatten_the_histogram():
    _, left_out = charts.log_weights(torch.cat([torch.randn(10_000), torch.tensor([-1e6, -1e5])]))
    assert 2 <= left_out <= 50
    assert charts.log_weights(torch.randn(10_000))[1] == 0


@pytest.mark.parametrize(
    "values", [[7.0], [1.0, 1.0], [math.nan, 3.0, 0.0], [0.0, -math.inf], [5000.0, 5001.0]], ids=str
)
def test_any_ess_can_be_shown(values):
    found = page(ReportData("x", ess=torch.tensor(values), num_proposals=5000))
    usable = sum(v > 0 for v in values)
    assert found.count("svg") == (usable > 0)
    assert ("without a usable weight" in found.text) == (0 < usable < len(values))


@pytest.mark.parametrize(
    "points",
    [
        [(0, 1.0)],
        [(0, math.nan), (1, 1.0), (2, math.inf)],
        [(i, 10.0 ** (-i)) for i in range(9)],
        [(i, 0.0) for i in range(3)],
        [(5, 1.0), (5, 2.0)],
        [(0, 1.0), (100, math.nan)],
    ],
    ids=str,
)
def test_any_curve_can_be_drawn(points):
    assert page(ReportData("x", curves={"loss": {"train": points}})).count("svg") == 1


def test_long_curves_are_averaged_and_early_peaks_cut():
    late = [(i, 1.0 + 0.01 * (i % 7)) for i in range(100, 1000)]
    svg, block, cut = charts.curves("loss", {"train": [(i, 1e3 / (i + 1)) for i in range(100)] + late})
    assert (block, cut) == (3, True) and len(svg) < 60_000
    assert charts.curves("loss", {"train": late})[1:] == (3, False)
    text = page(ReportData("x", curves={"loss": {"train": [(0, 1e3), *late]}})).text
    assert "blocks of up to 3 logged values" in text and "below the frame in: loss" in text


def test_series_without_a_finite_value_are_named():
    curves = {"loss": {"train": [(0, 1.0)], "held out": [(0, math.nan)], "none": []}, "gone": {}}
    found = page(ReportData("x", curves=curves))
    assert found.count("svg") == 1 and "not drawn: loss (held out); loss (none)" in found.text


def test_latents_are_seen_along_the_principal_components_of_q():
    """q varies by 5 along one direction of 20 and by 2 along another, and the table says so."""
    basis = torch.linalg.qr(torch.randn(20, 20))[0]
    spread = torch.tensor([5.0, 2.0] + [0.1] * 18)
    q = torch.randn(3000, 20) * spread @ basis.T + 3.0
    found = page(ReportData("x", latents={"q(z)": q, "p(z)": torch.randn(3000, 20)}))
    row = re.search(r"q\(z\)3,000 ?0\.00 \((\d\.\d\d)\) ?0\.00 \((\d\.\d\d)\)", found.text)
    assert float(row[1]) == pytest.approx(5.0, rel=0.05) and float(row[2]) == pytest.approx(2.0, rel=0.05)
    assert "hold 99 % of the variance" in found.text


@pytest.mark.parametrize("dimensions", [1, 2, 7])
def test_latents_of_any_dimension(dimensions):
    q = torch.randn(30, dimensions)
    q[3] = math.nan
    found = page(ReportData("x", latents={"q(z)": q, "p(z)": q + 1, "p_NCP(z)": q.clone()}))
    assert found.count("svg") == 3 and "3 codes that are not finite" in found.text


def test_closest_pairs_come_first():
    queries, examples = torch.rand(30, 3, 16, 16), torch.rand(30, 3, 16, 16)
    distances = torch.tensor([math.nan] + [30.0 - i for i in range(29)])
    found = page(ReportData("x", neighbours=(queries, examples, distances)))
    assert found.text.index("2.00") < found.text.index("3.00") < found.text.index("10.0")
    assert "closest of 30 samples" in found.text and "Smallest distance 2.00, median 16.0" in found.text


# Pictures


def decoded(picture):
    image = pytest.importorskip("PIL.Image")
    return image.open(BytesIO(base64.b64decode(picture.uri.split(",")[1])))


def test_a_grid_shows_the_pixels_and_clear_gaps():
    images = torch.tensor([0.0, 0.2, 0.4, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    picture = pictures.grid(images, room=100, limit=4)
    image = decoded(picture)
    assert image.mode == "RGBA" and picture.shown == 4 and image.size == (4 * 2 + 3, 2)
    assert image.getpixel((0, 0)) == (0, 0, 0, 255) and image.getpixel((3, 0)) == (51, 51, 51, 255)
    assert image.getpixel((2, 0))[3] == 0
    assert picture.width % image.width == 0 and picture.sharp


def test_pairs_stand_over_each_other():
    image = decoded(pictures.pair(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), room=50))
    assert image.mode == "LA" and image.size == (4, 10)
    assert [image.getpixel((1, y)) for y in (3, 4, 6)] == [(0, 255), (0, 0), (255, 255)]


@pytest.mark.parametrize("size", [8, 28, 32, 128])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_grids_fit_their_room(size, count):
    images = pictures.prepare(torch.zeros(count, 1, size, size))
    for picture in (pictures.grid(images, 468, 64), pictures.pairs(images, images, 952, 48)):
        assert 1 <= picture.shown <= count
    assert pictures.grid(images, 468, 64).width <= 468
    assert pictures.pairs(images, images, 952, 48).width <= 952


def test_bad_pixels_are_grey_and_counted():
    images = torch.rand(9, 1, 8, 8)
    images[2, 0, 0, 0] = math.nan
    prepared = pictures.prepare(images)
    assert prepared[2, 0, 0, 0] == 0.5 and torch.isfinite(prepared).all()
    text = page(ReportData("x", samples=[Samples(1.0, images, torch.rand(9, 1, 8, 8))])).text
    assert "1 of the samples hold values that are not finite" in text


def test_large_pictures_are_made_smaller_and_the_page_stays_small():
    noise = torch.rand(9, 3, 256, 256)  # which does not compress
    data = ReportData("x", samples=[Samples(t, noise, noise) for t in (0.7, 1.0)], reconstructions=(noise, noise))
    html = render(data)
    assert len(html) < 3_000_000 and "shown smaller than they are" in html


# Bad input


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("log_weights", torch.zeros(3, 2), r"log_weights must be \[N\], got shape \(3, 2\)"),
        ("ess", [1.0], "ess must be a tensor, got list"),
        ("num_proposals", 0, "num_proposals must be ≥ 1, got 0"),
        ("reconstructions", (torch.rand(2, 1, 4, 4),), "reconstructions must be a tuple of 2 tensors, got 1"),
        (
            "reconstructions",
            (torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4)),
            r"one shape, got \(2, 1, 4, 4\) and \(3, 1, 4, 4\)",
        ),
        (
            "reconstructions",
            (torch.rand(2, 4, 4), torch.rand(2, 4, 4)),
            r"\[N, 1 or 3, H, W\] .* got shape \(2, 4, 4\)",
        ),
        (
            "neighbours",
            (torch.rand(2, 2), torch.rand(2, 2), torch.zeros(3)),
            r"distances must be \[2\], got shape \(3,\)",
        ),
        ("latents", {"p(z)": torch.zeros(3, 2)}, r"must hold 'q\(z\)'.*got \['p\(z\)'\]"),
        (
            "latents",
            {"q(z)": torch.zeros(3, 2), "p(z)": torch.zeros(3, 4)},
            r"\[N, 2\] like 'q\(z\)', N ≥ 1, got \(3, 4\)",
        ),
        ("latents", {"q(z)": torch.zeros(3, 2, 2)}, r"must be \[N, D\]|like 'q\(z\)'"),
        ("latents", {"q(z)": torch.zeros(1, 2)}, "two codes or more"),
        ("curves", {"loss": {"train": [(1, 2, 3)]}}, r"curves\['loss'\]\['train'\] must be \(step, value\) pairs"),
        ("commands", "ncpvae train", "commands must be a list, got a string"),
        (
            "samples",
            [Samples(1.0, torch.rand(2, 2), torch.rand(2, 2)), Samples(2.0, *torch.rand(2, 2, 1, 4, 4))],
            "one kind at all temperatures",
        ),
    ],
)
def test_bad_fields_are_named_with_their_shapes(field, value, message):
    with pytest.raises((TypeError, ValueError), match=f"ReportData.*{message}"):
        ReportData("x", **{field: value})


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (torch.zeros(2, 2, 4, 4), r"base must be images \[N, 1 or 3, H, W\] or points .* got shape \(2, 2, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), r"got shape \(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "base must be floating point, got torch.uint8"),
        (torch.full((2, 1, 4, 4), 255.0), r"base must be in \[0, 1\], got values from 255 to 255"),
        (-torch.ones(2, 1, 4, 4), "values from -1 to -1"),
        (torch.zeros(2, 3, 4, 4), r"of one kind, got shapes \(2, 3, 4, 4\) and \(2, 1, 4, 4\)"),
        (None, "base must be a tensor, got NoneType"),
    ],
)
def test_bad_samples_are_named_with_their_shapes(base, message):
    with pytest.raises((TypeError, ValueError), match=f"Samples at temperature 0.7.*{message}"):
        Samples(0.7, base, torch.zeros(2, 1, 4, 4))


def test_bad_metrics_are_named():
    with pytest.raises(TypeError, match="Metric 'm': base must be a number or None, got str"):
        metric("1", 2.0)
    with pytest.raises(ValueError, match="Metric 'm': ncp_error must be ≥ 0, got -1.0"):
        metric(1.0, 2.0, True, 0.1, -1.0)


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_the_old_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_report(ReportData("x"), tmp_path / "file" / "report.html")
    assert (tmp_path / "file").read_text() == "in the way"


def test_commands_with_names_that_are_no_text_can_be_written(tmp_path):
    path = write_report(ReportData("x", commands=["ncpvae report caf\udce9"]), tmp_path / "r.html")
    assert "ncpvae report caf?" in path.read_text(encoding="utf-8")


def test_settings_are_flattened_with_dots():
    @dataclass
    class Net:
        hidden: tuple
        options: dict

    settings = {"net": Net((1, 2), {}), "data": {"name": "x", "deep": {"er": None}}}
    assert list(flatten(settings)) == [
        ("net.hidden", "(1, 2)"),
        ("net.options", "{}"),
        ("data.name", "x"),
        ("data.deep.er", "None"),
    ]
