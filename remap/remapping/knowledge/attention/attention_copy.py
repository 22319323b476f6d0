"""Attention copy: chosen blocks of the student attend with a teacher's maps, in training and afterwards.

Letters: B batch, T all tokens of a block, S the shared tokens {class, patches} of the student's grid, D width, H heads,
h head width.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, AttentionBlock, Projection, module_at
from remap.backbones.build import build
from remap.backbones.preprocess import PreprocessSpec
from remap.backbones.typed import layer_at
from remap.errors import BackboneError, RunError
from remap.registry import MAY_BE_PATH
from remap.remapping.alignment import Interpolation
from remap.remapping.knowledge.attention.teacher_maps import TeacherMaps
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.finetuning.full import Full
from remap.tuning.seam import FeatureSeam

_CARRIED = "remap_copied_maps"


class AttentionCopy(Method):
    """Li et al. 2024, arXiv 2411.09702, "attention copy": softmax(Q K^T) of the student is replaced by the teacher's.

    ``trains: all`` is the paper's, which learns everything else anew. By default the backbone stays frozen, for the
    head alone or for a combination: ``lora+attention_copy``.
    The teacher sees the same image in its own size and normalisation, and is needed for prediction too. A task keeps
    its hash, not its weights: they are loaded again by name, and another teacher's are refused.

    Maps are those over {class, patches}, brought to the student's grid as the loss ``attention`` does. Tokens the
    teacher has no map for (prompts, registers, a class token it lacks) attend as before, and the others do not attend
    to them in these blocks: with all blocks copied they have no effect at all, so choose ``layers`` where prompts are
    trained. The student's queries and keys of other tokens decide nothing in copied blocks; they get a gradient of 0.
    Dropout of attention probabilities is left out there.
    """

    class Config(Options):
        teacher: Annotated[str, MAY_BE_PATH] = Field(
            default="mini_teacher", min_length=1, description="Short or timm name of the teacher."
        )
        weights: Annotated[str, MAY_BE_PATH] = Field(
            default="pretrained", min_length=1, description='"pretrained" or a .safetensors file.'
        )
        preset: Literal["none", "mae", "moco_v3"] | None = Field(
            default=None,
            description="How self-supervised weights are read; null is what the teacher's short name implies.",
        )
        layers: Literal["last", "uniform"] | tuple[tuple[int, int], ...] = Field(
            default="uniform", description='Block pairs: "last", "uniform" or [[student, teacher], ...] counted from 0.'
        )
        heads: Literal["auto", "each", "mean"] = Field(
            default="auto",
            description='Copy each head, or the mean; "auto" is "each" for equal head counts, else "mean".',
        )
        resize: Interpolation = Field(default="bilinear", description="Interpolation between the two patch grids.")
        trains: Literal["head", "all"] = Field(default="head", description="Train the classifier, or the backbone too.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        if self.config.weights == "none":
            raise BackboneError(
                "attention_copy needs a teacher that can be built again, and random weights exist nowhere else",
                given="weights: none",
                allowed="pretrained, or a .safetensors file",
            )
        # The student's random draws continue as if there were no teacher.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            teacher = build(self.config.teacher, self.config.weights, 1, preset=self.config.preset)
        if self.config.trains == "all":
            tuned = replace(Full().attach(model, anatomy), fold=None)
        else:
            tuned = Attachment(trainable=(), seam=FeatureSeam(model, anatomy, plain=False))
        config, images = self.config, PreprocessSpec.of(model)
        found = TeacherMaps(teacher, images, anatomy, config.layers, config.heads, config.resize)
        maps = CopiedMaps(found, config.teacher, anatomy)
        edits = Edits(model)
        edits.insert("remap_attention_copy", maps)
        edits.before(anatomy.input_module, maps.begin, first=True)
        for index, block in enumerate(anatomy.attention_blocks):
            edits.before(block.block, partial(maps.enter, index), first=True)
            if index in maps.teacher.pairs:
                _watch_values(edits, block, maps)
                norm = f"{block.attn}.norm"
                reader = norm if norm in block.norms else block.proj
                edits.before(reader, partial(maps.replace, index, block.heads), first=True)
            handle = edits.after(block.block, maps.leave)
            maps.late.append((module_at(model, block.block), handle.id))
        return replace(tuned, edits=edits, identity_at_init=False)


class CopiedMaps(nn.Module):
    """The hooks that bring the teacher's maps into the student's blocks.

    Maps cross from block to block as an attribute of the token tensor. That ties them to one forward pass: a block
    that gradient checkpointing runs again, after any number of other passes, gets the same input and so the same
    maps. The hooks are partials of bound methods, which ``copy.deepcopy`` binds to the copied module.
    """

    teacher_sha256: Tensor

    def __init__(self, teacher: TeacherMaps, name: str, anatomy: Anatomy) -> None:
        super().__init__()
        self.teacher, self.teacher_name, self.patches = teacher, name, anatomy.num_patches
        digest = torch.frombuffer(bytearray.fromhex(teacher.sha256), dtype=torch.uint8).clone()
        self.register_buffer("teacher_sha256", digest)
        self._checked = self.teacher_sha256._version
        # Hooks that must come behind those of methods that were attached later, by module and number.
        self.late: list[tuple[nn.Module, int]] = []
        # Between the image and the first block, and within one block.
        self._maps: Mapping[int, Tensor] | None = None
        self._now: Mapping[int, Tensor] = {}
        self._v_BTD: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the image."""
        if not torch.compiler.is_compiling():
            for late, number in self.late:
                cast(OrderedDict[int, Any], late._forward_hooks).move_to_end(number)
            self.late = []
            self._require_same_teacher()
        self._maps = self.teacher(args[0])

    def enter(self, index: int, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a block, in front of those of other methods."""
        maps = getattr(args[0], _CARRIED, None)
        if maps is None:
            if index or self._maps is None:
                raise BackboneError(
                    f"the input of block {index} carries no attention maps of the teacher",
                    given="a tensor that does not come straight from the block before",
                    do="use non-reentrant checkpointing (timm's default), and run the whole network from its image on",
                )
            maps, self._maps = self._maps, None
            setattr(args[0], _CARRIED, maps)
        self._now = maps

    def leave(self, block: nn.Module, args: tuple, output_BTD: Tensor) -> None:
        """Forward hook of a block."""
        setattr(output_BTD, _CARRIED, self._now)
        self._now = {}

    def keep_values(
        self, v: Projection, owner: nn.Module | None, layer: nn.Module, args: tuple, output: Tensor
    ) -> None:
        """Forward hook of the layer that makes the values; ``owner`` has a bias that is added behind it."""
        v_BTD = output[..., v.rows]
        self._v_BTD = v_BTD if owner is None else v_BTD + _bias(v, owner)

    def make_values(
        self, v: Projection, layer: nn.Linear | nn.Conv2d, owner: nn.Module | None, attention: nn.Module, args: tuple
    ) -> None:
        """Forward pre-hook of attention that reads a layer's weight past the layer."""
        self._v_BTD = F.linear(args[0], layer.weight[v.rows], None if owner is None else _bias(v, owner))

    def replace(self, index: int, heads: int, module: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of what takes the heads' results, (B, T, D), side by side."""
        own_BTD, (v_BTD, self._v_BTD) = args[0], (self._v_BTD, None)
        assert v_BTD is not None  # the values' hook runs in front of this one
        map_BHSS = self._now[index]
        between = own_BTD.shape[1] - map_BHSS.shape[-1]
        sizes = [map_BHSS.shape[-1] - self.patches, between, self.patches]
        v_first, _, v_patches = v_BTD.split(sizes, dim=1)
        own_first, own_rest, own_patches = own_BTD.split(sizes, dim=1)
        v_BHSh = torch.cat([v_first, v_patches], dim=1).unflatten(-1, (heads, -1)).transpose(1, 2)
        copied_BSD = (map_BHSS.to(v_BHSh.dtype) @ v_BHSh).transpose(1, 2).flatten(2).to(own_BTD.dtype)
        if own_BTD.requires_grad:
            # Distributed training waits for a gradient of every trained parameter, also of queries and keys.
            copied_BSD = copied_BSD + 0.0 * torch.cat([own_first, own_patches], dim=1)
        first, patches = copied_BSD.split([sizes[0], sizes[2]], dim=1)
        return (torch.cat([first, own_rest, patches], dim=1), *args[1:])

    def _require_same_teacher(self) -> None:
        """Check the hash of its teacher that a loaded task brings.

        Raises:
            RunError: It was another one.
        """
        if self.teacher_sha256._version == self._checked:
            return
        wanted = bytes(self.teacher_sha256.cpu().tolist()).hex()
        if wanted != self.teacher.sha256:
            raise RunError(
                f"this student was tuned with the attention maps of other weights of {self.teacher_name}",
                given=f"teacher {self.teacher.sha256[:16]}, task {wanted[:16]}",
                do="bring back the teacher's weights; the method's options name them",
            )
        self._checked = self.teacher_sha256._version


def _watch_values(edits: Edits, block: AttentionBlock, maps: CopiedMaps) -> None:
    v = block.projections["v"]
    layer = layer_at(edits.model, v.path)
    owner = None
    if v.bias is not None and v.bias != f"{v.path}.bias":
        owner = module_at(edits.model, v.bias.rpartition(".")[0])
    if not v.called:
        edits.before(block.attn, partial(maps.make_values, v, layer, owner))
        return
    maps.late.append((layer, edits.after(v.path, partial(maps.keep_values, v, owner)).id))


def _bias(v: Projection, owner: nn.Module) -> Tensor:
    bias = getattr(owner, str(v.bias).rpartition(".")[2])
    return bias[v.bias_start : v.bias_start + v.stop - v.start]
