"""The section of a recipe that says where the images are, and how they are viewed."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from remap.data import CLASSES, MULTILABEL
from remap.data.augmentation import PRESETS, Augmentation, Crop, Erasing, Jitter, RandAugment
from remap.data.pixels import MOST_MEGAPIXELS
from remap.data.words import of_images
from remap.io.paths import absolute
from remap.language.words import ONE, read_words, split_classes, that_fit
from remap.recipe.paths import absolute_data
from remap.recipe.sections import Fold, PathOrName, Section
from remap.registry import LATER

# Share of the labelled training images that the epoch is chosen by, where a recipe does not say it.
SELECTION = 0.1


def _require_ends(ends: list[float]) -> list[float]:
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError("should be two numbers, the smaller one first, as in [0, 4095]")
    return ends


def _names(value: Any) -> Any:
    """Read "cats,dogs" as two names, a number as a name, and a list as a tuple."""
    if isinstance(value, str):
        value = value.split(",")
    elif isinstance(value, int):
        value = [value]
    return tuple(str(name).strip() for name in value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    """Read lists of texts, and those of a mapping, as tuples."""
    if isinstance(value, dict):
        return {name: _lists(texts) for name, texts in value.items()}
    return tuple(value) if isinstance(value, list) else value


class DataSpec(Section):
    """Where the images are and how they are viewed.

    A folder or tar may be split into train, val and test. With mixup and CutMix both on, each pair of images draws
    one of the two; teacher and student see the mixed image, which is a new one in each epoch.
    """

    source: PathOrName | None = Field(
        default="digits",
        description='"digits" (built in), class folders, a tar or zip of them, a CSV, or NAME:REST of another source'
        " (docs/data.md); null is none, if unlabeled.",
    )
    task: Annotated[Literal["classes", "multilabel"], LATER] = Field(
        default=CLASSES,
        description="What is learned: one class an image, or multilabel, any number of them; task in recipes.",
    )
    val_source: PathOrName | None = Field(
        default=None, description="Images to evaluate on, written as source; null is the source's own split."
    )
    val_fraction: float = Field(
        default=0.2, gt=0.0, lt=1.0, description="Share of each class held out if the source has no split."
    )
    classes: Annotated[tuple[str, ...] | PathOrName | None, BeforeValidator(split_classes), LATER] = Field(
        default=None,
        description='Words of vision-language models for the classes: "ant,hat|cap" or a file; null is their names.'
        " Without labelled images these are the classes.",
    )
    templates: Annotated[tuple[str, ...] | PathOrName, BeforeValidator(_lists), LATER] = Field(
        default=ONE[0], description='Sentences around the words: "one", "clip" (its 80) or a file of lines with {}.'
    )
    descriptions: Annotated[dict[str, tuple[str, ...]] | PathOrName | None, BeforeValidator(_lists), LATER] = Field(
        default=None, description="JSON of class: sentence, or a list of them, used beside the templates."
    )
    depth: Annotated[int | None, LATER] = Field(
        default=None,
        ge=1,
        le=8,
        description="Level of the folders that are the classes; null is 1, and an error where these hold only folders.",
    )
    only: Annotated[tuple[str, ...] | None, BeforeValidator(_names), LATER] = Field(
        default=None, min_length=1, description="Classes whose images are used; null is all."
    )
    known_classes: Annotated[tuple[str, ...] | None, BeforeValidator(_names), LATER] = Field(
        default=None,
        min_length=2,
        description="Classes of the classifier, of which the images may lack some; null is those of the images.",
    )
    memory: Annotated[PathOrName | None, LATER] = Field(
        default=None, description="File of a few images of earlier sessions to learn from as well (`remap extend`)."
    )
    unlabeled: PathOrName | None = Field(
        default=None,
        description="Images to learn from without labels, written as source; labels and folder names mean nothing.",
    )
    unlabeled_only: bool = Field(default=False, description="Learn from the images without labels only.")
    target: Annotated[PathOrName | None, LATER] = Field(
        default=None,
        description="Images of another domain to adapt to, without labels, written as source; half of every batch.",
    )
    labels: int | None = Field(default=None, ge=1, description="Labels to keep, the same for every seed; null is all.")
    per_class: Annotated[int | None, LATER] = Field(
        default=None, ge=1, description="Training images of each class to use, the same for every seed; null is all."
    )
    per_class_seed: Annotated[int, LATER] = Field(
        default=0, ge=0, lt=2**32, description="Which images per_class takes: a number a draw, as few-shot tables have."
    )
    subset: Annotated[Literal["base", "new"] | None, LATER] = Field(
        default=None, description="base is the first half of the classes in their order, new the others; null is all."
    )
    held_out: Annotated[float | None, LATER] = Field(
        default=None, gt=0.0, lt=1.0, description="Share of the labelled training images to evaluate on instead."
    )
    fold: Annotated[Fold | None, LATER] = Field(
        default=None, description="Fold of the labelled training images to leave out; a run sets it (teacher.folds)."
    )
    selection: Annotated[float | None, LATER] = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="Share of the labelled training images held out for train.keep and patience; null is 0.1 for them.",
    )
    augment: Literal["none", "light", "strong", "custom", "shift", "shift_flip"] = Field(
        default="none",
        description="light crops, strong also draws from RandAugment and erases, custom is what the next fields say.",
    )
    crop: Crop | None = Field(default=None, description="A random part of the image; null is as augment says.")
    flip: float | None = Field(
        default=None, ge=0.0, le=1.0, description="Share of the images that are mirrored; null is as augment says."
    )
    shift: float | None = Field(
        default=None, ge=0.0, le=0.5, description="Largest shift, as a share of each side; null is as augment says."
    )
    rand_augment: RandAugment | None = Field(
        default=None, description="Random operations of one magnitude (colours too); null is as augment says."
    )
    trivial_augment: bool | None = Field(
        default=None,
        description="One of them, magnitude drawn (Müller and Hutter 2021, arXiv 2103.10158); null is as augment says.",
    )
    jitter: Jitter | None = Field(default=None, description="Random colours; null is as augment says.")
    erasing: Erasing | None = Field(default=None, description="A rectangle erased; null is as augment says.")
    views: int | None = Field(
        default=None,
        ge=1,
        description="Augmented views per image, repeated so that outputs can be cached; null draws new ones.",
    )
    mixup: float = Field(
        default=0.0, ge=0.0, description="a of Beta(a, a) in mixup (Zhang et al. 2018, arXiv 1710.09412)."
    )
    cutmix: float = Field(
        default=0.0, ge=0.0, description="a of Beta(a, a) in CutMix (Yun et al. 2019, arXiv 1905.04899)."
    )
    mix_probability: float = Field(
        default=1.0, ge=0.0, le=1.0, description="Share of the pairs of images that are mixed."
    )
    alpha: Annotated[Literal["white", "black", "checker", "drop"], LATER] = Field(
        default="white", description="What transparent pixels show; drop shows the colours stored below."
    )
    value_range: Annotated[Annotated[list[float], AfterValidator(_require_ends)] | None, LATER] = Field(
        default=None, description="Values that become 0 and 255 in images of more than 8 bits; null finds them."
    )
    max_megapixels: Annotated[float | None, LATER] = Field(
        default=None,
        gt=0.0,
        le=MOST_MEGAPIXELS,
        description="Largest image that is decoded; null is 89.5, and JPEG up to 500 at reduced size.",
    )
    decode: Annotated[Literal["exact", "fast"], LATER] = Field(
        default="exact",
        description="exact is Pillow's decoder and resize; fast is PyTorch's: sooner, and nearly the same pixels.",
    )
    max_bad: float = Field(default=0.1, ge=0.0, lt=1.0, description="Largest share of unreadable training images.")
    skip_bad: bool = Field(default=False, description="Skip unreadable images in evaluation too, instead of stopping.")
    memory_gib: float = Field(default=4.0, ge=0.0, description="Memory in GiB for views, features, and outputs each.")
    workers: int | None = Field(default=None, ge=1, description="Decoding threads; null chooses by the machine.")

    @model_validator(mode="after")
    def _default_source(self) -> Self:
        """Without labelled images, those without labels are all there are."""
        if self.unlabeled is not None and "source" not in self.model_fields_set:
            object.__setattr__(self, "source", None)
        return self

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of classes."""
        return self.task == MULTILABEL

    @property
    def speaks(self) -> bool:
        """Whether it says what classes are called."""
        return self.classes is not None or self.templates != ONE[0] or self.descriptions is not None

    @property
    def augmentation(self) -> Augmentation:
        """The operations of ``augment``, and what other fields say of them instead."""
        return Augmentation(**{**dict(PRESETS[self.augment]), **self.operations})

    @property
    def operations(self) -> dict[str, Any]:
        """The operations that have a field of their own."""
        fields = {name: getattr(self, name) for name in Augmentation.model_fields}
        return {name: value for name, value in fields.items() if value is not None}

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

    def words(self) -> dict[str, Any]:
        """Return what files and lists of words say; see ``read_words``."""
        return read_words(self.classes, self.templates, self.descriptions)

    def written_out(self) -> "DataSpec":
        """Return the same data with absolute paths, and with the words that files hold, where they are few enough."""
        paths: dict[str, Any] = {}
        for name in ("source", "val_source", "unlabeled", "target"):
            word = getattr(self, name)
            if word is not None:
                paths[name] = absolute_data(of_images(word) if name in ("unlabeled", "target") else word)
        words = self.words()
        fitting = that_fit(words)
        for name, said in words.items():
            given = getattr(self, name)
            paths[name] = absolute(given) if isinstance(given, str) and name not in fitting else said
        if self.memory is not None:
            paths["memory"] = absolute(self.memory)
        return self.model_copy(update=paths)

    def without_folds(self) -> "DataSpec":
        """Return the same data with all labelled training images, of every fold."""
        return self if self.fold is None else self.model_copy(update={"fold": None})

    @property
    def labels_are_few(self) -> bool:
        """Whether there are training images without labels beside those with labels."""
        return self.labels is not None or self.unlabeled is not None

    def labeled_part(self) -> "DataSpec":
        """Return the same data without the images that come without labels."""
        return self.model_copy(update={"unlabeled": None, "unlabeled_only": False, "target": None})
