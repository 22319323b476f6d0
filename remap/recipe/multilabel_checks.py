"""Checks of ``task: multilabel``: what makes sense for one class an image alone is refused, with what works."""

from collections.abc import Iterator

from remap.backbones.names import is_pair
from remap.data import METRIC, MULTILABEL
from remap.recipe.schema import WORDS, LossSpec, Recipe
from remap.remapping import LOSSES
from remap.tuning import METHODS, parts_of

# Metrics of either task, and those of multilabel.
EITHER, OF_SETS = ("loss",), (METRIC[MULTILABEL], "f1_micro", "f1_macro")
# Methods that compare images by their one class, or answer with a distribution over classes.
_BY_CLASS = ("gps", "ease", "dual_head")


def multilabel_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is only for one class an image, and with one class an image what is only for several."""
    data, train, student, multilabel = recipe.data, recipe.train, recipe.student, recipe.data.multilabel
    if train.selects and (train.metric in OF_SETS) != multilabel and train.metric not in EITHER:
        allowed = (*OF_SETS, *EITHER) if multilabel else ("accuracy", "balanced_accuracy", "f1", "top5", *EITHER)
        yield f"train.metric: {train.metric} is not a metric of task {data.task} (allowed: {', '.join(allowed)})"
    if not multilabel:
        return
    refused = [loss.name for loss in recipe.losses if loss.name in LOSSES and not _learns_sets(loss)]
    if refused:
        works = ", ".join(row.name for row in LOSSES if row.multilabel)
        yield f"losses: {', '.join(refused)} cannot learn several classes an image (task multilabel takes {works})"
    for index, loss in enumerate(recipe.losses):
        for option, default in (("first_class", 0), ("scale", "remap")):
            if loss.options.get(option, default) != default:
                yield f"losses[{index}].{option}: is for one class an image (leave it out with task multilabel)"
    methods = [recipe.method.name, *(one.prepare for one in recipe.teachers if one.prepare in METHODS)]
    known = [part for name in methods for part in parts_of(name) if part in METHODS]
    unfit = [part for part in known if "words" in METHODS.row(part).needs or part in _BY_CLASS]
    if unfit or "class_mean" in str(recipe.method.options.values()):
        what = ", ".join(unfit) or f"{recipe.method.name} with init=class_mean"
        yield f"method: {what} is for one class an image (take another, such as lora or vpt_deep)"
    if data.source is None or recipe.label_free:
        yield f"task: {MULTILABEL} learns from labelled images with a classifier (set data.source, and add ce or kd)"
    given = {
        "data.target": data.target is not None,
        "data.subset": data.subset is not None,
        "data.only": data.only is not None,
        "data.known_classes": data.known_classes is not None,
        "data.memory": data.memory is not None,
        "data.classes, data.templates, data.descriptions": data.speaks,
        "train.fit": not train.by_steps and train.fit != "logistic",
        "train.class_weight_by": train.class_weight_by != "loss",
        "student.extends": student.extends is not None,
        "teacher.top_k": any(one.top_k is not None for one in recipe.teachers),
        "teacher.calibrate": any(one.calibrate for one in recipe.teachers),
        "teacher.balance": any(one.balance for one in recipe.teachers),
        "teacher.soften": any(one.soften for one in recipe.teachers),
        "teacher.overtaken": any(one.overtaken != "keep" for one in recipe.teachers),
        "teacher.joint": any(one.joint for one in recipe.teachers),
        "teacher.prepare": any(one.prepare == WORDS for one in recipe.teachers),
        "student.model": is_pair(student.model),
    }
    for key, unfit_value in given.items():
        if unfit_value:
            yield f"{key}: is for one class an image (leave it out with task {MULTILABEL})"


def _learns_sets(loss: LossSpec) -> bool:
    return bool(LOSSES.row(loss.name).multilabel) and (loss.name == "kd" or not loss.reads_logits)
