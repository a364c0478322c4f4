"""The native library is built by CMake, alone or by an installation, and an installation does without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spt_fast.kernels import kmeans_cpu

ROOT = Path(__file__).resolve().parents[1]
CPU_ONLY = "-DSPT_FAST_NVCC="  # compiling the CUDA kernels takes a minute
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
CMAKE = shutil.which("cmake", path=ENVIRONMENT["PATH"])
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)

needs_compiler = pytest.mark.skipif(not (CMAKE and COMPILER), reason="needs CMake and a C++ compiler")


def build_ext(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What an installation does for the native part, with its results below ``folder``."""
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(
        [*command, f"--build-lib={folder / 'lib'}", f"--build-temp={folder / 'temp'}"],
        cwd=ROOT,
        env={**ENVIRONMENT, "CMAKE_ARGS": CPU_ONLY, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_compiler
def test_cmake_alone_builds_a_library_that_loads(tmp_path: Path) -> None:
    native = tmp_path / "native"
    configure = ["-S", ROOT, "-B", tmp_path / "build", f"-DSPT_FAST_NATIVE_DIR={native}", CPU_ONLY]
    for arguments in (configure, ["--build", tmp_path / "build"]):
        done = subprocess.run(
            [str(CMAKE), *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr
    library, reason = kmeans_cpu.load(native / kmeans_cpu.LIBRARY.name)
    assert library is not None and reason is None
    if shutil.which("nm"):
        # A function that several files may define (W, V, u) could be taken from the one for AVX-512 on every processor.
        objects = [path for path in (tmp_path / "build").rglob("slice_*") if path.suffix in (".o", ".obj")]
        assert len(objects) == 3
        symbols = subprocess.run(
            ["nm", "--demangle", *map(str, objects)], capture_output=True, text=True
        ).stdout
        assert "multiply" in symbols
        assert not [line for line in symbols.splitlines() if line[17:18] in ("W", "V", "u")]


@needs_compiler
def test_an_installation_builds_the_library_where_the_package_looks_for_it(tmp_path: Path) -> None:
    done = build_ext(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    _, reason = kmeans_cpu.load(
        tmp_path / "lib" / "spt_fast" / "kernels" / "_native" / kmeans_cpu.LIBRARY.name
    )
    assert reason is None


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "no-such-compiler"}, {"CMAKE_ARGS": f"{CPU_ONLY} -DCMAKE_CXX_FLAGS=-no-such-flag"}],
)
def test_an_installation_goes_on_without_a_compiler_that_works(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = build_ext(tmp_path, **environment)
    assert done.returncode == 0
    assert "WARNING: native kernels were not built" in done.stderr
    assert "k-means on CPUs will run on plain torch" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_source_distribution_holds_what_is_built_and_nothing_that_was(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "egg_info", f"--egg-base={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (manifest,) = tmp_path.rglob("SOURCES.txt")
    listed = set(manifest.read_text().splitlines())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu").iterdir()}
    assert sources | {"CMakeLists.txt"} <= listed
    assert not [name for name in listed if "/_native/" in name]
