"""Made-up records of benchmarks, for tests of what shows them; nothing in them was measured."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.record import Record

CPU = {
    "device": "Some CPU",
    "device_type": "cpu",
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 25276502016,
    "system": "Linux x86_64",
    "versions": {"spt_fast": "0.1.0", "python": "3.11.7", "torch": "2.14.1", "scikit-learn": "1.9.1"},
    "commit": "abc1234",
    "date": "2026-11-25",
}
GPU = CPU | {
    "device": "Some GPU 80GB",
    "device_type": "cuda",
    "device_memory_bytes": 85_000_000_000,
    "multiprocessors": 132,
    "compute_capability": "9.0",
    "cuda": "13.0",
    "driver": "580.12",
    "commit": "def5678+",
}
CPU_CEILINGS = Ceilings(
    copy=5.2e10, read=5.6e10, matmul={"float32": 1.85e11, "bfloat16": 4.07e11}, samples={}
)
GPU_CEILINGS = Ceilings(copy=2.7e12, read=2.9e12, matmul={"float32": 5.1e13, "bfloat16": 7.2e14}, samples={})


def begin(folder: Path, benchmark: str, machine: dict[str, Any] = CPU) -> Record:
    """A record of a made-up machine."""
    command = f"python -m benchmarks.{benchmark} --device {machine['device_type']} --rounds 5"
    record = Record(benchmark, command, torch.device("cpu"), folder, {"rounds": 5})
    ceilings = GPU_CEILINGS if machine["device_type"] == "cuda" else CPU_CEILINGS
    record.content |= {"machine": machine, "ceilings": ceilings.as_dict()}
    return record


def samples(seconds: float, seed: str, count: int = 5) -> list[float]:
    """Times around ``seconds``; the same for the same seed."""
    generator = random.Random(seed)
    return [seconds * generator.uniform(0.94, 1.08) for _ in range(count)]


def compare(
    record: Record, case: dict[str, Any], seconds: float, multiples: dict[str, float], **facts: Any
) -> None:
    """Peers that take so many times ``seconds``, with a limit of four tenths of them."""
    gpu = record.content["machine"]["device_type"] == "cuda"
    ceilings = GPU_CEILINGS if gpu else CPU_CEILINGS
    rate = ceilings.matmul["bfloat16"]
    limit = ceilings.limit(
        moved_bytes=0.2 * seconds * ceilings.bandwidth, operations=0.4 * seconds * rate, dtype="bfloat16"
    )
    for peer, multiple in multiples.items():
        own = samples(multiple * seconds, f"{peer} {case}")
        record.measured(case, peer, own, limit=limit, **facts)


def add_train_step(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "train_step", machine)
    gpu = machine["device_type"] == "cuda"
    models = ["vit_small_patch16_224", "vit_base_patch16_224", *(["vit_large_patch16_224"] if gpu else [])]
    for model, batch in product(models, [64, 256] if gpu else [8]):
        for prompts in [10, 20, 50, 100, 200] if gpu else [20, 100, 200]:
            multiples = {
                "spt-fast": 1.0,
                "naive VPT": 1.1 + prompts / 160,
                "naive VPT, autocast": 1.6 + prompts / 120,
                "naive VPT, float32": 2.9 + prompts / 100,
                "no prompts": 1.1 - prompts / 1000,
            }
            case = {"model": model, "batch_size": batch, "num_prompts": prompts}
            seconds = (
                (0.002 if gpu else 0.6) * batch / 8 * (1 + prompts / 500) * (1 + 2 * models.index(model))
            )
            compare(
                record,
                case,
                seconds,
                multiples,
                peak_bytes=800 * 2**20,
                joules_per_image=0.4 if gpu else None,
            )
        case = {"model": model, "batch_size": batch, "num_prompts": 0}
        compare(
            record, case, 0.5, {"no prompts": 1.0, "linear probe": 0.42, "full fine-tuning, autocast": 2.3}
        )
        record.missing(case, "no prompts, compiled", "does not run here: no compiler")
    record.finish()


def add_attention(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "attention", machine)
    gpu = machine["device_type"] == "cuda"
    models = ["vit_base_patch16_224", *(["vit_large_patch16_224", "vit_huge_patch14_224"] if gpu else [])]
    sizes = product(models, [64, 256] if gpu else [8], [20, 100, 200], ["forward", "forward + backward"])
    for model, batch, prompts, what in sizes:
        case = {
            "model": model,
            "batch_size": batch,
            "num_prompts": prompts,
            "dtype": "bfloat16",
            "pass": what,
        }
        multiples = {
            "spt-fast triton" if gpu else "spt-fast torch": 1.0,
            "concatenate + SDPA": 1.1 + prompts / 400,
            "concatenate + SDPA, flash": 1.08 + prompts / 350,
            "concatenate + SDPA, math": 1.9 + prompts / 300,
            "naive: prompts with queries": 0.93 + prompts / 200,
        }
        compare(record, case, (0.0002 if gpu else 0.014) * (3 if "back" in what else 1), multiples)
        if "backward" in what:
            record.missing(case, "concatenate + FlexAttention", "FlexAttention has no backward pass on CPUs")
    record.finish()


def add_kmeans(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "kmeans", machine)
    sizes = [(1, 20_000, features, 20) for features in (192, 384, 768, 1024, 1280)]
    sizes += [(1, 20_000, 768, clusters) for clusters in (5, 50, 100, 256)]
    sizes += [(1, tokens, 192, 20) for tokens in (10_000, 100_000, 1_000_000)]
    sizes += [(layers, 4_000, 384, 20) for layers in (1, 12, 24, 32)]
    names = ("layers", "tokens", "features", "clusters")
    for size in [(1, 50_000, 384, 20)]:
        case = {"measure": "convergence", **dict(zip(names, size, strict=True))}
        for peer, seconds, inertia, iterations in (
            ("spt-fast KMeans", 0.62, 1.8123e7, 31),
            ("spt-fast MiniBatchKMeans", 0.11, 1.8301e7, 12),
            ("scikit-learn KMeans", 1.92, 1.8125e7, 31),
            ("FAISS", 5.1, 1.8124e7, 31),
        ):
            record.measured(case, peer, samples(seconds, peer), inertia=inertia, iterations=iterations)
        record.missing(case, "cuML", "is not installed")
    for layers, tokens, features, clusters in sizes:
        case = {
            "measure": "iteration",
            "layers": layers,
            "tokens": tokens,
            "features": features,
            "clusters": clusters,
        }
        multiples = {
            "spt-fast cpu, float32": 1.0,
            "spt-fast cpu, bfloat16": 0.92,
            "spt-fast torch, float32": 8.2,
            "plain torch loop, float32": 9.4 + features / 100,
            "scikit-learn KMeans": 2.1 + clusters / 100,
            "FAISS": 7.9,
        }
        compare(record, case, layers * tokens * features * 3e-10, multiples, inertia=1.25e7)
        record.missing(case, "cuML", "is not installed")
    record.missing(
        {"layers": 1, "tokens": 10**9, "features": 768, "clusters": 20}, "all", "3.07e+03 GB do not fit"
    )
    record.finish()


def add_prototypes(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "prototypes", machine)
    for fraction in (0.1, 0.5, 1.0):
        case = {"model": "vit_base_patch16_224", "images": 5394, "fraction": fraction, "num_prompts": 20}
        multiples = {"k-means": 1.0, "mini-batch k-means": 0.83, "mean pooling": 0.61, "random sample": 0.6}
        compare(record, case, 410 * fraction, multiples)
        record.extrapolated(
            case, "scikit-learn, one block after the other", 9000 * fraction, "in proportion to the tokens",
            [(1000, 20.0), (2000, 41.0)],
        )  # fmt: skip
        if fraction == 1.0:
            record.quoted(case, "paper: K-means", 27.3 * 86400, "Table 7 of the paper")
    record.finish()


def add_scaling(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "scaling", machine)
    common = {"features": 192, "clusters": 20}
    for library, sizes, rate in (
        ("spt-fast", (10**5, 10**6, 10**7), 9e6),
        ("scikit-learn", (10**5, 10**6), 2e6),
    ):
        for tokens in sizes:
            peak = int(9e7 * (tokens / 1e5) ** (0.02 if library == "spt-fast" else 0.4))
            record.measured(
                {**common, "processes": 1, "tokens": tokens},
                f"{library} MiniBatchKMeans",
                samples(tokens / rate, f"{library} {tokens}", 3),
                peak_bytes=peak,
            )
    for count in (1, 2):
        case = {**common, "processes": count, "threads": 1, "tokens": 2 * 10**6}
        record.measured(
            case, "spt-fast MiniBatchKMeans", samples(0.42 / count**0.9, str(count), 3), peak_bytes=10**8
        )
    record.finish()


def add_accuracy_speed(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "accuracy_speed", machine)
    case = {"data": "digits", "epochs": 4, "num_prompts": 20, "images": 1000}
    for number, (peer, start) in enumerate(
        {"SPT-Deep, k-means": 2.1, "SPT-Deep, random sample": 0.8, "VPT-Deep, uniform": 0.01}.items()
    ):
        curves = []
        for seed in range(3):
            begun = start * (1 + seed / 20)
            heights = [0.1, 0.55 - number / 20, 0.78, 0.88, 0.93 - number / 60 + seed / 200]
            curves.append([[begun + 21.5 * epoch, height] for epoch, height in enumerate(heights)])
        seconds, tested = [curve[-1][0] for curve in curves], [curve[-1][1] for curve in curves]
        record.measured(case, peer, seconds, curves=curves, test_accuracy=tested)
    record.finish()


def add_multi_task(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "multi_task", machine)
    case = {"model": "vit_small_patch16_224", "tasks": 16, "batch_size": 32, "num_prompts": 20}
    compare(
        record, case, 0.8, {"mixed tasks, one batch": 1.0, "one task, one batch": 0.99, "task by task": 1.06}
    )
    record.finish()


def add_low_precision(folder: Path, machine: dict[str, Any] = CPU) -> None:
    record = begin(folder, "low_precision", machine)
    case = {"data": "digits", "epochs": 4, "num_prompts": 20}
    for weights, seconds in (("float32", 60.0), ("int8", 50.0)):
        own = [0.91, 0.912, 0.908]
        record.measured(case, weights, samples(seconds, weights, 3), accuracy=own, accuracy_on_float32=own)
    record.missing(case, "float8", "needs a GPU")
    record.finish()


BENCHMARKS = {
    "train_step": add_train_step,
    "attention": add_attention,
    "kmeans": add_kmeans,
    "prototypes": add_prototypes,
    "scaling": add_scaling,
    "accuracy_speed": add_accuracy_speed,
    "multi_task": add_multi_task,
    "low_precision": add_low_precision,
}


def add_all(folder: Path, *machines: dict[str, Any]) -> None:
    """A record of every benchmark on every machine."""
    for machine in machines or (GPU, CPU):
        for add in BENCHMARKS.values():
            add(folder, machine)
