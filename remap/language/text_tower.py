"""The text transformer of CLIP, SigLIP and SigLIP 2, made of timm's blocks, so that methods read it like an image one.

Letters: N texts, L positions, D width, E dimensions that texts and images share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import get_act_layer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.reading import attention_block
from remap.backbones.families.vit import mlp_ratio


@dataclass(frozen=True)
class TextConfig:
    """The shape of a text transformer.

    Attributes:
        context: Positions L.
        hidden: Units of the MLP.
        out: Dimensions E of the projection; 0 where there is none.
        proj_bias: Whether the projection has a bias.
        act: Name of timm: gelu, gelu_tanh or quick_gelu.
        causal: Whether a token sees only those before it.
        pool: The token that is the text: the end token, the last or the first position.
        eos: Id of the end token, the first of which counts; None for the largest id of a text.
        layer_scale: Whether the branches end in a scale.
    """

    vocab: int
    context: int
    width: int
    depth: int
    heads: int
    hidden: int
    out: int
    proj_bias: bool = False
    act: str = "gelu"
    eps: float = 1e-5
    causal: bool = True
    pool: Literal["end", "last", "first"] = "end"
    eos: int | None = None
    layer_scale: bool = False


class TextTower(nn.Module):
    """Token ids (N, L) to features (N, E), not normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        norm: Any = partial(nn.LayerNorm, eps=config.eps)  # a class for timm
        self.token_embedding = nn.Embedding(config.vocab, width)
        self.positions = nn.Parameter(torch.empty(config.context, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                mlp_ratio(config.hidden, width),
                qkv_bias=True,
                init_values=1e-5 if config.layer_scale else None,
                act_layer=get_act_layer(config.act),
                norm_layer=norm,
            )
            for _ in range(config.depth)
        )
        self.norm = norm(width)
        self.proj = nn.Linear(width, config.out, bias=config.proj_bias) if config.out else nn.Identity()
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # Radford et al. 2021, their released code
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids_NL: Tensor) -> Tensor:
        """Return features (N, E); texts may be cut to the longest of them where attention is causal."""
        return self.encode(self.embed(ids_NL), self.ends(ids_NL))

    def embed(self, ids_NL: Tensor) -> Tensor:
        """Return the tokens' embeddings (N, L, D), without positions: what learned context takes the place of."""
        return self.token_embedding(ids_NL)

    def ends(self, ids_NL: Tensor) -> Tensor:
        """Return the position (N,) of the token that stands for each text."""
        if self.config.pool == "end":
            eos = self.config.eos
            return (ids_NL if eos is None else (ids_NL == eos).int()).argmax(dim=1)
        last = ids_NL.shape[1] - 1 if self.config.pool == "last" else 0
        return torch.full_like(ids_NL[:, 0], last)

    def encode(
        self, tokens_NLD: Tensor, ends_N: Tensor, before: Callable[[int, Tensor], Tensor] = lambda _index, x_NLD: x_NLD
    ) -> Tensor:
        """Return features (N, E) of embeddings (N, L, D), which get their positions here.

        Args:
            ends_N: Where each text's token is behind the last block.
            before: Makes the input of a block, by its index, of the output of the one before it.
        """
        x_NLD = tokens_NLD + self.positions[: tokens_NLD.shape[1]].to(tokens_NLD.dtype)
        for index, block in enumerate(self.blocks):
            x_NLD = block(before(index, x_NLD), is_causal=self.config.causal)
        x_NLD = self.norm(x_NLD)
        return self.proj(x_NLD[torch.arange(ends_N.shape[0], device=ends_N.device), ends_N])


def text_anatomy(tower: TextTower) -> Anatomy:
    """Return the anatomy of a text tower, with which methods attach to it as to an image tower.

    The first token stands for the prefix, so that prompts enter behind it; the others count as patches of one row.
    """
    grid = (1, tower.config.context - 1)
    blocks = tuple(
        attention_block(tower, f"blocks.{index}", width=tower.config.width, grid=grid, plain_scores=True)
        for index in range(tower.config.depth)
    )
    return Anatomy(
        family="vit",
        width=tower.config.width,
        depth=len(blocks),
        heads=blocks[-1].heads,
        head_dim=blocks[-1].head_dim,
        mlp_hidden=blocks[-1].mlp_hidden,
        image_size=(1, tower.config.context),
        patch_size=(1, 1),
        grid=grid,
        num_prefix_tokens=1,
        input_module="token_embedding",
        embedding_norms=(),
        final_norm="norm",
        classifier_heads=(),
        blocks=blocks,
    )
