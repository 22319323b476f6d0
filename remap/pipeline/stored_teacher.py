"""Teachers that were tuned or fitted before, in the cache: found by all that decides their tensors."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.cache.cache_folders import library_versions, prepared_root
from remap.cache.tuned_teachers import fetch_teacher, store_teacher
from remap.data.fingerprint import Contents, fingerprint
from remap.distributed.launch import accelerator, broadcast_str
from remap.distributed.reading import read_digests
from remap.errors import Interrupted, RemapError
from remap.pipeline.shared import SharedResources
from remap.progress import Progress
from remap.recipe.schema import SELF, Recipe, TeacherSpec
from remap.runs.hardware import machine
from remap.runs.task import open_backbone
from remap.runs.task_file import read_meta, read_tensors

PROBE = "probe"


@dataclass(frozen=True)
class StoredTeacher:
    """A tuned or probed teacher in the cache, where later runs find it; without a key it is for this run alone."""

    key: dict[str, Any] | None
    progress: Progress

    @classmethod
    def of(cls, tuning: Recipe, spec: TeacherSpec, shared: SharedResources, progress: Progress) -> "StoredTeacher":
        """Return the teacher that a recipe tunes."""
        # Of all labels: what is known of them serves every fold.
        contents = shared.contents(tuning.data.without_folds())

        def key() -> dict[str, Any]:
            backbone = open_backbone(spec, len(shared.classes(tuning))).identity
            contents = shared.contents(tuning.data)
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

    def fetch(self, folder: Path, title: str) -> bool:
        """Copy it into a teacher's folder, for all processes; return whether it was there.

        Args:
            title: How messages call it.
        """
        found = False
        if self.key is not None:
            try:
                found = fetch_teacher(prepared_root(), self.key, folder / "task")
                if found:
                    read_tensors(folder / "task", read_meta(folder / "task"))
                    self.progress.say(f"{title} was {self._made} on these images before, and is read from the cache")
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
