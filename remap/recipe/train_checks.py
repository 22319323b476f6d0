"""Checks of the training section: options that exclude each other, or that have nothing to act on."""

from collections.abc import Iterator

from remap.backbones.names import is_pair
from remap.errors import RecipeError
from remap.io.human_size import number_of
from remap.recipe.paths import is_run
from remap.recipe.schema import Recipe
from remap.remapping import LOSSES
from remap.tuning import METHODS, parts_of


def require_rate(recipe: Recipe) -> None:
    """Refuse to train by another optimiser at a rate that a method has for AdamW.

    Apart from ``train_problems``: a range test needs no rate.

    Raises:
        RecipeError: There is none.
    """
    train = recipe.train
    if train.optimizer != "adamw" and train.lr is None and train.base_lr is None:
        line = f"train.lr: the methods' own rates are for adamw (set one for {train.optimizer}; `remap lr` suggests it)"
        raise RecipeError([line], recipe.name)


def require_no_processes(recipe: Recipe, command: str) -> None:
    """Refuse a number of processes for a command that runs in one.

    Apart from ``train_problems``: a run may have them.

    Raises:
        RecipeError: Names both.
    """
    if (count := recipe.train.processes) not in (None, 1):
        line = f"train.processes: {command} runs in one process, not in {count} (set train.processes=null)"
        raise RecipeError([line], recipe.name)


def train_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the section ``train``, alone or with others."""
    train = recipe.train
    if recipe.choose_losses and (not recipe.teachers or recipe.label_free or recipe.data.source is None):
        yield "losses: auto chooses among losses with a teacher by labelled images (name both, or the losses)"
    if recipe.baseline and not recipe.teachers:
        yield "baseline: a run without a teacher learns from labels alone already (set teacher.model, or leave it out)"
    if train.warmup_epochs is not None and train.warmup_epochs >= train.epochs:
        yield f"train.warmup_epochs: {train.warmup_epochs} must be less than train.epochs {train.epochs}"
    if train.lr is not None and train.base_lr is not None:
        yield "train.base_lr: train.lr is the rate at any width (leave one of the two out)"
    if train.by_steps and train.lr is not None and train.min_lr > train.lr:
        yield f"train.min_lr: {train.min_lr:g} is above the peak, train.lr {train.lr:g}: the rate would not fall"
    if recipe.data.selection is not None and not train.selects and train.align != "bias":
        yield "data.selection: nothing is chosen by it (set train.keep=best or train.patience, or leave it out)"
    if train.selects:
        yield from _choice_problems(recipe)
    if train.checkpoint_blocks and train.compile not in (False, "auto"):
        yield "train.checkpoint_blocks: compiled blocks save memory in their own way (leave one of the two out)"
    if train.parallel == "fsdp2" and train.optimizer not in ("adamw", "sgd"):
        yield f"train.optimizer: {train.optimizer} may need complete tensors (take adamw or sgd with fsdp2)"
    yield from _balance_problems(recipe)
    yield from _fit_problems(recipe)
    yield from _extension_problems(recipe)
    if train.metric != "accuracy" and not train.selects:
        yield "train.metric: nothing is chosen by it (set train.keep=best or train.patience, or leave it out)"
    yield from _batch_problems(recipe)


def _batch_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why a step cannot be divided among processes and micro-batches."""
    train = recipe.train
    if train.batch_size % train.accumulation:
        yield f"train.batch_size: {train.batch_size} is not a multiple of accumulation {train.accumulation}"
    elif train.batch_size < (processes := train.processes or 1) * train.accumulation:
        each = f"each with {number_of(train.accumulation, 'micro-batch', 'micro-batches')} (train.accumulation)"
        yield f"train.batch_size: {train.batch_size} is too few for {processes} processes (--devices), {each}"


def _choice_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why an epoch cannot be chosen by the classifier that it ends with."""
    key = "train.keep, train.patience"
    if recipe.label_free:
        yield f"{key}: a student without a classifier has no accuracy to go by (leave them out)"
    for name, on in (("train.align", recipe.train.align), ("method ease", recipe.method.name == "ease")):
        if on:
            yield f"{key}: {name} changes the classifier after the epochs are judged (leave them out)"


def _fit_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what a classifier that is fitted at once, or left as it is, cannot follow."""
    train, student, method, key = recipe.train, recipe.student, recipe.method.name, f"train.fit: {recipe.train.fit}"
    if train.by_steps:
        return
    names = ", ".join(loss.name for loss in recipe.losses if loss.name != "ce")
    if recipe.teachers or names:
        learns = "learns from labels alone" if train.fit != "none" else "learns nothing"
        yield f"{key} {learns} (leave the teacher and {names or 'its losses'} out)"
    if (recipe.data.source is None and train.fit != "none") or recipe.data.augment != "none" or recipe.data.mixes:
        yield f"{key} sees each labelled image once, as it is (leave augmentation and mixing out)"
    rows = [METHODS.row(part) for part in parts_of(method) if part in METHODS]
    if train.fit != "none" and any(row.by_texts or "words" in row.needs for row in rows):
        yield f"{key} fits a classifier, and {method} does not answer by it (train by steps, or take another method)"
    if train.fit == "none" and not (is_pair(student.model) or is_run(student.model) or student.extends):
        yield f"{key} leaves {student.model} a random classifier (name one that reads words: clip:NAME)"
    if train.fit == "logistic" and student.extends is not None:
        yield f"{key} knows the new images alone (take ridge or prototypes, which keep what they counted before)"
    if recipe.data.memory is not None:
        yield f"{key} counts each image once, and knows the old ones (leave data.memory out)"
    if train.selects or train.ema is not None or train.class_weight_power:
        yield f"{key} has no epochs to choose or average, nor weights of classes (leave them out)"


def _extension_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is only for a run that extends another, or for a fit that is not asked for."""
    train, student = recipe.train, recipe.student
    if train.ridge is not None and train.fit != "ridge":
        yield "train.ridge: nothing is fitted by ridge regression (set train.fit=ridge, or leave it out)"
    if train.align and (student.extends is None or not train.by_steps):
        yield "train.align: there are no rows of new classes that steps have trained (set student.extends)"
    if train.align == "bias" and recipe.data.memory is None:
        yield "train.align: bias is fitted on held-out images of a memory, and there is none (name its size: --memory)"
    if student.extends is None and recipe.method.options.get("session"):
        yield "method.session: a later session learns beside what a run has learned before (name it: `remap extend`)"
    if student.extends is not None and (student.init is not None or student.shrink is not None):
        yield "student.extends: the student has the weights of that run (leave init and shrink out)"


def _balance_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why classes of different sizes cannot be weighted so."""
    data, train, key = recipe.data, recipe.train, "train.class_weight_by"
    on_labels = [loss for loss in recipe.losses if loss.name in LOSSES and LOSSES.row(loss.name).category == "labels"]
    if train.class_weight_power == 0.0:
        if train.class_weight_by != "loss":
            yield f"{key}: all classes count alike (set train.class_weight_power, or leave {key} out)"
    elif recipe.label_free:
        yield "train.class_weight_power: no loss is about classes (leave it out)"
    elif recipe.choose_losses and train.class_weight_by == "loss":
        yield f"train.class_weight_power: losses: auto may choose none that reads labels (set {key}=sampling)"
    elif train.class_weight_by == "loss":
        if not any(loss.weight for loss in on_labels):
            yield f"train.class_weight_power: none of the losses reads labels (add ce, or set {key}=sampling)"
    elif data.unlabeled is not None or data.labels is not None or data.target is not None:
        yield f"{key}: the class of images without labels is not known (set {key}=loss)"
    elif data.mixes:
        yield f"{key}: an image that is drawn twice cannot be mixed with two others (set data.mixup and cutmix to 0)"
