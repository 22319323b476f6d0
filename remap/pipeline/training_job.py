"""What the training loop of one run works on."""

from typing import Any

import torch

from remap.cache.frozen_features import FrozenFeatures
from remap.data.balance import answer_weights, class_weights, classes_only_in
from remap.data.copies import copies_across
from remap.distributed.launch import accelerator
from remap.engine.job import Job
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.pipeline.components import RunComponents
from remap.pipeline.epoch_recorder import EpochRecorder
from remap.pipeline.samples import method_sample
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_outputs import teachers_in_training
from remap.progress import Progress
from remap.remapping import LOSSES
from remap.runs.interval import Measured


def training_job(
    components: RunComponents,
    recorder: EpochRecorder,
    features: FrozenFeatures | None,
    shared: SharedResources,
    progress: Progress,
    untrained: Measured | None = None,
    steps_after: int = 0,
) -> Job:
    """Return what ``remap.engine.loop.train`` works on.

    Args:
        features: The student's frozen features of the training images, where they are cached.
        untrained: The student's accuracy before training, if it has a classifier.
        steps_after: Steps of what is trained after this run.
    """
    recipe, student, run_dir = components.recipe, components.student, recorder.run_dir
    return Job(
        recipe=recipe,
        student=student,
        objective=components.objective.to(accelerator().device),
        teachers=teachers_in_training(components, shared, progress),
        source=components.training_source,
        accelerator=accelerator(),
        bf16=components.bf16,
        progress=progress,
        data_digest=components.views.digest(progress),
        weights_digest=components.weights_digest(),
        evaluate=recorder.after_epoch,
        on_step=recorder.callbacks.on_step,
        on_epoch=recorder.record_epoch,
        steps_after=steps_after,
        on_resume=recorder.record_resume,
        # Both folders belong to the run directory, so that moving it moves them.
        checkpoint=run_dir.checkpoint,
        faults=run_dir.fault,
        labeled=components.labeled_share,
        # None where the whole network has to run.
        features=features,
        sample=method_sample(student, components.views, recipe.seed) if student.attached.wants_sample else None,
        may_be_overtaken={
            number: teacher.accuracy.value
            for number, teacher in enumerate(components.teachers)
            if teacher.spec.overtaken == "fade" and teacher.accuracy is not None
        },
        evaluation_images=len(components.views.val.split),
        initial_accuracy=untrained and untrained.value,
        **class_balance(components, progress),
    )


def class_balance(components: RunComponents, progress: Progress) -> dict[str, Any]:
    """Return the fields of a job that bring classes nearer to each other, and say it; none where all count alike."""
    spec, names = components.recipe.train, components.student.classes or ()
    if spec.class_weight_power == 0.0:
        return {}
    labels_N, in_loss = components.training_source.split.labels, spec.class_weight_by == "loss"
    if labels_N.ndim == 2:
        weights_C, what, how = answer_weights(labels_N, spec.class_weight_power), "positive labels of", "have weight"
    else:
        weights_C, what = class_weights(labels_N, len(names), spec.class_weight_power), "images of"
        how = "have weight" if in_loss else "are drawn"
    low, high = int(weights_C.argmin()), int(weights_C.argmax())
    times = "" if in_loss else " times"
    least, most = (f"{weights_C[one]:.3g}{times}" for one in (low, high))
    progress.say(f"{what} {names[low]} {how} {least}, of {names[high]} {most}")
    if not in_loss:
        return {"expected_N": weights_C[labels_N]}
    # float32 as the logits: the cross-entropy of PyTorch refuses weights of another dtype.
    return {"class_weights_C": torch.tensor(weights_C, dtype=torch.float32, device=accelerator().device)}


def _classes_not_judged(components: RunComponents) -> str | None:
    """Return that classes to learn have no evaluation image; None where each has one, or nothing is evaluated.

    Not of a part of the training images, and not of a session, which is evaluated on more than its own classes.
    """
    data, spec = components.views.data, components.recipe.data
    chosen = spec.held_out is not None or spec.fold is not None or components.recipe.student.extends is not None
    if chosen or not len(data.val) or not len(data.train):
        return None
    names = list(map(plain, classes_only_in([data.train], data.val, data)))
    if not names:
        return None
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    what = f"{len(names)} of {number_of(len(data.classes), 'class')}"
    return f"note: {what} have no evaluation image, so accuracy says nothing of {', '.join(names[:10])}{more}"


def warn_before_training(components: RunComponents, shared: SharedResources, progress: Progress) -> None:
    """Say what of this run teaches nothing, is learned from and evaluated on, or depends on how a batch is divided."""
    copies = copies_across(components.views.contents, progress)
    # The runs of a comparison have the same images: it is said once.
    if copies is not None:
        shared.say_once(progress, copies)
    if (unseen := _classes_not_judged(components)) is not None:
        shared.say_once(progress, unseen)
    losses = [(loss.name, LOSSES.row(loss.name)) for loss in components.recipe.losses]
    if components.recipe.label_free:
        count, method = len(components.training_source.split), components.recipe.method.name
        mergeable = components.student.attached.mergeable
        result = (
            "a model folder of timm" if mergeable else f"a task alone, since {method} cannot be merged into weights"
        )
        progress.say(f"learning from {count:,} images without labels; the result is a backbone: {result}")
    on_labels = [name for name, row in losses if row.category == "labels"]
    if on_labels and components.labeled_share == 0.0:
        progress.say(f"{', '.join(on_labels)} teaches nothing: the student learns only from images without labels")
    # A batch that is not divided has no parts to depend on.
    if accelerator().num_processes * components.recipe.train.accumulation == 1:
        return
    if components.student.learns_batch_statistics:
        progress.say("batch statistics are computed within each part of a batch, so results depend on the parts")
    if components.student.draws_masks:
        progress.say("the backbone's own dropout is drawn within each part of a batch, so results depend on the parts")
    over_batch = [loss.name for loss in components.recipe.losses if loss.over_batch]
    if over_batch and components.recipe.train.accumulation > 1:
        progress.say(f"{', '.join(over_batch)}: the whole batch is compared, so the student runs twice in each step")
