"""``remap extend``: a finished run learns new classes, or a new look of those it knows, as a run of its own."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.backbones.names import is_pair
from remap.data.sources import open_data, open_labeled
from remap.errors import RecipeError, RemapError
from remap.io import atomic_write
from remap.io.paths import absolute, expanded
from remap.pipeline.memory import Choice, choose_memory
from remap.pipeline.run import Result, start
from remap.pipeline.sessions import Session, sessions_of
from remap.pipeline.shared import source_arguments
from remap.progress import Progress, Silent
from remap.recipe import Recipe, resolve
from remap.recipe.schema import DataSpec
from remap.runs import class_statistics
from remap.runs.run_dir import RunDir, default_path, next_path
from remap.runs.task import beside
from remap.runs.task_file import folder_of, read_meta
from remap.tuning import config_of, parts_of, rows_of

# The ways in which a run is extended, and what each does.
WAYS = {
    "ranpac": "ridge regression on random features of the frozen student: no steps, its features stay the same bits",
    "prototypes": "class means of the frozen student's features: no steps, which stay the same bits",
    "lwf": "steps on the new images, with the run itself as teacher of what it knew",
    "masked": "steps on the new images alone, new labels among new classes: for methods with a pool of prompts",
    "finetune": "steps on the new images alone, which forget: the lower bound of a comparison",
}
AT_ONCE = ("ranpac", "prototypes")
WITH_MEMORY = ("lwf", "finetune")
# Methods whose prompts are chosen for each image.
POOLS = ("l2p", "dualprompt", "coda_prompt")
# Temperature of the old answers, as in Li and Hoiem 2016 (arXiv 1606.09282).
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Advice:
    """Whether a way fits, and why."""

    way: str
    fits: bool
    why: str


@dataclass(frozen=True)
class Situation:
    """A run and what it is to learn.

    Attributes:
        added: Classes that the run does not know.
        images: New training images.
        old_images: Whether the training images of all earlier sessions are at hand.
        has_statistics: Whether the run has statistics of its classes, to which new ones are added.
    """

    sessions: tuple[Session, ...]
    data: DataSpec
    known: tuple[str, ...]
    added: tuple[str, ...]
    images: int
    old_images: bool
    has_statistics: bool

    @property
    def old(self) -> Session:
        """The run that is extended."""
        return self.sessions[-1]

    @property
    def text(self) -> str:
        """The situation in words."""
        what = f"{len(self.added)} new classes ({', '.join(self.added[:8])})" if self.added else "no new class"
        old = "at hand" if self.old_images else "not at hand"
        statistics = "has" if self.has_statistics else "does not have"
        return (
            f"{self.images:,} new training images with {what}; {self.old.run.path} knows {len(self.known)}, after"
            f" {len(self.sessions)} session(s); its images are {old}, and it {statistics} statistics of its classes"
        )

    def advice(self, *, memory: bool = False) -> list[Advice]:
        """Return all ways, those that fit first, the recommended one first of all.

        Args:
            memory: Whether there are old images to learn from by steps.
        """
        method = read_meta(folder_of(self.old.run.path)).method.name
        alone = "ranpac" not in parts_of(method) and method != "linear" and any(row.alone for row in rows_of(method))
        ranpac = self._at_once("ranpac", self.has_statistics and "ranpac" in parts_of(method))
        if alone:
            ranpac = Advice("ranpac", False, f"random features do not go with {method}")
        domain = "" if self.added else "; the classes are the same, so one classifier learns the new look too"
        found = [ranpac, self._at_once("prototypes", self.has_statistics)]
        found.append(Advice("lwf", True, f"needs no old image{domain}"))
        if method in POOLS and not memory:
            why = f"{method} keeps the prompts of earlier sessions, and each image finds its own; no old image"
            found.insert(0, Advice("masked", True, why))
        elif memory or not self.added:  # features that do not change cannot take up a new look as well
            found.sort(key=lambda one: one.way != "lwf")
        return sorted(found, key=lambda one: not one.fits)

    def _at_once(self, way: str, has_statistics: bool) -> Advice:
        fits = has_statistics or self.old_images
        source = "adds to the statistics of the run" if has_statistics else "reads the old images once more"
        why = f"seconds; {source}; the features stay" if fits else "needs the old images once, for statistics"
        return Advice(way, fits, why)


def situation(run: str | Path, data: DataSpec) -> Situation:
    """Look at a finished run and at new images; nothing is decoded.

    Raises:
        RemapError: The run is not finished or has no classifier, or the images cannot be listed.
    """
    sessions = sessions_of(expanded(run))
    known = sessions[-1].classes
    if not known or sessions[-1].run.recipe().data.multilabel:
        why = "answers with any number of classes an image" if known else "has no classifier"
        raise RecipeError([f"{run} {why}, so there is nothing to extend"], "extend")
    images = open_labeled(data.source or "", data.val_source, data.val_fraction, data.depth, data.only, least=1)
    added = tuple(name for name in images.classes if name not in known)
    has_statistics = (sessions[-1].run.path / class_statistics.FILE).is_file()
    return Situation(tuple(sessions), data, known, added, len(images.train), _at_hand(sessions), has_statistics)


def _at_hand(sessions: list[Session]) -> bool:
    try:
        for session in sessions:
            open_data(*source_arguments(session.run.recipe().data.labeled_part()))
    except RemapError:
        return False
    return True


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
    if way not in WAYS:
        raise RecipeError([f"--how: unknown word '{way}' (allowed: {', '.join(WAYS)})"], "extend")
    unused = [f"--{name}: {way} takes no steps" for name in ("epochs", "lr") if words.get(name) is not None]
    if way in AT_ONCE and unused:
        raise RecipeError(unused, "extend")
    run, folder = found.old.run, folder_of(found.old.run.path)
    meta, old = read_meta(folder), run.recipe()
    values = old.model_dump(mode="json")
    at_once = way in AT_ONCE
    method: dict[str, Any] = {"name": meta.method.name, **meta.method.options}
    if way == "ranpac" and "ranpac" not in parts_of(meta.method.name):
        alone = meta.method.name == "linear"
        options = {} if alone else {**_by_part(meta.method.name, meta.method.options), "ranpac": {}}
        method = {"name": "ranpac" if alone else f"{meta.method.name}+ranpac", **options}
    elif not at_once and "session" in config_of(meta.method.name).model_fields:
        method["session"] = len(found.sessions)
    kept = ("alpha", "value_range", "max_megapixels", "decode", "max_bad", "skip_bad", "memory_gib", "workers")
    looks = {} if at_once else {name: values["data"][name] for name in ("augment", *old.data.operations, "views")}
    images = found.data.model_dump(mode="json", exclude_unset=True)
    data = {name: values["data"][name] for name in kept} | looks | images
    if meta.view.pixels.value_range is not None:
        data["value_range"] = list(meta.view.pixels.value_range)
    weights = "none" if meta.holds_backbone else meta.backbone.weights
    student: dict[str, Any] = {"model": beside(folder, meta.backbone.model), "weights": weights}
    student |= {"preset": meta.backbone.preset, "image_size": meta.backbone.image_size}
    student["extends"] = absolute(str(run.path))
    if is_pair(student["model"]):  # which reads what classes are called
        data = {name: values["data"][name] for name in ("templates", "descriptions")} | data
        if old.data.classes is not None and found.data.classes is None:
            data["classes"] = [*old.data.classes, *(f"{name}: {name.replace('_', ' ')}" for name in found.added)]
    train = {**values["train"], "keep": "last", "patience": None, "metric": "accuracy", "processes": None}
    if at_once:
        train |= {"fit": "ridge" if way == "ranpac" else "prototypes", "ema": None, "class_weight_power": 0.0}
        train |= {"class_weight_by": "loss"}
    else:
        train |= {"fit": "gradient", "ridge": None}
    teacher = {"model": absolute(str(run.path)), "prepare": "none", "allow_weak": True} if way == "lwf" else None
    # What the new images say of old classes is left to the old answers. One new class has no other to compare with.
    masked = way in ("lwf", "masked") and len(found.added) > 1 and memory is None
    losses: list[dict[str, Any]] = [{"name": "ce", "first_class": len(found.known) if masked else 0}]
    if teacher is not None:
        losses.append({"name": "kd", "temperature": TEMPERATURE})
    data["known_classes"] = [*found.known, *found.added]
    if memory is not None:  # a few old images beside many new ones
        data["memory"], train["align"] = str(memory), bool(found.added)
    whole = {"name": old.name, "seed": old.seed, "data": data, "student": student, "method": method, "train": train}
    return resolve(None, words, settings, start={**whole, "teacher": teacher, "losses": losses})


def _by_part(method: str, options: dict[str, Any]) -> dict[str, Any]:
    return options if len(parts_of(method)) > 1 else {method: options}


def extend(
    run: str | Path,
    data: str | DataSpec,
    *,
    how: str | None = None,
    memory: int = 0,
    choose: Choice = "herding",
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
        choose: How they are chosen.
        settings: As ``--set``.
        output: The run directory to make; by default the next number under ``runs/``.
        words: epochs, lr, batch_size, seed.

    Raises:
        RemapError: Anything a user can mend.
    """
    found = situation(run, data if isinstance(data, DataSpec) else DataSpec(source=data))
    way = how or next(one for one in found.advice(memory=memory > 0) if one.fits).way
    if how is None:
        progress.say(f"extending by {way}: {WAYS.get(way)}")
    if not memory:
        return start(extension_recipe(found, way, settings, **words), output, progress)
    if way in WAYS and way not in WITH_MEMORY:
        raise RecipeError([f"--memory: {way} takes no old images (take {' or '.join(WITH_MEMORY)})"], "extend")
    old = found.old.run.recipe()
    path = expanded(output) if output is not None else next_path(default_path(), f"{old.name}-{way}")
    RunDir(path).require_free()
    file = path.with_name(f"{path.name}.memory.json")
    atomic_write.make_folder(file.parent)
    choose_memory(found.sessions, memory, choose, progress).write(file)
    return start(extension_recipe(found, way, settings, file, **words), path, progress)
