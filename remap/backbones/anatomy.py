"""What a backbone instance is made of, in the same words for every family. The readers are in ``families/``.

Letters: B batch, N patch tokens, P prefix tokens (class, distillation, register), D width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.families import FAMILIES
from remap.backbones.projected_head import ProjectedHead
from remap.errors import BackboneError

# Attribute under which a dynamic subclass stores its original class, see ``plain_class``.
PLAIN_CLASS = "_remap_plain_class"


@dataclass(frozen=True)
class Projection:
    """A linear map, as rows ``[start, stop)`` of the weight of the linear layer (or convolution) at ``path``.

    ``called`` is False where the backbone reads the layer's weight instead of calling the layer, so that a hook on it
    or a module in its place would be ignored. ``bias`` is the dotted path of the bias tensor of these rows, in its
    rows ``[bias_start, bias_start + stop - start)``; None where there is none. A bias that never trains (the zero
    buffer that stands for the key bias in Eva and BEiT) counts as there.
    """

    path: str
    start: int
    stop: int
    called: bool = True
    bias: str | None = None
    bias_start: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Block:
    """One residual block; paths are dotted, relative to the model.

    ``width`` counts channels of the residual stream, ``grid`` its (rows, columns) of patches, ``channels_last`` says
    where a hierarchical model keeps the channels in the block's input and output ((B, H, W, D) or (B, D, H, W));
    sequence models have (B, T, D). ``norms`` are in the order of the forward. ``projections`` gives linear layers by
    word: q, k, v, o, fc1, fc2 (and fc1_gate in gated MLPs). Other layers of convolutional networks are there by kind,
    "linear:NAME" (1x1 convolutions too) or "conv:NAME" (kernels as matrices of c_out x c_in * k * k).
    """

    block: str
    width: int
    grid: tuple[int, int]
    stage: int
    norms: tuple[str, ...]
    projections: dict[str, Projection]
    channels_last: bool = True


@dataclass(frozen=True)
class AttentionBlock(Block):
    """A transformer block: x + branch1(attn(norm1(x))), then x + branch2(mlp(norm2(x))).

    ``attn_branch_end`` and ``mlp_branch_end`` are the last modules of their branches, after LayerScale and
    drop-path, whose outputs are added to the residual stream. ``attn_scale`` and ``mlp_scale`` are the paths of the
    LayerScale vectors of shape (D,), None where there are none. ``plain_scores``: scores are q k^T and nothing else,
    without a norm or rotation of keys and without a position bias. ``norms_behind``: norm1 and norm2 stand at the end
    of their branches instead, where a scale of the layers before them is lost.
    """

    norm1: str = ""
    attn: str = ""
    heads: int = 1
    head_dim: int = 0
    attn_branch_end: str = ""
    attn_scale: str | None = None
    norm2: str = ""
    mlp: str = ""
    mlp_hidden: int = 0
    mlp_branch_end: str = ""
    mlp_scale: str | None = None
    plain_scores: bool = False
    norms_behind: bool = False

    @property
    def proj(self) -> str:
        return self.projections["o"].path

    @property
    def fc1(self) -> str:
        return self.projections["fc1"].path

    @property
    def fc2(self) -> str:
        return self.projections["fc2"].path


@dataclass(frozen=True)
class AttentionScores:
    """What one block attends with, over all T tokens of its sequence: softmax(q @ k.mT + bias).

    ``q_BHTh`` carries the scale 1/sqrt(h). ``bias_HTT`` is additive, with or without a leading dimension of 1; None
    where there is none. ``v_BHTh``, None unless requested, is what the probabilities are multiplied with.
    """

    q_BHTh: Tensor
    k_BHTh: Tensor
    bias_HTT: Tensor | None = None
    v_BHTh: Tensor | None = None


@dataclass(frozen=True)
class ConvSite:
    """A spatial convolution and the norm behind it (None where none follows directly)."""

    conv: str
    norm: str | None


@dataclass(frozen=True)
class ConvBlock(Block):
    """A block of a convolutional network: x + branch(x). ``branch_end`` is the last module of the branch."""

    convs: tuple[ConvSite, ...] = ()
    branch_end: str = ""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Shape and parts of one backbone.

    Sizes are in pixels for ``image_size`` and ``patch_size`` (height, width), in positions for ``grid``. In
    hierarchical models ``patch_size`` is that of the embedding, ``grid`` that of the last stage. ``width`` is that of
    the pooled features; the classifier reads them, or in a vision-language model their projection, of
    ``projected_width``. ``num_prefix_tokens`` counts class, distillation and register tokens, which
    stand in front of the patches; the class token, where there is one, is token 0. ``heads``, ``head_dim`` and
    ``mlp_hidden`` are those of the last block (0 where there are none).
    ``input_module`` takes the image ("": no single module does); ``embedding_norms`` are norms outside the blocks,
    ``final_norm`` excluded.
    ``class_token_pooled``: the classifier reads the class token of ``final_norm``'s output, and nothing else.
    ``averaged_heads``: the logits are those of the classifier, or the mean of two that read features of one width.
    ``positions_in_embedding``: the input module adds positions and prefix itself, and cannot embed single patches.
    """

    family: str
    width: int
    depth: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    grid: tuple[int, int]
    input_module: str
    embedding_norms: tuple[str, ...]
    final_norm: str | None
    classifier_heads: tuple[str, ...]
    blocks: tuple[Block, ...]
    heads: int = 0
    head_dim: int = 0
    mlp_hidden: int = 0
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    class_token_pooled: bool = False
    averaged_heads: bool = True
    positions_in_embedding: bool = False
    projected_width: int | None = None

    @property
    def feature_width(self) -> int:
        """Channels of what the classifier reads."""
        return self.projected_width or self.width

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sequence(self) -> int | None:
        """Tokens that attend to each other, without those of a method; None where blocks are stages."""
        return None if self.in_stages else self.num_patches + self.num_prefix_tokens

    @property
    def in_stages(self) -> bool:
        """Whether the blocks are stages (``families.stages``)."""
        return "blocks" not in self.parts

    @property
    def attention_blocks(self) -> tuple[AttentionBlock, ...]:
        """All blocks as transformer blocks; raises BackboneError where some block is another one."""
        blocks = tuple(block for block in self.blocks if isinstance(block, AttentionBlock))
        if len(blocks) != self.depth:
            raise BackboneError(
                f"{self.depth - len(blocks)} of {self.depth} blocks of this backbone (family '{self.family}') have no "
                "attention",
                do="choose a transformer, or a method for convolutional networks",
            )
        return blocks

    @property
    def parts(self) -> frozenset[str]:
        """What a method can count on here; the words are those of ``families.PARTS``."""
        words = frozenset({"words"} if self.projected_width else ())
        return FAMILIES.row(self.family).parts | words

    def is_head(self, parameter: str) -> bool:
        """Return whether a parameter belongs to the classifier."""
        return parameter.startswith(tuple(f"{path}." for path in self.classifier_heads))


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return the anatomy of a timm model; raises BackboneError where no family reads it."""
    for row in FAMILIES:
        if (family := row.load()()).matches(model):
            return _with_projection(model, family.read(model))
    raise BackboneError(f"{type(model)} is not a network of timm", do="`remap models` lists names that work")


def _with_projection(model: nn.Module, anatomy: Anatomy) -> Anatomy:
    """Return the anatomy, with the classifier behind a projection where the model has one."""
    modules = dict(model.named_modules())
    for path in anatomy.classifier_heads:
        if isinstance(head := modules.get(path), ProjectedHead):
            return replace(anatomy, classifier_heads=(f"{path}.classifier",), projected_width=head.width)
    return anatomy


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the sub-module at a dotted path of the anatomy."""
    return model.get_submodule(path)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was made with, not the subclass by which a method changes how tensors are read."""
    return getattr(type(module), PLAIN_CLASS, type(module))


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Return the parameter or buffer at a dotted path of the anatomy."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def classifier_parameters(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """Return the parameters of the classifier head(s) by full name."""
    return {name: p for name, p in model.named_parameters() if anatomy.is_head(name)}


def set_fused_attention(model: nn.Module, anatomy: Anatomy, enabled: bool) -> None:
    """Choose between PyTorch's fused attention kernel and the explicit one; the result is the same function."""
    for block in anatomy.blocks:
        if isinstance(block, AttentionBlock):
            module_at(model, block.attn).__dict__["fused_attn"] = enabled


def rest_of_forward(model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
    """Run a model from the input of block ``index`` on, see ``Family.rest_of_forward``."""
    return FAMILIES.load(anatomy.family)().rest_of_forward(model, index, x)


def admit_tokens(model: nn.Module, anatomy: Anatomy, count: int, first: int = 0) -> Callable[[], None]:
    """Make blocks of a sequence model accept ``count`` more tokens right after the prefix; return the undo.

    Rotary models leave them without a rotation, relative position biases are 0 for them. See ``Family.admit_tokens``.
    """
    return FAMILIES.load(anatomy.family)().admit_tokens(model, count, first)


def watch_attention(
    model: nn.Module, anatomy: Anatomy, index: int, keep: Callable[[AttentionScores], None], *, values: bool = False
) -> list[RemovableHandle]:
    """Call ``keep`` with the scores of block ``index`` in every forward, see ``Family.watch_attention``."""
    return FAMILIES.load(anatomy.family)().watch_attention(model, index, keep, values=values)
