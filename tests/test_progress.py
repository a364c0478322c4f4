"""What long work says of itself, on a terminal and elsewhere."""

import io

from rich.console import Console

from spt_fast import progress_bar


def shown(console: Console) -> str:
    with progress_bar(console) as progress:
        for epoch in ("epoch 1/2", "epoch 2/2"):
            for done in (1, 2, 3):
                progress(epoch, done, 3)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_in_a_file_each_stage_is_a_line() -> None:
    assert shown(Console(file=io.StringIO())) == "epoch 1/2\nepoch 2/2\n"


def test_on_a_terminal_it_is_a_bar_that_counts() -> None:
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=100))
    assert "epoch 2/2" in text and "3/3" in text
