"""The schema of a recipe: names and numbers, no code. Unknown keys are errors; every default stands here."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from remap.io.paths import absolute
from remap.recipe.paths import absolute_data, absolute_model, absolute_weights, require_place
from remap.remapping import LOSSES
from remap.remapping.architecture.shrink_options import ShrinkSpec, is_shrink_word, read_shrink_word
from remap.remapping.weights import INITS
from remap.tuning import METHODS, config_of, parts_of, rows_of


def _require_place(word: str | None) -> str | None:
    return None if word is None else require_place(word)


# Of an image that a model sees, in pixels.
LARGEST_SIDE = 8192
# A path, or the name of a model.
Place = Annotated[str, AfterValidator(_require_place)]
PlaceOrNone = Annotated[str | None, AfterValidator(_require_place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSpec(Section):
    """Where the images are and how they are looked at.

    Attributes:
        source: "digits", a folder of class folders (with or without train/val/test), or a tar of one.
        val_source: A second folder or tar to evaluate on; by default the source's own split.
        val_fraction: Share of each class held out where the source has no split of its own.
        unlabeled: A folder or tar of images without labels (in any folders; their names mean nothing) that the
            student learns from beside the labelled ones.
        unlabeled_only: Learn from the images without labels instead of the labelled ones.
        labels: Keep the labels of this many training images (each class in proportion, one at least, the same images
            for every seed); the others count as unlabelled.
        augment: "none" keeps one fixed view of each image (teacher outputs are then computed once);
            "shift" moves it by up to an eighth of its side, "shift_flip" also mirrors it.
        views: With augmentation, a closed list of this many views of each image, replayed from seeds (epoch e sees
            view e % views), so that teacher outputs can be kept; null draws a new one in each epoch.
        mixup, cutmix: Parameter a of Beta(a, a) in mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al.
            2019, arXiv 1905.04899); 0 is without. With both, each pair of images draws one of the two. Teacher and
            student see the mixed image, which is a new one in each epoch.
        mix_probability: Share of the pairs that are mixed.
        max_bad: Largest share of training images that may be unreadable.
        skip_bad: Leave unreadable images out of evaluation too, instead of stopping.
        memory_gib: Views are kept in memory up to this size, else decoded again each epoch. So are, each up to this
            size by itself, the student's frozen features and the outputs of each teacher; in every process.
        workers: Decoding threads; null chooses by the machine.
    """

    source: Place = "digits"
    val_source: PlaceOrNone = None
    val_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    unlabeled: PlaceOrNone = None
    unlabeled_only: bool = False
    labels: int | None = Field(default=None, ge=1)
    augment: Literal["none", "shift", "shift_flip"] = "none"
    views: int | None = Field(default=None, ge=1)
    mixup: float = Field(default=0.0, ge=0.0)
    cutmix: float = Field(default=0.0, ge=0.0)
    mix_probability: float = Field(default=1.0, ge=0.0, le=1.0)
    max_bad: float = Field(default=0.1, ge=0.0, lt=1.0)
    skip_bad: bool = False
    memory_gib: float = Field(default=4.0, ge=0.0)
    workers: int | None = Field(default=None, ge=1)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def finite_views(self) -> int:
        """Number of views each image is seen in over all epochs; 0 where every epoch makes new ones."""
        if self.mixes:
            return 0
        return 1 if self.augment == "none" else self.views or 0

    def labeled_part(self) -> "DataSpec":
        """The same data without the images that come without labels."""
        return self.model_copy(update={"unlabeled": None, "unlabeled_only": False})


class ModelSpec(Section):
    """A backbone and where its weights come from.

    Attributes:
        model: A timm name or tag, a short name (vit_small), "mini_student", "local-dir:FOLDER", or a run directory.
        weights: "pretrained" (timm's loader and cache), "none" (random), or a .safetensors file.
        preset: How self-supervised weights are read out: "mae" (mean of the patch tokens and a fresh norm), "moco_v3"
            (class token; names of the original checkpoint); null takes what the model's name implies.
        image_size: Input size in pixels; null keeps the model's own.
    """

    model: Place
    weights: Place = "pretrained"
    preset: Literal["none", "mae", "moco_v3"] | None = None
    image_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)


# Teachers that are made of the student.
SELF, EMA = "self", "ema"
# What a teacher says of itself that one made of the student cannot.
OF_OTHERS = ("preset", "image_size", "epochs", "lr")


class TeacherSpec(ModelSpec):
    """A teacher and how it gets a head for these classes.

    Attributes:
        model: As for every model, or "self" (the student's backbone without its tuning, sharing its weights), or
            "ema" (the running average of the student; Tarvainen and Valpola 2017, arXiv 1703.01780).
        prepare: "probe" fits a linear head on cached features; a method's name tunes it; "none" takes it as it is.
        weight: Its share among several teachers.
        epochs, lr: For a tuned teacher; by default those of ``train`` and of the method.
        allow_weak: Go on although the teacher is at chance.
        cache: Where its outputs are kept while views are fixed. "auto" goes on with what is on disk already, else
            keeps them in memory, and on disk if they do not fit there; "off" asks it in every step.
        cache_dtype: How outputs are stored on disk (where they then are, under "auto"). "auto" is the precision of
            the run: fp32, or fp16 for bf16.
        top_k: Store that many class probabilities of an image on disk instead of all logits (as for cache_dtype).
        shard: Let each of several processes hold its share of the weights inside the blocks. "auto" does so on GPUs
            where the weights take more than half of the free memory of one of them. "self" and "ema" go with the
            student (train.parallel).
        decay: Of the running average, for "ema"; it rises to this value as min(decay, (1 + step) / (10 + step)).
    """

    model: Place = "mini_teacher"
    prepare: str = "probe"
    weight: float = Field(default=1.0, gt=0.0)
    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0.0)
    allow_weak: bool = False
    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    cache_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    top_k: int | None = Field(default=None, ge=1)
    shard: Literal["auto", "on", "off"] = "auto"
    decay: float = Field(default=0.999, gt=0.0, lt=1.0)

    @property
    def keeps_less(self) -> bool:
        """Whether it says how outputs are stored on disk."""
        return self.top_k is not None or self.cache_dtype != "auto"

    @property
    def is_student(self) -> bool:
        """Whether it is made of the student's own weights."""
        return self.model in (SELF, EMA)


_SHRINK_DEFAULTS = {name: field.default for name, field in ShrinkSpec.model_fields.items()}


class Named(BaseModel):
    """A name from one of the tables plus options of its own, checked against the class behind the name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _name_only(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class InitSpec(Named):
    """A way to start from the teacher's weights and its options, flat: ``{name: layers, which: first}``."""


class StudentSpec(ModelSpec):
    """The student: a model, or one that is cut from the teacher.

    Attributes:
        model: As for every model, or "shrink(teacher, depth=6, width=384)", the short form of ``shrink``.
        shrink: Derive the student from the teacher; ``model`` is then its short form.
        init: How its backbone starts from the teacher's weights; null leaves it as ``weights`` says.
        force_init: Let ``init`` overwrite weights that are not random.
    """

    model: Place = "mini_student"
    shrink: ShrinkSpec | None = None
    init: Annotated[InitSpec | None, BeforeValidator(_name_only)] = None
    force_init: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, values: Any) -> Any:
        """``model: shrink(...)`` alone is ``shrink: {...}``."""
        if not isinstance(values, dict) or values.get("shrink") is not None or not is_shrink_word(values.get("model")):
            return values
        return {**values, "shrink": read_shrink_word(values["model"])}

    @model_validator(mode="after")
    def _write_short_form(self) -> "StudentSpec":
        if self.shrink is None:
            return self
        options = self.shrink.model_dump()
        if "model" in self.model_fields_set and (
            not is_shrink_word(self.model) or {**_SHRINK_DEFAULTS, **read_shrink_word(self.model)} != options
        ):
            raise ValueError(f"'{self.model}' and {self.shrink.word} exclude each other (leave student.model out)")
        object.__setattr__(self, "model", self.shrink.word)
        return self


class MethodSpec(Named):
    """A tuning method and its options, flat: ``{name: vpt_deep, num_prompts: 10}``.

    A combination has the options of each part under the part's name: ``{name: vpt_deep+lora, lora: {rank: 4}}``.
    """


class LossSpec(Named):
    """A loss term, its weight in the objective (null: the table's) and its options."""

    weight: float | None = Field(default=None, ge=0.0)

    @property
    def teaches_classes(self) -> bool:
        """Whether it is about labels or logits, so that it trains the classifier; unknown names do not."""
        return self.name in LOSSES and (LOSSES.row(self.name).category == "labels" or self.reads_logits)

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the teacher's logits, so that the teacher needs a head."""
        known = self.name in LOSSES and LOSSES.row(self.name).category == "logits"
        return known or self.options.get("signal") == "logits"

    def is_idle(self, method: str) -> bool:
        """Whether it is about a signal that no part of the method can change."""
        return is_idle(self.name, method, self.options.get("signal"))


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
        parallel: What each of several processes holds. "ddp": the whole student. "fsdp2": its share of the weights
            inside the student's blocks, with their gradients and optimiser states; a block is put together while it
            runs. The student comes out the same.
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
    parallel: Literal["ddp", "fsdp2"] = "ddp"


def _model_only(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _models_only(value: Any) -> Any:
    return tuple(_model_only(item) for item in value) if isinstance(value, (list, tuple)) else value


def teachers_apart(values: dict[str, Any]) -> dict[str, Any]:
    """A list under ``teacher`` as the first one and ``more_teachers``."""
    if not isinstance(values.get("teacher"), (list, tuple)):
        return values
    first, *others = values["teacher"] or (None,)
    more = values.get("more_teachers") or []
    joined = [*others, *more] if isinstance(more, (list, tuple)) else more
    return {**values, "teacher": first, "more_teachers": joined}


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
        raise ValueError(f"'{word}': the weight after the colon must be a number, got '{weight}'") from None


class Recipe(Section):
    """Everything that decides a run. The same recipe and seed give the same student.

    ``losses`` null stands for cross-entropy alone without a teacher, and for ce + kd + attention with one (without
    attention where the method cannot change it, or where one of the models has none over the whole image).
    A list of teachers may stand under ``teacher``: the first is ``teacher``, the others are ``more_teachers``. Every
    loss is then the mean over teachers, by their weights.
    """

    name: str = Field(default="digits", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: DataSpec = DataSpec()
    teacher: Annotated[TeacherSpec | None, BeforeValidator(_model_only)] = None
    more_teachers: Annotated[tuple[TeacherSpec, ...], BeforeValidator(_models_only)] = ()
    student: Annotated[StudentSpec, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)] = (
        StudentSpec()
    )
    method: Annotated[MethodSpec, BeforeValidator(_name_only)] = MethodSpec(name="vpt_deep")
    losses: Annotated[tuple[LossSpec, ...] | None, BeforeValidator(loss_words)] = None
    train: TrainSpec = TrainSpec()

    @model_validator(mode="before")
    @classmethod
    def _several_teachers(cls, values: Any) -> Any:
        return teachers_apart(values) if isinstance(values, dict) else values

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
    def teachers(self) -> tuple[TeacherSpec, ...]:
        """All of them, in order."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    @property
    def has_default_losses(self) -> bool:
        """Whether nobody chose the losses. A saved recipe lists them, and they count as chosen from then on."""
        return "losses" not in self.model_fields_set

    @property
    def needs_labels(self) -> bool:
        """Whether every loss reads labels, so that an image without one teaches nothing."""
        known = [loss.name for loss in self.losses or () if loss.name in LOSSES]
        return all(LOSSES.row(name).category == "labels" for name in known)

    def written_out(self) -> "Recipe":
        """The same recipe with the defaults of its method and losses in place, so that it outlives a change of them,
        and with absolute paths, so that it works from any folder.

        Imports the classes behind the names, and so torch.
        """
        teachers = tuple(_absolute(spec) for spec in self.teachers)
        models = {
            "teacher": teachers[0] if teachers else None,
            "more_teachers": teachers[1:],
            "student": _absolute(self.student),
        }
        init = self.student.init
        if init is not None:
            whole = InitSpec(name=init.name, **_with_defaults(INITS.load(init.name).Config, init))
            models["student"] = models["student"].model_copy(update={"init": whole})
        val_source = None if self.data.val_source is None else absolute_data(self.data.val_source)
        unlabeled = None if self.data.unlabeled is None else absolute(self.data.unlabeled)
        places = {"source": absolute_data(self.data.source), "val_source": val_source, "unlabeled": unlabeled}
        data = self.data.model_copy(update=places)
        method = MethodSpec(name=self.method.name, **_with_defaults(config_of(self.method.name), self.method))
        losses = tuple(
            LossSpec(name=loss.name, weight=loss.weight, **_with_defaults(LOSSES.load(loss.name).Config, loss))
            for loss in self.losses or ()
        )
        train = self.train.model_copy(update={"base_lr": None if self.train.lr is not None else self._base_lr()})
        return self.model_copy(update={"data": data, **models, "method": method, "losses": losses, "train": train})

    def digest(self, *, places: bool = True) -> str:
        """Hash of everything that decides the result; equal for recipes that mean the same.

        Args:
            places: Whether where the images lie counts; what they hold decides, and they may be moved.
        """
        data = self.written_out().model_dump(mode="json", exclude={"name"})
        for name in ("checkpoint_seconds", "eval_every", "processes", "parallel"):  # they change no result
            data["train"].pop(name)
        for spec in (data["teacher"], *data["more_teachers"]):
            if spec is not None:
                spec.pop("shard")
        for name in ("workers", "memory_gib", *(() if places else ("source", "val_source", "unlabeled"))):
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


def _absolute(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"model": absolute_model(spec.model), "weights": absolute_weights(spec.weights)})


def _with_defaults(config: type[BaseModel], spec: "Named") -> dict[str, Any]:
    return config(**spec.options).model_dump(mode="json")


# The width that default learning rates were measured at.
BASE_WIDTH = 128
DEFAULT_LOSSES = ("ce", "kd", "attention")


def default_losses(method: str) -> tuple[str, ...]:
    """The default objective with a teacher, without the terms that a method cannot follow."""
    return tuple(name for name in DEFAULT_LOSSES if not is_idle(name, method))


def is_idle(loss: str, method: str, signal: str | None = None) -> bool:
    """Whether a loss is about a signal that no part of the method can change; unknown names are not.

    Args:
        signal: What the loss's own option of this name says, where it has one.
    """
    parts = parts_of(method)
    if loss not in LOSSES or any(part not in METHODS for part in parts):
        return False
    return all((signal or LOSSES.row(loss).signal) in METHODS.row(part).unchanged for part in parts)
