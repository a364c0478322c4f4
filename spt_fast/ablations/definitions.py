"""The ablations: for each the variants that its table compares. One function each; nothing here runs anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spt_fast.ablations.subsets import Subset, SubsetKind
from spt_fast.ablations.variants import Ablation, Variant, exact
from spt_fast.arguments import check_number, check_whole_number
from spt_fast.errors import InputError
from spt_fast.methods import METHODS

STARTS = {
    "uniform": "Random init (VPT)",
    "kmeans": "K-means",
    "mean_pool": "Mean pooling",
    "max_pool": "Max pooling",
    "random_sample": "Random sample",
    "vipamin": "VIPAMIN",
    "mmd": "MMD herding",
}
TITLES = {
    "spt_shallow": "SPT-Shallow",
    "spt_deep": "SPT-Deep",
    "vpt_shallow": "VPT-Shallow",
    "vpt_deep": "VPT-Deep",
    "gate_vpt": "GateVPT",
    "e2vpt": "E2VPT",
    "vapt": "VAPT",
    "linear": "Linear",
    "full": "Full",
    "bitfit": "Bias",
    "adapter": "Adapter",
    "lora": "LoRA",
    "ssf": "SSF",
    "snf": "SNF",
    "moment_probing": "Moment Probing",
}
# Other methods with prompts, started from SPT's prototypes.
WITH_PROTOTYPES = {
    "gate_vpt": "SPT + GateVPT",
    "e2vpt": "SPT + E2VPT",
    "vapt": "VAPT with prototype bias",
}


@dataclass(frozen=True)
class Choices:
    """What the command line leaves open.

    Attributes:
        num_prompts: prompts per block of deep methods; ``None``: as each method was published.
        shallow_prompts: prompts of shallow methods; ``None``: as published.
        values: what is tried, where the ablation is about a number; empty: its usual values.
        data: names of the data sets.
        models: names of the backbones.

    Raises:
        InputError: a number of prompts below 1 or not whole, or a value that is not finite.
    """

    num_prompts: int | None = None
    shallow_prompts: int | None = None
    values: tuple[float, ...] = ()
    data: tuple[str, ...] = ("data",)
    models: tuple[str, ...] = ("model",)

    def __post_init__(self) -> None:
        for name, number in (("num_prompts", self.num_prompts), ("shallow_prompts", self.shallow_prompts)):
            if number is not None:
                check_whole_number(name, number)
        for value in self.values:
            check_number("each of values", value)

    def variant(
        self, row: str, column: str, method: str, *, init: str | None = None, **changes: Any
    ) -> Variant:
        """A variant of ``method`` with its usual number of prompts; ``init`` replaces its own start."""
        facts = METHODS[method]
        asked = {"deep": self.num_prompts, "shallow": self.shallow_prompts, None: None}[facts.depth]
        number = None if facts.depth is None else facts.num_prompts if asked is None else asked
        settings = {"init": init or facts.init, "num_prompts": number, **changes}
        return Variant(row, column, method, **settings)

    def whole_values(self, name: str, usual: Sequence[int]) -> list[int]:
        """``values`` or the usual ones, which have to be whole numbers of at least 1."""
        for value in self.values:
            if value % 1 or value < 1:
                raise InputError(f"values of {name} must be whole numbers of at least 1, got {exact(value)}")
        return [int(value) for value in self.values] or list(usual)

    def shares(self, name: str, usual: Sequence[float]) -> list[tuple[str, float]]:
        """``values`` or the usual ones, which have to be shares, each behind its name in percent."""
        for value in self.values:
            if not 0 < value <= 1:
                raise InputError(f"values of {name} must be in (0, 1], got {exact(value)}")
        return [(f"{100 * share:g}%", share) for share in self.values or usual]


def sampling(choices: Choices) -> Ablation:
    """Table 4: (a) frozen prompts, (b) learnable ones."""
    variants = [
        choices.variant(title, column, _of_start(init), init=init, options={"train_prompts": learnable})
        for column, learnable in (("frozen", False), ("learnable", True))
        for init, title in STARTS.items()
    ]
    return Ablation("sampling", "How prompts start", "Table 4", variants, "bars", "start of the prompts")


def layers(choices: Choices) -> Ablation:
    """Table S2."""
    rows = {"random": None, "first": "first", "last": "last", "same": "same"}
    variants = []
    for depth in ("shallow", "deep"):
        for row, source in rows.items():
            if source is None:
                variants.append(choices.variant(row, depth, f"vpt_{depth}"))
            else:
                # Shallow prompts have one block: its own layer is the first.
                own = "same" if depth == "shallow" and source == "first" else source
                variants.append(choices.variant(row, depth, f"spt_{depth}", layers=own))
    return Ablation("layers", "Whose tokens the prototypes come from", "Table S2", variants, "bars", "layer")


def cross_task(choices: Choices) -> Ablation:
    """Fig. 3b."""
    if len(choices.data) < 2:
        raise InputError("cross-task compares data sets: give --data at least twice")
    variants = [
        choices.variant(start, trained, "spt_deep", data=column, start_data=row)
        for row, start in enumerate(choices.data)
        for column, trained in enumerate(choices.data)
    ]
    notes = (
        "Colours: each column from its lowest (0) to its highest accuracy (1). Rows: where prototypes come from.",
    )
    return Ablation(
        "cross-task",
        "Prototypes of one data set, prompts of another",
        "Fig. 3b",
        variants,
        "matrix",
        "prototypes from",
        notes=notes,
    )


def prompt_length(choices: Choices) -> Ablation:
    """Fig. 3c."""
    variants = [
        choices.variant(str(number), TITLES[method], method, num_prompts=number)
        for method in ("spt_deep", "vpt_deep")
        for number in choices.whole_values("prompt-length (num_prompts)", (5, 10, 20, 50, 100))
    ]
    return Ablation("prompt-length", "Prompts per block", "Fig. 3c", variants, "lines", "prompts per block")


def prototype_fraction(choices: Choices) -> Ablation:
    """Fig. 3a, with the seconds of Table 1."""
    variants = [
        choices.variant(row, STARTS["kmeans"], "spt_deep", data_fraction=share)
        for row, share in choices.shares("prototype-fraction", (0.1, 0.3, 0.5, 0.7, 1.0))
    ]
    return Ablation(
        "prototype-fraction",
        "Share of the training images that the prototypes are built from",
        "Fig. 3a and Table 1",
        variants,
        "lines",
        "share of the images",
        measures=("prototype_seconds",),
    )


def training_fraction(choices: Choices) -> Ablation:
    """Fig. 4 and S3."""
    methods = ("spt_deep", "vpt_deep", "full", "linear")
    rows = choices.shares("training-fraction", (0.05, 0.1, 0.2, 0.5, 1.0))
    variants = _on_subsets(choices, methods, "fraction", rows)
    return Ablation(
        "training-fraction",
        "Share of the training images",
        "Fig. 4 and S3",
        variants,
        "lines",
        "share of the images",
        measures=("train_images",),
    )


def model_size(choices: Choices) -> Ablation:
    """Fig. 3d."""
    variants = [
        choices.variant(model, TITLES[method], method, backbone=index)
        for method in ("spt_deep", "vpt_deep")
        for index, model in enumerate(choices.models)
    ]
    return Ablation("model-size", "Size of the backbone", "Fig. 3d", variants, "lines", "backbone")


def few_shot(choices: Choices) -> Ablation:
    """A few images a class."""
    rows = [(str(number), number) for number in choices.whole_values("few-shot", (1, 2, 4, 8, 16))]
    variants = _on_subsets(choices, ("spt_deep", "vpt_deep", "linear"), "shots", rows)
    return Ablation(
        "few-shot",
        "A few training images a class",
        None,
        variants,
        "lines",
        "images a class",
        measures=("mean_per_class", "effective_clusters"),
    )


def long_tail(choices: Choices) -> Ablation:
    """Classes of very different sizes; the exponential profile of Cui et al. 2019."""
    rows = [(exact(value), value) for value in choices.values or (10, 50, 100)]
    variants = _on_subsets(choices, ("spt_deep", "vpt_deep", "linear"), "imbalance", rows)
    return Ablation(
        "long-tail",
        "The largest class is so many times larger than the smallest",
        None,
        variants,
        "lines",
        "imbalance",
        measures=("mean_per_class", "head", "medium", "tail", "effective_clusters"),
        notes=("head, medium, tail: mean accuracy of the thirds of the classes, the largest classes first.",),
    )


def methods(choices: Choices) -> Ablation:
    """Tables 2 and 3: only the method differs."""
    variants = [choices.variant(TITLES[name], "accuracy", name) for name in METHODS]
    variants += [
        choices.variant(title, "accuracy", name, init="kmeans") for name, title in WITH_PROTOTYPES.items()
    ]
    return Ablation(
        "methods",
        "Only the method of tuning differs",
        "Tables 2 and 3",
        variants,
        "bars",
        "method",
        measures=("trainable_parameters", "prototype_seconds", "train_seconds"),
    )


def nmi(choices: Choices) -> Ablation:
    """Fig. 2."""
    variants = [
        choices.variant(TITLES[name], "accuracy", name, snapshots=True) for name in ("spt_deep", "vpt_deep")
    ]
    return Ablation(
        "nmi",
        "Normalised mutual information of prompts and patch tokens",
        "Fig. 2",
        variants,
        "courses",
        "method",
        measures=("nmi_first", "nmi_last"),
        notes=("NMI (Eq. 7-8): mean over blocks, of prompts and the training images' patch tokens.",),
    )


ABLATIONS: dict[str, Callable[[Choices], Ablation]] = {
    "sampling": sampling,
    "layers": layers,
    "cross-task": cross_task,
    "prompt-length": prompt_length,
    "prototype-fraction": prototype_fraction,
    "training-fraction": training_fraction,
    "model-size": model_size,
    "few-shot": few_shot,
    "long-tail": long_tail,
    "methods": methods,
    "nmi": nmi,
}
# Those that are about a number, which can be asked for.
WITH_VALUES = ("prompt-length", "prototype-fraction", "training-fraction", "few-shot", "long-tail")


def _of_start(init: str) -> str:
    return "vpt_deep" if init == "uniform" else "spt_deep"


def _on_subsets(
    choices: Choices, methods: Sequence[str], kind: SubsetKind, rows: Sequence[tuple[str, float]]
) -> list[Variant]:
    return [
        choices.variant(row, TITLES[method], method, subset=Subset(kind, value))
        for method in methods
        for row, value in rows
    ]
