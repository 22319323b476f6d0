"""What one training run works on: recipe, student, objective, teachers, images."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from remap.cache.frozen_features import FrozenFeatures
from remap.data.order import EpochPlan
from remap.data.views import ViewSource
from remap.engine.state import State
from remap.engine.teacher import AverageTeacher, Teacher
from remap.errors import TrainingError
from remap.io.human_size import number_of
from remap.network import Network, Runner
from remap.progress import Progress
from remap.recipe.schema import Recipe, TrainSpec
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective
from remap.remapping.signals import Signals
from remap.tuning.base import Sample


class StudentStep(nn.Module):
    """Student and objective in one module: the whole differentiable step."""

    def __init__(self, network: Network, objective: Objective, *, bf16: bool) -> None:
        super().__init__()
        self.runner = Runner(network, objective.student_needs(), bf16=bf16)
        self.objective, self.attached = objective, network.attached

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        labels: Labels,
        features: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over a micro-batch and its terms, detached.

        Args:
            images_BCHW: Raw pixels (B, 3, V, V), uint8.
            targets: Items of each teacher, by its number.
            features: The student's frozen features of these images, where they are cached.
        """
        # Signals stay in the precision of the forward; losses compare in float32.
        return self.losses(self.runner(images_BCHW, features), targets, labels)

    def losses(
        self, signals: Signals, targets: Sequence[Mapping[str, Tensor]], labels: Labels, over_batch: bool | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same of signals; of the terms that ``over_batch`` names, see ``Objective``."""
        total, parts = self.objective(signals, targets, labels, over_batch)
        penalty = self.attached.penalty()
        if penalty is None:
            return total, parts
        # Reported like a loss, so that its size shows in the metrics.
        return total + penalty, {**parts, "penalty": penalty.detach()}


@dataclass
class Job:
    """What one training run works on.

    Attributes:
        data_digest: Which images and labels these are; a checkpoint is continued with the same ones only.
        weights_digest: Which weights student and teachers came with; likewise.
        checkpoint: Folder for the newest checkpoints; None writes none.
        faults: Folder for the images of a step that stopped the run.
        evaluate: Called after each epoch; returns the metrics to record.
        on_step: Called on the main process after each step, as ``Callback.on_step``.
        on_epoch: Called on the main process with the number of the last step and the history so far.
        steps_after: Steps of what the command trains after this run, for the time that is left.
        on_resume: Called with the state of the checkpoint and the steps of an epoch, before training continues.
        labeled: Share of the training images that have a label.
        features: The student's frozen features of ``source``, where they are cached.
        sample: Training images for methods that look at them before the first step.
        may_be_overtaken: Accuracy of each teacher, by its number, that loses weight once the student is better.
        evaluation_images: How many images accuracies are measured on.
        initial_accuracy: The student's before training.
        class_weights_C: What the loss on labels counts an image of each class, float32; None counts them alike.
        expected_N: How often each training image is drawn in an epoch; None is once.
    """

    recipe: Recipe
    student: Network
    objective: Objective
    teachers: Sequence[Teacher]
    source: ViewSource
    accelerator: Accelerator
    bf16: bool
    progress: Progress
    evaluate: Callable[[], dict[str, float]]
    on_epoch: Callable[[int, list[dict[str, Any]]], None]
    data_digest: str = ""
    weights_digest: str = ""
    on_step: Callable[[int, Mapping[str, float]], None] = lambda _step, _values: None
    steps_after: int = 0
    on_resume: Callable[[State, int], None] = lambda _state, _steps: None
    checkpoint: Path | None = None
    faults: Path | None = None
    labeled: float = 1.0
    features: FrozenFeatures | None = None
    sample: Sample | None = None
    may_be_overtaken: Mapping[int, float] = field(default_factory=dict)
    evaluation_images: int = 0
    initial_accuracy: float | None = None
    class_weights_C: Tensor | None = None
    expected_N: NDArray[np.float64] | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all that is trained, by name: tuned parameters, head, the objective's projectors, and teachers'."""
        of_teachers = (teacher.parameters() for teacher in self.teachers)
        return reduce(operator.or_, of_teachers, parameters_of(self.student, self.objective))

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.recipe.learning_rate(self.student.anatomy.width)

    def made_of_student(self) -> list[Network]:
        """Return the student, and the teachers that share tensors with it or follow it."""
        # These have to be sharded together with it: a tensor cannot be sharded in one network and full in another.
        students = {id(parameter) for parameter in self.student.model.parameters()}
        networks = [self.student]
        for teacher in self.teachers:
            shares = any(id(parameter) in students for parameter in teacher.network.model.parameters())
            if shares or isinstance(teacher, AverageTeacher):
                networks.append(teacher.network)
        return networks

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds besides the optimiser: ``parameters``, and all else that training changes."""
        return tensors_of(self.student, self.objective, self.teachers)


def parameters_of(student: Network, objective: Objective) -> dict[str, nn.Parameter]:
    """Return ``Job.parameters`` where there is no job yet."""
    # The prefix keeps projectors apart from the student's names, in checkpoints and in the optimiser's groups.
    return student.trained | {f"objective.{name}": p for name, p in objective.named_parameters() if p.requires_grad}


def tensors_of(student: Network, objective: Objective, teachers: Sequence[Teacher]) -> dict[str, Tensor]:
    """Return ``Job.tensors`` where there is no job yet."""
    # keep_vars: the parameters themselves, by which the optimiser's moments are found.
    changing = {f"objective.{name}": tensor for name, tensor in objective.state_dict(keep_vars=True).items()}
    for teacher in teachers:
        changing |= teacher.tensors()
    return student.tensors | changing | parameters_of(student, objective)


def bytes_of_a_run(student: Network, objective: Objective, teachers: Sequence[Teacher], spec: TrainSpec) -> int:
    """Return the bytes on disk of three checkpoints (two stay while the next is written) and the task.

    There are no checkpoints of a student that takes no step.
    """
    more = spec.copies * sum(tensor.nbytes for tensor in student.tensors.values())
    changing = sum(tensor.nbytes for tensor in tensors_of(student, objective, teachers).values())
    # AdamW's two moments; its step counts are too small to matter.
    moments = 2 * sum(parameter.nbytes for parameter in parameters_of(student, objective).values())
    task = sum(tensor.nbytes for tensor in student.in_task.values())
    return (3 * (changing + more + moments) if spec.by_steps else 0) + max(changing, task)


def epoch_plan(job: Job, accumulation: int) -> EpochPlan:
    """Return how this process cuts epochs, with so many micro-batches per step."""
    spec, accelerator = job.recipe.train, job.accelerator
    return EpochPlan(
        seed=job.recipe.seed,
        images=len(job.source.split),
        batch_size=spec.batch_size,
        accumulation=accumulation,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        augmentation=job.recipe.data.augmentation,
        views=job.recipe.data.views,
        mixup=job.recipe.data.mixup,
        cutmix=job.recipe.data.cutmix,
        mix_probability=job.recipe.data.mix_probability,
        expected=job.expected_N,
        # Images without labels of the same domain lie in one order with the others; another domain takes turns.
        source_images=source_images(job) if job.recipe.data.target is not None else None,
        plain=any(teacher.sees_plain for teacher in job.teachers),
    )


def source_images(job: Job) -> int | None:
    """Return how many images have labels, which come first; None where all have, so that there is one domain."""
    labels_N = job.source.split.labels
    known = int((labels_N >= 0).sum())
    return known if known < len(labels_N) else None


def require_divisible(images: int, processes: int, accumulation: int) -> None:
    """Check that each micro-batch gets an image.

    Args:
        images: Of one step, all processes together.

    Raises:
        TrainingError: There are too few.
    """
    if images < processes * accumulation:
        raise TrainingError(
            f"a step of {number_of(images, 'image')} cannot be divided",
            given=f"{number_of(processes, 'process')}, each with"
            f" {number_of(accumulation, 'micro-batch', 'micro-batches')} (train.accumulation)",
            do="use a larger --batch-size, fewer processes, or less accumulation",
        )
