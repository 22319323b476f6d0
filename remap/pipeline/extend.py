"""``remap extend``: a finished run learns new classes, or a new look of those it knows, as a run of its own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remap.backbones.names import is_pair
from remap.errors import RecipeError
from remap.io import atomic_write
from remap.io.paths import absolute
from remap.language.words import entries
from remap.pipeline.choose_memory import Choice, choose_memory
from remap.pipeline.run import Result, start
from remap.pipeline.run_path import run_path
from remap.pipeline.session_advice import ALONE, AT_ONCE, METHOD_WAYS, WAYS, WITH_MEMORY, Situation, situation
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve
from remap.recipe.named import loss_words
from remap.recipe.overrides import of_settings
from remap.recipe.problems import checked
from remap.recipe.schema import DataSpec
from remap.runs.run_dir import RunDir, default_path
from remap.runs.task import beside
from remap.runs.task_file import folder_of, read_meta
from remap.tuning import config_of, parts_of

# Temperature of the old answers, as in Li and Hoiem 2016 (arXiv 1606.09282).
TEMPERATURE = 2.0


def extension_recipe(
    found: Situation, way: str, settings: Iterable[str] = (), memory: Path | None = None, **words: Any
) -> Recipe:
    """Return the recipe of the run that extends another.

    Args:
        memory: A file of old images to learn from as well.
        words: Options of the command line: epochs, lr, batch_size, seed.

    Raises:
        RecipeError: An option cannot be used.
    """
    _require_fit(found, way, words)
    run, folder = found.old.run, folder_of(found.old.run.path)
    meta, old = read_meta(folder), run.recipe()
    values = old.model_dump(mode="json")
    at_once = way in AT_ONCE
    method: dict[str, Any] = {"name": meta.method.name, **meta.method.options}
    if way == "ranpac" and "ranpac" not in parts_of(meta.method.name):
        alone, several = meta.method.name == "linear", len(parts_of(meta.method.name)) > 1
        by_part = meta.method.options if several else {meta.method.name: meta.method.options}
        options = {} if alone else {**by_part, "ranpac": {}}
        method = {"name": "ranpac" if alone else f"{meta.method.name}+ranpac", **options}
    elif not at_once and "session" in config_of(meta.method.name).model_fields:
        method["session"] = len(found.sessions)
    # Pixels are read as the old run read them, on which its features rest.
    kept = ("alpha", "value_range", "max_megapixels", "decode", "max_bad", "skip_bad", "memory_gib", "workers")
    looks = {} if at_once else {name: values["data"][name] for name in ("augment", *old.data.operations, "views")}
    # Only what the caller set: defaults would override what the old run was given.
    images = found.data.model_dump(mode="json", exclude_unset=True)
    data = {name: values["data"][name] for name in kept} | looks | images
    # The range that the old task scales by, also where the old run found it from its images.
    if meta.view.pixels.value_range is not None:
        data["value_range"] = list(meta.view.pixels.value_range)
    # A task that holds its backbone brings all of its weights.
    weights = "none" if meta.holds_backbone else meta.backbone.weights
    student: dict[str, Any] = {"model": beside(folder, meta.backbone.model), "weights": weights}
    student |= {"preset": meta.backbone.preset, "image_size": meta.backbone.image_size}
    student["extends"] = absolute(str(run.path))
    if is_pair(student["model"]):  # which reads what classes are called
        data = {name: values["data"][name] for name in ("templates", "descriptions")} | data
        if old.data.classes is not None and found.data.classes is None:
            known = old.data.words().get("classes", old.data.classes)
            data["classes"] = [*known, *entries({name: (name.replace("_", " "),) for name in found.added})]
    train = {**values["train"], "keep": "last", "patience": None, "metric": "accuracy", "processes": None}
    train["align"] = False  # that of the run was for its memory
    if at_once:
        train |= {"fit": "ridge" if way == "ranpac" else "prototypes", "ema": None, "class_weight_power": 0.0}
        train |= {"class_weight_by": "loss"}
    else:
        train |= {"fit": "gradient", "ridge": None}
    teacher = {"model": absolute(str(run.path)), "prepare": "none", "allow_weak": True} if way == "lwf" else None
    # What the new images say of old classes is left to the old answers. One new class has no other to compare with;
    # ease answers by class means, and leaves its adapter as it was.
    masked = way in ("lwf", *METHOD_WAYS) and len(found.added) > (way != "ease") and memory is None
    losses: list[dict[str, Any]] = [{"name": "ce", "first_class": len(found.known) if masked else 0}]
    if teacher is not None:
        losses.append({"name": "kd", "temperature": TEMPERATURE})
    losses, settings = _losses(way, losses, settings)
    # Old classes first and in their order: their rows of the classifier stay where they are.
    data["known_classes"] = [*found.known, *found.added]
    if memory is not None:  # a few old images beside many new ones
        data["memory"], train["align"] = str(memory), bool(found.added)
    whole = {"name": old.name, "seed": old.seed, "data": data, "student": student, "method": method, "train": train}
    recipe = resolve(None, words, settings, start={**whole, "teacher": teacher, "losses": losses})
    if recipe.train.align and not found.added:
        raise RecipeError(["train.align: there is no new class whose row it would change (leave it out)"], "extend")
    return recipe


def _first_that_fits(found: Situation, *, memory: bool) -> str:
    fitting = [one.way for one in found.advice(memory=memory) if one.fits]
    if not fitting:  # what lwf does not fit has a way of its own alone, or none
        why = found.closed or found.of_method(found.method).why
        do = "tune a run on all images, or one on the new images, and keep both: remap tasks add"
        raise RecipeError([f"no way fits this run and these images: {why}"], "extend", do=do)
    return fitting[0]


def _require_fit(found: Situation, way: str, words: dict[str, Any]) -> None:
    problems = []
    if way not in WAYS:
        problems.append(f"--how: unknown word '{way}' (allowed: {', '.join(WAYS)})")
    elif way in METHOD_WAYS and not (own := found.of_method(way)).fits:
        problems.append(f"--how {way}: {own.why}")
    elif found.closed:
        problems.append(f"--how {way}: {found.closed}")
    elif found.method in ALONE and way != found.method:
        problems.append(f"--how {way}: a run that is tuned by {found.method} is extended by it alone")
    elif way in AT_ONCE:
        others = ", ".join(f"--how {name}" for name in ("lwf", "finetune"))
        problems = [
            f"--{name}: {way} takes no steps (leave it out, or take one that does: {others})"
            for name in ("epochs", "lr")
            if words.get(name) is not None
        ]
    if problems:
        raise RecipeError(problems, "extend")


def data_of(data: str | DataSpec, settings: Iterable[str]) -> tuple[DataSpec, list[str]]:
    """Return the section of the new images, with the fields of it that are set; and the other settings.

    Which images and classes are new is known from these images before there is a recipe.

    Raises:
        RecipeError: A field or its value is wrong.
    """
    values = data.model_dump(exclude_unset=True) if isinstance(data, DataSpec) else {"source": data}
    problems, others = list[str](), list[str]()
    for setting in settings:
        section, _, field = setting.partition("=")[0].strip().partition(".")
        if section != "data" or not field or "." in field:
            others.append(setting)
            continue
        for _, value in of_settings([setting], problems):
            values[field] = value
    if problems:
        raise RecipeError(problems, "extend")
    return checked(DataSpec, values, "extend"), others


def _losses(way: str, own: list[dict[str, Any]], settings: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the losses of a way, or those that ``--set losses=`` names with its options; and the other settings.

    Raises:
        RecipeError: One that the way learns by is left out.
    """
    problems, rest, given = list[str](), list[str](), own
    for setting in settings:
        if setting.partition("=")[0].strip() != "losses":
            rest.append(setting)
            continue
        for _, value in of_settings([setting], problems):
            try:
                named = [dict(one) for one in loss_words(value)]
                given = [{**next((old for old in own if old["name"] == one["name"]), {}), **one} for one in named]
            except (ValueError, TypeError, KeyError):
                problems.append(f"{setting}: write names of losses, as in losses=ce,kd:2,feature")
    names = [one["name"] for one in given]
    if way != "finetune" and (lost := [one["name"] for one in own if one["name"] not in names]):
        problems.append(f"losses: {way} learns by {' and '.join(lost)} too (write losses={','.join([*lost, *names])})")
    if problems:
        raise RecipeError(problems, "extend")
    return given, rest


def extend(
    run: str | Path,
    data: str | DataSpec,
    *,
    how: str | None = None,
    memory: int = 0,
    choose: Choice | None = None,
    settings: Iterable[str] = (),
    output: str | Path | None = None,
    progress: Progress = Silent(),
    **words: Any,
) -> Result:
    """Let a finished run learn new classes, or a new look of its classes, without its old images where it can.

    The result is a run of its own, whose classifier knows the old classes and then the new ones; the run that is
    extended is only read. See docs/new-classes.md for the ways.

    Args:
        run: The run directory.
        data: The new images, as for ``--data``; or a section ``DataSpec``.
        how: A key of ``WAYS``: "ranpac", "lwf" ...; None takes the first that fits (``situation``).
        memory: Old images of each class to learn from as well, of lwf and finetune; their names and hashes are written
            to OUTPUT.memory.json, and the images stay where they are.
        choose: How they are chosen; None is by herding.
        settings: As ``--set``.
        output: The run directory to make; by default the next number under ``runs/``.
        words: epochs, lr, batch_size, seed.

    Raises:
        RemapError: Anything a user can mend.
    """
    if choose is not None and not memory:
        raise RecipeError(["--choose: there is no memory to choose images for (name its size with --memory)"], "extend")
    spec, settings = data_of(data, settings)
    found = situation(run, spec)
    way = how or _first_that_fits(found, memory=memory > 0)
    if how is None:
        progress.say(f"extending by {way}: {WAYS.get(way)}")
    if not memory:
        return start(extension_recipe(found, way, settings, **words), output, progress)
    if way in WAYS and way not in WITH_MEMORY:
        raise RecipeError([f"--memory: {way} takes no old images (take {' or '.join(WITH_MEMORY)})"], "extend")
    old = found.old.run.recipe()
    with run_path(output, default_path(), f"{old.name}-{way}") as path:
        RunDir(path).require_free()  # refused before features are computed to choose images by
        file = path.with_name(f"{path.name}.memory.json")
        atomic_write.make_folder(file.parent)
        choose_memory(found.sessions, memory, choose or "herding", progress).write(file)
        return start(extension_recipe(found, way, settings, file, **words), path, progress)
