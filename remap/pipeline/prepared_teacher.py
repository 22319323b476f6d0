"""A teacher that is ready to teach, and what is known of it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from remap.distributed.launch import accelerator, use_bf16
from remap.distributed.sharding import is_sharded, shard, wants_sharding
from remap.engine.evaluation import Evaluation
from remap.network import Network, choose_kernels
from remap.pipeline.class_words import Answers
from remap.pipeline.computed_once import digest_of_network
from remap.pipeline.fold_teachers import FoldTeachers
from remap.pipeline.one_pass import OnePass
from remap.recipe.schema import Recipe, TeacherSpec
from remap.runs.interval import Measured


@dataclass
class PreparedTeacher:
    """A teacher and what is known of it.

    Attributes:
        key: Equal for teachers that are prepared in the same way.
        head: Where its classifier comes from: "its own", "probe", "words", a method's name, or "none".
        accuracy: On the evaluation split; None when no loss reads its logits, or no image has a label.
        outputs: Where they came from in training: "each step", "memory" or "disk".
        evaluation: What ``accuracy`` was counted from.
        one_pass: What it made of the training images before it had a head, until the first run has taken it.
        answers: How sure it is, class by class, on images without labels; None where its classifier is not of words.
        folds: The teachers that answer the labelled training images in its place; None where it answers all.
    """

    network: Network
    spec: TeacherSpec
    key: str
    head: str
    accuracy: Measured | None = None
    outputs: str | None = None
    evaluation: Evaluation | None = None
    one_pass: OnePass | None = None
    answers: Answers | None = None
    folds: FoldTeachers | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that is equal for teachers with equal outputs."""
        return digest_of_network(self.network)

    def to_dict(self) -> dict[str, Any]:
        model = self.network.identity.model
        return {
            "model": f"{self.spec.model} ({model})" if self.spec.is_student else model,
            "weight": self.spec.weight,
            "backbone_sha256": self.network.identity.sha256,
            "head": self.head,
            "accuracy": self.accuracy and self.accuracy.value,
            **({"interval": list(self.accuracy[1:])} if self.accuracy else {}),
            "total_parameters": self.network.num_parameters,
            "outputs": self.outputs,
            **({"folds": self.spec.folds} if self.spec.folds else {}),
            **({"answers": self.answers.to_dict()} if self.answers is not None else {}),
        }


def placed_network(teacher: PreparedTeacher, recipe: Recipe, network: Network) -> Network:
    """Move another network to the device as that of a teacher."""
    return placed(replace(teacher, network=network), recipe).network


def placed(teacher: PreparedTeacher, recipe: Recipe) -> PreparedTeacher:
    """Move a teacher to the device, or shard it over those of all processes; choose the run's attention kernel."""
    network, device = teacher.network, accelerator().device
    # Before sharding: the setting is an attribute of modules that FSDP wraps.
    apart = not (teacher.spec.is_student or teacher.spec.joint)  # the others have tensors of the student
    bf16 = use_bf16(recipe.train.precision, device)
    choose_kernels(network, recipe.train.fused_attention, device, bf16=bf16, trains=not apart)
    if is_sharded(network):
        return teacher
    if apart and wants_sharding(network, teacher.spec.shard, accelerator()):
        shard([network], device)
    else:
        network.model.to(device)
    return teacher
