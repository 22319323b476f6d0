"""answers.json: what student and teacher answered for each evaluation image at the end of a run. Imports no torch.

With the pictures beside it, in ``report/``, it is all that a report shows of the images, which it needs no more.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from remap.errors import RunError
from remap.io import atomic_write
from remap.io.checked_json import read_run_json

NAME = "answers.json"
# The folder of the pictures.
PICTURES = "report"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Answers(_Record):
    """Of one network: the class of each image, its probability, and the cross-entropy; -1 where it was left out.

    Where an image has any number of classes: those that are named, their probabilities, and the binary cross-entropy;
    ``precision`` is the average precision of each class, None without an image of it, and ``draws`` its mean over
    classes on resampled images, the same ones in all runs (``SetEvaluation.draws_K``); earlier versions stored none.
    """

    predictions: list[int] | list[list[int]]
    confidences: list[float] | list[list[float]]
    losses: list[float]
    precision: list[float | None] | None = None
    draws: list[float] | None = None

    def of(self, index: int) -> list[tuple[int, float]] | None:
        """Return the classes that an image was given, with their probabilities; None where it was left out."""
        if self.losses[index] < 0:
            return None
        named, sure = self.predictions[index], self.confidences[index]
        return list(zip(_listed(named), _listed(sure), strict=True))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Overlays(_Record):
    """Where networks look: pictures ``attention-IMAGE-NETWORK.jpg`` on one colour scale.

    Attributes:
        images: Numbers of the images.
        blocks: Block of each network, counted from 0.
        most: What the end of the scale stands for, as a multiple of even attention.
        missing: Why there are none, or none of the teacher.
    """

    images: list[int] = []
    blocks: dict[str, int] = {}
    most: float = 0.0
    missing: str = ""


class Evidence(_Record):
    """What answers.json holds.

    Attributes:
        names: What messages call each image.
        worst: Numbers of the images answered wrong whose label the student finds least likely; ``image-IMAGE.jpg``
            shows one.
    """

    classes: list[str]
    names: list[str]
    labels: list[int] | list[list[int]]
    student: Answers
    teacher: Answers | None = None
    worst: list[int] = []
    attention: Overlays = Field(default_factory=Overlays)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count, classes = len(self.names), len(self.classes)
        networks = [self.student, *([self.teacher] if self.teacher else [])]
        names = ("predictions", "confidences", "losses")
        columns = [self.labels, *(getattr(one, name) for one in networks for name in names)]
        if any(len(column) != count for column in columns):
            raise ValueError("its lists differ in length")
        if any(not 0 <= label < classes for labels in self.labels for label in _listed(labels)):
            raise ValueError("a label is not one of its classes")
        if any(not -1 <= label < classes for one in networks for said in one.predictions for label in _listed(said)):
            raise ValueError("an answer is not one of its classes")
        pairs = [pair for one in networks for pair in zip(one.predictions, one.confidences, strict=True)]
        multilabel = self.multilabel  # which looks at all labels
        if any(isinstance(value, list) != multilabel for value in (*self.labels, *(v for p in pairs for v in p))):
            raise ValueError("labels and answers are of two kinds")
        if any(len(_listed(named)) != len(_listed(sure)) for named, sure in pairs):
            raise ValueError("its lists differ in length")
        if any((one.precision is not None) != multilabel for one in networks) or any(
            len(one.precision) != classes for one in networks if one.precision is not None
        ):
            raise ValueError("the precision of its classes is not there, or of others")
        if any(not 0 <= index < count for index in (*self.worst, *self.attention.images)):
            raise ValueError("a picture is of none of its images")
        if not self.attention.blocks.keys() <= {"student", "teacher"}:  # they become parts of file names
            raise ValueError("attention is of student and teacher only")
        return self

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return any(isinstance(labels, list) for labels in self.labels)

    @property
    def wrong(self) -> list[int]:
        """Numbers of the images that the student answers wrong; those that were left out are not among them."""
        answers = zip(self.labels, self.student.predictions, self.student.losses, strict=True)
        return [index for index, (label, said, loss) in enumerate(answers) if loss >= 0 and said != label]

    def label_of(self, index: int) -> str:
        """Return the label of an image, or all of them."""
        return ", ".join(self.classes[label] for label in _listed(self.labels[index])) or "none"

    def write(self, run: Path) -> None:
        """Write it into a run directory.

        Raises:
            DiskFull: There is no room.
            RunError: It cannot be written.
        """
        atomic_write.write_text(run / NAME, self.model_dump_json(exclude_none=True) + "\n")


def read_evidence(run: Path) -> Evidence | None:
    """Return what a run directory recorded; None for runs without a classifier, and of earlier versions.

    Raises:
        RunError: The file is damaged.
    """
    path = run / NAME
    if not path.is_file():
        return None
    try:
        return Evidence.model_validate(read_run_json(path))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RunError(f"cannot read {path}: {reason}", do="name a run directory that `remap` wrote") from error
