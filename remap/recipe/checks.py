"""Checks across fields: names that must be in a table, combinations that cannot work, options of methods and losses."""

from pydantic import BaseModel, ValidationError

from remap.recipe.paths import is_run
from remap.recipe.problems import lines_of
from remap.recipe.schema import EMA, OF_OTHERS, DataSpec, Named, Recipe, StudentSpec, TeacherSpec
from remap.registry import did_you_mean
from remap.remapping import LOSSES
from remap.remapping.weights import INITS
from remap.tuning import METHODS, combination_problems, config_of, parts_of


def name_problems(recipe: Recipe) -> list[str]:
    """Names that are in no table, and combinations that cannot work, one line each."""
    problems = []
    problems += method_problems("method.name", recipe.method.name)
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name not in LOSSES:
            problems.append(
                f"losses[{index}].name: unknown loss '{loss.name}'{did_you_mean(loss.name, LOSSES.names)}"
                f" (allowed: {', '.join(LOSSES.names)})"
            )
    return problems + _combination_problems(recipe)


def method_problems(place: str, method: str) -> list[str]:
    """What is wrong with a method's name or combination."""
    parts = parts_of(method)
    if len(parts) > 1 and not all(parts):
        where = "after" if parts[0] else "before"
        return [f"{place}: a name is missing {where} '+' in '{method}'"]
    listed = [word.strip() for word in method.split(",")]
    if len(listed) > 1 and all(word in METHODS for word in listed):
        return [f"{place}: '{method}' is a list; did you mean '{'+'.join(listed)}', one combination of them?"]
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        return [
            f"{place}: unknown method '{part}'{did_you_mean(part, METHODS.names)} (allowed: {', '.join(METHODS.names)})"
            for part in unknown
        ]
    return [f"{place}: {problem}" for problem in combination_problems(method)]


def _combination_problems(recipe: Recipe) -> list[str]:
    problems = []
    names = [loss.name for loss in recipe.losses or ()]
    known = all(name in LOSSES for name in names)  # what an unknown one would do is not known either
    if not names:
        problems.append("losses: at least one loss is needed")
    elif known and all(not loss.weight for loss in recipe.losses):
        problems.append("losses: every weight is 0, nothing would be learned")
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"losses: '{name}' is given twice")
    problems += [
        f"losses: {name} cannot teach {recipe.method.name}, which leaves what it compares as it is (leave it out)"
        for name in dict.fromkeys(loss.name for loss in recipe.losses or () if loss.is_idle(recipe.method.name))
    ]
    needing = [name for name in dict.fromkeys(names) if name in LOSSES and LOSSES.row(name).category != "labels"]
    counting = [loss for loss in recipe.losses or () if loss.weight]
    if counting and known and not any(loss.teaches_classes for loss in counting):
        problems.append("losses: none of them trains the classifier (add ce, or one on logits such as kd)")
    if recipe.teacher is None and needing:
        need = "need" if len(needing) > 1 else "needs"
        problems.append(f"losses: {', '.join(needing)} {need} a teacher (set teacher.model, or keep to ce)")
    problems += _teacher_problems(recipe)
    problems += _init_problems(recipe)
    problems += _shrink_problems(recipe)
    data = recipe.data
    if data.views is not None and data.augment == "none":
        problems.append(
            "data.views: without augmentation an image has one view only (set data.augment, or leave data.views out)"
        )
    if data.unlabeled_only and data.unlabeled is None and data.labels is None:
        problems.append("data.unlabeled_only: all images have labels (set data.unlabeled or data.labels)")
    elif (data.unlabeled is not None or data.unlabeled_only) and names and recipe.needs_labels:
        problems.append(
            f"data.{'unlabeled_only' if data.unlabeled is None else 'unlabeled'}: nothing would be learned from the"
            f" images without labels (add a teacher and a loss that needs none, such as kd)"
        )
    elif data.unlabeled_only and counting and known and not any(loss.reads_logits for loss in counting):
        problems.append(
            "data.unlabeled_only: none of the losses trains the classifier without labels (add one on logits, say kd)"
        )
    if recipe.train.warmup_epochs is not None and recipe.train.warmup_epochs >= recipe.train.epochs:
        problems.append(
            f"train.warmup_epochs: {recipe.train.warmup_epochs} must be less than train.epochs {recipe.train.epochs}"
        )
    if recipe.train.batch_size % recipe.train.accumulation:
        problems.append(
            f"train.batch_size: {recipe.train.batch_size} is not a multiple of accumulation {recipe.train.accumulation}"
        )
    return problems


def _teacher_problems(recipe: Recipe) -> list[str]:
    if recipe.teacher is None and recipe.more_teachers:
        return ["more_teachers: there is no first teacher (list them all under teacher)"]
    problems = []
    for number, spec in enumerate(recipe.teachers):
        place = f"more_teachers[{number - 1}]" if number else "teacher"
        allowed = ("probe", "none", *METHODS.names)
        strange = [name for name in OF_OTHERS if spec.is_student and getattr(spec, name) is not None]
        problems += [f"{place}.{name}: the teacher '{spec.model}' takes none (leave it out)" for name in strange]
        if spec.is_student and spec.shard != "auto":
            problems.append(f"{place}.shard: the teacher '{spec.model}' goes with the student (set train.parallel)")
        if spec.keeps_less and spec.cache in ("memory", "off"):
            problems.append(f"{place}.cache: top_k and cache_dtype are for outputs on disk, not for '{spec.cache}'")
        if spec.is_student and spec.prepare != "probe":
            problems.append(f"{place}.prepare: the teacher '{spec.model}' takes no '{spec.prepare}' (leave it out)")
        elif "+" in spec.prepare or "," in spec.prepare:
            problems += method_problems(f"{place}.prepare", spec.prepare)
        elif spec.prepare not in allowed:
            problems.append(
                f"{place}.prepare: unknown word '{spec.prepare}'"
                f"{did_you_mean(spec.prepare, allowed)} (allowed: {', '.join(allowed)})"
            )
        if spec.cache in ("memory", "disk"):
            changing = what_changes(spec, recipe.data)
            problems += [f"{place}.cache: nothing can be kept, since {changing}"] if changing else []
        if spec.is_student and spec.weights != "pretrained":
            problems.append(f"{place}.weights: the teacher '{spec.model}' has the student's weights")
    return problems


def what_changes(spec: TeacherSpec, data: DataSpec) -> str | None:
    """Why a teacher's outputs are never asked for twice, and what would mend it; None where they can be kept."""
    if spec.model == EMA:
        return "the running average of the student changes in every step (leave it out)"
    if data.mixes:
        return "mixed images are new in every epoch (set data.mixup and data.cutmix to 0)"
    if data.augment != "none" and data.views is None:
        return "views are new in every epoch (set data.augment=none, or a closed list of them: data.views=4)"
    return None


def _shrink_problems(recipe: Recipe) -> list[str]:
    """A student that is cut from its teacher; whether the shape is smaller shows when the teacher is opened."""
    spec, teacher = recipe.student.shrink, recipe.teacher
    if spec is None:
        return []
    problems = []
    if teacher is None:
        problems.append("student: there is no teacher to shrink (set teacher.model)")
    elif teacher.is_student:
        problems.append(f"student: the teacher '{teacher.model}' is made of the student, which cannot be cut from it")
    for name in ("weights", "preset"):
        if getattr(recipe.student, name) != StudentSpec.model_fields[name].default:
            problems.append(f"student.{name}: a student that is shrunk has its teacher's weights (set teacher.{name})")
    if spec.width is not None and spec.heads is not None and spec.width % spec.heads:
        problems.append(f"student.shrink.width: {spec.width} is not a multiple of heads {spec.heads}")
    return problems


def _init_problems(recipe: Recipe) -> list[str]:
    """What is wrong with starting the student from the teacher's weights."""
    student, teacher = recipe.student, recipe.teacher
    if student.init is None:
        return ["student.force_init: there is nothing to force (set student.init)"] if student.force_init else []
    name = student.init.name
    if name not in INITS:
        allowed = f"(allowed: {', '.join(INITS.names)})"
        return [f"student.init: unknown initialisation '{name}'{did_you_mean(name, INITS.names)} {allowed}"]
    if student.shrink is not None:
        return [f"student.init: a student that is cut from the teacher has its weights already (leave '{name}' out)"]
    if teacher is None:
        return [f"student.init: {name} needs a teacher (set teacher.model)"]
    if teacher.is_student:
        return [f"student.init: the teacher '{teacher.model}' has the student's own weights (name another teacher)"]
    if student.weights == "none" or student.force_init:
        return []
    if is_run(student.model) or student.weights != "pretrained":
        lost = f"the weights in {student.model if is_run(student.model) else student.weights}"
    else:
        lost = f"the pre-trained weights of {student.model}"
    random = "" if is_run(student.model) else "or start from random ones: --set student.weights=none, "
    return [
        f"student.init: {name} would overwrite {lost} (keep them: leave student.init out, {random}"
        "or give them up: --force-init)"
    ]


def option_problems(recipe: Recipe) -> list[str]:
    """Options the class behind a name does not take. Imports the classes, and so torch."""
    problems = []
    if not method_problems("method.name", recipe.method.name):
        problems += _options_of("method", config_of(recipe.method.name), recipe.method)
    for index, loss in enumerate(recipe.losses or ()):
        if loss.name in LOSSES:
            problems += _options_of(f"losses[{index}]", LOSSES.load(loss.name).Config, loss)
    init = recipe.student.init
    if init is not None and init.name in INITS:
        problems += _options_of("student.init", INITS.load(init.name).Config, init)
    return problems


def _options_of(place: str, config: type[BaseModel], spec: Named) -> list[str]:
    try:
        config(**spec.options)
    except ValidationError as error:
        return lines_of(error, config, place, also=type(spec).model_fields)
    return []
