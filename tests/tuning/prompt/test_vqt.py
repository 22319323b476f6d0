"""VQT against another way to compute it, in float64 on whole tiny models.

Source: Tu et al. 2023 (2212.03220) equations 5 to 8. The independent computation runs timm's own untouched blocks on
the sequence with the queries in it and a mask that lets nobody look at them, where remap computes the queries apart.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remap.errors import BackboneError
from remap.tuning.attached import Attached

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]

PREFIX = {"dinov2_registers": 5, "deit_distilled": 2, "siglip": 0, "dinov3": 5}
VARIANTS = (
    *("plain", "dinov2_registers", "deit_distilled", "siglip", "clip", "avg_pool"),
    *("eva02", "eva02_separate", "dinov3", "beit"),
)


def answers(
    base: nn.Module, prompts_LpD: Tensor, images: Tensor, prefix: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs (B, p, D) of the queries of all blocks, and what the classifiers of the untouched model are given."""
    calls: list[tuple[nn.Module, Tensor, dict[str, Any], Tensor]] = []
    pooled: dict[str, Tensor] = {}

    def seen(block: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        calls.append((block, args[0], kwargs, output))

    handles = [block.register_forward_hook(seen, with_kwargs=True) for block in base.blocks]
    for name in ("head", "head_dist"):
        if hasattr(base, name):
            keep = lambda module, args, name=name: pooled.update({name: args[0]})  # noqa: E731
            handles.append(getattr(base, name).register_forward_pre_hook(keep))
    base(images)
    for handle in handles:
        handle.remove()
    found = []
    for index, (block, x, kwargs, output) in enumerate(calls):
        own = prompts_LpD[index].expand(len(x), -1, -1)
        out = _masked(block, torch.cat([x[:, :prefix], own, x[:, prefix:]], 1), prefix, own.shape[1], kwargs)
        patches = prefix + own.shape[1]
        assert torch.allclose(torch.cat([out[:, :prefix], out[:, patches:]], 1), output), "tokens stay what they are"
        found.append(out[:, prefix:patches])
    return found, pooled


def _masked(block: nn.Module, x: Tensor, prefix: int, count: int, kwargs: dict[str, Any]) -> Tensor:
    """The block on a sequence with queries after the prefix that nobody attends to."""
    may_be_seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    may_be_seen[:, prefix : prefix + count] = False
    attention = block.attn
    if hasattr(attention, "_get_rel_pos_bias"):
        own = attention._get_rel_pos_bias()
        bias = torch.zeros(1, own.shape[1], x.shape[1], x.shape[1], dtype=x.dtype)
        places = torch.tensor([i for i in range(x.shape[1]) if may_be_seen[0, i]])
        bias[..., places[:, None], places] = own
        attention._get_rel_pos_bias = lambda: bias.masked_fill(~may_be_seen, float("-inf"))
        out = block(x, **kwargs)
        del attention._get_rel_pos_bias
        return out
    if hasattr(attention, "num_prefix_tokens"):  # rotary: tokens of the prefix are not turned
        attention.num_prefix_tokens += count
    out = block(x, **{**kwargs, "attn_mask": may_be_seen})
    if hasattr(attention, "num_prefix_tokens"):
        attention.num_prefix_tokens -= count
    return out


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_model_equals_masked_attention(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str, num_prompts: int
) -> None:
    attached = attach("vqt", build(variant).double(), num_prompts=num_prompts)
    tools.shake(attached)
    w, base, images = attached.model.state_dict(), build(variant).double(), tools.images().double()
    found, pooled = answers(base, w["remap_vqt.prompts"], images, PREFIX.get(variant, 1))
    queries = torch.cat([unit(answer.flatten(1)) for answer in found], 1)
    logits = [
        unit(pooled[name]) @ w[f"{name}.weight"].T + w[f"{name}.bias"] + queries @ w[f"{name}.remap_vqt.weight"].T
        for name in pooled
    ]
    assert torch.allclose(attached.model(images), sum(logits) / len(logits), rtol=0, atol=1e-10)


def test_the_columns_for_the_queries_belong_to_the_head(build: Build, attach: Attach) -> None:
    attached = attach("vqt", build("deit_distilled"), num_prompts=4)
    assert attached.trainable == ("remap_vqt.prompts",)
    names = [name for name, _ in attached.model.named_parameters() if attached.anatomy.is_head(name)]
    assert {"head.remap_vqt.weight", "head_dist.remap_vqt.weight"} <= set(names)
    assert attached.model.head.remap_vqt.weight.shape == (5, 3 * 4 * 32)
    assert attached.model.head.remap_vqt.weight.abs().max() > 0, "zeros would leave the queries without a gradient"


def test_dropout_acts_on_the_queries_alone(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """In training the answers change with it, and without it they are those of eval: the blocks drop nothing."""
    attached = attach("vqt", build("clip"), dropout=0.5)
    expected = attached.model(tools.images())
    attached.train()
    attached.set_sample_keys(torch.tensor([1, 2]))
    assert not torch.allclose(attached.model(tools.images()), expected, atol=1e-4)
    for module in attached.model.remap_vqt.dropouts:
        module.p = 0.0
    assert torch.equal(attached.model(tools.images()), expected), "nothing else is random"


def test_features_that_were_not_read_are_an_error(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    attached = attach("vqt", build("plain"))
    features = attached.model.forward_features(tools.images())
    assert attached.model.forward_head(features).shape == (2, 5)
    with pytest.raises(BackboneError, match="have not read"):
        attached.model.forward_head(features)
