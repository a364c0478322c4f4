"""The ways to take a training step that are compared: prompts as here, prompts by concatenation, and none at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.naive_vpt import naive_forward
from spt_fast.backbones import embed
from spt_fast.errors import InputError
from spt_fast.low_precision import WeightDtype, check_weight_dtype, quantize_blocks
from spt_fast.prompted_vit import PromptedViT
from spt_fast.replayed_call import ReplayedCall

CLASSES = 100

# ours: PromptedViT. naive: prompts concatenated in every block. bare: no prompts, but gradients that flow as far, to
# one learnable vector on all tokens. linear: only the head learns. full: everything learns.
Kind = Literal["ours", "naive", "bare", "linear", "full"]


@dataclass(frozen=True)
class Way:
    """A way to take the step.

    Attributes:
        name: for the tables.
        kind: which function, and what of it learns.
        weights: dtype of the backbone's weights.
        autocast: whether they are cast to bfloat16 at every use.
        compiled: whether the model runs through torch.compile.
        replayed: whether the whole step is recorded as a CUDA graph and replayed.
        weight_dtype: 8-bit weights of the blocks.
    """

    name: str
    kind: Kind
    weights: torch.dtype = torch.bfloat16
    autocast: bool = False
    compiled: bool = False
    replayed: bool = False
    weight_dtype: WeightDtype | None = None

    @property
    def prompted(self) -> bool:
        return self.kind in ("ours", "naive")


OURS, NAIVE, BARE = Way("spt-fast", "ours"), Way("naive VPT", "naive"), Way("no prompts", "bare")
OURS_COMPILED = Way("spt-fast, compiled", "ours", compiled=True)
NAIVE_COMPILED = Way("naive VPT, compiled", "naive", compiled=True)
BARE_COMPILED = Way("no prompts, compiled", "bare", compiled=True)
# What a host cannot slow down: from some size of the model on, it is the launches of small kernels that take the time.
REPLAYED = [
    Way("spt-fast, CUDA graph", "ours", replayed=True),
    Way("naive VPT, CUDA graph", "naive", replayed=True),
    Way("no prompts, CUDA graph", "bare", replayed=True),
]
PUBLISHED = [
    Way("naive VPT, autocast", "naive", torch.float32, autocast=True),
    Way("naive VPT, float32", "naive", torch.float32),
]
WITHOUT_PROMPTS = [
    BARE,
    Way("linear probe", "linear"),
    Way("full fine-tuning, autocast", "full", torch.float32, autocast=True),
]
PEERS: dict[str, list[Way]] = {
    "eager": [OURS, NAIVE, BARE],
    "compiled": [OURS_COMPILED, NAIVE_COMPILED, BARE_COMPILED],
    "all": [
        OURS,
        OURS_COMPILED,
        NAIVE,
        NAIVE_COMPILED,
        *PUBLISHED,
        Way("naive VPT, autocast, compiled", "naive", torch.float32, autocast=True, compiled=True),
        BARE,
        BARE_COMPILED,
    ],
    "replayed": [OURS, NAIVE, BARE, *REPLAYED],
    "published": [OURS, NAIVE, *PUBLISHED, BARE],
    "low-precision": [
        OURS,
        OURS_COMPILED,
        Way("spt-fast, int8", "ours", weight_dtype="int8"),
        Way("spt-fast, int8, compiled", "ours", compiled=True, weight_dtype="int8"),
        Way("spt-fast, float8", "ours", weight_dtype="float8"),
        Way("spt-fast, float8, compiled", "ours", compiled=True, weight_dtype="float8"),
    ],
}


@dataclass(frozen=True)
class Task:
    """What all ways start from.

    Attributes:
        backbone: a frozen timm ViT in float32.
        prompts: their start ``[L, P, D]``; ``P`` is 0 without prompts.
        head: the classifier.
        images: ``[B, 3, H, W]`` in float32.
        labels: int64 ``[B]``.
    """

    backbone: Any
    prompts: Tensor
    head: nn.Linear
    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        return self.images.device


@dataclass
class Step:
    """A step to be taken again and again, the same launched kernel by kernel, and what its first pass computed: logits
    and, if any, prompt gradient."""

    take: Callable[[], None]
    launch: Callable[[], None]
    outcome: list[Tensor]


def expected_outcome(task: Task, *, prompted: bool) -> list[Tensor]:
    """What a way should compute: timm's own forward pass in float32, prompts being plain tokens."""
    if not prompted:
        with torch.no_grad():
            return [task.head(timm_features(task.backbone, task.images))]
    prompts = task.prompts.clone().requires_grad_()
    logits = naive_forward(task.backbone, prompts, task.head, task.images)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, task.labels), prompts)
    return [logits.detach(), gradient]


def prepare(way: Way, task: Task, compile_mode: str) -> Step:
    """The step of a way, with weights of its own."""
    images = task.images.to(way.weights)
    forward, learned, prompts = build(way, task)
    if way.compiled:
        forward = torch.compile(forward, mode=compile_mode)
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True, capturable=way.replayed)
    casting = torch.autocast(task.device.type, torch.bfloat16) if way.autocast else nullcontext()

    def passes() -> Tensor:
        if way.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with casting:
            logits = forward(images)
        F.cross_entropy(logits.float(), task.labels).backward()
        return logits

    def take() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    outcome = [passes().detach().float().clone()]
    if prompts is not None:
        assert prompts.grad is not None
        outcome.append(prompts.grad.float().clone())
    optimizer.zero_grad()
    if not way.replayed:
        return Step(take, take, outcome)
    replayed = ReplayedCall(take, task.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            for _ in range(ReplayedCall.WARM_UP + 1):
                replayed()
        except RuntimeWarning as refused:
            raise InputError(str(refused)) from None
    return Step(replayed, take, outcome)


def build(way: Way, task: Task) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter], nn.Parameter | None]:
    """The model as a function of images, what learns, and its prompts if it has any."""
    backbone = task.backbone
    if way.weight_dtype is not None:
        check_weight_dtype(way.weight_dtype, task.device)
        backbone = copy.deepcopy(backbone)
        quantize_blocks(backbone, way.weight_dtype)
    if way.kind == "ours":
        model = PromptedViT(backbone, task.prompts, num_classes=CLASSES)
        model = model.cast_backbone(way.weights).train()
        model.head.load_state_dict(task.head.state_dict())
        return model, [model.prompts, *model.head.parameters()], model.prompts

    own, head = copy.deepcopy(backbone).to(way.weights), CastingHead(copy.deepcopy(task.head))
    if way.kind == "naive":
        prompts = nn.Parameter(task.prompts.clone())  # float32 masters, as anyone who trains has them

        def forward(images: Tensor) -> Tensor:
            return naive_forward(own, prompts.to(way.weights), head, images)

        return forward, [prompts, *head.parameters()], prompts
    if way.kind == "bare":
        # Where prompts would be learned the gradient has to come this far as well.
        shift = nn.Parameter(torch.zeros(own.embed_dim, device=task.device))

        def forward(images: Tensor) -> Tensor:
            tokens = embed(own, images) + shift.to(way.weights)
            return head(own.forward_head(own.norm(own.blocks(tokens)), pre_logits=True))

        return forward, [shift, *head.parameters()], None
    own.requires_grad_(way.kind == "full")
    learned = [*(own.parameters() if way.kind == "full" else []), *head.parameters()]
    return lambda images: head(timm_features(own, images)), learned, None


def timm_features(backbone: Any, images: Tensor) -> Tensor:
    """What timm gives its classifier."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


class CastingHead(nn.Module):
    """A float32 head on features of any dtype."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features.to(self.head.weight.dtype))
