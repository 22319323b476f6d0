"""Checks across fields: names that must be in a table, combinations that cannot work, options of methods and losses."""

import re
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError

from remap.errors import RecipeError
from remap.recipe.data_checks import augment_problems, data_problems, target_problems, word_problems
from remap.recipe.multilabel_checks import multilabel_problems
from remap.recipe.option_listing import surely_valid
from remap.recipe.paths import is_run
from remap.recipe.problems import lines_of
from remap.recipe.schema import AUTO, Named, Recipe, StudentSpec
from remap.recipe.teacher_checks import folds_problems, teacher_problems
from remap.recipe.train_checks import train_problems
from remap.registry import choices, unknown_names
from remap.remapping import LOSSES
from remap.remapping.weights import INITS
from remap.tuning import METHODS, config_of, method_problems, parts_of


def name_problems(recipe: Recipe) -> list[str]:
    """Return names that are in no table, one line each."""
    wrong = {f"losses[{index}].name": one.name for index, one in enumerate(recipe.losses) if one.name not in LOSSES}
    unknown = [f"{', '.join(wrong)}: {unknown_names(LOSSES, wrong.values())}"] if wrong else []
    return [*method_problems("method.name", recipe.method.name), *unknown]


def combination_problems(recipe: Recipe) -> list[str]:
    """Return combinations that cannot work, one line each."""
    checks = (
        *(_loss_problems, teacher_problems, folds_problems, _init_problems, _shrink_problems),
        *(data_problems, target_problems, augment_problems, train_problems, word_problems),
        multilabel_problems,
    )
    return [problem for check in checks for problem in check(recipe)]


def require_held_out_once(recipe: Recipe) -> None:
    """Refuse to hold out two parts of the training images: each is drawn by itself, so images of one would be learned.

    Apart from ``combination_problems``: in a trial (losses: auto) both are the same images.

    Raises:
        RecipeError: What else holds images out.
    """
    others = {
        "losses: auto": recipe.choose_losses,
        "teacher.prepare: auto": any(one.prepare == AUTO for one in recipe.teachers),
        "teacher.calibrate": any(one.calibrate for one in recipe.teachers),
    }
    names = [name for name, given in others.items() if given]
    if names and recipe.data.held_out is not None:
        line = f"data.held_out: {' and '.join(names)} cannot hold out training images besides (leave data.held_out out)"
        raise RecipeError([line], recipe.name)


def _loss_problems(recipe: Recipe) -> Iterator[str]:
    names = [loss.name for loss in recipe.losses]
    known = all(name in LOSSES for name in names)  # nothing is known of what an unknown one would do
    counting = [loss for loss in recipe.losses if loss.weight]
    if not names and recipe.has_default_losses:  # each of them is idle
        yield (
            f"losses: no image has a label, and {recipe.method.name} changes nothing that a teacher without classes"
            " could teach (name labelled images with --data, or classes with --classes, or take another method)"
        )
    elif not names:
        yield "losses: at least one loss is needed"
    elif known and not counting:
        yield "losses: every weight is 0, nothing would be learned"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"losses: '{name}' is given twice"
    for index, loss in enumerate(recipe.losses):
        if loss.temperature_schedule is not None and loss.temperature_schedule.reaches_zero:
            yield f"losses[{index}].temperature_schedule: a temperature cannot be 0 (set start and end above 0)"
    for name in dict.fromkeys(loss.name for loss in recipe.losses if loss.is_idle(recipe.method.name)):
        method = recipe.method.name
        enlarges = any(METHODS.row(part).enlarges for part in parts_of(method) if part in METHODS)
        why = "enlarges the maps that it compares" if enlarges else "does not change what it compares"
        yield f"losses: {name} cannot teach {method}, which {why} (leave it out)"
    on_classes = [loss.name for loss in counting if loss.teaches_classes]
    if counting and known and not on_classes and not recipe.label_free:
        yield (
            "losses: none of them trains the classifier (add ce, or one on logits such as kd; for a backbone without a"
            " classifier name the images to learn from: data.unlabeled)"
        )
    if on_classes and recipe.data.unlabeled is not None and recipe.data.source is None and recipe.data.classes is None:
        read = "reads" if len(on_classes) == 1 else "read"
        yield (
            f"losses: {', '.join(on_classes)} {read} labels or logits of classes, and there are no labelled images"
            " (name some: data.source, or the classes that the teacher knows: data.classes, or take losses on features"
            " alone, such as feature and tokens)"
        )
    alone = ("labels", "domains")
    needing = [name for name in dict.fromkeys(names) if name in LOSSES and LOSSES.row(name).category not in alone]
    if needing and not recipe.named_teachers:
        need = "need" if len(needing) > 1 else "needs"
        do = "remap distill --teacher MODEL, in a recipe teacher.model; or use ce alone"
        yield f"losses: {', '.join(needing)} {need} a teacher ({do})"


def _shrink_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with cutting the student; whether its shape is smaller shows with the teacher opened."""
    spec, teacher = recipe.student.shrink, recipe.teacher
    if spec is None:
        return
    if teacher is None:
        yield "student: there is no teacher to shrink (set teacher.model)"
    elif teacher.is_student:
        yield f"student: the teacher '{teacher.model}' is made of the student, which cannot be cut from it"
    for name in ("weights", "preset"):
        if getattr(recipe.student, name) != StudentSpec.model_fields[name].default:
            yield f"student.{name}: a student that is shrunk has its teacher's weights (set teacher.{name})"
    yield from (f"student.shrink.{problem}" for problem in spec.idle_problems())
    if spec.width is not None and spec.heads is not None and spec.width % spec.heads:
        yield f"student.shrink.width: {spec.width} is not a multiple of heads {spec.heads}"


def _init_problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with starting the student from the teacher's weights: the first problem alone."""
    student, teacher = recipe.student, recipe.teacher
    if student.init is None:
        if student.force_init:
            yield "student.force_init: there is nothing to force (set student.init)"
        return
    name = student.init.name
    if name not in INITS:
        yield f"student.init: unknown initialisation '{name}'{choices(name, INITS.names, 'remappings')}"
    elif student.shrink is not None:
        yield f"student.init: a student that is cut from the teacher has its weights already (leave '{name}' out)"
    elif teacher is None:
        yield f"student.init: {name} needs a teacher (set teacher.model)"
    elif teacher.is_student:
        yield f"student.init: the teacher '{teacher.model}' has the student's own weights (name another teacher)"
    elif student.weights != "none" and not student.force_init:
        tuned = is_run(student.model)
        pretrained = not tuned and student.weights == "pretrained"
        given = student.model if tuned else student.weights
        lost = f"the pre-trained weights of {student.model}" if pretrained else f"the weights in {given}"
        random = "" if tuned else "or start from random ones: --set student.weights=none, "
        yield (
            f"student.init: {name} would overwrite {lost} (keep them: leave student.init out, {random}"
            "or give them up: --force-init)"
        )


def option_problems(recipe: Recipe) -> list[str]:
    """Return options that the class behind a name does not have. Imports the classes, and so torch, only in doubt."""
    problems = []
    method = recipe.method
    if not method_problems("method.name", method.name):
        sure = not method.options if "+" in method.name else surely_valid(METHODS, method.name, method.options)
        problems += [] if sure else _options_of("method", config_of(method.name), method)
    for index, loss in enumerate(recipe.losses):
        if loss.name in LOSSES and not (loss.has_default_options or surely_valid(LOSSES, loss.name, loss.options)):
            problems += _options_of(f"losses[{index}]", LOSSES.load(loss.name).Config, loss)
    init = recipe.student.init
    if init is not None and init.name in INITS and not surely_valid(INITS, init.name, init.options):
        problems += _options_of("student.init", INITS.load(init.name).Config, init)
    return problems


def schedule_problems(recipe: Recipe) -> Iterator[str]:
    """Yield schedules of temperatures of losses that have none, by their options. Imports the losses, and so torch."""
    for index, loss in enumerate(recipe.losses):
        if loss.temperature_schedule is None or loss.name not in LOSSES:
            continue
        key, kind = f"losses[{index}]", LOSSES.load(loss.name)
        if not _options_of(key, kind.Config, loss) and not kind.temperatures_of(kind.Config(**loss.options)):
            yield f"{key}.temperature_schedule: {loss.name} has no temperature here (leave it out)"


def _options_of(key: str, config: type[BaseModel], spec: Named) -> list[str]:
    try:
        config(**spec.options)
    except ValidationError as error:
        lines = lines_of(error, config, key, also=type(spec).model_fields)
        return [re.sub(r"(: unknown key.*) \(allowed:", rf"\1 (allowed for {spec.name}:", line) for line in lines]
    return []
