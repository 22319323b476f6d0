"""Which ways there are to extend a run, and which of them fit it and the new images."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remap.data.sources import open_data, open_labeled
from remap.errors import DataError, RecipeError, RemapError
from remap.io.human_size import number_of
from remap.io.paths import expanded
from remap.pipeline.sessions import Session, sessions_of
from remap.recipe.schema import DataSpec
from remap.runs import class_statistics
from remap.runs.run_images import source_arguments
from remap.runs.task_file import folder_of, read_meta
from remap.tuning import parts_of, rows_of

# The ways in which a run is extended, and what each does.
WAYS = {
    "ranpac": "ridge regression on random features of the frozen student: no steps, its features stay the same bits",
    "prototypes": "class means of the frozen student's features: no steps, which stay the same bits",
    "lwf": "steps on the new images, with the run itself as teacher of what it knew",
    "ease": "steps on the new images alone into an adapter of their own, then class means in the features of all",
    "l2p": "steps on the new images alone, which find their prompts in the pool",
    "dualprompt": "steps on the new images alone, into prompts of their own beside those of all",
    "coda_prompt": "steps on the new images alone, into components of their own",
    "domains": "a new look: steps on the new images alone, into prompts, norms or adapters of their own",
    "finetune": "steps on the new images alone, which forget: the lower bound of a comparison",
}
AT_ONCE = ("ranpac", "prototypes")
WITH_MEMORY = ("lwf", "finetune")
# Ways that are methods of tuning, for runs that were tuned by them from the first session on.
METHOD_WAYS = ("ease", "l2p", "dualprompt", "coda_prompt", "domains")
# Those whose classifier no other way continues.
ALONE = ("ease", "domains")


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
    def method(self) -> str:
        """The method that the run was tuned by."""
        return read_meta(folder_of(self.old.run.path)).method.name

    @property
    def text(self) -> str:
        """The situation in words."""
        what = f"{len(self.added)} new classes ({', '.join(self.added[:8])})" if self.added else "no new class"
        old = "at hand" if self.old_images else "not at hand"
        statistics = "has" if self.has_statistics else "does not have"
        return (
            f"{self.images:,} new training images with {what}; {self.old.run.path} knows {len(self.known)}, after"
            f" {number_of(len(self.sessions), 'session')}; its images are {old}, and it {statistics} statistics of its"
            " classes"
        )

    def advice(self, *, memory: bool = False) -> list[Advice]:
        """Return all ways, those that fit first, the recommended one first of all.

        Args:
            memory: Whether there are old images to learn from by steps.
        """
        domain = "" if self.added else "; the classes are the same, so one classifier learns the new look too"
        found = [self._at_once(way) for way in AT_ONCE]
        why_not = self._alone or self.closed
        found.append(Advice("lwf", not why_not, why_not or f"needs no old image{domain}"))
        if memory or not self.added:  # features that do not change cannot take up a new look as well
            # Sorting is stable: lwf comes first, and the others stay in order.
            found.sort(key=lambda one: one.way != "lwf")
        own = [self.of_method(way) for way in METHOD_WAYS]
        return sorted([*found, *own] if memory else [*own, *found], key=lambda one: not one.fits)

    @property
    def _alone(self) -> str:
        return f"a run that is tuned by {self.method} is extended by it alone" if self.method in ALONE else ""

    @property
    def closed(self) -> str:
        """Why no way brings the run new classes; empty where one does, or where there are none."""
        return self._closed_to(None)

    def _closed_to(self, way: str | None) -> str:
        method = read_meta(folder_of(self.old.run.path)).method
        return closed_to(way, method.name, method.options, new_classes=bool(self.added))

    def _at_once(self, way: str) -> Advice:
        if why_not := self._alone or self._closed_to(way):
            return Advice(way, False, why_not)
        method, has_statistics = self.method, self.has_statistics
        if way == "ranpac" and "ranpac" not in parts_of(method):
            has_statistics = False  # those are of other features
        fits = has_statistics or self.old_images
        source = "adds to the statistics of the run" if has_statistics else "reads the old images once more"
        why = f"seconds; {source}; the features stay" if fits else "needs the old images once, for statistics"
        return Advice(way, fits, why)

    def of_method(self, way: str) -> Advice:
        """Return whether a way that is a method fits."""
        if self.method != way:
            return Advice(way, False, f"for runs that are tuned by {way} from the first session on")
        if way == "ease" and not self.added:
            return Advice(way, False, "it gives new classes a place of their own, and there are none")
        if way == "domains" and self.added:
            return Advice(way, False, "its classifier stays that of the first session, and there are new classes")
        return Advice(way, True, "what earlier sessions learned stays, and each image finds its own; no old image")


def closed_to(way: str | None, method: str, options: Mapping[str, Any], *, new_classes: bool) -> str:
    """Return why a run that is tuned by a method is not extended in a way, or for None in any; empty where it is.

    Args:
        options: Of the method.
        new_classes: Whether the run is to learn some.
    """
    of_classes = any(row.of_classes for row in rows_of(method)) or options.get("per_class")  # of coop
    if new_classes and of_classes:
        return f"{method} holds tensors of each class besides the classifier, and none of the new ones"
    own = {"linear", "ranpac"}.intersection(parts_of(method))
    alone = way == "ranpac" and not own and any(row.alone for row in rows_of(method))
    return f"random features do not go with {method}" if alone else ""


def situation(run: str | Path, data: DataSpec) -> Situation:
    """Look at a finished run and at new images; nothing is decoded.

    Raises:
        RemapError: The run is not finished or has no classifier, the images cannot be listed, or one of their classes
            differs from a known one in case or Unicode form alone.
    """
    sessions = sessions_of(expanded(run))
    known = sessions[-1].classes
    if not known or sessions[-1].run.recipe().data.multilabel:
        why = "answers with any number of classes an image" if known else "has no classifier"
        raise RecipeError([f"{run} {why}, so there is nothing to extend"], "extend")
    images = open_labeled(data.source or "", data.val_source, data.val_fraction, data.depth, data.only, least=1)
    added = tuple(name for name in images.classes if name not in known)
    require_new_names(run, known, added)
    has_statistics = (sessions[-1].run.path / class_statistics.FILE).is_file()
    return Situation(tuple(sessions), data, known, added, len(images.train), _at_hand(sessions), has_statistics)


def require_new_names(run: str | Path, known: Sequence[str], added: Sequence[str]) -> None:
    """Refuse a class that a person would read as a known one: nothing says whether it is meant."""

    def form(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    # Normalised again after folding, which can leave NFC (canonical caseless match, Unicode D145).
    same = {form(form(name).casefold()): name for name in known}
    for name in added:
        if (old := same.get(form(form(name).casefold()))) is not None:
            show = ascii if form(old) == form(name) else str  # code points of what looks the same
            raise DataError(
                f"a class of the new images differs from one of {run} in upper and lower case or Unicode form alone",
                given=f"{show(name)}, known: {show(old)}",
                do="give it exactly the known name, or one that differs in more",
            )


def _at_hand(sessions: list[Session]) -> bool:
    try:
        for session in sessions:
            open_data(*source_arguments(session.run.recipe().data.labeled_part()))
    except RemapError:
        return False
    return True
