"""Checks of what classes are called: words that nothing reads, and teachers that cannot know the classes."""

from collections.abc import Iterator

from remap.backbones.names import is_pair
from remap.recipe.paths import is_run
from remap.recipe.schema import WORDS, Recipe


def word_problems(recipe: Recipe) -> Iterator[str]:
    """Yield where nothing reads what classes are called, or no teacher can know them."""
    data, pairs = recipe.data, [spec for spec in (*recipe.teachers, recipe.student) if is_pair(spec.model)]
    if data.speaks and not pairs and (data.source is not None or data.model_copy(update={"classes": None}).speaks):
        yield (
            "data.classes, data.templates, data.descriptions: no vision-language model reads them (name one: --teacher"
            " clip:NAME, or leave them out)"
        )
    for spec in recipe.teachers:
        if is_pair(spec.model) and spec.prepare == "none":
            yield f"teacher.prepare: {spec.model} brings no classifier (leave it out: its head is made of words)"
        if spec.prepare == WORDS and not is_pair(spec.model):
            yield f"teacher.prepare: {spec.model} reads no words (name a vision-language model: clip:NAME)"
    if data.source is None and data.classes is not None and recipe.label_free:
        yield "data.classes: no loss is about classes (add one on logits, say kd, or leave it out)"
    elif data.source is None and data.classes is not None:
        if recipe.needs_labels and recipe.losses and recipe.train.fit != "none":
            yield "losses: none of them learns from images without labels (add one on a teacher's logits, say kd)"
        for spec in recipe.teachers:
            needs_labels = spec.prepare not in ("none", WORDS) and not is_run(spec.model) and not spec.is_student
            if (needs_labels or spec.calibrate) and any(loss.reads_logits for loss in recipe.losses):
                what = "calibrate" if spec.calibrate else "prepare"
                yield (
                    f"teacher.{what}: there are no labelled images (take a teacher that knows the classes:"
                    " clip:NAME, a run, or a classifier with these classes and prepare=none)"
                )
