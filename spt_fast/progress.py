"""How long work tells how far it is: a callback, and a rich progress bar that is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

# progress(stage, done, total): ``total`` is None where it cannot be known beforehand. A new stage starts a new count.
Progress = Callable[[str, int, "int | None"], None]


class _Rate(ProgressColumn):
    """Images (or whatever is counted) per second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.1f}/s", style="progress.data.speed")


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """A rich progress bar for the stage at work, with rate and time left, for the length of the block.

    Where nobody watches, in a file for example, each stage is a line when it begins.

    Args:
        console: where to draw; ``None`` is standard error, so that standard output stays clean for data.

    Yields:
        A callback for the ``progress`` argument of :func:`spt_fast.build_prototypes` and :func:`spt_fast.train`.

    Example:
        >>> from rich.console import Console
        >>> with progress_bar(Console(quiet=True)) as progress:
        ...     progress("counting sheep", 3, 10)
    """
    console = console or Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _stages_in_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bar:
        current: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in current:
                # A line for each of a hundred epochs would not fit on the screen.
                while current:
                    bar.remove_task(current.popitem()[1])
                current[stage] = bar.add_task(stage, total=total)
            bar.update(current[stage], completed=done, total=total)

        yield update


def _stages_in_lines(console: Console) -> Progress:
    said = ""

    def update(stage: str, done: int, total: int | None) -> None:
        nonlocal said
        if stage != said:
            said = stage
            console.print(Text(stage), soft_wrap=True)

    return update
