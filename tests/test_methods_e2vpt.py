"""E2VPT against the equations of its paper, written out."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from judged_vits import NUM_CLASSES, judge_vit, make_images, make_vit
from naive_prompts import (
    CASES,
    assert_low_precision_and_compiled,
    assert_matches,
    assert_moves_what_it_adds,
    assert_round_trip,
    make_prompts,
    naive_block,
    naive_logits,
    naive_sequence,
    randomise,
)
from tiny import squares, tiny_backbone
from torch import Tensor
from training_cases import Interruption, assert_same, interrupt_after

from spt_fast import Adapter, TrainingConfig, load_adapter, train
from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.pruned_training import Pruning, choose, importance, prune, train_pruned


def judge(backbone: Any, state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    tokens, prefix = naive_sequence(backbone, images), backbone.num_prefix_tokens
    segments = state["segment_mask"].shape[1]
    mask = state["segment_mask"].repeat_interleave(backbone.embed_dim // segments, dim=1)
    outputs = tokens[:, :0]
    for index, block in enumerate(backbone.blocks):
        prompts = torch.stack([state["prompts"][index] * mask] * len(images))
        sequence = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)
        own = state["key_value_prompts"][index]
        sequence = naive_block(block, sequence, more=(own, own))
        outputs = sequence[:, prefix : prefix + prompts.shape[1]]
        tokens = torch.cat([sequence[:, :prefix], sequence[:, prefix + prompts.shape[1] :]], dim=1)
    return tokens, outputs


def e2vpt(
    vit: str = "plain", *, num_prompts: int = 5, noise: bool = False, pool: Any = None, **options: Any
) -> E2VPTViT:
    backbone = make_vit(vit)
    prompts = make_prompts(backbone, len(backbone.blocks), num_prompts)
    model = build_model("e2vpt", backbone, num_classes=NUM_CLASSES, prompts=prompts, pool=pool, **options)
    assert isinstance(model, E2VPTViT)
    if noise:
        randomise(model)
    return model


@pytest.mark.parametrize(("vit", "pool"), [*CASES, ("depth_1", "avg_with_prompts")])
def test_logits_and_gradients_are_those_of_the_equations(vit: str, pool: Any) -> None:
    model = e2vpt(
        vit, pool=pool, num_key_value_prompts=3, checkpoint_blocks=pool == "token", num_segments=4, noise=True
    )
    with torch.no_grad():
        model.segment_mask[[0, 2, 4], [1, 3, 0]] = 0
    assert_matches(model, vit, judge, pool)


def test_what_it_adds_moves_and_nothing_else() -> None:
    model = e2vpt("registers")
    assert_moves_what_it_adds(model, model.backbone, still=("segment_mask",))


def test_an_adapter_gives_the_same_model(tmp_path: Path) -> None:
    model = e2vpt("no_qkv_bias", num_key_value_prompts=2, num_segments=3, prompt_dropout=0.1, noise=True)
    with torch.no_grad():
        model.segment_mask[1, 2] = 0
    assert_round_trip(model, tmp_path)


def test_bfloat16_and_compiled() -> None:
    backbone = make_vit("registers")
    assert_low_precision_and_compiled("e2vpt", make_prompts(backbone, len(backbone.blocks)))


def test_number_of_parameters() -> None:
    model = e2vpt(num_prompts=20)
    learning = (model.prompts, *model.added_parameters().values())
    assert sum(value.numel() for value in learning) == 3 * 48 * (20 + 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": torch.ones(1, 5, 48)}, r"deep prompts \[3, P, 48\], got \[1, 5, 48\]"),
        ({"num_key_value_prompts": 0}, "num_key_value_prompts must be a whole number of at least 1"),
        ({"num_key_value_prompts": 2.5}, "num_key_value_prompts must be a whole number of at least 1"),
        ({"num_segments": True}, "num_segments must be a whole number of at least 1, got True"),
        ({"num_segments": 7}, "num_segments must divide the width 48, got 7"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        E2VPTViT(make_vit(), num_classes=2, **{"prompts": torch.ones(3, 5, 48), **arguments})


# Pruning


def test_importance_is_the_mean_size_of_the_derivatives_by_the_masks() -> None:
    """One image after the other, with a mask on prompts and one on segments."""
    model = e2vpt("registers", noise=True, pool="token", num_segments=4).double()
    images = make_images(model.backbone, 7).double()
    labels = torch.arange(7)
    tokens, segments = importance(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])

    state = {name: value.detach() for name, value in model.task_state().items()}
    expected_tokens, expected_segments = torch.zeros(5).double(), torch.zeros(5, 4).double()
    for image, label in zip(images, labels, strict=True):
        of_tokens = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
        of_segments = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
        masked = {**state, "segment_mask": of_tokens * of_segments}
        x, prompts = judge(judge_vit("registers"), masked, image[None])
        logits = naive_logits(
            judge_vit("registers"), (state["head.weight"], state["head.bias"]), x, prompts, "token"
        )
        loss = logits[0].exp().sum().log() - logits[0, label]
        by_token, by_segment = torch.autograd.grad(loss, [of_tokens, of_segments])
        expected_tokens += by_token[:, 0].abs() / 7
        expected_segments += by_segment.abs() / 7
    # The package takes the loss in float32.
    torch.testing.assert_close(tokens, expected_tokens, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(segments, expected_segments, rtol=1e-5, atol=1e-7)


def test_the_least_important_go_prompts_first() -> None:
    tokens = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4])
    segments = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    pruning = choose(tokens, segments, tokens=0.45, segments=0.3)
    assert pruning.kept == [0, 2, 4]
    for prompt, mask in zip(pruning.kept, pruning.segment_mask, strict=True):
        lowest = sorted(range(8), key=lambda segment: float(segments[prompt, segment]))[:2]
        assert mask == [0 if segment in lowest else 1 for segment in range(8)]
    everything = choose(tokens, segments, tokens=0.0, segments=0.0)
    assert everything.kept == [0, 1, 2, 3, 4] and everything.segment_mask == [[1] * 8] * 5
    assert len(choose(torch.rand(100), torch.rand(100, 8), tokens=0.29, segments=0).kept) == 71
    for share in (-0.1, 1.0, float("nan"), "0.5", True):
        with pytest.raises(InputError, match=r"tokens, a share to prune, must be a number in \[0, 1\)"):
            choose(tokens, segments, tokens=share, segments=0.0)


def test_pruned_prompts_are_no_rows_and_pruned_segments_are_zero() -> None:
    """Absent, not zero: a row of zeros would still take its share of the softmax."""
    model = e2vpt(noise=True, pool="avg_with_prompts", num_segments=4)
    pruning = Pruning([1, 4], [[1, 0, 1, 1], [0, 1, 1, 0]])
    smaller = prune(model, pruning)
    assert smaller.prompts.shape == (3, 2, 48) and smaller.options == model.options
    assert_matches(smaller, "plain", judge, "avg_with_prompts")
    state = {name: value.detach().double() for name, value in model.task_state().items()}
    state["prompts"] = state["prompts"][:, [1, 4]]
    state["segment_mask"] = torch.tensor(pruning.segment_mask).double()
    images = make_images(model.backbone).double()
    tokens, prompts = judge(judge_vit("plain"), state, images)
    head = state["head.weight"], state["head.bias"]
    expected = naive_logits(judge_vit("plain"), head, tokens, prompts, "avg_with_prompts")
    torch.testing.assert_close(smaller(images), expected, rtol=1e-10, atol=1e-10)
    again = prune(smaller, Pruning([1], [[1, 1, 0, 1]]))
    assert again.segment_mask.tolist() == [[0, 1, 0, 0]]


def tiny(seed: int = 0) -> E2VPTViT:
    torch.manual_seed(seed)
    return E2VPTViT(tiny_backbone(), torch.randn(2, 4, 32), num_classes=3, pool="avg", num_segments=4)


def pruned_run(folder: Path, *, seed: int = 0, **kwargs: Any) -> tuple[E2VPTViT, Any]:
    shares = {"tokens": 0.5, "segments": 0.25, **kwargs.pop("shares", {})}
    model = tiny(seed)
    return train_pruned(
        model, squares(30), squares(9, seed=1), output=folder, config=CONFIG, **shares, **kwargs
    )


CONFIG = TrainingConfig(epochs=4, warmup_epochs=1, batch_size=10, learning_rate=0.03, dtype="float32")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, E2VPTViT, Any]:
    folder = tmp_path_factory.mktemp("pruned")
    return folder, *pruned_run(folder)


def test_what_is_left_goes_back_to_its_start_and_learns(finished: tuple[Path, E2VPTViT, Any]) -> None:
    folder, model, result = finished
    record = json.loads((folder / "pruning.json").read_text())
    trained, start = load_adapter(folder / "trained" / "last.safetensors", tiny_backbone()), tiny()
    images = [squares(30)[index] for index in range(30)]
    batch = torch.stack([image for image, _ in images]), torch.tensor([label for _, label in images])
    expected = importance(cast(E2VPTViT, trained), [batch])
    torch.testing.assert_close(
        torch.tensor(record["token_importance"]), expected[0].float(), rtol=1e-4, atol=1e-6
    )
    assert record["kept"] == choose(*expected, tokens=0.5, segments=0.25).kept
    assert model.segment_mask.tolist() == record["segment_mask"] and model.prompts.shape == (2, 2, 32)

    again = prune(start, Pruning(record["kept"], record["segment_mask"]))
    assert torch.equal(again.prompts, start.prompts[:, record["kept"]])
    plain = train(again, squares(30), squares(9, seed=1), output=folder / "again", config=CONFIG)
    assert_same(dict(again.task_state()), dict(model.task_state()))
    assert plain.metrics[-1]["train_loss"] == result.metrics[-1]["train_loss"]
    assert result.best_accuracy is not None and result.best_accuracy > 0.7
    stored = load_adapter(folder / "rewound" / "last.safetensors", tiny_backbone())
    assert_same(dict(stored.task_state()), dict(model.task_state()))
    assert Adapter.load(folder / "rewound" / "last.safetensors").config["pruning"]["kept"] == record["kept"]


@pytest.mark.parametrize("steps", [2, 4 * 3 + 5])
def test_an_interrupted_procedure_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, steps: int, finished: tuple[Path, E2VPTViT, Any]
) -> None:
    """In the first run and in the second, by a model that starts elsewhere."""
    with pytest.raises(Interruption):
        pruned_run(tmp_path, progress=interrupt_after(steps))
    with pytest.raises(InputError, match="already holds a run"):
        pruned_run(tmp_path)
    with pytest.raises(
        InputError, match=r"prunes \{'tokens': 0.5, 'segments': 0.25\} and this call asks for"
    ):
        pruned_run(tmp_path, resume=True, shares={"tokens": 0.25})
    model, _ = pruned_run(tmp_path, seed=1, resume=True)
    assert_same(dict(model.task_state()), dict(finished[1].task_state()))
