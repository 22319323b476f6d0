"""Transformers with prompts written out again, in float64: sequence models, and window models image by image.

Sources of the formulas: Dosovitskiy et al. 2020 (2010.11929) equations 1 to 4, Su et al. 2021 (2104.09864) equation 34
for the rotation, Liu et al. 2021 (2103.14030) equations 3 and 4 for windows, Jia et al. 2022 (2203.12119) equations 4
to 7 for prompts, Han et al. 2023 (2307.13770) equation 5 for key-value prompts. Embedding, norms, MLPs, classifier and
position tables are the untouched timm model's.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sequence_model(
    base: nn.Module, images: Tensor, prompts: Mapping[int, Tensor], key_values: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Logits. ``prompts``: block to (p, D) or (B, p, D); what the block before made of its own is replaced there and
    goes on elsewhere, and before the first there are none. ``key_values``: block to (H, n, h)."""
    x = first_block_input(base, images)
    prefix, batch = base.num_prefix_tokens, len(x)
    p = next(iter(prompts.values())).shape[-2] if prompts else 0
    inside = 0
    for index, block in enumerate(base.blocks):
        if index in prompts:
            own = prompts[index].expand(batch, p, -1)
            x, inside = torch.cat([x[:, :prefix], own, x[:, prefix + inside :]], 1), p
        more = None if key_values is None else key_values[index]
        x = x + scaled(block, 1, attention(base, block.attn, block.norm1(x), prefix, inside, more))
        x = x + scaled(block, 2, block.mlp(block.norm2(x)))
    x = torch.cat([x[:, :prefix], x[:, prefix + inside :]], 1)
    return base.forward_head(base.norm(x))


def first_block_input(base: nn.Module, images: Tensor) -> Tensor:
    """What the untouched model gives to its first block."""
    seen: list[Tensor] = []
    handle = base.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    base(images)
    handle.remove()
    return seen[0]


def scaled(block: nn.Module, branch: int, x: Tensor) -> Tensor:
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(x)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x if gamma is None else x * gamma


def attention(base: nn.Module, attn: nn.Module, x: Tensor, prefix: int, p: int, more: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v for each head, with ``more`` keys and values of no position."""
    heads = attn.num_heads
    if attn.qkv is None:
        q, k, v = (getattr(attn, f"{name}_proj")(x) for name in "qkv")
    else:
        q, k, v = (x @ attn.qkv.weight.T).chunk(3, -1)
        biases = attn.qkv.bias.chunk(3) if attn.qkv.bias is not None else None
        if getattr(attn, "q_bias", None) is not None:
            biases = (attn.q_bias, attn.k_bias, attn.v_bias)
        if biases is not None:
            q, k, v = q + biases[0], k + biases[1], v + biases[2]
    rope = base.rope.get_embed() if getattr(base, "rope", None) is not None else None
    table = getattr(attn, "relative_position_bias_table", None)
    bias = None if table is None else roomy(attn._get_rel_pos_bias()[0], prefix, p)
    outputs = []
    for head, (q_h, k_h, v_h) in enumerate(
        zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    ):
        if hasattr(attn, "q_norm"):
            q_h, k_h = attn.q_norm(q_h), attn.k_norm(k_h)
        if rope is not None:
            q_h, k_h = (rotated(part, rope, prefix + p, attn.rotate_half) for part in (q_h, k_h))
        scores = q_h @ k_h.mT / q_h.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias[head]
        if more is not None:
            extra = more[head].expand(len(x), -1, -1)
            scores, v_h = torch.cat([scores, q_h @ extra.mT / q_h.shape[-1] ** 0.5], -1), torch.cat([v_h, extra], 1)
        weights = scores.exp()
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    mixed = torch.cat(outputs, -1)
    return attn.proj(attn.norm(mixed) if hasattr(attn, "norm") else mixed)


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Pairs of channels of the patches turned by their angles; the prefix stays."""
    sine, cosine = rope.to(x.dtype).chunk(2, -1)
    patches = x[:, prefix:]
    if half:
        a, b = patches.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.empty_like(patches)
        turned[..., ::2], turned[..., 1::2] = -patches[..., 1::2], patches[..., ::2]
    return torch.cat([x[:, :prefix], patches * cosine + turned * sine], 1)


def roomy(bias_HTT: Tensor, prefix: int, p: int) -> Tensor:
    """Zeros for p tokens behind the prefix."""
    heads, tokens, _ = bias_HTT.shape
    where = torch.cat([torch.arange(prefix), torch.arange(prefix + p, tokens + p)])
    wide = torch.zeros(heads, tokens + p, tokens + p, dtype=bias_HTT.dtype)
    wide[:, where[:, None], where[None]] = bias_HTT
    return wide


def window_model(base: nn.Module, images: Tensor, prompts: Mapping[int, Tensor]) -> Tensor:
    """Logits of a Swin transformer, one image after the other; ``prompts`` as for sequences, (p, C) each."""
    return torch.cat([_one_window_image(base, image[None], prompts) for image in images])


def _one_window_image(base: nn.Module, image: Tensor, prompts: Mapping[int, Tensor]) -> Tensor:
    x, index, carried = base.patch_embed(image), 0, None
    for number, stage in enumerate(base.layers):
        if number > 0:
            x = stage.downsample(x)
            if carried is not None:
                four = torch.cat([carried, carried, carried, carried], -1)
                carried = stage.downsample.reduction(stage.downsample.norm(four))
        for block in stage.blocks:
            carried = prompts.get(index, carried)
            x, carried = window_block(block, x, carried)
            index += 1
    return base.forward_head(base.norm(x))


def window_block(block: nn.Module, x: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    attn, (height, width), (down, right) = block.attn, block.window_size, block.shift_size
    p = 0 if prompts is None else len(prompts)
    shifted = torch.roll(block.norm1(x), (-down, -right), (1, 2))
    out, of_prompts, number = torch.zeros_like(shifted), [], 0
    bias = F.pad(attn._get_rel_pos_bias()[0], (p, 0, p, 0))
    for top in range(0, x.shape[1], height):
        for left in range(0, x.shape[2], width):
            window = shifted[0, top : top + height, left : left + width].reshape(height * width, -1)
            tokens = window if prompts is None else torch.cat([block.norm1(prompts), window])
            scores = bias if block.attn_mask is None else bias + F.pad(block.attn_mask[number], (p, 0, p, 0))
            q, k, v = (
                part.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for part in attn.qkv(tokens).chunk(3, -1)
            )
            mixed = (q @ k.mT / q.shape[-1] ** 0.5 + scores).softmax(-1) @ v
            done = attn.proj(mixed.transpose(0, 1).flatten(1))
            of_prompts.append(done[:p])
            out[0, top : top + height, left : left + width] = done[p:].reshape(height, width, -1)
            number += 1
    x = x + torch.roll(out, (down, right), (1, 2))
    x = x + block.mlp(block.norm2(x))
    if prompts is None:
        return x, None
    prompts = prompts + sum(of_prompts) / number
    return x, prompts + block.mlp(block.norm2(prompts))


@pytest.fixture
def formula() -> SimpleNamespace:
    """The networks above."""
    return SimpleNamespace(sequence=sequence_model, windows=window_model, first_block_input=first_block_input)


@pytest.fixture(scope="session")
def count_on_meta() -> Callable[..., int]:
    """A function from (timm name, method, options) to the number of trained parameters, head not counted."""
    import timm

    from remap.backbones.anatomy import anatomy_of
    from remap.tuning.attaching import attach_method

    models: dict[str, nn.Module] = {}

    def count(name: str, method: str, options: dict[str, object]) -> int:
        with torch.device("meta"):
            model = models.setdefault(name, timm.create_model(name, pretrained=False, num_classes=0))
            attached = attach_method(model, anatomy_of(model), method, options)
            parameters = dict(model.named_parameters())
            trained = sum(parameters[path].numel() for path in attached.trainable)
            attached.detach()
        return trained

    return count
