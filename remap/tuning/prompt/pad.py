"""VPT for convolutional networks (Jia et al. 2022, arXiv 2203.12119, "pad"): a learned border around the image.

Letters: B batch, b border, (H, W) image size.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.base import family_of
from remap.backbones.preprocess import PreprocessSpec
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.prompt.border import Frame, require_size


class VPTPad(Method):
    """The image grows by ``border`` learned pixels on each side: 3 * (2b*(W + 2b) + 2b*H), 12*b*(S + b) on S x S.

    The border is learned in pixels of [0, 1], where it starts uniform, and normalised as the backbone's images are.
    Feature maps grow with the image: (S + 2b) / stride instead of S / stride.
    """

    class Config(Options):
        border: int = Field(default=5, ge=1, description="Border width in pixels.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        height, width = (side + 2 * self.config.border for side in anatomy.image_size)
        family_of(anatomy).require_size(model, anatomy, (height, width))
        spec = PreprocessSpec.of(model)
        frame = _Enlarging(self.config.border, anatomy.image_size, spec, model)
        edits = Edits(model)
        edits.insert("remap_vpt_pad", frame)
        edits.before(anatomy.input_module, frame.enlarge)
        return Attachment(edits, no_decay=edits.parameters(), identity_at_init=False)


class _Enlarging(Frame):
    mean: Tensor
    std: Tensor

    def __init__(self, border: int, image_size: tuple[int, int], spec: PreprocessSpec, model: nn.Module) -> None:
        height, width = image_size
        super().__init__(border, height, width + 2 * border, model)
        self.image_size = image_size
        for name in ("mean", "std"):
            value = torch.tensor(getattr(spec, name), device=self.rows.device, dtype=self.rows.dtype)
            self.register_buffer(name, value.view(1, -1, 1, 1), persistent=False)
        for pixels in (self.rows, self.columns):
            nn.init.uniform_(pixels, 0.0, 1.0)

    def enlarge(self, module: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the module that takes the image."""
        require_size(args[0], self.image_size)
        rows, columns = ((pixels - self.mean) / self.std for pixels in (self.rows, self.columns))
        return (self.around(rows, columns, args[0]), *args[1:])
