"""The CUDA backend without a GPU: its kernels run in an emulator (cuda_emulator/) and are compiled for real GPUs."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_emulator.run import EmulatedGpu, compile_emulator
from kmeans_judge import check
from torch import Tensor

from spt_fast.kernels import kmeans_cuda
from spt_fast.kernels.backends import Backend, choose_backend
from spt_fast.kernels.kmeans_cuda import FusedPlan, Gpu, Kernel, TwoPassPlan, plan_assign, plan_step

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
HOPPER = Gpu(multiprocessors=132, shared_memory_per_block=227 << 10, bulk_copies=True)
AMPERE = Gpu(multiprocessors=108, shared_memory_per_block=163 << 10, bulk_copies=False)
SMALL_HOPPER = dataclasses.replace(
    HOPPER, multiprocessors=3
)  # so that a block has several tiles even in a test
SMALL_AMPERE = dataclasses.replace(AMPERE, multiprocessors=2)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return EmulatedGpu(compile_emulator(compiler, tmp_path_factory.mktemp("emulator")))


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Fixed random numbers, and NaN in memory that was never written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def judge(emulated: EmulatedGpu, x: Tensor, centroids: Tensor, gpu: Gpu = SMALL_HOPPER) -> list[str]:
    """Both ops, judged; the kernels that the step launched."""
    emulated.launched.clear()
    check(
        partial(kmeans_cuda.run_assign, gpu=gpu, run=emulated.run),
        partial(kmeans_cuda.run_step, gpu=gpu, run=emulated.run),
        x,
        centroids,
    )
    launched = [launch.kernel.name for launch in emulated.launched]
    return launched[2:]


def some(shape: tuple[int, ...], clusters: int, dtype: torch.dtype, mean: float = 1) -> tuple[Tensor, Tensor]:
    x = (torch.randn(shape) + mean).to(dtype)
    return x, torch.randn(*shape[:-2], clusters, shape[-1]) + mean


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, clusters",
    [
        ((1, 7), 1),
        ((31, 1), 2),
        ((32, 32), 5),
        ((33, 200), 20),
        ((2, 63, 192), 33),
        ((2, 64, 384), 20),
        ((3, 65, 384), 41),
        ((130, 768), 20),
        ((40, 776), 24),
        ((70, 200), 100),
        ((40, 64), 256),
        ((140, 1408), 20),
        ((2, 40, 24), 300),
    ],
)
def test_shapes(emulated: EmulatedGpu, shape: tuple[int, ...], clusters: int, dtype: torch.dtype) -> None:
    judge(emulated, *some(shape, clusters, dtype))


@pytest.mark.parametrize("features, clusters, low_in_shared", kmeans_cuda.FUSED_SHAPES)
def test_every_fused_kernel(emulated: EmulatedGpu, features: int, clusters: int, low_in_shared: bool) -> None:
    x, centroids = some((75, 128 * features - 8), 8 * clusters - 1, torch.bfloat16)
    name = f"fused_step_Bfloat16_{features}_{clusters}_{str(low_in_shared).lower()}"
    assert judge(emulated, x, centroids) == ["prepare_Bfloat16", name, "reduce_partials"]


@pytest.mark.parametrize("width, stages", [(192, 6), (384, 5), (768, 2)])
def test_without_bulk_copies(emulated: EmulatedGpu, width: int, stages: int) -> None:
    x, centroids = some((2, 170, width), 20, torch.float16)
    plan = plan_step(x, 20, SMALL_AMPERE)
    assert isinstance(plan, FusedPlan)
    assert (plan.stages, plan.copy_mode) == (stages, kmeans_cuda.ASYNC_COPY)
    judge(emulated, x, centroids, SMALL_AMPERE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", [SMALL_HOPPER, SMALL_AMPERE])
def test_strides_are_taken_as_they_are(emulated: EmulatedGpu, dtype: torch.dtype, gpu: Gpu) -> None:
    _, centroids = some((2, 70, 40), 6, dtype)
    wide = (torch.randn(2, 140, 88) + 1).to(dtype)
    for x in (
        wide[:, ::2, 8:48],  # whole aligned rows
        wide[:, :70, 3:43],  # rows off by a few bytes
        wide[:, :70, 1:81:2],  # every other feature
        wide[:, :40, :70].transpose(1, 2),  # features far apart
        wide[:1, 5:6, 8:48].expand(2, 70, 40),  # the same row everywhere
        wide[:1, :70, 8:9].expand(2, 70, 40),  # the same feature everywhere
    ):
        assert x.shape == (2, 70, 40)
        before = x.clone()
        judge(emulated, x, centroids, gpu)
        assert torch.equal(x, before)


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 50])
def test_any_share_of_the_layers(emulated: EmulatedGpu, layers: int, multiprocessors: int) -> None:
    gpu = dataclasses.replace(HOPPER, multiprocessors=multiprocessors)
    judge(emulated, *some((layers, 100, 16), 3, torch.bfloat16), gpu)
    judge(emulated, *some((layers, 100, 140), 3, torch.float32), gpu)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing(emulated: EmulatedGpu, dtype: torch.dtype) -> None:
    for shape in ((0, 8), (2, 0, 8), (0, 5, 8)):
        judge(emulated, *some(shape, 3, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(emulated: EmulatedGpu, dtype: torch.dtype) -> None:
    x = torch.randint(-3, 4, (90, 16)).to(dtype)
    centroids = torch.randint(-3, 4, (11, 16)).float().repeat(3, 1)  # each three times
    judge(emulated, x, centroids)
    labels, _ = kmeans_cuda.run_assign(x, centroids, SMALL_HOPPER, emulated.run)
    exact = (x.double()[:, None] - centroids.double()).square().sum(dim=2)
    assert torch.equal(labels, exact.argmin(dim=1))
    for few in (centroids[:22], centroids):  # a fused step for the halves; two passes
        _, counts, _ = kmeans_cuda.run_step(x, few, SMALL_HOPPER, emulated.run)
        assert torch.equal(counts, torch.bincount(labels, minlength=len(few)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_tight_clusters_far_apart(emulated: EmulatedGpu, dtype: torch.dtype, scale: float) -> None:
    centers = torch.randn(12, 48) * scale
    x = (centers[torch.arange(100) % 12] + 1e-3 * scale * torch.randn(100, 48)).to(dtype)
    judge(emulated, x, centers)
    judge(emulated, x, x[:12].float())  # some tokens are centroids


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_common_offset(emulated: EmulatedGpu, dtype: torch.dtype) -> None:
    offset = torch.zeros(64)
    offset[::9] = 60.0
    x, centroids = some((100, 64), 10, dtype)
    judge(emulated, (x + offset).to(dtype), centroids + offset)


def test_the_whole_range_of_float16(emulated: EmulatedGpu) -> None:
    # Differences beyond the largest float16, and centroids at the smallest.
    ends = 60_000 * (torch.arange(70) % 2 * 2 - 1)
    x = (ends[:, None] + 100 * torch.randn(70, 32)).half()
    judge(emulated, x, x[:2].float())
    x, centroids = some((70, 32), 8, torch.float32)
    judge(emulated, (2e-5 * x).half(), 2e-5 * centroids)


def test_a_stray_centroid_spoils_nothing(emulated: EmulatedGpu) -> None:
    x, centroids = some((64, 32), 8, torch.float16)
    centroids[3] = 1e8
    labels, sq_distances = kmeans_cuda.run_assign(x, centroids, SMALL_HOPPER, emulated.run)
    _, counts, _ = kmeans_cuda.run_step(x, centroids, SMALL_HOPPER, emulated.run)
    exact = (x.double()[:, None] - centroids.double()).square().sum(dim=2)
    assert torch.equal(labels, exact.argmin(dim=1))
    torch.testing.assert_close(sq_distances.double(), exact.min(dim=1).values, rtol=1e-5, atol=0)
    assert torch.equal(counts, torch.bincount(labels, minlength=8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_labels_stay_in_range_whatever_the_tokens(
    emulated: EmulatedGpu, dtype: torch.dtype, value: float
) -> None:
    x, centroids = some((70, 24), 5, dtype)
    x[::3, 7] = value
    labels, _ = kmeans_cuda.run_assign(x, centroids, SMALL_HOPPER, emulated.run)
    _, counts, _ = kmeans_cuda.run_step(x, centroids, SMALL_HOPPER, emulated.run)
    assert labels.min() >= 0 and labels.max() < 5
    assert counts.sum() == 70


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bit_for_bit(emulated: EmulatedGpu, dtype: torch.dtype) -> None:
    x, centroids = some((2, 300, 40), 9, dtype)
    first = kmeans_cuda.run_step(x, centroids, SMALL_HOPPER, emulated.run)
    again = kmeans_cuda.run_step(x, centroids, SMALL_HOPPER, emulated.run)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_long_sums_do_not_drift(emulated: EmulatedGpu) -> None:
    # Tensor cores cut off what does not fit, and so does the emulator. All of one sign, so that it adds up.
    gpu = dataclasses.replace(HOPPER, multiprocessors=1)
    x = torch.rand(32 * 260, 4).half() / 3
    sums, _, _ = kmeans_cuda.run_step(x, torch.ones(1, 4), gpu, emulated.run)
    torch.testing.assert_close(sums[0].double(), x.double().sum(dim=0), rtol=4e-6, atol=0)


def test_the_emulator_notices(emulated: EmulatedGpu) -> None:
    x, centroids = some((200, 64), 5, torch.bfloat16)

    def with_less_memory(launch: kmeans_cuda.Launch, arguments: Sequence[int]) -> None:
        if launch.kernel.macro == "FUSED_STEP":
            launch = dataclasses.replace(launch, shared_memory=launch.shared_memory - 64)
        emulated.run(launch, arguments)

    with pytest.raises(AssertionError, match="shared memory"):
        kmeans_cuda.run_step(x, centroids, SMALL_HOPPER, with_less_memory)


def tokens_like(layers: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor to plan for, without its memory."""
    return torch.empty((layers, tokens, width), dtype=dtype, device="meta")


def kernel_list() -> set[str]:
    """The names of all kernels that kmeans.cu makes when not asked for one."""
    text = (kmeans_cuda.SOURCES / "kmeans.cu").read_text().split("#else")[1]
    fused = re.findall(r"FUSED_STEP\(Element, (\d+), (\d+), (\w+)\)", text)
    names = {
        "_".join(["fused_step", element, *each]) for element in ("Bfloat16", "Float16") for each in fused
    }
    others = re.findall(r"^(ASSIGN|PREPARE|ACCUMULATE|REDUCE)\((.*)\)$", text, re.MULTILINE)
    return names | {"_".join([macro.lower(), *options.split(", ")]) for macro, options in others}


@pytest.mark.parametrize("gpu", [HOPPER, AMPERE])
def test_plans_fit_the_gpu_and_use_kernels_that_exist(gpu: Gpu) -> None:
    kernels = kernel_list()
    used = set()
    for dtype in DTYPES:
        for width in (1, 32, 192, 384, 768, 1024, 1280, 5000):
            for clusters in (1, 5, 20, 24, 25, 48, 64, 100, 256, 3000):
                for layers, tokens in ((1, 1), (12, 1_060_000)):
                    x = tokens_like(layers, tokens, width, dtype)
                    plan = plan_step(x, clusters, gpu)
                    assign = plan_assign(x, clusters, gpu)
                    launches = [assign.prepare, assign.assign, plan.reduce]
                    if isinstance(plan, FusedPlan):
                        launches += [plan.prepare, plan.fused]
                        assert plan.padded_clusters >= clusters and plan.padded_width >= width
                    else:
                        launches += [plan.accumulate]
                        assert plan.accumulate.grid[1] * 128 >= width
                        assert plan.accumulate.grid[2] * plan.clusters_per_slice >= clusters
                    assert assign.padded_clusters >= clusters and assign.padded_width >= width
                    for launch in launches:
                        used.add(launch.kernel.name)
                        assert launch.shared_memory <= gpu.shared_memory_per_block
                        assert min(launch.grid) >= 1 and max(launch.grid[1:]) < 1 << 16
    assert used <= kernels
    assert gpu is AMPERE or used == kernels


def test_the_common_case_is_one_pass_with_three_tiles_on_their_way() -> None:
    plan = plan_step(tokens_like(12, 1_060_000, 768, torch.bfloat16), 20, HOPPER)
    assert isinstance(plan, FusedPlan)
    assert (plan.stages, plan.copy_mode, plan.fused.grid) == (4, kmeans_cuda.BULK_COPY, (132, 1, 1))
    assert isinstance(plan_step(tokens_like(1, 99, 768, torch.float32), 20, HOPPER), TwoPassPlan)


def test_why_not() -> None:
    x = torch.zeros(1, 64)
    assert kmeans_cuda.why_not(x, x) == "tokens are on cpu"


# What compiles for a GPU without running on one: the kernels that need the most registers.
LARGE = [
    (Kernel("FUSED_STEP", ("Bfloat16", 6, 3, "false")), "90a"),
    (Kernel("FUSED_STEP", ("Float16", 3, 6, "false")), "80"),
    (Kernel("ASSIGN", ("Bfloat16", 12)), "80"),
]


@pytest.mark.parametrize("kernel, architecture", LARGE, ids=lambda value: getattr(value, "name", value))
def test_nvcc_compiles_without_spills(tmp_path: Path, kernel: Kernel, architecture: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "one.cu"
    source.write_text(kmeans_cuda.kernel_source(kernel))
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", target, "-cubin", "-o", str(tmp_path / "one.cubin"), str(source)]
    made = subprocess.run(
        [*command, f"-I{kmeans_cuda.SOURCES}", "-Xptxas", "-v"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", made.stderr
    )
    assert spills == [("0", "0", "0")], made.stderr


@pytest.mark.parametrize(
    "kernel", [LARGE[0][0], Kernel("PREPARE", ("Float16",))], ids=lambda kernel: kernel.name
)
def test_nvrtc_compiles(kernel: Kernel) -> None:
    nvrtc = find_nvrtc()
    if nvrtc is None:
        pytest.skip("needs the NVRTC library that comes with torch")
    program = ctypes.c_void_p()
    source = kmeans_cuda.kernel_source(kernel).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"one.cu", 0, None, None) == 0
    options = [b"-arch=sm_90", b"-std=c++17", f"-I{kmeans_cuda.SOURCES}".encode()]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    cubin = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetCUBIN(program, cubin) == 0
    assert kernel.name.encode() in cubin.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def find_nvrtc() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    return None


def test_cmake_names_cubins_as_the_loader_looks_for_them(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("nvcc") is None:
        pytest.skip("needs cmake and nvcc")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(only_this LANGUAGES NONE)\n"
        f'add_subdirectory("{kmeans_cuda.SOURCES.resolve()}" cuda)\n'
    )
    native = tmp_path / "native"
    native.mkdir()
    (native / "kmeans_sm80_0123456789ab.cubin").touch()  # of other sources
    command = [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DSPT_FAST_NATIVE_DIR={native}"]
    subprocess.run(command, check=True, capture_output=True)
    assert not list(native.iterdir())
    planned = subprocess.run(
        [cmake, "--build", str(tmp_path / "build"), "--", "-n"], check=True, capture_output=True, text=True
    )
    for capability in ((8, 0), (9, 0)):
        cubin = kmeans_cuda.cubin_path(capability)
        assert cubin is not None and cubin.name in planned.stdout
    assert kmeans_cuda.cubin_path((10, 0)) is None


@pytest.mark.parametrize(
    ("gpu", "dtype", "clusters", "width", "leads"),
    [
        (HOPPER, torch.bfloat16, 20, 768, True),
        (HOPPER, torch.float16, 24, 192, True),
        (HOPPER, torch.bfloat16, 100, 768, False),
        (HOPPER, torch.bfloat16, 20, 1280, False),
        (HOPPER, torch.float32, 20, 768, False),
        (HOPPER, torch.bfloat16, 20, 767, False),
        (AMPERE, torch.bfloat16, 20, 768, False),
    ],
)
def test_it_goes_first_where_it_reads_the_tokens_once(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, dtype: torch.dtype, clusters: int, width: int, leads: bool
) -> None:
    monkeypatch.setattr(kmeans_cuda, "_gpu", lambda index: gpu)
    for shape in ((64,), (3, 64)):
        x = torch.zeros(*shape, width, dtype=dtype)
        centroids = torch.zeros(*shape[:-1], clusters, width)
        assert kmeans_cuda.reads_tokens_once(x, centroids) == leads


def test_one_that_leads_is_taken_where_it_can_run_and_nothing_else_was_asked_for() -> None:
    def taken(**cuda: object) -> str:
        backends = {"triton": Backend("triton"), "cuda": Backend("cuda", **cuda), "torch": Backend("torch")}
        return choose_backend("op", backends, None, torch.zeros(3))

    assert taken() == "triton"
    assert taken(leads=lambda x: len(x) == 3) == "cuda"
    assert taken(leads=lambda x: len(x) == 4) == "triton"
    assert taken(leads=lambda x: True, why_not=lambda x: "not here") == "triton"
    backends = {"triton": Backend("triton"), "cuda": Backend("cuda", leads=lambda x: True)}
    assert choose_backend("op", backends, "triton", torch.zeros(3)) == "triton"
