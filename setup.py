"""What ``pip install`` needs to know about spt-fast; the tools' settings are in pyproject.toml."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Run, not imported: importing the package would need torch before it is installed.
VERSION = runpy.run_path(str(ROOT / "spt_fast" / "_version.py"))["__version__"]

# Kernels and recipes have folders of their own at the top level and are installed as spt_fast.kernels and
# spt_fast.recipes. The links spt_fast/kernels and spt_fast/recipes show them in that place to whatever reads the
# checkout without installing it (editors, mypy). Packaging does not need the links, hence the set: with them these
# packages are found twice.
PACKAGE_DIR = {"spt_fast.kernels": "kernels", "spt_fast.recipes": "recipes"}
BESIDE = [f"spt_fast.{name}" for name in find_packages(include=["kernels", "kernels.*", "recipes"])]
PACKAGES = sorted({*find_packages(include=["spt_fast", "spt_fast.*"]), *BESIDE})


class BuildNative(build_ext):
    """Has CMake build the native kernels where the package looks for them; goes on without what cannot be built."""

    # What is built, with its target in CMake and what it is that goes without it.
    PARTS = {
        "spt_fast_cpu": "k-means on CPUs will run on plain torch, several times slower",
        "all": "CUDA kernels will be compiled at their first use",
    }

    def run(self) -> None:
        try:
            self._configure()
        except (OSError, subprocess.CalledProcessError) as error:
            return self._warn(error, *self.PARTS.values())
        for target, loss in self.PARTS.items():
            try:
                self._cmake("--build", str(self._build_folder), "--target", target, "--parallel")
            except subprocess.CalledProcessError as error:
                self._warn(error, loss)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._native_folder.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable installation finds what is built in the checkout itself

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists them

    @property
    def _in_place(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    @property
    def _native_folder(self) -> Path:
        kernels = (
            ROOT / "kernels" if self._in_place else Path(self.build_lib).resolve() / "spt_fast" / "kernels"
        )
        return kernels / "_native"

    @property
    def _build_folder(self) -> Path:
        # An editable installation is repeated when a source changes: what has not changed is not built again.
        return ROOT / "build" / "editable" if self._in_place else Path(self.build_temp).resolve() / "cmake"

    def _configure(self) -> None:
        ninja = shutil.which("ninja", path=self._path)
        generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        asked = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        native = f"-DSPT_FAST_NATIVE_DIR={self._native_folder}"
        self._cmake("-S", str(ROOT), "-B", str(self._build_folder), native, *generator, *asked)

    def _cmake(self, *arguments: str) -> None:
        cmake = shutil.which("cmake", path=self._path)
        if cmake is None:
            raise FileNotFoundError("CMake was not found")
        subprocess.run([cmake, *arguments], check=True, env={**os.environ, "PATH": self._path})

    @property
    def _path(self) -> str:
        # The environment's own programs come first, even where it was not activated.
        return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    @staticmethod
    def _warn(error: Exception, *losses: str) -> None:
        print(f"\nspt-fast: WARNING: native kernels were not built: {error}", file=sys.stderr)
        for loss in losses:
            print(f"spt-fast: WARNING: {loss}", file=sys.stderr)


class BuildWheel(bdist_wheel):
    """Tags the wheel for its platform but for every Python: the native kernels have a plain C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# Every bound is the oldest release that the test suite passes with; nothing is known to need an upper one.
REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",  # the release made for torch 2.11
    "triton>=3.6; sys_platform == 'linux'",
    "timm>=1.0.20",
    "numpy>=1.26.4",
    "pillow>=10.3",
    "pyyaml>=6.0.1",  # the first with wheels for Python 3.11 and 3.12
    "safetensors>=0.5",
    "scikit-learn>=1.6",
    "matplotlib>=3.9",
    "tensorboard>=2.18",
    "rich>=13.8",
    "typer>=0.20",  # older ones ignore a missing required option when click is 8.3 or newer
]
GPU = ["cupy-cuda13x>=13.6"]
# cuML, cuVS and faiss-gpu are measured as well where they are installed already.
BENCH = [
    "faiss-cpu>=1.9",
    "fastkmeans>=0.5",
    "flash-kmeans>=0.3; sys_platform == 'linux'",
    "pytest-benchmark>=5",
    "nvidia-ml-py>=13.615",
]
LOW_PRECISION = ["torchao>=0.17"]
LORA = ["peft>=0.21"]
TEST = [
    *LOW_PRECISION,
    *LORA,
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "webdataset>=1.0",
    "hypothesis>=6.100",
    "setuptools>=70.1",
]
DEV = [*TEST, "ruff>=0.17", "mypy>=2.4"]
DOCS = ["mkdocs-material>=9.8", "mkdocstrings-python>=2.0"]

setup(
    name="spt-fast",
    version=VERSION,
    description="Self-Prompt Tuning of frozen vision transformers, at the speed of the hardware",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="spt-fast authors",
    license="Apache-2.0",
    keywords=["vision transformer", "visual prompt tuning", "parameter-efficient fine-tuning", "k-means"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    package_data={
        "spt_fast": ["py.typed", "assets/*"],
        "spt_fast.kernels": ["cuda/*.cu", "cuda/*.cuh"],
        "spt_fast.recipes": ["*.yaml", "*/*.yaml"],
    },
    ext_modules=[Extension("spt_fast.kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require={
        "gpu": GPU,
        "bench": BENCH,
        "low-precision": LOW_PRECISION,
        "lora": LORA,
        "test": TEST,
        "dev": DEV,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["spt-fast = spt_fast.cli:main"]},
)
