"""Statistics of the teachers' outputs on a sample of the training images, before the first step."""

import torch

from remap.data import keyed_random
from remap.distributed.collectives import index_chunks
from remap.distributed.interrupts import raise_if_interrupted
from remap.engine.job import Job, epoch_plan
from remap.errors import DataError

# Training images that are looked at, at most.
IMAGES = 1024


@torch.no_grad()  # a joint teacher's outputs have a graph otherwise
def estimate_statistics(job: Job) -> None:
    """Settle the objective's normalisers; every process sees the same images, as they are without augmentation.

    Raises:
        DataError: None of them can be read.
    """
    plan = epoch_plan(job, job.recipe.train.accumulation)
    size = max(1, plan.step_images // (plan.processes * plan.accumulation))  # a pass of training, for its memory
    # Drawn, since sources may list images class by class.
    order = keyed_random.permutation(job.recipe.seed, 0, len(job.source.split))[:IMAGES]
    for teacher in job.teachers:
        norms = job.objective.unsettled(teacher.number)
        if not norms:
            continue
        seen = 0
        with job.progress.wait("statistics of the teacher's features", len(order)) as step:
            for chunk in index_chunks(len(order), size):
                raise_if_interrupted(job.accelerator, "statistics of the teacher's features were being computed")
                images, readable = job.source.batch(order[chunk])
                seen += len(readable)
                if len(readable):
                    # What is cached of augmented views has other statistics than the images as they are.
                    augmented = plan.augmentation.on
                    items = teacher.items(images) if augmented else teacher.targets(images, readable, 0)
                    for name, norm in norms:
                        norm.observe(items[name])
                step.advance(len(chunk))
        if not seen:
            raise DataError(f"none of {len(order):,} training images can be read", do="repair the images")
        for _, norm in norms:
            norm.settle()
