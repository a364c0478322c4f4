"""Runs a test file's cases under Triton's interpreter.

Triton decides when it is first imported whether it compiles or interprets. So one child process, in which the file is a
program, tries every case; each test then asks how its case went.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

Case = Callable[[], None]


def outcomes_of(file: str) -> dict[str, str | None]:
    """Case -> its traceback, or ``None`` if it went well; ``file`` ends with :func:`print_outcomes`."""
    root = Path(__file__).resolve().parents[1]
    found = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), found.get("PYTHONPATH")]))
    child = subprocess.run([sys.executable, file], env=found, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    outcomes: dict[str, str | None] = json.loads(child.stdout.splitlines()[-1])
    return outcomes


def print_outcomes(cases: Mapping[str, Case]) -> None:
    """Try every case and print, as json, how each went."""
    outcomes: dict[str, str | None] = {}
    for name, run in cases.items():
        try:
            run()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))
