"""Visual prompting (Bahng et al. 2022, arXiv 2203.17274): a learned border added to the image's own pixels.

Letters: B batch, b border, (H, W) image size.
"""

from pydantic import Field
from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.prompt.border import Frame, require_size


class VP(Method):
    """x + border, on the normalised image, 0 inside: 6*b*(H + W - 2b) parameters, 12*b*(S - b) on S x S."""

    class Config(Options):
        """In the official code the border starts from N(0, 1) and hides that of the image."""

        border: int | None = Field(default=None, ge=1, description="Border in pixels; null is 30 per 224 of the side.")
        init_std: float = Field(
            default=1.0, ge=0.0, description="Initial standard deviation; 0 leaves the image unchanged at first."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        side = min(anatomy.image_size)
        border = self.config.border or max(1, round(side * 30 / 224))
        if 2 * border >= side:
            raise BackboneError(
                "the border covers the whole image", given=f"border={border}", allowed=f"1 to {(side - 1) // 2}"
            )
        frame = _Added(border, anatomy.image_size, model)
        for pixels in frame.parameters():
            nn.init.normal_(pixels, std=self.config.init_std)
        edits = Edits(model)
        edits.insert("remap_vp", frame)
        # On the image itself, in front of a border that makes it larger.
        edits.before(anatomy.input_module, frame.add, first=True)
        return Attachment(edits, no_decay=edits.parameters(), identity_at_init=self.config.init_std == 0.0)


class _Added(Frame):
    def __init__(self, border: int, image_size: tuple[int, int], model: nn.Module) -> None:
        super().__init__(border, image_size[0] - 2 * border, image_size[1], model)
        self.image_size = image_size

    def add(self, module: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the module that takes the image."""
        images_BCHW = args[0]
        require_size(images_BCHW, self.image_size)
        height, width = (size - 2 * self.border for size in self.image_size)
        prompt_1CHW = self.around(self.rows, self.columns, self.rows.new_zeros(1, self.rows.shape[1], height, width))
        return (images_BCHW + prompt_1CHW.to(images_BCHW.dtype), *args[1:])
