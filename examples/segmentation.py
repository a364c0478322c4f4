# %% [markdown]
# # A class for every pixel
#
# Prompts adapt more than classifiers: here a frozen ViT learns to segment pictures of shapes. Everything is made on
# the spot, and all of it runs on one core in about half a minute: `python examples/segmentation.py`.

# %%
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.utils.data import DataLoader

import spt_fast
from spt_fast.backbones import image_settings
from spt_fast.data import MaskFolder, MaskTransform
from spt_fast.mean_iou import MeanIoU
from spt_fast.optimizer import PromptAdamW
from spt_fast.segmentation import SegmentationViT

CLASSES = ["background", "disc", "square", "triangle"]
IGNORED = 255
folder = Path(tempfile.mkdtemp(prefix="spt-fast-"))

# %% [markdown]
# ## Pictures and masks
#
# A mask is a picture whose grey levels are class ids, under the name of its image: `images/7.png`, `masks/7.png`.
# Colours are drawn anew for every picture, so only their outlines tell the shapes apart. The rim of a shape is marked
# as 255: a pixel that is half this and half that belongs to no class.


# %%
def draw(chance: random.Random) -> tuple[Image.Image, Image.Image]:
    """A picture of 64 x 64 pixels with one to three shapes, and its mask."""
    colours = [tuple(chance.randrange(256) for _ in range(3)) for _ in range(4)]
    picture, mask = Image.new("RGB", (64, 64), colours[0]), Image.new("L", (64, 64), 0)
    for colour in colours[1 : 2 + chance.randrange(3)]:
        kind, size = chance.randrange(1, len(CLASSES)), chance.randrange(20, 36)
        x, y = chance.randrange(64 - size), chance.randrange(64 - size)
        corners = {
            2: [(x, y), (x + size, y), (x + size, y + size), (x, y + size)],
            3: [(x, y + size), (x + size, y + size), (x + size // 2, y)],
        }
        for canvas, fill, rim in ((picture, colour, colour), (mask, kind, IGNORED)):
            pen = ImageDraw.Draw(canvas)
            if kind == 1:
                pen.ellipse((x, y, x + size, y + size), fill=fill, outline=rim)
            else:
                pen.polygon(corners[kind], fill=fill, outline=rim)
    return picture, mask


chance = random.Random(0)
for split, count in (("train", 80), ("test", 40)):
    for name in ("images", "masks"):
        (folder / split / name).mkdir(parents=True)
    for index in range(count):
        picture, mask = draw(chance)
        picture.save(folder / split / "images" / f"{index}.png")
        mask.save(folder / split / "masks" / f"{index}.png")

# %% [markdown]
# ## The backbone and its view of the pictures
#
# `MaskTransform` brings image and mask to the size of the backbone together: the image smoothly, the mask to the
# nearest pixel, since there is nothing between two class ids.

# %%
backbone = spt_fast.load_backbone(
    "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
)
transform = MaskTransform(**image_settings(backbone))
train_data = MaskFolder(folder / "train", CLASSES, transform=transform)
test_data = MaskFolder(folder / "test", CLASSES, transform=transform)
print(len(train_data), "pictures to train on,", len(test_data), "to test with")

# %% [markdown]
# ## Prototypes
#
# The same as for a classifier: the centres of the patch tokens that enter each block. Masks are not looked at.

# %%
prototypes = spt_fast.build_prototypes(
    backbone, DataLoader(train_data, batch_size=40), num_prompts=10, method="minibatch_kmeans"
)

# %% [markdown]
# ## Training
#
# `SegmentationViT` gives every patch to the head and interpolates its answers to the size of the image. One loop serves
# prompts with a head, and a head alone.


# %%
def train(segmenter: SegmentationViT, learning_rate: float = 0.1, epochs: int = 5) -> None:
    model = segmenter.model
    optimizer = PromptAdamW(
        model.prompts, model.head, lr=learning_rate, weight_decay=1e-4, head_weight_decay=1e-4
    )
    batches = DataLoader(train_data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=epochs * len(batches)
    )
    segmenter.train()
    for _ in range(epochs):
        for images, masks in batches:
            loss = F.cross_entropy(segmenter(images), masks, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def test(segmenter: SegmentationViT) -> MeanIoU:
    segmenter.eval()
    found = MeanIoU(len(CLASSES))
    for images, masks in DataLoader(test_data, batch_size=20):
        found.update(segmenter(images).argmax(dim=1), masks)
    return found


# %% [markdown]
# ## How good is it?
#
# Three answers to the same pictures: everything is the most frequent class; a head alone, on features of the prompts as
# they start; prompts and head. The measure is the mean, over classes, of intersection over union: the share of right
# pixels flatters whoever says "background".

# %%
counts = torch.stack([mask for _, mask in train_data]).flatten().bincount(minlength=256)
majority = MeanIoU(len(CLASSES))
for _, masks in DataLoader(test_data, batch_size=20):
    majority.update(torch.full_like(masks, int(counts[: len(CLASSES)].argmax())), masks)
results = {"the most frequent class": majority}
for name, train_prompts in (("head alone", False), ("prompts and head", True)):
    torch.manual_seed(0)
    model = spt_fast.PromptedViT(
        backbone, prototypes, num_classes=len(CLASSES), pool="avg", train_prompts=train_prompts
    )
    segmenter = SegmentationViT(model)
    train(segmenter)
    results[name] = test(segmenter)
for name, found in results.items():
    classes = ", ".join(f"{each} {iou:.2f}" for each, iou in zip(CLASSES, found.per_class, strict=True))
    print(f"{name}: mean IoU {found.mean:.3f} ({classes}), {found.accuracy:.1%} of pixels right")

# %% [markdown]
# ## What is kept
#
# The task is prompts and head, as for a classifier: a file of a hundred KiB beside a backbone that others use, too.

# %%
adapter = folder / "shapes.safetensors"
spt_fast.save_adapter(adapter, segmenter.model, classes=CLASSES)
again = SegmentationViT(spt_fast.load_adapter(adapter, backbone))
print(
    adapter.stat().st_size // 1024,
    "KiB; the same again:",
    test(again).mean == results["prompts and head"].mean,
)
