"""What a Tap records, against timm's own forward pass."""

from typing import Any

import pytest
import torch

from remap.backbones.anatomy import module_at
from remap.errors import BackboneError
from remap.remapping.signals import Attention, Needs, Tap, float32_region
from remap.tuning import METHODS


def shared_positions(anatomy: Any, extra_tokens: int = 0) -> list[int]:
    first = anatomy.num_prefix_tokens + extra_tokens
    return [0] * anatomy.has_class_token + list(range(first, first + anatomy.num_patches))


def cut_and_renormalised(full: torch.Tensor, keep: list[int]) -> torch.Tensor:
    cut = full[:, :, keep][..., keep]
    return cut / cut.sum(dim=-1, keepdim=True)


def hooks_of(network: Any) -> int:
    return sum(len(module._forward_hooks) for module in network.model.modules())


def test_attention_is_timms_own_map_cut_and_renormalised(network: Any, maps_of_timm: Any) -> None:
    # Source: timm's unfused attention, caught at the input of its attention dropout.
    full = maps_of_timm(network.model, network.anatomy, network.images)
    signals = network.signals(Needs(attention=frozenset({0, 1})))
    assert sorted(signals.attention) == [0, 1]
    keep = shared_positions(network.anatomy)
    for index, attention in signals.attention.items():
        torch.testing.assert_close(attention.map_BHSS(), cut_and_renormalised(full[index], keep), rtol=0.0, atol=1e-6)
        assert attention.grid == (3, 3) and attention.has_class_token == network.anatomy.has_class_token


def test_attention_over_all_tokens_is_timms_own_map(network: Any, maps_of_timm: Any) -> None:
    # Source: as above; here nothing is cut, so the recomputed queries and keys alone are compared.
    full = maps_of_timm(network.model, network.anatomy, network.images)
    with Tap(network.model, network.anatomy, Needs(attention=frozenset({0, 1}))) as tap:
        tap._shared = lambda x_BHTh: x_BHTh  # type: ignore[method-assign]
        signals = tap(network.images)
    for index, attention in signals.attention.items():
        torch.testing.assert_close(attention.map_BHSS(), full[index], rtol=0.0, atol=1e-6)


def test_logits_and_pooled_features_are_timms(network: Any) -> None:
    # Source: the model's public forward and forward_head(pre_logits=True), without a tap.
    signals = network.signals(Needs(pooled=True))
    features = network.model.forward_features(network.images)
    torch.testing.assert_close(signals.logits_BC, network.model(network.images), rtol=0.0, atol=1e-6)
    assert signals.pooled_BD is not None
    expected = network.model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(signals.pooled_BD, expected, rtol=0.0, atol=1e-6)


def test_nothing_unasked_is_kept(network: Any) -> None:
    signals = network.signals(Needs())
    assert signals.pooled_BD is None and signals.attention == {}


def test_tap_leaves_fused_attention_and_output_alone(network: Any) -> None:
    blocks = [module_at(network.model, paths.attn) for paths in network.anatomy.blocks]
    before, logits = [block.fused_attn for block in blocks], network.model(network.images)
    signals = network.signals(Needs(pooled=True, attention=frozenset({0, 1})))
    assert [block.fused_attn for block in blocks] == before == [True, True]
    assert torch.equal(signals.logits_BC, logits)


def test_hooks_leave_with_close_and_after_an_exception(build_network: Any) -> None:
    network = build_network()
    needs = Needs(attention=frozenset({0, 1}))
    tap = Tap(network.model, network.anatomy, needs)
    assert hooks_of(network) == 2
    tap.close()
    tap.close()
    assert hooks_of(network) == 0
    with pytest.raises(ZeroDivisionError), Tap(network.model, network.anatomy, needs):
        assert hooks_of(network) == 2
        raise ZeroDivisionError
    assert hooks_of(network) == 0


def test_gradient_reaches_the_qkv_weights(build_network: Any) -> None:
    network = build_network("layerscale_registers")
    network.model.requires_grad_(True)
    signals = network.signals(Needs(attention=frozenset({1})))
    signals.attention[1].map_BHSS().square().sum().backward()
    weight = module_at(network.model, network.anatomy.blocks[1].qkv).weight
    third = network.anatomy.width
    assert weight.grad[: 2 * third].abs().sum() > 0
    assert weight.grad[2 * third :].abs().sum() == 0  # values have no part in the map


def test_gradient_checkpointing_changes_nothing_and_leaves_nothing(build_network: Any) -> None:
    # Source: the same gradient without checkpointing. The block runs twice then, and its hook fires twice.
    gradients = []
    for checkpointing in (False, True):
        network = build_network()
        network.model.requires_grad_(True).train().set_grad_checkpointing(checkpointing)
        with Tap(network.model, network.anatomy, Needs(attention=frozenset({1}))) as tap:
            tap(network.images).attention[1].map_BHSS().square().sum().backward()
            assert tap._qkv == {}
        gradients.append(network.model.patch_embed.proj.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_nothing_is_kept_after_a_failed_pass(build_network: Any) -> None:
    network = build_network()
    with Tap(network.model, network.anatomy, Needs(attention=frozenset({0})), extra_tokens=1) as tap:
        with pytest.raises(BackboneError):
            tap(network.images)
        assert tap._qkv == {}


@pytest.mark.parametrize("family", ["plain", "layerscale_registers", "distilled", "no_class"])
def test_prompts_are_cut(family: str, build_network: Any, maps_of_timm: Any) -> None:
    # Source: timm's own maps of the prompted network over all tokens, prompts included.
    network = build_network(family)
    kind = METHODS.load("vpt_deep")
    attached = kind(kind.Config(num_prompts=4)).attach(network.model, network.anatomy)
    network.model.eval()
    with torch.no_grad():
        for parameter_name in attached.trainable:
            network.model.get_parameter(parameter_name).normal_()
    full = maps_of_timm(network.model, network.anatomy, network.images)
    tokens = network.anatomy.num_prefix_tokens + 4 + network.anatomy.num_patches
    assert attached.extra_tokens == 4 and full[1].shape[-1] == tokens
    signals = network.signals(Needs(attention=frozenset({0, 1})), extra_tokens=attached.extra_tokens)
    keep = shared_positions(network.anatomy, 4)
    for index, attention in signals.attention.items():
        expected = cut_and_renormalised(full[index], keep)
        torch.testing.assert_close(attention.map_BHSS(), expected, rtol=0.0, atol=1e-6)


def test_unexpected_tokens_are_an_error(build_network: Any) -> None:
    network = build_network("layerscale_registers")
    with pytest.raises(BackboneError, match="13 tokens in block 1"):
        network.signals(Needs(attention=frozenset({1})), extra_tokens=2)


def test_map_is_float32_under_autocast() -> None:
    # Source: the same queries and keys in float64. bfloat16 scores would be off by about 1e-2.
    q, k = 3 * torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (q @ k.mT).dtype == torch.bfloat16  # what the map has to guard against
        with float32_region(q):
            assert (q @ k.mT).dtype == torch.float32
        found = Attention(q, k, has_class_token=True, grid=(2, 2)).map_BHSS()
    assert found.dtype == torch.float32
    expected = (q.double() @ k.double().mT).softmax(dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-6)


def test_needs_add_up() -> None:
    union = Needs(pooled=True, attention=frozenset({0})) | Needs(attention=frozenset({2}))
    assert union == Needs(pooled=True, attention=frozenset({0, 2}))
