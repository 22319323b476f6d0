"""Net2Net keeps the function: the larger student's features and logits are the smaller teacher's. All in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from remap.errors import BackboneError
from remap.remapping.weights.net2net import in_turn, spread_out

DEEPER, UNITS = {"depth": 5}, {"mlp_ratio": 5.5}
WIDER = {"embed_dim": 64, "num_heads": 4}
LARGER_HEADS = {"embed_dim": 64, "num_heads": 2}


@pytest.mark.parametrize("growth", [DEEPER, WIDER, {**WIDER, **DEEPER}], ids=["deeper", "wider", "both"])
def test_every_family_keeps_its_function(
    growth: dict, sequence: str, build: Callable, initialise: Callable, features: Callable, images: Tensor
) -> None:
    """Source: the teacher. Wider students have every channel twice, in the teacher's order. Of five blocks the
    teacher's are 0, 5/3 and 10/3, rounded down."""
    teacher, student = build(sequence, 0), build(sequence, 1, **growth)
    report = initialise("net2net", teacher, student)
    wanted = features(teacher.model, images)
    torch.testing.assert_close(
        features(student.model, images), wanted.repeat(1, student.anatomy.width // 32), rtol=1e-9, atol=1e-9
    )
    assert report.blocks == ((0, 1, None, 2, None) if "depth" in growth else (0, 1, 2))
    assert not report.left


@pytest.mark.parametrize(
    ("variant", "growth"),
    [
        ("vit", UNITS),
        ("vit", LARGER_HEADS),
        ("vit_avg", LARGER_HEADS),
        ("vit_siglip", LARGER_HEADS),
        ("vit_siglip", UNITS),
        ("vit_swiglu", UNITS),
        ("vit_dinov2", {**WIDER, **UNITS, **DEEPER}),
        ("eva02_fused", UNITS),
        ("dinov3", {"embed_dim": 96, "num_heads": 6}),
        ("beit", LARGER_HEADS),
        ("beit_shared", {**WIDER, **UNITS}),
    ],
)
def test_units_and_head_dimensions(
    variant: str, growth: dict, build: Callable, initialise: Callable, features: Callable, images: Tensor
) -> None:
    """MLP units need no whole factor: each copy's outgoing weights are shared by its own count."""
    teacher, student = build(variant, 0), build(variant, 1, **growth)
    initialise("net2net", teacher, student)
    times = student.anatomy.width // 32
    wanted = features(teacher.model, images).repeat(1, times)
    torch.testing.assert_close(features(student.model, images), wanted, rtol=1e-9, atol=1e-9)


def test_heads_that_come_unequally_often(
    build: Callable, initialise: Callable, features: Callable, images: Tensor
) -> None:
    """Four heads of 8 -> six of 16: two heads come twice and halve their columns, every dimension comes twice."""
    teacher, student = build("vit", 0, num_heads=4), build("vit", 1, embed_dim=96, num_heads=6)
    initialise("net2net", teacher, student)
    wanted = features(teacher.model, images).repeat(1, 3)
    torch.testing.assert_close(features(student.model, images), wanted, rtol=1e-9, atol=1e-9)


def test_a_copied_classifier_gives_the_same_logits(build: Callable, initialise: Callable, images: Tensor) -> None:
    """Source: the teacher's logits. The classifier too shares its weights out over the copies."""
    teacher, student = build("vit", 0), build("vit", 1, **WIDER, **DEEPER, **UNITS)
    initialise("net2net", teacher, student)
    with torch.no_grad():
        student.model.head.weight.copy_(teacher.model.head.weight.repeat(1, 2) / 2)
        student.model.head.bias.copy_(teacher.model.head.bias)
        torch.testing.assert_close(student.model(images), teacher.model(images), rtol=1e-9, atol=1e-9)


def test_new_blocks_can_learn(build: Callable, initialise: Callable, images: Tensor) -> None:
    """Zero output layers, but no zero scale in front of them: their gradient is not zero."""
    teacher, student = build("vit_dinov2", 0), build("vit_dinov2", 1, depth=5)
    initialise("net2net", teacher, student)
    block = student.model.blocks[2]
    assert not block.attn.proj.weight.any() and not block.mlp.fc2.bias.any()
    student.model(images).square().sum().backward()
    assert block.attn.proj.weight.grad.abs().max() > 0 and block.mlp.fc2.weight.grad.abs().max() > 0


def test_noise_draws_copies_apart(build: Callable, initialise: Callable, features: Callable, images: Tensor) -> None:
    teacher, student = build("vit", 0), build("vit", 1, mlp_ratio=8.0)
    report = initialise("net2net", teacher, student, noise=0.01)
    fc1 = student.model.blocks[0].mlp.fc1.weight.detach()
    apart = (fc1[:128] - fc1[128:]).std() / fc1.std()
    assert 0.012 < apart < 0.016  # sqrt(2) of a hundredth
    assert any("noise" in note for note in report.notes)
    ratio = (features(student.model, images) - features(teacher.model, images)).abs().max()
    assert 0 < ratio < 1.0
    assert in_turn(3, 7) == (0, 1, 2, 0, 1, 2, 0) and spread_out(2, 5) == [0, None, 1, None, None]


@pytest.mark.parametrize(
    ("variant", "growth", "words"),
    [
        ("vit", {"embed_dim": 48}, "width 48, which is not a multiple of 32"),
        ("vit", {"depth": 2}, "depth 2 < 3"),
        ("vit", {"img_size": 48}, "grid 6x6, not 4x4"),
        ("vit_dinov2", {"reg_tokens": 6}, "number of prefix tokens 7, not 5"),
        ("rope", {"embed_dim": 64}, "other frequencies"),
        ("vit", {"act_layer": "relu"}, "differ in more than size"),
        ("vit", {"global_pool": "avg"}, "differ in more than size"),
    ],
)
def test_no_growth(variant: str, growth: dict, words: str, build: Callable, initialise: Callable) -> None:
    with pytest.raises(BackboneError, match=f"(?s){words}"):
        initialise("net2net", build(variant, 0), build(variant, 1, **growth))
