"""A shelf: one folder with a frozen backbone and the task files of many tasks on it, each with its hash.

SHELF/shelf.json           what is in it (sealed): the backbone, the tasks' hashes, and the current task
SHELF/backbone/            the frozen weights, once; and the model's config where timm does not know it by name
SHELF/tasks/NAME/          a copy of a run's task folder, byte for byte
SHELF/.lock                held by the process that changes it
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from safetensors.torch import save

from remap.backbones.build import Backbone, state_hash
from remap.backbones.model_source import CONFIGS, config_in
from remap.backbones.names import is_pair
from remap.errors import RemapError, RunError, UnknownName
from remap.io import atomic_write
from remap.io.checked_json import MOST_JSON_BYTES
from remap.io.checked_read import read_regular, sha256_of
from remap.io.locks import one_by_one
from remap.io.names import look_alike, plain
from remap.io.paths import expanded
from remap.io.sealed_json import parse_sealed, sealed_text
from remap.io.tensor_files import file_problem, first_lines, read_safetensors
from remap.pipeline.student_api import Student
from remap.recipe.schema import ModelSpec
from remap.runs.task import beside, open_backbone
from remap.runs.task_file import TaskMeta, folder_of, read_meta, read_tensors
from remap.tasks.multi_task import MultiTask, require_shared

FILES = ("task.json", "task.safetensors")
_WEIGHTS = "model.safetensors"


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("1 to 64 letters, digits, '.', '_' or '-'")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Backbone(_Strict):
    model: str
    sha256: str
    preset: Literal["none", "mae", "moco_v3"]
    image_size: int | None


class _Content(_Strict):
    """The content of shelf.json."""

    format: Literal[1] = 1
    current: str | None = None
    backbone: _Backbone
    tasks: dict[Annotated[str, AfterValidator(_name)], dict[Literal[FILES], str]] = {}  # type: ignore[valid-type]


@dataclass(frozen=True)
class ShelfRow:
    """One task of a shelf, or its backbone: what ``ls`` and ``verify`` show.

    Attributes:
        problem: What is wrong with its files; empty where nothing is.
    """

    name: str
    method: str = ""
    classes: int = 0
    bytes: int = 0
    current: bool = False
    problem: str = ""


class Shelf:
    """A folder with a frozen backbone and the task files of many tasks on it, each with its hash.

    Raises:
        RunError: There is no shelf, or shelf.json is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        try:
            values, sealed = parse_sealed(read_regular(self.path / "shelf.json", MOST_JSON_BYTES))
            if not sealed:
                raise ValueError("it is not sealed")
            self._content = _Content.model_validate(values)
        except OSError as error:
            do = "`remap tasks add SHELF NAME=RUN` makes a shelf"
            raise RunError(f"{self.path} is not a shelf of tasks: shelf.json: {error.strerror}", do=do) from error
        except (ValueError, ValidationError) as error:
            raise RunError(
                f"the shelf {self.path} is damaged: shelf.json was changed, or is not complete",
                given=plain(str(error)).splitlines()[0],
                do="copy shelf.json back from another copy of the shelf, or add the runs to a new one",
            ) from error

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Return whether there is a shelf at a path."""
        return os.path.isfile(expanded(path) / "shelf.json")  # False also for names that no file can have

    @classmethod
    def with_task(cls, path: str | Path, name: str, run: str | Path) -> "Shelf":
        """Add a run's task to a shelf, and make the shelf with the run's backbone where there is none.

        Raises:
            RunError: The task was tuned on another backbone than those of the shelf, or the name is taken or unfit.
        """
        return cls.with_tasks(path, {name: run})

    @classmethod
    def with_tasks(cls, path: str | Path, runs: Mapping[str, str | Path]) -> "Shelf":
        """Add the tasks of several runs by name, as ``with_task``; where one cannot be added, none is."""
        shelf_path = expanded(path)
        folders = {name: folder_of(expanded(run)) for name, run in runs.items()}
        tasks = {name: _readable(name, folder) for name, folder in folders.items()}
        cls._before_adding(shelf_path, folders, tasks)  # what is refused leaves no folder
        atomic_write.make_folder(shelf_path)
        with _changing(shelf_path):
            shelf = cls._before_adding(shelf_path, folders, tasks)
            if shelf is None:
                _store_backbone(shelf_path, next(iter(folders.values())), next(iter(tasks.values())))
                shelf = cls(shelf_path)
            for name, folder in folders.items():
                shelf._add(name, folder)
        return shelf

    @classmethod
    def _before_adding(cls, path: Path, folders: Mapping[str, Path], tasks: Mapping[str, TaskMeta]) -> "Shelf | None":
        """Return the shelf that tasks can be added to; None where it has to be made."""
        shelf = cls(path) if cls.is_at(path) else None
        if shelf is not None and (problem := shelf.backbone_problem):
            raise RunError(f"the shelf {path} is damaged: {problem}", do="add the runs to a new shelf")
        first = next(iter(tasks.values()))
        model, sha256 = first.backbone.model, first.backbone.sha256
        if shelf is None:
            _require_unused(path)
        else:
            model, sha256 = shelf._content.backbone.model, shelf._content.backbone.sha256
        for name, meta in tasks.items():
            if shelf is not None and name in shelf.names:
                do = "choose another name, or remove that one: remap tasks remove SHELF NAME"
                raise RunError(f"{path} has a task {name} already", do=do)
            # Where the file system takes both for one folder, the second task would replace the first.
            others = [*(shelf.names if shelf else ()), *tasks]
            if alike := look_alike(name, [other for other in others if other != name]):
                raise RunError(f"two tasks of {path} cannot have such names", given=alike, do="choose another name")
            if meta.backbone.sha256 != sha256:
                raise RunError(
                    f"{folders[name]} was tuned on another backbone than the tasks of {path}",
                    given=f"{meta.backbone.model}, {meta.backbone.sha256[:16]}",
                    allowed=f"{model}, {sha256[:16]}",
                    do="make another shelf for it",
                )
        return shelf

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they were added."""
        return list(self._content.tasks)

    @property
    def current(self) -> str | None:
        """The task that is used where none is named: the first one, until ``switch`` names another."""
        return self._content.current

    def folder(self, name: str) -> Path:
        """Return a task's folder.

        Raises:
            UnknownName: There is no such task.
        """
        if name not in self._content.tasks:
            raise UnknownName(f"there is no task '{plain(name)}' in {self.path}", allowed=self.names)
        return self.path / "tasks" / name

    @property
    def current_folder(self) -> Path:
        """The folder of the current task.

        Raises:
            RunError: The shelf is empty, or a file of the task is missing.
        """
        if self.current is None:
            raise RunError(f"{self.path} holds no task", do="add one: remap tasks add SHELF NAME=RUN")
        return self._whole(self.current)

    def switch(self, name: str) -> None:
        """Make a task the current one."""
        with _changing(self.path):
            self._content = Shelf(self.path)._content  # another process may have added tasks meanwhile
            self.folder(name)
            self._write(current=name)

    def remove(self, name: str) -> None:
        """Take a task off the shelf, with its files; the run that it was added from stays.

        The first of the others becomes the current one where it was that.

        Raises:
            UnknownName: There is no such task.
        """
        with _changing(self.path):
            self._content = Shelf(self.path)._content  # another process may have added tasks meanwhile
            folder, left = self.folder(name), {n: files for n, files in self._content.tasks.items() if n != name}
            current = next(iter(left), None) if self.current == name else self.current
            self._write(tasks=left, current=current)  # first: files that no shelf names do no harm
            if folder.exists():
                shutil.rmtree(folder)

    def rows(self) -> list[ShelfRow]:
        """Return what is in it; no file is hashed. The backbone has a row where its file cannot be read."""
        problem = self.backbone_problem
        return [*([ShelfRow("(backbone)", problem=problem)] if problem else []), *map(self._row, self.names)]

    @property
    def backbone_problem(self) -> str:
        """Why the weights cannot be read, by their header and length; empty where they can."""
        reason = file_problem(self.path / "backbone" / _WEIGHTS)
        return f"backbone/{_WEIGHTS}: {reason}" if reason else ""

    def verify(self) -> list[ShelfRow]:
        """Return the backbone and every task, each with what is wrong with its files: compares all hashes."""
        problem = ""
        try:
            found = self.backbone().identity.sha256
            if found != self._content.backbone.sha256:
                problem = "its tensors are not those it was stored with"
        except RemapError as error:
            problem = str(error.what)
        weights = self.path / "backbone" / _WEIGHTS
        stored = weights.stat().st_size if weights.is_file() else 0
        return [ShelfRow("(backbone)", bytes=stored, problem=problem), *map(self._verified, self.names)]

    def backbone(self) -> Backbone:
        """Open the frozen backbone."""
        if problem := self.backbone_problem:
            do = "copy it back from another copy of the shelf, or add the runs to a new one"
            raise RunError(f"the shelf {self.path} is damaged: {problem}", do=do)
        spec, folder = self._content.backbone, (self.path / "backbone").absolute()
        weights, size = folder / _WEIGHTS, spec.image_size
        if is_pair(spec.model):  # the language part is in its own files
            return _filled(open_backbone(ModelSpec(model=spec.model, image_size=size), 1), weights)
        model = f"local-dir:{folder}" if any((folder / name).is_file() for name in CONFIGS) else spec.model
        return open_backbone(ModelSpec(model=model, weights=str(weights), preset=spec.preset, image_size=size), 1)

    def open(self, device: str | torch.device | None = None) -> MultiTask:
        """Load all tasks on the shelf's backbone, the current one first in use."""
        tasks = MultiTask(self.backbone(), {name: self._whole(name) for name in self.names}, device)
        tasks.current = self.current or tasks.current
        return tasks

    def open_current(self, device: str | torch.device | None = None) -> Student:
        """Load the current task on the shelf's backbone, and no other."""
        folder = self.current_folder
        return MultiTask(self.backbone(), {"current": folder}, device).switch("current")

    def _whole(self, name: str) -> Path:
        """Return the folder of a task whose files are there."""
        folder = self.folder(name)
        if missing := [file for file in FILES if not (folder / file).is_file()]:
            raise RunError(
                f"the shelf {self.path} is damaged: tasks/{name}/{missing[0]} is missing",
                do=f"remove the task (remap tasks remove SHELF {name}), then add its run again",
            )
        return folder

    def _row(self, name: str, problem: str = "") -> ShelfRow:
        folder = self.folder(name)
        try:
            meta = read_meta(folder)
        except RemapError as error:
            return ShelfRow(name, current=name == self.current, problem=problem or error.what)
        count = sum((folder / file).stat().st_size for file in FILES if (folder / file).is_file())
        return ShelfRow(name, meta.method.name, len(meta.classes), count, name == self.current, problem)

    def _verified(self, name: str) -> ShelfRow:
        for file, digest in self._content.tasks[name].items():
            try:
                if sha256_of(self.folder(name) / file) != digest:
                    return self._row(name, f"{file} has changed since it was added")
            except OSError as error:
                return self._row(name, f"{file}: {error.strerror}")
        return self._row(name)

    def _add(self, name: str, folder: Path) -> None:
        target = self.path / "tasks" / name
        atomic_write.make_folder(target)
        for file in FILES:
            atomic_write.write_bytes(target / file, (folder / file).read_bytes())
        hashes = {file: sha256_of(target / file) for file in FILES}
        self._write(tasks={**self._content.tasks, name: hashes}, current=self.current or name)

    def _write(self, **changes: Any) -> None:
        self._content = self._content.model_copy(update=changes)
        _write_content(self.path, self._content)


def _changing(path: Path) -> AbstractContextManager[None]:
    """Let one process at a time change a shelf: each writes all of shelf.json, with what it has read there before."""
    return one_by_one(path.resolve() / ".lock")


def _readable(name: str, folder: Path) -> TaskMeta:
    """Return what a task is, once its name and its files are known to be right."""
    meta = read_meta(folder)
    require_shared(folder, meta)
    try:
        _name(name)
    except ValueError as error:
        raise RunError("a task cannot have this name", given=plain(name), allowed=str(error)) from None
    read_tensors(folder, meta)  # a damaged file is not taken in
    return meta


def _write_content(path: Path, content: _Content) -> None:
    atomic_write.write_text(path / "shelf.json", sealed_text(content.model_dump(mode="json")))


def _require_unused(path: Path) -> None:
    """Refuse a folder of something else, such as a run or images, which would become a shelf as well."""
    try:
        others = sorted(entry.name for entry in path.iterdir() if entry.name != "backbone" and entry.name[0] != ".")
    except OSError:  # not there yet, or what ``make_folder`` explains
        return
    if others:
        given = plain(", ".join(others[:5]) + (", ..." if len(others) > 5 else ""))
        raise RunError(
            f"{path} is not a shelf, and not empty", given=given, do="name a folder of its own for the shelf"
        )


def _store_backbone(path: Path, task: Path, meta: TaskMeta) -> None:
    """Write the backbone of a task, without classifier, and a shelf.json without tasks."""
    spec, model = meta.backbone, beside(task, meta.backbone.model)
    backbone = open_backbone(spec.to_open(model=model), 1)
    if backbone.identity.sha256 != spec.sha256:
        raise RunError(f"the weights of {spec.model} are not those that the task was tuned on any more")
    state = backbone.model.state_dict().items()
    tensors = {name: tensor.contiguous() for name, tensor in state if not backbone.anatomy.is_head(name)}
    data, weights = save(tensors), path / "backbone" / _WEIGHTS
    # A shelf whose making was stopped left these very weights.
    if weights.exists() and sha256_of(weights) != hashlib.sha256(data).hexdigest():
        raise RunError(f"{weights.parent} holds weights of something else", do="name another folder")
    atomic_write.make_folder(weights.parent)
    atomic_write.write_bytes(weights, data)
    if model.startswith("local-dir:"):
        config = config_in(Path(model.removeprefix("local-dir:")))
        atomic_write.write_bytes(weights.with_name(config.name), read_regular(config, MOST_JSON_BYTES))
    kept = _Backbone(model=spec.model, sha256=spec.sha256, preset=spec.preset, image_size=spec.image_size)
    _write_content(path, _Content(backbone=kept))


def _filled(backbone: Backbone, weights: Path) -> Backbone:
    """Return a vision-language model with the weights that a shelf has of its image tower."""
    try:
        backbone.model.load_state_dict(read_safetensors(weights), strict=False)
    except RuntimeError as error:
        raise RunError(f"{weights} does not fit {backbone.identity.model}", given=first_lines(error)) from error
    digest = state_hash(backbone.model, backbone.anatomy)
    return replace(backbone, identity=replace(backbone.identity, sha256=digest))
