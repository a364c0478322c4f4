"""The project as others get it: as a wheel, as an editable installation, and through make.

Packages are built from a copy of the checkout, so that nothing left over from earlier builds can leak in, and
without the links ``spt_fast/kernels`` and ``spt_fast/recipes``, so that only ``setup.py`` can put these in their place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Says where an installation's parts come from, then becomes its command `spt-fast --help`. It runs in the
# installation's own interpreter, and only once: importing torch and timm is what takes the time here.
PROBE = """
import importlib.metadata, importlib.resources, importlib.util, json, runpy, sys
import spt_fast, spt_fast.kernels
from spt_fast.recipe import load_recipe, recipe_names
script, *modules = sys.argv[1:]
assets = importlib.resources.files("spt_fast") / "assets"
print(json.dumps({
    "package": spt_fast.__file__,
    "kernels": spt_fast.kernels.__file__,
    "modules": {name: importlib.util.find_spec(name).origin for name in modules},
    "assets": {item.name: len(item.read_bytes()) for item in assets.iterdir()},
    "recipes": len({load_recipe(name).model for name in recipe_names()}),
    "version": [spt_fast.__version__, importlib.metadata.version("spt-fast")],
}))
sys.argv = [script, "--help"]
runpy.run_path(script, run_name="__main__")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, away from the checkout and deaf to this process's Python settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    environment |= {
        "CMAKE_ARGS": "-DSPT_FAST_NVCC= -DCMAKE_BUILD_TYPE=Debug"
    }  # machine code for GPUs takes a minute, and has a test of its own
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_files(folder: Path) -> set[str]:
    """The Python files below ``folder``, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def yaml_files(folder: Path) -> set[str]:
    """The yaml files below ``folder``, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}


def assets_of(checkout: Path) -> dict[str, int]:
    """The bundled files and their sizes in bytes."""
    return {path.name: path.stat().st_size for path in (checkout / "spt_fast" / "assets").iterdir()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, without caches, leftovers and the links to kernels and recipes."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "_native")
    for folder in ("spt_fast", "kernels", "recipes", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=leave_out)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, copy)
    for link in ("kernels", "recipes"):
        (copy / "spt_fast" / link).unlink()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip_wheel, "--wheel-dir", folder, checkout, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def fresh_installation(folder: Path, *target: str | Path) -> Path:
    """Install ``target`` into a new virtual environment that borrows everything else from this one.

    The borrowed site-packages folder comes last on the path and its .pth files are not read, so a copy of
    spt-fast that is installed there, editable or not, stays out of sight.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    # --ignore-installed: a spt-fast among the borrowed packages is neither good enough nor to be removed.
    pip_install = ("install", "--ignore-installed", "--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *pip_install, *target, cwd=folder)
    return python


def probe(python: Path, checkout: Path, away: Path) -> dict:
    """What the installation says about itself when asked from the folder ``away``."""
    modules = sorted(
        "spt_fast.kernels." + file.removesuffix(".py").replace("/", ".")
        for file in python_files(checkout / "kernels")
        if not file.endswith("__init__.py")
    )
    output = run(python, "-c", PROBE, python.with_name("spt-fast"), *modules, cwd=away)
    report, _, usage = output.partition("\n")
    assert "Usage" in usage
    return json.loads(report)


def assert_complete(report: dict, checkout: Path, package: Path, kernels: Path) -> None:
    """The installation's modules lie where they should, and its assets and version are the checkout's."""
    assert Path(report["package"]) == package / "__init__.py"
    assert Path(report["kernels"]) == kernels / "__init__.py"
    assert report["modules"], "kernels/ holds no module"
    for name, origin in report["modules"].items():
        assert kernels in Path(origin).parents, f"{name} comes from {origin}"
    assert report["assets"] == assets_of(checkout)
    assert report["recipes"] == 6  # three architectures, each also with a name for timm's weights
    assert report["version"][0] == report["version"][1]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"spt_fast/{file}" for file in python_files(checkout / "spt_fast")}
    expected |= {f"spt_fast/kernels/{file}" for file in python_files(checkout / "kernels")}
    expected |= {
        f"spt_fast/kernels/cuda/{path.name}" for path in (checkout / "kernels" / "cuda").glob("*.cu*")
    }
    expected |= {
        f"spt_fast/recipes/{file}"
        for file in {*python_files(checkout / "recipes"), *yaml_files(checkout / "recipes")}
    }
    # What a compiler made of the C++ sources has a test of its own, and is not there without one.
    names = {name for name in names if not name.startswith("spt_fast/kernels/_native/")}
    expected |= {f"spt_fast/assets/{file}" for file in assets_of(checkout)}
    expected |= {"spt_fast/py.typed"}
    assert names == expected


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
        (scripts,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "spt-fast = spt_fast.cli:main" in archive.read(scripts).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "gpu",
        "bench",
        "low-precision",
        "lora",
        "test",
        "dev",
        "docs",
    }
    requirements = [requirement.replace(" ", "") for requirement in metadata.get_all("Requires-Dist", [])]
    assert any(requirement.startswith("torch>=") for requirement in requirements)
    for requirement in requirements:
        specifier = requirement.partition(";")[0]
        assert ">=" in specifier and "<" not in specifier, f"{requirement}: a lower bound and no upper one"


def test_wheel_works_away_from_the_checkout(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    python = fresh_installation(tmp_path / "venv", wheel)
    (package,) = (tmp_path / "venv").glob("lib/python*/site-packages/spt_fast")
    assert_complete(probe(python, checkout, tmp_path), checkout, package, package / "kernels")


def test_editable_installation_works_away_from_the_checkout(checkout: Path, tmp_path: Path) -> None:
    python = fresh_installation(tmp_path / "venv", "--editable", checkout)
    report = probe(python, checkout, tmp_path)
    assert_complete(report, checkout, checkout / "spt_fast", checkout / "kernels")


# An interpreter that makes environments holding itself and notes, as pip or another module, that it was called and may
# fail.
INTERPRETER = """#!/bin/sh
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    pip) shift 2; echo "$@" >> "$PIP_LOG"; exit "$PIP_EXIT" ;;
    pytest | benchmarks.* | mkdocs) shift; echo "$@" >> "$RAN_LOG"; test "$1" != "$FAILING"; exit ;;
    *) case "$2" in *version_info*) exit "$OLD" ;; *ensurepip*) exit "$NO_VENV" ;; esac ;;
esac
"""


@pytest.fixture
def make(tmp_path: Path):
    """Call make in a copy of the files it looks at, with an interpreter that installs nothing."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    (tmp_path / "spt_fast").mkdir()
    for file in ("Makefile", "setup.py", "pyproject.toml", "spt_fast/_version.py"):
        shutil.copy(ROOT / file, tmp_path / file)

    def call(*words: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log = tmp_path / "pip.log"
        log.write_text("")
        defaults = {"PIP_LOG": str(log), "PIP_EXIT": "0", "OLD": "0", "NO_VENV": "0", "FAILING": ""}
        outer_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV", "RUNS", "RESULTS"}
        environment = {name: value for name, value in os.environ.items() if name not in outer_make}
        done = subprocess.run(
            ["make", f"PYTHON={interpreter}", *words],
            cwd=tmp_path,
            env={**environment, **defaults, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, log.read_text().splitlines()

    return call


def test_make_alone_lists_the_targets(make) -> None:
    done, _ = make()
    assert done.returncode == 0
    targets = "venv", "install", "demo", "test", "docs", "bench", "bench-baseline", "lint", "format", "clean"
    for target in targets:
        assert f"make {target} " in done.stdout


def test_make_installs_once_and_again_when_the_packaging_changes(make, tmp_path: Path) -> None:
    done, pip_calls = make("install")
    assert done.returncode == 0, done.stderr
    assert len(pip_calls) == 1 and pip_calls[0].endswith("--editable .")
    assert make("install")[1] == []
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "setup.py", (later, later))
    assert len(make("install")[1]) == 1


def test_make_bench_measures_compares_runs_everything_and_draws(make, tmp_path: Path) -> None:
    log = tmp_path / "ran.log"
    done, pip_calls = make("bench", RAN_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert len(pip_calls) == 1 and pip_calls[0].endswith("--editable .[test,bench]")
    suite, compared, benchmarks, report = log.read_text().splitlines()
    assert suite.startswith("pytest benchmarks/test_") and suite.endswith(
        "--benchmark-json=.benchmarks/current.json"
    )
    assert (
        tmp_path / ".benchmarks"
    ).is_dir() and compared == "benchmarks.regressions .benchmarks/current.json"
    assert benchmarks == "benchmarks.suite --results benchmarks/results"
    assert report == f"benchmarks.report --results {tmp_path}/benchmarks/results"
    log.unlink()
    done, _ = make("bench", RAN_LOG=str(log), FAILING="benchmarks.suite")
    assert done.returncode != 0 and "benchmarks.report" in log.read_text()


def test_make_bench_baseline_replaces_it(make, tmp_path: Path) -> None:
    log = tmp_path / "ran.log"
    assert make("bench-baseline", RAN_LOG=str(log))[0].returncode == 0
    assert log.read_text().splitlines()[-1] == "benchmarks.regressions .benchmarks/current.json --replace"


def test_make_docs_lets_no_warning_pass(make, tmp_path: Path) -> None:
    log = tmp_path / "ran.log"
    done, pip_calls = make("docs", RAN_LOG=str(log))
    assert done.returncode == 0, done.stderr
    assert len(pip_calls) == 1 and pip_calls[0].endswith("--editable .[docs]")
    assert log.read_text().split() == ["mkdocs", "build", "--quiet", "--strict"]


def test_make_bench_gpu_installs_nothing(make, tmp_path: Path) -> None:
    log = tmp_path / "ran.log"
    words = "benchmarks.suite --device cuda --resume --results out"
    done, pip_calls = make("bench-gpu", "RESULTS=out", RAN_LOG=str(log))
    assert done.returncode == 0 and not pip_calls and log.read_text() == f"{words}\n"
    assert not (tmp_path / ".venv").exists()
    # With an environment it is that one's Python that runs.
    make("venv")
    (tmp_path / "interpreter").write_text("#!/bin/sh\nexit 9\n")
    done, pip_calls = make("bench-gpu", "RESULTS=out", RAN_LOG=str(log))
    assert done.returncode == 0 and not pip_calls and log.read_text() == f"{words}\n{words}\n"


def test_make_redoes_an_installation_that_did_not_finish(make) -> None:
    done, pip_calls = make("install", PIP_EXIT="1")
    assert done.returncode != 0 and len(pip_calls) == 1
    done, pip_calls = make("install")
    assert done.returncode == 0 and len(pip_calls) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"OLD": "1"}, "needs Python 3.10 or newer"), ({"NO_VENV": "1"}, "lacks the venv module")],
)
def test_make_says_what_is_wrong_with_the_interpreter(make, settings: dict[str, str], words: str) -> None:
    done, pip_calls = make("install", **settings)
    assert done.returncode != 0 and words in done.stderr and pip_calls == []


def test_make_says_that_the_interpreter_is_missing(make) -> None:
    done, _ = make("install", "PYTHON=no-such-python")
    assert done.returncode != 0 and "there is no 'no-such-python'" in done.stderr


def test_the_folder_of_kernels_is_an_empty_package_of_its_own() -> None:
    """transformers, which peft brings, imports Hugging Face's ``kernels`` where it finds one."""
    program = """
import sys, torch, spt_fast.kernels
before = torch.ops.spt_fast.prompt_attention.default
import kernels
assert not hasattr(kernels, "prompt_attention") and torch.ops.spt_fast.prompt_attention.default is before
assert [name for name in sys.modules if name.partition(".")[0] == "kernels"] == ["kernels"]
"""
    run(sys.executable, "-c", program, cwd=ROOT)
