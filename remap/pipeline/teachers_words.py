"""The words of a vision-language teacher, for a student that answers in them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from remap.backbones.build import Backbone
from remap.language.pair import Language, language_of
from remap.network import Network
from remap.pipeline.class_words import read_words
from remap.pipeline.prepared_teacher import PreparedTeacher
from remap.progress import Progress
from remap.recipe.paths import is_run
from remap.recipe.schema import Recipe
from remap.tuning import METHODS, parts_of
from remap.tuning.prompt.promptkd import PromptKD


def lend_words(
    student: Backbone, teachers: Iterable[PreparedTeacher], recipe: Recipe, classes: Sequence[str], progress: Progress
) -> None:
    """Tell a vision-language student that answers in its teacher's words those of the first teacher that has some."""
    language = language_of(student.model)
    answers_so = any(issubclass(METHODS.load(part), PromptKD) for part in parts_of(recipe.method.name))
    if language is None or not answers_so or not classes:
        return
    pairs = [(teacher, theirs) for teacher in teachers if (theirs := language_of(teacher.network.model)) is not None]
    for teacher, theirs in pairs:
        if theirs.names:
            language.teacher = theirs
        elif is_run(teacher.spec.model):
            language.teacher = _of_run(teacher.network, theirs, classes)
        else:  # no loss reads its logits, so that it has no classifier
            read_words(theirs, recipe.data, classes, progress)
            language.teacher = theirs
        if language.teacher is not None:
            return
    if pairs:
        name = recipe.method.name
        progress.say(f"{name} answers in the student's own words: the teacher's classifier is not made of words alone")


def _of_run(network: Network, theirs: Language, classes: Sequence[str]) -> Language | None:
    """Return the words that a tuned run's classifier was made of; None where its answers are not those of words."""
    if any(METHODS.row(name).by_texts for name in network.attached.methods):
        return None
    tensors = {name.rpartition(".")[2]: tensor.detach().cpu() for name, tensor in network.head.items()}
    # Steps may have trained a constant for each class, which words do not have.
    if not torch.allclose(tensors["bias"], torch.full_like(tensors["bias"], theirs.bias)):
        return None
    return replace(theirs, names=tuple(classes), features_CE=tensors["weight"] / theirs.scale)
