"""Names from the tables of methods, losses and initialisations, with their options."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from remap.recipe.paths import absolute_model
from remap.registry import LATER, MAY_BE_PATH
from remap.remapping import LOSSES
from remap.remapping.schedule import Schedule
from remap.tuning import METHODS, parts_of

DEFAULT_LOSSES = ("ce", "kd", "attention")
LABEL_FREE_LOSSES = ("feature", "tokens")
# Where only a part of the training images has labels: a batch holds few of them, soon known by heart, and by their full
# weight they would drown what the teacher says of the others (docs/objectives.md).
FEW_LABELS: dict[str, dict[str, Any]] = {"ce": {"weight": 0.1}, "kd": {"temperature": 2.0}}


class Named(BaseModel):
    """A name from one of the tables and its options, checked against the class behind the name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(description="Name in the table.")

    @property
    def options(self) -> dict[str, Any]:
        """Options besides the fixed keys."""
        return dict(self.model_extra or {})


class InitSpec(Named):
    """A way to start from the teacher's weights and its options, flat: ``{name: layers, which: first}``."""


class MethodSpec(Named):
    """A tuning method and its options, flat: ``{name: vpt_deep, num_prompts: 10}``.

    A combination has the options of each part under the part's name: ``{name: vpt_deep+lora, lora: {rank: 4}}``.
    """


class LossSpec(Named):
    """A loss term, its weight and its options, flat: ``{name: kd, weight: 0.5, temperature: 2}``."""

    weight: float = Field(default=1.0, ge=0.0, description="Weight in the objective; null is the loss's default.")
    weight_schedule: Schedule | None = Field(default=None, description="How the weight changes; null is not at all.")
    temperature_schedule: Schedule | None = Field(
        default=None, description="How the temperature (of the student and the teacher) changes; null is not at all."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_weight(cls, values: Any) -> Any:
        """Write the table's weight out, so that a saved recipe says it all."""
        if not isinstance(values, dict) or values.get("weight") is not None:
            return values
        name = values.get("name")
        return {**values, "weight": LOSSES.row(name).weight if isinstance(name, str) and name in LOSSES else 1.0}

    @model_serializer(mode="wrap")
    def _leave_out_no_schedule(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write recipes without schedules as earlier versions did, so that their runs can be resumed."""
        return {
            key: value
            for key, value in write(self).items()
            if value is not None or key not in ("weight_schedule", "temperature_schedule")
        }

    @property
    def has_default_options(self) -> bool:
        """Whether it has no options but those of a default objective, which are right."""
        return self.options.items() <= FEW_LABELS.get(self.name, {}).items()

    @property
    def over_batch(self) -> bool:
        """Whether it compares the images of a batch with each other; of logit_std, whether the loss behind it does."""
        return LOSSES.row(self.options.get("of", "kd") if self.name == "logit_std" else self.name).over_batch

    @property
    def teaches_classes(self) -> bool:
        """Whether it is about labels or logits, so that it trains the classifier; unknown names do not."""
        return self.name in LOSSES and (
            LOSSES.row(self.name).category == "labels" or self.reads_logits or self.of_average
        )

    @property
    def of_average(self) -> bool:
        """Whether its teacher is the student's running average and no other."""
        return self.name in LOSSES and LOSSES.row(self.name).of_average

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the teacher's logits, so that the teacher needs a head."""
        known = self.name in LOSSES and LOSSES.row(self.name).category == "logits"
        return known or self.options.get("signal") == "logits"

    @property
    def compares_logits(self) -> bool:
        """Whether it compares logits of different images: one that all of an image are shifted by changes it."""
        if self.name == "torchdistill":
            return self.options.get("signal") == "logits" and self.options.get("loss") in ("PKTLoss", "RKDLoss", None)
        return self.name == "affinity" and self.options.get("text_to_image") != 0

    def over(self, share: float) -> "LossSpec":
        """Return the same loss in a run of ``share`` times as many epochs, whose warm-ups are as much of it."""
        given = {"weight_schedule": self.weight_schedule, "temperature_schedule": self.temperature_schedule}
        schedules = {
            name: one.model_copy(update={"warmup_epochs": share * one.warmup_epochs})
            for name, one in given.items()
            if one is not None
        }
        return self.model_copy(update=schedules)

    def is_idle(self, method: str) -> bool:
        """Whether it is about a signal that no part of the method can change."""
        return is_idle(self.name, method, self.options.get("signal"))


def name_only(value: Any) -> Any:
    """Read ``vpt_deep`` as ``{name: vpt_deep}``."""
    return {"name": value} if isinstance(value, str) else value


def loss_words(value: Any) -> Any:
    """Read "ce,kd:0.5", or a list of names and mappings, as mappings.

    Raises:
        ValueError: A name is missing, or what follows a colon is not a number.
    """
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        if any(words) and not all(words):
            raise ValueError("a name is missing")
        value = words if any(words) else []
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(_loss_word(item) if isinstance(item, str) else item for item in value)


def _loss_word(word: str) -> dict[str, Any]:
    name, colon, weight = word.partition(":")
    if not colon:
        return {"name": name}
    try:
        return {"name": name, "weight": float(weight)}
    except ValueError:
        raise ValueError(f"'{word}': the weight after the colon must be a number, got '{weight}'") from None


def with_task(values: dict[str, Any]) -> dict[str, Any]:
    """Move ``task: multilabel`` of a recipe to the section of the images, which are opened by it.

    Raises:
        ValueError: That section says otherwise.
    """
    data, task = values.get("data", {}), values["task"]
    if isinstance(data, BaseModel):
        data = data.model_dump(exclude_unset=True)
    if not isinstance(data, dict):  # which is refused later
        return values
    if data.get("task", task) != task:
        raise ValueError(f"task is '{task}', and data.task '{data['task']}' (leave one of them out)")
    return {**{key: value for key, value in values.items() if key != "task"}, "data": {**data, "task": task}}


def default_losses(
    method: str, *, labels: bool = True, teacher: bool = True, target: bool = False, few: bool = False
) -> tuple[LossSpec, ...]:
    """Return the default objective, without the terms that a method cannot follow.

    Args:
        labels: Whether there are labelled images.
        teacher: Whether there is a teacher.
        target: Whether there is another domain to adapt to.
        few: Whether there are training images without labels, too.
    """
    names: tuple[str, ...] = (DEFAULT_LOSSES if labels else LABEL_FREE_LOSSES) if teacher else ("ce",)
    # Of those tried the one that gained on every kind of images (docs/new-camera.md).
    names += ("infomax",) if target else ()
    options = FEW_LABELS if few and labels and teacher else {}
    if any(part in METHODS and METHODS.row(part).two_classifiers for part in parts_of(method)):
        options = {name: one for name, one in options.items() if name != "ce"}  # whose classifier is its own
    chosen = (name for name in names if not is_idle(name, method))
    return tuple(LossSpec.model_validate({"name": name, **options.get(name, {})}) for name in chosen)


def is_idle(loss: str, method: str, signal: str | None = None) -> bool:
    """Whether a loss is about a signal that no part of the method can change, or about maps that one enlarges.

    Unknown names are not.

    Args:
        loss: Its name.
        method: Name of a method or a combination.
        signal: The loss's own option of this name, if it has one.
    """
    parts = parts_of(method)
    if loss not in LOSSES or any(part not in METHODS for part in parts):
        return False
    rows, signal = [METHODS.row(part) for part in parts], signal or LOSSES.row(loss).signal
    return all(signal in row.unchanged for row in rows) or (signal == "tokens" and any(row.enlarges for row in rows))


def without_later(model: BaseModel, *exclude: str) -> dict[str, Any]:
    """Return what a section or options say, without ``LATER`` fields at their default."""
    values = model.model_dump(mode="json", exclude=set(exclude))
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if LATER in field.metadata and value == field.default:
            values.pop(name, None)
        elif name in values and isinstance(value, BaseModel):
            values[name] = without_later(value)
    return values


def of_digest(spec: Named, config: type[BaseModel]) -> dict[str, Any]:
    """Return what counts of a name and its options in the hash of a recipe."""
    return spec.model_dump(mode="json", exclude=set(spec.options)) | without_later(config(**spec.options))


def with_defaults(config: type[BaseModel], spec: Named) -> dict[str, Any]:
    """Return all options behind a name, also those that are not given, with absolute paths."""
    options = config(**spec.options)
    return options.model_dump(mode="json") | _absolute_paths(options)


def _absolute_paths(options: BaseModel) -> dict[str, Any]:
    """Return the options that may be paths, and those of the methods of a combination."""
    found: dict[str, Any] = {}
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, BaseModel):
            found[name] = value.model_dump(mode="json") | _absolute_paths(value)
        elif MAY_BE_PATH in field.metadata:
            found[name] = absolute_model(value)
    return found
