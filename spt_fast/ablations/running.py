"""Run an ablation: prototypes, learning rates where they are chosen, then every variant with every seed.

Everything lies in files, so that the same call goes on where it was interrupted:

    OUTPUT/ablation.json                    what all runs have in common
    OUTPUT/images/                          images, decoded
    OUTPUT/prototypes/                      what the prompts of runs start from
    OUTPUT/runs/VARIANT/lr=R,seed=S,PART/   a run, judged on PART (choose or test); outcome.json says how it ended
    OUTPUT/table.{json,csv,md}, figure.{png,svg}
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spt_fast.ablations.runs import Run, Start, build_start, execute
from spt_fast.ablations.subsets import subset
from spt_fast.ablations.variants import Ablation, Variant
from spt_fast.ablations.workers import Workers, workers
from spt_fast.ablations.workplace import Workplace, decode_images, listed_images
from spt_fast.errors import InputError
from spt_fast.experiment_records import check_seeds, differences
from spt_fast.files import remove_leftovers, write_text
from spt_fast.methods import METHODS
from spt_fast.progress import Progress
from spt_fast.sweep_folder import read_json

CHOOSING_SEED = 0


@dataclass(frozen=True)
class Finished:
    """A variant and what came of its runs.

    Attributes:
        variant: what was trained.
        learning_rate: base rate; ``None`` if the loss stayed finite with none of those that were tried.
        seeds: of the runs.
        outcomes: of each seed, see :func:`spt_fast.ablations.runs.execute`.
        tried: accuracy on the images to choose on by learning rate (``None``: the loss did not stay finite); empty if
            nothing was chosen.
    """

    variant: Variant
    learning_rate: float | None
    seeds: tuple[int, ...]
    outcomes: tuple[dict[str, Any], ...]
    tried: dict[float, float | None]


def run_ablation(
    ablation: Ablation,
    workplace: Workplace,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (),
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[Finished]:
    """Train every variant of ``ablation`` with every seed, and judge it.

    Args:
        ablation: what to compare.
        workplace: what all runs have in common. With several learning rates it says which images they are chosen on.
        seeds: of the runs; each draws its own prototypes and part of the training images.
        learning_rates: base rates. None: each method's own. Several: each variant is trained with all of them, with
            seed 0, and keeps the one that is best on the images to choose on; only then is it judged.
        jobs: processes that run at the same time, sharing the cores.
        progress: called with the runs done so far.

    Returns:
        What came of each variant, in order.

    Raises:
        InputError: a folder with another ablation's runs, a rate that is not positive and finite, several rates and
            nothing to choose on, a split that is not there, fewer images than a variant asks for, ``jobs < 1``.
            Nothing has been written then.
        MissingFileError: a data set that is not there.
    """
    check_seeds(seeds)
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, got {jobs}")
    for rate in learning_rates:
        replace(workplace.config, learning_rate=rate)  # refuses one that cannot be
    if len(learning_rates) > 1 and workplace.choose_split is None:
        raise InputError(
            f"{len(learning_rates)} learning rates need images to choose on, got choose_split=None"
        )
    _check_images(ablation, workplace)
    report = progress or (lambda stage, done, total: None)
    # This process trains only if it is alone; a device that it does not use is left to the others.
    here = workplace if jobs == 1 else replace(workplace, device="cpu")
    _begin(ablation, here)
    decode_images(here, progress)
    if jobs > 1 and workplace.config.num_workers is None:
        # Processes that share the cores have none left for others that only feed them.
        workplace = replace(workplace, config=replace(workplace.config, num_workers=0))
    variants: dict[str, Variant] = {}
    for variant in ablation.variants:  # of those with equal settings the first gives its name to the runs
        variants.setdefault(json.dumps(variant.settings), variant)
    chosen: dict[str, float | None] = {}
    tried: dict[str, dict[float, float | None]] = {}
    with workers(jobs) as crew:
        for key, variant in variants.items():
            chosen[key] = learning_rates[0] if learning_rates else METHODS[variant.method].learning_rate
        if len(learning_rates) > 1:
            trials = {
                (key, rate): Run(variant, rate, CHOOSING_SEED, "choose")
                for key, variant in variants.items()
                for rate in learning_rates
            }
            outcomes = _complete(crew, workplace, list(trials.values()), "choosing learning rates", report)
            for (key, rate), outcome in zip(trials, outcomes, strict=True):
                tried.setdefault(key, {})[rate] = outcome.get("accuracy")
            chosen = {key: _best(accuracies) for key, accuracies in tried.items()}
        runs = {
            (key, seed): Run(variant, best, seed, "test")
            for key, variant in variants.items()
            if (best := chosen[key]) is not None
            for seed in seeds
        }
        outcomes = _complete(crew, workplace, list(runs.values()), "runs", report)
        judged = dict(zip(runs, outcomes, strict=True))
    finished = []
    for variant in ablation.variants:
        key = json.dumps(variant.settings)
        own_outcomes = tuple(judged[key, seed] for seed in seeds if (key, seed) in judged)
        finished.append(Finished(variant, chosen[key], tuple(seeds), own_outcomes, tried.get(key, {})))
    return finished


def _check_images(ablation: Ablation, workplace: Workplace) -> None:
    """Raise where images are missing that a run would ask for, before any of the others is decoded."""
    for data, part in itertools.product(range(len(workplace.data)), workplace.parts):
        listed_images(workplace, part, data)
    asked = (
        (data, variant.subset) for variant in ablation.variants for data in (variant.data, variant.start_data)
    )
    for data, chosen in dict.fromkeys(asked):  # several variants ask for the same
        if chosen is not None:
            subset(listed_images(workplace, "train", data), chosen, seed=0)


def _begin(ablation: Ablation, workplace: Workplace) -> None:
    """Enter into the folder what all runs have in common, or refuse one that has runs of something else."""
    file = workplace.output / "ablation.json"
    ours = json.loads(json.dumps({"ablation": ablation.name, **workplace.record()}))
    kept = read_json(file)
    if kept is not None:
        for name, old, new in differences(kept, ours, may_lack=("data.", "models.", "config.")):
            raise InputError(
                f"the ablation in {workplace.output} has {name}={old!r} and this call asks for {name}={new!r}; "
                "name another folder"
            )
        ours = {**ours, **{name: {**kept[name], **ours[name]} for name in ("data", "models")}}
    for folder in (workplace.output, workplace.output / "prototypes"):
        remove_leftovers(folder)
    write_text(file, json.dumps(ours, indent=2) + "\n")


def _complete(
    crew: Workers, workplace: Workplace, runs: Sequence[Run], stage: str, report: Progress
) -> list[dict[str, Any]]:
    """The outcomes of runs, of which those that are missing are run now, their prototypes first."""
    missing = [run for run in runs if run.outcome(workplace) is None]
    starts = _joined([run.start for run in missing if run.start is not None])
    if starts:
        crew.each(
            functools.partial(_build, workplace),
            starts,
            lambda done: report(f"prototypes for {stage}", done, len(starts)),
        )
    if missing:
        finished = len(runs) - len(missing)
        crew.each(
            functools.partial(execute, workplace),
            missing,
            lambda done: report(stage, finished + done, len(runs)),
        )
    outcomes = [run.outcome(workplace) for run in runs]
    assert all(outcome is not None for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


def _build(workplace: Workplace, start: Start) -> None:
    build_start(workplace, start)


def _joined(starts: Sequence[Start]) -> list[Start]:
    """Starts that differ in the number of prompts alone are built in one pass."""
    lengths: dict[str, set[int]] = {}
    for start in starts:
        lengths.setdefault(start.settings, set()).update(start.lengths)
    return [Start(settings, tuple(sorted(numbers))) for settings, numbers in lengths.items()]


def _best(accuracies: dict[float, float | None]) -> float | None:
    """The rate with the highest accuracy, the first of equals."""
    known = {rate: accuracy for rate, accuracy in accuracies.items() if accuracy is not None}
    return max(known, key=known.__getitem__) if known else None
