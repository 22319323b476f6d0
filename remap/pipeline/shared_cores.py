"""Give a teacher adapters that share their cores with the student's (SLAD, arXiv 2605.29726)."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch

from remap.backbones.build import Backbone
from remap.errors import BackboneError
from remap.network import Network, frozen, tuned
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.recipe import Recipe
from remap.remapping.alignment import pair_blocks
from remap.tuning.parameter.lora import WithCore


def frozen_or_joint(teacher: PreparedTeacher, student: Network, recipe: Recipe) -> PreparedTeacher:
    """Freeze a prepared teacher; a joint one is copied, and the copy gets adapters that train with its head.

    Each block of the student shares with the block of the teacher at the same relative depth.

    Raises:
        BackboneError: The adapted layers of the two hold different projections.
    """
    if not teacher.spec.joint:
        frozen(teacher.network)
        return teacher
    given = teacher.network  # other runs of a comparison may use it too
    model = frozen(replace(given, model=copy.deepcopy(given.model))).model
    with torch.random.fork_rng(devices=[]):
        # In a fork: what is drawn after this is the same as with a frozen teacher.
        torch.manual_seed(recipe.seed)
        backbone = Backbone(model, given.anatomy, given.preprocess, given.identity, head_is_fresh=False)
        network = tuned(backbone, recipe.method.name, recipe.method.options)
    network.classes = given.classes
    theirs, ours = list(_changes(network)), list(_changes(student))
    for student_block, teacher_block in pair_blocks("uniform", len(ours), len(theirs)):
        partners, changes = ours[student_block], theirs[teacher_block]
        if [change.core.shape for change in changes] != [partner.core.shape for partner in partners]:
            raise BackboneError(
                "teacher and student cannot share adapters: their blocks have different layers for the same targets",
                given=f"{given.identity.model}, {student.identity.model}",
                do="choose two sizes of one family, or other targets (method.targets)",
            )
        for change, partner in zip(changes, partners, strict=True):
            # The same parameter, and no copy: it gets the gradients of both networks.
            change.core = partner.core
    return replace(teacher, network=network)


def _changes(network: Network) -> Iterator[list[WithCore]]:
    """Yield the adapters of each block."""
    for block in network.anatomy.blocks:
        yield [m for m in network.model.get_submodule(block.block).modules() if isinstance(m, WithCore)]
