"""Hyper-parameters chosen on the validation split, as the paper does; the test split is looked at once, at the end.

Everything that was decided or measured lies in files, so that a search goes on where it was interrupted:

    OUTPUT/sweep.json                 what is searched: backbone, data, what is the same for all points, the points
    OUTPUT/prototypes/                what the prompts of all runs start from
    OUTPUT/trials/POINT/seed-S/       a run on train, judged on val
    OUTPUT/results.csv                a row for each point
    OUTPUT/best/seed-S/               the best point on train + val, with its score on test in test.json
    OUTPUT/summary.json               what came out
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from spt_fast.backbones import backbone_identity, source_of
from spt_fast.building import build_prototypes
from spt_fast.data import ImageDataset
from spt_fast.distributed import from_rank_0, process_group, world
from spt_fast.errors import DivergedError, InputError
from spt_fast.evaluation import evaluate
from spt_fast.experiment_records import check_seeds, described_images, sample_std
from spt_fast.files import write_text
from spt_fast.kept_prototypes import kept_prototypes
from spt_fast.progress import Progress
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes
from spt_fast.search_space import TRACELESS, Point, points_of
from spt_fast.sweep_folder import SweepFolder, read_json
from spt_fast.training import train
from spt_fast.training_config import TrainingConfig

# images(split, train): a split with the transform for training, or with the one for looking at it.
Images = Callable[[str, bool], ImageDataset]

_OWN = ("backbone", "images", "num_prompts", "num_classes", "prompts", "progress", "checkpoint", "resume")
START = {
    name: parameter.default
    for name, parameter in inspect.signature(build_prototypes).parameters.items()
    if name not in _OWN
}
MODEL = tuple(name for name in inspect.signature(PromptedViT).parameters if name not in _OWN)
# What of both says how the work is done, and changes nothing in the result.
TRACELESS_ARGUMENTS = ("token_budget", "token_cache", "checkpoint_minutes", "checkpoint_blocks")


@dataclass(frozen=True)
class SweepResult:
    """What :func:`sweep` found.

    Attributes:
        points: a dict for each row of ``results.csv``: ``point`` (its name), the parameters of the space, ``runs``,
            ``val_accuracy_mean``, ``val_accuracy_std`` (sample standard deviation over seeds), ``val_accuracy_seed_S``
            for each seed, ``seconds`` (of training, over all seeds), ``failure``; ``None`` where there is no number.
        point: the name of the best point.
        parameters: its parameters of the space.
        val_accuracy_mean: its mean validation accuracy after the last epoch, 0 to 1; ``None`` if there was only one
            point, which was not validated.
        val_accuracy_std: the sample standard deviation; ``None`` also with one seed.
        seeds: the seeds.
        test_accuracies: on test, after training on train + val, for each of ``seeds``.
        test_accuracy_mean: their mean.
        test_accuracy_std: their sample standard deviation; ``None`` with one seed.
        skipped: unreadable files: ``{"training": ..., "test": ...}``, in the last epoch of training of the best point
            and when it was scored.
        adapters: the files of the trained adapters, one for each seed, relative to ``output``.
        output: the folder.
    """

    points: list[dict[str, Any]]
    point: str
    parameters: dict[str, Any]
    val_accuracy_mean: float | None
    val_accuracy_std: float | None
    seeds: list[int]
    test_accuracies: list[float]
    test_accuracy_mean: float
    test_accuracy_std: float | None
    skipped: dict[str, int]
    adapters: list[str]
    output: Path

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds: all but the points, with paths relative to the folder."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("points", "output")}
        return {**kept, "results": "results.csv"}


def sweep(
    backbone: VisionTransformer,
    images: Images,
    *,
    output: str | os.PathLike[str],
    space: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] = (0,),
    config: TrainingConfig | None = None,
    start: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    num_prompts: int = 20,
    trials: int | None = None,
    prototype_batch_size: int = 32,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Try the points of a space, choose the best on the validation split, train it again and score it once on test.

    Every point is trained on ``train`` with every seed. The best has the highest mean accuracy on ``val`` after the
    last epoch (not after the best epoch: nothing would choose one in the training that follows); of equals, the first.
    It is trained on ``trainval`` with every seed and scored on ``test``. Where there is only one point, nothing is to
    be chosen and nothing is validated.

    The same call goes on after an interruption, and ends as if there had been none. Another space adds its points to
    those that are finished already. A point whose loss does not stay finite has failed, and the search goes on.
    Started by torchrun, all processes train each run together; rank 0 writes.

    Args:
        backbone: the frozen timm ViT, on the device to work on.
        images: ``images(split, train)`` opens ``"train"``, ``"val"``, ``"trainval"`` or ``"test"``, with the transform
            for training (``train=True``) or for looking. It is asked once for each.
        output: a folder for everything.
        space: values to try, by the name of a field of :class:`TrainingConfig` (all but ``seed``) or ``"num_prompts"``.
        seeds: of the runs: head, order, augmentation, dropout. The first also draws the trials and the prototypes.
        config: what the space leaves alone.
        start: arguments of :func:`spt_fast.build_prototypes` other than ``num_prompts``: ``method``, ``depth`` ...
        model: arguments of :class:`spt_fast.PromptedViT`: ``pool``, ``prompt_dropout`` ...
        num_prompts: prompt tokens per block, if the space leaves it alone. Prototypes for all lengths in the space come
            from one pass over the images.
        trials: how many points to draw from the space, without repetition; ``None`` takes all.
        prototype_batch_size: images at a time while prototypes are built.
        metadata: json-able entries for the adapters' record, for example how images are transformed.
        overwrite: start over, whatever is in ``output``.
        progress: called with how far the current part of the work is.

    Returns:
        :class:`SweepResult`, also written to ``results.csv`` (after every run) and ``summary.json`` (at the end).

    Raises:
        InputError: a space, ``start`` or ``model`` that is refused (before any work; the message names what), a sweep
            of another backbone, other images or another configuration in ``output``, or no point that could be trained.

    Example:
        >>> import tempfile
        >>> from spt_fast import TrainingConfig, load_backbone
        >>> from spt_fast.backbones import image_settings
        >>> from spt_fast.data import load_dataset, make_transform
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1)
        >>> def images(split: str, train: bool) -> ImageDataset:
        ...     transform = make_transform("vtab", train=train, **image_settings(backbone))
        ...     return load_dataset("digits", split, transform=transform)
        >>> found = sweep(backbone, images, output=tempfile.mkdtemp(), space={"learning_rate": [0.001, 0.1]},
        ...               num_prompts=2, config=TrainingConfig(epochs=1, warmup_epochs=0), model={"pool": "avg"})
        >>> found.parameters, found.test_accuracy_mean > 0.1
        ({'learning_rate': 0.1}, True)
    """
    config = config or TrainingConfig()
    check_seeds(seeds)
    points = points_of(space, config, num_prompts, trials=trials, seed=seeds[0])
    for name, given, known in (("start", start, START), ("model", model, MODEL)):
        for key in given or {}:
            if key not in known:
                raise InputError(f"{name} has {key!r}, expected names among {', '.join(known)}")
    search = _Search(
        backbone,
        functools.cache(images),
        Path(output),
        config,
        seeds=list(seeds),
        start={**START, "seed": seeds[0], **(start or {})},
        model=dict(model or {}),
        prototype_batch_size=prototype_batch_size,
        metadata=dict(metadata or {}),
        progress=progress,
    )
    with process_group(next(backbone.parameters()).device):
        return search.run(points, num_prompts, space.keys(), overwrite=overwrite)


class _Search:
    """One call of :func:`sweep`: what is the same for all its runs, and what they gave so far."""

    def __init__(
        self,
        backbone: VisionTransformer,
        images: Images,
        output: Path,
        config: TrainingConfig,
        *,
        seeds: list[int],
        start: dict[str, Any],
        model: dict[str, Any],
        prototype_batch_size: int,
        metadata: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.backbone = backbone
        self.images = images
        self.folder = SweepFolder(output)
        self.config = config
        self.seeds = seeds
        self.start = start
        self.model = model
        self.prototype_batch_size = prototype_batch_size
        self.metadata = metadata
        self.progress = progress
        self.points: list[Point] = []
        self.columns: list[str] = []  # the parameters that the table shows
        self.outcomes: dict[tuple[str, int], dict[str, Any]] = {}  # of (name of a point, seed)

    def run(
        self, points: list[Point], num_prompts: int, searched: Iterable[str], *, overwrite: bool
    ) -> SweepResult:
        if overwrite:
            from_rank_0(self.folder.clear)
        is_new = from_rank_0(lambda: self.folder.record() is None)
        self.points = from_rank_0(lambda: self.folder.joined(points, self.config, self.seeds))
        job = self._job(num_prompts)
        self.columns = from_rank_0(lambda: self.folder.begin(job, self.points, searched))
        try:
            if len(self.points) > 1:
                self._judge()
            best = self._best()
            return self._score(best)
        except InputError:
            if (
                is_new
                and world()[0] == 0
                and not any((self.folder.path / "prototypes").glob("*.safetensors"))
            ):
                self.folder.forget()
            raise

    def _job(self, num_prompts: int) -> dict[str, Any]:
        """What all points have in common; looks at everything that is given, before any work."""
        splits = ("train", "val", "trainval", "test") if len(self.points) > 1 else ("trainval", "test")
        data = {split: self.images(split, split.startswith("train")) for split in splits}
        # Arguments that do not go together are found here, not after the prototypes have been built.
        nothing = torch.zeros(1, 1, self.backbone.embed_dim)
        PromptedViT(self.backbone, nothing, num_classes=len(data["trainval"].classes), **self.model)
        free = ("seed", *TRACELESS)
        job = {
            "backbone": {
                "name": source_of(self.backbone)["name"],
                "weight_dtype": source_of(self.backbone)["weight_dtype"],
                **backbone_identity(self.backbone),
            },
            "data": {split: described_images(images) for split, images in data.items()},
            "config": {name: value for name, value in asdict(self.config).items() if name not in free},
            "num_prompts": num_prompts,
            "start": {name: self.start[name] for name in self.start if name not in TRACELESS_ARGUMENTS},
            "model": {name: self.model[name] for name in self.model if name not in TRACELESS_ARGUMENTS},
            "metadata": self.metadata,
        }
        try:
            json.dumps(job)
        except TypeError as error:
            raise InputError(f"start, model and metadata must be json-able: {error}") from None
        return job

    def _judge(self) -> None:
        """Train all points on train and judge them on val."""
        runs = [(point, seed) for point in self.points for seed in self.seeds]
        self.outcomes = from_rank_0(
            lambda: {
                (point.name, seed): self.folder.look(self.folder.trial(point, seed), point, seed)
                for point, seed in runs
            }
        )
        lengths = list(dict.fromkeys(point.num_prompts for point in self.points))
        prototypes: dict[int, Prototypes] = {}
        for number, (point, seed) in enumerate(runs, start=1):
            states = [self.outcomes[point.name, each]["state"] for each in self.seeds]
            # One failed seed is enough: there is no mean for the others to contribute to.
            if self.outcomes[point.name, seed]["state"] != "finished" and "failed" not in states:
                prototypes = prototypes or self._prototypes("train", lengths)
                stage = f"run {number}/{len(runs)}"
                self.outcomes[point.name, seed] = self._trial(
                    point, seed, prototypes[point.num_prompts], stage
                )
                if world()[0] == 0:
                    self.folder.write_table(self._rows())

    def _trial(self, point: Point, seed: int, prototypes: Prototypes, stage: str) -> dict[str, Any]:
        run, state = self.folder.trial(point, seed), self.outcomes[point.name, seed]["state"]
        try:
            self._train(run, state, point, seed, prototypes, "train", "val", stage)
        except DivergedError as error:
            if world()[0] == 0:
                write_text(run / "failed.json", json.dumps({"failure": str(error)}) + "\n")
        return from_rank_0(lambda: self.folder.look(run, point, seed))

    def _train(
        self,
        run: Path,
        state: str,
        point: Point,
        seed: int,
        prototypes: Prototypes,
        split: str,
        val_split: str | None,
        stage: str,
    ) -> PromptedViT:
        if state == "other" and world()[0] == 0:
            for stale in ("failed.json", "test.json"):
                (run / stale).unlink(missing_ok=True)
        data = self.images(split, True)
        torch.manual_seed(seed)
        model = PromptedViT(self.backbone, prototypes, num_classes=len(data.classes), **self.model)
        train(
            model,
            data,
            None if val_split is None else self.images(val_split, False),
            output=run,
            config=replace(point.config, seed=seed),
            resume=state != "other",
            overwrite=state == "other",
            metadata={**self.metadata, "start": prototypes.metadata},
            progress=self._progress(stage),
        )
        return model

    def _best(self) -> Point:
        """The point with the highest mean validation accuracy; the first of equals."""
        if len(self.points) == 1:
            return self.points[0]
        rows = self._rows()
        judged = [row for row in rows if row["runs"] == len(self.seeds)]
        if not judged:
            raise InputError(
                f"none of the {len(rows)} points of the sweep in {self.folder.path} could be trained, "
                f"the first because {rows[0]['failure']}"
            )
        best = max(judged, key=lambda row: row["val_accuracy_mean"])
        return next(point for point in self.points if point.name == best["point"])

    def _score(self, best: Point) -> SweepResult:
        """Train ``best`` on train + val with every seed, and look at test."""
        runs = {seed: self.folder.path / "best" / f"seed-{seed}" for seed in self.seeds}
        prototypes: Prototypes | None = None
        scores, skipped = [], {"training": 0, "test": 0}
        for seed, run in runs.items():
            look = functools.partial(self.folder.look, run, best, seed)
            state = from_rank_0(look)["state"]
            read_score = functools.partial(read_json, run / "test.json")
            score = from_rank_0(read_score) if state == "finished" else None
            if score is None:
                stage = f"best point, seed {seed}"
                prototypes = prototypes or self._prototypes("trainval", [best.num_prompts])[best.num_prompts]
                # A run that is finished already is only read.
                model = self._train(run, state, best, seed, prototypes, "trainval", None, stage)
                test = self.images("test", False)
                judged = evaluate(
                    model, test, num_workers=self.config.num_workers, progress=self._progress(stage)
                )
                score = judged.as_dict()
                if world()[0] == 0:
                    write_text(run / "test.json", json.dumps(score, indent=2) + "\n")
            scores.append(score["accuracy"])
            skipped = {
                "training": max(skipped["training"], from_rank_0(look)["skipped"]),
                "test": max(skipped["test"], score["skipped"]),
            }
        rows = self._rows()
        chosen = next(row for row in rows if row["point"] == best.name)
        result = SweepResult(
            points=rows,
            point=best.name,
            parameters={name: best.settings[name] for name in self.columns},
            val_accuracy_mean=chosen["val_accuracy_mean"],
            val_accuracy_std=chosen["val_accuracy_std"],
            seeds=self.seeds,
            test_accuracies=scores,
            test_accuracy_mean=statistics.fmean(scores),
            test_accuracy_std=sample_std(scores),
            skipped=skipped,
            adapters=[f"best/{run.name}/last.safetensors" for run in runs.values()],
            output=self.folder.path,
        )
        if world()[0] == 0:
            self.folder.write_table(rows)
            write_text(self.folder.path / "summary.json", json.dumps(result.summary(), indent=2) + "\n")
        return result

    def _rows(self) -> list[dict[str, Any]]:
        """The table: a row for each point."""
        rows = []
        for point in self.points:
            outcomes = {seed: self.outcomes.get((point.name, seed), {}) for seed in self.seeds}
            by_seed = {seed: outcome.get("val_accuracy") for seed, outcome in outcomes.items()}
            accuracies = [accuracy for accuracy in by_seed.values() if accuracy is not None]
            seconds = [outcome["seconds"] for outcome in outcomes.values() if "seconds" in outcome]
            failure = next(
                (outcome["failure"] for outcome in outcomes.values() if "failure" in outcome), None
            )
            has_mean = bool(accuracies) and failure is None
            rows.append(
                {
                    "point": point.name,
                    **{name: point.settings[name] for name in self.columns},
                    "runs": len(accuracies),
                    "val_accuracy_mean": statistics.fmean(accuracies) if has_mean else None,
                    "val_accuracy_std": sample_std(accuracies) if has_mean else None,
                    **{f"val_accuracy_seed_{seed}": accuracy for seed, accuracy in by_seed.items()},
                    "seconds": sum(seconds) if seconds else None,
                    "failure": failure,
                }
            )
        return rows

    def _prototypes(self, split: str, lengths: list[int]) -> dict[int, Prototypes]:
        """What prompts of every one of ``lengths`` start from."""
        return kept_prototypes(
            self.backbone,
            lambda: self.images(split, False),
            lengths,
            folder=self.folder.path / "prototypes",
            name=split,
            start=self.start,
            batch_size=self.prototype_batch_size,
            num_workers=self.config.num_workers,
            progress=self._progress(f"prototypes of {split}"),
        )

    def _progress(self, stage: str) -> Progress | None:
        report = self.progress
        return report and (lambda step, done, total: report(f"{stage}: {step}", done, total))
