"""How things are called where results are shown: benchmarks, cases, machines, numbers with their units.

What a record calls otherwise is shown under its own name, so that nothing that was measured is left out.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Title and what is timed, in the order in which they are shown.
BENCHMARKS = {
    "train_step": (
        "A training step",
        "One step of a ViT with deep prompts: forward pass, loss, backward pass, optimizer. No prompts: timm's forward "
        "pass, with one learned vector on all tokens, which computes the last block for all of them and not for those "
        "that are read.",
    ),
    "large_model": (
        "A training step of a large model",
        "The most memory that a step of a ViT with deep prompts holds, frozen weights included, and its time.",
    ),
    "attention": (
        "Prompt attention",
        "The attention of a block alone: images over prompts and over themselves.",
    ),
    "multi_task": ("Many tasks, one batch", "The logits of a batch in which each image names its task."),
    "low_precision": ("8-bit frozen weights", "Training on a backbone whose frozen weights are smaller."),
    "data_path": (
        "From JPEG files to batches",
        "Decoding, random crops, resizing, flips and normalisation, without a model.",
    ),
    "end_to_end": (
        "From JPEG files to an adapter",
        "Decoding, k-means prototypes, epochs of training, and the same steps without reading images.",
    ),
    "prototypes": (
        "From images to prototypes",
        "Everything from the images to the prototypes of all blocks, the backbone's passes included.",
    ),
    "imagenet_stream": (
        "Prototypes from ImageNet's worth of images",
        "Mini-batch k-means of all blocks' tokens in one pass, and the backbone's forward passes alone.",
    ),
    "kmeans": ("K-means", "One Lloyd iteration over all tokens, and whole runs until they have converged."),
    "scaling": ("Scaling", "Mini-batch k-means over more and more tokens."),
    "accuracy_speed": (
        "Accuracy against time",
        "Accuracy after so many seconds of making prototypes and training, all with one base rate.",
    ),
}

_CASE_WORDS = {
    "model": lambda value: model_name(str(value)),
    "batch_size": lambda value: f"batch {value:,}",
    "num_prompts": lambda value: f"P = {value:,}" if value else "no prompts",
    "clusters": lambda value: f"K = {value:,}",
    "features": lambda value: f"D = {value:,}",
    "fraction": lambda value: f"{100 * value:g} % of the images",
    "layers": lambda value: counted(value, "layer"),
    "tokens": lambda value: counted(value, "token"),
    "images": lambda value: counted(value, "image"),
    "tasks": lambda value: counted(value, "task"),
    "processes": lambda value: counted(value, "process"),
    "threads": lambda value: counted(value, "thread"),
    "epochs": lambda value: counted(value, "epoch"),
}
_SIZES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def title(benchmark: str) -> str:
    """What a benchmark is called.

    Example:
        >>> title("train_step"), title("something_new")
        ('A training step', 'Something new')
    """
    return BENCHMARKS[benchmark][0] if benchmark in BENCHMARKS else sentence(benchmark.replace("_", " "))


def description(benchmark: str) -> str:
    """What is timed, in a sentence; nothing for a benchmark that is not known here."""
    return BENCHMARKS[benchmark][1] if benchmark in BENCHMARKS else ""


def position(benchmark: str) -> tuple[int, str]:
    """Sorts benchmarks into the order in which they are shown."""
    return (list(BENCHMARKS).index(benchmark) if benchmark in BENCHMARKS else len(BENCHMARKS), benchmark)


def case_words(case: Mapping[str, Any], keys: Iterable[str]) -> str:
    """These entries of a case.

    Example:
        >>> case = {"model": "vit_base_patch16_224", "batch_size": 64, "beans": 3}
        >>> case_words(case, case)
        'ViT-B/16, batch 64, beans 3'
    """
    return ", ".join(value_words(key, case[key]) for key in keys if case.get(key) is not None)


def value_words(key: str, value: Any) -> str:
    """One entry of a case."""
    if key in _CASE_WORDS:
        return _CASE_WORDS[key](value)
    return str(value) if isinstance(value, str) else f"{key.replace('_', ' ')} {value}"


def model_name(model: str) -> str:
    """A timm ViT as papers call it.

    Example:
        >>> model_name("vit_base_patch16_224"), model_name("deit_small_patch16_384"), model_name("swin_tiny")
        ('ViT-B/16', 'DeiT-S/16, 384 px', 'swin_tiny')
    """
    found = re.fullmatch(
        r"(vit|deit)_(tiny|small|base|large|huge|giant)_patch(\d+)(?:_(\d+))?(?:\..*)?", model
    )
    if not found:
        return model
    family, size, patch, pixels = found.groups()
    resolution = f", {pixels} px" if pixels not in (None, "224") else ""
    letter = "Ti" if size == "tiny" else size[0].upper()
    return f"{'ViT' if family == 'vit' else 'DeiT'}-{letter}/{patch}{resolution}"


def machine_line(*machines: Mapping[str, Any]) -> str:
    """Where something was measured, and with what; where several machines differ, all of it.

    Example:
        >>> here = {"device": "AMD EPYC", "threads": 2, "versions": {"torch": "2.11.0"}, "commit": "abc1234"}
        >>> machine_line(here, {**here, "commit": "def5678"})
        'AMD EPYC, 2 threads, torch 2.11.0, commit abc1234 and def5678'
    """
    words = {
        "": lambda machine: machine["device"],
        "threads": lambda machine: counted(machine["threads"], "thread") if _on_cpu(machine) else None,
        "driver ": lambda machine: machine.get("driver"),
        "CUDA ": lambda machine: machine.get("cuda"),
        "torch ": lambda machine: machine.get("versions", {}).get("torch"),
        "commit ": lambda machine: machine.get("commit"),
        "date": lambda machine: machine.get("date"),
    }
    parts = []
    for name, value in words.items():
        found = list(dict.fromkeys(str(value(machine)) for machine in machines if value(machine)))
        if found:
            parts.append(f"{name if name.endswith(' ') else ''}{joined(found)}")
    return ", ".join(parts)


def _on_cpu(machine: Mapping[str, Any]) -> bool:
    return machine.get("device_type") != "cuda" and "threads" in machine


def counted(number: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "image"), counted(5394, "image"), counted(2, "process")
        ('1 image', '5,394 images', '2 processes')
    """
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def joined(words: Sequence[str]) -> str:
    """A list in words.

    Example:
        >>> joined(["A", "B", "C"])
        'A, B and C'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(words: str) -> str:
    """Words with a capital letter in front."""
    return words[:1].upper() + words[1:]


def times(factor: float) -> str:
    """How many times as long.

    Example:
        >>> [times(each) for each in (0.00371, 0.987, 12.34, 123456)]
        ['0.0037x', '0.99x', '12.3x', '123,456x']
    """
    if factor < 0.1:
        return f"{factor:.2g}x"
    return f"{factor:,.{2 if factor < 10 else 1 if factor < 100 else 0}f}x"


def rate(per_second: float, unit: str) -> str:
    """So much per second, with its prefix.

    Example:
        >>> rate(4.07e11, "FLOP/s"), rate(52.3, "images/s"), rate(2.81e9, "tokens/s")
        ('407 GFLOP/s', '52.3 images/s', '2.81 G tokens/s')
    """
    prefix, size = next(((name, size) for name, size in _SIZES.items() if per_second >= size), ("", 1.0))
    gap = " " if prefix and unit.islower() else ""
    return f"{three_digits(per_second / size)} {prefix}{gap}{unit}"


def memory(size: float) -> str:
    """Bytes.

    Example:
        >>> memory(25276502016), memory(1536)
        ('25.3 GB', '1.54 kB')
    """
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{three_digits(size / bytes_of_it)} {unit}"
    return f"{size:.0f} B"


def three_digits(number: float) -> str:
    """A number to three digits.

    Example:
        >>> [three_digits(each) for each in (1.234, 12.34, 123.4, 1234.0)]
        ['1.23', '12.3', '123', '1,234']
    """
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"


def percent(fractions: float | Collection[float]) -> str:
    """A fraction, or the mean of several with their standard deviation.

    Example:
        >>> percent(0.4914), percent([0.9, 0.91, 0.92]), percent([0.5])
        ('49.1 %', '91.0 ± 1.0 %', '50.0 %')
    """
    values = [fractions] if isinstance(fractions, (int, float)) else list(fractions)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"
