"""Prototypes as files: what they say about themselves, and in whose formats they can be written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import batches

import spt_fast.tensor_files
from spt_fast import Prototypes, build_prototypes
from spt_fast.errors import CheckpointError, InputError, MissingFileError

METHODS = ["kmeans", "minibatch_kmeans", "mean_pool", "max_pool", "random_sample", "uniform"]
CLUSTERING = METHODS[:2]
WIDTH, PATCHES = 48, 16


@pytest.fixture
def backbone(make_backbone):
    return make_backbone()


@pytest.mark.parametrize("method", METHODS)
def test_metadata_is_a_json_record(backbone, method):
    built = build_prototypes(backbone, batches(), num_prompts=3, method=method, data_fraction=0.5, seed=5)
    record = json.loads(json.dumps(built.metadata))
    assert record == built.metadata
    assert (record["method"], record["num_prompts"], record["depth"], record["layers"]) == (
        method,
        3,
        "deep",
        "same",
    )
    assert (record["data_fraction"], record["capture"], record["seed"]) == (0.5, "paper", 5)
    assert record["backbone"]["name"] == "vit_tiny_patch16_224"
    assert record["backbone"]["identity"]["embed_dim"] == WIDTH
    assert record["seconds"] > 0 and record["version"] == spt_fast.__version__
    if method in CLUSTERING:
        assert record["images"] == 20 and record["tokens"] == 20 * PATCHES


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(backbone, method, tmp_path):
    built = build_prototypes(backbone, batches(), num_prompts=3, method=method)
    path = tmp_path / "new folder" / "prototypes.safetensors"
    built.save(path)
    again = Prototypes.load(path)
    assert again.metadata == built.metadata
    for name in ("values", "counts", "inertia"):
        before, after = getattr(built, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype and torch.equal(before, after)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_is_not_a_file_of_prototypes_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(
        MissingFileError, match="p.safetensors does not exist or is not a file; expected a file of pro"
    ):
        Prototypes.load(path)
    with pytest.raises(MissingFileError):
        Prototypes.load(tmp_path)
    for content in (b"", b"{}", bytes(range(200))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="p.safetensors is not a file of prototypes"):
            Prototypes.load(path)
    for metadata in (None, {"format": "pt"}, {"format": "spt_fast.prototypes.0", "json": "{}"}):
        save_file({"values": torch.zeros(1, 2, 3)}, path, metadata)
        with pytest.raises(CheckpointError, match="its format is .*expected 'spt_fast.prototypes.1'"):
            Prototypes.load(path)
    Prototypes(torch.zeros(1, 2, 3)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="is not a file of prototypes"):
        Prototypes.load(path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_save_leaves_the_old_file_or_none(tmp_path, monkeypatch, interruption):
    path = tmp_path / "p.safetensors"

    def half_a_file(tensors: Any, temporary: Path, metadata: Any) -> None:
        temporary.write_bytes(b"half")
        raise interruption

    save = Prototypes(torch.ones(1, 2, 3)).save
    with monkeypatch.context() as patch:
        patch.setattr(spt_fast.tensor_files, "save_file", half_a_file)
        with pytest.raises((KeyboardInterrupt, OSError)):
            save(path)
    assert list(tmp_path.iterdir()) == []
    save(path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(spt_fast.tensor_files, "save_file", half_a_file)
        with pytest.raises((KeyboardInterrupt, OSError)):
            save(path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 3), torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3).half()]
)
def test_values_of_another_shape_or_dtype_are_refused(values):
    with pytest.raises(InputError, match=r"values must be float32 \[L, P, D\], got"):
        Prototypes(values)


def test_the_released_text_files_hold_every_bit(tmp_path):
    values = torch.randn(3, 40, 7, generator=torch.Generator().manual_seed(0))
    values[1] *= 10.0 ** torch.arange(-20.0, 20.0)[:, None]  # some floats need nine digits
    values[1, 0] *= 1e-20  # denormal
    values[2, 0] = torch.tensor([0.0, -0.0, 1.0, 0.1, 1 / 3, torch.finfo().max, torch.finfo().tiny])
    paths = Prototypes(values).export_released(tmp_path / "released")
    assert paths == [tmp_path / "released" / f"depth_{index}.txt" for index in range(3)]
    for index, path in enumerate(paths):
        with path.open() as opened:
            rows = [[float(entry) for entry in line.split(",")] for line in opened]
        read = np.array(rows, dtype=np.float32)
        assert read.tobytes() == values[index].numpy().tobytes()
        np.testing.assert_array_equal(
            np.loadtxt(path, delimiter=",", dtype=np.float32), values[index].numpy()
        )


def test_vpts_names_and_shapes():
    values = torch.randn(5, 4, 7)
    deep, shallow = Prototypes(values).export_vpt(), Prototypes(values[:1]).export_vpt()
    assert deep.keys() == {"prompt_embeddings", "deep_prompt_embeddings"}
    assert torch.equal(deep["prompt_embeddings"], values[:1])
    assert torch.equal(deep["deep_prompt_embeddings"], values[1:])
    assert shallow.keys() == {"prompt_embeddings"} and torch.equal(shallow["prompt_embeddings"], values[:1])
    deep["prompt_embeddings"].zero_()
    assert values[0].abs().sum() > 0  # copies, not views
