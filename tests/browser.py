"""A headless Chromium that lays pages out, for tests of what a person would see."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium to lay the page out"
)
DARK = "--blink-settings=preferredColorScheme=0"


@dataclass
class Opened:
    """What became of a page: its elements after its scripts ran, and what it wrote to the console."""

    dom: str
    console: list[str]


def open_page(page: Path, *options: str) -> Opened:
    """Open a file in a browser of its own."""
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1280,800",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=True)
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def measure(
    folder: Path, function: str, frames: Sequence[tuple[str, int]], *options: str
) -> tuple[list[Any], list[str]]:
    """Lay out pages of ``folder`` in frames of given widths; what ``function`` says of each, and what they logged.

    ``function`` is JavaScript that takes a window and returns something that json can hold.
    """
    inside = "".join(
        f"<iframe src='{page}' style='width:{width}px;height:600px;border:0'></iframe>"
        for page, width in frames
    )
    script = (
        f"onload = () => {{ const measure = {function}; document.title = JSON.stringify("
        "[...document.querySelectorAll('iframe')].map(frame => measure(frame.contentWindow))) }"
    )
    page = folder / "measure.html"
    page.write_text(f"<!doctype html><body>{inside}<script>{script}</script>", encoding="utf-8")
    opened = open_page(page, *options)
    found = re.search(r"<title>(.*?)</title>", opened.dom, flags=re.DOTALL)
    assert found, opened.dom[-2000:]
    return json.loads(html.unescape(found[1])), opened.console
