"""Time of a training step of every tuning method: attached by remap, against the method written by hand.

Run: python benchmarks/methods.py [--methods lora,ssf|peft] [--precision fp32,bf16] [--repeats 15] [--batch 32]
    [--json FILE]
"""

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from peft.tuners.adalora import RankAllocator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import remap
from remap.backbones.anatomy import anatomy_of, set_fused_attention
from remap.backbones.families import FAMILIES
from remap.tuning import METHODS, config_of
from remap.tuning.base import Sample
from remap.tuning.layers import layers_of
from remap.tuning.parameter.peft_bridge.base import ADAPTER, PeftMethod
from remap.tuning.parameter.peft_rows import PeftEntry, PeftLayer

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": 10}
LR, TOTAL = 1e-3, 1_000_000  # the length of training, which some methods want to know
AGAINST_PEFT = "lora (peft)"


# Letters: B batch, T tokens, P patches, D width, H heads, h head width, p prompts, r bottleneck or rank.
class ByHand:
    """The frozen network as timm runs it. A method changes the places it is about, and nothing else.

    Args:
        model: A copy of the backbone; what the method trains of it is taken over from ``found``.
        found: All parameters and buffers of the network that remap tuned, by full name.
        trained: Names of those that train.
        config: The method's options.
    """

    def __init__(self, model: nn.Module, found: dict[str, Tensor], trained: list[str], config: object) -> None:
        self.model, self.found, self.config = model.requires_grad_(False), found, config
        self.own: list[nn.Parameter] = []
        parameters = dict(model.named_parameters())
        for name in trained:
            if name in parameters:
                parameters[name].requires_grad_(True).data.copy_(found[name])
        self.build()
        self.trained = [*(p for p in model.parameters() if p.requires_grad), *self.own]

    def build(self) -> None:
        """Take the method's own parameters over."""

    def take(self, name: str) -> nn.Parameter:
        return self.parameter(self.found[name])

    def parameter(self, value: Tensor) -> nn.Parameter:
        """A parameter of the method's own that starts at ``value``."""
        self.own.append(nn.Parameter(value.detach().clone()))
        return self.own[-1]

    def each(self, name: str) -> list[nn.Parameter]:
        """The parameter of that name in every block."""
        return [self.take(f"blocks.{index}.{name}") for index in range(len(self.model.blocks))]

    def linears(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.each(f"{name}.weight"), self.each(f"{name}.bias"), strict=True))

    def __call__(self, images: Tensor) -> Tensor:
        return self.model.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for index, block in enumerate(self.model.blocks):
            x = self.block(index, block, x)
        return self.model.norm(x)[:, 0]

    def embed(self, images: Tensor) -> Tensor:
        return self.model._pos_embed(self.model.patch_embed(images))

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + self.attention(index, block, block.norm1(x))
        return x + self.mlp(index, block, block.norm2(x))

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.attn.proj(attend(block.attn, *heads(block.attn, self.qkv(index, block.attn, n))))

    def qkv(self, index: int, attn: nn.Module, n: Tensor) -> Tensor:
        return attn.qkv(n)

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.mlp(n)

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int) -> None:
        pass


def heads(attn: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.reshape(*qkv.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def split(attn: nn.Module, x: Tensor) -> Tensor:
    """(B, T, D) to (B, H, T, h)."""
    return x.reshape(*x.shape[:2], attn.num_heads, attn.head_dim).transpose(1, 2)


def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, D), by the kernel that the backbone is set to."""
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = ((q * attn.scale) @ k.mT).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)


class Frozen(ByHand):
    """No graph below the classifier."""

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.features(images)
        return self.model.head(x)


class MLP(Frozen):
    def build(self) -> None:
        layers = [name for name in self.found if name.startswith("remap_mlp.linears") and name.endswith("weight")]
        self.layers = [
            [self.take(f"remap_mlp.{part}.{i}.{word}") for part in ("linears", "norms") for word in ("weight", "bias")]
            for i in range(len(layers))
        ]
        self.means = [torch.zeros_like(layer[2]) for layer in self.layers]
        self.variances = [torch.ones_like(layer[2]) for layer in self.layers]

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.features(images)
        for (w, b, scale, shift), mean, variance in zip(self.layers, self.means, self.variances, strict=True):
            x = F.batch_norm(F.relu(F.linear(x, w, b)), mean, variance, scale, shift, training=True)
        return self.model.head(x)


class Partial(ByHand):
    def features(self, images: Tensor) -> Tensor:
        *frozen, last = self.model.blocks
        with torch.no_grad():
            x = self.embed(images)
            for block in frozen:
                x = block(x)
        return self.model.norm(last(x))[:, 0]


class SideTune(ByHand):
    def build(self) -> None:
        self.alpha, self.proj = self.take("remap_sidetune.alpha"), self.take("remap_sidetune.proj.weight")
        self.side = timm.create_model(self.config.side, num_classes=0)
        prefix = "remap_sidetune.network."
        self.side.load_state_dict({k.removeprefix(prefix): v for k, v in self.found.items() if k.startswith(prefix)})
        self.own += self.side.to(self.alpha.device).train().parameters()

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.features(images)
        a = self.alpha.sigmoid()
        return self.model.head(a * x + (1 - a) * F.linear(self.side(images), self.proj))


class VPTShallow(ByHand):
    def build(self) -> None:
        self.prompts = self.take("remap_prompts.prompts")

    def embed(self, images: Tensor) -> Tensor:
        x = super().embed(images)
        return torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)


class VPTDeep(ByHand):
    def build(self) -> None:
        self.prompts = self.take("remap_prompts.prompts")

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        count = self.prompts.shape[1] if index > 0 else 0
        token, _, patches = x.split([1, count, x.shape[1] - 1 - count], 1)
        prompts = self.prompts[index].expand(len(x), -1, -1)
        return super().block(index, block, torch.cat([token, prompts, patches], 1))


class VP(ByHand):
    def build(self) -> None:
        self.rows, self.columns = self.take("remap_vp.rows"), self.take("remap_vp.columns")
        self.border = self.rows.shape[2] // 2
        self.inside = self.columns.new_zeros(1, 3, self.columns.shape[2], self.rows.shape[3] - 2 * self.border)

    def embed(self, images: Tensor) -> Tensor:
        (above, below), (left, right) = self.rows.split(self.border, 2), self.columns.split(self.border, 3)
        return super().embed(images + torch.cat([above, torch.cat([left, self.inside, right], 3), below], 2))


class E2VPT(VPTDeep):
    def build(self) -> None:
        super().build()
        self.key_values = self.each("attn.remap_key_values.key_values")

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        q, k, v = heads(block.attn, block.attn.qkv(n))
        more = self.key_values[index].expand(len(n), -1, -1, -1)
        return block.attn.proj(attend(block.attn, q, torch.cat([more, k], 2), torch.cat([more, v], 2)))


class VQT(ByHand):
    """The queries' own way through the blocks; the tokens' is without a graph."""

    def build(self) -> None:
        self.prompts, self.columns = self.take("remap_vqt.prompts"), self.take("head.remap_vqt.weight")

    def __call__(self, images: Tensor) -> Tensor:
        answers = []
        with torch.no_grad():
            x = self.embed(images)
        for block, prompts in zip(self.model.blocks, self.prompts, strict=True):
            attn = block.attn
            with torch.no_grad():
                q, k, v = heads(attn, attn.qkv(block.norm1(x)))
            z = prompts.expand(len(x), -1, -1)
            width = z.shape[-1]
            asked = F.linear(block.norm1(z), attn.qkv.weight[:width], attn.qkv.bias[:width])
            z = z + attn.proj(attend(attn, split(attn, asked), k, v))
            z = z + block.mlp(block.norm2(z))
            answers.append(F.normalize(z.flatten(1), dim=-1))
            with torch.no_grad():
                x = x + attn.proj(attend(attn, q, k, v))
                x = x + block.mlp(block.norm2(x))
        with torch.no_grad():
            pooled = F.normalize(self.model.norm(x)[:, 0], dim=-1)
        return self.model.head(pooled) + F.linear(torch.cat(answers, 1), self.columns)


class Houlsby(ByHand):
    def build(self) -> None:
        self.adapters = {
            word: (self.linears(f"remap_houlsby_{word}.down"), self.linears(f"remap_houlsby_{word}.up"))
            for word in ("attn", "mlp")
        }

    def adapter(self, word: str, index: int, y: Tensor) -> Tensor:
        down, up = self.adapters[word]
        return F.linear(F.gelu(F.linear(y, *down[index])), *up[index])

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        y = block.attn(block.norm1(x))
        x = x + y + self.adapter("attn", index, y)
        y = block.mlp(block.norm2(x))
        return x + y + self.adapter("mlp", index, y)


class Pfeiffer(ByHand):
    def build(self) -> None:
        self.down, self.up = self.linears("remap_pfeiffer.down"), self.linears("remap_pfeiffer.up")

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        y = block.mlp(n)
        return y + F.linear(F.gelu(F.linear(y, *self.down[index])), *self.up[index])


class AdapterPlus(ByHand):
    def build(self) -> None:
        self.down, self.up = self.linears("remap_adapter_plus.down"), self.linears("remap_adapter_plus.up")
        self.scale = self.each("remap_adapter_plus.scale")

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        y = block(x)
        return y + self.scale[index] * F.linear(F.gelu(F.linear(y, *self.down[index])), *self.up[index])


class AdaptFormer(ByHand):
    def build(self) -> None:
        self.down, self.up = self.linears("remap_adaptformer.down"), self.linears("remap_adaptformer.up")

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + block.attn(block.norm1(x))
        beside = F.linear(F.relu(F.linear(x, *self.down[index])), *self.up[index])
        return x + block.mlp(block.norm2(x)) + self.config.scale * beside


class Convpass(ByHand):
    def build(self) -> None:
        self.adapters = {
            word: [self.linears(f"remap_convpass_{word}.{part}") for part in ("down", "conv", "up")]
            for word in ("attn", "mlp")
        }

    def adapter(self, word: str, index: int, n: Tensor) -> Tensor:
        down, (weight, bias), up = (part[index] for part in self.adapters[word])
        hidden = quick_gelu(F.linear(n, *down))
        side = self.model.patch_embed.grid_size[0]
        patches = hidden[:, 1:].mT.reshape(len(n), -1, side, side)
        patches = F.conv2d(patches, weight, bias, padding=1).flatten(2).mT
        token = F.linear(hidden[:, :1], weight[:, :, 1, 1], bias)
        return self.config.scale * F.linear(quick_gelu(torch.cat([token, patches], 1)), *up)

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.attn(n) + self.adapter("attn", index, n)

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.mlp(n) + self.adapter("mlp", index, n)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class RepAdapter(ByHand):
    def build(self) -> None:
        self.adapters = {
            word: [self.linears(f"remap_repadapter_{word}.{part}") for part in ("down", "up")]
            for word in ("attn", "mlp")
        }

    def adapted(self, word: str, index: int, n: Tensor) -> Tensor:
        down, (weight, bias) = (part[index] for part in self.adapters[word])
        dense = torch.block_diag(*weight.chunk(self.config.groups))
        return n + self.config.scale * F.linear(F.linear(n, *down), dense, bias)

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.attn(self.adapted("attn", index, n))

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return block.mlp(self.adapted("mlp", index, n))


class LadderSideTuning(ByHand):
    def build(self) -> None:
        depth = len(self.model.blocks)
        self.downs = [self.linear(f"downs.{index}") for index in range(depth + 1)]
        words = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
        self.side = [{word: self.linear(f"blocks.{index}.{word}") for word in words} for index in range(depth)]
        self.up = self.linear("up")
        width = len(self.up[0][0])
        self.heads = max(1, width // self.model.blocks[0].attn.head_dim)

    def linear(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.take(f"remap_lst.{name}.weight"), self.take(f"remap_lst.{name}.bias")

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embed(images)
        side = F.linear(x, *self.downs[0])
        for block, down, own in zip(self.model.blocks, self.downs[1:], self.side, strict=True):
            with torch.no_grad():
                x = block(x)
            side = self.side_block(own, 0.5 * F.linear(x, *down) + 0.5 * side)
        pooled = side[:, 0]
        return self.model.head(F.linear(F.layer_norm(pooled, pooled.shape[-1:], eps=1e-6), *self.up))

    def side_block(self, own: dict[str, tuple], s: Tensor) -> Tensor:
        n = F.layer_norm(s, s.shape[-1:], *own["norm1"], eps=1e-6)
        q, k, v = F.linear(n, *own["qkv"]).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        s = s + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), *own["proj"])
        n = F.layer_norm(s, s.shape[-1:], *own["norm2"], eps=1e-6)
        return s + F.linear(F.gelu(F.linear(n, *own["fc1"])), *own["fc2"])


class DiffFit(ByHand):
    def build(self) -> None:
        self.gammas = list(
            zip(self.each("attn.proj.remap_diffit.gamma"), self.each("mlp.fc2.remap_diffit.gamma"), strict=True)
        )

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return self.gammas[index][0] * block.attn(n)

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        return self.gammas[index][1] * block.mlp(n)


class LoRA(ByHand):
    """Queries and values, each with an A and a B."""

    def build(self) -> None:
        self.factors = []
        for index in range(len(self.model.blocks)):
            name = f"blocks.{index}.attn.qkv.remap_lora"
            downs, ups = self.found[f"{name}.down"].chunk(2), self.found[f"{name}.up"]
            self.factors.append([self.parameter(value) for pair in zip(downs, ups, strict=True) for value in pair])

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        attn, (a_q, b_q, a_v, b_v) = block.attn, self.factors[index]
        q, k, v = attn.qkv(n).chunk(3, dim=-1)
        q = q + F.linear(F.linear(n, a_q), b_q)
        v = v + F.linear(F.linear(n, a_v), b_v)
        return attn.proj(attend(attn, *(split(attn, x) for x in (q, k, v))))


class FacT(ByHand):
    """Every layer's change is a product of two matrices, made anew in each step from the shared factors."""

    def build(self) -> None:
        prefix = f"remap_fact.width_{self.model.embed_dim}"
        self.down, self.up = self.take(f"{prefix}.down"), self.take(f"{prefix}.up")
        self.build_cores(prefix)

    def changed(self, layer: nn.Linear, first: int, x: Tensor) -> Tensor:
        """W x + b + V core U x, for each square of the weight."""
        width, count = self.down.shape[1], max(layer.in_features, layer.out_features) // self.down.shape[1]
        cores = self.cores(first, first + count)  # (count, r, r), transposed
        hidden = F.linear(x.unflatten(-1, (-1, width)), self.down)
        if layer.in_features > width:
            hidden = hidden.flatten(-2) @ cores.flatten(0, 1)
            return layer(x) + self.config.scale * (hidden @ self.up)
        change = hidden @ (cores @ self.up).transpose(0, 1).flatten(1)
        return layer(x) + self.config.scale * change.squeeze(-2)

    def qkv(self, index: int, attn: nn.Module, n: Tensor) -> Tensor:
        return self.changed(attn.qkv, 12 * index, n)

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        mixed = attend(block.attn, *heads(block.attn, self.qkv(index, block.attn, n)))
        return self.changed(block.attn.proj, 12 * index + 3, mixed)

    def mlp(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        hidden = F.gelu(self.changed(block.mlp.fc1, 12 * index + 4, n))
        return self.changed(block.mlp.fc2, 12 * index + 8, hidden)


class FacTTT(FacT):
    def build_cores(self, prefix: str) -> None:
        self.sigma = self.parameter(self.found[f"{prefix}.sigma"].mT)

    def cores(self, first: int, last: int) -> Tensor:
        return self.sigma[first:last]


class FacTTK(FacT):
    def build_cores(self, prefix: str) -> None:
        self.mix, self.core = self.take(f"{prefix}.mix"), self.parameter(self.found[f"{prefix}.core"].mT)

    def cores(self, first: int, last: int) -> Tensor:
        return torch.einsum("mk,kab->mab", self.mix[first:last], self.core)


class SSF(ByHand):
    def build(self) -> None:
        names = [name.removesuffix(".remap_ssf.gamma") for name in self.found if name.endswith(".remap_ssf.gamma")]
        self.affine = {
            name: (self.take(f"{name}.remap_ssf.gamma"), self.take(f"{name}.remap_ssf.beta")) for name in names
        }

    def on(self, name: str, x: Tensor) -> Tensor:
        gamma, beta = self.affine[name]
        return x * gamma + beta

    def features(self, images: Tensor) -> Tensor:
        patches = self.on("patch_embed.proj", self.model.patch_embed(images))
        x = self.model._pos_embed(patches)
        for index, block in enumerate(self.model.blocks):
            x = self.block(index, block, x)
        return self.on("norm", self.model.norm(x))[:, 0]

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        name, attn, mlp = f"blocks.{index}", block.attn, block.mlp
        n = self.on(f"{name}.norm1", block.norm1(x))
        mixed = attend(attn, *heads(attn, self.on(f"{name}.attn.qkv", attn.qkv(n))))
        x = x + self.on(f"{name}.attn.proj", attn.proj(mixed))
        n = self.on(f"{name}.norm2", block.norm2(x))
        hidden = F.gelu(self.on(f"{name}.mlp.fc1", mlp.fc1(n)))
        return x + self.on(f"{name}.mlp.fc2", mlp.fc2(hidden))


class Compacter(ByHand):
    def build(self) -> None:
        self.shared = self.take("remap_compacter.shared")
        self.layers = [
            [
                [self.take(f"remap_compacter.{part}.{site}.{word}") for word in ("left", "right", "bias")]
                for part in ("down", "up")
            ]
            for site in range(2 * len(self.model.blocks))
        ]

    def linear(self, layer: list[nn.Parameter], x: Tensor) -> Tensor:
        left, right, bias = layer
        weight = torch.einsum("nab,no,ni->aobi", self.shared, left, right).flatten(2).flatten(0, 1)
        return F.linear(x, weight, bias)

    def adapter(self, site: int, y: Tensor) -> Tensor:
        down, up = self.layers[site]
        return self.linear(up, F.gelu(self.linear(down, y)))

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        y = block.attn(block.norm1(x))
        x = x + y + self.adapter(2 * index, y)
        y = block.mlp(block.norm2(x))
        return x + y + self.adapter(2 * index + 1, y)


class KronA(ByHand):
    def build(self) -> None:
        self.factors = [
            list(zip(self.each(f"remap_krona_{word}.left"), self.each(f"remap_krona_{word}.right"), strict=True))
            for word in "qv"
        ]

    def product(self, word: int, index: int, n: Tensor) -> Tensor:
        left, right = self.factors[word][index]
        inner = n.unflatten(-1, (left.shape[1], -1)) @ (self.config.scale * right.T)
        return (left @ inner).flatten(-2)

    def attention(self, index: int, block: nn.Module, n: Tensor) -> Tensor:
        attn = block.attn
        q, k, v = attn.qkv(n).chunk(3, dim=-1)
        q, v = q + self.product(0, index, n), v + self.product(1, index, n)
        return attn.proj(attend(attn, *(split(attn, x) for x in (q, k, v))))


class GPS(ByHand):
    def build(self) -> None:
        self.changes = {
            name.removesuffix(".remap_gps.values"): (self.take(name), self.found[name[:-6] + "places"].long())
            for name in self.found
            if name.endswith(".remap_gps.values")
        }

    def weight(self, name: str, layer: nn.Module) -> Tensor:
        values, places = self.changes[name]
        return layer.weight.flatten(1).scatter_add(1, places, values).view_as(layer.weight)

    def linear(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(name, layer), layer.bias)

    def embed(self, images: Tensor) -> Tensor:
        conv = self.model.patch_embed.proj
        patches = F.conv2d(images, self.weight("patch_embed.proj", conv), conv.bias, conv.stride)
        return self.model._pos_embed(patches.flatten(2).mT)

    def block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        name, attn, mlp = f"blocks.{index}", block.attn, block.mlp
        qkv = self.linear(f"{name}.attn.qkv", attn.qkv, block.norm1(x))
        x = x + self.linear(f"{name}.attn.proj", attn.proj, attend(attn, *heads(attn, qkv)))
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", mlp.fc1, block.norm2(x)))
        return x + self.linear(f"{name}.mlp.fc2", mlp.fc2, hidden)


class BOFT(ByHand):
    """The rotations act on the frozen weight. (peft's has more than one factor only with a CUDA extension.)"""

    def build(self) -> None:
        self.blocks, self.scale = self.each("attn.qkv.remap_boft.blocks"), self.each("attn.qkv.remap_boft.scale")
        size, half = self.config.block_size, self.config.block_size // 2
        self.unit = torch.eye(size, device=self.scale[0].device)
        self.group = torch.eye(size * 2 ** (self.config.factors - 1), device=self.scale[0].device)
        order = torch.arange(self.model.embed_dim, device=self.scale[0].device)
        steps = [2**factor for factor in range(self.config.factors)]
        self.there = [order.unflatten(0, (-1, 2, step, half)).transpose(1, 2).flatten() for step in steps]
        self.back = [there.argsort() for there in self.there]

    def qkv(self, index: int, attn: nn.Module, n: Tensor) -> Tensor:
        skew = (self.blocks[index] - self.blocks[index].mT) / 2
        rotations = torch.linalg.solve(self.unit + skew, self.unit - skew, left=False)
        # The factors together mix the inputs of a group only.
        whole = self.group.repeat(1, n.shape[-1] // len(self.group))
        for rotation, there, back in reversed(list(zip(rotations, self.there, self.back, strict=True))):
            cut = whole[:, there].unflatten(1, (-1, len(self.unit)))
            whole = torch.einsum("gnb,nba->gna", cut, rotation).flatten(1)[:, back]
        parts = [matrix.unflatten(1, (-1, len(self.group))) for matrix in (attn.qkv.weight, whole)]
        weight = torch.einsum("onh,gnh->ong", *parts).flatten(1)
        return F.linear(n, weight * self.scale[index][:, None], attn.qkv.bias)


class Peft(ByHand):
    """Hugging Face peft on the same layers with the same options; ``config`` is peft's."""

    def build(self) -> None:
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        get_peft_model(self.model, self.config, adapter_name=ADAPTER)
        for name, p in self.model.named_parameters():
            if name in trainable:
                p.requires_grad_(True)
        with torch.no_grad():
            self.copy()
        self.model.train()

    def copy(self) -> None:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        missing = set()
        for name, value in self.found.items():
            at = ".".join(part for part in name.split(".") if not part.startswith("remap_"))
            if at != name:  # what all layers share belongs to each of them
                same = [tensor for other, tensor in tensors.items() if other == at or other.endswith(f".{at}")]
                same = same or self.unregistered(at)
                missing |= set() if same else {name}
                for tensor in same:
                    tensor.copy_(value)
        assert not missing, f"peft has no {sorted(missing)}"

    def unregistered(self, name: str) -> list[Tensor]:
        """Random places, which peft draws anew on loading and keeps in plain dicts of its layers."""
        layer, word, adapter = name.rsplit(".", 2)
        held = getattr(self.model.get_submodule(layer), word, {})
        return [held[adapter]] if isinstance(held, dict) and adapter in held else []

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)


class PeftAdaLoRA(Peft):
    """With the penalty and the dealing out of ranks that peft's ``AdaLoraModel`` does."""

    def build(self) -> None:
        super().build()
        self.config.total_step, self.config.tinit, self.config.tfinal = TOTAL, TOTAL // 10, TOTAL // 2
        self.allocator = RankAllocator(self.model, self.config, ADAPTER)
        self.adapters = [p for name, p in self.model.named_parameters() if "lora_A" in name or "lora_B" in name]

    def penalty(self) -> Tensor:
        total = 0
        for p in self.adapters:
            gram = p @ p.T if p.shape[0] < p.shape[1] else p.T @ p
            total = total + torch.norm(gram - torch.eye(len(gram), out=torch.empty_like(gram)))
        return self.config.orth_reg_weight * total / len(self.adapters)

    def after_step(self, step: int) -> None:
        self.allocator.update_and_allocate(self.model, step)


class PeftFromWeight(Peft):
    """PiSSA and OLoRA as LoRA: what the factors are at first is taken off the weight."""

    def copy(self) -> None:
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A"):
                words = ("b", "a", "first_b", "first_a")
                b, a, first_b, first_a = (self.found[f"{name}.{self.word}.{word}"] for word in words)
                module.lora_A[ADAPTER].weight.copy_(a)
                module.lora_B[ADAPTER].weight.copy_(b)
                module.base_layer.weight -= first_b @ first_a


class PeftPiSSA(PeftFromWeight):
    word = "remap_pissa"


class PeftOLoRA(PeftFromWeight):
    word = "remap_olora"


class PeftLoRA(Peft):
    """One A for queries, keys and values, as peft gives a fused layer; the same function while the keys' B is zero."""

    def copy(self) -> None:
        for index, block in enumerate(self.model.blocks):
            name, layer = f"blocks.{index}.attn.qkv.remap_lora", block.attn.qkv
            up = self.found[f"{name}.up"]
            layer.lora_A[ADAPTER].weight.copy_(self.found[f"{name}.down"].chunk(2)[0])
            layer.lora_B[ADAPTER].weight.copy_(torch.cat([up[0], torch.zeros_like(up[0]), up[1]]))


BY_HAND: dict[str, type[ByHand]] = {
    "full": ByHand,
    "linear": Frozen,
    "mlp": MLP,
    "partial": Partial,
    "sidetune": SideTune,
    "vpt_shallow": VPTShallow,
    "vpt_deep": VPTDeep,
    "vp": VP,
    "e2vpt": E2VPT,
    "vqt": VQT,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "adapter_plus": AdapterPlus,
    "adaptformer": AdaptFormer,
    "convpass": Convpass,
    "repadapter": RepAdapter,
    "lst": LadderSideTuning,
    "bitfit": ByHand,
    "norm": ByHand,
    "diffit": DiffFit,
    "lora": LoRA,
    "fact_tt": FacTTT,
    "fact_tk": FacTTK,
    "ssf": SSF,
    "compacter": Compacter,
    "krona": KronA,
    "gps": GPS,
    "boft": BOFT,
}
# Against peft's LoRA on the fused layer.
BY_LORA: dict[str, type[ByHand]] = {AGAINST_PEFT: PeftLoRA, "pissa": PeftPiSSA, "olora": PeftOLoRA}


class Step:
    """Forward, cross-entropy, backward and AdamW over what is trained."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        trained: list[nn.Parameter],
        penalty: Callable[[], Tensor | None],
        after: Callable[[int], None],
        precision: str,
    ) -> None:
        self.bf16 = precision == "bf16"
        self.forward, self.penalty, self.after, self.count = forward, penalty, after, 0
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        penalty = self.penalty()
        (loss if penalty is None else loss + penalty).backward()
        self.optimizer.step()
        self.after(self.count)
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        return loss.item()


def pair_of(name: str, precision: str, images: Tensor, labels: Tensor) -> tuple[Step, Step]:
    """The step of remap and that of the other side, on networks that give the same output."""
    method = "lora" if name == AGAINST_PEFT else name
    torch.manual_seed(0)
    model = VisionTransformer(**VIT).eval().to(images.device)
    nn.init.normal_(model.head.weight, std=0.1)
    set_fused_attention(model, anatomy_of(model), images.device.type != "cpu")
    plain = copy.deepcopy(model)
    # Dropout off: its masks would have to be drawn alike.
    options = dict.fromkeys({"dropout", "drop_path"} & config_of(method).model_fields.keys(), 0.0)
    attached = remap.attach(model, method, **options)
    if attached.wants_sample:
        attached.prepare(Sample(lambda: iter([(images, labels)]), VIT["num_classes"]))
    model.head.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # so that nothing hides behind a zero
        for tensor in trained.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
        if name == AGAINST_PEFT:
            for block in model.blocks:
                down_q, down_v = block.attn.qkv.remap_lora.down.chunk(2)
                down_v.copy_(down_q)
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {name: tensor.detach().clone() for name, tensor in found.items()}
    hand = _other_side(name, plain, found, list(trained), config_of(method)(**options))
    attached.train()
    with torch.no_grad():
        torch.testing.assert_close(model(images), hand(images), rtol=0.0, atol=1e-5)
    assert name == AGAINST_PEFT or sum(map(torch.numel, hand.trained)) == sum(map(torch.numel, trained.values()))
    after = lambda step: attached.after_step(step, TOTAL)  # noqa: E731
    return (
        Step(model, list(trained.values()), attached.penalty, after, precision),
        Step(hand, hand.trained, hand.penalty, hand.after_step, precision),
    )


def _other_side(name: str, plain: nn.Module, found: dict[str, Tensor], trained: list[str], config: object) -> ByHand:
    if name in BY_LORA:
        options = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=["qkv"])
        return BY_LORA[name](plain, found, trained, options)
    if name in BY_HAND:
        return BY_HAND[name](plain, found, trained, config)
    if name == "hira":  # written in remap, with peft's names
        return Peft(plain, found, trained, HiraConfig(r=config.rank, target_modules=["qkv"]))
    cls: type[PeftMethod] = METHODS.load(name)
    layers = layers_of(anatomy_of(plain), config.targets, cls.row.default_targets)
    linears = {layer.path: plain.get_submodule(layer.path) for layer in layers}
    options = cls(config).peft_config(
        {at.path: PeftLayer(at.words, linears[at.path].out_features, linears[at.path].in_features) for at in layers}
    )
    if name == "adalora":
        options.orth_reg_weight = config.orthogonality
        return PeftAdaLoRA(plain, found, trained, options)
    return Peft(plain, found, trained, options)


def against(name: str) -> str:
    return "by hand" if name in BY_HAND else "peft"


def measure(name: str, precision: str, repeats: int, images: Tensor, labels: Tensor) -> dict[str, object]:
    """Milliseconds of single steps of both sides, in turns; which goes first alternates."""
    steps, times = pair_of(name, precision, images, labels), ([], [])
    for _ in range(3):
        losses = [step(images, labels) for step in steps]
    apart = 1e-3 if precision == "fp32" else 5e-2  # bf16 has 8 bits, and the sides round at other operations
    same = name == AGAINST_PEFT or abs(losses[0] - losses[1]) < apart * losses[1]
    assert same, f"{name}: the losses part in training, {losses}"
    clock = time.process_time if images.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()  # of the model before, which is a cycle
    gc.disable()
    for repeat in range(repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            _wait(images.device)
            started = clock()
            steps[index](images, labels)
            _wait(images.device)
            times[index].append(1000 * (clock() - started))
    gc.enable()
    ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
    return {
        "method": name,
        "against": against(name),
        "precision": precision,
        "remap_ms": statistics.median(times[0]),
        "other_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "of_medians": statistics.median(times[0]) / statistics.median(times[1]),
        "ratios": ratios,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", help="names with commas, or peft for its own; by default those that are written here"
    )
    parser.add_argument("--precision", default="fp32", help="fp32, bf16, or both with a comma between")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    arguments = parser.parse_args()
    parts = FAMILIES.row("vit").parts
    rows = [row for row in METHODS if row.fits(parts)]
    against_peft = (*BY_LORA, "hira")
    names = [row.name for row in rows if row.name in BY_HAND or isinstance(row, PeftEntry) or row.name in against_peft]
    names.insert(names.index("lora") + 1, AGAINST_PEFT)
    if arguments.methods == "peft":
        names = [name for name in names if against(name) == "peft"]
    elif arguments.methods:
        names = [name.strip() for name in arguments.methods.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(arguments.batch, 3, 32, 32, device=device)
    labels = torch.randint(VIT["num_classes"], (arguments.batch,), device=device)
    print(
        f"width {VIT['embed_dim']}, {VIT['depth']} blocks, {(VIT['img_size'] // VIT['patch_size']) ** 2 + 1} tokens, "
        f"batch {arguments.batch}, device {device}, {torch.get_num_threads()} thread(s)\n\n"
        "| what | against | precision | remap | other side | ratio (range, pairs) |\n|---|---|---|---|---|---|",
        flush=True,
    )
    results, failed = [], []
    for name, precision in itertools.product(names, arguments.precision.split(",")):
        try:
            found = measure(name, precision, arguments.repeats, images, labels)
        except Exception as error:  # the other methods are worth their time
            failed.append(name)
            reason = f"failed: {type(error).__name__} {str(error).splitlines()[:1]}"
            print(f"| `{name}` | {against(name)} | {precision} | {reason} | | |", flush=True)
            continue
        ratios = found["ratios"]
        print(
            f"| `{name}` | {against(name)} | {precision} | {found['remap_ms']:.1f} ms | {found['other_ms']:.1f} ms | "
            f"{found['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)}) |",
            flush=True,
        )
        results.append(found)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
