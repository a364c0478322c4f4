"""The page and the README's part about benchmarks: all that is in the records, marked as what it is, nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import BENCHMARKS, CPU, GPU, add_all, begin, compare
from browser import DARK, measure, needs_chromium, open_page
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.comparison import comparisons, panels
from benchmarks.growth import slope, workloads
from benchmarks.naming import title
from benchmarks.page import page
from benchmarks.readme import BEGIN, END, measured_section, with_measured
from benchmarks.record import Record, newest
from benchmarks.summary import duration, middle
from spt_fast.errors import InputError

HOSTILE = "<script>alert('x')</script> & \"q\" $style |"
VOID_ELEMENTS = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements and visible text of a page, and the text of each section; a tag that closes another one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.sections: dict[str, str] = {}
        self.begun: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.begun.append((str(dict(attributes)["aria-labelledby"]), len(self.words)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "section":
            name, start = self.begun.pop()
            self.sections[name] = " ".join("".join(self.words[start:]).split())
        elif tag in ("td", "th", "li", "p", "text"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of every benchmark on a CPU and on a GPU; that of the GPU's kmeans is incomplete."""
    folder = tmp_path_factory.mktemp("results")
    add_all(folder, CPU, GPU)
    path = next(folder.glob("*gpu*-kmeans.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    return folder


@pytest.fixture(scope="module")
def records(results: Path) -> list[dict[str, Any]]:
    return newest(results)


@pytest.fixture(scope="module")
def full_page(records: list[dict[str, Any]]) -> str:
    return page(records)


def test_page_is_well_formed_and_shows_every_row(full_page: str, records: list[dict[str, Any]]) -> None:
    parsed = Page(full_page)
    assert len(records) == 16
    for record in records:
        device = record["machine"]["device"].lower().replace(" ", "-")
        section = parsed.sections[f"{device}-{record['benchmark'].replace('_', '-')}"]
        for shown in (record["command"], title(record["benchmark"]), record["machine"]["commit"]):
            assert shown in section, (record["benchmark"], shown)
        for row in record["rows"]:
            if row["kind"] == "missing":
                assert row["reason"] in section
            else:
                assert f"{row['peer']} {duration(middle(row))} " in section, row


def test_what_was_not_measured_is_marked(full_page: str) -> None:
    section = Page(full_page).sections["some-cpu-prototypes"]
    assert "paper: K-means 27.3 d quoted" in section
    assert "paper: K-means is quoted from Table 7 of the paper (1 of 3 cases)" in section
    assert "scikit-learn, one block after the other is extrapolated: in proportion to the tokens" in section
    assert re.search(r"quoted [\d.]+ d", section) and re.search(r"extrapolated [\d.]+ \w+ to [\d.]+", section)
    section = Page(full_page).sections["some-cpu-attention"]
    assert "concatenate + FlexAttention not measured" in section
    assert "was not measured: FlexAttention has no backward pass on CPUs (3 of 6 cases)" in section


def test_only_the_incomplete_record_says_so(full_page: str, records: list[dict[str, Any]]) -> None:
    incomplete = [name for name, text in Page(full_page).sections.items() if "Incomplete:" in text]
    assert set(incomplete) == {"some-gpu-80gb-kmeans", "some-gpu-80gb"}  # the device's section has it inside
    assert measured_section(records, {}).count("Incomplete:") == 1


def test_gpus_come_first(full_page: str) -> None:
    assert full_page.index('id="some-gpu-80gb"') < full_page.index('id="some-cpu"')


def test_the_figures_of_a_comparison_are_those_of_the_samples(tmp_path: Path) -> None:
    """Times of a round belong together: the median of the ratios, not the ratio of the medians."""
    record = begin(tmp_path, "multi_task")
    record.measured({"tasks": 2}, "mixed tasks, one batch", [1.0, 2.0, 4.0])
    record.measured({"tasks": 2}, "task by task", [3.0, 3.0, 6.0])
    record.quoted({"tasks": 2}, "somebody", 5.0, "a talk")
    record.finish()
    section = Page(page(newest(tmp_path))).sections["some-cpu-multi-task"]
    assert "task by task 3.00 s 3.00 to 4.50 s 1.50x" in section
    assert (
        "somebody 5.00 s quoted" in section and "2.50x" not in section
    )  # measured elsewhere, on something else
    markdown = measured_section(newest(tmp_path), {})
    assert "| mixed tasks, one batch | 2.00 s |" in markdown
    assert "| task by task | 1.50x |" in markdown
    assert "| somebody | 5.00 s (quoted) |" in markdown and "somebody: quoted from a talk" in markdown


def test_nothing_appears_of_what_was_not_measured(tmp_path: Path) -> None:
    BENCHMARKS["multi_task"](tmp_path, CPU)
    text = page(newest(tmp_path))
    parsed = Page(text)
    assert set(parsed.sections) == {"some-cpu", "some-cpu-multi-task"}
    markdown = measured_section(newest(tmp_path), {})
    for name in set(BENCHMARKS) - {"multi_task"}:
        assert title(name) not in text and title(name) not in markdown
    assert "GPU" not in text and "No GPU has been measured yet" in markdown
    assert "No GPU" not in measured_section([*newest(tmp_path), {**newest(tmp_path)[0], "machine": GPU}], {})


def test_page_stands_alone_and_follows_the_theme(full_page: str) -> None:
    parsed = Page(full_page)
    assert not re.search(r"https?:|@import|url\((?!#)", full_page)
    for tag, attributes in parsed.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("data:", "#")), (tag, attributes)
    identifiers = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', full_page))
    assert targets and {first or second for first, second in targets} <= set(identifiers)
    charts = re.findall(r'<svg class="chart".*?</svg>', full_page, flags=re.DOTALL)
    assert len(charts) > 40
    for chart in charts:
        assert not re.search(r"(fill|stroke): *(#|black|white|rgb)", chart)


def test_words_of_a_record_are_escaped(tmp_path: Path) -> None:
    record = begin(tmp_path, "multi_task")
    record.content["command"] = f"python -m benchmarks.multi_task {HOSTILE}"
    compare(record, {"model": HOSTILE, "tasks": 2}, 1.0, {"ours": 1.0, HOSTILE: 2.0})
    record.missing({"model": HOSTILE, "tasks": 2}, "another", HOSTILE)
    record.finish()
    text = page(newest(tmp_path))
    assert "<script" not in text.lower()
    assert Page(text).text.count(HOSTILE) >= 5
    line = next(line for line in measured_section(newest(tmp_path), {}).splitlines() if "2.0" in line)
    assert line.startswith("| " + HOSTILE.replace("|", r"\|") + " | ")


def test_same_records_give_the_same_bytes(
    records: list[dict[str, Any]], full_page: str, results: Path
) -> None:
    assert page(newest(results)) == full_page
    assert measured_section(records, {}) == measured_section(newest(results), {})


def test_sweeps_become_panels(tmp_path: Path) -> None:
    """All of a record is in some panel, and what a panel's comparisons do not share is one number."""
    for name in ("kmeans", "train_step", "attention"):
        BENCHMARKS[name](tmp_path, GPU)
    for record in newest(tmp_path):
        found = [each for each in comparisons(record) if each.reference is not None]
        shown = panels(found)
        assert {id(each) for panel in shown for each in panel.comparisons} == {id(each) for each in found}
        for panel in shown:
            rest = [
                {key: value for key, value in each.case.items() if key != panel.key}
                for each in panel.comparisons
            ]
            assert all(each == rest[0] for each in rest) and len(panel.comparisons) <= 6
            assert len({each.reference["peer"] for each in panel.comparisons if each.reference}) == 1
    kmeans = next(record for record in newest(tmp_path) if record["benchmark"] == "kmeans")
    keys = [panel.key for panel in panels(comparisons(kmeans))]
    assert sorted(map(str, keys)) == ["None", "clusters", "features", "layers", "tokens", "tokens"]


def test_peers_of_another_run_are_compared_among_themselves(tmp_path: Path) -> None:
    record = begin(tmp_path, "train_step")
    case = {"model": "vit_base_patch16_224", "num_prompts": 20}
    record.measured(case, "spt-fast", [1.0])
    record.measured(case, "naive VPT", [2.0])
    record.measured(case | {"num_prompts": 50}, "spt-fast", [1.5])
    record.measured(case, "spt-fast, compiled", [0.5])
    record.measured(case, "naive VPT, compiled", [0.75])
    record.quoted(case | {"num_prompts": 50}, "somebody", 9.0, "a talk")
    peers = [[row["peer"] for row in each.rows] for each in comparisons(record.content)]
    assert peers == [
        ["spt-fast", "naive VPT"],
        ["spt-fast", "somebody"],
        ["spt-fast, compiled", "naive VPT, compiled"],
    ]


def test_slopes_are_those_of_the_logarithms(tmp_path: Path) -> None:
    assert slope([(10, 5.0), (1000, 5000.0)]) == pytest.approx(1.5)
    assert slope([(10, 5.0), (10, 6.0)]) is None
    record = begin(tmp_path, "scaling")
    for tokens in (10**3, 10**4, 10**6):
        record.measured({"processes": 1, "tokens": tokens}, "spt-fast", [tokens * 1e-6], peak_bytes=1000)
    (workload,) = workloads(comparisons(record.content))
    (line,) = workload.lines
    assert slope(line.times) == pytest.approx(1) and slope(line.memory) == pytest.approx(0)
    assert line.throughput == (10**6, pytest.approx(1e6))


def run_report(*arguments: object) -> Any:
    return CliRunner().invoke(report.app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_the_command_writes_the_page(results: Path, tmp_path: Path, full_page: str) -> None:
    output = tmp_path / "new" / "page.html"
    before = report.README.read_bytes()
    done = run_report("--results", results, "--output", output)
    assert done.exit_code == 0, done.output
    assert output.read_text(encoding="utf-8") == full_page
    assert report.README.read_bytes() == before


@pytest.mark.parametrize("asked", [[], ["--readme"]])
def test_the_command_brings_the_readme_up_to_date(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    BENCHMARKS["multi_task"](results, GPU)
    readme, output = tmp_path / "README.md", tmp_path / "page.html"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    arguments = ["--results", results, "--output", output, *asked]
    assert run_report(*arguments).exit_code == 0
    text = readme.read_text()
    if asked:
        assert text == with_measured(text, measured_section(newest(results), {}))
        assert text.startswith(f"before\n{BEGIN}\n\n") and text.endswith(f"\n{END}\nafter\n")
        assert "python -m benchmarks.multi_task --device cuda" in text and "old" not in text
    else:
        assert "old" in text


@pytest.mark.parametrize("broken", ["{", "[]", '{"benchmark": "kmeans"}', "row", "rows", "seconds"])
def test_a_broken_record_leaves_the_old_page(broken: str, tmp_path: Path) -> None:
    BENCHMARKS["multi_task"](tmp_path, CPU)
    BENCHMARKS["low_precision"](tmp_path, CPU)
    path = next(tmp_path.glob("*-low_precision.json"))
    content = Record.load(path)
    if broken == "row":
        del content["rows"][0]["peer"]
    elif broken == "rows":
        content["rows"] = []
    elif broken == "seconds":
        content["rows"][0]["seconds"] = []
    path.write_text(json.dumps(content) if broken in ("row", "rows", "seconds") else broken)
    output = tmp_path / "page.html"
    output.write_text("old")
    done = run_report("--results", tmp_path, "--output", output)
    assert done.exit_code == 1 and "error: " in done.stderr and "Traceback" not in done.output
    assert output.read_text() == "old" and not list(tmp_path.glob(".page*"))


def test_what_cannot_be_shown_is_said_in_a_sentence(tmp_path: Path) -> None:
    results = tmp_path / "results"
    BENCHMARKS["multi_task"](results, CPU)
    done = run_report("--results", tmp_path / "nowhere", "--output", tmp_path / "page.html")
    assert done.exit_code == 1 and "--results must be a folder" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run_report("--results", tmp_path / "empty", "--output", tmp_path / "page.html")
    assert done.exit_code == 1 and "no record" in done.stderr
    (tmp_path / "file").write_text("old")
    done = run_report("--results", results, "--output", tmp_path / "file" / "page.html")
    assert done.exit_code == 1 and "--output must be a file that can be written" in done.stderr
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(InputError, match="the README has no lines"):
        with_measured("# A README without markers\n", "new")


def test_commands_in_the_readme_are_those_of_the_records(records: list[dict[str, Any]]) -> None:
    markdown = measured_section(records, {})
    commands = re.findall(r"```sh\n(.*?)\n```", markdown, flags=re.DOTALL)
    assert sorted(commands) == sorted(record["command"] for record in records)
    assert markdown.index("### Some GPU") < markdown.index("### Some CPU")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) < 220, "a selection has to stay one"
    widths = {line.count(" |") + line.count("---|") for line in rows}
    assert max(widths) <= 8


def made_up_starts() -> dict[str, Any]:
    """Two starts under two rules; k-means is tested at 0.1, the highest rate that was tried."""
    runs = []
    for scale, start, accuracies in (
        ("rms", "kmeans", {0.01: 0.5, 0.1: 0.6}),
        ("rms", "uniform", {0.01: 0.55, 0.1: 0.545}),
        ("none", "kmeans", {0.01: 0.4, 0.1: 0.62}),
    ):
        runs += [
            {
                "start": start,
                "lr_scale": scale,
                "learning_rate": rate,
                "seed": 0,
                "test": False,
                "val_accuracy": each,
            }
            for rate, each in accuracies.items()
        ]
    for start, rate, tested in (("kmeans", 0.1, [0.58, 0.6]), ("uniform", 0.01, [0.5, 0.52])):
        runs += [
            {"start": start, "lr_scale": "rms", "learning_rate": rate, "seed": seed, "test": True, "val_accuracy": 0,
             "test_accuracy": accuracy} for seed, accuracy in enumerate(tested)
        ]  # fmt: skip
    setting = {"data": "digits", "epochs": 4, "num_prompts": 20, "batch_size": 32}
    return {"setting": setting, "machine": CPU, "runs": runs}


def test_starts_are_told_from_their_runs() -> None:
    section = measured_section([], {"digits": made_up_starts()})
    words = " ".join(section.split())
    assert "20 deep prompts, 4 epochs, 2 seeds" in words
    assert "| SPT-Deep, k-means | 59.0 ± 1.4 % | 0.1, the highest tried |" in section
    assert "| VPT-Deep, uniform | 51.0 ± 1.4 % | 0.01 |" in section
    assert "Points from the uniform start on digits: +8.0 (k-means)." in words
    assert "| rms | VPT-Deep, uniform | **55.0** | **54.5** | 2 of 2: 0.01 to 0.1 |" in section
    assert "| none | SPT-Deep, k-means | 40.0 | **62.0** | 1 of 2: 0.1 to 0.1 |" in section
    assert "for k-means: 1 under `rms`, 1 under `none`" in words
    assert "The best accuracy under `none` minus that under `rms`: +2.0 points." in words
    command = "--data digits --starts kmeans --starts uniform --epochs 4 --output benchmarks/results/starts-digits.json"
    assert f"python -m benchmarks.compare_starts {command}" in section


LOOK = """window => {
    const root = window.document.documentElement;
    const boxes = element => [...element.querySelectorAll('text')].map(text => text.getBoundingClientRect());
    const beside = (a, b) => a.right < b.left + 1 || b.right < a.left + 1;
    const apart = (a, b) => beside(a, b) || a.bottom < b.top + 2 || b.bottom < a.top + 2;
    return {
        width: root.clientWidth, scroll: root.scrollWidth,
        dark: window.matchMedia('(prefers-color-scheme: dark)').matches,
        paper: window.getComputedStyle(root).backgroundColor,
        charts: [...window.document.querySelectorAll('svg.chart')].map(chart => {
            const box = chart.getBoundingClientRect(), texts = boxes(chart);
            return {
                name: chart.getAttribute('aria-label'), width: box.width, height: box.height,
                left: Math.min(box.left, ...texts.map(text => text.left)),
                right: Math.max(box.right, ...texts.map(text => text.right)),
                smallest: Math.min(...texts.map(text => text.height)),
                overlaps: texts.filter((a, i) => texts.slice(i + 1).some(b => !apart(a, b))).length,
            };
        }),
    };
}"""


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_every_chart(theme: str, full_page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(full_page, encoding="utf-8")
    frames = [("page.html", width) for width in (1280, 390, 320)]
    found, console = measure(tmp_path, LOOK, frames, *([DARK] if theme == "dark" else []))
    assert console == []
    for look, (_, width) in zip(found, frames, strict=True):
        assert look["dark"] == (theme == "dark")
        assert look["paper"] == ("rgb(18, 22, 27)" if theme == "dark" else "rgb(255, 255, 255)")
        assert look["scroll"] <= look["width"] <= width
        assert len(look["charts"]) == full_page.count('<svg class="chart"')
        for chart in look["charts"]:
            assert chart["width"] > 200 and chart["height"] > 50, chart
            assert chart["left"] >= -1 and chart["right"] <= look["width"] + 1, chart
            assert chart["overlaps"] == 0, chart


@needs_chromium
def test_what_a_page_logs_is_seen(tmp_path: Path) -> None:
    """Otherwise the test above would pass on a page full of errors."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<!doctype html><script>console.error('logged'); throw new Error('thrown')</script>")
    _, console = measure(tmp_path, "window => 1", [("wrong.html", 390)])
    assert any("logged" in line for line in console) and any("thrown" in line for line in console)
    assert len(open_page(wrong).console) == 2
