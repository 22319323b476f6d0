"""What feature losses share: projectors, distances, patch tokens on the student's grid, generators.

B batch, N patches of the student's grid, D width (student's and teacher's differ), h and w rows and columns.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from remap.backbones.anatomy import Anatomy, Block
from remap.errors import BackboneError
from remap.registry import LATER
from remap.remapping.alignment import Resize, pair_blocks
from remap.remapping.labels import Labels
from remap.remapping.normalization import Normalization
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Needs, Signals, float32_region
from remap.remapping.targets import POOLED, patches_name, pooled_of
from remap.tuning.base import Options

Projector = Literal["linear", "orthogonal", "mlp", "none"]
Distance = Literal["smooth_l1", "cosine"]
Layers = Literal["last", "uniform"] | tuple[tuple[int, int], ...]


class ProjectorOptions(Options):
    """Options of a term that projects the student's features."""

    projector: Projector = Field(
        default="linear",
        description='"linear" (no bias), "orthogonal" (of VkD), "mlp" (with a hidden layer) or "none" (equal widths).',
    )
    hidden: Annotated[int | None, LATER] = Field(
        default=None, ge=1, description='Width of the hidden layer of "mlp"; null is the teacher\'s width.'
    )

    @model_validator(mode="after")
    def _hidden_of_mlp(self) -> Self:
        if self.hidden is not None and self.projector != "mlp":
            raise ValueError(f"hidden is the width of projector: mlp, and this one is {self.projector}")
        return self


class ProjectedOptions(ProjectorOptions):
    """Options of a term that compares the student's projected features with the teacher's normalised ones."""

    normalize: Annotated[Normalization, LATER] = Field(
        default="layer",
        description='The teacher\'s features: "layer" (each by itself), or by statistics of training images "standard" '
        '(each channel) or "phi_s" (PHI-S).',
    )
    loss: Distance = Field(default="smooth_l1", description="Mean smooth L1 distance (knee at 1), or 1 - cosine.")


def projector(options: ProjectorOptions, student_width: int, teacher_width: int) -> nn.Module:
    """Return a map from the student's width to the teacher's, drawn from PyTorch's global generator.

    "mlp" is linear, layer norm, GELU, linear, as AM-RADIO's adaptors (Ranzinger et al. 2024, arXiv 2312.06709).

    Raises:
        BackboneError: "none" for different widths.
    """
    kind = options.projector
    if kind == "none":
        if student_width != teacher_width:
            raise BackboneError(
                "projector: none needs equal widths",
                given=f"student {student_width}, teacher {teacher_width}",
                allowed="linear, orthogonal, mlp",
            )
        return nn.Identity()
    if kind == "mlp":
        hidden = options.hidden or teacher_width
        return nn.Sequential(
            nn.Linear(student_width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, teacher_width)
        )
    linear = nn.Linear(student_width, teacher_width, bias=False)
    # The Cayley map costs one linear solve; the default for oblong matrices, householder, is several times slower.
    return linear if kind == "linear" else orthogonal(linear, orthogonal_map="cayley")


def distance(kind: Distance, projected_xD: Tensor, wanted_xD: Tensor) -> Tensor:
    """Return the distance to the normalised target: smooth-L1 mean (knee at 1), or mean of 1 - cosine."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(projected_xD, wanted_xD)
    return (1.0 - F.cosine_similarity(projected_xD, wanted_xD, dim=-1)).mean()


def pooled(signals: Signals) -> Tensor:
    """Return what enters the classifier (B, D), float32."""
    assert signals.pooled_BD is not None, "the tap does not record pooled features"
    return signals.pooled_BD.float()


class PooledTerm(LossTerm):
    """A term that reads nothing but the pooled features of both.

    Attributes:
        name: The term's name in the table of losses.
    """

    name: ClassVar[str]

    def __init__(self, pair: Pair, config: Options) -> None:
        super().__init__(pair, config)
        self.widths = pair.student.feature_width, pair.known_teacher(self.name).feature_width

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(pooled=True)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return pooled_of(teacher)

    def forward(self, student: Signals, target: Mapping[str, Tensor], labels: Labels) -> Tensor:
        ours_BD = pooled(student)
        with float32_region(ours_BD):
            return self.compare(ours_BD, target[POOLED].float(), labels)

    @abstractmethod
    def compare(self, ours_BD: Tensor, theirs_BD: Tensor, labels: Labels) -> Tensor:
        """Return the loss between float32 features of the student and the teacher, a scalar."""


def token_pairs(layers: Layers, pair: Pair, term: str) -> tuple[tuple[int, int], ...]:
    """Return whose tokens are compared, as (student, teacher) blocks; "last" is behind the final norm of both.

    Raises:
        BackboneError: There is no teacher, or a block that one of the networks does not have.
    """
    student, teacher = pair.student, pair.known_teacher(term)
    if layers == "last":
        return ((student.depth, teacher.depth),)
    return pair_blocks(layers, student.depth, teacher.depth)


def block_of(anatomy: Anatomy, index: int) -> Block:
    """Return the block whose width and grid tokens have; behind the final norm they are those of the last block."""
    return anatomy.blocks[min(index, anatomy.depth - 1)]


class TokenTerm(LossTerm):
    """A term that compares patch tokens of pairs of blocks on the student's grid.

    The teacher's patches are brought there channel by channel (antialiased bilinear); prompts and prefix tokens are
    not among them.
    """

    def __init__(self, pair: Pair, config: Options, blocks: Sequence[tuple[int, int]]) -> None:
        super().__init__(pair, config)
        self.blocks = tuple(blocks)

    def reads(self, blocks: frozenset[int]) -> Needs:
        return Needs(tokens=blocks)

    @torch.no_grad()
    def target(self, teacher: Signals) -> dict[str, Tensor]:
        return {self.item(s, t): self.resized(teacher, s, t) for s, t in self.blocks}

    def widths(self, student_block: int, teacher_block: int) -> tuple[int, int]:
        return block_of(self.pair.student, student_block).width, self._teacher_block(teacher_block).width

    def grid(self, student_block: int) -> tuple[int, int]:
        return block_of(self.pair.student, student_block).grid

    def item(self, student_block: int, teacher_block: int) -> str:
        """Return the name of the teacher's patches on the student's grid; on equal grids the teacher's own."""
        return patches_name(teacher_block) + self.grid_suffix(student_block, teacher_block)

    def grid_suffix(self, student_block: int, teacher_block: int) -> str:
        height, width = self.grid(student_block)
        return "" if self._teacher_block(teacher_block).grid == (height, width) else f" {height}x{width}"

    def _teacher_block(self, index: int) -> Block:
        return block_of(self.pair.known_teacher(type(self).__name__), index)

    def resized(self, teacher: Signals, student_block: int, teacher_block: int) -> Tensor:
        """Return the teacher's patches (B, N, D) on the grid of the student's block, float32."""
        tokens = teacher.tokens[teacher_block]
        resize = Resize(tokens.grid, self.grid(student_block), has_class_token=False)
        return resize.tokens(tokens.patches_BND.detach().float())


class Generator(nn.Sequential):
    """Two 3 x 3 convolutions with a ReLU between them, on tokens laid out on their grid, square or not."""

    def __init__(self, width: int) -> None:
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        super().__init__(first, nn.ReLU(), second)

    def generate(self, tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        map_BDhw = tokens_BND.mT.unflatten(2, grid)
        return self(map_BDhw).flatten(2).mT
