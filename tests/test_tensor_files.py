"""What a full disk does to a file of tensors: an error of the system that names the file, and the old file stays."""

import errno
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast.errors import CheckpointError
from spt_fast.tensor_files import read_tensors, write_tensors

TENSORS = {"a": torch.arange(5000.0), "b": torch.tensor([[1, 2]])}


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", "spt_fast.test.1", TENSORS, {"words": ["ü", 1, None]})
    tensors, record = read_tensors(tmp_path / "t.safetensors", "spt_fast.test.1", "a test")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert record == {"words": ["ü", 1, None]}
    with pytest.raises(CheckpointError, match="is not another test: its format is 'spt_fast.test.1'"):
        read_tensors(tmp_path / "t.safetensors", "spt_fast.test.2", "another test")


def _write_where_files_stay_small(path: Path, told: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write_tensors(path, "spt_fast.test.1", TENSORS, {})
    except OSError as error:
        told.put((error.errno, error.filename))


def test_a_file_that_cannot_grow_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, "spt_fast.test.1", {"a": torch.ones(3)}, {})
    before = path.read_bytes()
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()
    process = fork.Process(target=_write_where_files_stay_small, args=(path, told))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert told.get() == (errno.EFBIG, str(path))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
