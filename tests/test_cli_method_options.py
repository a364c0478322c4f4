"""``spt-fast train --method-option KEY=VALUE``: a wrong key or value is one sentence, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, check_refused, make_photos, run

from spt_fast.methods import METHODS

SHORT = [*TINY, "--pool", "avg", "--batch-size", 4, "--dtype", "float32", "--recipe", "vtab", "--epochs", 1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


def refuse(photos: Path, output: Path, method: str, option: str, *words: str) -> str:
    prompts = ["--num-prompts", 4] if METHODS[method].depth else []
    typed = ["--method", method, "--method-option", option, *prompts]
    done = run("train", *SHORT, "--data", photos, "--output", output, *typed)
    check_refused(done, *words, code=done.code)
    assert done.code in (1, 2) and not output.exists()
    return done.err


@pytest.mark.parametrize(
    ("method", "option", "expected"),
    [
        ("lora", "dropout=abc", "dropout must be a number in [0, 1), got 'abc'"),
        ("lora", "layers=5", "layers must be some of qkv, q, k, v, proj, fc1, fc2, got 5"),
        ("lora", "layers=null", "got None"),
        ("lora", 'layers=[["q"]]', "got [['q']]"),
        ("ssf", "init_std=abc", "init_std must be a finite number of at least 0, got 'abc'"),
        ("gate_vpt", "gate_logit=abc", "gate_logit must be a finite number, got 'abc'"),
        ("gate_vpt", "gate_logit=NaN", "gate_logit must be a finite number, got nan"),
        ("gate_vpt", "gate_logit=Infinity", "got inf"),
        ("gate_vpt", "gate_logit=null", "got None"),
        ("e2vpt", "num_key_value_prompts=abc", "num_key_value_prompts must be a whole number of at least 1"),
        ("e2vpt", "num_key_value_prompts=2.5", "got 2.5"),
        ("e2vpt", "num_segments=true", "num_segments must be a whole number of at least 1, got True"),
        ("vapt", "kernel_size=abc", "kernel_size must be a whole number of at least 1, got 'abc'"),
        ("vapt", "kernel_size=2.5", "got 2.5"),
        ("vapt", "hidden_dim=2.5", "hidden_dim must be a whole number of at least 1, got 2.5"),
        ("vapt", "channel_dropout=abc", "channel_dropout must be a number in [0, 1), got 'abc'"),
        ("adapter", 'placement=["pfeiffer"]', "placement must be one of pfeiffer, houlsby"),
    ],
)
def test_wrong_values(photos: Path, tmp_path: Path, method: str, option: str, expected: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    refuse(photos, tmp_path / "run", method, option, option.partition("=")[0], expected)


@pytest.mark.parametrize("share", ["1.5", "-0.5", "NaN", "abc", "true", "null", '"0.5"'])
@pytest.mark.parametrize("name", ["prune_tokens", "prune_segments"])
def test_wrong_shares_to_prune(photos: Path, tmp_path: Path, name: str, share: str) -> None:
    refuse(photos, tmp_path / "run", "e2vpt", f"{name}={share}", f"{name} must be a number in [0, 1), got ")


def test_a_share_that_prunes_nothing_is_told(photos: Path, tmp_path: Path) -> None:
    typed = ["--method", "e2vpt", "--num-prompts", 4, "--method-option", "prune_tokens=0.1"]
    done = run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", *typed)
    assert done.code == 0 and "0.1 of 4 tokens is less than one: none is pruned" in done.err, done.err


@pytest.mark.parametrize(
    "key", ["num_classes", "pool", "num_prompts", "prompts", "name", "backbone", "kernel"]
)
@pytest.mark.parametrize("method", ["adapter", "vpt_deep", "vapt", "e2vpt"])
def test_what_is_no_option_of_a_method(photos: Path, tmp_path: Path, method: str, key: str) -> None:
    said = refuse(photos, tmp_path / "run", method, f"{key}=3", f"{key} is no option of {method}; it has ")
    own = {
        "adapter": "bottleneck, placement",
        "vpt_deep": "none",
        "vapt": "kernel_size, hidden_dim, channel_dropout",
        "e2vpt": "num_key_value_prompts, num_segments, prune_tokens, prune_segments",
    }
    assert said.rstrip().endswith(f"it has {own[method]}")


@pytest.mark.parametrize(
    ("method", "option", "elsewhere"),
    [
        ("adapter", "checkpoint_blocks=true", "--checkpoint-blocks"),
        ("vpt_deep", "train_prompts=abc", "--freeze-prompts"),
        ("gate_vpt", "train_prompts=false", "--freeze-prompts"),
        ("vpt_deep", "prompt_dropout=abc", "--prompt-dropout"),
    ],
)
def test_what_has_an_option_of_its_own(
    photos: Path, tmp_path: Path, method: str, option: str, elsewhere: str
) -> None:
    refuse(photos, tmp_path / "run", method, option, f"has an option of its own, {elsewhere}")


def test_an_empty_name_is_no_method(photos: Path, tmp_path: Path) -> None:
    done = run("train", *SHORT, "--data", photos, "--output", tmp_path / "run", "--method", "")
    check_refused(done, "method must be one of spt_shallow", "got ''")
    assert not (tmp_path / "run").exists()
