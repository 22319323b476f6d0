"""Sections of a recipe: models and training. Every field has its default and its description here."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from remap.backbones.names import is_pair
from remap.recipe.named import InitSpec, name_only
from remap.recipe.paths import require_path_or_name
from remap.registry import LATER
from remap.remapping.architecture.shrink_options import ShrinkSpec, is_shrink_word, read_shrink_word

# Of an image that a model sees, in pixels.
LARGEST_SIDE = 8192
# A path, or the name of a model.
PathOrName = Annotated[str, AfterValidator(require_path_or_name)]
# How a vision-language teacher gets its head: from what the classes are called.
WORDS = "words"
# Teachers that are made of the student.
SELF, EMA = "self", "ema"
# AdamW, and those of timm whose whole state is in numbers and tensors, so that a run resumes bit for bit.
Optimizer = Literal[
    "adamw", "sgd", "adabelief", "adafactor", "adam", "adamax", "adamp", "adopt", "laprop", "lars", "lion", "madgrad",
    "mars", "muon", "nadamw", "novograd", "radam", "rmsproptf", "sgdp",
]  # fmt: skip
# Options of a teacher that one made of the student cannot have.
OF_OTHERS = ("preset", "image_size", "classes", "epochs", "lr")


class Section(BaseModel):
    """A group of options: frozen, strict about types, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        # Pydantic would take a misspelt field and ignore it.
        assert set(update or ()) <= set(type(self).model_fields), update
        return super().model_copy(update=update, deep=deep)


class Fold(Section):
    """A fold of the labelled training images, which are divided the same way for every seed."""

    number: int = Field(ge=1, description="Which one, from 1.")
    of: int = Field(ge=2, description="How many there are.")
    held_out: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="Share of the other images to evaluate on, by which none is tuned."
    )
    judges: Annotated[bool, LATER] = Field(default=False, description="Evaluate on the fold that is left out.")

    @model_validator(mode="before")
    @classmethod
    def _require_both(cls, values: Any) -> Any:
        if isinstance(values, dict) and not {"number", "of"} <= set(values):
            raise ValueError("should have number and of, as in {number: 1, of: 5}")
        return values

    @property
    def left_out(self) -> tuple[int, int, float | None, bool]:
        """Which fold is left out, from 0, of how many, the share held out of the others, and whether it judges."""
        return self.number - 1, self.of, self.held_out, self.judges

    @property
    def evaluates(self) -> bool:
        """Whether labelled training images are evaluated on, in place of the evaluation images."""
        return self.judges or self.held_out is not None

    @model_validator(mode="after")
    def _require_one_of_them(self) -> Self:
        if self.number > self.of:
            raise ValueError(f"there is no fold {self.number} of {self.of}")
        if self.judges and self.held_out is not None:
            raise ValueError("judges evaluates on the fold, and held_out on others (leave one of them out)")
        return self


class ModelSpec(Section):
    """A backbone and where its weights come from."""

    model: PathOrName = Field(
        description='Short name, timm name, "local-dir:FOLDER", file of weights, run directory or "clip:NAME".'
    )
    weights: PathOrName = Field(
        default="pretrained",
        description='"pretrained" (timm\'s loader and cache), "none" (random) or a file (.safetensors, .pth ...).',
    )
    preset: Literal["none", "mae", "moco_v3"] | None = Field(
        default=None,
        description="How weights are read: mae pools patches, moco_v3 takes the class token; null is by name.",
    )
    image_size: int | None = Field(
        default=None, ge=1, le=LARGEST_SIDE, description="Side in pixels; null is the model's own."
    )


class TeacherSpec(ModelSpec):
    """A teacher and how it gets a head for these classes.

    The running average "ema" is that of Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    model: PathOrName = Field(default="mini_teacher", description='"self" is the untuned student, "ema" its average.')
    prepare: str = Field(
        default="probe",
        description='"probe" fits a head, "words" makes one of names (clip:), a method tunes it; "auto" tries ways, and'
        ' is the default of embedded models on your own images; or "none".',
    )
    classes: Annotated[PathOrName | None, LATER] = Field(
        default=None, description="YAML or JSON: our class to its class, or to a list; null matches by name."
    )
    weight: float = Field(default=1.0, gt=0.0, description="Share of the teacher among several.")
    epochs: int | None = Field(default=None, ge=1, description="Epochs of tuning; null is train.epochs.")
    lr: float | None = Field(default=None, gt=0.0, description="Learning rate of tuning; null is the method's.")
    allow_weak: bool = Field(default=False, description="Continue even if the teacher is no better than chance.")
    calibrate: Annotated[bool, LATER] = Field(default=False, description="Fit its temperature on held-out images.")
    balance: Annotated[float, LATER] = Field(
        default=0.0, ge=0.0, le=1.0, description="Part of the log of a class's mean probability that its logits lose."
    )
    soften: Annotated[float | None, LATER] = Field(
        default=None,
        gt=0.0,
        description="Divide its logits so that their standard deviation over the classes is at most this. 2.5 is the"
        " default of a run, where all images have labels and no losses are named.",
    )
    folds: Annotated[int | None, LATER] = Field(
        default=None,
        ge=2,
        description="A teacher for each of so many folds of the labelled images, prepared without it; null is one.",
    )
    overtaken: Annotated[Literal["keep", "fade"], LATER] = Field(
        default="keep", description="fade: its losses lose weight once the student is better on evaluation images."
    )
    cache: Literal["auto", "memory", "disk", "off"] = Field(
        default="auto",
        description="Where outputs are cached; auto uses those on disk, else memory, else disk if they do not fit.",
    )
    cache_dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto", description="Type of outputs on disk; auto is fp32, or fp16 in a bf16 run."
    )
    top_k: int | None = Field(default=None, ge=1, description="Probabilities per image to cache on disk; null is all.")
    shard: Literal["auto", "on", "off"] = Field(
        default="auto", description="Split weights among processes; auto if they need over half of a GPU's free memory."
    )
    joint: Annotated[bool, LATER] = Field(
        default=False, description="Train it along with the student, by adapters that share their cores (method slad)."
    )
    decay: float = Field(default=0.999, gt=0.0, lt=1.0, description='Decay of "ema", at most (1 + step) / (10 + step).')

    @model_validator(mode="after")
    def _answer_by_words(self) -> Self:
        """A vision-language model knows classes by their names."""
        if is_pair(self.model) and "prepare" not in self.model_fields_set:
            object.__setattr__(self, "prepare", WORDS)
        return self

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits of its prepared classifier are changed."""
        return bool(self.calibrate or self.balance or self.soften)

    @property
    def keeps_less(self) -> bool:
        """Whether it says how outputs are stored on disk."""
        return self.top_k is not None or self.cache_dtype != "auto"

    @property
    def learns(self) -> bool:
        """Whether it changes in training."""
        return self.joint or self.model == EMA

    @property
    def is_student(self) -> bool:
        """Whether it is made of the student's own weights."""
        return self.model in (SELF, EMA)


class StudentSpec(ModelSpec):
    """The student: a model, or one that is cut from the teacher."""

    model: PathOrName = Field(
        default="mini_student", description='Any model as for the teacher, or "shrink(teacher, depth=6, ...)".'
    )
    shrink: ShrinkSpec | None = Field(default=None, description="Cut from the teacher; model is its short form.")
    init: Annotated[InitSpec | None, BeforeValidator(name_only)] = Field(
        default=None, description="How the backbone starts from the teacher's weights; null is as weights says."
    )
    force_init: bool = Field(default=False, description="Let init overwrite weights that are not random.")
    extends: Annotated[PathOrName | None, LATER] = Field(
        default=None, description="Run whose tuned student it starts from, with its rows of the classifier."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, values: Any) -> Any:
        """``model: shrink(...)`` alone is ``shrink: {...}``."""
        if not isinstance(values, dict) or values.get("shrink") is not None or not is_shrink_word(values.get("model")):
            return values
        return {**values, "shrink": read_shrink_word(values["model"])}

    @model_validator(mode="after")
    def _write_short_form(self) -> Self:
        if self.shrink is None:
            return self
        if "model" in self.model_fields_set and (
            not is_shrink_word(self.model) or ShrinkSpec(**read_shrink_word(self.model)) != self.shrink
        ):
            raise ValueError(f"'{self.model}' and {self.shrink.word} exclude each other (leave student.model out)")
        object.__setattr__(self, "model", self.shrink.word)
        return self


def _names(value: Any) -> Any:
    """Read "tensorboard,wandb" as two names, and a list as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


class TrainSpec(Section):
    """The training loop: an optimiser with linear warm-up and cosine decay; which epoch is the result."""

    epochs: int = Field(default=30, ge=1, description="Passes over the training images.")
    batch_size: int = Field(default=64, ge=1, description="Images per step over all processes and micro-batches.")
    lr: float | None = Field(default=None, gt=0.0, description="Peak learning rate; null is base_lr * 128 / width.")
    base_lr: float | None = Field(default=None, gt=0.0, description="Peak rate at width 128; null is the method's.")
    optimizer: Annotated[Optimizer, LATER] = Field(
        default="adamw", description="AdamW, or another of timm by its name there; sgd has Nesterov momentum 0.9."
    )
    weight_decay: float = Field(default=1e-4, ge=0.0, description="Weight decay of the optimiser.")
    warmup_epochs: float | None = Field(default=None, ge=0.0, description="Linear warm-up; null is a tenth of epochs.")
    min_lr: float = Field(default=0.0, ge=0.0, description="Learning rate at the end of the cosine decay.")
    clip_norm: float | None = Field(
        default=1.0, gt=0.0, description="Largest norm of the gradient; null does not clip."
    )
    accumulation: int = Field(default=1, ge=1, description="Micro-batches per step.")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto is bf16 if the device has it.")
    compile: bool | Literal["auto", "graphs"] = Field(
        default="auto",
        description="torch.compile for the blocks; auto is in long runs on a GPU, graphs adds CUDA graphs.",
    )
    eval_every: int = Field(default=1, ge=1, description="Epochs between evaluations; the last is always evaluated.")
    fused_attention: Literal["auto", "on", "off"] = Field(
        default="auto", description="PyTorch's fused attention; auto is by a table that was measured."
    )
    checkpoint_seconds: float = Field(
        default=60.0, ge=0.0, description="Time between checkpoints, and what a kill may cost."
    )
    track: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(_names)] = Field(
        default=(), description="Experiment trackers: tensorboard, wandb, mlflow, trackio; several with commas."
    )
    processes: int | None = Field(default=None, ge=1, description="Processes the run must have; null is any number.")
    parallel: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="Each process holds the whole student, or a share of its blocks; results agree."
    )
    keep: Annotated[Literal["last", "best"], LATER] = Field(
        default="last", description="Epoch whose student is the result; best is by metric on selection images."
    )
    metric: Annotated[
        Literal["accuracy", "balanced_accuracy", "f1", "top5", "loss", "mAP", "f1_micro", "f1_macro"], LATER
    ] = Field(
        default="accuracy",
        description="Metric on the selection images that keep and patience go by; of task multilabel mAP, f1_micro,"
        " f1_macro or loss.",
    )
    patience: Annotated[int | None, LATER] = Field(
        default=None, ge=1, description="Epochs without a better metric after which training stops; null is never."
    )
    ema: Annotated[float | None, LATER] = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Decay of the running average of what is trained, which is the result; null takes no average.",
    )
    class_weight_power: Annotated[float, LATER] = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="A class of n images counts n^-power an image: 0 counts images alike, 1 classes.",
    )
    class_weight_by: Annotated[Literal["loss", "sampling"], LATER] = Field(
        default="loss", description="Classes are weighted in the loss on labels, or by how often images are drawn."
    )
    checkpoint_blocks: Annotated[bool, LATER] = Field(
        default=False, description="Compute blocks again in the backward pass: less memory, more time."
    )
    fit: Annotated[Literal["gradient", "prototypes", "ridge", "logistic", "none"], LATER] = Field(
        default="gradient",
        description="By steps; the classifier at once: class means, ridge or logistic regression; none: no training.",
    )
    ridge: Annotated[float | None, LATER] = Field(
        default=None, gt=0.0, description="Penalty of fit=ridge; null chooses it on a fifth of the training images."
    )
    align: Annotated[bool | Literal["bias"], LATER] = Field(
        default=False, description="Scale rows of new classes to the old norm; bias fits them on a held-out memory."
    )

    @model_validator(mode="after")
    def _one_pass(self) -> Self:
        """A classifier that is fitted at once sees the images once."""
        if not self.by_steps:
            object.__setattr__(self, "epochs", 1)
            object.__setattr__(self, "warmup_epochs", 0.0)
        return self

    @property
    def by_steps(self) -> bool:
        """Whether the student is trained by steps, not fitted at once or left as it is."""
        return self.fit == "gradient"

    @property
    def selects(self) -> bool:
        """Whether something is decided by selection images."""
        return self.keep == "best" or self.patience is not None

    @property
    def silent(self) -> set[str]:
        """Fields that change no result: how often an epoch is evaluated does where one is chosen."""
        return {"checkpoint_seconds", "processes", "parallel", "track", *(() if self.selects else ("eval_every",))}

    @property
    def copies(self) -> int:
        """How many copies of what is trained there are besides the student's own."""
        return (self.keep == "best") + (self.ema is not None)
