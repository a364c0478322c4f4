"""MultiTaskViT against every image run alone: through plain concatenation in float64, and through PromptedViT."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from judged_vits import VITS, assert_equal_to_1e_10, judge_vit, make_images, make_vit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import spt_fast.multi_task_vit
from benchmarks.naive_vpt import naive_forward
from spt_fast import Adapter, MultiTaskViT, PromptedViT, load_adapter, save_adapter
from spt_fast.errors import AdapterMismatchError, CheckpointError, InputError, MissingFileError
from spt_fast.kernels import prompt_attention_packed

# name: (form, prompts, classes, pool)
TASKS: dict[str, tuple[str, int, int, Any]] = {
    "deep": ("deep", 5, 7, None),
    "deep token": ("deep", 2, 3, "token"),
    "deep avg": ("deep", 9, 1, "avg"),
    "deep prompts": ("deep", 3, 4, "avg_with_prompts"),
    "deep more prompts": ("deep", 6, 7, "avg_with_prompts"),
    "shallow": ("shallow", 4, 5, None),
    "shallow token": ("shallow", 7, 2, "token"),
    "shallow avg": ("shallow", 1, 6, "avg"),
    "shallow prompts": ("shallow", 2, 3, "avg_with_prompts"),
    "shallow more prompts": ("shallow", 8, 2, "avg_with_prompts"),
}


def make_task(backbone: VisionTransformer, name: str) -> PromptedViT:
    """The task on ``backbone``; prompts and head are the same random ones every time."""
    form, num_prompts, num_classes, pool = TASKS[name]
    generator = torch.Generator().manual_seed(list(TASKS).index(name))
    num_layers = len(backbone.blocks) if form == "deep" else 1
    prompts = 1.5 * torch.randn(num_layers, num_prompts, backbone.embed_dim, generator=generator)
    model = PromptedViT(backbone, prompts, num_classes=num_classes, pool=pool).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def possible(name: str) -> list[str]:
    """The tasks that the named ViT can have."""
    token = VITS[name][1].get("class_token", True) and name != "map"
    return [task for task, (*_, pool) in TASKS.items() if pool != "token" or token]


def make_model(vit: str, tasks: list[str]) -> MultiTaskViT:
    backbone = make_vit(vit)
    return MultiTaskViT(backbone, {task: make_task(backbone, task) for task in tasks})


def alone(vit: str, images: Tensor, tasks: list[str]) -> list[Tensor]:
    """Logits of each image by plain concatenation in float64, as if there were nothing else."""
    judge: Any = judge_vit(vit)
    logits = []
    with torch.no_grad():
        for image, name in zip(images.double(), tasks, strict=True):
            task = make_task(make_vit(vit), name).double()
            logits.append(naive_forward(judge, task.prompts, task.head, image[None], pool=task.pool)[0])
    return logits


def check_alone(logits: Tensor, vit: str, images: Tensor, tasks: list[str]) -> None:
    assert len(logits) == len(tasks)
    for row, expected, task in zip(logits, alone(vit, images, tasks), tasks, strict=True):
        assert_equal_to_1e_10(row[: len(expected)], expected, task)
        assert (row[len(expected) :] == -torch.inf).all(), task


# -------------------------------------------------------------------------------------- equal to every image on its own


@pytest.mark.parametrize("vit", VITS)
def test_equals_each_image_alone_in_float64(vit: str) -> None:
    tasks = possible(vit)
    model = make_model(vit, tasks).double()
    order = tasks + random.Random(0).choices(tasks, k=3)
    random.Random(1).shuffle(order)
    images = make_images(model.backbone, len(order))
    logits = model(images.double(), order)
    assert logits.shape == (len(order), 7)
    check_alone(logits, vit, images, order)


@pytest.mark.parametrize(
    "tasks",
    [
        ["deep"],  # one image
        ["shallow prompts"],
        ["deep avg", "deep avg"],  # one task that many times
        ["shallow", "deep"],  # to be sorted
        ["deep", "shallow"],  # sorted already
        ["deep prompts", "deep token", "deep prompts"],
        ["deep prompts", "deep more prompts"],
        ["shallow more prompts", "shallow prompts", "shallow more prompts"],
        ["shallow token", "shallow", "shallow avg"],
        ["deep"] * 5 + ["shallow avg"] + ["deep token"] * 2,  # as uneven as heads get
    ],
    ids="+".join,
)
def test_any_batch_of_a_model_of_all_tasks(tasks: list[str]) -> None:
    model = make_model("registers", list(TASKS)).double()
    images = make_images(model.backbone, len(tasks))
    check_alone(model(images.double(), tasks), "registers", images, tasks)


def test_each_row_belongs_to_its_image_in_any_order() -> None:
    model = make_model("plain", list(TASKS)).double()
    tasks = list(TASKS) * 2
    images = make_images(model.backbone, len(tasks)).double()
    expected = model(images, tasks)
    for seed in range(4):
        order = list(range(len(tasks)))
        random.Random(seed).shuffle(order)
        logits = model(images[order], [tasks[index] for index in order])
        torch.testing.assert_close(logits, expected[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_prompted_vit_on_a_backbone_in_that_type(dtype: torch.dtype) -> None:
    """Float32 to 1e-5 of the largest logit, bfloat16 to 3e-2: the sums of both run in another order."""
    names = list(TASKS)
    model = make_model("qk_norm", names).cast_backbone(dtype)
    images = make_images(model.backbone, len(names))
    logits = model(images, names)
    assert logits.dtype == torch.float32
    for index, name in enumerate(names):
        expected = make_task(make_vit("qk_norm"), name).cast_backbone(dtype)(images[index][None])[0].detach()
        error = (logits[index, : len(expected)] - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2), name


def test_a_softmax_is_over_the_own_classes() -> None:
    model = make_model("plain", ["deep", "shallow token"])
    images = make_images(model.backbone, 2)
    probabilities = model(images, ["shallow token", "deep"]).softmax(dim=1)
    expected = make_task(make_vit(), "shallow token")(images[:1]).softmax(dim=1)
    torch.testing.assert_close(probabilities[:1, :2], expected)
    assert (probabilities[0, 2:] == 0).all() and (probabilities[1] > 0).all()


def test_an_empty_batch() -> None:
    model = make_model("plain", ["deep", "shallow"])
    assert model(torch.zeros(0, 3, 32, 32), []).shape == (0, 7)


# ------------------------------------------------------------------------------------------------------ how it is done


def test_prompts_are_projected_once_and_tasks_share_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of many tasks makes as many calls as one of a single task, and none for keys and values of prompts."""
    tasks = [name for name in TASKS if TASKS[name][0] == "deep" and TASKS[name][3] is None]
    backbone = make_vit()
    model = MultiTaskViT(backbone, {f"{index}": make_task(backbone, tasks[0]) for index in range(6)})
    for index in range(6):
        with torch.no_grad():
            model._banks.tasks[f"{index}"].prompts.fill_(torch.nan)  # never read again
    calls = []
    original = nn.functional.linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape)
        return original(x, *rest)

    monkeypatch.setattr(nn.functional, "linear", counted)
    images = make_images(backbone, 6)
    one = model(images, ["3"] * 6)
    for_one, calls[:] = list(calls), []
    many = model(images, [f"{index}" for index in range(6)])
    assert calls == for_one and len(calls) > 0
    assert one.isfinite().all()
    torch.testing.assert_close(one, many)


def test_prompts_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention is given the bank of all tasks and an index, no prompts per image."""
    model = make_model("plain", ["deep", "deep token", "deep avg", "shallow"])
    seen = []

    def spy(qkv: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
        seen.append((keys, how["prompt_index"], how["prompt_lengths"]))
        return prompt_attention_packed(qkv, keys, values, **how)

    monkeypatch.setattr("spt_fast.prompted_block.prompt_attention_packed", spy)
    tasks = ["deep token", "deep", "deep token", "deep"]
    model(make_images(model.backbone, 4), tasks)
    bank = model._banks.prompts[True].keys_values[0].keys
    keys, index, lengths = seen[0]
    assert keys.data_ptr() == bank.data_ptr() and keys.shape[0] == 3
    assert sorted(index.tolist()) == [0, 0, 1, 1]
    # Cut to the most prompts in the batch (5), not in the model (9).
    assert bank.shape[2] == 9 and keys.shape[2] == 5 and lengths.tolist() == [5, 2, 5]
    seen.clear()
    model(make_images(model.backbone, 1), ["deep token"])
    assert seen[0][0].shape[2] == 2 and seen[0][2] is None


@pytest.mark.parametrize("batch", [["deep", "deep token"], list(TASKS)], ids=["deep", "all"])
def test_compiled_without_graph_breaks(batch: list[str]) -> None:
    model = make_model("plain", list(TASKS)).double()
    torch._dynamo.reset()
    compiled = torch.compile(model.logits, fullgraph=True, backend="aot_eager")
    images = make_images(model.backbone, len(batch)).double()
    with torch.no_grad():
        for order in (batch, batch[::-1]):
            torch.testing.assert_close(
                compiled(images, model.plan(order)), model(images, order), rtol=1e-10, atol=1e-10
            )


def test_the_whole_model_compiles() -> None:
    model = make_model("plain", ["deep", "shallow token"])
    torch._dynamo.reset()
    images, tasks = make_images(model.backbone, 3), ["deep", "shallow token", "deep"]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager")(images, tasks), model(images, tasks)
        )


def test_a_plan_serves_many_batches_and_outlives_its_tasks() -> None:
    model = make_model("plain", ["deep", "deep token", "shallow"]).double()
    tasks = ["shallow", "deep", "deep token"]
    plan = model.plan(tasks)
    model.drop("deep")
    for seed in (0, 1):
        images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        check_alone(model.logits(images.double(), plan), "plain", images, tasks)


def test_nothing_learns() -> None:
    model = make_model("plain", ["deep", "shallow"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(make_images(model.backbone, 2), ["deep", "shallow"]).requires_grad
    assert not model.train().backbone.training


# -------------------------------------------------------------------------------------------------- adding and dropping


def test_tasks_come_and_go() -> None:
    backbone = make_vit("registers").double()
    model = MultiTaskViT(backbone, {})
    there: list[str] = []
    # The longest and the widest come late and go early; names return.
    steps = "+deep token,+shallow avg,+deep avg,+shallow more prompts,-deep avg,+deep prompts,-deep token,"
    steps += "-shallow more prompts,+deep,+deep token,-shallow avg,-deep prompts,-deep,-deep token,+shallow"
    for step in steps.split(","):
        name = step[1:]
        if step[0] == "+":
            model.add(name, make_task(backbone, name).double())
            there.append(name)
        else:
            model.drop(name)
            there.remove(name)
        assert model.tasks == there
        images = make_images(backbone, len(there))
        logits = model(images.double(), there)
        assert logits.shape[1] == max((TASKS[name][2] for name in there), default=0)
        check_alone(logits, "registers", images, there)
    model.drop("shallow")
    assert model.tasks == [] and model.classes == {}


def test_adding_projects_the_new_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that many tasks, added one by one, are not projected again and again."""
    backbone = make_vit()
    model = make_model("plain", ["deep", "deep avg", "shallow"])
    projected = []
    original = spt_fast.task_banks.prompt_keys_values

    def counted(block: Any, prompts: Tensor) -> Any:
        projected.append(len(prompts))
        return original(block, prompts)

    monkeypatch.setattr("spt_fast.task_banks.prompt_keys_values", counted)
    model.add("deep token", make_task(backbone, "deep token"))
    assert projected == [1] * len(backbone.blocks)
    model.drop("deep")
    model.add("shallow avg", make_task(backbone, "shallow avg"))
    assert len(projected) == len(backbone.blocks)
    images = make_images(backbone, 2)
    expected = make_task(make_vit(), "deep token")(images[1:]).detach()
    torch.testing.assert_close(
        model(images, ["deep avg", "deep token"])[1:, :3], expected, rtol=1e-4, atol=1e-5
    )


def test_every_kind_of_adapter(tmp_path: Path) -> None:
    backbone = make_vit()
    task = make_task(backbone, "deep prompts")
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, task, classes=["a", "b", "c", "d"])
    elsewhere = load_adapter(file, make_vit())  # on another copy of the backbone
    model = MultiTaskViT(
        backbone,
        {"path": file, "text": str(file), "adapter": Adapter.load(file), "model": elsewhere, "unnamed": task},
    )
    assert model.classes == {
        **{name: ["a", "b", "c", "d"] for name in ("path", "text", "adapter", "model")},
        "unnamed": ["0", "1", "2", "3"],
    }
    image = make_images(backbone, 1)
    logits = model(image.expand(5, -1, -1, -1), model.tasks)
    torch.testing.assert_close(logits, task(image).detach().expand(5, -1), rtol=1e-4, atol=1e-5)


def test_a_task_is_taken_as_it_is_when_it_is_added() -> None:
    backbone = make_vit()
    task = make_task(backbone, "deep")
    model = MultiTaskViT(backbone, {"deep": task})
    images = make_images(backbone, 2)
    before = model(images, ["deep"] * 2)
    with torch.no_grad():
        for parameter in (task.prompts, *task.head.parameters()):
            parameter.add_(1)
    assert torch.equal(model(images, ["deep"] * 2), before)
    assert torch.equal(copy.deepcopy(model).double().float()(images, ["deep"] * 2), before)


def test_casts_keep_nothing_stale() -> None:
    model = make_model("plain", ["deep", "shallow prompts"])
    backbone, tasks = model.backbone, ["deep", "shallow prompts"]
    images = make_images(backbone, 2)
    exact = copy.deepcopy(model).cast_backbone(torch.float64)
    # The heads stay in float32, the rest is exact.
    assert exact(images, tasks).dtype == torch.float32
    check_alone(exact.double()(images.double(), tasks), "plain", images, tasks)
    model.cast_backbone(torch.bfloat16)
    assert model.backbone is not backbone and next(backbone.parameters()).dtype == torch.float32
    assert model(images, tasks).dtype == torch.float32
    again = model.cast_backbone(torch.bfloat16).backbone
    assert again is model.backbone
    model.add("deep avg", make_task(make_vit(), "deep avg"))  # of the float32 backbone: the same one
    assert model(images, ["deep avg", "deep"]).isfinite()[:, 0].all()
    assert pickle.loads(pickle.dumps(model)).tasks == model.tasks


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_in_a_batch() -> None:
    model = make_model("plain", ["deep", "shallow"])
    images = make_images(model.backbone, 2)
    for tasks, sentence in {
        ("deep", "birds"): r"tasks\[1\] is 'birds', which is no task of this model; it has deep, shallow",
        ("deep", 3): r"tasks\[1\] is 3, ",
        ("deep",): "tasks must name one task for each of the 2 images, got 1",
        ("deep",) * 3: "each of the 2 images, got 3",
        (): "each of the 2 images, got 0",
    }.items():
        with pytest.raises(InputError, match=sentence):
            model(images, tasks)
    with pytest.raises(InputError, match="got the string 'deep'"):
        model(images, "deep")
    with pytest.raises(InputError, match="images are 16x16"):
        model(images[:, :, :16, :16], ["deep", "deep"])
    with pytest.raises(InputError, match=r"has none yet: add\(name, adapter\)"):
        MultiTaskViT(make_vit(), {})(images, ["deep", "deep"])


def test_what_cannot_be_added_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    backbone = make_vit()
    model = make_model("plain", ["deep", "shallow"])
    images, tasks = make_images(backbone, 2), ["shallow", "deep"]
    before, logits = model._banks, model(images, tasks)
    (tmp_path / "text").write_text("this is no adapter")
    mine, other = make_task(backbone, "deep"), make_task(make_vit("layer_scale"), "deep")
    changed = make_vit()
    with torch.no_grad():
        changed.blocks[1].attn.qkv.bias.add_(1)
    save_adapter(tmp_path / "changed.safetensors", make_task(changed, "deep"))
    for name, adapter, error, sentence in (
        ("deep", mine, InputError, "there is a task 'deep' already"),
        (3, mine, InputError, "must be a string, got 3"),
        (
            "new",
            other,
            AdapterMismatchError,
            "^task 'new': .*another backbone: this one has weights .* instead of",
        ),
        ("new", make_task(changed, "deep"), AdapterMismatchError, "^task 'new': .*weights"),
        ("new", tmp_path / "changed.safetensors", AdapterMismatchError, "^task 'new': .*weights"),
        ("new", tmp_path / "none", MissingFileError, "none does not exist"),
        ("new", tmp_path / "text", CheckpointError, "^task 'new': .*is not an adapter"),
        (
            "new",
            mine.prompts,
            InputError,
            "^task 'new': expected an Adapter, its path or a PromptedViT, got Parameter",
        ),
    ):
        with pytest.raises(error, match=sentence):
            model.add(name, adapter)  # type: ignore[arg-type]
        assert model._banks is before
    with pytest.raises(InputError, match="no task 'birds' to drop; it has deep, shallow"):
        model.drop("birds")
    assert model._banks is before and torch.equal(model(images, tasks), logits)
    with pytest.raises(AdapterMismatchError, match="task 'b'"):
        MultiTaskViT(backbone, {"a": mine, "b": other})


def test_an_interrupted_addition_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("plain", ["deep", "shallow"])
    backbone, before = model.backbone, model._banks
    images = make_images(backbone, 2)
    logits = model(images, ["deep", "shallow"])
    original = spt_fast.task_banks.prompt_keys_values

    def runs_out_of_memory(block: Any, prompts: Tensor) -> Any:
        if block is backbone.blocks[1]:
            raise torch.OutOfMemoryError("no memory")
        return original(block, prompts)

    monkeypatch.setattr("spt_fast.task_banks.prompt_keys_values", runs_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model.add("deep avg", make_task(backbone, "deep avg"))
    assert model._banks is before and model.tasks == ["deep", "shallow"]
    assert torch.equal(model(images, ["deep", "shallow"]), logits)
