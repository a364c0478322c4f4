"""From images on disk to batches: readers of the layouts people have, transforms, a resumable loader.

>>> from spt_fast.data import load_dataset, make_loader, make_transform
>>> transform = make_transform("vtab", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, train=True)
>>> digits = load_dataset("digits", "train", transform=transform)
>>> images, labels = next(iter(make_loader(digits, batch_size=4)))
>>> images.shape, labels.dtype
(torch.Size([4, 3, 32, 32]), torch.int64)
"""

from .cache import CachedImages, cache_images
from .dataset import ImageDataset
from .images import read_image
from .layouts import LAYOUTS, SPLITS, load_dataset
from .loader import ImageLoader, batches_per_epoch, make_loader
from .masks import MaskFolder, MaskTransform
from .transforms import RECIPES, ImageTransform, make_transform

__all__ = [
    "LAYOUTS",
    "RECIPES",
    "SPLITS",
    "CachedImages",
    "ImageDataset",
    "ImageLoader",
    "ImageTransform",
    "MaskFolder",
    "MaskTransform",
    "batches_per_epoch",
    "cache_images",
    "load_dataset",
    "make_loader",
    "make_transform",
    "read_image",
]
