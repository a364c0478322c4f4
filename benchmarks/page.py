"""The benchmarks' page: one self-contained HTML text out of records; its look lives in ``page.html`` beside this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.comparison import Comparison, common, comparisons, notes
from benchmarks.figures import benchmark_figures, mark_key, roofline_figure
from benchmarks.naming import (
    description,
    joined,
    machine_line,
    memory,
    position,
    sentence,
    title,
)
from benchmarks.record import slug
from benchmarks.tables import table
from spt_fast.drawing import definitions, escape, page_style
from spt_fast.errors import InputError

Record = dict[str, Any]

TEMPLATE = Path(__file__).with_name("page.html")
LEAD = (
    "Every chart stands above the command that measures it again and names its machine. A mark is the median, the line "
    "through it goes from the first to the third quartile. Peers take turns in one run; 2x is twice the time of the "
    "peer in bold."
)


def page(records: Sequence[Record]) -> str:
    """The page that shows these records, in their order of devices.

    Raises:
        InputError: there is none, or one is broken.
    """
    if not records:
        raise InputError("there is no record of a benchmark to make a page of")
    devices: dict[str, list[Record]] = {}
    for record in records:
        devices.setdefault(str(record["machine"]["device"]), []).append(record)
    for own in devices.values():
        own.sort(key=lambda record: position(record["benchmark"]))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        style=page_style(),
        headline=escape(f"Measured on {joined(list(devices))}."),
        lead=LEAD,
        key=mark_key(),
        contents="\n".join(_contents(device, own) for device, own in devices.items()),
        sections="\n".join(_device(device, own) for device, own in devices.items()),
    )


def _contents(device: str, records: Sequence[Record]) -> str:
    links = "".join(
        f'<li><a href="#{_anchor(record)}">{escape(title(record["benchmark"]))}</a></li>'
        for record in records
    )
    return f'<div><h2><a href="#{slug(device)}">{escape(device)}</a></h2>\n<ul role="list">{links}</ul></div>'


def _device(device: str, records: Sequence[Record]) -> str:
    anchor = slug(device)
    found = [(record, comparisons(record)) for record in records]
    return "\n".join(
        [
            f'<section class="device" aria-labelledby="{anchor}">',
            f'<h2 id="{anchor}">{escape(device)}</h2>',
            definitions(_facts([record["machine"] for record in records])),
            roofline_figure(anchor, found),
            *(_benchmark(record, own) for record, own in found),
            "</section>",
        ]
    )


def _benchmark(record: Record, found: Sequence[Comparison]) -> str:
    anchor, name = _anchor(record), title(record["benchmark"])
    unfinished = (
        ""
        if record["complete"]
        else '<p class="incomplete">Incomplete: the run ended before all cases were measured.</p>'
    )
    return "\n".join(
        [
            f'<section class="benchmark" aria-labelledby="{anchor}">',
            f'<h3 id="{anchor}">{escape(name)}</h3>',
            f'<p class="about">{escape(_about(record, found))}</p>',
            unfinished,
            benchmark_figures(anchor, record, found),
            _remarks(found),
            table(found, f"{name}, {record['machine']['device']}"),
            f"<pre><code>{_command(record['command'])}</code></pre>",
            f'<p class="with">{escape(_measured_with(record))}</p>',
            "</section>",
        ]
    )


def _about(record: Record, found: Sequence[Comparison]) -> str:
    shared = common(found)
    return " ".join(
        each for each in (description(record["benchmark"]), f"All with {shared}." if shared else "") if each
    )


def _measured_with(record: Record) -> str:
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in record.get("settings", {}).items()
    )
    return f"{machine_line(record['machine'])}{f'; {settings}' if settings else ''}."


def _command(command: str) -> str:
    """Text whose lines break between words, not at the hyphens of an option."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _remarks(found: Sequence[Comparison]) -> str:
    lines = "\n".join(f"<li><b>{escape(peer)}</b> {escape(words)}</li>" for peer, words in notes(found))
    return f'<ul role="list" class="remarks">\n{lines}\n</ul>' if lines else ""


def _facts(machines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is known of the machines behind a device's records; where they differ, all of it."""
    facts: dict[str, dict[str, None]] = {}
    for machine in machines:
        for name, value in _machine_facts(machine).items():
            facts.setdefault(name, {})[value] = None
    return {sentence(name): ", ".join(values) for name, values in facts.items()}


def _machine_facts(machine: Mapping[str, Any]) -> dict[str, str]:
    on_gpu = machine.get("device_type") == "cuda"
    facts = {
        "GPU memory": memory(machine["device_memory_bytes"]) if "device_memory_bytes" in machine else None,
        "multiprocessors": machine.get("multiprocessors"),
        "compute capability": machine.get("compute_capability"),
        "driver": machine.get("driver"),
        "CUDA": machine.get("cuda"),
        "processor": machine.get("cpu") if on_gpu else None,
        "cores, threads": f"{machine['cores']}, {machine['threads']}" if "cores" in machine else None,
        "memory": memory(machine["memory_bytes"]) if "memory_bytes" in machine else None,
        "system": machine.get("system"),
        "commit": machine.get("commit"),
        "date": machine.get("date"),
    }
    versions = machine.get("versions", {})
    facts["versions"] = ", ".join(f"{package} {version}" for package, version in versions.items()) or None
    return {name: str(value) for name, value in facts.items() if value is not None}


def _anchor(record: Record) -> str:
    return f"{slug(record['machine']['device'])}-{slug(record['benchmark'])}"
