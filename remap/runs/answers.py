"""answers.json: what student and teacher answered for each evaluation image at the end of a run. Imports no torch.

With the pictures beside it, in ``report/``, it is all that a report shows of the images, which it needs no more.
"""

from pathlib import Path
from typing import Self

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
    """Of one network: the class of each image, its probability, and the cross-entropy; -1 where it was left out."""

    predictions: list[int]
    confidences: list[float]
    losses: list[float]


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
        worst: Numbers of the images whose label the student finds least likely, shown as ``image-IMAGE.jpg``.
    """

    classes: list[str]
    names: list[str]
    labels: list[int]
    student: Answers
    teacher: Answers | None = None
    worst: list[int] = []
    attention: Overlays = Field(default_factory=Overlays)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count, classes = len(self.names), len(self.classes)
        networks = [self.student, *([self.teacher] if self.teacher else [])]
        columns = [self.labels, *(getattr(one, name) for one in networks for name in Answers.model_fields)]
        if any(len(column) != count for column in columns):
            raise ValueError("its lists differ in length")
        if any(not 0 <= label < classes for label in self.labels):
            raise ValueError("a label is not one of its classes")
        if any(not -1 <= label < classes for one in networks for label in one.predictions):
            raise ValueError("an answer is not one of its classes")
        if any(not 0 <= index < count for index in (*self.worst, *self.attention.images)):
            raise ValueError("a picture is of none of its images")
        if not self.attention.blocks.keys() <= {"student", "teacher"}:  # they become parts of file names
            raise ValueError("attention is of student and teacher only")
        return self

    def write(self, run: Path) -> None:
        """Write it into a run directory.

        Raises:
            DiskFull: There is no room.
            RunError: It cannot be written.
        """
        atomic_write.write_text(run / NAME, self.model_dump_json() + "\n")


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
