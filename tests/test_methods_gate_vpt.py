"""Gated prompt tuning against the equations of its paper, written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from judged_vits import NUM_CLASSES, make_images, make_vit
from naive_prompts import (
    CASES,
    assert_low_precision_and_compiled,
    assert_matches,
    assert_moves_what_it_adds,
    assert_round_trip,
    make_prompts,
    naive_block,
    naive_sequence,
    randomise,
)
from torch import Tensor

from spt_fast.errors import InputError
from spt_fast.methods import build_model
from spt_fast.methods.gate_vpt import GatedPromptViT


def judge(backbone: Any, state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts between prefix and patch tokens, as the authors put them."""
    tokens, prefix = naive_sequence(backbone, images), backbone.num_prefix_tokens
    prompts = torch.stack([state["prompts"][0]] * len(images))
    for index, block in enumerate(backbone.blocks):
        sequence = torch.cat([tokens[:, :prefix], prompts, tokens[:, prefix:]], dim=1)
        sequence = naive_block(block, sequence, temperature=state["temperatures"][index])
        outputs = sequence[:, prefix : prefix + prompts.shape[1]]
        tokens = torch.cat([sequence[:, :prefix], sequence[:, prefix + prompts.shape[1] :]], dim=1)
        if index + 1 < len(backbone.blocks):
            gate = 1 / (1 + torch.exp(-state["gate_logits"][index]))
            outputs = gate * outputs + (1 - gate) * prompts
        prompts = outputs
    return tokens, prompts


def gated(vit: str = "plain", *, num_prompts: int = 5, pool: Any = None, **options: Any) -> GatedPromptViT:
    backbone = make_vit(vit)
    prompts = make_prompts(backbone, 1, num_prompts)
    model = build_model(
        "gate_vpt", backbone, num_classes=NUM_CLASSES, prompts=prompts, pool=pool, gate_logit=0.3, **options
    )
    assert isinstance(model, GatedPromptViT)
    return model


@pytest.mark.parametrize(("vit", "pool"), CASES)
def test_logits_and_gradients_are_those_of_the_equations(vit: str, pool: Any) -> None:
    model = gated(vit, pool=pool, checkpoint_blocks=pool == "token")
    randomise(model)
    with torch.no_grad():
        model.temperatures.copy_(torch.linspace(0.6, 1.7, len(model.temperatures)))
        model.gate_logits += torch.linspace(-1, 1, len(model.gate_logits))
    assert_matches(model, vit, judge, pool)


def test_open_gates_are_shallow_prompts_and_closed_gates_keep_the_prompts() -> None:
    images = make_images(make_vit())
    plain = build_model(
        "vpt_shallow", make_vit(), num_classes=NUM_CLASSES, prompts=make_prompts(make_vit(), 1)
    ).eval()
    model = gated(pool="avg_with_prompts").eval()
    with torch.no_grad():
        model.gate_logits.fill_(1e4)
    x, _ = plain.encode(images, every_token=True)
    ours, _ = model.encode(images, every_token=True)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    seen = []
    with torch.no_grad():
        model.gate_logits.fill_(-1e4)
    for block in model.backbone.blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, -5:]))
    model.encode(images, every_token=True)
    assert all(torch.equal(rows, model.prompts.expand(3, -1, -1)) for rows in seen) and len(seen) == 3


def test_a_temperature_out_of_range_counts_as_its_end_and_comes_back() -> None:
    images = make_images(make_vit())
    model = gated().eval()
    outputs = []
    for value in (0.01, -3.0):
        with torch.no_grad():
            model.temperatures[1] = value
        outputs.append(model(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    outputs[1].square().sum().backward()
    assert model.temperatures.grad is not None and model.temperatures.grad[1] != 0


def test_temperatures_learn_slowly() -> None:
    model = gated()
    rates = {name: model.learning_rate_scale(name) for name in model.added_parameters()}
    assert rates == {"gate_logits": 1.0, "temperatures": 0.1}


def test_what_it_adds_moves_and_nothing_else() -> None:
    model = gated("registers", pool="avg_with_prompts")
    assert_moves_what_it_adds(model, model.backbone)


def test_an_adapter_gives_the_same_model(tmp_path: Path) -> None:
    model = gated("deit_distilled", prompt_dropout=0.2, train_prompts=False)
    randomise(model)
    assert_round_trip(model, tmp_path)


def test_bfloat16_and_compiled() -> None:
    assert_low_precision_and_compiled("gate_vpt", make_prompts(make_vit("registers"), 1))


def test_number_of_parameters() -> None:
    model = gated("plain", num_prompts=100)
    depth, width = 3, 48
    added = sum(value.numel() for value in (model.prompts, *model.added_parameters().values()))
    assert added == 100 * width + (depth - 1) + depth


def test_deep_prompts_are_refused() -> None:
    with pytest.raises(InputError, match=r"shallow prompts \[1, P, 48\], got \[3, 5, 48\]"):
        GatedPromptViT(make_vit(), make_prompts(make_vit(), 3), num_classes=2)


@pytest.mark.parametrize("gate_logit", ["abc", None, True, float("nan"), float("-inf")])
def test_where_gates_start_is_a_finite_number(gate_logit: Any) -> None:
    with pytest.raises(InputError, match=f"gate_logit must be a finite number, got {gate_logit!r}"):
        GatedPromptViT(make_vit(), make_prompts(make_vit(), 1), num_classes=2, gate_logit=gate_logit)
