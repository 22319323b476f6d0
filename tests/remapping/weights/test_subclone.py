"""Subcloning finds what was made important. All in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from remap.backbones.families.tensor_axes import layout_of
from remap.errors import BackboneError
from remap.remapping.weights.base import Side
from remap.remapping.weights.subclone import Importance, outer_blocks

CHANNELS = [1, 2, 5, 8, 13, 14, 20, 21, 22, 27, 28, 31]
HEADS, UNITS = {0: [1, 3], 2: [0, 2]}, {0: [3, 9, 10, 40], 2: [0, 1, 2, 127]}


@pytest.fixture
def loud(build: Callable) -> SimpleNamespace:
    """Chosen channels get a large position, chosen heads a large value bias, chosen MLP units a large bias."""
    teacher = build("vit", 0, num_heads=4)
    with torch.no_grad():
        teacher.model.pos_embed[..., CHANNELS] += 50.0
        for block, heads in HEADS.items():
            values = teacher.model.blocks[block].attn.qkv.bias[64:].view(4, 8)
            values[heads] += 30.0
            teacher.model.blocks[block].mlp.fc1.bias[UNITS[block]] += 30.0
            for layer in (teacher.model.blocks[block].attn.proj, teacher.model.blocks[block].mlp.fc2):
                layer.weight *= 1e-3  # what is loud inside a block stays there
    return teacher


def test_loud_channels_heads_and_units_are_taken(
    loud: SimpleNamespace, build: Callable, initialise: Callable, images: Tensor
) -> None:
    """Source: the indices that were made loud; the middle one of three blocks is left out."""
    student = build("vit", 1, embed_dim=12, num_heads=2, depth=2, mlp_ratio=1 / 3)
    report = initialise("subclone", loud, student, [images[:1], images[1:]])
    assert report.blocks == (0, 2)
    assert torch.equal(student.model.pos_embed, loud.model.pos_embed[..., CHANNELS])
    for mine, its in enumerate((0, 2)):
        one, other = loud.model.blocks[its], student.model.blocks[mine]
        # Heads of 8 dimensions -> 6, evenly spaced: 0, 1.4, 2.8, 4.2, 5.6 and 7.
        rows = [8 * head + dim for head in HEADS[its] for dim in (0, 1, 3, 4, 6, 7)]
        assert torch.equal(other.attn.proj.weight, one.attn.proj.weight[CHANNELS][:, rows])
        assert torch.equal(other.attn.qkv.weight[12:24], one.attn.qkv.weight[[32 + r for r in rows]][:, CHANNELS])
        assert torch.equal(other.mlp.fc1.weight, one.mlp.fc1.weight[UNITS[its]][:, CHANNELS])
        assert torch.equal(other.mlp.fc2.weight, one.mlp.fc2.weight[CHANNELS][:, UNITS[its]])


def test_importance_is_the_mean_activation(build: Callable, images: Tensor) -> None:
    """Second formula: the definition over recorded activations of one batch; channels over all blocks, the rest in
    the second one. The teacher keeps no hook."""
    teacher = build("dinov3")
    importance = Importance(Side(teacher.model, teacher.anatomy, layout_of(teacher.model, teacher.anatomy)))
    importance.measure([images[:1], images[1:]])
    assert not any(module._forward_hooks for module in teacher.model.modules())
    outputs: list[Tensor] = []
    inner: dict[str, Tensor] = {}
    for block in teacher.model.blocks:
        block.register_forward_hook(lambda m, args, output: outputs.append(output))
    block = teacher.model.blocks[1]
    block.attn.proj.register_forward_pre_hook(lambda m, args: inner.update(heads=args[0]))
    block.mlp.fc2.register_forward_pre_hook(lambda m, args: inner.update(hidden=args[0]))
    teacher.model(images)
    width_D = torch.stack(outputs).abs().mean((0, 1, 2))
    heads_H = inner["heads"].abs().mean((0, 1)).view(2, 16).mean(1)
    hidden_M = inner["hidden"].abs().mean((0, 1))
    for what, place, mean_X, count in (
        ("width", None, width_D, 5),
        ("heads", 1, heads_H, 1),
        ("hidden", 1, hidden_M, 7),
    ):
        assert list(importance.largest(what, place, count)) == sorted(mean_X.topk(count).indices.tolist())


def test_a_shared_table_keeps_one_choice_of_heads(build: Callable, initialise: Callable, images: Tensor) -> None:
    """Heads 0 and 2 are the louder ones of the first block, 1 and 3 of all blocks together: every block takes those,
    and the table its columns of them."""
    teacher = build("beit_shared", 0, num_heads=4, use_rel_pos_bias=False)
    with torch.no_grad():
        for block, loud, factor in ((0, (0, 2), 5.0), (1, (1, 3), 100.0), (2, (1, 3), 100.0)):
            for head in loud:
                teacher.model.blocks[block].attn.qkv.weight[64 + 8 * head : 72 + 8 * head] *= factor
    student = build("beit_shared", 1, embed_dim=16, use_rel_pos_bias=False)
    initialise("subclone", teacher, student, [images])
    table = teacher.model.rel_pos_bias.relative_position_bias_table
    assert torch.equal(student.model.rel_pos_bias.relative_position_bias_table, table[:, [1, 3]])
    columns = [*range(8, 16), *range(24, 32)]
    for its, mine in zip(teacher.model.blocks, student.model.blocks, strict=True):
        channels = [its.norm1.weight.tolist().index(value) for value in mine.norm1.weight.tolist()]
        assert torch.equal(mine.attn.proj.weight, its.attn.proj.weight[channels][:, columns])


def test_outer_blocks() -> None:
    """By hand: the first and the last ones."""
    assert outer_blocks(6, 4) == [0, 1, 4, 5] and outer_blocks(5, 3) == [0, 1, 4] and outer_blocks(4, 1) == [0]


def test_no_images(build: Callable, initialise: Callable) -> None:
    with pytest.raises(BackboneError, match="at least one training image"):
        initialise("subclone", build("vit"), build("vit", 1, embed_dim=16), [])
