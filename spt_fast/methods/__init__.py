"""Methods of tuning, all on the same backbone, data path and training loop: only what is added differs.

A method is a subclass of :class:`~spt_fast.tuned_vit.TunedViT` in a module of its own; this module knows them by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.arguments import check_whole_number
from spt_fast.backbones import check_backbone
from spt_fast.errors import InputError
from spt_fast.methods.adapter import AdapterViT
from spt_fast.methods.bitfit import BitFitViT
from spt_fast.methods.e2vpt import E2VPTViT
from spt_fast.methods.full import FullViT
from spt_fast.methods.gate_vpt import GatedPromptViT
from spt_fast.methods.linear import LinearViT
from spt_fast.methods.lora import LoraViT
from spt_fast.methods.moment_probing import MomentProbingViT
from spt_fast.methods.snf import SnfViT
from spt_fast.methods.ssf import SsfViT
from spt_fast.methods.vapt import VaptViT
from spt_fast.pooling import Pool
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes
from spt_fast.sampling import uniform
from spt_fast.tuned_vit import TunedViT

__all__ = ["METHODS", "Method", "TunedViT", "build_model", "find_method", "model_class"]


@dataclass(frozen=True)
class Method:
    """A method of tuning.

    Attributes:
        model: the class.
        learning_rate: base rate of AdamW that suits it, see :class:`~spt_fast.TrainingConfig`.
        source: who published it.
        inserts: what it adds to the backbone and trains beside the head, in a few words.
        depth: of its prompts; ``None``: it takes none.
        init: what its prompts start from as published, a method of :func:`~spt_fast.build_prototypes`; ``None`` in a
            method with prompts: it needs no start of its own, and takes one as a bias.
        num_prompts: prompts per block as published.
    """

    model: type[TunedViT]
    learning_rate: float
    source: str
    inserts: str
    depth: Literal["deep", "shallow"] | None = None
    init: str | None = None
    num_prompts: int = 0


_VPT = "Jia et al. 2022"
_SPT = "Wang et al. 2024"
METHODS = {
    "spt_shallow": Method(
        PromptedViT, 3e-2, _SPT, "prompts before the first block, from prototypes", "shallow", "kmeans", 100
    ),
    "spt_deep": Method(
        PromptedViT, 3e-2, _SPT, "prompts before every block, from prototypes", "deep", "kmeans", 20
    ),
    "vpt_shallow": Method(
        PromptedViT, 3e-2, _VPT, "prompts before the first block", "shallow", "uniform", 100
    ),
    "vpt_deep": Method(PromptedViT, 3e-2, _VPT, "prompts before every block", "deep", "uniform", 20),
    "gate_vpt": Method(
        GatedPromptViT,
        3e-2,
        "Yoo et al. 2023",
        "prompts before the first block, a gate and a temperature for every block",
        "shallow",
        "uniform",
        100,
    ),
    "e2vpt": Method(
        E2VPTViT,
        3e-2,
        "Han et al. 2023",
        "prompts before every block, rows of keys and values in its attention",
        "deep",
        "uniform",
        20,
    ),
    "vapt": Method(
        VaptViT,
        1e-2,
        "Le et al. 2025",
        "prompts before every block, made from its own tokens",
        "deep",
        None,
        20,
    ),
    "linear": Method(LinearViT, 1e-2, "linear probing", "nothing: the head alone learns"),
    "full": Method(FullViT, 1e-4, "full fine-tuning", "nothing: all weights learn"),
    "bitfit": Method(BitFitViT, 1e-2, "Zaken et al. 2022", "nothing: the backbone's biases learn"),
    "adapter": Method(AdapterViT, 1e-2, "Houlsby et al. 2019", "a bottleneck behind the MLP of every block"),
    "lora": Method(LoraViT, 5e-3, "Hu et al. 2021", "low-rank changes of weight matrices"),
    "ssf": Method(SsfViT, 1e-2, "Lian et al. 2022", "a scale and a shift after every operation"),
    "snf": Method(SnfViT, 1e-2, "Wang et al. 2023", "a normalising flow on every shortcut"),
    "moment_probing": Method(
        MomentProbingViT, 3e-3, "Gao et al. 2023", "a head on second moments of the final tokens"
    ),
}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: there is none; the message lists them.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def model_class(kind: str) -> type[TunedViT]:
    """The class with this :attr:`~spt_fast.tuned_vit.TunedViT.name`, under which adapters keep it.

    Raises:
        InputError: there is none.
    """
    classes = {method.model.name: method.model for method in METHODS.values()}
    if kind not in classes:
        raise InputError(f"there is no method {kind!r} here; there are {', '.join(classes)}")
    return classes[kind]


def options_of(name: str) -> list[str]:
    """The names of a method's own options: what its class takes beside the arguments of :func:`build_model`.

    Raises:
        InputError: there is no such method.

    Example:
        >>> options_of("adapter")
        ['bottleneck', 'placement', 'checkpoint_blocks']
    """
    own = inspect.signature(build_model).parameters
    return [each for each in inspect.signature(find_method(name).model).parameters if each not in own]


def build_model(
    name: str,
    backbone: VisionTransformer,
    *,
    num_classes: int,
    prompts: Prototypes | Tensor | None = None,
    num_prompts: int | None = None,
    pool: Pool | None = None,
    **options: Any,
) -> TunedViT:
    """A backbone with what a method adds, ready for :func:`spt_fast.train`.

    Args:
        name: one of :data:`METHODS`.
        backbone: the frozen timm ViT, on the device to work on.
        num_classes: outputs of the head.
        prompts: where prompts start, ``[L, P, D]`` for deep and ``[1, P, D]`` for shallow methods: prototypes of
            :func:`spt_fast.build_prototypes`, which any method with prompts can start from. ``None``: the method's own
            start where it needs no images (VPT's uniform numbers, from torch's generator), else an error.
        num_prompts: prompts per block where ``prompts`` is ``None``; ``None``: as published.
        pool: what the head sees, see :class:`~spt_fast.PromptedViT`.
        **options: arguments of the method's class, for example ``rank=8`` of LoRA.

    Raises:
        UnsupportedModelError: the backbone cannot be tuned, or not by this method.
        InputError: an unknown method or option, prompts for a method that takes none or of the other depth, or none
            for one that starts from data.

    Example:
        >>> from spt_fast import load_backbone
        >>> backbone = load_backbone("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
        >>> model = build_model("vpt_deep", backbone, num_classes=10, num_prompts=5)
        >>> {name: tuple(value.shape) for name, value in model.task_state().items()}
        {'prompts': (2, 5, 192), 'head.weight': (10, 192), 'head.bias': (10,)}
    """
    method = find_method(name)
    check_backbone(backbone)
    for option in options:
        if option not in options_of(name):
            raise InputError(f"{option} is no option of {name}; it has {', '.join(options_of(name))}")
    arguments: dict[str, Any] = {"num_classes": num_classes, "pool": pool, **options}
    if method.depth is None:
        for argument, value in (("prompts", prompts), ("num_prompts", num_prompts)):
            if value is not None:
                raise InputError(f"{argument} was given and {name} has no prompts")
        return method.model(backbone, **arguments)
    rows = len(backbone.blocks) if method.depth == "deep" else 1
    if prompts is None:
        if method.init not in ("uniform", None):
            raise InputError(
                f"{name} starts from prototypes: pass prompts=build_prototypes(..., depth={method.depth!r})"
            )
        number = method.num_prompts if num_prompts is None else num_prompts
        check_whole_number("num_prompts", number)
        if method.init is None:
            arguments["num_prompts"] = number
            return method.model(backbone, **arguments)
        prompts = uniform(backbone, rows, number, torch.default_generator)
    elif num_prompts is not None:
        raise InputError("prompts and num_prompts were given; the prompts have their number")
    values = prompts.values if isinstance(prompts, Prototypes) else prompts
    if isinstance(values, Tensor) and values.ndim == 3 and values.shape[0] != rows:
        raise InputError(f"{name} takes prompts [{rows}, P, D] for this backbone, got {list(values.shape)}")
    arguments["prompts"] = prompts
    return method.model(backbone, **arguments)
