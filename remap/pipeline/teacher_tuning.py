"""Teachers that are tuned before the run: which, by what recipe, and where they are stored."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.cache.cache_folders import library_versions, prepared_root
from remap.cache.prepared_teachers import fetch_teacher, store_teacher
from remap.data.fingerprint import Contents, fingerprint
from remap.distributed.collectives import all_reduce_max
from remap.distributed.launch import accelerator, broadcast_str
from remap.distributed.reading import read_digests
from remap.errors import Interrupted, RemapError
from remap.io.links import require_no_link, require_no_links
from remap.io.paths import expanded
from remap.pipeline.shared import SharedResources
from remap.progress import Progress, Step, Within
from remap.recipe.paths import is_run
from remap.recipe.schema import EMA, SELF, WORDS, LossSpec, MethodSpec, Recipe, StudentSpec, TeacherSpec
from remap.remapping import LOSSES
from remap.runs.hardware import machine
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone
from remap.runs.task_file import folder_of, read_meta, read_tensors

PROBE = "probe"
# Share of the labelled training images that a teacher's temperature is fitted on.
HELD_OUT = 0.2


class OfTeacher(Within):
    """The progress of a run that tunes a teacher, which is the student there."""

    def say(self, text: str) -> None:
        super().say(_of_teacher(text))

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator[Step]:
        with super().wait(_of_teacher(what), total) as step:
            yield step


def _of_teacher(text: str) -> str:
    return text.replace("the student", "the teacher")


def teachers_to_tune(
    recipe: Recipe, run_dir: RunDir, progress: Progress, shared: SharedResources
) -> Iterator[tuple[str, RunDir, Recipe]]:
    """Yield the teachers that have to be tuned before this run: title, run directory and recipe of each.

    The caller runs each recipe before it asks for the next one.
    """
    # Numbers count without a running average, which is never stored.
    for number, spec in enumerate(spec for spec in recipe.teachers if spec.model != EMA):
        if spec.prepare in ("probe", "none", WORDS) or not needs_logits(recipe) or _brings_head(spec, recipe, shared):
            continue
        tuning, folder = teacher_recipe(recipe, spec), teacher_folder(spec, number, run_dir, shared)
        key = tuning.digest()
        # Tuned by an earlier run of this command, or by this run before it was interrupted.
        if key not in shared.tuned_teachers and not is_prepared(folder):
            require_unlinked(folder)
            stored = StoredTeacher.of(tuning, spec, shared, progress)
            if not stored.fetch(folder):
                classes = len(shared.classes(recipe))
                progress.say(
                    f"{title_of(spec, recipe)} has no head for these {classes} classes: tuning it ({spec.prepare})"
                )
                yield title_of(spec, recipe), open_or_create(folder, tuning), tuning
                # A run that was resumed may have begun on another machine, whose bits differ.
                if stored.key is not None and not RunDir(folder).environment().get("resumed"):
                    stored.store(folder)
        shared.tuned_teachers.setdefault(key, folder)


@dataclass(frozen=True)
class StoredTeacher:
    """A tuned or probed teacher in the cache, where later runs find it; without a key it is for this run alone."""

    key: dict[str, Any] | None
    progress: Progress

    @classmethod
    def of(cls, tuning: Recipe, spec: TeacherSpec, shared: SharedResources, progress: Progress) -> "StoredTeacher":
        """Return the teacher that a recipe tunes."""
        contents = shared.contents(tuning.data)

        def key() -> dict[str, Any]:
            backbone = open_backbone(spec, len(shared.classes(tuning))).identity
            return {
                "teacher": backbone.model,
                "method": spec.prepare,
                "backbone": backbone.sha256,
                "recipe": tuning.digest(places=False),
                "images": fingerprint(shared.index(tuning.data), progress, tuning.data.workers, contents),
                "precision": tuning.train.precision,
            }

        return cls.made_by(key, contents, spec, shared, progress)

    @classmethod
    def made_by(
        cls,
        key: Callable[[], dict[str, Any]],
        images: Mapping[str, Contents],
        spec: TeacherSpec,
        shared: SharedResources,
        progress: Progress,
    ) -> "StoredTeacher":
        """Return the teacher of a key: all that decides its tensors besides the machine and the versions.

        Args:
            images: Those whose contents the key is made of, by split; each process reads a part of them.
        """
        # "self" has the weights of one student, which may be random.
        if spec.cache == "off" or spec.model == SELF or not shared.use_stored_teachers:
            return cls(None, progress)
        for name, contents in images.items():
            read_digests(accelerator(), contents, progress, f"{name} images")
        if not accelerator().is_main_process:
            return cls(None, progress)
        return cls({**key(), "machine": machine(), "versions": library_versions()}, progress)

    def fetch(self, folder: Path) -> bool:
        """Copy it into a teacher's folder, for all processes; return whether it was there."""
        found = False
        if self.key is not None:
            try:
                found = fetch_teacher(prepared_root(), self.key, folder / "task")
                if found:
                    read_tensors(folder / "task", read_meta(folder / "task"))
                    self.progress.say(
                        f"the teacher was {self._made} on these images before, and is read from the cache"
                    )
            except Interrupted:
                raise
            except RemapError as error:  # a cache saves time; what is wrong with it must not cost the run
                shutil.rmtree(folder / "task", ignore_errors=True)
                self.progress.say(
                    f"a {self._made} teacher in the cache cannot be used, and is {self._made} again: {error}"
                )
                found = False
        return broadcast_str(str(found)) == "True"

    def store(self, folder: Path) -> None:
        """Store it, once it is complete."""
        if self.key is not None:
            try:
                store_teacher(prepared_root(), self.key, folder / "task")
            except Interrupted:
                raise
            except RemapError as error:
                self.progress.say(f"the {self._made} teacher is not stored for later runs: {error}")

    @property
    def _made(self) -> str:
        return "fitted" if self.key is not None and self.key["method"] == PROBE else "tuned"


def _brings_head(spec: TeacherSpec, recipe: Recipe, shared: SharedResources) -> bool:
    """Whether it is a run on the same classes, whose head serves."""
    # By names and order: a head for other classes is of no use.
    return is_run(spec.model) and read_meta(folder_of(expanded(spec.model))).classes == shared.classes(recipe)


def is_prepared(folder: Path) -> bool:
    """Return whether a teacher is stored there, fitted or tuned; every process calls it."""
    # As the main process sees it: it copies teachers out of the cache, and the others may look after that.
    here = accelerator().is_main_process and (folder / "task" / "task.json").is_file()
    (found,) = all_reduce_max(accelerator(), here)
    return bool(found)


def teacher_folder(spec: TeacherSpec, number: int, run_dir: RunDir, shared: SharedResources) -> Path:
    """Return where a prepared teacher is stored: teacher, teacher-2, ... of the run, or of its comparison.

    "self" always belongs to the run: it shares the weights of one student, which may be random.
    """
    in_run = shared.teacher_folder is None or spec.model == SELF
    first = run_dir.teacher if in_run else shared.teacher_folder
    assert first is not None
    return first if number == 0 else first.with_name(f"{first.name}-{number + 1}")


def open_or_create(folder: Path, recipe: Recipe) -> RunDir:
    """Return a run directory inside another one, made by the main process where it is not there yet."""
    if accelerator().is_main_process and not (folder / "recipe.yaml").exists():
        RunDir.create(folder, recipe)
    accelerator().wait_for_everyone()
    return RunDir(folder)


def require_unlinked(folder: Path) -> None:
    """Refuse links at and below the folder of a teacher, which may lie outside of the run directory."""
    require_no_link(folder)
    require_no_links(folder)


def title_of(spec: TeacherSpec, recipe: Recipe) -> str:
    """Return how messages call a teacher."""
    return f"the teacher {spec.model}" if len(recipe.teachers) > 1 else "the teacher"


def teacher_recipe(recipe: Recipe, spec: TeacherSpec) -> Recipe:
    """Return the recipe that tunes a teacher: the run's labelled images and loop, its method, cross-entropy."""
    # The teacher's rate and warm-up belong to its method, not to the student's.
    own = {"lr": spec.lr, "base_lr": None, "warmup_epochs": None, "optimizer": "adamw", "track": ()}
    own |= {"checkpoint_blocks": False}  # which its blocks may not allow, and only the student's memory asks for
    epochs = spec.epochs or recipe.train.epochs
    if not recipe.train.selects:  # evaluated as many times as its student: the figures between serve the eye alone
        own["eval_every"] = -(-recipe.train.eval_every * epochs // recipe.train.epochs)
    train = recipe.train.model_copy(update={"epochs": epochs, **own})
    shared = ("model", "weights", "preset", "image_size")
    held_out = HELD_OUT if spec.calibrate else recipe.data.held_out
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[:56]}-teacher",
            # It is tuned on labelled images as they are: mixed or unlabelled ones are for the student.
            "data": recipe.data.labeled_part().model_copy(
                update={"views": None, "mixup": 0.0, "cutmix": 0.0, "held_out": held_out}
            ),
            "baseline": False,
            "choose_losses": False,
            "teachers": (),
            "student": StudentSpec(**{name: getattr(spec, name) for name in shared}),
            "method": MethodSpec(name=spec.prepare),
            "losses": (LossSpec(name="ce", weight=LOSSES.row("ce").weight),),
            "train": train,
        }
    )


def lend_teachers(recipe: Recipe, trial: Recipe, shared: SharedResources) -> None:
    """Let a trial of a run, which has images and epochs of its own, learn from the teachers tuned for the run."""
    for spec in recipe.teachers:
        if spec.prepare not in ("probe", "none"):
            folder = shared.tuned_teachers.get(teacher_recipe(recipe, spec).digest())
            if folder is not None:  # None of a run that brings its head
                shared.tuned_teachers[teacher_recipe(trial, spec).digest()] = folder


def needs_logits(recipe: Recipe) -> bool:
    """Return whether a loss reads the teacher's logits, so that it needs a head."""
    return any(loss.reads_logits for loss in recipe.losses)
