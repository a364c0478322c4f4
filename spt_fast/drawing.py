"""What pages with charts share: colours, the look of a chart, the CSS around it, text for HTML.

A chart is drawn by matplotlib and put into the page as SVG whose colours are names: the page's CSS defines them for
light and for dark paper (``assets/page.css``), so that a chart follows the reader's theme without a script.
"""

from __future__ import annotations

import html
import importlib.resources
import io
import re
from collections.abc import Callable, Mapping, Sequence
from string import Template

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, darkened for white and lightened for
# dark paper until each has a contrast of at least 3:1. Dashes tell the lines apart in a grey print.
LIGHT_SERIES = ("#0072b2", "#d55e00", "#00845f", "#b8528a", "#8a6d00", "#2f2f7a")
DARK_SERIES = ("#56b4e9", "#ff9145", "#2fc99a", "#ec9cc8", "#e9d94a", "#a9a9f5")
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.6), (1.2, 1.4), (6, 1.6, 1.2, 1.6), (2.4, 1.2))
INK, RULE, PAPER = "#57606a", "#dfe3e8", "#ffffff"
STRONG = "#1b1f24"  # what should be read first

# The page follows the reader's theme: matplotlib's fixed colours become names that the page's CSS defines.
THEMED = {INK: "currentColor", STRONG: "var(--ink)", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(LIGHT_SERIES)
}

STYLE = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.xmargin": 0.02,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.facecolor": PAPER,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so a picture is the same everywhere
    "font.size": 10.5,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
    "svg.hashsalt": "spt-fast",
    "text.color": INK,
    "text.parse_math": False,  # a "$" in the name of a run is a dollar
    "xtick.color": INK,
    "xtick.major.size": 0,
    "ytick.color": INK,
    "ytick.major.size": 0,
}
# Dates and versions would make equal pictures differ.
NO_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None, "Format": None, "Type": None},
}

CHART_WIDTH = 5.0  # inches; 360 units of the SVG, so that text stays readable on a phone


def chart(
    name: str,
    words: Sequence[str],
    height: float,
    draw: Callable[[Axes], None],
    width: float = CHART_WIDTH,
) -> str:
    """A chart as an SVG element for HTML, in the fonts and the colours of the page.

    Args:
        name: keeps its ids apart from those of other charts of the page.
        words: say what is to be seen, for those who do not see it.
        height: in inches.
        draw: draws it.
        width: in inches; the narrower, the larger text is on the page, where all charts are equally wide.

    Example:
        >>> svg = chart("line", ["From 1 to 3."], 2.0, lambda axes: axes.plot([1, 3], color=colour(0)))
        >>> svg.startswith('<svg class="chart"'), "var(--series-0)" in svg
        (True, True)
    """
    with matplotlib.style.context({**STYLE, "svg.fonttype": "none"}, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=NO_METADATA[".svg"])
    _, view_box, body = re.split(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', buffer.getvalue(), maxsplit=1)
    # A style inside an inline SVG would restyle the whole page.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: THEMED.get(found[0], found[0]), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    label = escape(" ".join(words))
    return f'<svg class="chart" viewBox="{view_box}" role="img" aria-label="{label}">\n{body}'


def swatch(index: int) -> str:
    """The line of a series for a legend."""
    pattern = " ".join(f"{2 * length:g}" for length in dashes(index)) or "none"
    style = f"stroke: var(--series-{index % len(LIGHT_SERIES)}); stroke-width: 3; stroke-dasharray: {pattern}"
    return (
        f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" style="{style}"/></svg>'
    )


def colour(index: int) -> str:
    """The colour of a series for matplotlib."""
    return LIGHT_SERIES[index % len(LIGHT_SERIES)]


def dashes(index: int) -> tuple[float, ...]:
    """The dashes of a series for matplotlib."""
    return DASHES[index % len(DASHES)]


def page_style() -> str:
    """The CSS that pages begin with: both themes, type, tables, charts."""
    template = (importlib.resources.files("spt_fast") / "assets" / "page.css").read_text(encoding="utf-8")
    return Template(template).substitute(
        light_series=_css_colours(LIGHT_SERIES), dark_series=_css_colours(DARK_SERIES)
    )


def escape(text: object) -> str:
    """Text for HTML; a path whose bytes are no UTF-8 gets question marks instead of stopping the page."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def definitions(facts: Mapping[str, str]) -> str:
    """Names and values as HTML, in columns where there is room."""
    pairs = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">\n{pairs}\n</dl>'


def _css_colours(colours: Sequence[str]) -> str:
    return " ".join(f"--series-{index}: {colour};" for index, colour in enumerate(colours))
