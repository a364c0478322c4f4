"""The pictures of an analysis: curves over blocks, along training, heatmaps, and the patches a prompt stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

from spt_fast.analysis.cluster_sizes import effective_clusters
from spt_fast.drawing import INK, NO_METADATA, PAPER, STRONG, STYLE, colour, dashes
from spt_fast.files import atomic_path

HEATMAPS_PER_ROW = 3
CELL = 64  # pixels of a patch with its surroundings
GAP = 6
# How much of a patch's surroundings is shown on each side, in patches.
CONTEXT = 1


def write_nmi(stem: Path, nmi: Mapping[str, Tensor], along: Mapping[int, Tensor] | None = None) -> list[Path]:
    """Draw the normalised mutual information of each block, and how it went in training, into ``stem.png`` and
    ``stem.svg``.

    Args:
        stem: path without suffix.
        nmi: ``[L]`` by name of the prompts.
        along: ``[L]`` by epoch, if there is a run to be drawn beside it.

    Returns:
        The files.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if along else 1, squeeze=False)[0]
        _draw_blocks(panels[0], nmi)
        panels[0].set_title("Normalised mutual information")
        if along:
            epochs = sorted(along)
            curves = torch.stack([along[epoch] for epoch in epochs])
            panels[1].plot(epochs, curves, color=INK, linewidth=0.7, alpha=0.6)
            panels[1].plot(epochs, curves.mean(dim=1), color=STRONG, marker="o", markersize=4)
            panels[1].set_title("Mean of all blocks (thin: each block)")
            panels[1].set_xlabel("epoch")
            panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, panels[0])

    return _write(stem, (10 if along else 5.5, 4.2), draw)


def write_mmd(stem: Path, mmd: Mapping[str, Tensor]) -> list[Path]:
    """Draw the squared maximum mean discrepancy ``[L]`` of each block, by name of the prompts."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _draw_blocks(axes, mmd)
        axes.set_title("Squared maximum mean discrepancy")
        _legend(figure, axes)

    return _write(stem, (5.5, 4.2), draw)


def write_cka(stem: Path, cka: Mapping[str, Tensor]) -> list[Path]:
    """Draw matrices of CKA ``[L, L]`` by name of the prompts: blocks of prompts by blocks of tokens."""
    columns = min(HEATMAPS_PER_ROW, len(cka))
    rows = math.ceil(len(cka) / columns)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, matrix) in zip(panels, cka.items(), strict=False):
            shown = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
            axes.grid(False)
            axes.set_title(name)
            axes.set_xlabel("block of the tokens")
            axes.set_ylabel("block of the prompts")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[len(cka) :]:
            axes.set_visible(False)
        figure.colorbar(shown, ax=list(panels), label="linear CKA over features").outline.set_visible(False)

    return _write(stem, (1.2 + 3.4 * columns, 3.6 * rows), draw)


def write_cluster_sizes(stem: Path, counts: Mapping[str, Tensor]) -> list[Path]:
    """Draw from the tokens ``[L, P]`` of each prompt, by name of the prompts, how many of them matter in each block,
    and how often which size occurs."""

    def draw(figure: Figure) -> None:
        effective, sizes = figure.subplots(1, 2)
        _draw_blocks(effective, {name: effective_clusters(each) for name, each in counts.items()})
        effective.set_title("Effective number of clusters")
        relative = {
            name: each.double() / each.double().mean(dim=1, keepdim=True) for name, each in counts.items()
        }
        largest = max(float(each.max()) for each in relative.values())
        edges = torch.linspace(0, max(1.0, largest), 21).tolist()
        for index, each in enumerate(relative.values()):
            style = (0, dashes(index)) if dashes(index) else "solid"
            sizes.hist(
                each.flatten().tolist(),
                edges,
                histtype="step",
                color=colour(index),
                linestyle=style,
                linewidth=2,
            )
        sizes.set_title("Clusters of all blocks by their size")
        sizes.set_xlabel("tokens, as multiples of an equal share")
        sizes.set_ylabel("clusters")
        sizes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, effective)

    return _write(stem, (10, 4.2), draw)


def write_patches(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Draw pictures of one size in a grid with a numbered row for each prompt.

    Args:
        path: the ``.png`` file.
        rows: the pictures of each prompt, the nearest first.
    """
    margin = 40
    width = margin + max(map(len, rows)) * (CELL + GAP) + GAP
    grid = Image.new("RGB", (width, len(rows) * (CELL + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(grid)
    for number, pictures in enumerate(rows):
        top = GAP + number * (CELL + GAP)
        pen.text((margin - GAP, top + CELL // 2), str(number), fill=INK, anchor="rm", font_size=14)
        for column, picture in enumerate(pictures):
            grid.paste(picture, (margin + GAP + column * (CELL + GAP), top))
    with atomic_path(path) as temporary:
        grid.save(temporary, format="PNG")


def patch_with_context(pixels: Tensor, row: int, column: int, patch_size: tuple[int, int]) -> Image.Image:
    """A patch of an image, framed, in the middle of its neighbours.

    Args:
        pixels: ``[3, H, W]`` in 0 .. 1.
        row: of the patch, from 0.
        column: of the patch, from 0.
        patch_size: its height and width in pixels.

    Returns:
        An RGB picture of ``CELL`` by ``CELL`` pixels, white beyond the edge of the image.

    Example:
        >>> patch_with_context(torch.rand(3, 32, 32), 0, 3, (8, 8)).size
        (64, 64)
    """
    height, width = patch_size
    above, beside = CONTEXT * height, CONTEXT * width
    padded = torch.nn.functional.pad(pixels, (beside, beside, above, above), value=1.0)
    top, left = row * height, column * width
    crop = padded[:, top : top + height + 2 * above, left : left + width + 2 * beside]
    array = (crop.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array).resize((CELL, CELL), Image.Resampling.NEAREST)
    edge = CELL * CONTEXT / (2 * CONTEXT + 1)
    ImageDraw.Draw(picture).rectangle(
        (edge - 1, edge - 1, CELL - edge, CELL - edge), outline=colour(1), width=2
    )
    return picture


def _draw_blocks(axes: Axes, values: Mapping[str, Tensor]) -> None:
    """A line over the blocks for each set of prompts."""
    for index, (name, each) in enumerate(values.items()):
        axes.plot(
            range(len(each)),
            each,
            label=name,
            color=colour(index),
            dashes=dashes(index),
            marker="o",
            markersize=4,
        )
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axes: Axes) -> None:
    lines = axes.get_lines()
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, loc="outside upper left", ncols=min(3, len(lines)), handlelength=2.6)


def _write(stem: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> list[Path]:
    paths = []
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for suffix in (".png", ".svg"):
            path = stem.with_name(stem.name + suffix)
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=suffix[1:], metadata=NO_METADATA[suffix])
            figure.set_layout_engine("none")  # laid out once, for both
            paths.append(path)
    return paths
