"""How good are a frozen backbone's features? A linear probe and nearest neighbours on a few labelled images.

python -m benchmarks.probe_backbone --checkpoint OLD --checkpoint NEW --data train.zip --test-data val.zip
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import sklearn
import torch
import typer
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.command import console, load_with_progress, mistakes_in_one_sentence
from benchmarks.masked_autoencoder import Normalise, create_backbone, require_class_token_vit
from benchmarks.pretrain_backbone import Recipe
from benchmarks.record import machine
from spt_fast.devices import choose_device
from spt_fast.errors import CheckpointError, InputError, MissingFileError
from spt_fast.files import write_text

RANDOM_WEIGHTS = "random weights"


def probe(
    backbone: VisionTransformer,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    inverse_regularisation: float = 0.01,
    neighbours: int = 20,
    batch_size: int = 250,
) -> dict[str, float]:
    """Measure the features of a frozen backbone, on the device that it is on.

    Two features are judged, both taken after the final norm: the mean of the patch tokens, and the class token. Each
    dimension is standardised by the mean and deviation of the training images. The linear probe is scikit-learn's
    multinomial logistic regression; the neighbours are by cosine similarity and vote with equal weight.

    Args:
        backbone: a timm ViT with a class token; put into eval mode.
        train_images: uint8 ``[n, 3, S, S]``; normalised here with ImageNet's mean and standard deviation.
        train_labels: int64 ``[n]``.
        test_images: uint8 ``[m, 3, S, S]``.
        test_labels: int64 ``[m]``.
        inverse_regularisation: ``C`` of the logistic regression.
        neighbours: how many nearest training images vote.
        batch_size: images in one forward pass.

    Returns:
        Test accuracies from 0 to 1, in this order: ``linear_probe_mean_patch``, ``knn_mean_patch``,
        ``linear_probe_class_token`` and ``knn_class_token``.

    Raises:
        InputError: fewer training images than ``neighbours``, fewer than two classes, or features not finite.
        UnsupportedModelError: the backbone is not a plain ViT with a class token.

    Example:
        >>> backbone = create_backbone("test_vit", img_size=8, patch_size=2)
        >>> images, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
        >>> sorted(probe(backbone, images[:30], labels[:30], images[30:], labels[30:]))
        ['knn_class_token', 'knn_mean_patch', 'linear_probe_class_token', 'linear_probe_mean_patch']
    """
    require_class_token_vit(backbone)
    if len(train_images) < neighbours:
        raise InputError(
            f"train_images holds {len(train_images)} images, but {neighbours} neighbours were asked for."
        )
    if len(train_labels.unique()) < 2:
        raise InputError("train_labels holds one class, but a probe needs at least two to tell apart.")

    train_features = extract_features(backbone, train_images, batch_size)
    test_features = extract_features(backbone, test_images, batch_size)
    accuracies = {}
    for name in ("mean_patch", "class_token"):
        scaler = StandardScaler().fit(train_features[name])
        train, test = scaler.transform(train_features[name]), scaler.transform(test_features[name])
        linear = LogisticRegression(C=inverse_regularisation, max_iter=1000)
        nearest = KNeighborsClassifier(neighbours, metric="cosine")
        for classifier, kind in ((linear, "linear_probe"), (nearest, "knn")):
            classifier.fit(train, train_labels.numpy())
            accuracies[f"{kind}_{name}"] = float(classifier.score(test, test_labels.numpy()))
    return accuracies


@torch.inference_mode()
def extract_features(backbone: VisionTransformer, images: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """Return ``mean_patch`` and ``class_token``, each a float32 array ``[n, D]``, of uint8 ``images``."""
    device = next(backbone.parameters()).device
    backbone.eval()
    normalise = Normalise().to(device)
    mean_patch, class_token = [], []
    for batch in images.split(batch_size):
        # timm puts the final norm in either of two places and an identity in the other.
        tokens = backbone.fc_norm(backbone.forward_features(normalise(batch.to(device))))
        mean_patch.append(tokens[:, backbone.num_prefix_tokens :].mean(dim=1))
        class_token.append(tokens[:, 0])
    features = {"mean_patch": torch.cat(mean_patch), "class_token": torch.cat(class_token)}
    for name, values in features.items():
        if not values.isfinite().all():
            raise InputError(f"the backbone's {name} features hold NaN or infinity; expected finite numbers.")
    return {name: values.float().cpu().numpy() for name, values in features.items()}


def read_backbone(path: Path, model: str, img_size: int, patch_size: int) -> VisionTransformer:
    """Build timm's ``model`` and load the safetensors file ``path`` into it, every tensor of it and no other."""
    backbone = create_backbone(model, img_size, patch_size)
    if not path.is_file():
        raise MissingFileError(
            f"checkpoint is {str(path)!r}, which is not a file; expected a safetensors file."
        )
    try:
        backbone.load_state_dict(load_file(path))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {str(path)!r} does not load into {model}: {reason}") from error
    return backbone


def first_of_each_class(labels: Tensor, count: int, classes: list[str]) -> Tensor:
    """Return the positions of the first ``count`` labels of every class, int64 ``[classes * count]``."""
    positions = []
    for label, name in enumerate(classes):
        found = (labels == label).nonzero().flatten()
        if len(found) < count:
            raise InputError(
                f"class {name!r} has {len(found)} images, but {count} of each class were asked for."
            )
        positions.append(found[:count])
    return torch.cat(positions)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    data: Annotated[
        Path, typer.Option(help="Labelled training images: <class>/<image> folders, or a zip of them.")
    ],
    test_data: Annotated[Path, typer.Option(help="Test images with the same classes.")],
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="Backbone to judge (safetensors); may be given again.")
    ] = None,
    random_weights: Annotated[bool, typer.Option(help="Also judge the model with random weights.")] = False,
    per_class: Annotated[
        int, typer.Option(help="Training images of each class, the first by name.", min=1)
    ] = 100,
    test_per_class: Annotated[
        int, typer.Option(help="Test images of each class, the first by name.", min=1)
    ] = 200,
    model: Annotated[str, typer.Option(help="timm's name of the ViT.")] = Recipe.model,
    img_size: Annotated[int, typer.Option(help="Image size in pixels.")] = Recipe.img_size,
    patch_size: Annotated[int, typer.Option(help="Patch size in pixels.")] = Recipe.patch_size,
    device: Annotated[str, typer.Option(help="'auto', 'cuda', 'cpu' ...")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the numbers to this json file.")] = None,
) -> None:
    """Compare backbones by a linear probe and 20 nearest neighbours on few labelled images."""
    with mistakes_in_one_sentence():
        where = choose_device(device)
        # before the images are read: mistakes show at once
        backbones = {str(path): read_backbone(path, model, img_size, patch_size) for path in checkpoint or []}
        if random_weights:
            torch.manual_seed(0)
            backbones[RANDOM_WEIGHTS] = create_backbone(model, img_size, patch_size)
        if not backbones:
            raise InputError("there is nothing to judge; expected --checkpoint FILE or --random-weights.")
        train_images, train_labels, classes = load_with_progress(data, img_size)
        test_images, test_labels, test_classes = load_with_progress(test_data, img_size)
        if classes != test_classes:
            raise InputError(f"test_data has the classes {test_classes}, but data has {classes}.")
        train = first_of_each_class(train_labels, per_class, classes)
        test = first_of_each_class(test_labels, test_per_class, classes)

        table = Table(
            title=f"{len(train):,} labelled training images, {len(test):,} test images: accuracy in %"
        )
        table.add_column("backbone", overflow="fold")
        for feature in ("mean patch", "class token"):
            table.add_column(f"linear probe\n{feature}", justify="right")
            table.add_column(f"20-NN\n{feature}", justify="right")
        results = {}
        for name, backbone in backbones.items():
            results[name] = probe(
                backbone.to(where),
                train_images[train],
                train_labels[train],
                test_images[test],
                test_labels[test],
            )
            table.add_row(escape(name), *(f"{100 * accuracy:.1f}" for accuracy in results[name].values()))
        console.print(table)
        if output is not None:
            summary = {
                "train_images": len(train),
                "test_images": len(test),
                "model": model,
                "scikit-learn": sklearn.__version__,
                **machine(where),
            }
            write_text(output, json.dumps({**summary, "accuracy": results}, indent=2) + "\n")


if __name__ == "__main__":
    app()
