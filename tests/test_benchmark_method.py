"""How benchmarks measure: turns, rotated inputs, memory, ceilings, limits, and records without made-up figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import record as records
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.memory import peak_tensor_bytes
from benchmarks.power import joules
from benchmarks.record import Record, newest
from benchmarks.summary import duration, middle, quartiles, ratio, share_of_limit
from benchmarks.timing import last_level_cache_bytes, rotated, take_turns
from spt_fast.errors import InputError

CPU = torch.device("cpu")
CASE = {"tokens": 10}


def make(folder: Path, **arguments: object) -> Record:
    return Record("sleep", "python -m benchmarks.sleep", CPU, folder, **arguments)  # type: ignore[arg-type]


def test_everybody_has_a_turn_in_every_round_and_another_one_begins() -> None:
    order: list[tuple[str, int]] = []
    works = {name: lambda number, name=name: order.append((name, number)) for name in "abc"}
    samples = take_turns(CPU, works, rounds=2, warmup=1)
    assert order == [
        *[("a", 0), ("b", 0), ("c", 0)],
        *[("b", 1), ("c", 1), ("a", 1)],
        *[("c", 2), ("a", 2), ("b", 2)],
    ]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in samples.values())


def test_rotated_copies_are_equal_apart_and_larger_than_the_cache() -> None:
    x = torch.randn(1 << 18).requires_grad_()
    copies = rotated(x)
    assert copies[0][0] is x
    assert len({copy.data_ptr() for (copy,) in copies}) == len(copies)
    assert all(torch.equal(copy, x) and copy.requires_grad for (copy,) in copies)
    enough = len(copies) * x.nbytes >= 4 * last_level_cache_bytes(CPU)
    assert enough or len(copies) == 64
    assert len(rotated(x, most_bytes=2 * x.nbytes)) == 2


def test_peak_memory_is_what_lies_there_at_the_worst_moment() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        (second * 2).sum()

    assert 8000 <= peak_tensor_bytes(CPU, work) < 8100
    assert joules(CPU, work) is None  # nobody counts them on a CPU


def test_ceilings_are_of_this_machine() -> None:
    ceilings = measure_ceilings(CPU, dtypes=("float32",), rounds=1)
    assert 1e8 < ceilings.copy < 1e13 and 1e8 < ceilings.read < 1e13
    assert 1e9 < ceilings.matmul["float32"] < 1e15
    assert set(ceilings.as_dict()["seconds"]) == {"copy", "read", "matmul float32"}


def test_a_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(copy=1e9, read=2e9, matmul={"float32": 1e10, "bfloat16": 1e11}, samples={})
    memory = ceilings.limit(moved_bytes=4e9, operations=1e10, dtype="float32")
    assert (memory.seconds, memory.by) == (2.0, "memory")
    arithmetic = ceilings.limit(moved_bytes=1e9, operations=1e11, dtype="float16")
    assert (arithmetic.seconds, arithmetic.by) == (1.0, "arithmetic")


def test_a_record_holds_what_was_measured_and_where(tmp_path: Path) -> None:
    record = make(tmp_path, settings={"rounds": 2})
    limit = Ceilings(1e9, 1e9, {"float32": 1e9}, {}).limit(moved_bytes=5e8, operations=0, dtype="float32")
    record.measured(CASE, "ours", [1.0, 3.0, 2.0], limit=limit, inertia=7.0)
    record.missing(CASE, "theirs", "not installed")
    record.quoted(CASE, "paper", 86400.0, "Table 1")
    record.extrapolated(CASE, "slow", 50.0, "in proportion", [(0.01, 0.5)])
    record.finish()
    content = json.loads(record.path.read_text())
    assert content["complete"] and content["settings"] == {"rounds": 2}
    assert {"device", "cpu", "threads", "versions", "commit", "date"} <= set(content["machine"])
    ours, theirs, paper, slow = content["rows"]
    assert ours["seconds"] == [1.0, 3.0, 2.0] and ours["inertia"] == 7.0
    assert middle(ours) == 2.0 and share_of_limit(ours) == 0.25
    assert theirs == {"kind": "missing", "case": CASE, "peer": "theirs", "reason": "not installed"}
    assert (paper["kind"], middle(paper), paper["source"]) == ("quoted", 86400.0, "Table 1")
    assert (slow["kind"], middle(slow), slow["measured"]) == ("extrapolated", 50.0, [[0.01, 0.5]])
    assert record.path.name.endswith("-sleep.json")


@pytest.mark.parametrize("seconds", [[], [0.0], [-1.0], [math.nan], [1.0, math.inf]])
def test_a_figure_that_was_not_measured_is_refused(tmp_path: Path, seconds: list[float]) -> None:
    record = make(tmp_path)
    with pytest.raises(InputError):
        record.measured(CASE, "ours", seconds)
    with pytest.raises(InputError):
        record.extrapolated(CASE, "ours", 1.0, "from nothing", [])
    with pytest.raises(InputError, match="measured nothing"):
        record.finish()
    assert not list(tmp_path.iterdir())


def test_a_record_whose_time_was_up_says_so(tmp_path: Path) -> None:
    record = make(tmp_path, minutes=0.0)
    record.measured(CASE, "ours", [1.0])
    assert not record.may_begin()
    record.finish()
    assert not Record.load(record.path)["complete"] and record.path.name.endswith("-sleep-partial.json")
    # All that was to be measured is complete, however late.
    whole = make(tmp_path, minutes=0.0)
    whole.measured(CASE, "ours", [2.0])
    whole.finish()
    assert Record.load(whole.path)["complete"] and list(tmp_path.iterdir()) == [whole.path]
    # Half a measurement never takes the place of a whole one.
    record.save()
    (found,) = newest(tmp_path)
    assert found["rows"][0]["seconds"] == [2.0]


def test_the_newest_record_of_a_device_counts_and_gpus_lead(tmp_path: Path) -> None:
    record = make(tmp_path)
    record.measured(CASE, "ours", [1.0])
    record.finish()
    for name, day, device, kind in (
        ("a", "2020-01-01", "Old CPU", "cpu"),
        ("b", "2020-01-02", "Old CPU", "cpu"),
        ("c", "2020-01-01", "Some GPU", "cuda"),
    ):
        content = json.loads(record.path.read_text())
        content["machine"] |= {"device": device, "device_type": kind, "date": day}
        content["command"] = name
        (tmp_path / f"{day}-{records.slug(device)}-sleep.json").write_text(json.dumps(content))
    (tmp_path / "starts-digits.json").write_text("{}")  # another kind of file is passed over
    assert [each["command"] for each in newest(tmp_path)][:2] == ["c", "b"]
    (tmp_path / "2020-01-03-broken-sleep.json").write_text("{")
    with pytest.raises(InputError, match="broken-sleep.json is not a benchmark's record"):
        newest(tmp_path)


def test_ratios_are_those_within_rounds() -> None:
    row = {"kind": "measured", "seconds": [2.0, 4.0, 60.0]}
    reference = {"kind": "measured", "seconds": [1.0, 2.0, 10.0]}
    assert ratio(row, reference) == 2.0
    quoted = {"kind": "quoted", "value_seconds": 20.0}
    assert ratio(quoted, reference) == 10.0
    assert quartiles([3.0]) == (3.0, 3.0)
    assert duration(59.9) == "59.9 s" and duration(1e-7) == "0.10 us"
