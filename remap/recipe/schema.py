"""The schema of a recipe: names and numbers, no code. Unknown keys are errors; every default stands here."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from remap.recipe.paths import absolute_data, absolute_model, absolute_weights
from remap.remapping import LOSSES
from remap.tuning import METHODS, config_of, parts_of, rows_of


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSpec(Section):
    """Where the images are and how they are looked at.

    Attributes:
        source: "digits", a folder of class folders (with or without train/val/test), or a tar of one.
        val_source: A second folder or tar to evaluate on; by default the source's own split.
        val_fraction: Share of each class held out where the source has no split of its own.
        augment: "none" keeps one fixed view of each image (teacher outputs are then computed once);
            "shift" moves it by up to an eighth of its side, "shift_flip" also mirrors it.
        max_bad: Largest share of training images that may be unreadable.
        skip_bad: Leave unreadable images out of evaluation too, instead of stopping.
        memory_gib: Views are kept in memory up to this size, else decoded again each epoch.
        workers: Decoding threads; null chooses by the machine.
    """

    source: str = "digits"
    val_source: str | None = None
    val_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    augment: Literal["none", "shift", "shift_flip"] = "none"
    max_bad: float = Field(default=0.1, ge=0.0, lt=1.0)
    skip_bad: bool = False
    memory_gib: float = Field(default=4.0, ge=0.0)
    workers: int | None = Field(default=None, ge=1)


class ModelSpec(Section):
    """A backbone and where its weights come from.

    Attributes:
        model: A timm name or tag, a short name (vit_small), "mini_student", "local-dir:FOLDER", or a run directory.
        weights: "pretrained" (timm's loader and cache), "none" (random), or a .safetensors file.
        preset: How self-supervised weights are read out: "mae" (mean of the patch tokens and a fresh norm), "moco_v3"
            (class token; names of the original checkpoint); null takes what the model's name implies.
    """

    model: str
    weights: str = "pretrained"
    preset: Literal["none", "mae", "moco_v3"] | None = None


class TeacherSpec(ModelSpec):
    """The teacher and how it gets a head for these classes.

    Attributes:
        prepare: "probe" fits a linear head on cached features; a method's name tunes it; "none" takes it as it is.
        epochs, lr: For a tuned teacher; by default those of ``train`` and of the method.
        allow_weak: Go on although the teacher is at chance.
        cache: Compute its outputs once when views are fixed ("auto"), or in every step ("off").
    """

    model: str = "mini_teacher"
    prepare: str = "probe"
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0.0)
    allow_weak: bool = False
    cache: Literal["auto", "off"] = "auto"


class StudentSpec(ModelSpec):
    model: str = "mini_student"


class Named(BaseModel):
    """A name from one of the tables plus options of its own, checked against the class behind the name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class MethodSpec(Named):
    """A tuning method and its options, flat: ``{name: vpt_deep, num_prompts: 10}``.

    A combination has the options of each part under the part's name: ``{name: vpt_deep+lora, lora: {rank: 4}}``.
    """


class LossSpec(Named):
    """A loss term, its weight in the objective (null: the table's) and its options."""

    weight: float | None = Field(default=None, ge=0.0)


class TrainSpec(Section):
    """The training loop. ``batch_size`` is global: all processes and accumulation steps together.

    Attributes:
        lr: Peak learning rate of AdamW; null takes base_lr * 128 / (width of the student).
        base_lr: The rate for a backbone 128 wide, scaled to others as Adam's rates transfer (Yang et al. 2022,
            arXiv 2203.03466); null takes the method's default.
        warmup_epochs: Linear warm-up from zero, then cosine to ``min_lr``; null is a tenth of the epochs.
        accumulation: Micro-batches to one step.
        precision: "auto" is bf16 on a GPU that has it, else fp32.
        compile: Run the student's blocks through torch.compile (worth it for long runs).
        eval_every: Evaluate after each n-th epoch; the last epoch always is, and it is the one that counts.
        fused_attention: "auto" uses PyTorch's fused kernel except on the CPU, where its backward is slower.
        checkpoint_seconds: Least time between two checkpoints; one is also written at the end of each epoch.
        processes: Number of processes the run must have; null takes what the launcher gives.
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float | None = Field(default=None, gt=0.0)
    base_lr: float | None = Field(default=None, gt=0.0)
    weight_decay: float = Field(default=1e-4, ge=0.0)
    warmup_epochs: float | None = Field(default=None, ge=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    eval_every: int = Field(default=1, ge=1)
    fused_attention: Literal["auto", "on", "off"] = "auto"
    checkpoint_seconds: float = Field(default=60.0, ge=0.0)
    processes: int | None = Field(default=None, ge=1)


def _name_only(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def loss_words(value: Any) -> Any:
    """ "ce,kd:0.5" or a list of names and mappings."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
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
        raise ValueError(f"'{word}': the weight after the colon must be a number") from None


class Recipe(Section):
    """Everything that decides a run. The same recipe and seed give the same student.

    ``losses`` null stands for cross-entropy alone without a teacher, and for ce + kd + attention with one (without
    attention where the method cannot change it, or where one of the models has none over the whole image).
    """

    name: str = Field(default="digits", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: DataSpec = DataSpec()
    teacher: Annotated[TeacherSpec | None, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)] = None
    student: Annotated[StudentSpec, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)] = (
        StudentSpec()
    )
    method: Annotated[MethodSpec, BeforeValidator(_name_only)] = MethodSpec(name="vpt_deep")
    losses: Annotated[tuple[LossSpec, ...] | None, BeforeValidator(loss_words)] = None
    train: TrainSpec = TrainSpec()

    @model_validator(mode="after")
    def _fill_losses(self) -> "Recipe":
        """Write the default objective out, with every weight, so that a saved recipe says it all."""
        losses = self.losses
        if losses is None:
            self.model_fields_set.discard("losses")
            names = ("ce",) if self.teacher is None else default_losses(self.method.name)
            losses = tuple(LossSpec(name=name) for name in names)
        filled = tuple(
            loss.model_copy(update={"weight": LOSSES.row(loss.name).weight})
            if loss.weight is None and loss.name in LOSSES
            else loss
            for loss in losses
        )
        object.__setattr__(self, "losses", filled)
        return self

    @property
    def has_default_losses(self) -> bool:
        """Whether nobody chose the losses. A saved recipe lists them, and they count as chosen from then on."""
        return "losses" not in self.model_fields_set

    def written_out(self) -> "Recipe":
        """The same recipe with the defaults of its method and losses in place, so that it outlives a change of them,
        and with absolute paths, so that it works from any folder.

        Imports the classes behind the names, and so torch.
        """
        models = {
            role: spec.model_copy(
                update={"model": absolute_model(spec.model), "weights": absolute_weights(spec.weights)}
            )
            for role, spec in (("teacher", self.teacher), ("student", self.student))
            if spec is not None
        }
        val_source = None if self.data.val_source is None else absolute_data(self.data.val_source)
        data = self.data.model_copy(update={"source": absolute_data(self.data.source), "val_source": val_source})
        method = MethodSpec(name=self.method.name, **_with_defaults(config_of(self.method.name), self.method))
        losses = tuple(
            LossSpec(name=loss.name, weight=loss.weight, **_with_defaults(LOSSES.load(loss.name).Config, loss))
            for loss in self.losses or ()
        )
        train = self.train.model_copy(update={"base_lr": None if self.train.lr is not None else self._base_lr()})
        return self.model_copy(update={"data": data, **models, "method": method, "losses": losses, "train": train})

    def digest(self) -> str:
        """Hash of everything that decides the result; equal for recipes that mean the same."""
        data = self.written_out().model_dump(mode="json", exclude={"name"})
        for name in ("checkpoint_seconds", "eval_every", "processes"):  # they change no result
            data["train"].pop(name)
        for name in ("workers", "memory_gib"):
            data["data"].pop(name)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def learning_rate(self, width: int) -> float:
        """The peak learning rate for a student of ``width``: the recipe's own, or its base rate scaled."""
        return self._base_lr() * BASE_WIDTH / width if self.train.lr is None else self.train.lr

    def _base_lr(self) -> float:
        """The recipe's, else the method's default (of a combination, the smallest)."""
        if self.train.base_lr is not None:
            return self.train.base_lr
        return min(row.lr for row in rows_of(self.method.name))


def _with_defaults(config: type[BaseModel], spec: "Named") -> dict[str, Any]:
    return config(**spec.options).model_dump(mode="json")


# The width that default learning rates were measured at.
BASE_WIDTH = 128
DEFAULT_LOSSES = ("ce", "kd", "attention")
# Where a method leaves attention as it is, it leaves the tokens inside the network as they are, too.
_FOLLOWS = {"attention": "attention", "tokens": "attention", "pooled": "pooled"}


def default_losses(method: str) -> tuple[str, ...]:
    """The default objective with a teacher, without the terms that a method cannot follow."""
    return tuple(name for name in DEFAULT_LOSSES if not is_idle(name, method))


def is_idle(loss: str, method: str) -> bool:
    """Whether a loss is about a signal that no part of the method can change; unknown names are not."""
    parts = parts_of(method)
    if loss not in LOSSES or any(part not in METHODS for part in parts):
        return False
    return all(_FOLLOWS.get(LOSSES.row(loss).signal) in METHODS.row(part).unchanged for part in parts)
