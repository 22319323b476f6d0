"""Checks of the section ``data``: images that are missing or contradict each other, classes that nothing reads."""

from collections.abc import Iterator

from remap.backbones.names import is_pair
from remap.recipe.paths import is_run
from remap.recipe.schema import WORDS, Recipe
from remap.remapping import LOSSES


def target_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with adapting to another domain."""
    data = recipe.data
    losses = [
        loss.name for loss in recipe.losses if loss.name in LOSSES and LOSSES.row(loss.name).category == "domains"
    ]
    if data.target is None:
        if losses:
            yield f"losses: {', '.join(losses)}: there are no images of another domain (name them: data.target)"
        return
    others = {"unlabeled": data.unlabeled, "labels": data.labels, "unlabeled_only": data.unlabeled_only or None}
    if given := [f"data.{name}" for name, value in others.items() if value is not None]:
        yield f"data.target: {', '.join(given)} names images without labels of the same domain (leave one of them out)"
    if data.source is None:
        yield "data.target: there are no labelled images (set data.source; a finished run adapts by `remap adapt`)"
    if data.mixes:
        yield "data.target: images of two domains are not mixed (set data.mixup and data.cutmix to 0)"
    if recipe.choose_losses:
        yield "data.target: losses: auto tries none that adapts to another domain (name the losses)"
    if recipe.losses and recipe.needs_labels:
        yield "data.target: nothing would be learned from it (add mean_teacher, coral, mmd or infomax)"
    if recipe.brings_average and not data.augmentation.on:
        yield "data.augment: mean_teacher needs a view besides the plain image (set strong or light)"


def data_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with images with and without labels."""
    data, counting = recipe.data, [loss for loss in recipe.losses if loss.weight]
    if data.per_class_seed and data.per_class is None:
        yield "data.per_class_seed: all images are taken (set data.per_class, or leave data.per_class_seed out)"
    known = all(loss.name in LOSSES for loss in recipe.losses)
    if recipe.method.name == "ease" and (data.source is None or recipe.label_free):
        yield "method: ease answers by class means of labelled images, and there are none (take another)"
    if data.source is None:
        if data.unlabeled is None:
            yield "data.source: there are no images (set data.source, or data.unlabeled to learn without labels)"
        needed = ("val_source", "labels", "held_out", "per_class", "fold", "selection")
        for name in (*needed, "subset", "only", "known_classes"):
            if getattr(data, name) is not None and not (name == "val_source" and data.classes is not None):
                yield f"data.{name}: there are no labelled images (set data.source, or leave data.{name} out)"
        if not recipe.teachers and recipe.train.fit != "none":
            yield "data.unlabeled: nothing can be learned from images without labels alone (set teacher.model)"
        return
    if data.unlabeled_only and data.unlabeled is None and data.labels is None:
        yield "data.unlabeled_only: all images have labels (set data.unlabeled or data.labels)"
    elif (data.unlabeled is not None or data.unlabeled_only) and recipe.losses and recipe.needs_labels:
        yield (
            f"data.{'unlabeled_only' if data.unlabeled is None else 'unlabeled'}: nothing would be learned from the"
            " images without labels (add a teacher and a loss that needs none, such as kd)"
        )
    elif (
        data.unlabeled_only
        and counting
        and known
        and not (recipe.label_free or any(loss.reads_logits for loss in counting))
    ):
        yield "data.unlabeled_only: none of the losses trains the classifier without labels (add one on logits, say kd)"


def augment_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the views of images."""
    data = recipe.data
    on, given = data.augmentation.on, list(data.operations)
    if data.augment == "none" and given:
        yield f"data.{given[0]}: nothing is augmented (set data.augment=custom, or leave data.{given[0]} out)"
    elif data.augment == "none" and data.views is not None:
        yield "data.views: without augmentation an image has one view only (set data.augment, or leave data.views out)"
    elif data.augment != "none" and not on:
        yield f"data.augment: every operation of {data.augment} is off (set data.crop or another one, or augment=none)"
    if {"rand_augment", "trivial_augment"} <= set(on):
        yield "data.trivial_augment: RandAugment is on as well (set data.rand_augment.ops=0)"


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
