"""A frame of learned pixels, as two tensors: rows above and below, columns left and right.

Letters: B batch, b border in pixels, H and W what the frame surrounds vertically and its full width.
"""

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at
from remap.errors import BackboneError


class Frame(nn.Module):
    """``rows`` (1, 3, 2b, W) holds the upper and the lower rows, ``columns`` (1, 3, H, 2b) those at the sides."""

    def __init__(self, border: int, inner_height: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.border = border
        self.rows = nn.Parameter(torch.empty(1, 3, 2 * border, width, device=like.device, dtype=like.dtype))
        self.columns = nn.Parameter(torch.empty(1, 3, inner_height, 2 * border, device=like.device, dtype=like.dtype))

    def around(self, rows: Tensor, columns: Tensor, inner_B3HW: Tensor) -> Tensor:
        """Turn (B, 3, H, W - 2b) into (B, 3, H + 2b, W): put ``rows`` and ``columns`` around images."""
        batch, dtype = inner_B3HW.shape[0], inner_B3HW.dtype
        above, below = rows.to(dtype).expand(batch, -1, -1, -1).split(self.border, dim=2)
        left, right = columns.to(dtype).expand(batch, -1, -1, -1).split(self.border, dim=3)
        return torch.cat([above, torch.cat([left, inner_B3HW, right], dim=3), below], dim=2)


def input_weight(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """Return a weight of the module that takes the image."""
    return next(module_at(model, anatomy.input_module).parameters())


def require_size(images_B3HW: Tensor, size: tuple[int, int]) -> None:
    """Refuse images that the frame was not made for.

    Raises:
        BackboneError: Another size.
    """
    if tuple(images_B3HW.shape[-2:]) != size:
        raise BackboneError(
            "the learned border was made for another image size",
            given=f"{images_B3HW.shape[-2]}x{images_B3HW.shape[-1]} pixels",
            allowed=f"{size[0]}x{size[1]}",
        )
