"""The command line from end to end on tiny folders: results, json, exit codes, one sentence for each mistake."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command_line import COLOURS, TINY, TRAIN, check_equal, check_refused, files, last, make_photos, run
from safetensors.torch import load_file

import spt_fast
from spt_fast.backbones import image_settings
from spt_fast.building import Method
from spt_fast.cli.inputs import parse_bytes
from spt_fast.data import load_dataset, make_loader, make_transform

BUNDLED = shlex.split(
    "--model vit_tiny_patch16_224 --checkpoint bundled:vit_tiny_mae_cifar10 -k img_size=32 -k patch_size=4 --device cpu"
)
COMMANDS = (
    "prototypes",
    "analyze",
    "ablate",
    "train",
    "sweep",
    "vtab",
    "recipes",
    "eval",
    "predict",
    "demo",
    "info",
    "bench",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Photos of which one file a split is truncated (train) or no image at all (val, test)."""
    root = make_photos(tmp_path / "damaged")
    picture = root / "train" / "red" / "1.png"
    picture.write_bytes(picture.read_bytes()[:500])
    for split in ("val", "test"):
        (root / split / "red" / "1.png").write_text("this is no image")
    return root


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the bundled backbone."""
    output = tmp_path_factory.mktemp("runs") / "bundled"
    done = run("train", *BUNDLED, *TRAIN, "--data", photos, "--output", output, "--epochs", 2)
    assert done.code == 0, done.err
    return output


# Help, version, wrong usage.


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_shows_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.code == 0 and not done.err
    assert "Example: spt-fast " + " ".join(command) in done.out


def test_version() -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"spt-fast {spt_fast.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["train", "--model", "vit_tiny_patch16_224"],
        ["prototypes", *TINY, "--data", "x", "--output", "y", "--method", "magic"],
        ["prototypes", *TINY, "--data", "x", "--output", "y", "--seed", "-1"],
        ["prototypes", *TINY, "--data", "x", "--output", "y", "--checkpoint-minutes", "-1"],
        ["prototypes", *TINY, "--data", "x", "--output", "y", "--vipamin-neighbors", "8"],
        ["train", *TINY, "--data", "x", "--output", "y", "--resume", "--overwrite"],
        ["train", *TINY, "--data", "x", "--output", "y", "--prompts", "p", "--method", "kmeans"],
        ["predict", "--adapter", "x", "y.jpg", "--top", "0"],
        ["info", "--jsn"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    check_refused(run(*arguments), "Usage:", code=2)


def test_without_a_command_the_help_is_shown() -> None:
    done = run()
    assert done.code == 2 and "Usage:" in done.out + done.err


# What works.


@pytest.mark.parametrize("method", get_args(Method))
def test_prototypes_of_every_method(photos: Path, tmp_path: Path, method: str) -> None:
    output, released = tmp_path / "new" / "prompts.safetensors", tmp_path / "released"
    done = run(
        *("prototypes", *TINY, "--data", photos, "--output", output, "--method", method, "--num-prompts", 5),
        *("--export-released", released, "--json"),
    )
    assert done.code == 0, done.err
    assert "warning: the backbone has random weights" in done.err
    saved = spt_fast.Prototypes.load(output)
    assert done.json["shape"] == [2, 5, 48] == list(saved.values.shape)
    assert done.json["skipped"] == 0 and done.json["method"] == saved.metadata["method"] == method
    assert saved.metadata["seed"] == 0
    rows = (released / "depth_1.txt").read_text().splitlines()
    assert torch.equal(torch.tensor([[float(x) for x in row.split(",")] for row in rows]), saved.values[1])
    assert files(tmp_path) == {
        *("new", "new/prompts.safetensors", "released", "released/depth_0.txt", "released/depth_1.txt")
    }


def test_prototypes_are_those_of_python(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.safetensors"
    done = run(
        "prototypes", *BUNDLED, "--data", photos, "--output", output, "--num-prompts", 3, "--depth", "shallow"
    )
    assert done.code == 0 and "warning" not in done.err, done.err
    assert "1, 3, 192" not in done.out and str(output) in done.out
    backbone = spt_fast.load_backbone(
        "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
    )
    transform = make_transform("fgvc", train=False, **image_settings(backbone))
    loader = make_loader(load_dataset(photos, "train", transform=transform), shuffle=True)
    expected = spt_fast.build_prototypes(backbone, loader, num_prompts=3, depth="shallow")
    saved = spt_fast.Prototypes.load(output)
    assert torch.equal(saved.values, expected.values)
    assert saved.metadata["images"] == 12 and saved.metadata["data"] == "photos/train"


def test_vipamin_is_told_its_neighbors_and_its_lambda(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.safetensors"
    building = ["prototypes", *TINY, "--data", photos, "--output", output, "--method", "vipamin"]
    assert run(*building, "--vipamin-neighbors", 3, "--vipamin-lambda", 0.5).code == 0
    metadata = spt_fast.Prototypes.load(output).metadata
    assert (metadata["vipamin_neighbors"], metadata["vipamin_lambda"]) == (3, 0.5)


def test_several_numbers_of_prompts_are_a_file_each(photos: Path, tmp_path: Path) -> None:
    building = ["prototypes", *TINY, "--data", photos]
    output = tmp_path / "new" / "p{num_prompts}.safetensors"
    numbers = ["--num-prompts", 2, "--num-prompts", 7]
    done = run(*building, "--output", output, *numbers, "--json")
    assert done.code == 0, done.err
    assert [entry["shape"] for entry in done.json] == [[2, 2, 48], [2, 7, 48]]
    assert files(tmp_path) == {"new", "new/p2.safetensors", "new/p7.safetensors"}
    for number, entry in zip((2, 7), done.json, strict=True):
        path = tmp_path / "new" / f"p{number}.safetensors"
        assert entry["output"] == str(path)
        alone = tmp_path / "alone.safetensors"
        assert run(*building, "--output", alone, "--num-prompts", number).code == 0
        check_equal(load_file(path), load_file(alone))
        metadata = spt_fast.Prototypes.load(path).metadata
        assert (metadata["num_prompts"], metadata["images"], metadata["data"]) == (number, 12, "photos/train")
    table = run(*building, "--output", output, *numbers)
    assert table.code == 0 and "p2.safetensors" in table.out and "p7.safetensors" in table.out
    # One number may be in the name too.
    done = run(*building, "--output", output, "--num-prompts", 5, "--json")
    assert done.json["output"] == str(tmp_path / "new" / "p5.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--output p --num-prompts 2 --num-prompts 7", ["must contain {num_prompts}", "2 files", "got p"]),
        ("--output p{num_prompts} --num-prompts 2 --num-prompts 2", ["--num-prompts differ"]),
        (
            "--output p{num_prompts} --num-prompts 2 --num-prompts 7 --export-released r",
            ["--export-released"],
        ),
        ("--output FOLDER{num_prompts} --num-prompts 2 --num-prompts 7", ["FOLDER7 is a folder"]),
        ("--output p{num_prompts} --num-prompts 2 --num-prompts 0", ["num_prompts", "got 0"]),
        ("--output p --token-budget lots", ["--token-budget must be auto or a size", "got 'lots'"]),
        ("--output p --token-budget -5", ["--token-budget must be auto or a size", "got '-5'"]),
        ("--output p --token-budget 8XB", ["got '8XB'"]),
        ("--output p --token-cache FILE", ["--token-cache: FILE is a file"]),
        ("--output p --token-cache FILE/inside", ["--token-cache: FILE is a file"]),
    ],
)
def test_prototypes_that_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("this is no folder")
    Path("FOLDER7").mkdir()
    before = files(tmp_path)
    check_refused(run("prototypes", *TINY, "--data", photos, *arguments.split()), *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", "auto"),
        ("0", 0),
        ("1000", 1000),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("8GiB", 8 << 30),
        ("1.5 kiB", 1536),
        ("2T", 2 * 10**12),
        ("10B", 10),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int | str) -> None:
    assert parse_bytes("--token-budget", text) == size


def test_where_prototypes_keep_their_tokens(photos: Path, tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "prompts"
    building = ["prototypes", *TINY, "--data", photos, "--output", output, "--num-prompts", 3]
    kept, found = {}, {}
    for name, options in {
        "memory": ["--token-budget", "1GiB"],
        "disk": ["--token-budget", "10kB", "--token-cache", cache],
        "nowhere": ["--token-budget", 0],
    }.items():
        done = run(*building, *options, "--json")
        assert done.code == 0, done.err
        assert done.json["images"] == 12
        kept[name], found[name] = done.json["tokens_kept"], load_file(output)
    assert kept["memory"] == "device memory: they take 72 KiB, and 1 GiB may be used"
    assert kept["disk"].startswith("disk: they take more than the 9.77 KiB") and str(cache) in kept["disk"]
    assert kept["nowhere"].startswith("nowhere: ")
    check_equal(found["nowhere"], found["memory"])
    torch.testing.assert_close(found["disk"]["inertia"], found["memory"]["inertia"], rtol=1e-2, atol=0)
    assert files(tmp_path) == {"cache", "prompts"}
    table = run(*building, "--token-budget", 0)
    assert table.code == 0 and "nowhere: they take more than" in table.out


def test_train_eval_predict(photos: Path, trained: Path) -> None:
    assert {
        *("best.safetensors", "last.safetensors", "prompts.safetensors", "metrics.csv", "config.json")
    } <= files(trained)
    adapter = trained / "last.safetensors"

    done = run("eval", "--adapter", adapter, "--data", photos, "--split", "test", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    model = spt_fast.load_adapter(adapter)
    transform = make_transform("vtab", train=False, **image_settings(model.backbone))
    judged = spt_fast.evaluate(model, load_dataset(photos, "test", transform=transform))
    assert done.json["accuracy"] == judged.accuracy
    assert done.json["loss"] == pytest.approx(judged.loss, rel=1e-5)
    assert (done.json["images"], done.json["skipped"]) == (9, 0)

    pictures = [photos / "test" / colour / "0.png" for colour in COLOURS]
    done = run("predict", "--adapter", adapter, *pictures, "--top", 7, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert [entry["image"] for entry in done.json] == [str(path) for path in pictures]
    dataset = load_dataset(photos, "test", transform=transform)
    with torch.no_grad():
        expected = model(torch.stack([dataset[index][0] for index in (0, 3, 6)])).softmax(dim=1)
    for entry, row in zip(done.json, expected, strict=True):
        predictions = entry["predictions"]
        probabilities = [prediction["probability"] for prediction in predictions]
        assert sum(probabilities) == pytest.approx(1) and probabilities == sorted(probabilities, reverse=True)
        found = {prediction["class"]: prediction["probability"] for prediction in predictions}
        assert found == pytest.approx(dict(zip(COLOURS, row.tolist(), strict=True)), abs=1e-5)

    done = run("predict", "--adapter", adapter, pictures[0], "--top", 1, "--device", "cpu")
    assert done.code == 0 and str(pictures[0]) in done.out and "%" in done.out
    assert sum(colour in done.out.replace(str(pictures[0]), "") for colour in COLOURS) == 1


def test_train_from_a_file_of_prototypes(photos: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.safetensors", tmp_path / "run"
    assert run("prototypes", *TINY, "--data", photos, "--output", prompts, "--num-prompts", 3).code == 0
    given = ["train", *TINY, "--data", photos, "--prompts", prompts, "--pool", "avg", "--epochs", 1, "--json"]
    done = run(*given, "--output", output, "--freeze-prompts")
    assert done.code == 0 and done.json["skipped"] == 0, done.err
    assert "another backbone" not in done.err
    assert torch.equal(last(output)["prompts"], spt_fast.Prototypes.load(prompts).values)
    # Another seed is another random backbone.
    done = run(*given, "--output", tmp_path / "other", "--seed", 1)
    assert done.code == 0 and "the prompts were built from another backbone" in done.err


def test_a_random_backbone_is_the_same_again_for_its_seed(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(
        *("train", *TINY, *TRAIN, "--data", photos, "--output", output, "--method", "uniform"),
        *("--epochs", 1, "--seed", 7, "--json"),
    )
    assert done.code == 0 and "warning: the backbone has random weights" in done.err
    final = done.json["final_accuracy"]
    done = run(
        "eval", "--adapter", output / "last.safetensors", "--data", photos, "--json", "--device", "cpu"
    )
    assert done.code == 0, done.err
    assert done.json["accuracy"] == final


def test_info() -> None:
    done = run("info", "--json")
    assert done.code == 0 and not done.err
    facts = done.json
    assert facts["version"]["spt-fast"] == spt_fast.__version__ and facts["version"]["torch"]
    assert "torch" in facts["kernel backends"]["kmeans_step"]
    assert "cpu" in facts["device"]
    table = run("info")
    assert table.code == 0 and "kernel backends: prompt_attention" in table.out


def test_the_demo_command_has_the_demo_s_own_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spt_fast import demo

    expected = inspect.signature(demo.run_demo).parameters["epochs"].default
    calls: list[dict[str, Any]] = []

    def pretend(output: Path, **arguments: Any) -> list[dict[str, Any]]:
        calls.append({"output": output, **arguments})
        cost = {"prototype_seconds": 1.0, "train_seconds": 2.0, "trainable_parameters": 3456}
        return [{"name": "SPT", "method": "kmeans", "test_accuracy": 0.915, **cost}]

    monkeypatch.setattr(demo, "run_demo", pretend)
    done = run("demo", "--output", tmp_path / "demo", "--device", "cpu")
    assert done.code == 0 and "91.5%" in done.out and "3,456" in done.out
    assert f"look at {tmp_path}/demo/report.html" in done.out
    assert calls[0]["epochs"] == expected
    assert run("demo", "--output", tmp_path / "demo", "--json").json[0]["test_accuracy"] == 0.915


# Unreadable images.


def test_unreadable_images_are_counted_or_refused(damaged: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.safetensors", tmp_path / "run"
    building = ["prototypes", *TINY, "--data", damaged, "--output", prompts, "--num-prompts", 3, "--json"]
    check_refused(run(*building, "--strict"), "train/red/1.png")
    assert not prompts.exists()
    done = run(*building)
    assert done.code == 0 and (done.json["skipped"], done.json["images"]) == (1, 11)
    assert "prototypes skipped an unreadable image" in done.err

    training = ["train", *TINY, "--data", damaged, "--output", output, "--prompts", prompts, "--epochs", 1]
    training += ["--pool", "avg", "--json"]
    check_refused(run(*training, "--strict"), "train/red/1.png")
    done = run(*training, "--overwrite")
    assert done.code == 0 and done.json["skipped"] == 1 and "training skipped an unreadable image" in done.err

    adapter = output / "last.safetensors"
    judging = ["eval", "--adapter", adapter, "--data", damaged, "--split", "test", "--json"]
    check_refused(run(*judging, "--strict"), "test/red/1.png")
    done = run(*judging)
    assert done.code == 0 and (done.json["skipped"], done.json["images"]) == (1, 8)
    assert "evaluation skipped an unreadable image" in done.err

    good, bad = damaged / "test" / "red" / "0.png", damaged / "test" / "red" / "1.png"
    check_refused(run("predict", "--adapter", adapter, good, bad), str(bad), "cannot be read as an image")
    check_refused(run("predict", "--adapter", adapter, damaged / "none.png"), "none.png does not exist")


@pytest.mark.parametrize("command", ["prototypes", "train"])
def test_nothing_readable(tmp_path: Path, command: str) -> None:
    for colour in ("red", "blue"):
        for split in ("train", "val"):
            (tmp_path / "bad" / split / colour).mkdir(parents=True)
            (tmp_path / "bad" / split / colour / "0.jpg").write_text("no image")
    output = tmp_path / "out"
    check_refused(run(command, *TINY, "--data", tmp_path / "bad", "--output", output), "image")
    assert not output.exists()


# Bad input: refused before anything is written.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", "no/such/folder"], ["no/such/folder", "does not exist"]),
        (["--data", "EMPTY"], ["no images"]),
        (["--data", "CLASSES"], ["no images"]),
        (["--data", "FILE"], ["is a file, expected a folder"]),
        (["--checkpoint", "no/such.pth"], ["no/such.pth does not exist"]),
        (["--checkpoint", "FILE"], ["FILE", "cannot be read"]),
        (["--checkpoint", "bundled:nope"], ["bundled:nope"]),
        (["--checkpoint", "bundled:vit_tiny_mae_cifar10"], ["does not fit this model"]),
        (["--checkpoint", "bundled:vit_tiny_mae_cifar10", "--pretrained"], ["checkpoint", "pretrained"]),
        (["--num-prompts", "0"], ["num_prompts", "0"]),
        (["--num-prompts", "1000"], ["fewer than num_prompts=1000"]),
        (["--data-fraction", "0"], ["data_fraction"]),
        (["--model", "resnet18"], ["ResNet cannot be prompted"]),
        (["--model", "swin_tiny_patch4_window7_224"], ["SwinTransformer cannot be prompted"]),
        (["--model", "vit_tinny"], ["vit_tinny", "not a timm model"]),
        (["-k", "img_size"], ["KEY=VALUE", "img_size"]),
        (["-k", "bogus=1"], ["bogus"]),
        (["-k", "num_heads=5"], ["divisible"]),
        (["-k", "pretrained=true"], ["--pretrained"]),
        (["--device", "cuda:99"], ["cuda:99", "cannot be used"]),
        (["--device", "meta"], ["meta", "cannot be used"]),
        (["--device", "toaster"], ["toaster", "cannot be used"]),
        (["--output", "FILE/inside"], ["FILE is a file"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "_") if "--" in value[0] or value[0] == "-k" else "",
)
@pytest.mark.parametrize("command", ["prototypes", "train"])
def test_bad_input(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    change: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("these are no weights")
    Path("EMPTY").mkdir()
    Path("CLASSES/train/cat").mkdir(parents=True)
    before = files(tmp_path)
    model = TINY if change[0] != "--model" else ["--device", "cpu"]
    done = run(command, *model, "--data", photos, "--output", "new/out", *change)
    check_refused(done, *words)
    assert files(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("command", ["prototypes", "train", "demo"])
def test_cuda_where_there_is_none(photos: Path, tmp_path: Path, command: str) -> None:
    given = ["--output", tmp_path / "out"]
    if command != "demo":
        given += [*TINY, "--data", photos]
    check_refused(run(command, *given, "--device", "cuda"), "'cuda' cannot be used here")
    assert not files(tmp_path)


def test_a_backend_that_does_not_exist(photos: Path, tmp_path: Path) -> None:
    arguments = ["prototypes", *TINY, "--data", photos, "--output", tmp_path / "p.safetensors"]
    check_refused(run(*arguments, backend="bogus"), "SPT_FAST_BACKEND=bogus", "torch")
    assert not files(tmp_path)


def test_output_of_prototypes_is_a_folder(photos: Path, tmp_path: Path) -> None:
    done = run("prototypes", *TINY, "--data", photos, "--output", tmp_path)
    check_refused(done, str(tmp_path), "is a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission(photos: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for command in ("prototypes", "train"):
        done = run(command, *TINY, "--data", photos, "--output", tmp_path / "new" / "out")
        check_refused(done, str(tmp_path), "cannot be written to")


def test_prompts_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    wide, output = tmp_path / "wide.safetensors", tmp_path / "run"
    spt_fast.Prototypes(torch.randn(2, 3, 64)).save(wide)
    train = ["train", *TINY, "--data", photos, "--output", output, "--pool", "avg", "--epochs", 1]
    check_refused(run(*train, "--prompts", wide), "[2, P, 48]", "[2, 3, 64]")
    check_refused(run(*train, "--prompts", tmp_path / "none"), "none does not exist")
    check_refused(run(*train, "--prompts", photos / "val" / "red" / "0.png"), "is not a file of prototypes")
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--epochs 0", "epochs"),
        ("--lr 0", "learning_rate"),
        ("--ema-decay 0", "ema_decay"),
        ("--prompt-dropout 1", "prompt_dropout"),
        ("--pool token -k class_token=false -k global_pool=avg", "class token"),
        ("--val-split test --data FLAT", "split 'test' is not in"),
    ],
)
def test_bad_training_settings(photos: Path, tmp_path: Path, change: str, word: str) -> None:
    changes = change.replace("FLAT", str(photos / "train")).split()
    done = run("train", *TINY, "--data", photos, "--output", tmp_path / "run", *changes)
    check_refused(done, word)
    assert not files(tmp_path)


def test_adapters_that_do_not_fit(photos: Path, trained: Path, tmp_path: Path) -> None:
    adapter = trained / "last.safetensors"
    animals = make_photos(tmp_path / "two", colours=("blue", "red"))
    done = run("eval", "--adapter", adapter, "--data", animals, "--split", "test")
    check_refused(done, "blue, red", "blue, green, red")
    for command in (["eval", "--data", photos], ["predict", photos / "test" / "red" / "0.png"]):
        check_refused(run(*command, "--adapter", tmp_path / "none"), "none does not exist")
        check_refused(run(*command, "--adapter", trained / "prompts.safetensors"), "is not an adapter")
        check_refused(run(*command, "--adapter", trained / "metrics.csv"), "is not an adapter")

    moved = tmp_path / "weights.pth"
    backbone = spt_fast.load_adapter(adapter).backbone
    torch.save(backbone.state_dict(), moved)
    done = run("eval", "--adapter", adapter, "--data", photos, "--checkpoint", moved, "--json")
    assert done.code == 0, done.err
    torch.save({name: tensor + 1 for name, tensor in backbone.state_dict().items()}, moved)
    done = run("eval", "--adapter", adapter, "--data", photos, "--checkpoint", moved)
    check_refused(done, "another backbone", "weights")


def test_an_earlier_run_is_not_overwritten_by_accident(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train = ["train", *TINY, *TRAIN, "--data", photos, "--output", output, "--epochs", 1]
    assert run(*train).code == 0
    before = last(output)
    for start in ([], ["--method", "uniform"]):
        check_refused(run(*train, *start), "already holds a run", "--resume", "--overwrite")
        check_equal(last(output), before)
    done = run(*train, "--method", "uniform", "--overwrite")
    assert done.code == 0, done.err
    assert json.loads((output / "config.json").read_text())["start"]["method"] == "uniform"
    assert spt_fast.Prototypes.load(output / "prompts.safetensors").metadata["method"] == "uniform"
