"""Options of the command line that several commands share: type, help text and limits in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spt_fast.building import Depth, Layers, Method
from spt_fast.cli.chosen_recipe import apply_recipe
from spt_fast.low_precision import WeightDtype
from spt_fast.methods import METHODS
from spt_fast.optimizer import LearningRateScale
from spt_fast.tokens import Capture
from spt_fast.training_config import Dtype

Layout = Literal["auto", "vtab", "fgvc", "webdataset", "folder", "digits"]
Split = Literal["train", "val", "trainval", "test"]
PoolChoice = Literal["timm", "token", "avg", "avg_with_prompts"]

# The backbone.
ModelOption = Annotated[
    str, typer.Option("--model", help="timm model name, e.g. vit_base_patch16_224; a --recipe names one.")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(help="Weights: .safetensors, .pth (MAE, MoCo-v3, DeiT, timm layouts) or bundled:NAME."),
]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Let timm download its weights.")]
ModelKwargOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-kwarg", "-k", metavar="KEY=VALUE", help="Argument of timm.create_model; may be repeated."
    ),
]
WeightDtypeOption = Annotated[
    WeightDtype | None,
    typer.Option(help="Store and multiply the backbone's weights in 8 bits; needs torchao."),
]

# The images.
DataOption = Annotated[str, typer.Option(help="Folder of images, or the word digits.")]
LayoutOption = Annotated[Layout, typer.Option(help="How the folder is laid out.")]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="A recipe (`spt-fast recipes` lists them) or a yaml file of yours, whose values become the defaults here. "
        "Or the transform alone: fgvc: random crops and flips; vtab: plain resize; auto: what the layout is used with.",
        metavar="NAME",
        callback=apply_recipe,
        is_eager=True,
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at an unreadable image instead of skipping it.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=0, help="Processes that decode images; as many as help if not given."),
]
ImageCacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder for decoded images: decode once, read there in later epochs and runs."),
]

# The prototypes.
NumPromptsOption = Annotated[int, typer.Option(help="Prompt tokens per block (paper: 20 deep, 100 shallow).")]
NumPromptsListOption = Annotated[
    list[int] | None,
    typer.Option(
        "--num-prompts",
        help="Prompt tokens per block; repeat it to build several from one pass. Default: 20.",
        show_default=False,
    ),
]
MethodOption = Annotated[Method, typer.Option(help="How prototypes are built.")]
DepthOption = Annotated[Depth, typer.Option(help="Prompts for every block, or for the first.")]
LayersOption = Annotated[Layers, typer.Option(help="Whose tokens a block's prototypes come from (Table S2).")]
FractionOption = Annotated[float, typer.Option(help="Share of the images to build prototypes from, 0 to 1.")]
CaptureOption = Annotated[
    Capture, typer.Option(help="Layer tokens as in Eq. 1, or as in the authors' released code.")
]
TokenBudgetOption = Annotated[
    str,
    typer.Option(
        help="Tokens that kmeans keeps on the device: bytes, as 8GiB or 500MB, or auto: half of what is free."
    ),
]
TokenCacheOption = Annotated[
    Path | None, typer.Option(help="Folder for a memory-map of the tokens, if they do not fit into memory.")
]
CheckpointMinutesOption = Annotated[
    float, typer.Option(min=0, help="Minutes between two saves of the unfinished work.")
]

# The model and its training.
TuningMethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"What is tuned: {', '.join(METHODS)}. The name of a start stands for SPT with it.",
    ),
]
InitOption = Annotated[
    Method | None,
    typer.Option(
        help="What prompts start from; as the method was published if not given.", show_default=False
    ),
]
MethodOptionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method-option",
        metavar="KEY=VALUE",
        help="Argument of the method, e.g. rank=8 for lora; may be repeated.",
    ),
]
PoolOption = Annotated[
    PoolChoice, typer.Option(help="What the head sees; timm: the model's own pooling. MAE is used with avg.")
]
FreezePromptsOption = Annotated[
    bool, typer.Option("--freeze-prompts", help="Train the head alone (Table 4a).")
]
PromptDropoutOption = Annotated[float, typer.Option(help="Dropout on prompts.")]
CheckpointBlocksOption = Annotated[
    bool, typer.Option("--checkpoint-blocks", help="Less memory, for a second forward pass.")
]
EpochsOption = Annotated[int, typer.Option(help="Passes over the training images.")]
WarmupEpochsOption = Annotated[
    int | None, typer.Option(help="Linear warm-up; a tenth of the epochs if not given.")
]
LrScaleOption = Annotated[
    LearningRateScale,
    typer.Option(help="rms: scale each block's prompt rate by the size of its start; none: the paper."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the frozen weights and activations.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Run steps through torch.compile.")]

# A trained adapter.
AdapterOption = Annotated[Path, typer.Option(help="A trained adapter.")]
AdaptersOption = Annotated[
    list[Path],
    typer.Option("--adapter", help="A trained adapter; repeat it to ask several of one backbone at once."),
]
MovedCheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="The backbone's weights, if they have moved.")
]

# The run itself.
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
SeedOption = Annotated[int, typer.Option(min=0, help="Everything random follows from it.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as json on standard output.")]
