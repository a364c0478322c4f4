"""PromptedViT run through torch.compile and with checkpointed blocks: the same function still."""

import copy
import warnings

import pytest
import torch
from judged_vits import (
    NUM_CLASSES,
    assert_equal_to_1e_10,
    assert_matches_judge,
    judge_vit,
    logits_and_gradients,
    make_images,
    make_prompts,
    make_vit,
    naive_logits_and_gradients,
    relative_error,
)

import spt_fast
from spt_fast import compile_modes
from spt_fast.prompted_vit import PromptedViT


@pytest.fixture(autouse=True)
def _no_programs_of_earlier_tests():
    torch._dynamo.reset()


def make_model(name: str, depth: str, pool: str | None, **kwargs: object) -> PromptedViT:
    judge = judge_vit(name)
    return spt_fast.PromptedViT(
        make_vit(name), make_prompts(judge, depth), num_classes=NUM_CLASSES, pool=pool, **kwargs
    )


# Blocks are all alike: one mistake in tracing them would show in each of these.
CASES = [
    ("plain", "deep", None),
    ("plain", "deep", "avg"),
    ("plain", "deep", "avg_with_prompts"),
    ("plain", "deep", "token"),
    ("plain", "shallow", None),
    ("plain", "shallow", "avg"),
    ("plain", "shallow", "token"),
    ("plain", "shallow", "avg_with_prompts"),
    ("qk_norm", "deep", "token"),
    ("deit_distilled", "deep", None),
    ("map", "deep", None),
    ("registers", "deep", "token"),
    ("layer_scale", "deep", "avg"),
]


@pytest.mark.parametrize(("name", "depth", "pool"), CASES)
def test_traced_whole_it_equals_the_judge_in_float64(name, depth, pool):
    model = make_model(name, depth, pool).double()
    model.compile("default", backend="aot_eager", fullgraph=True)
    assert_matches_judge(model, judge_vit(name), make_images(judge_vit(name)), pool)


@pytest.mark.parametrize(
    ("name", "depth", "pool"), [("qk_norm", "deep", "token"), ("plain", "shallow", "avg")]
)
def test_compiled_it_equals_the_judge(name, depth, pool):
    model, judge = make_model(name, depth, pool), judge_vit(name)
    model.compile("default", fullgraph=True)
    images = make_images(judge)
    expected = naive_logits_and_gradients(judge, model.prompts, model.head, images, pool)
    for a, e in zip(logits_and_gradients(model, images), expected, strict=True):
        assert relative_error(a, e) < 2e-5


@pytest.mark.parametrize(("name", "depth", "pool"), CASES)
def test_checkpointed_blocks_give_the_same_gradients(name, depth, pool):
    model = make_model(name, depth, pool, checkpoint_blocks=True).double()
    assert_matches_judge(model, judge_vit(name), make_images(judge_vit(name)), pool)


def test_checkpointed_blocks_keep_less():
    kept = {}
    for checkpoint_blocks in (False, True):
        model = make_model("plain", "deep", "avg", checkpoint_blocks=checkpoint_blocks)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_images(judge_vit("plain")))
        kept[checkpoint_blocks] = sum(sizes)
    assert kept[True] < kept[False] / 3


def test_checkpointed_and_compiled():
    model = make_model("plain", "deep", None, checkpoint_blocks=True).double()
    model.compile("default", backend="aot_eager", fullgraph=True)
    assert_matches_judge(model, judge_vit("plain"), make_images(judge_vit("plain")), None)


def test_checkpointed_with_prompt_dropout():
    """The dropped entries are those of the forward pass."""
    judge = judge_vit("plain")
    gradients = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(3)  # for the head, then for the dropout
        model = make_model("plain", "deep", None, checkpoint_blocks=checkpoint_blocks, prompt_dropout=0.5)
        gradients.append(logits_and_gradients(model.double().train(), make_images(judge).double())[1])
    assert_equal_to_1e_10(gradients[1], gradients[0], "prompts.grad")


# ------------------------------------------------------------------------------------------------- the choice of a mode


class Clock:
    """A step takes as long as the mode that is in use was told to."""

    def __init__(self, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.steps = seconds, 0
        monkeypatch.setattr(compile_modes, "MODES", {"cpu": tuple(seconds)})
        monkeypatch.setattr(compile_modes, "_step", self.step)

    def step(self, model: PromptedViT, images: torch.Tensor) -> float:
        self.steps += 1
        self.images = images
        if self.seconds[model.compile_mode] < 0:
            raise RuntimeError("no compiler\nat all")
        return self.seconds[model.compile_mode]


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [({"eager": 2.0, "default": 1.0}, "default"), ({"eager": 1.0, "default": 2.0}, "eager")],
)
def test_the_fastest_mode_is_kept(seconds, fastest, monkeypatch):
    model = make_model("plain", "deep", None)
    clock = Clock(seconds, monkeypatch)
    model.compile()
    assert (model.compile_mode, model.compile_seconds) == (fastest, seconds)
    assert (model._compiled_call_impl is None) == (fastest == "eager")
    assert clock.images.shape == (32, 3, 32, 32)


def test_a_mode_that_cannot_run_is_left_out_with_a_warning(monkeypatch):
    model = make_model("plain", "deep", None)
    Clock({"eager": 2.0, "default": -1.0, "reduce-overhead": 1.0}, monkeypatch)
    with pytest.warns(UserWarning, match="mode 'default' does not run here: no compiler$"):
        model.compile()
    assert model.compile_mode == "reduce-overhead"


def test_measuring_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(compile_modes, "MODES", {"cpu": ("eager", "default")})
    model, images = (
        make_model("plain", "deep", None, prompt_dropout=0.5).train(),
        make_images(judge_vit("plain")),
    )
    expected = [t.clone() for t in logits_and_gradients(copy.deepcopy(model).eval(), images)]
    model.prompts.grad = before = torch.ones_like(model.prompts)
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.compile(images=images, backend="aot_eager")
    assert set(model.compile_seconds) == {"eager", "default"}
    assert model.prompts.grad is before and bool((before == 1).all()) and model.head.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    for a, e in zip(logits_and_gradients(model.eval(), images), expected, strict=True):
        torch.testing.assert_close(a, e)
