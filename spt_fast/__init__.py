"""spt-fast: Self-Prompt Tuning of frozen vision transformers, from a folder of images to a trained adapter.

images -> backbone -> layer tokens -> prototypes -> prompted ViT -> training -> adapter
"""

from spt_fast._version import __version__
from spt_fast.adapters import Adapter, load_adapter, save_adapter
from spt_fast.backbones import load_backbone
from spt_fast.building import build_prototypes
from spt_fast.evaluation import Evaluation, evaluate
from spt_fast.multi_task_vit import MultiTaskViT
from spt_fast.progress import progress_bar
from spt_fast.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes
from spt_fast.training import train
from spt_fast.training_config import TrainingConfig
from spt_fast.training_run import TrainingResult

__all__ = [
    "Adapter",
    "Evaluation",
    "MultiTaskViT",
    "Prototypes",
    "PromptedViT",
    "TrainingConfig",
    "TrainingResult",
    "__version__",
    "build_prototypes",
    "evaluate",
    "load_adapter",
    "load_backbone",
    "progress_bar",
    "save_adapter",
    "train",
]
