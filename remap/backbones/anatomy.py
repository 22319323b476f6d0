"""What a backbone instance is made of. The only file that spells timm's attribute names.

Letters: B batch, N patch tokens, P prefix tokens (class, distillation, register), D width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from remap.errors import BackboneError


@dataclass(frozen=True)
class BlockPaths:
    """Dotted module paths of one transformer block, relative to the model.

    ``mlp_branch_end`` is the last module of the MLP branch (after LayerScale and drop-path), whose output is
    added to the residual stream; ``attn_branch_end`` likewise for the attention branch.
    """

    block: str
    norm1: str
    attn: str
    qkv: str
    q_norm: str
    k_norm: str
    proj: str
    attn_branch_end: str
    norm2: str
    mlp: str
    fc1: str
    fc2: str
    mlp_branch_end: str


@dataclass(frozen=True)
class Anatomy:
    """Shape and parts of one backbone.

    Sizes are in pixels for ``image_size`` and ``patch_size`` (height, width), in tokens for ``grid``.
    ``num_prefix_tokens`` counts class, distillation and register tokens, which stand in front of the patches;
    the class token, where there is one, is token 0.
    ``block_input_norm`` names the module between the embedding and block 0 (an Identity in most models).
    """

    family: str
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_hidden: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool
    patch_embed: str
    block_input_norm: str
    final_norm: str
    heads_of_classifier: tuple[str, ...]
    blocks: tuple[BlockPaths, ...]

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def is_head(self, parameter: str) -> bool:
        """Whether a parameter belongs to the classifier."""
        return parameter.startswith(tuple(f"{path}." for path in self.heads_of_classifier))


def anatomy_of(model: nn.Module) -> Anatomy:
    """Read the anatomy of a timm model.

    Raises:
        BackboneError: The family is not supported, with the names of the parts that are missing.
    """
    for is_family, read in _READERS:
        if is_family(model):
            return read(model)
    missing = [name for name in _VIT_PARTS if not hasattr(model, name)]
    raise BackboneError(
        f"{type(model).__name__} is not a backbone that remap can read",
        given=f"it lacks {', '.join(missing)}" if missing else f"blocks of type {type(model.blocks[0]).__name__}",
        allowed="plain vision transformers of timm (vit_*, deit*, *_dinov2, CLIP and SigLIP towers)",
        do="`remap models` lists names that work",
    )


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The sub-module at a dotted path of the anatomy."""
    return model.get_submodule(path)


def classifier_parameters(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """Parameters of the classifier head(s) by full name."""
    return {name: p for name, p in model.named_parameters() if anatomy.is_head(name)}


def set_fused_attention(model: nn.Module, anatomy: Anatomy, enabled: bool) -> None:
    """Choose between PyTorch's fused attention kernel and the explicit one; the result is the same function."""
    for block in anatomy.blocks:
        module_at(model, block.attn).fused_attn = enabled


def queries_and_keys(model: nn.Module, block: BlockPaths, qkv_output: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys that attention of ``block`` uses, from the output of its qkv layer.

    Args:
        qkv_output: (B, T, 3*D), T all tokens of the sequence.

    Returns:
        Two tensors (B, H, T, D/H) after query/key norms; the query is already scaled, so that
        ``softmax(q @ k.mT)`` is the attention map.
    """
    attention = module_at(model, block.attn)
    batch, tokens, _ = qkv_output.shape
    split = qkv_output.reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q = module_at(model, block.q_norm)(split[0])
    k = module_at(model, block.k_norm)(split[1])
    return q * attention.scale, k


_VIT_PARTS = ("patch_embed", "blocks", "norm", "head", "num_prefix_tokens", "forward_features", "forward_head")
_BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "head_dim", "scale", "fused_attn")


def _is_plain_vit(model: nn.Module) -> bool:
    if not all(hasattr(model, name) for name in _VIT_PARTS) or len(model.blocks) == 0:
        return False
    # Rotary and relative-position models (Eva, BEiT) have other block parts or their own attention class.
    return (
        all(
            all(hasattr(block, name) for name in _BLOCK_PARTS)
            and all(hasattr(block.attn, name) for name in _ATTENTION_PARTS)
            and not hasattr(block.attn, "rope")
            and hasattr(block.mlp, "fc1")
            and hasattr(block.mlp, "fc2")
            and getattr(block.attn, "gate", None) is None
            for block in model.blocks
        )
        and getattr(model, "rope", None) is None
    )


def _read_plain_vit(model: nn.Module) -> Anatomy:
    first = model.blocks[0]
    grid = tuple(model.patch_embed.grid_size)
    patch = tuple(model.patch_embed.patch_size)
    distilled = hasattr(model, "dist_token")
    norm_is_after_pool = isinstance(model.norm, nn.Identity) and hasattr(model, "fc_norm")
    return Anatomy(
        family="vit",
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=first.attn.num_heads,
        head_dim=first.attn.head_dim,
        mlp_hidden=first.mlp.fc1.out_features,
        image_size=tuple(model.patch_embed.img_size),
        patch_size=patch,
        grid=grid,
        num_prefix_tokens=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        patch_embed="patch_embed",
        block_input_norm="norm_pre",
        final_norm="fc_norm" if norm_is_after_pool else "norm",
        heads_of_classifier=("head", "head_dist") if distilled else ("head",),
        blocks=tuple(_plain_block(index) for index in range(len(model.blocks))),
    )


def _plain_block(index: int) -> BlockPaths:
    block = f"blocks.{index}"
    return BlockPaths(
        block=block,
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        qkv=f"{block}.attn.qkv",
        q_norm=f"{block}.attn.q_norm",
        k_norm=f"{block}.attn.k_norm",
        proj=f"{block}.attn.proj",
        attn_branch_end=f"{block}.drop_path1",
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        fc1=f"{block}.mlp.fc1",
        fc2=f"{block}.mlp.fc2",
        mlp_branch_end=f"{block}.drop_path2",
    )


# One row a family: does the model belong to it, and how is it read. First match wins.
_READERS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Anatomy]], ...] = (
    (_is_plain_vit, _read_plain_vit),
)
