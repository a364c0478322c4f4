"""Small generated pictures, in files and in memory, for the tests of data sets and loaders."""

import io

import numpy as np
from PIL import Image

from spt_fast.data import ImageDataset, make_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(seed, size=(20, 16)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8))


def write_image(path, seed=0, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path)
    return path


def write_classes(root, counts, suffix=".png"):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(root / name / f"{number}{suffix}", seed=100 * label + number)


def transform(recipe="vtab", train=True, size=8):
    return make_transform(recipe, image_size=size, mean=MEAN, std=STD, train=train)


def in_memory(count, **kwargs):
    samples = [(noise(seed), seed % 3) for seed in range(count)]
    return ImageDataset(samples, ["a", "b", "c"], transform=transform("fgvc"), **kwargs)


def truncated_jpeg(path):
    data = io.BytesIO()
    noise(1, (64, 64)).save(data, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    return path


def sources(dataset):
    return {str(source) for source, _ in dataset.samples}
