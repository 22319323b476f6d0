"""What one micro-batch gives to the networks and losses: pixels, teachers' items, labels, frozen features."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from remap.data.batches import Batch
from remap.distributed.device_memory import to_device
from remap.engine.training import Training
from remap.errors import TrainingError
from remap.io.human_size import number_of
from remap.remapping.labels import Labels
from remap.remapping.signals import Signals


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device.

    Attributes:
        targets: Items of each teacher, by its number.
        keys_B: One key an image for dropout.
        features: The student's frozen features of the images, where they are cached.
    """

    images_BCHW: Tensor
    targets: list[Mapping[str, Tensor]]
    labels: Labels
    keys_B: Tensor
    features: Mapping[str, Tensor] | None


def inputs_of(training: Training, batch: Batch, bad_targets: list[Tensor]) -> Inputs:
    """Run the teachers on a micro-batch, and bring everything to the device.

    Args:
        bad_targets: Gets one number for each output that a teacher computes now, see ``Sums``.
    """
    job, device = training.job, training.accelerator.device
    images = to_device(batch.images_BCHW, device)
    labels = _labels(batch, training.plan.labeled_share(job.labeled), job.class_weights_C, device)
    # By number, with gaps: a teacher that no loss reads has a number too.
    targets: list[Mapping[str, Tensor]] = [{}] * (1 + max((teacher.number for teacher in job.teachers), default=0))
    for teacher in job.teachers:
        shown = images
        if teacher.sees_plain:
            assert batch.plain_BCHW is not None, "the epoch plan does not know what this teacher sees"
            shown = batch.plain_BCHW.to(device, non_blocking=True)
        items = targets[teacher.number] = teacher.targets(shown, batch.indices_B, batch.view)
        if teacher.cached is None:  # cached outputs were checked when they were computed
            # On the device, and read once for the complete step: each test here would wait for a GPU.
            bad_targets += [(~torch.isfinite(value)).any().float() for value in items.values()]
        # Gradients are averaged over processes afterwards; shares are those of the global batch.
        teacher.learn(labels, batch.share * training.accelerator.num_processes)
    features = job.features.rows(batch.indices_B) if job.features is not None else None
    return Inputs(images, targets, labels, to_device(batch.keys_B, device), features)


def losses_of(training: Training, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the student on a micro-batch; return the mean loss and each of its terms."""
    with _student_pass(training, inputs):
        return training.module(inputs.images_BCHW, inputs.targets, inputs.labels, inputs.features)


def run_student(training: Training, inputs: Inputs) -> Signals:
    """Run the student alone on a micro-batch."""
    with _student_pass(training, inputs):
        return training.module.runner(inputs.images_BCHW, inputs.features)


@contextmanager
def _student_pass(training: Training, inputs: Inputs) -> Iterator[None]:
    """Make the student's dropout a function of the image, and name what a lone image cannot give.

    Raises:
        TrainingError: The student has batch norms on maps of one pixel, and one image is in the pass.
    """
    training.job.student.attached.set_sample_keys(inputs.keys_B)
    try:
        yield
    except ValueError as error:  # of PyTorch's batch norm, which knows the size of its map
        if len(inputs.images_BCHW) > 1 or "more than 1 value per channel" not in str(error):
            raise
        spec, processes = training.spec, training.accelerator.num_processes
        parts = f", accumulation {training.state.accumulation}, {number_of(processes, 'process')}"
        raise TrainingError(
            "a batch norm of the student has one number of a channel, and so no variance: one image in a pass, on a"
            " map of one pixel",
            given=f"batch size {spec.batch_size}{parts}",
            do="give each pass more images (train.batch_size, train.accumulation), or take larger ones"
            " (student.image_size)",
        ) from error


def _labels(batch: Batch, known: float, weights_C: Tensor | None, device: torch.device) -> Labels:
    mixed = (batch.other_B, batch.share_B)
    other_B, share_B = (None if tensor is None else to_device(tensor, device) for tensor in mixed)
    return Labels(to_device(batch.labels_B, device), other_B, share_B, known, weights_C)
