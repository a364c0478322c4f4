"""One training step: padding, compilation, the CUDA graph's bookkeeping, and what is read back when."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_processes import FORKS, finish, start
from tiny import learned, squares, tiny_backbone, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters
from training_cases import CONFIG, IMAGES, assert_same, scalars

from spt_fast import PromptedViT, train
from spt_fast.optimizer import PromptAdamW
from spt_fast.replayed_call import ReplayedCall
from spt_fast.training_step import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")


def random_batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.randint(0, 3, (count,), generator=generator)


def step_of(model: PromptedViT, **kwargs: Any) -> tuple[TrainingStep, Tensor]:
    sums = torch.zeros(3, dtype=torch.float64)
    optimizer = PromptAdamW(
        model.prompts, model.head, lr=0.01, weight_decay=0.1, head_weight_decay=0.2, fused=True
    )
    return TrainingStep(model, optimizer, sums, batch_size=6, **kwargs), sums


@pytest.mark.parametrize("count", [6, 4, 1])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_and_totals_are_those_of_the_mean_loss(
    count: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded as a compiled step pads, and not padded: as float64 autograd of the mean."""
    images, labels = random_batch(count, seed=count)
    targets = torch.softmax(torch.randn(count, 3), dim=1) if mixed else None
    judge = tiny_model(backbone=tiny_backbone().double()).double()
    logits = judge(images.double())
    mean = F.cross_entropy(
        logits, labels if targets is None else targets.double(), label_smoothing=0.1, reduction="mean"
    )
    mean.backward()
    hits = (logits.argmax(dim=1) == labels).sum().item()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for compile in (False, True):
        model = tiny_model()
        step, sums = step_of(model, label_smoothing=0.1, compile=compile)
        gradients: dict[str, Tensor] = {}

        def keep(closure: Any = None, *, model: Any = model, kept: dict[str, Tensor] = gradients) -> None:
            kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        monkeypatch.setattr(step._optimizer, "step", keep)
        step(images, labels, targets)
        assert gradients.keys() == {"prompts", "head.weight", "head.bias"}
        for name, gradient in gradients.items():
            expected = judge.get_parameter(name).grad
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
        assert sums.tolist() == pytest.approx([mean.item() * count, hits, count], rel=1e-5)
        assert step.totals.tolist() == pytest.approx(sums.tolist(), rel=1e-6)
        assert (step.compile_seconds is not None) == compile


def test_nothing_to_learn_from_is_no_step() -> None:
    model = tiny_model()
    before = learned(model)
    step, sums = step_of(model)
    step(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))
    assert_same(learned(model), before)
    assert sums.tolist() == [0, 0, 0]


def test_the_last_batch_of_an_epoch_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 images in batches of 8, three epochs, validation between: the step is compiled once."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, **options))
    model, eager = tiny_model(), tiny_model()
    result = train(
        model, squares(IMAGES), squares(5), output=tmp_path / "a", config=replace(CONFIG, compile=True)
    )
    assert len(graphs) == 1
    assert result.compile_seconds is not None and result.compile_seconds > 0
    train(eager, squares(IMAGES), squares(5), output=tmp_path / "b", config=CONFIG)
    for name, value in learned(eager).items():
        torch.testing.assert_close(learned(model)[name], value, rtol=1e-4, atol=1e-5)


def compile_a_run(folder: Path, told: Any) -> None:
    """Train eagerly and compiled, compare, and tell how much compiled code was found and how much was missing."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.parent / "compiled")
    models = []
    for compile in (False, True):
        models.append(tiny_model(backbone=tiny_backbone(depth=1), deep=False))
        config = replace(CONFIG, epochs=1, batch_size=4, compile=compile)
        train(models[-1], squares(8), output=folder / str(compile), config=config)
    for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    told.put((hits, counters["inductor"]["fxgraph_cache_miss"]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_code_is_kept_for_the_next_run(tmp_path: Path) -> None:
    counts = []
    for run in ("first", "second"):
        told = FORKS.SimpleQueue()
        assert finish(start(compile_a_run, tmp_path / run, told)) == [0]
        counts.append(told.get())
    assert counts[0][0] == 0 and counts[0][1] > 0, "the first run must have had to compile"
    assert counts[1][0] > 0 and counts[1][1] == 0, counts


def test_losses_are_read_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step's result is looked at before the epoch is over, and TensorBoard still gets it step by step."""
    looks: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(Tensor, name)

        def spied(self: Tensor, *args: Any, name: str = name, original: Any = original) -> Any:
            if self.numel() == 3 or (self.ndim == 0 and self.requires_grad):
                looks.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, spied)
    config = replace(CONFIG, epochs=2, batch_size=1, checkpoint_minutes=1e9)
    train(tiny_model(), squares(IMAGES), output=tmp_path, config=config)
    assert looks == ["tolist"] * 2  # the sums, at the end of each epoch
    monkeypatch.undo()
    logged = scalars(tmp_path, "train/batch_loss")
    assert [step for step, _ in logged] == [10, 20, 30, 40]
    assert all(value > 0 for _, value in logged)


class FakeGraph:
    """What a CUDA graph does, on a CPU: recording runs nothing, replaying runs what was recorded."""

    recorded: list[FakeGraph] = []

    def replay(self) -> None:
        self.function(*self.inputs)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    FakeGraph.recorded = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    original = ReplayedCall._record

    def record(call: ReplayedCall, tensors: tuple[Tensor, ...]) -> None:
        function = call._function

        @contextlib.contextmanager
        def recording(graph: FakeGraph, **_: Any) -> Iterator[None]:
            graph.inputs, graph.function = call._inputs, function
            FakeGraph.recorded.append(graph)
            call._function = lambda *_: None  # recorded, not run
            yield
            call._function = function

        monkeypatch.setattr(torch.cuda, "graph", recording)
        original(call, tensors)

    monkeypatch.setattr(ReplayedCall, "_record", record)
    return FakeGraph.recorded


class FakeStream:
    def wait_stream(self, other: Any) -> None: ...


def test_a_replayed_call_happens_as_often_as_it_is_called(fake_graphs: list[FakeGraph]) -> None:
    total = torch.zeros(4)
    call = ReplayedCall(lambda values: total.add_(values), torch.device("cuda"))
    given = torch.randn(9, 4)
    for values in given:
        call(values)
    torch.testing.assert_close(total, given.sum(dim=0))
    assert len(fake_graphs) == 1


def test_a_replayed_step_follows_the_schedule(fake_graphs: list[FakeGraph]) -> None:
    """Rates that change from step to step, batches of changing size: as without a graph."""
    models = [tiny_model(), tiny_model()]
    for model, replayed in zip(models, (False, True), strict=True):
        step, _ = step_of(model)
        optimizer = step._optimizer
        step._batch_size = 6
        if replayed:
            optimizer._rates = torch.empty(len(optimizer.param_groups))
            send = optimizer._rates
            optimizer.send_rates = lambda o=optimizer, r=send: r.copy_(  # type: ignore[method-assign]
                torch.tensor([group["lr"] for group in o.param_groups])
            )
            step._advance = ReplayedCall(step._take, torch.device("cuda"))
        for number in range(8):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + number)
            step(*random_batch(6 - number % 3, seed=number))
    assert len(fake_graphs) == 1
    for name, value in learned(models[0]).items():
        torch.testing.assert_close(learned(models[1])[name], value, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_recorded_is_said_and_called(
    fake_graphs: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = torch.zeros(())

    def refuse(call: ReplayedCall, tensors: tuple[Tensor, ...]) -> None:
        monkeypatch.setattr(torch.cuda, "graph", failing)
        ReplayedCall_record(call, tensors)

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.undo()
    ReplayedCall_record = ReplayedCall._record
    for name, fake in (
        ("Stream", lambda device: FakeStream()),
        ("current_stream", lambda device: FakeStream()),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(ReplayedCall, "_record", refuse)
    call = ReplayedCall(lambda value: total.add_(value), torch.device("cuda"))
    with pytest.warns(
        RuntimeWarning, match="could not be recorded as a CUDA graph .* not permitted"
    ) as warned:
        for value in range(6):
            call(torch.tensor(float(value)))
    assert len(warned) == 1 and total == 15
