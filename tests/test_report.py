"""The report: honest sentences, a page that stands alone, pictures that do not depend on the day."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from browser import measure, needs_chromium
from matplotlib.figure import Figure
from PIL import Image

from spt_fast.drawing import DARK_SERIES, LIGHT_SERIES
from spt_fast.errors import InputError
from spt_fast.report import Run, headline, write_curves, write_report

NO_BREAK = "\N{NO-BREAK SPACE}"
VOID_ELEMENTS = {"meta", "link", "img", "br", "hr"}
HOSTILE = "<script>alert('x')</script> & \"q\" $title"


def make_run(
    name: str,
    accuracy: float,
    *,
    epochs: int = 4,
    learning_rate: float = 1e-3,
    prototype_seconds: float = 0.0,
) -> Run:
    """A run that climbs in a straight line to ``accuracy``, which its last but one epoch beats by a little."""
    rows = []
    for epoch in range(1, epochs + 1):
        rows.append(
            {
                "epoch": epoch,
                "train_loss": 2.0 / epoch,
                "train_accuracy": accuracy * epoch / epochs,
                "val_loss": 2.5 / epoch,
                "val_accuracy": accuracy * epoch / epochs,
                "learning_rate": learning_rate / epoch,
                "seconds": 1.5 * epoch,
            }
        )
    summary = {
        "best_accuracy": min(1.0, accuracy + 0.01),
        "final_accuracy": accuracy,
        "prototype_seconds": prototype_seconds,
        "train_seconds": 1.5 * epochs,
        "trainable_parameters": 48010,
    }
    return Run(name, "spt", rows, summary)


TWO_RUNS = [make_run("SPT-Deep (k-means)", 0.9131, prototype_seconds=4.2), make_run("VPT-Deep", 0.85)]


def write_full_report(path: Path, **changes: object) -> str:
    """A report with every section, some of whose words try to break out of it."""
    generator = np.random.default_rng(5)
    image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    arguments: dict = {
        "title": f"Demo {HOSTILE}",
        "facts": {"Backbone": "vit_tiny", f"Data {HOSTILE}": f"/data/{HOSTILE}/" + "x" * 120},
        "runs": [*TWO_RUNS, make_run(HOSTILE, 0.5)],
        "command": f"spt-fast demo --data '{HOSTILE}' " + "y" * 200,
        "examples": [
            (image, "cat", "cat", 0.98),
            (image.convert("L"), HOSTILE, "supercalifragilistic", 0.41),
        ],
        "prototypes": {"inertia": [10.0, 20.0], "counts": [[5, 3, 2], [9, 1, 0]]},
    }
    write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_full_report(tmp_path_factory.mktemp("report") / "report.html")


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; a tag that closes another one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.9131, 0.85], "A reached 91.3 %, B 85.0 %, with the same recipe"),
        ([0.85, 0.9131], "B reached 91.3 %, A 85.0 %, with the same recipe"),
        ([0.91302, 0.91298], "A and B both reached 91.3 %, with the same recipe"),
        ([0.0, 0.0], "A and B both reached 0.0 %, with the same recipe"),
        ([0.5], "A reached 50.0 %"),
        ([0.7, 0.9, 0.9], "B and C both reached 90.0 %, A 70.0 %, with the same recipe"),
        ([0.9, 0.7, 0.7], "A reached 90.0 %, B and C 70.0 %, with the same recipe"),
        ([0.9, 0.9, 0.9], "A, B and C all reached 90.0 %, with the same recipe"),
        (
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.4],
            "E reached 50.0 %, D and F 40.0 %, C 30.0 %, 2 others 10.0 % to 20.0 %, with the same recipe",
        ),
    ],
)
def test_headline_names_the_winner_whoever_it_is(accuracies: list[float], expected: str) -> None:
    runs = [make_run(name, accuracy) for name, accuracy in zip("ABCDEF", accuracies, strict=False)]
    assert headline(runs).replace(NO_BREAK, " ") == expected


@pytest.mark.parametrize("difference", [{"epochs": 5}, {"learning_rate": 2e-3}])
def test_headline_claims_no_same_recipe_for_different_ones(difference: dict) -> None:
    runs = [make_run("A", 0.9), make_run("B", 0.8, **difference)]
    assert headline(runs).endswith("with different schedules")


def test_page_is_well_formed_and_says_what_was_measured(full_report: str) -> None:
    page = Page(full_report)
    assert "SPT-Deep (k-means) reached 91.3 %, VPT-Deep 85.0 %," in page.text
    assert "The first and the last are 41.3 points apart after 4 epochs." in page.text
    for shown in ("92.3 %", "4.2 s", "6.0 s", "48,010", "98 % sure, correct", "90.0 % of its block's tokens"):
        assert shown in page.text, shown
    assert "Empty clusters: 1." in page.text


def test_the_highest_accuracy_is_marked_as_a_number(tmp_path: Path) -> None:
    """As words, "9.0 %" comes after "100.0 %"."""
    path = tmp_path / "report.html"
    runs = [make_run("A", 0.09), make_run("B", 1.0), make_run("C", 0.5)]
    write_report(path, title="A", facts={}, runs=runs, command="a")
    marked = re.findall(r'class="highest">([^<]*)<', path.read_text(encoding="utf-8"))
    assert marked == [f"100.0{NO_BREAK}%"]


def test_page_is_accessible(full_report: str) -> None:
    page = Page(full_report)
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    svgs = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(svg.get("aria-label") or svg.get("aria-hidden") == "true" for svg in svgs)
    assert sum("aria-label" in svg for svg in svgs) == 3
    headers = [attributes["scope"] for tag, attributes in page.elements if tag == "th"]
    assert headers.count("col") == 6 and headers.count("row") == 3
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert ("html", {"lang": "en"}) in page.elements


def test_page_stands_alone(full_report: str) -> None:
    page = Page(full_report)
    assert not re.search(r"https?:|@import|url\((?!#)", full_report)
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', full_report))
    assert targets and {first or second for first, second in targets} <= identifiers


def test_charts_follow_the_theme(full_report: str) -> None:
    """Whatever colour matplotlib fixed in a chart would stay the same in the dark."""
    charts = re.findall(r'<svg class="chart".*?</svg>', full_report, flags=re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert not re.search(r"(fill|stroke): *(#|black|white|rgb)", chart)
        assert "var(--series-0)" in chart and "currentColor" in chart


def test_user_text_is_escaped_and_shown_literally(full_report: str) -> None:
    assert "<script" not in full_report.lower()
    # Title twice, headline, table, legend, fact name and value, command, truth of an example.
    assert Page(full_report).text.count(HOSTILE) == 9


def test_bytes_that_are_no_text_do_not_stop_the_report(tmp_path: Path) -> None:
    text = write_full_report(
        tmp_path / "report.html", facts={"Data": b"/data/\xff".decode("utf-8", "surrogateescape")}
    )
    assert "/data/?" in text


def test_optional_sections_are_left_out(tmp_path: Path) -> None:
    page = Page(
        write_full_report(tmp_path / "report.html", examples=None, prototypes=None, runs=[make_run("A", 0.5)])
    )
    headings = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert headings == ["results", "training", "how-it-was-made", "run-it-again"]
    assert "apart" not in page.text


def test_same_input_gives_the_same_bytes(full_report: str, tmp_path: Path) -> None:
    assert write_full_report(tmp_path / "again.html") == full_report
    for suffix in ("png", "svg"):
        first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
        write_curves(first, TWO_RUNS)
        write_curves(second, TWO_RUNS)
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("epochs", [1, 4])
def test_curves_are_drawn(tmp_path: Path, epochs: int) -> None:
    write_curves(tmp_path / "curves.png", [make_run("one $ and _two_", 0.9, epochs=epochs)])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1500, 630)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    blue = np.array([int(LIGHT_SERIES[0][at : at + 2], 16) for at in (1, 3, 5)])
    assert (pixels == blue).all(axis=1).sum() > 100, "no line in the colour of the first run"


def test_curves_accept_a_loss_that_became_nan(tmp_path: Path) -> None:
    run = make_run("diverged", 0.1)
    run.metrics[-1]["train_loss"] = float("nan")
    write_curves(tmp_path / "curves.png", [run])
    write_full_report(tmp_path / "report.html", runs=[run])


def test_matplotlib_settings_of_the_caller_stay_as_they_are(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_curves(tmp_path / "curves.svg", TWO_RUNS)
    write_report(tmp_path / "report.html", title="A", facts={}, runs=TWO_RUNS, command="a")
    assert dict(matplotlib.rcParams) == before


def test_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(self: Figure, target: object, **options: object) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", save_half)
    for write in (
        lambda: write_curves(tmp_path / "curves.png", TWO_RUNS),
        lambda: write_full_report(tmp_path / "r.html"),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "runs is empty"),
        ({"prototypes": {"inertia": [1.0]}}, "prototypes has no 'counts'"),
        ({"prototypes": {"inertia": [1.0], "counts": []}}, "1 inertia values and counts of 0 blocks"),
        ({"prototypes": {"inertia": [1.0], "counts": [[0, 0]]}}, r"prototypes\['counts'\]\[0\] is \[0, 0\]"),
        (
            {"examples": [(Image.new("RGB", (4, 4)), "cat", "dog", 98.0)]},
            "'cat' is 98.0, expected a fraction",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_full_report(tmp_path / "report.html", **changes)
    assert list(tmp_path.iterdir()) == []


def test_bad_runs_and_paths_are_named(tmp_path: Path) -> None:
    good = TWO_RUNS[0]
    with pytest.raises(InputError, match="metrics of run 'A' is empty"):
        Run("A", "spt", [], good.summary)
    with pytest.raises(InputError, match="metrics row of run 'A' has no 'train_loss'"):
        Run("A", "spt", [{key: 0 for key in good.metrics[0] if key != "train_loss"}], good.summary)
    with pytest.raises(InputError, match="best_accuracy of run 'A' is 91.3, expected a fraction"):
        Run("A", "spt", good.metrics, good.summary | {"best_accuracy": 91.3})
    with pytest.raises(InputError, match="final_accuracy of run 'A' is nan"):
        Run("A", "spt", good.metrics, good.summary | {"final_accuracy": float("nan")})
    with pytest.raises(InputError, match="ends in .png or .svg"):
        write_curves(tmp_path / "curves.jpg", [good])
    with pytest.raises(InputError, match="runs is empty"):
        write_curves(tmp_path / "curves.png", [])
    assert list(tmp_path.iterdir()) == []


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours as the Web Content Accessibility Guidelines define it, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels
        ]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_colours_can_be_read_in_both_themes(full_report: str) -> None:
    for theme, series in zip(
        re.findall(r":root \{(.*?)\}", full_report, flags=re.DOTALL), (LIGHT_SERIES, DARK_SERIES), strict=True
    ):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        assert [colours[f"series-{index}"] for index in range(len(series))] == list(series)
        for name in ("ink", "muted", "accent", "wrong"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for colour in series:
            assert contrast(colour, colours["paper"]) >= 3, colour


@needs_chromium
def test_a_phone_needs_no_sideways_scrolling(full_report: str, tmp_path: Path) -> None:
    """One browser lays the page out in frames of 390 and 320 pixels, and next to them a page that is too wide."""
    (tmp_path / "report.html").write_text(full_report, encoding="utf-8")
    (tmp_path / "wide.html").write_text("<!doctype html><div style='width: 600px'>wide</div>")
    (phone, small_phone, too_wide), _ = measure(
        tmp_path,
        "window => window.document.documentElement.scrollWidth",
        [("report.html", 390), ("report.html", 320), ("wide.html", 390)],
    )
    assert too_wide > 390, "the measurement sees nothing"
    assert phone <= 390 and small_phone <= 320
