"""Attention of Hiera and TinyViT: what timm's own layers make of it, and the published formulas. All in float64."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import tiny_models
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of, module_at
from remap.errors import BackboneError
from remap.remapping.knowledge.attention.maps import AttentionTransfer
from remap.remapping.knowledge.attention.relations import Relations
from remap.remapping.objective import Pair
from remap.remapping.signals import Attention, Needs, Signals
from remap.remapping.tap import Tap

LAST = {"hiera": "blocks.5.attn", "tiny_vit": "stages.3.blocks.1.attn"}


def built(name: str, side: int) -> nn.Module:
    torch.manual_seed(0)
    sized = {"img_size": side} if name == "hiera" else {}
    model = tiny_models("methods")[name].build(3, **sized, pretrained_cfg_overlay={"input_size": (3, side, side)})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def signals(model: nn.Module, stage: int, side: int) -> tuple[Attention, Tensor, Tensor]:
    """Return the attention of a stage with its values, and what its last attention's proj and qkv layers take."""
    seen: dict[str, Tensor] = {}
    path = LAST[anatomy_of(model).family]
    for name in ("proj", "qkv"):
        layer = module_at(model, f"{path}.{name}")
        layer.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args[0]}))
    with Tap(model, anatomy_of(model), Needs(attention=frozenset({stage}), values=frozenset({stage}))) as tap:
        found: Signals = tap(torch.randn(2, 3, side, side, dtype=torch.float64))
    return found.attention[stage], seen["proj"], seen["qkv"]


def mixed(attention: Attention) -> Tensor:
    """Return softmax(q k^T + bias) v with the heads side by side, (B, N, H * h)."""
    bias = 0.0 if attention.bias_BHSS is None else attention.bias_BHSS
    map_BHNN = (attention.q_BHSh @ attention.k_BHSh.mT + bias).softmax(dim=-1)
    return torch.einsum("bhst,bhtd->bshd", map_BHNN, attention.v_BHSh).flatten(2)


@torch.no_grad()
def test_attention_is_what_timm_mixes() -> None:
    """Source: what timm gives its output layer; Hiera's order from its ``unroll``, applied to the positions."""
    attention, wanted, _ = signals(built("tiny_vit", 64), 3, 64)
    assert attention.grid == (2, 2) and attention.bias_BHSS is not None  # one window of 2 x 2
    torch.testing.assert_close(mixed(attention), wanted)

    model = built("hiera", 64)
    attention, wanted, _ = signals(model, 3, 64)
    assert attention.grid == (2, 2)
    rows_and_columns = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    order_N2 = model.unroll(rows_and_columns[None])[0, :4] // 8  # pooled three times, in the order of the network
    torch.testing.assert_close(mixed(attention)[:, order_N2[:, 0] * 2 + order_N2[:, 1]], wanted)


@torch.no_grad()
def test_padding_of_a_window_is_cut() -> None:
    """Wu et al. 2022 (arXiv 2207.10666): softmax(q k^T / sqrt(h) + b(|dy|, |dx|)) of the patches alone.

    The window of 2 x 2 has one patch of the image; of a 3 x 3 window 2 x 2 are.
    """
    model = built("tiny_vit", 32)
    attention, _, _ = signals(model, 3, 32)
    assert attention.grid == (1, 1) and torch.equal(attention.map_BHSS(), torch.ones(2, 2, 1, 1))

    torch.manual_seed(1)
    model = tiny_models("methods")["tiny_vit"].build(3, window_sizes=(3,) * 4).double().eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    layer = module_at(model, LAST["tiny_vit"])
    layer.attention_biases.data.normal_()
    attention, _, x_B9D = signals(model, 3, 64)
    inside = [0, 1, 3, 4]
    q, k, _ = layer.qkv(x_B9D)[:, inside].unflatten(-1, (2, 3, 16)).permute(3, 0, 2, 1, 4)
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    bias = torch.stack(
        [torch.stack([layer.attention_biases[:, abs(a - c) * 3 + abs(b - d)] for c, d in cells], -1) for a, b in cells],
        dim=1,
    )
    wanted = (q @ k.mT / 4.0 + bias).softmax(dim=-1)
    torch.testing.assert_close(attention.map_BHSS(), wanted.float())


@pytest.mark.parametrize(
    ("name", "side", "stage", "why"),
    [
        ("tiny_vit", 64, 0, "convolutions"),
        ("tiny_vit", 64, 2, "2 x 2 windows divide its 4 x 4 patches"),
        ("hiera", 64, 1, "mask unit"),
    ],
)
def test_a_stage_without_it_says_why(name: str, side: int, stage: int, why: str) -> None:
    model = built(name, side)
    with pytest.raises(BackboneError, match=f"no attention over the whole image: .*{why}"):
        Tap(model, anatomy_of(model), Needs(attention=frozenset({stage})))


def test_a_student_is_compared_on_its_last_grid() -> None:
    student = anatomy_of(built("hiera", 64))
    pair = Pair(student, student, 3)
    assert AttentionTransfer(pair, AttentionTransfer.Config()).blocks == ((3, 3),)
    with pytest.raises(BackboneError, match="grid of the student's last stage"):
        AttentionTransfer(pair, AttentionTransfer.Config(layers=((2, 3),)))


def test_relation_heads_divide_the_widths_of_both() -> None:
    """6 heads of 8 channels and 5 of 8: the divisors of 48 and 40 up to the teacher's 6 heads end with 4."""
    sizes = {"embed_dims": (16, 16, 32, 48), "num_heads": (1, 1, 2, 6)}
    teacher = anatomy_of(tiny_models("methods")["tiny_vit"].build(3, **sizes))
    student = anatomy_of(VisionTransformer(img_size=64, patch_size=32, embed_dim=40, depth=1, num_heads=5))
    assert Relations(Pair(student, teacher, 3), Relations.Config()).heads == 4
    with pytest.raises(BackboneError, match="must divide the attention widths of both"):
        Relations(Pair(student, teacher, 3), Relations.Config(relation_heads=5))


@pytest.mark.parametrize("name", ["hiera", "tiny_vit"])
@torch.no_grad()
def test_the_logits_do_not_depend_on_the_stage_that_is_read(name: str) -> None:
    model, images = built(name, 64), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with Tap(model, anatomy_of(model), Needs(tokens=frozenset({1}), pooled=True)) as tap:
        found = tap(images)
    torch.testing.assert_close(found.logits_BC, model(images))
    assert found.tokens[1].grid == anatomy_of(model).blocks[1].grid
