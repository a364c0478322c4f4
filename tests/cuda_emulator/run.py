"""Compiles kernels/cuda/kmeans.cu for this machine's processor and runs the backend's launches on it."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import spt_fast.kernels.kmeans_cuda as kmeans_cuda

FOLDER = Path(__file__).parent


class EmulatedGpu:
    """``run`` takes the place of a launch through CuPy; tensors are on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p
        self.launched: list[kmeans_cuda.Launch] = []

    def run(self, launch: kmeans_cuda.Launch, arguments: Sequence[int]) -> None:
        self.launched.append(launch)
        entry = ctypes.cast(getattr(self._library, launch.kernel.name), ctypes.c_void_p)
        failure = self._library.emulate(
            entry,
            (ctypes.c_int64 * len(arguments))(*arguments),
            len(arguments),
            (ctypes.c_uint * 3)(*launch.grid),
            launch.threads,
            ctypes.c_uint64(launch.shared_memory),
        )
        assert failure == b"", f"{launch.kernel.name}: {failure.decode()}"


def compile_emulator(compiler: str, to: Path) -> Path:
    """A shared library of all kernels and the emulator."""
    library = to / "kmeans_emulated.so"
    command = [compiler, "-std=c++17", "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-include", str(FOLDER / "emulator.h")]
    command += ["-x", "c++", str(kmeans_cuda.SOURCES / "kmeans.cu"), str(FOLDER / "emulator.cpp")]
    made = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library
