"""Every benchmark at sizes that take seconds: who takes part, what is recorded, and that who is wrong has no time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import (
    accuracy_speed,
    attention,
    command,
    kmeans,
    kmeans_peers,
    low_precision,
    multi_task,
    prototypes,
    scaling,
    streaming,
    train_step,
    train_step_ways,
)
from benchmarks.ceilings import Ceilings
from benchmarks.record import Row
from spt_fast.errors import InputError

TINY = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some, without the seconds that it takes to measure them; `test_benchmark_method.py` does."""
    some = Ceilings(copy=3e10, read=3e10, matmul={"float32": 2e11, "bfloat16": 4e11}, samples={})
    monkeypatch.setattr(command, "measure_ceilings", lambda device: some)


def results(module: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(module.app, ["--device", "cpu", *arguments, "--results", str(folder)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    (file,) = folder.glob(f"*-{module.__name__.rpartition('.')[2]}.json")
    record: dict[str, Any] = json.loads(file.read_text())
    assert record["complete"] and record["command"].startswith(f"python -m {module.__name__} ")
    assert "--device cpu" in record["command"] and "--results" not in record["command"]
    return record


def peers(record: dict[str, Any], **case: Any) -> dict[str, Row]:
    """The rows of the cases that have these values, by peer."""
    return {row["peer"]: row for row in record["rows"] if case.items() <= row["case"].items()}


def test_kmeans(tmp_path: Path) -> None:
    size = ("--tokens", "2000", "--features", "24", "--clusters", "3", "--layers", "2", "--rounds", "2")
    record = results(kmeans, tmp_path, *size)
    iteration, whole = (peers(record, measure=name) for name in ("iteration", "convergence"))
    ours = {name for name in iteration if name.startswith("spt-fast")}
    assert {name.rpartition(", ")[2] for name in ours} == {"float32", "bfloat16"}
    assert {"plain torch loop, float32", "scikit-learn KMeans", "FAISS", "fastkmeans"} <= set(iteration)
    measured = [row for row in iteration.values() if row["kind"] == "measured"]
    inertias = [row["inertia"] for row in measured]
    assert max(inertias) < 1.01 * min(inertias)
    for row in measured:
        numbers = 2 * 2000 * 24
        size_of_number = 2 if row["limit"]["dtype"] == "bfloat16" else 4
        assert row["limit"]["moved_bytes"] == numbers * size_of_number
        assert row["limit"]["operations"] == numbers * 7
    reference = whole["spt-fast KMeans"]
    assert whole["plain torch loop, float32"]["iterations"] == reference["iterations"]
    assert whole["scikit-learn KMeans"]["inertia"] == pytest.approx(reference["inertia"], rel=1e-3)
    assert whole["scikit-learn MiniBatchKMeans"]["inertia"] < 1.1 * reference["inertia"]


def test_a_clustering_that_is_wrong_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kmeans_peers.plain_loop
    monkeypatch.setattr(kmeans_peers, "plain_loop", lambda *arguments: real(*arguments) + 0.3)
    size = ("--tokens", "500", "--features", "8", "--clusters", "3", "--rounds", "1")
    record = results(kmeans, tmp_path, *size)
    for measure, reason in (("iteration", "computes something else"), ("convergence", "ends elsewhere")):
        row = peers(record, measure=measure)["plain torch loop, float32"]
        assert row["kind"] == "missing" and reason in row["reason"]


def test_a_library_that_is_missing_or_fails_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise OSError("no such kernel\nand more")

    def without_sklearn(name: str) -> object | None:
        return None if name == "sklearn" else object()

    monkeypatch.setattr(kmeans_peers, "find_spec", without_sklearn)
    monkeypatch.setattr(kmeans_peers, "faiss", fail)
    monkeypatch.setattr(kmeans_peers, "fastkmeans", fail)
    size = ("--tokens", "500", "--features", "8", "--clusters", "3", "--rounds", "1", "--no-converge")
    rows = peers(results(kmeans, tmp_path, *size))
    assert rows["scikit-learn KMeans"]["reason"] == "sklearn is not installed"
    assert rows["FAISS"]["reason"] == "does not run here: no such kernel"


def test_all_start_from_the_same_centres() -> None:
    """Those that fastkmeans would draw by itself, so that after one iteration it has what the loop has."""
    pytest.importorskip("fastkmeans")
    x = torch.randn(2, 300, 5)
    start = kmeans_peers.first_centers(x, 4)
    assert torch.allclose(
        kmeans_peers.fastkmeans(x, start, 1), kmeans_peers.plain_loop(x, start, 1), atol=1e-5
    )


def test_too_many_tokens_are_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "free_memory", lambda device: 1000)
    record = results(kmeans, tmp_path, "--tokens", "500", "--features", "8", "--no-converge")
    (row,) = record["rows"]
    assert row["kind"] == "missing" and "do not fit" in row["reason"]


def test_attention(tmp_path: Path) -> None:
    record = results(attention, tmp_path, "--batch-size", "1", "--num-prompts", "2", "--rounds", "1")
    forward, both = (peers(record, **{"pass": name}) for name in ("forward", "forward + backward"))
    for rows in (forward, both):
        names = [name for name, row in rows.items() if row["kind"] == "measured"]
        assert names[0] == "spt-fast torch"
        assert {"concatenate + SDPA", "concatenate + SDPA, math", "naive: prompts with queries"} <= set(names)
    assert "no backward pass" in both["concatenate + FlexAttention"]["reason"]
    product = 2 * 12 * 197 * (197 + 2) * 64
    assert forward["spt-fast torch"]["limit"]["operations"] == 2 * product
    assert both["spt-fast torch"]["limit"]["operations"] == 6 * product


def test_attention_that_is_wrong_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.with_prompt_rows
    monkeypatch.setattr(attention, "with_prompt_rows", lambda *inputs: 1.2 * real(*inputs))
    record = results(attention, tmp_path, "--batch-size", "1", "--num-prompts", "2", "--rounds", "1")
    for row in record["rows"]:
        if row["peer"].startswith("naive"):
            assert row["kind"] == "missing" and "computes something else" in row["reason"]


def test_train_step(tmp_path: Path) -> None:
    arguments = ("--model", TINY, "--batch-size", "1", "--rounds", "1")
    record = results(train_step, tmp_path, *arguments, "--num-prompts", "3", "--num-prompts", "0")
    prompted, bare = peers(record, num_prompts=3), peers(record, num_prompts=0)
    assert list(prompted) == ["spt-fast", "naive VPT", "no prompts"]
    assert list(bare) == ["no prompts", "linear probe", "full fine-tuning, autocast"]
    for row in record["rows"]:
        assert len(row["seconds"]) == 1 and row["peak_bytes"] > 0 and row["relative_error"] < 0.1
        assert row["joules_per_image"] is None
    operations = {name: row["limit"]["operations"] for name, row in {**prompted, **bare}.items()}
    assert operations["spt-fast"] == operations["naive VPT"] > operations["no prompts"]
    assert operations["linear probe"] < operations["no prompts"] < operations["full fine-tuning, autocast"]


def test_a_step_that_is_wrong_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_step_ways.build

    def build(way: train_step_ways.Way, task: train_step_ways.Task) -> Any:
        forward, learned, prompts = real(way, task)
        return (lambda images: 2 * forward(images)) if way.kind == "naive" else forward, learned, prompts

    monkeypatch.setattr(train_step_ways, "build", build)
    arguments = ("--model", TINY, "--batch-size", "1", "--num-prompts", "3", "--rounds", "1")
    rows = peers(results(train_step, tmp_path, *arguments))
    assert rows["spt-fast"]["kind"] == "measured"
    assert "computes something else" in rows["naive VPT"]["reason"]


@pytest.mark.parametrize("kind", ["linear", "bare", "full"])
def test_useful_arithmetic_is_that_of_the_function(kind: str) -> None:
    """Without prompts and with all tokens read, it is what torch counts for the plain ViT, forward and backward."""
    backbone = timm.create_model(TINY, num_classes=0, global_pool="avg", class_token=False, depth=3)
    backbone = backbone.eval().requires_grad_(kind == "full")
    images = torch.randn(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        if kind == "bare":
            tokens = backbone.patch_embed(images).requires_grad_()
            backbone.blocks(tokens).sum().backward()
        elif kind == "full":
            backbone(images).sum().backward()
        else:
            backbone(images)
    found = counted.get_total_flops()
    width = backbone.embed_dim
    if kind == "bare":
        found -= 2 * 2 * 196 * width * 3 * width  # its gradient goes nowhere in a prompted ViT
    assert train_step.step_operations(backbone, batch=2, prompts=0, kind=kind) == found


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "dynamic_img_size": False}
    monkeypatch.setitem(prototypes.MODELS, "cpu", (TINY, arguments, 64))


@pytest.mark.usefixtures("small_model")
def test_prototypes(tmp_path: Path) -> None:
    arguments = ("--images", "200", "--num-prompts", "4", "--fraction", "0.3", "--fraction", "1")
    record = results(prototypes, tmp_path, *arguments)
    rows = peers(record, fraction=0.3)
    measured = [name for name, row in rows.items() if row["kind"] == "measured"]
    assert measured == ["k-means", "mini-batch k-means", "mean pooling", "max pooling", "random sample"]
    quoted = rows["paper: K-means"]
    assert quoted["kind"] == "quoted" and quoted["value_seconds"] == 0.3 * 86400
    assert rows[prototypes.RELEASED]["kind"] == "extrapolated"
    assert len(rows[prototypes.RELEASED]["measured"]) == len(prototypes.SMALL_FRACTIONS)
    whole = peers(record, fraction=1.0)
    assert whole["paper: K-means"]["value_seconds"] == 27.3 * 86400
    ratio = whole["k-means"]["limit"]["operations"] / rows["k-means"]["limit"]["operations"]
    assert ratio == pytest.approx(200 / 60)
    assert whole["k-means"]["inertia_per_token"] < whole["random sample"]["inertia_per_token"]


def test_the_least_work_for_prototypes_is_what_torch_counts() -> None:
    backbone = timm.create_model(TINY, num_classes=0, depth=3).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        list(prototypes.block_tokens(backbone, [torch.randn(2, 3, 224, 224)]))
    unit = Ceilings(1.0, 1.0, {"float32": 1.0}, {})
    limit = prototypes.build_limit(unit, backbone, 2, torch.float32)
    assert limit.operations == counted.get_total_flops()


@pytest.mark.usefixtures("small_model")
def test_prototypes_that_are_wrong_have_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prototypes.build

    def build(*arguments: Any) -> Any:
        built = real(*arguments)
        built.values.mul_(10)
        return built

    monkeypatch.setattr(prototypes, "build", build)
    record = results(prototypes, tmp_path, "--images", "200", "--num-prompts", "4", "--fraction", "0.2")
    reasons = [row["reason"] for row in record["rows"] if row["kind"] == "missing"]
    assert len(reasons) == 5
    assert sum("worse than scikit-learn" in reason for reason in reasons) == 2


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.SHARED, "cpu", 30_000)
    monkeypatch.setitem(scaling.CHUNK, "cpu", 4_000)

    def start_several(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """One process is this one, which has imported everything."""
        if "torch.distributed.run" in command:
            return subprocess.run(command, **options)
        assert command[1:3] == ["-m", "benchmarks.streaming"]
        done = CliRunner().invoke(streaming.app, command[3:])
        return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=start_several))
    arguments = ("--tokens", "20000", "--features", "8", "--clusters", "3")
    record = results(scaling, tmp_path, *arguments, "--processes", "2", "--rounds", "1")
    measured = [(row["peer"], row["case"]["processes"], row["case"]["tokens"]) for row in record["rows"]]
    assert measured == [
        ("spt-fast MiniBatchKMeans", 1, 20_000),
        ("scikit-learn MiniBatchKMeans", 1, 20_000),
        ("spt-fast MiniBatchKMeans", 2, 30_000),
    ]
    for row in record["rows"]:
        assert row["kind"] == "measured" and row["seconds"][0] > 0 and row["peak_bytes"] >= 0


def test_a_stream_that_fails_or_is_wrong_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_once(case: Row, library: str, device: torch.device, rounds: int) -> Row:
        if library == "scikit-learn":
            raise RuntimeError("failed: no memory")
        return {"seconds": [1.0], "peak_bytes": 1, "inertia_per_token": 1e9}

    monkeypatch.setattr(scaling, "run_once", run_once)
    size = ("--features", "8", "--clusters", "3", "--tokens", "2000", "--processes", "1")
    ours, theirs, _ = results(scaling, tmp_path, *size)["rows"]
    assert "times that of exact k-means" in ours["reason"] and theirs["reason"] == "failed: no memory"


def test_accuracy_speed(tmp_path: Path) -> None:
    arguments = ("--start", "mean_pool", "--images-per-class", "10", "--epochs", "3", "--num-prompts", "2")
    record = results(accuracy_speed, tmp_path, *arguments)
    (row,) = record["rows"]
    assert row["peer"] == "SPT-Deep, mean pooling" and row["case"]["images"] == 100
    (points,) = row["curves"]
    assert len(points) == 1 + 3
    seconds, accuracies = zip(*points, strict=True)
    assert list(seconds) == sorted(seconds) and seconds[-1] == row["seconds"][0]
    assert accuracies[0] < accuracies[-1] == row["test_accuracy"][0] <= 1


def test_a_start_that_learned_nothing_has_no_time(tmp_path: Path) -> None:
    record = accuracy_speed.Record("x", "y", torch.device("cpu"), tmp_path)
    accuracy_speed.add(record, {}, "start", [[[0.1, 0.1], [2.0, 0.15]]], classes=10)
    (row,) = record.rows
    assert row["kind"] == "missing" and "did not learn" in row["reason"]


def test_multi_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--model", TINY, "--batch-size", "3", "--tasks", "2", "--num-prompts", "2", "--rounds", "1")
    names = ["mixed tasks, one batch", "one task, one batch", "task by task"]
    record = results(multi_task, tmp_path, *arguments)
    assert [(row["peer"], row["kind"]) for row in record["rows"]] == [(name, "measured") for name in names]
    real = multi_task.MultiTaskViT.forward
    monkeypatch.setattr(multi_task.MultiTaskViT, "forward", lambda *inputs: 1.2 * real(*inputs))
    wrong = peers(results(multi_task, tmp_path, *arguments))[names[0]]
    assert "computes something else" in wrong["reason"]


def test_low_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(weight_dtype: str | None, *rest: Any) -> Row:
        if weight_dtype == "float8":
            raise InputError("float8 needs another device")
        return {"seconds": [1.0], "accuracy": [0.9], "accuracy_on_float32": [0.9]}

    monkeypatch.setattr(low_precision, "measure", measure)
    rows = peers(results(low_precision, tmp_path, "--epochs", "2"))
    assert list(rows) == ["float32", "int8", "float8"]
    assert rows["int8"]["accuracy"] == [0.9] and rows["float8"]["reason"] == "float8 needs another device"


def test_a_case_is_not_begun_when_the_time_is_up(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tokens", "400", "--tokens", "500", "--features", "8", "--minutes", "0"]
    done = CliRunner().invoke(kmeans.app, [*arguments, "--results", str(tmp_path)])
    assert done.exit_code == 1 and "measured nothing" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (attention, ("--model", "resnet18"), "--model must be one of"),
        (train_step, ("--peers", "nobody"), "--peers must be one of"),
        (accuracy_speed, ("--start", "guess"), "--start must be one of"),
        (kmeans, ("--device", "abacus"), "abacus"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, module: Any, arguments: tuple[str, ...], message: str
) -> None:
    done = CliRunner().invoke(module.app, [*arguments, "--results", str(tmp_path)])
    assert done.exit_code == 1 and message in done.output
    assert not list(tmp_path.iterdir())


def test_a_head_keeps_its_precision() -> None:
    head = train_step_ways.CastingHead(nn.Linear(3, 2))
    assert head(torch.randn(1, 3, dtype=torch.bfloat16)).dtype == torch.float32
