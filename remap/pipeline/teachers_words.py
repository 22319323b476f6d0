"""The words of a vision-language teacher, for a student that answers in them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from remap.backbones.build import Backbone
from remap.language.pair import language_of
from remap.pipeline.class_words import read_words
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import Recipe
from remap.tuning import METHODS, parts_of


def lend_words(
    student: Backbone, teachers: Iterable[PreparedTeacher], recipe: Recipe, classes: Sequence[str], progress: Progress
) -> None:
    """Tell a vision-language student the words of its first teacher that reads words."""
    language = language_of(student.model)
    by_texts = any(METHODS.row(part).by_texts for part in parts_of(recipe.method.name))
    if language is None or not by_texts or not classes:
        return
    for teacher in teachers:
        theirs = language_of(teacher.network.model)
        if theirs is None:
            continue
        if not theirs.names and is_run(teacher.spec.model):
            # A run's classifier is what was made of the words, unless its method answers in another way.
            if any(METHODS.row(name).by_texts for name in teacher.network.attached.methods):
                continue
            (weight_CE,) = (tensor for name, tensor in teacher.network.head.items() if name.endswith("weight"))
            theirs = replace(theirs, names=tuple(classes), features_CE=weight_CE.detach().cpu() / theirs.scale)
        elif not theirs.names:  # no loss reads its logits, so that it has no classifier
            read_words(theirs, recipe.data, classes, progress)
        language.teacher = theirs
        return
