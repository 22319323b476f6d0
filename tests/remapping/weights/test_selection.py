"""Selections against index lists written by hand. All in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from remap.errors import BackboneError
from remap.remapping.weights.base import dimensions, evenly
from remap.remapping.weights.selection import spread

# Width 24 -> 12, four heads of 6 -> two, MLP 8 -> 3, three blocks -> two.
BIG = {"embed_dim": 24, "num_heads": 4, "mlp_ratio": 1 / 3}
SMALL = {"embed_dim": 12, "num_heads": 2, "mlp_ratio": 0.25, "depth": 2}
CHANNELS = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
HEADS = [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]  # the dimensions of heads 0 and 2
UNITS = [0, 4, 7]


def taken(tensor: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    return tensor.detach()[np.ix_(rows, columns)]


def test_weight_selection_by_hand(build: Callable, initialise: Callable) -> None:
    """Every second channel; heads 0 and 2 of queries, keys and values apart; MLP units at 0, 3.5 and 7, halves up."""
    teacher, student = build("vit", 0, **BIG), build("vit", 1, **SMALL)
    report = initialise("weight_selection", teacher, student)
    its, mine = teacher.model, student.model
    assert torch.equal(mine.cls_token, its.cls_token[..., CHANNELS])
    assert torch.equal(mine.pos_embed, its.pos_embed[..., CHANNELS])
    assert torch.equal(mine.patch_embed.proj.weight, its.patch_embed.proj.weight[CHANNELS])
    assert torch.equal(mine.patch_embed.proj.bias, its.patch_embed.proj.bias[CHANNELS])
    assert torch.equal(mine.norm.weight, its.norm.weight[CHANNELS])
    rows = HEADS + [24 + row for row in HEADS] + [48 + row for row in HEADS]
    for block in (0, 1):
        one, other = its.blocks[block], mine.blocks[block]
        assert torch.equal(other.norm1.weight, one.norm1.weight[CHANNELS])
        assert torch.equal(other.norm2.bias, one.norm2.bias[CHANNELS])
        assert torch.equal(other.attn.qkv.weight, taken(one.attn.qkv.weight, rows, CHANNELS))
        assert torch.equal(other.attn.qkv.bias, one.attn.qkv.bias[rows])
        assert torch.equal(other.attn.proj.weight, taken(one.attn.proj.weight, CHANNELS, HEADS))
        assert torch.equal(other.attn.proj.bias, one.attn.proj.bias[CHANNELS])
        assert torch.equal(other.mlp.fc1.weight, taken(one.mlp.fc1.weight, UNITS, CHANNELS))
        assert torch.equal(other.mlp.fc1.bias, one.mlp.fc1.bias[UNITS])
        assert torch.equal(other.mlp.fc2.weight, taken(one.mlp.fc2.weight, CHANNELS, UNITS))
    assert report.blocks == (0, 1) and not report.kept
    assert "width 12 of 24" in report.text and "heads 2 of 4" in report.text


def test_separate_biases_layer_scales_and_inner_norms(build: Callable, initialise: Callable) -> None:
    """Eva's q and v biases, both norms of queries and keys, gated MLPs with a norm inside, BEiT's table and scales."""
    teacher, student = build("eva02_clip", 0, num_heads=4), build("eva02_clip", 1, embed_dim=16)
    initialise("weight_selection", teacher, student)
    one, other = teacher.model.blocks[1], student.model.blocks[1]
    heads, channels = [*range(8), *range(16, 24)], [*range(0, 32, 2)]  # heads 0 and 2 of 8 dimensions
    for word in ("q_proj", "k_proj", "v_proj"):
        mine, its = getattr(other.attn, word), getattr(one.attn, word)
        assert torch.equal(mine.weight, taken(its.weight, heads, channels))
    assert torch.equal(other.attn.v_proj.bias, one.attn.v_proj.bias[heads])
    assert torch.equal(other.attn.norm.weight, one.attn.norm.weight[heads])
    units = evenly(one.mlp.fc2.in_features, other.mlp.fc2.in_features)
    for word in ("fc1_g", "fc1_x"):
        mine, its = getattr(other.mlp, word), getattr(one.mlp, word)
        assert torch.equal(mine.weight, taken(its.weight, list(units), channels))
    assert torch.equal(other.mlp.norm.bias, one.mlp.norm.bias[list(units)])

    teacher, student = (build("beit", seed, **shape) for seed, shape in ((0, BIG), (1, SMALL)))
    initialise("weight_selection", teacher, student)
    one, other = teacher.model.blocks[1], student.model.blocks[1]
    assert torch.equal(other.attn.q_bias, one.attn.q_bias[HEADS])
    assert torch.equal(other.attn.v_bias, one.attn.v_bias[HEADS])
    assert torch.equal(other.gamma_1, one.gamma_1[CHANNELS])
    table = one.attn.relative_position_bias_table[:, [0, 2]]
    assert torch.equal(other.attn.relative_position_bias_table, table)


def test_gated_halves_stay_apart(build: Callable, initialise: Callable) -> None:
    """A fused gate: rows of the value and of the gate are selected alike, each in its own half."""
    teacher, student = (build("vit_swiglu", seed, mlp_ratio=ratio) for seed, ratio in ((0, 1.0), (1, 0.5)))
    initialise("weight_selection", teacher, student)
    one, other = teacher.model.blocks[0].mlp, student.model.blocks[0].mlp
    hidden, mine = one.fc2.in_features, other.fc2.in_features
    assert (hidden, mine) == (16, 8) and one.fc1.out_features == 32
    rows = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    assert torch.equal(other.fc1.weight, one.fc1.weight[rows])
    assert torch.equal(other.fc2.weight, one.fc2.weight[:, rows[:8]])


@pytest.mark.parametrize(("sizes", "wanted"), [((8, 4), [0, 2, 4, 6]), ((8, 3), [0, 4, 7]), ((7, 5), [0, 2, 3, 5, 6])])
def test_even_indices(sizes: tuple[int, int], wanted: list[int]) -> None:
    """By hand: steps of 2; 0, 3.5, 7; 0, 1.5, 3, 4.5, 6; halves rounded up."""
    assert list(evenly(*sizes)) == wanted


def test_even_indices_are_distinct_and_nearest() -> None:
    """Source: numpy's linspace; no index is farther than a half from it."""
    for teacher in range(1, 40):
        for student in range(1, teacher + 1):
            found = evenly(teacher, student)
            assert len(set(found)) == student and found == tuple(sorted(found)) and found[-1] < teacher
            if teacher % student and student > 1:
                assert np.abs(np.array(found) - np.linspace(0, teacher - 1, student)).max() <= 0.5 + 1e-9


def test_smaller_heads_keep_the_scores(build: Callable, initialise: Callable) -> None:
    """Closed form: where dimensions 2j and 2j + 1 of each head are equal, every second one gives half the product, and
    q grows by sqrt(8 / 4), so that (sqrt 2 / 2) / sqrt 4 = 1 / sqrt 8 of the whole product remains."""
    teacher, student = build("vit", 0, num_heads=4), build("vit", 1, num_heads=4, embed_dim=16)
    x_TD = torch.randn(5, 32, dtype=torch.float64)
    x_TD[:, 1::2] = 0.0  # only the channels that the student keeps
    qkv = teacher.model.blocks[0].attn.qkv
    with torch.no_grad():
        qkv.weight[1::2] = qkv.weight[::2]
        qkv.bias[1::2] = qkv.bias[::2]
    initialise("weight_selection", teacher, student)

    def scores(layer: torch.nn.Module, x: Tensor, head_dim: int) -> Tensor:
        q, k, _ = layer(x).reshape(5, 3, 4, head_dim).permute(1, 2, 0, 3)
        return q @ k.mT / head_dim**0.5

    mine = student.model.blocks[0].attn.qkv
    torch.testing.assert_close(scores(mine, x_TD[:, ::2], 4), scores(qkv, x_TD, 8))
    torch.testing.assert_close(mine.weight[16:], taken(qkv.weight, [*range(32, 96, 2)], [*range(0, 32, 2)]))


def test_normed_queries_carry_the_scale_in_their_norm(build: Callable, initialise: Callable) -> None:
    """The norm would undo a scale on the projection: 16 dimensions -> 8, sqrt 2 on the norm's weight and bias."""
    teacher, student = build("vit_avg", 0), build("vit_avg", 1, embed_dim=16)
    initialise("weight_selection", teacher, student)
    one, other = teacher.model.blocks[2].attn, student.model.blocks[2].attn
    torch.testing.assert_close(other.q_norm.weight, one.q_norm.weight[::2] * 2**0.5)
    torch.testing.assert_close(other.q_norm.bias, one.q_norm.bias[::2] * 2**0.5)
    assert torch.equal(other.k_norm.weight, one.k_norm.weight[::2])
    assert torch.equal(other.qkv.weight, one.qkv.weight[::2, ::2])


@pytest.mark.parametrize("variant", ["eva02_fused", "dinov3", "rope"])
def test_rotated_pairs_keep_their_partner_and_frequency(variant: str, build: Callable) -> None:
    """Source: timm's own angles. Heads of 16 -> 8: sine and cosine of the student's dimensions are those of the
    teacher's dimensions that they come from."""
    teacher, student = build(variant, 0).model, build(variant, 1, embed_dim=16).model
    half = teacher.blocks[0].attn.rotate_half
    rotary = type("Rotary", (), {"half": half, "by_axis": True})
    dims = list(dimensions(16, 8, rotary))
    assert dims == ([0, 2, 4, 6, 8, 10, 12, 14] if half else [0, 1, 4, 5, 8, 9, 12, 13])
    angles = (model.rope.get_embed([4, 4]).chunk(2, -1) for model in (teacher, student))
    for its, mine in zip(*angles, strict=True):
        torch.testing.assert_close(mine, its[:, dims])


def test_mixed_frequencies_go_with_their_pairs(build: Callable, initialise: Callable) -> None:
    """Pairs 0, 2, 4, 6 of eight, which are the dimensions (0, 1), (4, 5), (8, 9), (12, 13); heads 0 and 2 of four."""
    teacher, student = build("rope_mixed", 0, embed_dim=64, num_heads=4), build("rope_mixed", 1, embed_dim=16, depth=2)
    initialise("weight_selection", teacher, student)
    frequencies = teacher.model.rope.freqs[:, :2][:, :, [0, 2]][..., ::2]
    assert torch.equal(student.model.rope.freqs, frequencies)
    dims = [0, 1, 4, 5, 8, 9, 12, 13]
    rows = dims + [32 + dim for dim in dims]
    its, mine = teacher.model.blocks[0].attn.qkv.weight, student.model.blocks[0].attn.qkv.weight
    assert torch.equal(mine[16:32], taken(its, [64 + row for row in rows], [*range(0, 64, 4)]))


def test_positions_and_patches_of_other_sizes(build: Callable, initialise: Callable) -> None:
    """Source: timm's resampling. The class token's position stays apart."""
    teacher, student = build("vit", 0), build("vit", 1, img_size=48, patch_size=4)
    initialise("weight_selection", teacher, student)
    its, mine = teacher.model, student.model
    assert torch.equal(mine.pos_embed[:, 0], its.pos_embed[:, 0])
    wanted = resample_abs_pos_embed(its.pos_embed, [12, 12], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(mine.pos_embed, wanted)
    kernel = resample_patch_embed(its.patch_embed.proj.weight.float(), [4, 4])
    torch.testing.assert_close(mine.patch_embed.proj.weight, kernel.double())
    teacher, student = build("beit", 0), build("beit", 1, img_size=48)
    initialise("weight_selection", teacher, student)
    table = teacher.model.blocks[0].attn.relative_position_bias_table
    wanted = resize_rel_pos_bias_table(table, (6, 6), (11 * 11 + 3, 2), old_window_size=(4, 4))
    assert torch.equal(student.model.blocks[0].attn.relative_position_bias_table, wanted)


def test_tokens_go_by_their_name(build: Callable, initialise: Callable) -> None:
    """The first two of four registers; new ones, and a new distillation token, keep their own values."""
    teacher, student = build("vit_dinov2", 0), build("vit_dinov2", 1, reg_tokens=2)
    initialise("weight_selection", teacher, student)
    assert torch.equal(student.model.reg_token, teacher.model.reg_token[:, :2])
    teacher, student = build("vit_dinov2", 0, reg_tokens=1), build("vit_dinov2", 1)
    own = student.model.reg_token.detach().clone()
    report = initialise("weight_selection", teacher, student)
    assert torch.equal(student.model.reg_token[:, :1], teacher.model.reg_token)
    assert torch.equal(student.model.reg_token[:, 1:], own[:, 1:])
    assert [name for name, _ in report.kept] == ["token.register1", "token.register2", "token.register3"]
    teacher, student = build("vit", 0), build("vit_distilled", 1)
    own = student.model.dist_token.detach().clone()
    initialise("weight_selection", teacher, student)
    assert torch.equal(student.model.dist_token, own)
    assert torch.equal(student.model.pos_embed[:, 2:], teacher.model.pos_embed[:, 1:])
    assert torch.equal(student.model.pos_embed[:, 1], torch.zeros(1, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("variant", "its", "mine"),
    [
        ("vit", {}, {"no_embed_class": True}),
        ("vit", {"no_embed_class": True}, {}),
        ("vit", {"init_values": 0.3}, {}),
        ("vit", {}, {"init_values": 0.5}),
        ("vit", {"qkv_bias": False}, {}),
        ("eva_no_rope", {}, {"qkv_fused": False}),
        ("dinov3", {}, {"use_abs_pos_emb": True}),
        ("beit_shared", {"use_rel_pos_bias": False}, {"use_shared_rel_pos_bias": False}),
    ],
)
def test_what_one_model_keeps_elsewhere(
    variant: str, its: dict, mine: dict, build: Callable, initialise: Callable, features: Callable, images: Tensor
) -> None:
    """Closed form: the same function. Positions of prefix tokens in the token, scales of branches in their last layer,
    0 for missing biases and positions, 1 for missing scales, and q, k, v in one layer or three."""
    teacher, student = build(variant, 0, **its), build(variant, 1, **mine)
    report = initialise("weight_selection", teacher, student)
    torch.testing.assert_close(features(student.model, images), features(teacher.model, images))
    assert not report.kept and not report.left


@pytest.mark.parametrize(
    ("which", "blocks"), [("uniform", (0, 2, 3, 5)), ("first", (0, 1, 2, 3)), ("last", (2, 3, 4, 5))]
)
def test_layers_take_whole_blocks(which: str, blocks: tuple, build: Callable, initialise: Callable) -> None:
    """By hand, six blocks to four: 0, 5/3, 10/3 and 5 are 0, 2, 3 and 5."""
    teacher, student = build("rope_mixed", 0, depth=6), build("rope_mixed", 1, depth=4)
    assert initialise("layers", teacher, student, which=which).blocks == blocks
    for mine, its in enumerate(blocks):
        wanted = teacher.model.blocks[its].state_dict()
        assert all(torch.equal(t, wanted[name]) for name, t in student.model.blocks[mine].state_dict().items())
        assert torch.equal(student.model.rope.freqs[:, mine], teacher.model.rope.freqs[:, its])
    assert torch.equal(student.model.cls_token, teacher.model.cls_token)


def test_spread_of_one_and_two_blocks() -> None:
    assert spread(12, 1) == [11] and spread(12, 2) == [0, 11] and spread(12, 6) == [0, 2, 4, 7, 9, 11]


@pytest.mark.parametrize(
    ("init", "one", "other", "words"),
    [
        ("layers", ("vit", {}), ("vit", {"embed_dim": 16}), "width 16, not 32.*weight_selection"),
        ("layers", ("vit", {}), ("vit", {"depth": 4}), "depth 4 > 3"),
        ("weight_selection", ("vit", {}), ("vit", {"embed_dim": 64}), "width 64 > 32.*net2net"),
        ("weight_selection", ("vit", {}), ("vit", {"num_heads": 4}), "heads 4 > 2"),
        ("weight_selection", ("vit", {}), ("dinov3", {}), "teacher of the family 'vit', student of 'eva'"),
        ("weight_selection", ("swin", {}), ("swin", {}), "family 'swin' cannot be remapped"),
        ("subclone", ("resnet", {}), ("resnet", {}), "family 'resnet' cannot be remapped"),
        ("weight_selection", ("vit", {}), ("vit_swiglu", {}), "teacher plain, student gated"),
        ("weight_selection", ("eva_no_rope", {}), ("rope", {}), "no rotation, student RotaryEmbeddingCat"),
        ("subclone", ("vit", {}), ("vit", {"embed_dim": 16}), "needs training images"),
    ],
)
def test_models_that_do_not_fit(
    init: str, one: tuple, other: tuple, words: str, build: Callable, initialise: Callable
) -> None:
    teacher, student = build(one[0], 0, **one[1]), build(other[0], 1, **other[1])
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with pytest.raises(BackboneError, match=f"(?s){words}"):
        initialise(init, teacher, student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.model.state_dict().items())
