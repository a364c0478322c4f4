# %% [markdown]
# # From images to a served adapter
#
# A frozen ViT, a few hundred images, and no network: the backbone comes with the package, the images with
# scikit-learn. Run the cells one by one in an editor that knows `# %%`, or all of them at once:
# `python examples/quickstart.py`.

# %%
import tempfile
from pathlib import Path

import torch

import spt_fast
from spt_fast.backbones import image_settings
from spt_fast.data import load_dataset, make_loader, make_transform

output = Path(tempfile.mkdtemp(prefix="spt-fast-"))

# %% [markdown]
# ## Images
#
# A transform turns pictures into what the backbone was trained on: its size, its mean and standard deviation. The
# same call opens a folder of yours: `load_dataset("photos", "train", transform=transform)`.

# %%
backbone = spt_fast.load_backbone(
    "vit_tiny_patch16_224", checkpoint="bundled:vit_tiny_mae_cifar10", img_size=32, patch_size=4
)
settings = image_settings(backbone)
train_images = load_dataset("digits", "train", transform=make_transform("vtab", train=True, **settings))
test_images = load_dataset("digits", "test", transform=make_transform("vtab", train=False, **settings))
# Some of them, so that all of this takes half a minute on one core.
train_images = train_images.subset(range(0, len(train_images), 4))
test_images = test_images.subset(range(0, len(test_images), 8))
print(len(train_images), "images to train on,", len(test_images), "to test with")

# %% [markdown]
# ## Prototypes
#
# In each block the patch tokens of all images are clustered; the centres are what the prompts start from.

# %%
prototypes = spt_fast.build_prototypes(
    backbone, make_loader(train_images, shuffle=True), num_prompts=10, method="kmeans"
)
print("prototypes", list(prototypes.values.shape), "of", prototypes.metadata["tokens"], "tokens a block")

# %% [markdown]
# ## Training
#
# Only the prompts and the head learn. The folder holds the adapters and the state: the same call with `resume=True`
# goes on after an interruption.

# %%
model = spt_fast.PromptedViT(backbone, prototypes, num_classes=len(train_images.classes), pool="avg")
config = spt_fast.TrainingConfig(epochs=3, warmup_epochs=1, batch_size=16, learning_rate=0.1)
result = spt_fast.train(model, train_images, output=output, config=config)
for epoch in result.metrics:
    print("epoch", epoch["epoch"], "loss", round(epoch["train_loss"], 3))

# %% [markdown]
# ## The adapter
#
# What a task stores: prompts, head, and a record of the backbone that they belong to.

# %%
adapter = output / "last.safetensors"
trained = spt_fast.load_adapter(adapter, backbone)
print(adapter.stat().st_size // 1024, "KiB,", spt_fast.evaluate(trained, test_images))

# %% [markdown]
# ## Serving
#
# One model serves many adapters of one backbone; every image of a batch names its task.

# %%
server = spt_fast.MultiTaskViT(backbone, {"digits": adapter})
images, labels = next(iter(make_loader(test_images, batch_size=8)))
with torch.no_grad():
    logits = server(images, ["digits"] * len(images))
print("labels", labels.tolist(), "answers", logits.argmax(dim=1).tolist())
