"""``spt-fast bench``: it lists the benchmarks, finds them, and runs them as ``python -m benchmarks.NAME`` does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command_line import ROOT, check_refused, environment, run

import benchmarks
import spt_fast

TABLES = """
BENCHMARKS = {"two_words": "Counts to a number.", "broken": "Cannot be imported."}
TOOLS = {"around": "Goes around them."}
"""
TWO_WORDS = '''
import typer
from spt_fast.errors import InputError

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def main(context: typer.Context, number: int = 3, end: str = "well") -> None:
    """Count, and end as asked."""
    print(f"counted to {number}, given {context.get_parameter_source('number').name}")
    if end == "exit":
        raise typer.Exit(3)
    if end == "interrupt":
        raise KeyboardInterrupt
    if end == "mistake":
        raise InputError("what main() would make a sentence of")
    if end == "missing":
        open("/no/such/file")
'''


def make_package(folder: Path, **modules: str) -> Path:
    package = folder / "benchmarks"
    package.mkdir(parents=True)
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)
    return folder


def prepend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python look here first.

    ``monkeypatch.syspath_prepend`` would not do behind :func:`nowhere`: what it restores at the end, after all
    attributes, is the list of then, without the real benchmarks, which the other tests of this process need.
    """
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


def forget_benchmarks() -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No benchmarks can be imported, and the package seems to lie in ``tmp_path/source``."""
    elsewhere = [each for each in sys.path if not (Path(each or ".") / "benchmarks").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(spt_fast, "__file__", str(tmp_path / "source" / "spt_fast" / "__init__.py"))
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "benchmarks"}
    forget_benchmarks()
    yield
    forget_benchmarks()
    sys.modules.update(kept)


@pytest.fixture
def fake(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made up benchmarks that can be imported, one of them not to the end."""
    modules = {"__init__": TABLES, "two_words": TWO_WORDS, "broken": "import no_such_module"}
    prepend(make_package(tmp_path / "fake", **modules), monkeypatch)


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--help"]])
def test_all_are_listed_and_none_is_imported(fake: None, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.code == (0 if "--help" in arguments else 2)  # as `spt-fast` alone
    lines = (done.out + done.err).splitlines()
    for name, words in (("two_words", "Counts to"), ("broken", "Cannot be"), ("around", "Goes around")):
        assert any(name in line and words in line for line in lines), lines
    assert "benchmarks.broken" not in sys.modules and "benchmarks.two_words" not in sys.modules


def test_a_benchmark_shows_its_own_help(fake: None) -> None:
    done = run("bench", "two_words", "--help")
    assert done.code == 0 and "Count, and end as asked." in done.out and "--number" in done.out


@pytest.mark.parametrize("name", ["two_words", "two-words"])
def test_a_benchmark_runs_with_its_arguments(fake: None, name: str) -> None:
    done = run("bench", name, "--number", 5)
    assert (done.code, done.out, done.err) == (0, "counted to 5, given COMMANDLINE\n", "")


@pytest.mark.parametrize(("end", "code"), [("well", 0), ("exit", 3), ("interrupt", 130)])
def test_exit_codes_are_those_of_the_benchmark(fake: None, end: str, code: int) -> None:
    done = run("bench", "two_words", "--end", end)
    assert done.code == code and "counted to 3, given DEFAULT" in done.out


@pytest.mark.parametrize(("end", "error"), [("mistake", "InputError"), ("missing", "FileNotFoundError")])
def test_an_error_inside_keeps_its_traceback(fake: None, end: str, error: str) -> None:
    done = run("bench", "two_words", "--end", end)
    assert done.code == 1 and "Traceback" in done.err and error in done.err and "two_words.py" in done.err
    assert "error: " not in done.err


def test_wrong_usage_of_a_benchmark_exits_2(fake: None) -> None:
    check_refused(
        run("bench", "two_words", "--nummer", 5), "spt-fast bench two_words [OPTIONS]", "--nummer", code=2
    )


def test_a_missing_package_is_not_taken_for_missing_benchmarks(fake: None) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run("bench", "broken")


def test_an_unknown_name_is_refused_with_the_known_ones(fake: None) -> None:
    check_refused(run("bench", "three"), "no benchmark 'three'", "two_words, broken, around", code=2)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["two_words"]])
def test_without_the_source_one_sentence_says_where_it_is(nowhere: None, arguments: list[str]) -> None:
    done = run("bench", *arguments)
    check_refused(done, "git clone", 'pip install -e ".[bench]"')


@pytest.mark.parametrize("init", [{}, {"__init__": "THEIRS = 1"}])
def test_they_are_found_beside_the_package_behind_others_of_that_name(
    nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: dict[str, str]
) -> None:
    make_package(tmp_path / "source", __init__=TABLES, two_words=TWO_WORDS)
    prepend(make_package(tmp_path / "theirs", **init, two_words="raise SystemExit(9)"), monkeypatch)
    assert run("bench", "two_words").code == 0


def test_the_command_line_starts_without_them() -> None:
    code = "import sys, spt_fast.cli; sys.exit('benchmarks' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True, timeout=120)


@pytest.mark.parametrize("name", [*benchmarks.BENCHMARKS, *benchmarks.TOOLS])
def test_every_name_in_the_tables_is_a_command(name: str) -> None:
    app = importlib.import_module(f"benchmarks.{name}").app
    assert isinstance(app, typer.Typer) and app.registered_commands
