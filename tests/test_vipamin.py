"""VIPAMIN's start, judged by naive loops in float64."""

import math
from typing import Any

import pytest
import torch
from tiny import batches, noise
from torch import Tensor
from torch.nn import functional as F

from spt_fast import build_prototypes
from spt_fast.backbones import load_backbone
from spt_fast.clustering import seeded_generator
from spt_fast.errors import InputError
from spt_fast.low_precision import why_not
from spt_fast.sampling import uniform
from spt_fast.tokens import block_inputs, layer_tokens
from spt_fast.vipamin import matched, orthogonal, output_basis, vipamin

DEPTH, WIDTH, PATCHES = 3, 48, 16


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone()


def heads(block: Any, rows: Tensor, part: int) -> Tensor:
    """Queries (0), keys (1) or values (2) of normalised rows, ``[H, n, d]``, weight by weight."""
    attn, width = block.attn, rows.shape[-1]
    weight, bias = attn.qkv.weight.double(), attn.qkv.bias.double()
    norm = block.norm1
    mean = rows.mean(dim=-1, keepdim=True)
    variance = (rows - mean).square().mean(dim=-1, keepdim=True)
    rows = (rows - mean) / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()
    rows = rows @ weight[part * width : (part + 1) * width].T + bias[part * width : (part + 1) * width]
    split = torch.stack(rows.split(width // attn.num_heads, dim=-1))
    return (attn.q_norm, attn.k_norm, lambda same: same)[part](split.float()).double()


def naive_matched(block: Any, prompts: Tensor, tokens: Tensor, neighbors: int, prefix: int) -> Tensor:
    prompts, tokens = prompts.double(), tokens.double()
    keys = sum(heads(block, image, 1).mean(dim=0) for image in tokens) / len(tokens)
    means = tokens.mean(dim=0)
    rows = []
    for key in heads(block, prompts, 1).mean(dim=0):
        cosines = [
            (float(key @ other / (key.norm() * other.norm())), position)
            for position, other in enumerate(keys)
            if position >= prefix
        ]
        nearest = sorted(cosines, reverse=True)[:neighbors]
        rows.append(sum(means[position] for _, position in nearest) / neighbors)
    return torch.stack(rows)


def naive_outputs(block: Any, tokens: Tensor) -> Tensor:
    """What attention gives at each position, before its projection, averaged over the images: ``[N, D]``."""
    total: Any = 0
    for image in tokens.double():
        q, k, v = (heads(block, image, part) for part in range(3))
        out = [
            torch.softmax(q[h] @ k[h].T / math.sqrt(q.shape[2]), dim=1) @ v[h]
            for h in range(block.attn.num_heads)
        ]
        total = total + torch.cat(out, dim=1)
    return total / len(tokens)


@pytest.mark.parametrize("neighbors", [1, 3, PATCHES])
@pytest.mark.parametrize(
    "kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2, "qk_norm": True}], ids=str
)
def test_matching_takes_the_means_of_the_positions_with_the_nearest_keys(make_backbone, kwargs, neighbors):
    backbone = make_backbone(**kwargs)
    prefix = backbone.num_prefix_tokens
    tokens = block_inputs(backbone, noise(5))[1]
    prompts = noise(1, size=48, seed=3)[0, 0, :7]
    found = matched(backbone.blocks[1], prompts, tokens, neighbors=neighbors, num_prefix_tokens=prefix)
    expected = naive_matched(backbone.blocks[1], prompts, tokens, neighbors, prefix)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if neighbors == 1:
        assert len(found.unique(dim=0)) > 1  # prompts find different positions


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "qk_norm": True}], ids=str)
def test_values_of_the_orthogonal_part_are_orthogonal_to_what_attention_gives(make_backbone, kwargs):
    backbone = make_backbone(**kwargs)
    block, tokens = backbone.blocks[2], block_inputs(backbone, noise(5))[2]
    outputs = naive_outputs(block, tokens)
    basis = output_basis(block, tokens)
    assert basis.shape == (WIDTH, tokens.shape[1])
    torch.testing.assert_close(basis.T @ basis, torch.eye(tokens.shape[1]).double())
    torch.testing.assert_close(outputs @ basis @ basis.T, outputs, atol=1e-4, rtol=0)

    prompts = noise(1, size=48, seed=3)[0, 0, :7]
    weight = block.attn.qkv.weight[2 * WIDTH :].double()
    bias = block.attn.qkv.bias[2 * WIDTH :].double()
    values = orthogonal(block, prompts, basis) @ weight.T + bias
    cosines = F.normalize(values, dim=1) @ F.normalize(outputs, dim=1).T
    assert cosines.abs().max() < 1e-4
    # Nothing else is taken away: what is left is the prompts' own values without their part in the span.
    own = prompts.double() @ weight.T + bias
    within = torch.linalg.lstsq(outputs.T, own.T).solution
    torch.testing.assert_close(values, own - (outputs.T @ within).T, atol=1e-3, rtol=1e-3)


def test_where_attention_reaches_everywhere_nothing_is_left(make_backbone):
    backbone = make_backbone(patch_size=4)  # 65 positions, 48 dimensions
    tokens = block_inputs(backbone, noise(2))[0]
    start = vipamin(backbone.blocks[0], torch.randn(4, WIDTH), tokens, neighbors=2, weight=1)
    assert start.free_dimensions == 0
    torch.testing.assert_close(start.values, start.values[:1].expand(4, -1))
    weight = backbone.blocks[0].attn.qkv.weight[2 * WIDTH :].double()
    bias = backbone.blocks[0].attn.qkv.bias[2 * WIDTH :].double()
    torch.testing.assert_close(
        start.values[0] @ weight.T + bias, torch.zeros(WIDTH).double(), atol=1e-6, rtol=0
    )


def test_eight_bit_layers_tell_their_value_weights():
    pytest.importorskip("torchao")
    reason = why_not("int8", torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2}
    backbone = load_backbone("vit_tiny_patch16_224", **shape, weight_dtype="int8")
    block = backbone.blocks[0]
    torch.nn.init.normal_(block.attn.qkv.bias)
    # A row with a single entry loses nothing in 8 bits, so the products with unit vectors are the weights.
    weight = (block.attn.qkv(torch.eye(64)) - block.attn.qkv.bias)[:, 128:].double()
    basis = output_basis(block, block_inputs(backbone, noise(4))[0])
    values = orthogonal(block, torch.randn(3, 64), basis) @ weight + block.attn.qkv.bias[128:].double()
    assert values.norm(dim=1).min() > 0.1 and (values @ basis).abs().max() < 1e-3


# --- build_prototypes --------------------------------------------------------------------------------------------


def test_building_mixes_both_parts_block_by_block(backbone):
    image_batch = noise(10)
    built = build_prototypes(
        backbone,
        [image_batch],
        num_prompts=6,
        method="vipamin",
        vipamin_neighbors=3,
        vipamin_lambda=0.3,
        seed=5,
    )
    assert built.values.dtype == torch.float32 and built.values.shape == (DEPTH, 6, WIDTH)
    assert built.counts is None
    generator = seeded_generator(5)
    torch.randint(1, (), generator=generator)  # the choice of a batch
    prompts = uniform(backbone, DEPTH, 6, generator)
    tokens = layer_tokens(backbone, image_batch)
    for index, (block, inputs) in enumerate(
        zip(backbone.blocks, block_inputs(backbone, image_batch).values(), strict=True)
    ):
        assert torch.equal(tokens[index], inputs[:, 1:])
        expected = 0.7 * naive_matched(block, prompts[index], tokens[index], 3, 0)
        expected += 0.3 * orthogonal(block, prompts[index], output_basis(block, inputs))
        torch.testing.assert_close(built.values[index], expected.float(), atol=1e-4, rtol=1e-4)
    facts = built.metadata
    assert (facts["images"], facts["tokens"]) == (10, 10 * PATCHES)
    assert (facts["vipamin_neighbors"], facts["vipamin_lambda"]) == (3, 0.3)
    assert facts["vipamin_free_dimensions"] == [WIDTH - PATCHES - 1] * DEPTH


def test_seed_depth_layers_and_several_numbers(backbone):
    def build(**kwargs: Any) -> Any:
        return build_prototypes(backbone, batches(), method="vipamin", **{"num_prompts": 5, **kwargs})

    first = build(seed=3)
    assert torch.equal(first.values, build(seed=3).values) and torch.isfinite(first.values).all()
    assert not torch.equal(first.values, build(seed=4).values)
    assert first.metadata["vipamin_neighbors"] == PATCHES  # fewer than 32: all
    assert torch.equal(build(depth="shallow").values, build().values[:1])
    several = build(num_prompts=[7, 5], seed=3)
    torch.testing.assert_close(several[5].values, first.values, atol=1e-6, rtol=1e-6)
    assert several[7].values.shape == (DEPTH, 7, WIDTH)
    last = build(layers="last")
    assert last.values.shape == (DEPTH, 5, WIDTH) and torch.equal(last.values[0], last.values[2])
    half = build_prototypes(backbone.to(torch.bfloat16), batches(), num_prompts=5, method="vipamin", seed=3)
    backbone.float()
    assert half.values.dtype == torch.float32 and torch.isfinite(half.values).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vipamin_neighbors": 17}, "vipamin_neighbors must be from 1 to the 16 patches of an image, got 17"),
        *(({"vipamin_neighbors": n}, "vipamin_neighbors must be a whole") for n in (0, 2.0, True, "8")),
        *(({"vipamin_lambda": w}, "vipamin_lambda must be from 0 to 1") for w in (-0.1, 1.1, math.nan, True)),
        ({"capture": "released"}, "capture='paper', got capture='released'"),
    ],
    ids=str,
)
def test_choices_that_are_refused(backbone, wrong, message):
    with pytest.raises(InputError, match=message):
        build_prototypes(backbone, batches(), num_prompts=3, method="vipamin", **wrong)
