"""How the values in an image file become channels of 8 bits: what a task stores and applies again."""

from dataclasses import asdict, dataclass

# What transparent pixels show: a colour, squares of 8 pixels (white and light grey), or what is stored below alpha.
BACKDROPS = ("white", "black", "checker", "drop")
# Pixels as they always were, or nearly these in two thirds of the time.
DECODERS = ("exact", "fast")
# The largest picture that any setting allows, in megapixels, and the most channels of one.
MOST_MEGAPIXELS, MOST_CHANNELS = 500.0, 512


@dataclass(frozen=True)
class Pixels:
    """What a network's input is made of.

    Attributes:
        channels: 3 is red, green and blue, 1 grey; others only fit images with as many channels.
        alpha: What transparent pixels show, one of ``BACKDROPS``. "drop" is what tasks without a word of it meant.
        value_range: The values of images with more than 8 bits that become 0 and 255; None for those that their
            type implies.
        megapixels: The largest picture that is decoded whole; None for Pillow's own limit (89.5).
        decode: "exact" is Pillow's decoder and resize, "fast" are those of ``remap.data.fast_views``.
    """

    channels: int = 3
    alpha: str = "drop"
    value_range: tuple[float, float] | None = None
    megapixels: float | None = None
    decode: str = "exact"

    def to_dict(self) -> dict[str, object]:
        """Return what differs from the default: older tasks say nothing of their pixels."""
        return {name: value for name, value in asdict(self).items() if value != getattr(RGB, name)}

    def problem(self) -> str | None:
        """Return what no picture can be read by, in a task file from anywhere; None if all is sound."""
        low, high = self.value_range or (0.0, 1.0)
        if not 1 <= self.channels <= MOST_CHANNELS:
            return f"channels should be 1 to {MOST_CHANNELS}"
        if self.alpha not in BACKDROPS:
            return f"alpha should be one of {', '.join(BACKDROPS)}"
        if not -1e300 < low < high < 1e300:  # False for NaN too
            return "value_range should be two finite numbers, the smaller one first"
        if self.megapixels is not None and not 0 < self.megapixels <= MOST_MEGAPIXELS:
            return f"megapixels should be at most {MOST_MEGAPIXELS:g}"
        if self.decode not in DECODERS:
            return f"decode should be one of {', '.join(DECODERS)}"
        return None


RGB = Pixels()
