"""What a Tap records, against timm's own forward pass."""

from typing import Any

import pytest
import timm
import torch
from fake_gpu import computing_on_gpu, move, on_gpu

from remap.backbones.anatomy import admit_tokens, anatomy_of, module_at
from remap.errors import BackboneError
from remap.remapping.signals import Attention, Needs, float32_region
from remap.remapping.tap import Tap


def shared_positions(anatomy: Any, extra_tokens: int = 0) -> list[int]:
    first = anatomy.num_prefix_tokens + extra_tokens
    return [0] * anatomy.has_class_token + list(range(first, first + anatomy.num_patches))


def cut_and_renormalised(full: torch.Tensor, keep: list[int]) -> torch.Tensor:
    cut = full[:, :, keep][..., keep]
    return cut / cut.sum(dim=-1, keepdim=True)


def hooks_of(network: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.model.modules())


def with_prompts(network: Any, count: int, first: int = 0) -> None:
    """Insert random tokens behind the prefix in front of block ``first``, and cut them behind the last block."""
    model, anatomy = network.model, network.anatomy
    admit_tokens(model, anatomy, count, first)
    prompts, at = torch.randn(1, count, anatomy.width), anatomy.num_prefix_tokens

    def insert(module: Any, args: tuple) -> tuple:
        x = args[0]
        return (torch.cat([x[:, :at], prompts.expand(len(x), -1, -1), x[:, at:]], dim=1), *args[1:])

    def cut(module: Any, args: tuple, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :at], x[:, at + count :]], dim=1)

    module_at(model, anatomy.blocks[first].block).register_forward_pre_hook(insert)
    module_at(model, anatomy.blocks[-1].block).register_forward_hook(cut)


@pytest.mark.parametrize("prompts", [0, 3])
def test_attention_is_timms_own_map_cut_and_renormalised(network: Any, maps_of_timm: Any, prompts: int) -> None:
    # Source: timm's unfused attention, caught at the input of its attention dropout.
    if prompts:
        with_prompts(network, prompts)
    full = maps_of_timm(network.model, network.anatomy, network.images)
    assert full[0].shape[-1] == network.anatomy.num_prefix_tokens + prompts + network.anatomy.num_patches
    signals = network.signals(Needs(attention=frozenset({0, 1})), extra_tokens=prompts)
    assert sorted(signals.attention) == [0, 1]
    keep = shared_positions(network.anatomy, prompts)
    for index, attention in signals.attention.items():
        torch.testing.assert_close(attention.map_BHSS(), cut_and_renormalised(full[index], keep), rtol=0.0, atol=1e-5)
        assert attention.grid == (3, 3) and attention.has_class_token == network.anatomy.has_class_token


def test_blocks_in_front_of_the_first_prompts_have_none(network: Any, maps_of_timm: Any) -> None:
    # Source: as above. In between, a loss may read blocks of both kinds.
    if getattr(network.model, "rel_pos_bias", None) is not None:
        # All its blocks share one bias, so that tokens enter all of them or none.
        with pytest.raises(BackboneError):
            with_prompts(network, 3, first=1)
        return
    with_prompts(network, 3, first=1)
    full = maps_of_timm(network.model, network.anatomy, network.images)
    assert full[1].shape[-1] == full[0].shape[-1] + 3
    with Tap(network.model, network.anatomy, Needs(attention=frozenset({0, 1})), 3, tokens_from=1) as tap:
        attention = tap(network.images).attention
    for index, prompts in ((0, 0), (1, 3)):
        expected = cut_and_renormalised(full[index], shared_positions(network.anatomy, prompts))
        torch.testing.assert_close(attention[index].map_BHSS(), expected, rtol=0.0, atol=1e-5)


def test_attention_over_all_tokens_is_timms_own_map(network: Any, maps_of_timm: Any) -> None:
    # Source: as above; here nothing is cut, so the recomputed queries and keys alone are compared.
    full = maps_of_timm(network.model, network.anatomy, network.images)
    with Tap(network.model, network.anatomy, Needs(attention=frozenset({0, 1}))) as tap:
        tap._shared = lambda x, extra, dim=-2: x  # type: ignore[method-assign]
        signals = tap(network.images)
    for index, attention in signals.attention.items():
        torch.testing.assert_close(attention.map_BHSS(), full[index], rtol=0.0, atol=1e-5)


def test_logits_and_pooled_features_are_timms(network: Any) -> None:
    # Source: the model's public forward and forward_head(pre_logits=True), without a tap.
    signals = network.signals(Needs(pooled=True))
    features = network.model.forward_features(network.images)
    torch.testing.assert_close(signals.logits_BC, network.model(network.images), rtol=0.0, atol=1e-5)
    assert signals.pooled_BD is not None
    expected = network.model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(signals.pooled_BD, expected, rtol=0.0, atol=1e-5)


def test_the_head_runs_once_and_pooled_features_are_what_it_is_given(build_network: Any) -> None:
    # Source: dropout in front of the head draws anew in every pass, so one pass gives one pair of both.
    network = build_network(drop_rate=0.5)
    network.model.train()
    signals = network.signals(Needs(pooled=True))
    head = network.model.head
    torch.testing.assert_close(head(signals.pooled_BD), signals.logits_BC, rtol=0.0, atol=1e-5)
    assert (signals.pooled_BD == 0).float().mean() > 0.2

    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    signals = network.signals(Needs(pooled=True))
    expected = torch.nn.functional.linear(signals.pooled_BD, head.weight, head.bias)
    torch.testing.assert_close(expected, signals.logits_BC, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_models_without_attention_over_the_image_say_so(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    anatomy = anatomy_of(model)
    with pytest.raises(BackboneError, match=f"(?s)'{anatomy.family}' cannot show attention.*--losses ce,kd"):
        Tap(model, anatomy, Needs(pooled=True, attention=frozenset({0})))
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    with torch.device("meta"):
        signals = Tap(model, anatomy, Needs(pooled=True))(torch.zeros(2, 3, *anatomy.image_size))
    assert signals.pooled_BD.shape == (2, anatomy.width) and signals.logits_BC.shape == (2, 1000)


def test_nothing_unasked_is_kept(network: Any) -> None:
    signals = network.signals(Needs())
    assert signals.pooled_BD is None and signals.attention == {}


def test_tap_leaves_fused_attention_and_output_alone(network: Any) -> None:
    blocks = [module_at(network.model, paths.attn) for paths in network.anatomy.blocks]
    before, logits = [block.fused_attn for block in blocks], network.model(network.images)
    signals = network.signals(Needs(pooled=True, attention=frozenset({0, 1})))
    assert [block.fused_attn for block in blocks] == before == [True, True]
    assert torch.equal(signals.logits_BC, logits)


@pytest.mark.parametrize("family", ["plain", "dinov3", "beit"])
def test_hooks_leave_with_close_and_after_an_exception(build_network: Any, family: str) -> None:
    network = build_network(family)
    needs = Needs(pooled=True, attention=frozenset({0, 1}))
    tap = Tap(network.model, network.anatomy, needs)
    assert hooks_of(network) > 2
    tap.close()
    tap.close()
    assert hooks_of(network) == 0
    with pytest.raises(ZeroDivisionError), Tap(network.model, network.anatomy, needs):
        assert hooks_of(network) > 2
        raise ZeroDivisionError
    assert hooks_of(network) == 0


def test_gradient_reaches_queries_and_keys_and_nothing_behind_them(network: Any) -> None:
    network.model.requires_grad_(True)
    signals = network.signals(Needs(attention=frozenset({1})))
    signals.attention[1].map_BHSS().square().sum().backward()
    for word, projection in network.anatomy.blocks[1].projections.items():
        gradient = module_at(network.model, projection.path).weight.grad
        reached = gradient is not None and bool(gradient[projection.rows].abs().sum() > 0)
        assert reached == (word in ("q", "k")), word


@pytest.mark.parametrize("family", ["plain", "distilled", "eva02_fused", "eva02_split", "dinov3", "beit_both"])
def test_gradient_checkpointing_changes_nothing_and_leaves_nothing(build_network: Any, family: str) -> None:
    # Source: the same gradient without checkpointing. The block runs twice then, and its hook fires twice.
    gradients = []
    for checkpointing in (False, True):
        network = build_network(family)
        network.model.requires_grad_(True).train().set_grad_checkpointing(checkpointing)
        with Tap(network.model, network.anatomy, Needs(attention=frozenset({1}))) as tap:
            tap(network.images).attention[1].map_BHSS().square().sum().backward()
            assert tap._scores == {} and tap._pooled == {}
        first = network.anatomy.blocks[0].projections["fc1"].path
        gradients.append(module_at(network.model, first).weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_nothing_is_kept_after_a_failed_pass(build_network: Any) -> None:
    network = build_network()
    with Tap(network.model, network.anatomy, Needs(attention=frozenset({0})), extra_tokens=1) as tap:
        with pytest.raises(BackboneError):
            tap(network.images)
        assert tap._scores == {} and tap._pooled == {}


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
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-5)


def test_needs_add_up() -> None:
    union = Needs(pooled=True, attention=frozenset({0})) | Needs(attention=frozenset({2}))
    assert union == Needs(pooled=True, attention=frozenset({0, 2}))


def test_signals_are_on_the_device_of_the_network(network: Any) -> None:
    """Source: PyTorch's fake tensors, which refuse operations between a GPU and the CPU."""
    move(network.model)
    network.images = on_gpu(network.images)
    every = frozenset({0, 1})
    with computing_on_gpu():
        signals = network.signals(Needs(pooled=True, attention=every, values=every, tokens=every))
        maps = [one.map_BHSS() for one in signals.attention.values()]
        tokens = [one.patches_BND for one in signals.tokens.values()]
        found = [signals.logits_BC, signals.pooled_BD, *maps, *tokens]
        assert len(maps) == 2 and {one.device.type for one in found if one is not None} == {"cuda"}
