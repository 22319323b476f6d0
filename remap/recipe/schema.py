"""The schema of a recipe: names and numbers, no code. Unknown keys are errors."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from remap.backbones.names import is_embedded
from remap.data import DEFAULT_SOURCE, METRIC, MULTILABEL
from remap.data.augmentation import Augmentation
from remap.io.paths import absolute
from remap.recipe import named
from remap.recipe.data_section import SELECTION, DataSpec
from remap.recipe.named import InitSpec, LossSpec, MethodSpec, Named, default_losses, is_idle, loss_words, name_only
from remap.recipe.paths import absolute_model, absolute_weights, is_run
from remap.recipe.sections import (
    EMA,
    LARGEST_SIDE,
    OF_OTHERS,
    SELF,
    WORDS,
    ModelSpec,
    PathOrName,
    Section,
    StudentSpec,
    TeacherSpec,
    TrainSpec,
)
from remap.remapping import LOSSES
from remap.remapping.architecture.shrink_options import ShrinkSpec
from remap.remapping.weights import INITS
from remap.tuning import config_of, rows_of

__all__ = [
    "EMA", "LARGEST_SIDE", "OF_OTHERS", "SELF", "WORDS", "DataSpec", "InitSpec", "LossSpec", "MethodSpec", "ModelSpec",
    "Named", "PathOrName", "Recipe", "Section", "ShrinkSpec", "StudentSpec", "TeacherSpec", "TrainSpec",
    "default_losses", "is_idle",
]  # fmt: skip

Model = TypeVar("Model", bound=ModelSpec)
# The width that default learning rates were measured at; to others they are scaled as Adam's rates transfer (Yang et
# al. 2022, arXiv 2203.03466).
BASE_WIDTH = 128
# The result of a run without labels is a backbone, which this method changes freely.
LABEL_FREE_METHOD = "full"
# The spread of logits over the classes that kd's default temperature suits: about that of teachers that a run prepares.
USUAL_SPREAD = 2.5
# In place of losses: the run chooses them.
AUTO = "auto"
# Fields that change no result.
_SILENT = {"workers", "memory_gib"}
_DATA_PATHS = {"source", "val_source", "unlabeled", "target", "memory"}


def as_list(value: Any) -> list[Any]:
    """Return the items of a list; a single value is a list of one, null an empty one."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def model_only(value: Any) -> Any:
    """Read ``vit_small`` as ``{model: vit_small}``."""
    return {"model": value} if isinstance(value, str) else value


def _models_only(value: Any) -> Any:
    return tuple(map(model_only, as_list(value)))


class Recipe(Section):
    """Everything that decides a run. The same recipe and seed give the same student.

    Of several teachers, every loss is the mean by their weights. They are written ``teacher: {...}`` for one and
    ``teacher: [...]`` for several; ``more_teachers`` in older files are those after the first.
    """

    # What messages list as allowed: the keys that recipes are written with.
    WRITTEN: ClassVar[tuple[str, ...]] = (
        *("name", "seed", "task", "data", "teacher", "teachers", "student", "method", "losses", "train", "baseline"),
    )

    name: str = Field(default="digits", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the run.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of all random numbers.")
    data: DataSpec = Field(default=DataSpec(), description="Images and their views.")
    teachers: Annotated[tuple[TeacherSpec, ...], BeforeValidator(_models_only)] = Field(
        default=(), description="Teachers; one may be written as teacher: MODEL."
    )
    student: Annotated[StudentSpec, BeforeValidator(model_only)] = Field(
        default=StudentSpec(), description="The student."
    )
    method: Annotated[MethodSpec, BeforeValidator(name_only)] = Field(
        default=MethodSpec(name="lora"), description="How the student is tuned."
    )
    losses: Annotated[tuple[LossSpec, ...], BeforeValidator(loss_words)] = Field(
        default=(),
        description="Loss terms; null is ce, and with a teacher kd and attention if method and models allow.",
    )
    train: TrainSpec = Field(default=TrainSpec(), description="The training loop.")
    choose_losses: bool = Field(
        default=False, description="Try a few objectives on held-out training images first; losses: auto sets it."
    )
    baseline: bool = Field(
        default=False, description="Train the student once more, on labels alone, to compare; remap distill does so."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_older_spellings(cls, values: Any) -> Any:
        """Join the keys of teachers in one list; losses of null or "auto" were not chosen; ``task`` is of data."""
        if not isinstance(values, dict):
            return values
        if "task" in values:
            values = named.with_task(values)
        keys = [key for key in ("teacher", "teachers", "more_teachers") if key in values]
        kept = {key: value for key, value in values.items() if key not in keys}
        if kept.get("losses") == AUTO:
            kept["choose_losses"] = True
        if kept.get("losses", ()) in (None, AUTO):
            del kept["losses"]
        return {**kept, "teachers": [one for key in keys for one in as_list(values[key])]} if keys else kept

    @model_validator(mode="after")
    def _fill_losses(self) -> "Recipe":
        """Write the default objective out, and what follows from it, so that a saved recipe says it all."""
        labels, label_free = self.data.source is not None, self.data.unlabeled is not None and self._teaches_no_classes
        backbone = label_free or not (labels or self.data.classes is not None)
        if backbone and "method" not in self.model_fields_set:
            object.__setattr__(self, "method", MethodSpec(name=LABEL_FREE_METHOD))
        if self.has_default_losses:
            object.__setattr__(self, "losses", self.default_losses_of(self.method.name))
        if self.brings_average and EMA not in (spec.model for spec in self.teachers):
            object.__setattr__(self, "teachers", (*self.teachers, TeacherSpec(model=EMA)))
        if self.brings_average and "augment" not in self.data.model_fields_set:
            object.__setattr__(self, "data", self.data.model_copy(update={"augment": "strong"}))
        if label_free or not labels:
            object.__setattr__(self, "data", self.data.model_copy(update={"unlabeled_only": True}))
        if self.data.multilabel and self.train.selects and "metric" not in self.train.model_fields_set:
            object.__setattr__(self, "train", self.train.model_copy(update={"metric": METRIC[MULTILABEL]}))
        if (self.train.selects or self.train.align == "bias") and self.data.selection is None:
            object.__setattr__(self, "data", self.data.model_copy(update={"selection": SELECTION}))
        object.__setattr__(self, "teachers", tuple(map(self._with_defaults, self.teachers)))
        return self

    def _with_defaults(self, spec: TeacherSpec) -> TeacherSpec:
        if self._tries_ways(spec):
            return spec.model_copy(update={"prepare": AUTO})
        return spec.model_copy(update={"soften": USUAL_SPREAD}) if self._softens(spec) else spec

    def _tries_ways(self, spec: TeacherSpec) -> bool:
        """Whether ways to prepare a teacher are tried unless one is named: embedded models, on images of one's own.

        On four sets that they do not know, a head alone was 5 to 19 points below the best way (docs/objectives.md).
        """
        if "prepare" in spec.model_fields_set or not is_embedded(spec.model) or spec.weights != "pretrained":
            return False
        holds_out = spec.calibrate or spec.folds is not None or self.data.held_out is not None
        own_images = self.data.source not in (None, DEFAULT_SOURCE)
        return own_images and not holds_out and not spec.joint and self.data.fold is None

    def _softens(self, spec: TeacherSpec) -> bool:
        """Whether answers of a teacher that was trained before are made less sure, unless the recipe says how sure.

        Trained by steps to their end, such teachers are so sure at the default temperature that kd repeats the labels,
        and harder than ce does (docs/objectives.md).
        """
        chosen = "soften" in spec.model_fields_set or not self.has_default_losses or self.choose_losses
        if chosen or not is_run(spec.model):
            return False
        data = self.data
        labels = data.source is not None and not data.labels_are_few and not data.multilabel and data.target is None
        return labels and spec.classes is None and not spec.joint and self.student.extends is None

    @model_serializer(mode="wrap")
    def _write_teachers(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write one teacher as a mapping and several as a list, which earlier versions read too."""
        values = write(self)
        teachers = values.get("teachers") or (None,)
        one_or_list = teachers[0] if len(teachers) == 1 else list(teachers)
        return {
            "teacher" if key == "teachers" else key: one_or_list if key == "teachers" else value
            for key, value in values.items()
        }

    @property
    def teacher(self) -> TeacherSpec | None:
        """The first teacher."""
        return self.teachers[0] if self.teachers else None

    @property
    def finite_views(self) -> int:
        """Number of views each image is seen in during training; 0 where every epoch makes new ones."""
        return min(self.data.finite_views, self.train.epochs)

    @property
    def brings_average(self) -> bool:
        """Whether a loss brings the student's running average along, which then teaches that loss alone."""
        return any(loss.of_average for loss in self.losses)

    @property
    def named_teachers(self) -> tuple[TeacherSpec, ...]:
        """The teachers besides an average that a loss brings along."""
        return tuple(spec for spec in self.teachers if spec.model != EMA or not self.brings_average)

    @property
    def has_default_losses(self) -> bool:
        """Whether the losses were not chosen. A saved recipe lists them, and they count as chosen from then on."""
        return "losses" not in self.model_fields_set

    def default_losses_of(self, method: str) -> tuple[LossSpec, ...]:
        """Return the losses that this recipe would have with a method, if none were chosen."""
        labels = self.data.source is not None
        if not labels and self.data.classes is not None:
            return (LossSpec(name="kd"),)
        kinds = {"labels": labels, "teacher": bool(self.teachers), "target": self.data.target is not None}
        return default_losses(method, **kinds, few=self._labels_are_few)

    @property
    def label_free(self) -> bool:
        """Whether the student learns without labels and without a classifier; labels, if there are any, judge it."""
        return self.data.unlabeled_only and self._teaches_no_classes

    @property
    def _labels_are_few(self) -> bool:
        """Whether training images without labels are answered by teachers that were prepared on those with labels."""
        prepared = all(not spec.is_student and spec.prepare not in ("none", WORDS) for spec in self.teachers)
        return self.data.labels_are_few and prepared and not self.data.multilabel

    @property
    def _teaches_no_classes(self) -> bool:
        counting = [loss for loss in self.losses if loss.weight]
        return bool(counting) and not any(loss.teaches_classes for loss in counting)

    @property
    def needs_labels(self) -> bool:
        """Whether every loss reads labels, so that an image without one teaches nothing."""
        return all(LOSSES.row(loss.name).category == "labels" for loss in self.losses if loss.name in LOSSES)

    def written_out(self) -> "Recipe":
        """Return the same recipe with the defaults of its method and losses and with absolute paths.

        So it outlives a change of defaults and works from any folder. Imports the classes behind the names, and so
        torch.
        """
        student, init = _absolute(self.student), self.student.init
        if init is not None:
            init = InitSpec(name=init.name, **named.with_defaults(INITS.load(init.name).Config, init))
        base_lr = None if self.train.lr is not None else self._base_lr()
        method = MethodSpec(name=self.method.name, **named.with_defaults(config_of(self.method.name), self.method))
        losses = tuple(
            LossSpec(
                name=loss.name,
                weight=loss.weight,
                weight_schedule=loss.weight_schedule,
                temperature_schedule=loss.temperature_schedule,
                **named.with_defaults(LOSSES.load(loss.name).Config, loss),
            )
            for loss in self.losses
        )
        return self.model_copy(
            update={
                "data": self.data.written_out(),
                "teachers": tuple(map(_absolute, self.teachers)),
                "student": student.model_copy(update={"init": init}),
                "method": method,
                "losses": losses,
                "train": self.train.model_copy(update={"base_lr": base_lr}),
            }
        )

    def digest(self, *, places: bool = True) -> str:
        """Return the hash of everything that decides the result; equal for recipes that mean the same.

        Args:
            places: Whether the paths of the images count; their content decides, and they may be moved.
        """
        recipe = self.written_out()
        data = recipe.data.model_copy(update=recipe.data.words())
        student, init = named.without_later(recipe.student), recipe.student.init
        if data.depth == 1:  # where null is read at all it means 1
            data = data.model_copy(update={"depth": None})
        if init is not None:
            student["init"] = named.of_digest(init, INITS.load(init.name).Config)
        silent = recipe.train.silent
        if recipe.train.eval_every != 1 and any(spec.overtaken == "fade" for spec in recipe.teachers):
            silent = silent - {"eval_every"}  # teachers lose weight where the student is evaluated
        # As recipes of one teacher and more were written first, so that runs of that time can be resumed.
        teachers = [named.without_later(spec, "shard") for spec in recipe.teachers]
        values = recipe.model_dump(mode="json", exclude={"name", "baseline", "choose_losses", "teachers"}) | {
            # The operations count, not the fields that name them.
            "data": named.without_later(data, *_SILENT, *Augmentation.model_fields, *(() if places else _DATA_PATHS))
            | {"augment": data.augmentation.key()},
            "teacher": teachers[0] if teachers else None,
            "more_teachers": teachers[1:],
            "student": student,
            "method": named.of_digest(recipe.method, config_of(recipe.method.name)),
            "losses": [named.of_digest(loss, LOSSES.load(loss.name).Config) for loss in recipe.losses],
            "train": named.without_later(recipe.train, *silent),
        }
        if recipe.train.compile == "auto":  # as it was written before there was a choice
            values["train"]["compile"] = False
        if recipe.choose_losses:
            values["choose_losses"] = True
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def learning_rate(self, width: int) -> float:
        """Return the peak learning rate for a student of ``width``: the recipe's own, or its base rate scaled."""
        return self._base_lr() * BASE_WIDTH / width if self.train.lr is None else self.train.lr

    def _base_lr(self) -> float:
        """Return the recipe's base rate, else the method's default (of a combination, the smallest)."""
        if self.train.base_lr is not None:
            return self.train.base_lr
        return min(row.lr for row in rows_of(self.method.name))


def _absolute(spec: Model) -> Model:
    paths = {"model": absolute_model(spec.model), "weights": absolute_weights(spec.weights)}
    if isinstance(spec, TeacherSpec) and spec.classes is not None:
        paths["classes"] = absolute(spec.classes)
    if isinstance(spec, StudentSpec) and spec.extends is not None:
        paths["extends"] = absolute(spec.extends)
    return spec.model_copy(update=paths)
