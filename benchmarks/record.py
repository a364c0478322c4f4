"""What a benchmark writes: where it ran, with what, and every sample it took.

A record is one json file, ``<date>-<device>-<benchmark>.json``, or ``...-partial.json`` as long as it is not complete,
so that half a measurement never takes the place of a whole one::

    {"benchmark": "attention", "command": "python -m benchmarks.attention --device cpu", "machine": {...},
     "settings": {...}, "ceilings": {...}, "complete": true, "rows": [...]}

A row is one peer in one case, and says what kind of knowledge it is:

==============  =====================================================================================================
kind            beside ``case`` and ``peer``
==============  =====================================================================================================
measured        ``seconds``: every sample, taken here and now; optionally ``limit``: the least time the hardware allows
missing         ``reason``: why there is nothing to compare with
quoted          ``value_seconds`` that somebody else published, and its ``source``
extrapolated    ``value_seconds`` computed by ``rule`` from the samples in ``measured``: ``[[size, seconds], ...]``
==============  =====================================================================================================

Nothing derived is stored: medians, ratios and shares are computed by whoever shows them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spt_fast
from benchmarks.ceilings import Limit
from spt_fast.devices import device_name
from spt_fast.errors import InputError
from spt_fast.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "timm",
    "triton",
    "numpy",
    "cupy-cuda13x",
    "scikit-learn",
    "faiss-cpu",
    "faiss-gpu",
    "fastkmeans",
    "flash-kmeans",
    "cuml-cu13",
    "cuvs-cu13",
    "torchao",
)

Case = Mapping[str, Any]
Row = dict[str, Any]


class Record:
    """The results of one benchmark, on disk after every :meth:`save`.

    Args:
        benchmark: its name, that of its module.
        command: how to measure all this again.
        device: what is measured.
        folder: where the file goes.
        settings: what was asked for and is the same in all rows, rounds for example.
        minutes: after which no further case may begin; ``None`` is never.

    Example:
        >>> import tempfile
        >>> record = Record("sleep", "python -m benchmarks.sleep", torch.device("cpu"), Path(tempfile.mkdtemp()))
        >>> record.measured({"naps": 1}, "spt-fast", [0.9, 1.1])
        >>> record.measured({"naps": 1}, "made up", [])
        Traceback (most recent call last):
        spt_fast.errors.InputError: no sample of made up was measured, and a record holds nothing else
        >>> record.finish()
        >>> Record.load(record.path)["rows"]
        [{'kind': 'measured', 'case': {'naps': 1}, 'peer': 'spt-fast', 'seconds': [0.9, 1.1]}]
    """

    def __init__(
        self,
        benchmark: str,
        command: str,
        device: torch.device,
        folder: Path = RESULTS,
        settings: Mapping[str, Any] | None = None,
        minutes: float | None = None,
    ) -> None:
        self._folder = folder
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "command": command,
            "machine": machine(device),
            "settings": dict(settings or {}),
            "ceilings": {},
            "complete": False,
            "rows": [],
        }
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._cut_short = False

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.content["rows"]
        return rows

    @property
    def path(self) -> Path:
        """Where it is, or will be when it is saved."""
        where, benchmark = self.content["machine"], self.content["benchmark"]
        part = "" if self.content["complete"] else "-partial"
        return self._folder / f"{where['date']}-{slug(where['device'])}-{benchmark}{part}.json"

    def may_begin(self) -> bool:
        """Whether there is time for another case; if not, the record stays a partial one."""
        self._cut_short = self._cut_short or time.monotonic() > self._deadline
        return not self._cut_short

    def measured(
        self,
        case: Case,
        peer: str,
        seconds: Sequence[float],
        *,
        limit: Limit | None = None,
        **facts: Any,
    ) -> None:
        """Add a peer's samples, the least time that the hardware allows, and what else was measured of it."""
        if not seconds:
            raise InputError(f"no sample of {peer} was measured, and a record holds nothing else")
        if not all(math.isfinite(each) and each > 0 for each in seconds):
            raise InputError(f"{peer} has samples that are no times: {list(seconds)}")
        row = _row("measured", case, peer) | {"seconds": list(seconds)}
        if limit is not None:
            row["limit"] = asdict(limit)
        self.rows.append(row | facts)

    def missing(self, case: Case, peer: str, reason: str) -> None:
        """Say why a peer has no time."""
        self.rows.append(_row("missing", case, peer) | {"reason": reason})

    def quoted(self, case: Case, peer: str, seconds: float, source: str) -> None:
        """Repeat a time that somebody else published."""
        self.rows.append(_row("quoted", case, peer) | {"value_seconds": seconds, "source": source})

    def extrapolated(
        self, case: Case, peer: str, seconds: float, rule: str, measured: Iterable[tuple[float, float]]
    ) -> None:
        """Add what would be expected of a size that was not run, from sizes that were."""
        points = [list(point) for point in measured]
        if not points:
            raise InputError(f"{peer} was measured at no size, so nothing can be extrapolated from it")
        self.rows.append(
            _row("extrapolated", case, peer) | {"value_seconds": seconds, "rule": rule, "measured": points}
        )

    def save(self) -> None:
        """Write what there is; an interruption later leaves this."""
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def finish(self) -> None:
        """Write everything. It counts as complete unless a case could not begin."""
        if not self.rows:
            raise InputError(f"{self.content['benchmark']} measured nothing, so there is nothing to write")
        partial = self.path
        self.content["complete"] = not self._cut_short
        self.save()
        if self.content["complete"]:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """A record from disk.

        Raises:
            InputError: it is not one; the message names the file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            assert {"benchmark", "command", "machine", "rows", "complete"} <= set(content)
            assert {"device", "device_type"} <= set(content["machine"])
        except (AssertionError, ValueError, TypeError):
            raise InputError(f"{path} is not a benchmark's record") from None
        return dict(content)


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Of every benchmark on every device the newest record in ``folder``, GPUs first; other files are passed over.

    A partial record counts only where there is no complete one.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("????-??-??-*.json")):
        record = Record.load(path)
        key = record["machine"]["device"], record["benchmark"]
        if record["complete"] or not found.get(key, {}).get("complete"):
            found[key] = record
    return sorted(found.values(), key=lambda record: record["machine"]["device_type"] != "cuda")


def slug(text: str) -> str:
    """``"NVIDIA H200"`` -> ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what something was measured."""
    facts = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "spt_fast": spt_fast.__version__,
            "python": platform.python_version(),
            **installed_versions(*PACKAGES),
        },
        "commit": _commit(),
        "date": date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    """The commit that is checked out, with a plus if files differ from it; ``SPT_FAST_COMMIT`` where git has none."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("SPT_FAST_COMMIT")
    # Results and what is made of them change while benchmarks run.
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py", "*.cu*", "*.cpp", "*.h")
    return head + ("+" if changed else "")


def _driver() -> str | None:
    shown = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return shown.splitlines()[0] if shown else None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _row(kind: str, case: Case, peer: str) -> Row:
    return {"kind": kind, "case": dict(case), "peer": peer}
