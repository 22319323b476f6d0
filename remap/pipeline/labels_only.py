"""The same student by labels alone: its recipe, and as many steps as with the teacher."""

from typing import TYPE_CHECKING

from remap.recipe.schema import LossSpec, Recipe, TrainSpec
from remap.remapping import LOSSES

if TYPE_CHECKING:
    from remap.pipeline.shared import SharedResources


def labels_only(recipe: Recipe) -> Recipe:
    """Return the same recipe without teachers: losses on labels alone (ce where none counts), labelled images.

    A loss that is left alone has its usual weight: what it counted beside the teacher would be a small learning rate.
    """
    on_labels = [loss for loss in recipe.losses if loss.weight and LOSSES.row(loss.name).category == "labels"]
    if len(on_labels) < 2:
        alone = on_labels[0] if on_labels else LossSpec(name="ce")
        on_labels = [alone.model_copy(update={"weight": LOSSES.row(alone.name).weight})]
    return recipe.model_copy(
        update={
            "baseline": False,
            "choose_losses": False,
            "data": recipe.data.labeled_part(),
            "teachers": (),
            # Without a teacher the student does not start from its weights either.
            "student": recipe.student.model_copy(update={"init": None, "force_init": False}),
            "losses": tuple(on_labels),
        }
    )


def same_steps(train: TrainSpec, images: int, fewer: int) -> TrainSpec:
    """Return the training for fewer images with the steps of that for ``images``: their epochs are shorter."""
    steps, steps_of_fewer = (max(1, count // train.batch_size) for count in (images, fewer))
    warmup = None if train.warmup_epochs is None else train.warmup_epochs * steps / steps_of_fewer
    epochs = -(-train.epochs * steps // steps_of_fewer)  # rounded up, in whole numbers
    patience = None if train.patience is None else -(-train.patience * steps // steps_of_fewer)
    every = -(-train.eval_every * steps // steps_of_fewer)  # as often, counted in steps
    update = {"epochs": epochs, "warmup_epochs": warmup, "patience": patience, "eval_every": every}
    return train.model_copy(update=update)


def of_same_steps(recipe: Recipe, images: int, fewer: int) -> Recipe:
    """Return the recipe for fewer images with the steps of that for ``images``; see ``same_steps``."""
    train = same_steps(recipe.train, images, fewer)
    losses = tuple(loss.over(train.epochs / recipe.train.epochs) for loss in recipe.losses)
    return recipe.model_copy(update={"train": train, "losses": losses})


def images_of(recipe: Recipe, shared: "SharedResources") -> tuple[int, int]:
    """Return how many training images have a label, and how many a run learns from in an epoch."""
    data = shared.index(recipe.data)
    others = 0 if data.unlabeled is None else len(data.unlabeled)
    return len(data.train), others if recipe.data.unlabeled_only else len(data.train) + others
