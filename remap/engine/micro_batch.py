"""What one micro-batch gives to the networks and losses: pixels, teachers' items, labels, frozen features."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from remap.data.batches import Batch
from remap.distributed.device_memory import to_device
from remap.engine.training import Training
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


def run_student(training: Training, inputs: Inputs) -> Signals:
    """Run the student on a micro-batch; its dropout is a function of the image."""
    training.job.student.attached.set_sample_keys(inputs.keys_B)
    return training.module.runner(inputs.images_BCHW, inputs.features)


def _labels(batch: Batch, known: float, weights_C: Tensor | None, device: torch.device) -> Labels:
    mixed = (batch.other_B, batch.share_B)
    other_B, share_B = (None if tensor is None else to_device(tensor, device) for tensor in mixed)
    return Labels(to_device(batch.labels_B, device), other_B, share_B, known, weights_C)
