"""Refuse to hold out so many of few labelled images that a class has none left to learn from."""

from collections.abc import Iterator

from remap.data.balance import classes_only_in
from remap.errors import DataError
from remap.pipeline.shared import SharedResources
from remap.pipeline.teacher_tuning import data_of_teacher
from remap.pipeline.trials import HELD_OUT
from remap.recipe.schema import DataSpec, Recipe


def require_each_class(recipe: Recipe, shared: SharedResources) -> None:
    """Look at the images that the student, the trials of a run, and teachers with a fitted temperature learn from.

    Raises:
        DataError: Every labelled image of a class is held out.
    """
    for spec in _parts(recipe):
        data = shared.index(spec)
        held = [data.selection] if data.selection is not None else []
        if spec.held_out is not None or (spec.fold is not None and spec.fold.evaluates):
            held.append(data.val)
        if names := classes_only_in(held, data.train, data):
            raise DataError(
                "all labelled images of a class would be held out, and none learned from",
                given=f"{', '.join(names[:10])}; {len(data.train)} labelled images besides those held out",
                do="label another image of each such class, or leave out what holds images out: train.keep=best,"
                " train.patience, data.held_out, teacher.calibrate, losses: auto, a search or ranking",
            )


def _parts(recipe: Recipe) -> Iterator[DataSpec]:
    if recipe.data.source is not None:
        yield recipe.data
        if recipe.choose_losses:
            yield recipe.data.model_copy(update={"held_out": recipe.data.held_out or HELD_OUT, "selection": None})
        for spec in recipe.teachers:
            if spec.calibrate:
                yield from (data_of_teacher(recipe, spec, fold) for fold in range((spec.folds or 0) + 1))
