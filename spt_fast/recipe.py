"""Recipes: with which values each experiment of the paper is run, and where each value comes from.

A recipe is called DATASET-PRETRAINING-SIZE, for example ``cub200-mae-vitb``. It is put together from the yaml files in
``recipes/``: what is common to all, what the backbone brings, what is known of this pair alone, and the data set. A
yaml file of your own holds all of it in one place.
"""

from __future__ import annotations

import difflib
import http.client
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import torch

from spt_fast.building import Depth, Layers, Method
from spt_fast.dataset_facts import DatasetFacts, dataset_facts, explain_counts, facts_from, vtab_tasks
from spt_fast.errors import CheckpointError, InputError
from spt_fast.files import atomic_path
from spt_fast.pooling import Pool
from spt_fast.tokens import Capture
from spt_fast.training_config import TrainingConfig
from spt_fast.yaml_files import checked, fits, in_words, read_yaml, with_number

__all__ = [
    "PRETRAININGS",
    "SIZES",
    "DatasetFacts",
    "Recipe",
    "dataset_facts",
    "explain_counts",
    "fetch_weights",
    "load_recipe",
    "recipe_names",
    "vtab_tasks",
]

PRETRAININGS = ("mae", "mocov3", "sup21k")
SIZES = ("vitb", "vitl", "vith")

# What a recipe may say about the start of the prompts and about training; the rest has keys of its own.
TRAINING_KINDS = {each.name: get_type_hints(TrainingConfig)[each.name] for each in fields(TrainingConfig)}
START_KINDS = {
    "num_prompts": int,
    "depth": Depth,
    "method": Method,
    "layers": Layers,
    "data_fraction": float,
    "capture": Capture,
    "prompt_dropout": float,
}
OPTION_KINDS = {**TRAINING_KINDS, **START_KINDS}
BACKBONE_KINDS = {"model": str, "pretrained": bool, "weights_url": str | None, "pool": Pool | None}
FILE_KINDS = {
    "name": str,
    "dataset": str | dict[str, Any],
    **BACKBONE_KINDS,
    "options": dict[str, Any],
    "search": dict[str, list[Any]],
    "sources": dict[str, str],
    "notes": list[str],
}


@dataclass(frozen=True)
class Recipe:
    """One experiment: a data set, a backbone, and the values to train it with.

    Attributes:
        name: of the recipe.
        dataset: the data set and its numbers.
        model: timm's name of the backbone.
        pretrained: let timm download its own weights.
        weights_url: where the released checkpoint is; ``None`` if timm has the weights or none were released.
        pool: what the head sees, as for :class:`~spt_fast.PromptedViT`.
        options: plain values by keyword: those of :class:`~spt_fast.TrainingConfig`, of
            :func:`~spt_fast.build_prototypes` (``num_prompts``, ``depth``, ``method`` ...), ``prompt_dropout``, and
            ``model``, ``pretrained``, ``pool`` and ``transform`` again. What is to be searched stands here with a first
            try.
        search: the values to try on the validation split, by keyword.
        sources: where values come from, by keyword.
        notes: what else is to be known.
    """

    name: str
    dataset: DatasetFacts
    model: str
    pretrained: bool = False
    weights_url: str | None = None
    pool: Pool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def weights_file(self) -> str | None:
        """The name of the released checkpoint's file."""
        return None if self.weights_url is None else PurePosixPath(urlsplit(self.weights_url).path).name

    def training_config(self, **changes: Any) -> TrainingConfig:
        """How to train, with ``changes`` (for example one choice out of ``search``); what the recipe leaves open is
        as in :class:`~spt_fast.TrainingConfig`, and a tenth of the epochs is warm-up if it does not say.

        Raises:
            InputError: a value that cannot be.

        Example:
            >>> load_recipe("dtd-mae-vitb").training_config(learning_rate=0.01).learning_rate
            0.01
        """
        return _config({**self.options, **changes})

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, as in a yaml file of one's own: written as yaml or json, :func:`load_recipe`
        makes the same recipe of it."""
        content = asdict(self)
        content["options"] = {key: value for key, value in self.options.items() if key in OPTION_KINDS}
        content["dataset"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in content["dataset"].items()
        }
        return content


def recipe_names() -> list[str]:
    """The names of all recipes that come with the package, data set by data set.

    Example:
        >>> len(recipe_names()), recipe_names()[0]
        (234, 'cub200-mae-vitb')
    """
    return [
        f"{dataset}-{pretraining}-{size}"
        for dataset in dataset_facts()
        for pretraining in PRETRAININGS
        for size in SIZES
    ]


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """A recipe that comes with the package, or one of your own.

    Args:
        name: one of :func:`recipe_names`, or the path of a yaml file (a :class:`~pathlib.Path`, or text that ends in
            ``.yaml``, ``.yml`` or ``.json``). Such a file needs ``dataset`` (a name of :func:`dataset_facts`, or the
            fields of :class:`DatasetFacts`) and ``model``, and may have all other fields of :class:`Recipe`; in its
            ``options`` are those of training and of the prompts' start. ``name`` is the file's unless it says.

    Raises:
        MissingFileError: there is no such file.
        InputError: an unknown name, or a file with an unknown key, a value of the wrong type or one that cannot be; the
            message names file and key.

    Example:
        >>> recipe = load_recipe("cub200-mae-vitb")
        >>> recipe.model, recipe.pool, recipe.options["learning_rate"], recipe.search
        ('vit_base_patch16_224', 'avg_with_prompts', 0.05, {})
    """
    if isinstance(name, os.PathLike) or str(name).endswith((".yaml", ".yml", ".json")):
        path = Path(name).expanduser()
        return _recipe({"name": path.stem, **read_yaml(path)}, str(path))
    if name not in recipe_names():
        near = difflib.get_close_matches(str(name), recipe_names(), n=3)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "expected DATASET-PRETRAINING-SIZE or a .yaml file"
        )
        raise InputError(f"there is no recipe {name!r}; {hint}")
    dataset, _, backbone = name.partition("-")
    layers = [_layer("common/paper.yaml"), _layer(f"{backbone}.yaml")]
    layers += [layer for layer in _released() if name in layer["recipes"]]
    content: dict[str, Any] = {
        "name": name,
        "dataset": dataset,
        "options": {},
        "search": {},
        "sources": {},
        "notes": list(dataset_facts()[dataset].notes),
    }
    for layer in layers:
        content |= {key: layer[key] for key in BACKBONE_KINDS if key in layer}
        content["options"] |= layer["options"]
        content["sources"] |= layer["sources"]
        content["notes"] += layer["notes"]
        content["search"] = layer.get("search", content["search"])  # what is known need not be searched
    return _recipe(content, name)


def fetch_weights(
    recipe: Recipe, folder: str | os.PathLike[str] | None = None, *, progress: bool = False
) -> Path:
    """The released checkpoint of a recipe's backbone, downloaded at the first call.

    Args:
        recipe: one with a ``weights_url``.
        folder: where to look for it and keep it; ``None``: where torch.hub keeps checkpoints.
        progress: show on standard error how far the download is.

    Returns:
        The file, for ``load_backbone(recipe.model, checkpoint=...)``.

    Raises:
        InputError: nothing was released for this recipe, or timm has the weights.
        CheckpointError: it could not be downloaded.
    """
    url, name = recipe.weights_url, recipe.weights_file
    if url is None or name is None:
        instead = (
            "timm downloads them, --pretrained"
            if recipe.pretrained
            else f"none were released for {recipe.model} with this pre-training, --checkpoint FILE takes your own"
        )
        raise InputError(f"recipe {recipe.name} has no weights to fetch: {instead}")
    target = Path(torch.hub.get_dir(), "checkpoints") / name if folder is None else Path(folder) / name
    if not target.is_file():
        try:
            with atomic_path(target) as temporary:
                torch.hub.download_url_to_file(url, str(temporary), progress=progress)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"{url} could not be downloaded to {target} ({error}); fetch it elsewhere and name the copy with "
                "--checkpoint FILE"
            ) from error
    return target


@cache
def _layer(path: str) -> dict[str, Any]:
    """One of the files that recipes are put together from."""
    file = files("spt_fast.recipes")
    for part in path.split("/"):
        file = file / part
    return {"options": {}, "sources": {}, "notes": [], **read_yaml(file)}


@cache
def _released() -> list[dict[str, Any]]:
    """What is known of single pairs."""
    folder = files("spt_fast.recipes") / "released"
    return [
        _layer(f"released/{file.name}")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]


def _recipe(content: dict[str, Any], where: str) -> Recipe:
    """The recipe that ``content``, as in a file of one's own, describes, if it can be one."""
    content = checked(content, FILE_KINDS, where, required=("dataset", "model"))
    dataset = _dataset(content["dataset"], where)
    options = checked(content.get("options", {}), OPTION_KINDS, f"{where}: options")
    search = checked(content.get("search", {}), dict.fromkeys(OPTION_KINDS, list[Any]), f"{where}: search")
    _check_values(options, f"{where}: options")
    for key, values in search.items():
        search[key] = _check_grid(key, values, options, f"{where}: search")
    known = {*BACKBONE_KINDS, *OPTION_KINDS, "dataset", "transform"}
    checked(content.get("sources", {}), dict.fromkeys(known, str), f"{where}: sources")
    backbone = {key: content[key] for key in BACKBONE_KINDS if key in content}
    made = Recipe(
        name=content["name"],
        dataset=dataset,
        **backbone,
        options=options,
        search=search,
        sources=dict(content.get("sources", {})),
        notes=list(content.get("notes", [])),
    )
    if made.weights_url is not None and (made.pretrained or made.weights_file in ("", ".", "..")):
        wanted = "null where pretrained is true" if made.pretrained else "the address of a file"
        raise InputError(f"{where}: weights_url must be {wanted}, got {made.weights_url!r}")
    also = {"model": made.model, "pretrained": made.pretrained, "pool": made.pool}
    return replace(made, options={**also, "transform": dataset.transform, **options})


def _dataset(given: str | dict[str, Any], where: str) -> DatasetFacts:
    if isinstance(given, dict):
        return facts_from(given, f"{where}: dataset")
    known = dataset_facts()
    if given not in known:
        near = difflib.get_close_matches(given, known, n=3)
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"expected {', '.join(known)} or facts of your own"
        )
        raise InputError(f"{where}: dataset: there is no data set {given!r}; {hint}")
    return known[given]


def _check_grid(key: str, values: list[Any], options: Mapping[str, Any], where: str) -> list[Any]:
    """``values`` to search, if there are any and ``key`` can be each of them."""
    values = [with_number(value, OPTION_KINDS[key]) for value in values]
    if not values:
        raise InputError(f"{where}: {key} must be a list of values to try, got none")
    for value in values:
        if not fits(value, OPTION_KINDS[key]):
            raise InputError(
                f"{where}: {key} must be a list, each {in_words(OPTION_KINDS[key])}, got {value!r}"
            )
        if values.count(value) > 1:
            raise InputError(f"{where}: {key} must be a list of different values, got {value!r} twice")
        _check_values({**options, key: value}, where)
    return values


def _check_values(options: Mapping[str, Any], where: str) -> None:
    """Raise unless the values, already of the right types, can be."""
    limits = {
        "num_prompts": (lambda value: value >= 1, "at least 1"),
        "data_fraction": (lambda value: 0 < value <= 1, "in (0, 1]"),
        "prompt_dropout": (lambda value: 0 <= value < 1, "in [0, 1)"),
    }
    for key, (holds, expected) in limits.items():
        if key in options and not holds(options[key]):
            raise InputError(f"{where}: {key} must be {expected}, got {options[key]!r}")
    try:
        _config(options)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _config(options: Mapping[str, Any]) -> TrainingConfig:
    chosen = {key: value for key, value in options.items() if key in TRAINING_KINDS}
    if "epochs" in chosen:
        chosen.setdefault("warmup_epochs", chosen["epochs"] // 10)  # as the command line does
    return TrainingConfig(**chosen)
