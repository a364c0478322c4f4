"""What ``benchmarks.compare_starts`` found, for the README: which start, and which rule for its learning rate."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from benchmarks.compare_starts import NAMES, STARTS, TRAIN_PER_CLASS
from benchmarks.markdown import shell, table, wrapped
from benchmarks.naming import counted, joined, machine_line, percent
from benchmarks.record import RESULTS
from spt_fast.errors import InputError

Results = dict[str, Any]
Run = dict[str, Any]

DATA = {"cifar10": "CIFAR-10", "digits": "digits"}
BASELINE = "uniform"
PAPER = "The paper's gains of 10 to 30 points were measured with ViT-B after 100 epochs; neither is repeated here."
NEAR = 0.01  # of the best accuracy: what counts as good


def load_starts(folder: Path = RESULTS) -> dict[str, Results]:
    """The results in ``starts-<data>.json``, by data."""
    found = {}
    for path in sorted(folder.glob("starts-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            assert {"setting", "machine", "runs"} <= set(content) and content["runs"]
        except (AssertionError, ValueError, TypeError):
            raise InputError(f"{path} holds no comparison of starts") from None
        found[path.stem.removeprefix("starts-")] = content
    return found


def starts_section(starts: dict[str, Results]) -> str:
    """Markdown: test accuracies of every start, the sweep of learning rates, and how to get them again."""
    machines = machine_line(*(each["machine"] for each in starts.values()))
    swept = [(name, results) for name, results in starts.items() if len(_scales(results)) > 1]
    commands = "\n".join(_command(name, results) for name, results in starts.items())
    parts = [
        "### Starts of prompts",
        wrapped(
            f"{machines}. Accuracies are those of the bundled backbone, which is "
            "[small and weak](spt_fast/assets/README.md): compare them with each other only."
        ),
        *_which_start(starts),
        *(part for name, results in swept for part in _which_rule(name, results)),
        shell(commands),
    ]
    if "cifar10" in starts:
        parts.append(
            wrapped(
                "`cifar10/*.zip` are ImageFolders of CIFAR-10 (training images, and 5,000 of the test images), folders "
                f"do as well; of each class {TRAIN_PER_CLASS} images are trained on."
            )
        )
    return "\n\n".join(parts)


def _which_start(starts: dict[str, Results]) -> list[str]:
    tested = {name: _tested(results) for name, results in starts.items()}
    settings = dict.fromkeys(_setting(results, tested[name]) for name, results in starts.items())
    head = [""] + [words for name in starts for words in (DATA.get(name, name), "its base rate")]
    rows = []
    for start in (start for start in NAMES if any(start in each for each in tested.values())):
        cells = [NAMES[start]]
        for name, results in starts.items():
            runs = tested[name].get(start)
            cells += ["–", "–"] if runs is None else [_accuracy(runs), _rate(runs[0], results)]
        rows.append(cells)
    gains = [words for name in starts if (words := _gains(name, tested[name]))]
    return [
        wrapped(
            f"**Which start?** {'; '.join(settings)}. Each start runs at its own best base rate, chosen on images that "
            "are neither trained nor tested on; test accuracy, mean and standard deviation over the seeds:"
        ),
        table(head, rows),
        wrapped(" ".join([*gains, PAPER])),
    ]


def _which_rule(name: str, results: Results) -> list[str]:
    sweeps = {
        (scale, start): accuracies
        for scale in _scales(results)
        for start in NAMES
        if (accuracies := _swept(results, scale, start))
    }
    rates = sorted({rate for accuracies in sweeps.values() for rate in accuracies})
    rows = []
    for (scale, start), accuracies in sweeps.items():
        good = _good(accuracies)
        cells = [_in_bold(accuracies.get(rate), rate in good) for rate in rates]
        reach = f"{len(good)} of {len(accuracies)}: {min(good):g} to {max(good):g}"
        rows.append([scale, NAMES[start], *cells, reach])
    return [
        wrapped(
            f"**One learning rate for every start?** Validation accuracy on {DATA.get(name, name)} (%) of one seed by "
            "base rate, in bold what is within a point of the row's best:"
        ),
        table(["`lr_scale`", "start", *(f"{rate:g}" for rate in rates), "within 1 point of its best"], rows),
        wrapped(
            " ".join(
                [*_comparison_of_rules(sweeps), 'The defaults are `lr_scale="rms"` and a base rate of 0.03.']
            )
        ),
    ]


def _comparison_of_rules(sweeps: dict[tuple[str, str], dict[float, float]]) -> list[str]:
    """How wide the good range is under each rule, and whose best is better, for the starts that have both."""
    both = [start for scale, start in sweeps if scale == "rms" and ("none", start) in sweeps]
    if not both:
        return []
    widths = {
        scale: joined([str(len(_good(sweeps[scale, start]))) for start in both]) for scale in ("rms", "none")
    }
    best = {key: _points(max(accuracies.values())) for key, accuracies in sweeps.items()}
    gaps = [best["none", start] - best["rms", start] for start in both]
    names = joined([_short(start) for start in both])
    return [
        f"Rates within a point of the best, for {names}: {widths['rms']} under `rms`, {widths['none']} under `none`.",
        f"The best accuracy under `none` minus that under `rms`: {joined([f'{gap:+.1f}' for gap in gaps])} points.",
    ]


def _gains(name: str, tested: dict[str, list[Run]]) -> str:
    """By how many points the starts are above the uniform one."""
    others = [start for start in NAMES if start in tested and start != BASELINE]
    if BASELINE not in tested or not others:
        return ""
    base = _points(_mean(tested[BASELINE]))
    points = joined([f"{_points(_mean(tested[start])) - base:+.1f} ({_short(start)})" for start in others])
    return f"Points from the uniform start on {DATA.get(name, name)}: {points}."


def _setting(results: Results, tested: dict[str, list[Run]]) -> str:
    setting = results["setting"]
    seeds = max(len(runs) for runs in tested.values())
    return f"{setting['num_prompts']} deep prompts, {counted(setting['epochs'], 'epoch')}, {counted(seeds, 'seed')}"


def _tested(results: Results) -> dict[str, list[Run]]:
    """The runs at the chosen rates, by start."""
    found: dict[str, list[Run]] = {}
    for run in results["runs"]:
        if run["test"]:
            found.setdefault(run["start"], []).append(run)
    return found


def _swept(results: Results, scale: str, start: str) -> dict[float, float]:
    """Validation accuracy by base rate."""
    found = {
        run["learning_rate"]: run["val_accuracy"]
        for run in results["runs"]
        if (run["lr_scale"], run["start"], run["test"]) == (scale, start, False)
    }
    return dict(sorted(found.items()))


def _good(accuracies: dict[float, float]) -> list[float]:
    best = max(accuracies.values())
    return [rate for rate, accuracy in accuracies.items() if accuracy >= best - NEAR]


def _scales(results: Results) -> list[str]:
    return list(dict.fromkeys(run["lr_scale"] for run in results["runs"]))


def _accuracy(runs: list[Run]) -> str:
    return percent([run["test_accuracy"] for run in runs])


def _mean(runs: list[Run]) -> float:
    return statistics.mean(run["test_accuracy"] for run in runs)


def _points(accuracy: float) -> float:
    """As shown, so that readers who subtract what they see find the same."""
    return round(100 * accuracy, 1)


def _rate(run: Run, results: Results) -> str:
    tried = {each["learning_rate"] for each in results["runs"] if each["start"] == run["start"]}
    rate = run["learning_rate"]
    return f"{rate:g}, the highest tried" if rate == max(tried) else f"{rate:g}"


def _in_bold(accuracy: float | None, good: bool) -> str:
    if accuracy is None:
        return "–"
    return f"**{100 * accuracy:.1f}**" if good else f"{100 * accuracy:.1f}"


def _short(start: str) -> str:
    return NAMES[start].partition(", ")[2]


def _command(name: str, results: Results) -> str:
    """The command that makes these results; what it does by itself is not said."""
    data = ["digits"] if name == "digits" else [f"{name}/train.zip", "--test-data", f"{name}/val.zip"]
    present = dict.fromkeys(run["start"] for run in results["runs"])
    starts = [start for start in STARTS if start in present] + [
        start for start in present if start not in STARTS
    ]
    scales = _scales(results)
    words = ["python", "-m", "benchmarks.compare_starts", "--data", *data]
    words += [] if starts == list(STARTS) else [word for start in starts for word in ("--starts", start)]
    words += (
        [] if scales == ["rms", "none"] else [word for scale in scales for word in ("--lr-scales", scale)]
    )
    words += ["--epochs", str(results["setting"]["epochs"])]
    return shlex.join([*words, "--output", f"benchmarks/results/starts-{name}.json"])
