"""Checks of teachers: how they are prepared, options that do not fit them, and outputs that cannot be cached."""

from collections.abc import Iterator

from remap.io.human_size import number_of
from remap.recipe.schema import AUTO, EMA, OF_OTHERS, WORDS, DataSpec, Recipe, TeacherSpec
from remap.registry import choices
from remap.remapping import LOSSES
from remap.tuning import METHODS, method_problems


def teacher_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the teachers."""
    for key, spec in _teachers(recipe):
        yield from _preparation_problems(key, spec)
        if spec.is_student or spec.joint or not any(loss.reads_logits for loss in recipe.losses):
            given = (name for name in ("calibrate", "balance", "soften") if getattr(spec, name))
            why = "is for the logits of a teacher that stays as it was prepared (leave it out)"
            yield from (f"{key}.{name}: {why}" for name in given)
        if spec.calibrate and recipe.choose_losses:
            why = "losses: auto judges its trials by the images that the temperature would be fitted on"
            yield f"{key}.calibrate: {why} (name the losses, or leave it out)"
        if spec.joint:
            yield from _joint_problems(f"{key}.joint", spec, recipe)
        yield from _fade_problems(f"{key}.overtaken", spec, recipe)
        if spec.classes is not None and spec.prepare != "none":
            yield f"{key}.classes: is for the teacher's own classifier (set {key}.prepare=none)"
        yield from _cache_problems(key, spec, recipe)


def _fade_problems(key: str, spec: TeacherSpec, recipe: Recipe) -> Iterator[str]:
    """Yield why a teacher cannot lose weight to its student."""
    on_labels = [loss for loss in recipe.losses if loss.name in LOSSES and LOSSES.row(loss.name).category == "labels"]
    if spec.overtaken == "keep":
        return
    if spec.is_student or spec.joint:
        yield f"{key}: the teacher '{spec.model}' is made of the student or learns with it (leave it out)"
    elif not any(loss.weight for loss in on_labels):
        yield f"{key}: without a loss on labels nothing would be left to learn (add ce, or leave it out)"
    elif not any(loss.reads_logits for loss in recipe.losses):
        yield f"{key}: no loss reads logits, so the teacher has no accuracy to compare (add kd, or leave it out)"


def _cache_problems(key: str, spec: TeacherSpec, recipe: Recipe) -> Iterator[str]:
    """Yield why outputs cannot be cached as the recipe says."""
    if spec.keeps_less and spec.cache in ("memory", "off"):
        yield f"{key}.cache: top_k and cache_dtype are for outputs on disk, not for '{spec.cache}'"
    if spec.cache in ("memory", "disk") and (changing := what_changes(spec, recipe.data)):
        yield f"{key}.cache: nothing can be cached, since {changing}"
    if spec.top_k is not None and (names := [loss.name for loss in recipe.losses if loss.compares_logits]):
        yield f"{key}.top_k: {', '.join(names)} compares logits of images, and probabilities are stored (leave it out)"


def _preparation_problems(key: str, spec: TeacherSpec) -> Iterator[str]:
    """Yield why a teacher cannot be given its head as named."""
    if spec.is_student:
        yield from _self_teacher_problems(key, spec)
    elif "+" in spec.prepare or "," in spec.prepare:
        yield from method_problems(f"{key}.prepare", spec.prepare)
    elif spec.prepare not in (allowed := ("probe", AUTO, "none", WORDS, *METHODS.names)):
        yield f"{key}.prepare: unknown word '{spec.prepare}'{choices(spec.prepare, allowed, 'methods')}"
    if spec.prepare == AUTO:
        given = [name for name in ("calibrate", "folds") if getattr(spec, name)]
        yield from (f"{key}.{name}: holds images out, as {key}.prepare=auto does (name the way)" for name in given)


def folds_problems(recipe: Recipe) -> Iterator[str]:
    """Yield why images cannot be answered by teachers that were prepared without them."""
    for key, spec in _teachers(recipe):
        if spec.folds is not None:
            yield from _fold_problems(f"{key}.folds", spec, recipe)


def _fold_problems(folds: str, spec: TeacherSpec, recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if spec.is_student or spec.joint:
        kind = "made of the student" if spec.is_student else "trained along with it"
        yield f"{folds}: a teacher that is {kind} has no folds (leave it out)"
        return
    if spec.prepare in ("none", WORDS):
        yield f"{folds}: prepare={spec.prepare} learns from no labelled image (leave it out, or set prepare=probe)"
    if not any(loss.reads_logits for loss in recipe.losses):
        yield f"{folds}: no loss reads logits, so the teacher is not prepared (leave it out)"
    if data.source is None or data.unlabeled_only:
        yield f"{folds}: the student learns from no image with a label, and no other has a fold (leave it out)"
    if data.fold is not None:
        yield f"data.fold: {folds} sets it for its teachers (leave one of them out)"
    if changing := what_changes(spec, data):
        yield f"{folds}: each image's own teacher answers before training, but {changing}"
    if spec.cache == "off":
        yield f"{folds}: each image's own teacher answers before training, and cache=off stores nothing (set auto)"
    if recipe.choose_losses and spec.prepare not in ("none", "probe", WORDS):
        yield f"{folds}: losses: auto would tune {spec.folds} more teachers for its trials (name the losses)"


def _teachers(recipe: Recipe) -> Iterator[tuple[str, TeacherSpec]]:
    several = len(recipe.teachers) > 1
    yield from ((f"teachers[{number}]" if several else "teacher", spec) for number, spec in enumerate(recipe.teachers))


def idle_options(recipe: Recipe, processes: int) -> Iterator[str]:
    """Yield options that others leave without effect or cut short, which is not an error: recipes of earlier runs do.

    Args:
        processes: How many the run has.
    """
    for key, spec in _teachers(recipe):
        if spec.prepare in ("none", "probe", WORDS) and not spec.joint:
            given = [f"{key}.{name}" for name in ("epochs", "lr") if getattr(spec, name) is not None]
            yield from (f"{name} has no effect: {key}.prepare={spec.prepare} tunes nothing" for name in given)
        if spec.cache == "auto" and (changing := what_changes(spec, recipe.data)):
            given = [name for name in ("top_k", "cache_dtype") if getattr(spec, name) != _default(name)]
            yield from (f"{key}.{name} has no effect: nothing is cached, since {changing}" for name in given)
        if spec.decay != _default("decay") and spec.model != EMA:
            yield f'{key}.decay has no effect: it is of the teacher "{EMA}", not of {spec.model}'
        if spec.shard == "on" and processes == 1:
            yield f"{key}.shard has no effect: there is one process, which has all weights"
        if spec.weight != 1.0 and len(recipe.named_teachers) == 1 and spec in recipe.named_teachers:
            yield f"{key}.weight has no effect: it is the only teacher (set the weight of a loss)"
    for loss in recipe.losses:
        schedules = {"weight_schedule": loss.weight_schedule, "temperature_schedule": loss.temperature_schedule}
        for key, schedule in schedules.items():
            if schedule is not None and schedule.warmup_epochs > recipe.train.epochs:
                epochs = f"the run of {number_of(recipe.train.epochs, 'epoch')} ends before it"
                yield f"losses.{loss.name}.{key}: {epochs} (warmup_epochs: {schedule.warmup_epochs:g})"
    if recipe.data.mix_probability != 1 and not recipe.data.mixes:
        yield "data.mix_probability has no effect: data.mixup and data.cutmix are 0"


def _default(name: str) -> object:
    return TeacherSpec.model_fields[name].default


def _self_teacher_problems(key: str, spec: TeacherSpec) -> Iterator[str]:
    """Yield options that a teacher made of the student does not have."""
    for name in OF_OTHERS:
        if getattr(spec, name) is not None:
            yield f"{key}.{name}: the teacher '{spec.model}' does not have this option (leave it out)"
    if spec.prepare != "probe":
        yield f"{key}.prepare: the teacher '{spec.model}' cannot be prepared by '{spec.prepare}' (leave it out)"
    if spec.shard != "auto":
        yield f"{key}.shard: the teacher '{spec.model}' is sharded with the student (set train.parallel)"
    if spec.weights != "pretrained":
        yield f"{key}.weights: the teacher '{spec.model}' has the student's weights (leave it out)"


def _joint_problems(key: str, spec: TeacherSpec, recipe: Recipe) -> Iterator[str]:
    """Yield why a teacher cannot be trained along with the student."""
    if recipe.method.name != "slad":
        yield f"{key}: only the adapters of slad have a part to share, not {recipe.method.name} (--method slad)"
    if spec.is_student:
        yield f"{key}: the teacher '{spec.model}' is made of the student (name another model)"
    if recipe.label_free or not any(loss.reads_logits for loss in recipe.losses if loss.name in LOSSES):
        yield f"{key}: it learns from labels, so it needs a classifier (add a loss on its logits, say kd, and labels)"
    if recipe.train.parallel == "fsdp2" or spec.shard == "on":
        yield f"{key}: shared cores cannot be sharded (set train.parallel=ddp, and leave {key[:-6]}.shard out)"


def what_changes(spec: TeacherSpec, data: DataSpec) -> str | None:
    """Return why a teacher's outputs cannot be cached, and what to do; None if they can."""
    if spec.model == EMA:
        return "the running average of the student changes in every step (leave it out)"
    if spec.joint:
        return "a joint teacher learns in every step (leave it out)"
    if data.mixes:
        return "mixed images are new in every epoch (set data.mixup and data.cutmix to 0)"
    if data.augment != "none" and data.views is None:
        return "views are new in every epoch (set data.augment=none, or a number of views: data.views=4)"
    return None
