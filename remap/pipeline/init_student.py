"""Start the student's backbone from the teacher's weights, inside a run."""

from dataclasses import dataclass, replace

import torch

from remap.backbones.build import Backbone, state_hash
from remap.distributed.launch import accelerator
from remap.pipeline.samples import training_pixels
from remap.pipeline.shared import SharedResources
from remap.progress import Progress
from remap.recipe import Recipe
from remap.remapping.weights import INITS
from remap.remapping.weights.base import Report, remap_weights
from remap.runs.task import open_backbone

# Training images that importance is measured on, and how many at once.
IMAGES, BATCH = 512, 32


@dataclass(frozen=True)
class InitReport:
    """What a student took from its teacher: which weights, and how pixels are normalised for them."""

    teacher: str
    report: Report
    normalisation: str | None

    @property
    def text(self) -> str:
        more = f"\npixels are normalised as for the teacher: {self.normalisation}" if self.normalisation else ""
        return self.report.text + more

    def to_dict(self) -> dict:
        return {**self.report.to_dict(), "teacher": self.teacher, "normalisation": self.normalisation}


def init_from_teacher(
    student: Backbone, recipe: Recipe, shared: SharedResources, progress: Progress
) -> InitReport | None:
    """Initialise the recipe's student from its first teacher, if the recipe says so, before a method is attached.

    The teacher's backbone is used with the weights it comes with (of a run, with its method merged), not as it may be
    tuned for the task. No other source gives such a student, so it counts as one with random weights: its task file
    holds the complete backbone.

    Raises:
        RemapError: The two models do not fit, or no training image can be read.
    """
    spec = recipe.student.init
    if spec is None or recipe.teacher is None:  # a recipe with an init has a teacher
        return None
    row, cls = INITS.row(spec.name), INITS.load(spec.name)
    # Forked, so that the method draws the same numbers as without an initialisation.
    with progress.wait("initialising the student from the teacher"), torch.random.fork_rng(devices=[]):
        teacher = open_backbone(recipe.teacher, len(shared.classes(recipe)))
        # Importance is measured by forward passes.
        teacher.model.to(accelerator().device).requires_grad_(False)
        sample = None
        if row.reads_images:
            size, instead = {"images": IMAGES, "batch_size": BATCH}, "--init weight_selection"
            sample = training_pixels(teacher, recipe.data, recipe.seed, shared, **size, without_images=instead)()
        report = remap_weights(cls(cls.Config(**spec.options)), teacher, student, sample)
    theirs, mine = teacher.preprocess, student.preprocess
    same = (theirs.mean, theirs.std) == (mine.mean, mine.std)
    # Inherited weights expect the pixels that the teacher was trained on.
    student.preprocess = replace(mine, mean=theirs.mean, std=theirs.std)
    # The hash so far is that of the weights before, which are gone.
    student.identity = replace(student.identity, weights="none", sha256=state_hash(student.model, student.anatomy))
    words = None if same else f"mean {_listed(theirs.mean)}, standard deviation {_listed(theirs.std)}"
    inherited = InitReport(teacher.identity.model, report, words)
    progress.say(inherited.text)
    return inherited


def _listed(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in values)
