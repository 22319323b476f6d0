"""A teacher's attention maps on the student's grid, from the student's images: what attention copy inserts.

Letters: B batch, H heads, S the shared tokens {class, patches} of the student's grid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.build import Backbone
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.errors import BackboneError
from remap.remapping.alignment import Interpolation, Layers, Resize, pair_blocks, to_shared_tokens
from remap.remapping.knowledge.attention.block_term import heads_of
from remap.remapping.signals import Needs
from remap.remapping.tap import Tap


class TeacherMaps:
    """The frozen teacher and what is made of its attention. No part of the student: copies of that share it.

    Args:
        images: How the student's images are normalised.
        layers, heads, interpolation: Options of attention copy.
    """

    def __init__(
        self,
        teacher: Backbone,
        images: PreprocessSpec,
        student: Anatomy,
        layers: Layers,
        heads: str,
        interpolation: Interpolation,
    ) -> None:
        self.sha256, self.grid, self.interpolation = teacher.identity.sha256, student.grid, interpolation
        pairs = pair_blocks(layers, student.depth, teacher.anatomy.depth)
        self.pairs = dict(pairs)
        if len(self.pairs) < len(pairs):
            raise BackboneError(
                "layers must give each student block one teacher block", given=[list(pair) for pair in pairs]
            )
        self.has_class_token = student.has_class_token and teacher.anatomy.has_class_token
        self.head_by_head = {s: _head_by_head(student, teacher.anatomy, s, t, heads) for s, t in pairs}
        self.tap = Tap(teacher.model, teacher.anatomy, Needs(attention=frozenset(self.pairs.values())))
        self.networks = nn.ModuleList([teacher.model, Preprocess(teacher.preprocess), _Pixels(images)])
        self.networks.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> dict[int, Tensor]:
        """Return the maps (B, H, S, S), or (B, 1, S, S) for all heads, of student blocks, from the student's images."""
        network, preprocess, pixels = self.networks
        if next(network.parameters()).device != images_BCHW.device:
            self.networks.to(images_BCHW.device)
        attention = self.tap(preprocess(pixels(images_BCHW))).attention
        maps = {}
        for student, block in self.pairs.items():
            map_BHSS = to_shared_tokens(attention[block], self.has_class_token).map_BHSS()
            if not self.head_by_head[student]:
                map_BHSS = map_BHSS.mean(dim=1, keepdim=True)
            resize = Resize(attention[block].grid, self.grid, self.has_class_token, self.interpolation)
            maps[student] = resize.attention(map_BHSS)
        return maps

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherMaps":
        return self


class _Pixels(nn.Module):
    """From a student's normalised image back to pixels from 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self.register_buffer("mean", 255.0 * torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255.0 * torch.tensor(spec.std).view(1, -1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.float() * self.std + self.mean


def _head_by_head(student: Anatomy, teacher: Anatomy, student_block: int, teacher_block: int, heads: str) -> bool:
    ours, theirs = heads_of(student, student_block), heads_of(teacher, teacher_block)
    if heads == "each" and ours != theirs:
        raise BackboneError(
            "heads: each copies head by head and needs equally many heads on both sides",
            given=f"student {ours}, teacher {theirs}",
            do="use heads: mean, or a teacher with as many heads",
        )
    return heads != "mean" and ours == theirs
