"""What a search keeps on disk: what it searches, how far its runs are, and the table of its points."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spt_fast.errors import CheckpointError, InputError
from spt_fast.experiment_records import differences
from spt_fast.files import remove_leftovers, write_text
from spt_fast.search_space import TRACELESS, Point, recorded_point
from spt_fast.training_config import TrainingConfig

# What a search writes into its folder; the record is the last to go, so that what is left still has one.
CONTENTS = ("trials", "best", "prototypes", "results.csv", "summary.json", "sweep.json")


class SweepFolder:
    """The folder of a search. One process reads and writes it, and tells the others.

    Args:
        path: the folder; it is made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record_file = path / "sweep.json"

    def clear(self) -> None:
        """Remove an earlier search; other files stay."""
        if self._record_file.exists():
            for name in CONTENTS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
                else:
                    (self.path / name).unlink(missing_ok=True)

    def trial(self, point: Point, seed: int) -> Path:
        """Where a run that is validated lies."""
        return self.path / "trials" / point.name / f"seed-{seed}"

    def joined(self, points: list[Point], config: TrainingConfig, seeds: list[int]) -> list[Point]:
        """``points`` under the names that they have had before, and the recorded ones whose runs are over."""
        recorded = (self.record() or {"points": {}})["points"]
        wanted: list[Point] = []
        for point in points:
            known = next(
                (name for name, settings in recorded.items() if settings == point.settings), point.name
            )
            wanted.append(Point(known, point.config, point.num_prompts, point.settings))
        asked = {point.name: point for point in wanted}
        joined = []
        for name, settings in recorded.items():
            earlier = recorded_point(name, settings, config)
            states = [self.look(self.trial(earlier, seed), earlier, seed)["state"] for seed in seeds]
            if name in asked or "failed" in states or all(state == "finished" for state in states):
                joined.append(asked.pop(name, earlier))
        return joined + list(asked.values())

    def begin(self, job: dict[str, Any], points: list[Point], searched: Iterable[str]) -> list[str]:
        """Enter ``points`` into the record of what is searched.

        Args:
            job: json-able record of what all points have in common.
            points: the points of this call.
            searched: the parameters that its space varies.

        Returns:
            The parameters that any call has varied.

        Raises:
            InputError: the folder holds a search of another ``job``.
        """
        job = json.loads(json.dumps(job))
        record = self.record() or {"job": job, "searched": [], "points": {}}
        self._refuse_difference(record["job"], job, set(searched))
        columns = sorted({*record["searched"], *searched})
        record = {
            "job": {**record["job"], "data": {**record["job"]["data"], **job["data"]}},
            "searched": columns,
            "points": {**record["points"], **{point.name: point.settings for point in points}},
        }
        for folder in (self.path, self.path / "prototypes"):
            remove_leftovers(folder)
        write_text(self._record_file, json.dumps(record, indent=2) + "\n")
        return columns

    def record(self) -> dict[str, Any] | None:
        """What :meth:`begin` wrote last; ``None`` in a new folder."""
        return read_json(self._record_file)

    def forget(self) -> None:
        """Nothing could even be begun: leave no record that the next attempt would have to agree with."""
        self._record_file.unlink(missing_ok=True)
        for unfinished in (self.path / "prototypes").glob("*.partial"):
            unfinished.unlink()

    def look(self, run: Path, point: Point, seed: int) -> dict[str, Any]:
        """How far the run in the folder ``run`` is.

        Returns:
            ``state``: ``"new"``, ``"other"`` (a run of another point), ``"begun"``, ``"failed"`` (and ``failure``, why)
            or ``"finished"`` (and ``val_accuracy`` after the last epoch, ``seconds`` of training, ``skipped`` files).
        """
        written = read_json(run / "config.json")
        if written is None:
            return {"state": "new"}
        theirs, ours = written["training"], {**asdict(point.config), "seed": seed}
        same = all(theirs.get(name, value) == value for name, value in ours.items() if name not in TRACELESS)
        if not same or written["start"]["num_prompts"] != point.num_prompts:
            return {"state": "other"}
        failed, summary = read_json(run / "failed.json"), read_json(run / "summary.json")
        if failed is not None:
            return {"state": "failed", **failed}
        if summary is None:
            return {"state": "begun"}
        return {
            "state": "finished",
            "val_accuracy": summary["final_accuracy"],
            "seconds": summary["train_seconds"],
            "skipped": summary["skipped"],
        }

    def write_table(self, rows: list[dict[str, Any]]) -> None:
        """Replace ``results.csv``."""
        write_csv(self.path / "results.csv", rows)

    def _refuse_difference(self, theirs: dict[str, Any], ours: dict[str, Any], searched: set[str]) -> None:
        # What the space varies is not the same for all points.
        free = {f"config.{name}" for name in searched} | searched
        for name, old, new in differences(theirs, ours):
            if name not in free:
                raise InputError(
                    f"the sweep in {self.path} has {name}={old!r} and this call asks for {name}={new!r}; "
                    "overwrite it or name another folder"
                )


def read_json(path: Path) -> Any:
    """The content of a json file; ``None`` if it is not there.

    Raises:
        CheckpointError: it is not json.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is not json: {error}") from error


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a table; its columns are the keys of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
