"""The losses of remap in a training loop of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.errors import DataError, RecipeError
from remap.pipeline.objective import build_objective
from remap.recipe.checks import option_problems
from remap.recipe.problems import checked
from remap.recipe.schema import Recipe, TeacherSpec
from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import Objective, Pair
from remap.remapping.tap import Tap
from remap.tuning.attached import Attached


class Losses(nn.Module):
    """Weighted losses between a student and its teacher. Its parameters are the projectors of the losses."""

    def __init__(self, objective: Objective, student: Tap, teacher: Tap | None, classes: int = 0) -> None:
        super().__init__()
        self._classes = classes  # 0 where the student has no classifier
        # Taps are not modules: the networks' parameters are not those of this one.
        self.objective, self._student, self._teacher = objective, student, teacher

    def forward(
        self, images_BCHW: Tensor, labels_B: Tensor, teacher_images_BCHW: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run both networks; return the weighted sum, and each loss by name, detached and unweighted.

        Args:
            images_BCHW: As the student takes them: of its size, normalised as timm says.
            labels_B: Class of each image, int64; -1 for an image without a label, which losses on labels leave out.
            teacher_images_BCHW: The same images as the teacher takes them, where it has another size or normalisation.

        Raises:
            DataError: The labels are not int64, as many as the images, and of the student's classes.
        """
        self._require_labels(images_BCHW, labels_B)
        targets: dict[str, Tensor] = {}
        if self._teacher is not None:
            with torch.no_grad():
                seen = self._teacher(images_BCHW if teacher_images_BCHW is None else teacher_images_BCHW)
            targets = self.objective.targets(seen)
        # A loop of one's own does not tell how many of all images have a label: losses are means over those of a batch.
        labels = Labels(labels_B)
        labels = replace(labels, labeled=float(labels.known_B.float().mean()))
        total, terms = self.objective(self._student(images_BCHW), [targets], labels)
        return total, terms

    def _require_labels(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        if not isinstance(labels_B, Tensor) or labels_B.dtype != torch.int64 or labels_B.shape != images_BCHW.shape[:1]:
            given = f"{labels_B.dtype}, {tuple(labels_B.shape)}" if isinstance(labels_B, Tensor) else repr(labels_B)
            raise DataError(
                f"labels are not one class (int64) for each of the {len(images_BCHW)} images",
                given=given,
                do="write -1 for an image without a label",
            )
        # On a GPU a look at the values would wait for it in every step; there the loss itself stops on them.
        if labels_B.device.type == "cpu" and self._classes and not bool((labels_B < self._classes).all()):
            raise DataError(f"a label is not one of the student's {self._classes} classes", given=int(labels_B.max()))

    def after_step(self) -> None:
        """Follow a step of the optimiser, for losses that remember earlier steps (queues)."""
        self.objective.after_step()

    def close(self) -> None:
        """Take the hooks off both networks."""
        for tap in (self._student, self._teacher):
            if tap is not None:
                tap.close()


def losses(
    words: str | Sequence[str | Mapping[str, Any]], student: nn.Module | Attached, teacher: nn.Module | None = None
) -> Losses:
    """Return the losses between a student and a teacher, for a training loop of your own.

    Args:
        words: As ``--losses``: "ce,kd:0.5"; or a list of names and of mappings with options, as in a recipe.
        student: A timm model, or what ``remap.attach`` returned.
        teacher: A timm model, with the student's classes in its head where a loss reads logits. It is frozen and put
            in eval mode. None where every loss reads labels alone.

    Raises:
        RemapError: A loss is unknown, or does not fit the networks.
    """
    # The teacher of the recipe stands for the given model: losses are built for each that a recipe lists.
    spec = {"losses": words, "teachers": () if teacher is None else (TeacherSpec(),)}
    recipe = checked(Recipe, spec, "remap.losses")
    taught_by = [loss.name for loss in recipe.losses if LOSSES.row(loss.name).category not in ("labels", "domains")]
    problems = option_problems(recipe)
    if taught_by and teacher is None:
        problems.append(f"{', '.join(taught_by)}: a teacher is missing")
    problems += [f"{loss.name}: learns from an average that a run keeps" for loss in recipe.losses if loss.of_average]
    scheduled = ("weight_schedule", "temperature_schedule")
    problems += [
        f"losses.{loss.name}.{key}: follows the steps of a run of remap, which a loop of one's own does not tell"
        for loss in recipe.losses
        for key in scheduled
        if loss.options.get(key) is not None or getattr(loss, key, None) is not None
    ]
    if not recipe.losses:
        problems.append("losses: at least one loss is needed")
    if problems:
        raise RecipeError(problems, "remap.losses")
    extra = (student.extra_tokens, student.seam, student.tokens_from) if isinstance(student, Attached) else ()
    model = student.model if isinstance(student, Attached) else student
    anatomy = student.anatomy if isinstance(student, Attached) else anatomy_of(student)
    pair = Pair(anatomy, None if teacher is None else anatomy_of(teacher), int(getattr(model, "num_classes", 0)))
    objective = build_objective(recipe, [pair]).to(next(model.parameters()).device)
    if teacher is not None:
        _require_apart(model, teacher)
        _require_equal_classes(objective, model, teacher)
    if settled_by_a_run := objective.unsettled(0):
        names = ", ".join(name for name, _ in settled_by_a_run)
        raise RecipeError(
            [f"{names}: normalised by statistics of all images, which remap.distill computes"], "remap.losses"
        )
    taught = None
    if teacher is not None and pair.teacher is not None:
        taught = Tap(teacher.requires_grad_(False).eval(), pair.teacher, objective.teacher_needs())
    tap = Tap(model, anatomy, objective.student_needs(), *extra)
    return Losses(objective, tap, taught, int(getattr(model, "num_classes", 0)))


def _require_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that shares weights with its student: freezing the one would freeze the other."""
    ours = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in ours for parameter in teacher.parameters()):
        what = "teacher: it shares weights with the student, which would be frozen with it"
        raise RecipeError([f"{what} (take another model, or copy.deepcopy(model))"], "remap.losses")


def _require_equal_classes(objective: Objective, student: nn.Module, teacher: nn.Module) -> None:
    """Refuse heads of unequal sizes where a loss compares the answers: class 3 of one would be class 3 of the other."""
    compared = [name for name, term in objective.terms.items() if getattr(term, "classifier", "") == "teacher"]
    ours, theirs = (getattr(model, "num_classes", None) for model in (student, teacher))
    if compared and None not in (ours, theirs) and ours != theirs:
        what = f"{', '.join(compared)}: compares the answers of {ours} classes with those of {theirs}"
        raise RecipeError([f"{what} (give both models heads of the same classes: num_classes=N)"], "remap.losses")
