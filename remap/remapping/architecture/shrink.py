"""A smaller student cut from its teacher: whole blocks first, then heads and MLP units, then channels.

Letters: S image side, B images.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from remap.backbones.anatomy import Anatomy, anatomy_of, module_at
from remap.backbones.build import Backbone
from remap.backbones.families.base import family_of
from remap.backbones.model_folder import require_free, save_model_folder
from remap.backbones.typed import as_timm, input_channels, layer_at
from remap.errors import BackboneError
from remap.remapping.architecture.remove_blocks import Batches, evenly, least_missed, take_out
from remap.remapping.architecture.shrink_options import ShrinkSpec


@dataclass(frozen=True)
class Shape:
    """What timm's constructor takes of a vision transformer; the head dimension is always width / heads."""

    depth: int
    width: int
    heads: int
    mlp: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def arguments(self, teacher: Anatomy) -> dict[str, object]:
        """Return the arguments of timm's constructor that make this shape; the rest is the architecture's."""
        return family_of(teacher).shape_arguments(teacher, self.depth, self.width, self.heads, self.mlp)

    @classmethod
    def of(cls, anatomy: Anatomy) -> "Shape":
        return cls(anatomy.depth, anatomy.width, anatomy.heads, anatomy.mlp_hidden)


@dataclass(frozen=True)
class Shrunk:
    """What came of it.

    Attributes:
        kept: Blocks that stayed, numbered from 0 in the teacher.
        changes: Relative squared change of the pooled features after each block that went; empty where blocks were
            chosen evenly or none went.
        parameters, macs: Before and after, without a classifier; multiply-adds of one image.
    """

    before: Shape
    after: Shape
    kept: tuple[int, ...]
    changes: tuple[float, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shrink(teacher: Backbone, spec: ShrinkSpec, batches: Batches, folder: Path) -> Shrunk:
    """Derive the student and write it as a model folder of timm, without a classifier. The teacher stays as it is.

    Blocks go one by one, least change of the pooled features first (``blocks: sensitivity``), or evenly. Heads, MLP
    units and channels go by Torch-Pruning's Taylor or magnitude importance. The Taylor one is taken of the pooled
    features (``pruning``): the teacher need not have a classifier, and the images need no labels.

    Args:
        batches: Normalised images of the teacher's size, (B, 3, S, S), the same ones every time.
        folder: Must not be there yet; appears only when it is whole.

    Raises:
        BackboneError: The shape is none that can be cut from this teacher.
        RunError: The folder cannot be written.
    """
    require_free(folder)
    before = Shape.of(teacher.anatomy)
    after = target_shape(teacher, spec)
    model = copy.deepcopy(teacher.model).eval()
    as_timm(model).reset_classifier(0)
    size_before = _size(model)
    kept, changes = list(range(before.depth)), list[float]()
    if after.depth < before.depth and spec.blocks == "uniform":
        kept = evenly(before.depth, after.depth)
        take_out(model, sorted(set(range(before.depth)) - set(kept)))
    elif after.depth < before.depth:
        kept, changes = least_missed(model, before.depth - after.depth, batches)
    if (after.width, after.heads, after.mlp) != (before.width, before.heads, before.mlp):
        from remap.remapping.architecture import pruning  # imports Torch-Pruning, which is slow

        pruning.prune_inside(model, after.heads, after.head_dim, after.mlp, spec.importance, batches)
        if after.width < before.width:
            pruning.prune_width(model, after.width, spec.importance, batches)
    save_model_folder(model, folder, after.arguments(teacher.anatomy))
    size_after = _size(model)
    return Shrunk(
        before,
        after,
        tuple(kept),
        tuple(changes),
        parameters=(size_before[0], size_after[0]),
        macs=(size_before[1], size_after[1]),
    )


def target_shape(teacher: Backbone, spec: ShrinkSpec) -> Shape:
    """Return the shape that is asked for; width or heads alone keep the teacher's head dimension.

    Raises:
        BackboneError: timm could not build it, or it cannot be cut from this teacher.
    """
    anatomy, name = teacher.anatomy, teacher.identity.model
    take_out(teacher.model, [])  # checks that it can be done
    before = Shape.of(anatomy)
    width, heads = spec.width, spec.heads
    if width is None:
        width = before.width if heads is None else heads * anatomy.head_dim
    if heads is None:
        heads = before.heads if width == before.width else max(1, width // anatomy.head_dim)
    shape = Shape(spec.depth or before.depth, width, heads, spec.mlp or before.mlp)
    given = f"depth {shape.depth}, width {width}, heads {heads}, mlp {shape.mlp}"
    larger = [word for word, size in asdict(shape).items() if size > asdict(before)[word]]
    if larger:
        raise BackboneError(
            f"a student that is shrunk cannot have more than its teacher {name}: {', '.join(larger)}",
            given=given,
            allowed=", ".join(f"{word} 1 to {size}" for word, size in asdict(before).items()),
        )
    if width % heads or width // heads > anatomy.head_dim:
        raise BackboneError(
            f"no vision transformer of timm has width {width} and {heads} heads"
            if width % heads
            else f"heads of width {width // heads} cannot be cut from the teacher's, which are {anatomy.head_dim} wide",
            given=given,
            allowed=f"width = heads * head width, heads 1 to {before.heads}, head width 1 to {anatomy.head_dim}; whole "
            f"heads: {', '.join(f'{n * anatomy.head_dim} with {n}' for n in range(1, before.heads + 1))}",
        )
    if shape == before:
        raise BackboneError(f"this is the teacher {name} itself, nothing is to be cut", given=given)
    if (shape.width, shape.heads, shape.mlp) != (before.width, before.heads, before.mlp):
        _require_prunable(teacher, shape, before)
    return shape


def _require_prunable(teacher: Backbone, shape: Shape, before: Shape) -> None:
    """Check that a model can be cut inside its blocks; of most families only blocks can be removed."""
    model, anatomy = teacher.model, teacher.anatomy
    norms = [module_at(model, path) for block in anatomy.blocks for path in block.norms]
    why = family_of(anatomy).unprunable(model)
    if why is not None:
        pass
    elif any("fc1_gate" in block.projections for block in anatomy.blocks):
        why = "its MLPs are gated"
    elif not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        why = "its norms are not layer norms"
    elif shape.head_dim < before.head_dim and any(".q_norm" in path for path in anatomy.blocks[0].norms):
        why = f"it normalises queries over all {before.head_dim} dimensions of a head, so heads keep their width"
    elif any((block.heads, block.mlp_hidden) != (before.heads, before.mlp) for block in anatomy.attention_blocks):
        why = "its blocks differ from each other"
    if why is not None:
        raise BackboneError(
            f"width, heads and MLP of {teacher.identity.model} cannot be cut so: {why}",
            given=f"width {shape.width}, heads {shape.heads}, mlp {shape.mlp}",
            allowed=f"depth 1 to {before.depth}; plain vision transformers (vit, deit, dinov2, clip) can be cut in all",
        )


def _size(model: nn.Module) -> tuple[int, int]:
    """Return parameters and multiply-adds of one image: layers times their positions, and the products of attention."""
    anatomy = anatomy_of(model)
    tokens = anatomy.num_prefix_tokens + anatomy.num_patches
    macs = anatomy.num_patches * anatomy.width * input_channels(model) * anatomy.patch_size[0] * anatomy.patch_size[1]
    for block in anatomy.attention_blocks:
        weights = sum((p.stop - p.start) * layer_at(model, p.path).weight.shape[1] for p in block.projections.values())
        macs += tokens * weights + 2 * tokens**2 * block.heads * block.head_dim
    return sum(p.numel() for p in model.parameters()), macs
