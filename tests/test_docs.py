"""The documentation is true: programs and commands of each page run in order, tables are those of the code.

A block's language says what becomes of it: ``python`` runs; of ``sh`` (or ``bash``) this project's commands run;
``console`` shows commands that need what is not here (data sets, several devices), which are only read; ``text`` is
output.
"""

from __future__ import annotations

import importlib
import json
import pydoc
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from command_line import run as run_spt_fast
from markdown_blocks import ROOT, Block, blocks_of
from PIL import Image

from benchmarks.readme import measured_section, with_measured
from benchmarks.record import newest
from benchmarks.starts import load_starts
from spt_fast.data import MaskFolder, digits
from spt_fast.methods import METHODS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "console", "sh")
LANGUAGES = {"bibtex", "json", "python", "text", "yaml", *SHELL}
# What each class of photos/ looks like: a tint over noise, so that there is something to learn.
TINTS = {"bird": (0, 90, 0), "cat": (90, 0, 0), "dog": (0, 0, 90)}
COUNTS = {"train": 5, "val": 2, "test": 2}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(program: str) -> list[tuple[Block, list[str]]]:
    """The calls of ``program`` on all pages."""
    shell = [block for page in PAGES for block in blocks_of(page) if block.language in SHELL]
    return [(block, words) for block in shell for words in block.commands if words[0] == program]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's programs run: in a folder with ``photos/``. Of digits and masks there are few."""
    generator = torch.Generator().manual_seed(0)
    for split, count in COUNTS.items():
        for name, tint in TINTS.items():
            images = tmp_path / "photos" / split / name
            images.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 160, (40, 50, 3), generator=generator) + torch.tensor(tint)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(images / f"{index}.jpg")
    read = digits.read

    def few(split: str) -> tuple[list[Any], list[str]]:
        samples, classes = read(split)
        return samples[::16], classes

    monkeypatch.setattr(digits, "read", few)
    all_masks = MaskFolder.__len__
    monkeypatch.setattr(MaskFolder, "__len__", lambda self: min(16, all_masks(self)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block}: expected one of {', '.join(sorted(LANGUAGES))}"
        readers: dict[str, Callable[[str], Any]] = {"json": json.loads, "yaml": yaml.safe_load}
        readers.get(block.language, str)(block.content)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_programs_and_commands_run_in_order(page: Path, folder: Path) -> None:
    """What a page makes of one block is there for its next ones, as for a reader who follows it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            exec(compile(block.code, str(block.source), "exec"), names)
        elif block.language in ("bash", "sh"):
            for words in block.commands:
                run_or_check(block, words)


def run_or_check(block: Block, words: list[str]) -> None:
    """Run a command of this project; of the others see that they would be understood."""
    if words[0] == "spt-fast":
        done = run_spt_fast(*words[1:])
        assert done.code == 0 and "Traceback" not in done.err, f"{block}: {shlex.join(words)}\n{done.err}"
    else:
        check(block, words)


def check(block: Block, words: list[str]) -> None:
    program, *arguments = words
    if program == "torchrun":
        launcher = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(arguments)
        assert launcher.module, f"{block}: torchrun -m MODULE"
        check(block, ["python", "-m", launcher.training_script, *launcher.training_script_args])
    elif program == "spt-fast":
        check(block, ["python", "-m", "spt_fast.cli", *arguments])
    elif program == "python" and arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        if arguments[1] != "pytest":
            parse(module.app, arguments[2:])
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{block}: there is no {arguments[0]}"
    else:
        assert program in ("make", "cmake", ".venv/bin/python"), f"{block}: {program} is not known here"


def parse(application: typer.Typer, arguments: list[str]) -> None:
    """Read a command line without obeying it: an unknown option or a missing one ends the test."""
    command: Any = typer.main.get_command(application)
    while hasattr(command, "commands"):  # a group, whose first word is a command
        name, *arguments = arguments
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(command.name, list(arguments))


def test_commands_that_are_only_shown_are_understood() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            for words in block.commands if block.language == "console" else []:
                check(block, words)


def test_the_readme_has_all_steps() -> None:
    shown = {words[1] for block, words in commands("spt-fast") if block.page.name == "README.md"}
    assert {"prototypes", "train", "eval", "predict", "info", "sweep", "recipes"} <= shown


def test_make_targets_exist() -> None:
    targets = sorted({words[1] for _, words in commands("make")})
    assert {"demo", "test"} <= set(targets)
    # -n: `make test` is what runs this test.
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_site_has_every_page_and_every_name_in_the_reference() -> None:
    """What ``make docs`` would refuse, where its tools are not installed."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.relative_to(ROOT / "docs").as_posix(): page for page in PAGES if page.name != "README.md"}
    assert sorted(pages_in(site["nav"])) == sorted(pages)
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).is_file(), f"{page.name}: there is no {target}"
        for name in re.findall(r"^::: (.+)$", text, flags=re.MULTILINE):
            assert pydoc.locate(name) is not None, f"{page.name}: there is no {name}"


@pytest.mark.parametrize(
    "package",
    [
        "spt_fast",
        *(
            f"spt_fast.{name}"
            for name in ("ablations", "analysis", "clustering", "data", "kernels", "methods", "recipe")
        ),
    ],
)
def test_the_reference_has_every_class_and_function(package: str) -> None:
    shown = {
        pydoc.locate(name)
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    module = importlib.import_module(package)
    missing = [
        name for name in module.__all__ if callable(found := getattr(module, name)) and found not in shown
    ]
    assert not missing


def pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_in(entry)


def test_the_table_of_methods_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "guides" / "train.md").read_text(encoding="utf-8")
    table = "| `--method` | adds and trains, beside the head | of |\n|---|---|---|\n" + "".join(
        f"| `{name}` | {method.inserts} | {method.source} |\n" for name, method in METHODS.items()
    )
    assert f"<!-- methods: begin -->\n\n{table}\n<!-- methods: end -->" in text, table


def test_figures_are_those_of_the_committed_results() -> None:
    """Whoever changes one without the other runs ``python -m benchmarks.report``."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_measured(readme, measured_section(newest(), load_starts())) == readme
