"""Augmentation as values: what changes an image, how far, and the presets. ``augmented_pixels`` makes the pixels.

Every number that a view takes has a fixed column among its draws, so that an operation draws the same with and without
the others: ``light`` and ``strong`` see the same corner of an image in the same view.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# The first column of each operation's draws, in [0, 1): shift down, shift right; mirror; area, shape, and position down
# and right of a crop; four factors; whether to erase, area, shape, position; then which operation, its sign and its
# magnitude, for each operation of RandAugment. Shift and flip take three columns together, as in version 0.1: another
# number of draws gives every view another digest, and its cached teacher outputs are computed again.
SHIFT, FLIP, CROP, JITTER, ERASE, POLICY, POLICY_DRAWS = 0, 2, 3, 7, 11, 16, 3
# Operations that work on red, green and blue.
COLOURED = ("jitter", "rand_augment", "trivial_augment")
# Presets by which outputs were cached, and recipes hashed, before there were others.
_FIRST = ("none", "shift", "shift_flip")


def _require_ends(ends: list[float]) -> list[float]:
    if len(ends) != 2 or ends[0] > ends[1]:
        raise ValueError("should be two numbers, the smaller one first")
    return ends


_Share = Annotated[float, Field(gt=0.0, le=1.0)]
_Ratio = Annotated[float, Field(ge=0.1, le=10.0)]
_ENDS = AfterValidator(_require_ends)


class Operation(BaseModel):
    """Values of one operation: frozen, strict about types, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Crop(Operation):
    """A random part of the image, resized to all of it (Szegedy et al. 2015, arXiv 1409.4842)."""

    scale: Annotated[list[_Share], _ENDS] = Field(
        default=[0.35, 1.0], description="Smallest and largest share of the area."
    )
    ratio: Annotated[list[_Ratio], _ENDS] = Field(
        default=[0.75, 4 / 3], description="Most upright and widest: width by height, against the image's own."
    )


class Jitter(Operation):
    """Random brightness, contrast, saturation (a factor of 1 - x to 1 + x each), then hue."""

    brightness: float = Field(default=0.0, ge=0.0, le=1.0, description="x of brightness.")
    contrast: float = Field(default=0.0, ge=0.0, le=1.0, description="x of contrast.")
    saturation: float = Field(default=0.0, ge=0.0, le=1.0, description="x of saturation.")
    hue: float = Field(default=0.0, ge=0.0, le=0.5, description="Largest turn of the hue; 0.5 is half the circle.")


class RandAugment(Operation):
    """Operations drawn from fourteen, all of one magnitude (Cubuk et al. 2019, arXiv 1909.13719)."""

    ops: int = Field(default=2, ge=0, le=8, description="Operations one after the other.")
    magnitude: float = Field(default=9.0, ge=0.0, le=30.0, description="Their strength; 30 is the paper's largest.")


class Erasing(Operation):
    """A rectangle replaced by the image's mean colour (Zhong et al. 2017, arXiv 1708.04896)."""

    chance: float = Field(default=0.25, ge=0.0, le=1.0, description="Share of the images.")
    scale: Annotated[list[_Share], _ENDS] = Field(
        default=[0.02, 0.33], description="Smallest and largest share of the area."
    )
    ratio: Annotated[list[_Ratio], _ENDS] = Field(default=[0.3, 3.3], description="Most upright and widest.")


class Augmentation(Operation):
    """All operations, in the order in which they are applied; by default each of them is off."""

    shift: float = 0.0
    flip: float = 0.0
    crop: Crop = Crop(scale=[1.0, 1.0], ratio=[1.0, 1.0])
    rand_augment: RandAugment = RandAugment(ops=0)
    trivial_augment: bool = False
    jitter: Jitter = Jitter()
    erasing: Erasing = Erasing(chance=0.0)

    @property
    def steps(self) -> int:
        """Operations of RandAugment; TrivialAugment is one."""
        return 1 if self.trivial_augment else self.rand_augment.ops

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the operations that change an image."""
        changes = {
            "shift": self.shift > 0,
            "flip": self.flip > 0,
            "crop": self.crop != Augmentation().crop,
            "rand_augment": self.rand_augment.ops > 0,
            "trivial_augment": self.trivial_augment,
            "jitter": any(self.jitter.model_dump().values()),
            "erasing": self.erasing.chance > 0,
        }
        return tuple(name for name, changed in changes.items() if changed)

    @property
    def draws(self) -> int:
        """How many random numbers a view of an image takes; 0 where nothing is changed."""
        policy = POLICY + POLICY_DRAWS * self.steps
        ends = {"crop": JITTER, "flip": CROP, "shift": CROP, "jitter": ERASE, "erasing": POLICY}
        return max((ends.get(name, policy) for name in self.on), default=0)

    def key(self) -> str | dict[str, Any]:
        """Return what tells augmentations apart in hashes: equal for those that do the same."""
        known = next((name for name in _FIRST if PRESETS[name] == self), None)
        return known or self.model_dump(include=set(self.on))


PRESETS = {
    "none": Augmentation(),
    "light": Augmentation(crop=Crop(scale=[0.5, 1.0], ratio=[0.8, 1.25])),
    "strong": Augmentation(crop=Crop(), rand_augment=RandAugment(), erasing=Erasing()),
    "custom": Augmentation(),
    "shift": Augmentation(shift=0.125),
    "shift_flip": Augmentation(shift=0.125, flip=0.5),
}
