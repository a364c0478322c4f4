"""Pictures of finished training runs: a figure of the curves and a page that tells the whole story.

``write_curves`` draws accuracy and loss as a PNG or SVG; ``write_report`` writes one HTML file that needs
nothing else: no network, no script, no second file. Both take the same :class:`Run` objects and give the same
bytes for the same input. The look of the page (layout and CSS) lives in ``assets/report.html``, and
what it shares with other pages in :mod:`spt_fast.drawing`; this module fills it in.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from spt_fast.drawing import (
    LIGHT_SERIES,
    NO_METADATA,
    PAPER,
    STYLE,
    chart,
    colour,
    dashes,
    definitions,
    escape,
    page_style,
    swatch,
)
from spt_fast.errors import InputError
from spt_fast.files import atomic_path, write_text

METRIC_KEYS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "seconds",
)
SUMMARY_KEYS = (
    "best_accuracy",
    "final_accuracy",
    "prototype_seconds",
    "train_seconds",
    "trainable_parameters",
)

HEADLINE_OTHERS = 3  # accuracies named after the first; more make a list, and the table is the better list
THUMBNAIL = 192  # pixels; twice the width at which the gallery shows an image


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Args:
        name: what readers see, e.g. ``"SPT-Deep (k-means)"``.
        method: the method's own name, e.g. ``"spt"``, for programs; the pictures show ``name``.
        metrics: one row per epoch with ``epoch`` (from 1), ``train_loss``, ``train_accuracy``, ``val_loss``,
            ``val_accuracy``, ``learning_rate`` and ``seconds`` (of training since the start). Accuracies are
            fractions from 0 to 1; a loss may be NaN (it is then a gap in the curve).
        summary: ``best_accuracy``, ``final_accuracy`` (fractions), ``prototype_seconds``, ``train_seconds``
            and ``trainable_parameters``.

    Raises:
        InputError: rows or keys are missing, or an accuracy is no fraction.

    Example:
        >>> row = dict(epoch=1, train_loss=2.1, train_accuracy=0.3, val_loss=1.9, val_accuracy=0.4,
        ...            learning_rate=1e-3, seconds=2.5)
        >>> summary = dict(best_accuracy=0.4, final_accuracy=0.4, prototype_seconds=0.5, train_seconds=2.5,
        ...                trainable_parameters=46080)
        >>> headline([Run("SPT-Deep", "spt", [row], summary)])
        'SPT-Deep reached 40.0\\xa0%'
    """

    name: str
    method: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.metrics:
            raise InputError(f"metrics of run {self.name!r} is empty, expected one row per epoch")
        for row in self.metrics:
            _require(row, METRIC_KEYS, f"a metrics row of run {self.name!r}")
            _require_fraction(row["val_accuracy"], f"val_accuracy of run {self.name!r}, epoch {row['epoch']}")
        _require(self.summary, SUMMARY_KEYS, f"summary of run {self.name!r}")
        for key in ("best_accuracy", "final_accuracy"):
            _require_fraction(self.summary[key], f"{key} of run {self.name!r}")

    def column(self, key: str) -> list[float]:
        """The values of one metric, one per epoch."""
        return [float(row[key]) for row in self.metrics]


def write_curves(path: str | os.PathLike[str], runs: Sequence[Run]) -> None:
    """Draw accuracy and training loss against the epoch, side by side.

    Args:
        path: the file to write; ``.png`` (1500 x 630 pixels) or ``.svg``.
        runs: one line each, in this order.

    Raises:
        InputError: no runs, or another suffix.

    Example:
        >>> import tempfile
        >>> row = dict(epoch=1, train_loss=2.1, train_accuracy=0.3, val_loss=1.9, val_accuracy=0.4,
        ...            learning_rate=1e-3, seconds=2.5)
        >>> summary = dict(best_accuracy=0.4, final_accuracy=0.4, prototype_seconds=0.5, train_seconds=2.5,
        ...                trainable_parameters=46080)
        >>> path = Path(tempfile.mkdtemp()) / "curves.png"
        >>> write_curves(path, [Run("SPT-Deep", "spt", [row], summary)])
        >>> Image.open(path).size
        (1500, 630)
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in NO_METADATA:
        raise InputError(f"path is {str(path)!r}, expected a name that ends in .png or .svg")
    _require_runs(runs)
    with matplotlib.style.context(STYLE, after_reset=True), atomic_path(path) as temporary:
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        accuracy, loss = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        _draw_accuracy(accuracy, runs)
        accuracy.set_title("Accuracy on held-out images")
        _draw_loss(loss, runs)
        loss.set_title("Training loss")
        figure.legend(
            accuracy.get_lines(),
            [run.name for run in runs],
            loc="outside upper left",
            ncols=min(len(runs), 3),
            handlelength=2.6,
        )
        figure.savefig(temporary, format=suffix[1:], metadata=NO_METADATA[suffix])


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    facts: Mapping[str, str],
    runs: Sequence[Run],
    command: str,
    prototypes: Mapping[str, Sequence[Any]] | None = None,
    examples: Sequence[tuple[Image.Image, str, str, float]] | None = None,
) -> None:
    """Write one self-contained HTML page: the result in a sentence, a table, curves, and how to get it again.

    Args:
        path: the ``.html`` file to write.
        title: a few words above the headline, e.g. ``"CIFAR-10, 1,000 images"``.
        facts: what a reader must know to judge the numbers (backbone, data, epochs, device, versions, ...),
            shown in this order.
        runs: the runs to compare, in this order.
        command: the shell command that makes these runs again.
        prototypes: ``{"inertia": [one float per block], "counts": [[tokens in each cluster] per block]}``.
        examples: ``(image, true label, predicted label, probability of the prediction)`` tuples, shown in
            this order.

    Raises:
        InputError: no runs, ``prototypes`` that do not fit together, or a probability that is no fraction.

    Example:
        >>> import tempfile
        >>> row = dict(epoch=1, train_loss=2.1, train_accuracy=0.3, val_loss=1.9, val_accuracy=0.4,
        ...            learning_rate=1e-3, seconds=2.5)
        >>> summary = dict(best_accuracy=0.4, final_accuracy=0.4, prototype_seconds=0.5, train_seconds=2.5,
        ...                trainable_parameters=46080)
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(path, title="Digits", facts={"Images": "1,797"}, command="spt-fast demo",
        ...              runs=[Run("SPT-Deep", "spt", [row], summary)])
        >>> "SPT-Deep reached" in path.read_text(encoding="utf-8")
        True
    """
    _require_runs(runs)
    sections = [_results_section(runs), _curves_section(runs)]
    if prototypes is not None:
        sections.append(_prototypes_section(prototypes))
    if examples:
        sections.append(_examples_section(examples))
    sections.append(_facts_section(facts))
    sections.append(_section("Run it again", f"<pre><code>{escape(command)}</code></pre>"))

    *clauses, last = _headline_clauses(runs)
    template = (importlib.resources.files("spt_fast") / "assets" / "report.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(title),
        headline=" ".join([*(_together(f"{clause},") for clause in clauses), _together(f"{last}.")]),
        lead=_lead(runs),
        style=page_style(),
        sections="\n".join(sections),
    )
    write_text(path, page)


def headline(runs: Sequence[Run]) -> str:
    """The result in one sentence (without its full stop): final accuracies, best first, ties named as ties.

    The accuracy is that after the last epoch: the best epoch is picked on the very images it is measured on,
    which flatters the method that fluctuates most. "With the same recipe" is said only where the epochs and
    the learning rates are the same.
    """
    return ", ".join(_headline_clauses(runs))


def _headline_clauses(runs: Sequence[Run]) -> list[str]:
    _require_runs(runs)
    tied: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: -run.summary["final_accuracy"]):
        tied.setdefault(_percent(run.summary["final_accuracy"]), []).append(run.name)
    (first, winners), *others = tied.items()
    together = {1: "", 2: "both "}.get(len(winners), "all ")
    clauses = [f"{_join(winners)} {together}reached {first}"]
    if len(others) > HEADLINE_OTHERS:
        rest = others[HEADLINE_OTHERS - 1 :]
        others = others[: HEADLINE_OTHERS - 1]
        count = sum(len(names) for _, names in rest)
        remainder = [f"{count} others {rest[-1][0]} to {rest[0][0]}"]
    else:
        remainder = []
    clauses += [f"{_join(names)} {accuracy}" for accuracy, names in others] + remainder
    if len(runs) > 1:
        clauses.append("with the same recipe" if _same_recipe(runs) else "with different schedules")
    return clauses


# The sections of the page


def _results_section(runs: Sequence[Run]) -> str:
    columns = ("Final accuracy", "Best accuracy", "Prototypes", "Training", "Trainable parameters")
    highest = _percent(max(run.summary["final_accuracy"] for run in runs))
    rows = []
    for index, run in enumerate(runs):
        summary = run.summary
        values = (
            _percent(summary["final_accuracy"]),
            _percent(summary["best_accuracy"]),
            _duration(summary["prototype_seconds"]),
            _duration(summary["train_seconds"]),
            f"{summary['trainable_parameters']:,}",
        )
        cells = "".join(
            f'<td role="cell" data-column="{column}"{_highest(column, value, highest, runs)}>{value}</td>'
            for column, value in zip(columns, values, strict=True)
        )
        name = f'<th role="rowheader" scope="row">{swatch(index)}{escape(run.name)}</th>'
        rows.append(f'<tr role="row">{name}{cells}</tr>')
    head = "".join(f'<th role="columnheader" scope="col">{column}</th>' for column in ("Method", *columns))
    newline = "\n"
    # The roles repeat what the elements mean, because a phone's layout of the table would otherwise hide it.
    return _section(
        "Results",
        f"""<table role="table">
<caption>Accuracy and cost of each run</caption>
<thead role="rowgroup"><tr role="row">{head}</tr></thead>
<tbody role="rowgroup">
{newline.join(rows)}
</tbody>
</table>
<p class="note">Final accuracy is that after the last epoch. Best accuracy is that of the best epoch, chosen \
on the images it is measured on. Each row is one run: a small difference can be chance.</p>""",
    )


def _highest(column: str, value: str, highest: str, runs: Sequence[Run]) -> str:
    return ' class="highest"' if len(runs) > 1 and column == "Final accuracy" and value == highest else ""


def _curves_section(runs: Sequence[Run]) -> str:
    legend = "".join(f"<li>{swatch(index)}{escape(run.name)}</li>" for index, run in enumerate(runs))
    accuracy_words = ["Accuracy on held-out images against the epoch."]
    loss_words = ["Training loss against the epoch."]
    for run in runs:
        accuracy, loss = run.column("val_accuracy"), run.column("train_loss")
        accuracy_words.append(f"{run.name}: from {_percent(accuracy[0])} to {_percent(accuracy[-1])}.")
        loss_words.append(f"{run.name}: from {loss[0]:.3f} to {loss[-1]:.3f}.")

    return _section(
        "Training",
        f"""<ul role="list" class="legend" aria-label="Lines in the charts">{legend}</ul>
<div class="charts">
<figure><figcaption>Accuracy on held-out images</figcaption>
{chart("accuracy", accuracy_words, 3.1, lambda axes: _draw_accuracy(axes, runs))}</figure>
<figure><figcaption>Training loss</figcaption>
{chart("loss", loss_words, 3.1, lambda axes: _draw_loss(axes, runs))}</figure>
</div>""",
    )


def _prototypes_section(prototypes: Mapping[str, Sequence[Any]]) -> str:
    _require(prototypes, ("inertia", "counts"), "prototypes")
    inertia, counts = prototypes["inertia"], prototypes["counts"]
    if len(inertia) != len(counts) or not len(counts):
        raise InputError(
            f"prototypes has {len(inertia)} inertia values and counts of {len(counts)} blocks, "
            "expected one of each for every block"
        )
    shares = []
    for block, sizes in enumerate(counts):
        tokens = sum(sizes)
        if tokens <= 0 or min(sizes) < 0:
            raise InputError(
                f"prototypes['counts'][{block}] is {list(sizes)}, expected sizes that add up to some tokens"
            )
        shares.append(sorted((size / tokens for size in sizes), reverse=True))

    clusters = max(map(len, shares))
    largest = max(block_shares[0] for block_shares in shares)
    empty = sum(share == 0 for block_shares in shares for share in block_shares)
    per_token = [float(value) / sum(sizes) for value, sizes in zip(inertia, counts, strict=True)]
    words = [
        f"Shares of the patch tokens in each of {clusters} clusters, block by block; blocks: {len(shares)}.",
        f"The largest share is {_percent(largest)}.",
    ]
    height = 0.55 + 0.21 * len(shares)
    return _section(
        "Prototypes",
        f"""<div class="charts">
<figure><figcaption>Cluster sizes, block by block</figcaption>
{chart("prototypes", words, height, lambda axes: _draw_shares(axes, shares, per_token))}</figure>
<div class="beside">
<p>Each bar is one block's patch tokens, each piece one cluster, the largest first. The centre of a cluster \
is where one prompt starts.</p>
<p>The largest of all clusters holds {_percent(largest)} of its block's tokens; an even split would give \
{_percent(1 / clusters)}. {"No cluster is empty." if not empty else f"Empty clusters: {empty}."}</p>
<p>On the right: the mean squared distance of a token to its centre.</p>
</div>
</div>""",
    )


def _examples_section(examples: Sequence[tuple[Image.Image, str, str, float]]) -> str:
    items = []
    for image, truth, predicted, probability in examples:
        _require_fraction(probability, f"the probability of an example of {truth!r}")
        right = truth == predicted
        verdict = "correct" if right else f"in truth {escape(truth)}"
        items.append(
            f'<li><img src="{_data_uri(image)}" alt="An image of class {escape(truth)}" loading="lazy">'
            f'<p class="guess{"" if right else " wrong"}">'
            f'<span aria-hidden="true">{"✓" if right else "✗"}</span>&nbsp;{escape(predicted)}</p>'
            f"<p>{_percent(probability, digits=0)} sure, {verdict}</p></li>"
        )
    newline = "\n"
    return _section("Examples", f'<ul role="list" class="gallery">\n{newline.join(items)}\n</ul>')


def _facts_section(facts: Mapping[str, str]) -> str:
    return _section("How it was made", definitions(facts))


def _section(heading: str, body: str) -> str:
    anchor = heading.lower().replace(" ", "-")
    return f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{heading}</h2>\n{body}\n</section>'


def _lead(runs: Sequence[Run]) -> str:
    """The sentences under the headline: how far apart the runs are, and what the start cost."""
    sentences = []
    if len(runs) > 1:
        # From the rounded numbers, so that readers who subtract the two they see find the same.
        shown = [round(100 * run.summary["final_accuracy"], 1) for run in runs]
        gap = max(shown) - min(shown)
        epochs = sorted({len(run.metrics) for run in runs})
        after = f"after {_join([str(count) for count in epochs])} {'epoch' if epochs == [1] else 'epochs'}"
        who = "They" if len(runs) == 2 else "The first and the last"
        sentences.append(f"{who} are {gap:.1f} points apart {after}.")
    for run in runs:
        prototype_seconds = run.summary["prototype_seconds"]
        if prototype_seconds > 0:
            sentences.append(
                f"The prototypes of {_together(run.name)} took {_duration(prototype_seconds)}, "
                f"its training {_duration(run.summary['train_seconds'])}."
            )
    return " ".join(sentences)


# Drawing


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    _draw_lines(axes, runs, "val_accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


def _draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    _draw_lines(axes, runs, "train_loss")


def _draw_lines(axes: Axes, runs: Sequence[Run], key: str) -> None:
    """One line per run with a dot at its end, which also keeps a run of a single epoch visible."""
    for index, run in enumerate(runs):
        epochs, values = run.column("epoch"), run.column(key)
        (line,) = axes.plot(epochs, values, color=colour(index), dashes=dashes(index), dash_capstyle="butt")
        axes.scatter(
            epochs[-1:], values[-1:], s=22, color=colour(index), zorder=line.get_zorder() + 1, clip_on=False
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("epoch")


def _draw_shares(axes: Axes, shares: Sequence[Sequence[float]], per_token: Sequence[float]) -> None:
    """One bar per block from 0 to 100 %, cut into its clusters, the largest in full colour."""
    for block, (block_shares, distance) in enumerate(zip(shares, per_token, strict=True)):
        starts = [0.0, *itertools.accumulate(block_shares)][:-1]
        axes.broken_barh(
            list(zip(starts, block_shares, strict=True)),
            (block - 0.36, 0.72),
            facecolors=[LIGHT_SERIES[0], *[(LIGHT_SERIES[0], 0.4)] * (len(block_shares) - 1)],
            edgecolors=PAPER,
            linewidth=0.8,
        )
        axes.text(
            1.02, block, f"{distance:.3g}", va="center", ha="left", transform=axes.get_yaxis_transform()
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_yticks(range(len(shares)), [f"block {block + 1}" for block in range(len(shares))])
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# Words and numbers


def _together(words: str) -> str:
    """Text as HTML that moves to the next line as a whole, rather than break at a hyphen or a number."""
    return f'<span class="together">{escape(words)}</span>'


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}\N{NO-BREAK SPACE}%"


def _duration(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\N{NO-BREAK SPACE}min {rest:02d}\N{NO-BREAK SPACE}s"
    return f"{minutes // 60}\N{NO-BREAK SPACE}h {minutes % 60:02d}\N{NO-BREAK SPACE}min"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _same_recipe(runs: Sequence[Run]) -> bool:
    first = runs[0].column("learning_rate")
    return all(
        len(run.metrics) == len(first)
        and all(
            math.isclose(a, b, rel_tol=1e-6) for a, b in zip(run.column("learning_rate"), first, strict=True)
        )
        for run in runs[1:]
    )


# Checks at the door


def _require_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise InputError("runs is empty, expected at least one Run")


def _require(mapping: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise InputError(f"{what} has no {' and no '.join(map(repr, missing))}, only {sorted(mapping)}")


def _require_fraction(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{what} is {value}, expected a fraction from 0 to 1")
