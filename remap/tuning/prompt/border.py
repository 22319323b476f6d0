"""A frame of learned pixels, as two tensors: rows above and below, columns left and right.

Letters: B batch, C channels, b border in pixels, H and W what the frame surrounds vertically and its full width.
"""

import torch
from torch import Tensor, nn

from remap.backbones.typed import input_channels
from remap.errors import BackboneError


class Frame(nn.Module):
    """``rows`` (1, C, 2b, W) holds the upper and the lower rows, ``columns`` (1, C, H, 2b) those at the sides."""

    def __init__(self, border: int, inner_height: int, width: int, model: nn.Module) -> None:
        super().__init__()
        self.border, channels, like = border, input_channels(model), next(model.parameters())
        shapes = ((2 * border, width), (inner_height, 2 * border))
        empty = (torch.empty(1, channels, *shape, device=like.device, dtype=like.dtype) for shape in shapes)
        self.rows, self.columns = map(nn.Parameter, empty)

    def around(self, rows: Tensor, columns: Tensor, inner_BCHW: Tensor) -> Tensor:
        """Turn (B, C, H, W - 2b) into (B, C, H + 2b, W): put ``rows`` and ``columns`` around images."""
        batch, dtype = inner_BCHW.shape[0], inner_BCHW.dtype
        above, below = rows.to(dtype).expand(batch, -1, -1, -1).split(self.border, dim=2)
        left, right = columns.to(dtype).expand(batch, -1, -1, -1).split(self.border, dim=3)
        return torch.cat([above, torch.cat([left, inner_BCHW, right], dim=3), below], dim=2)


def require_size(images_BCHW: Tensor, size: tuple[int, int]) -> None:
    """Raise a BackboneError for images of a size that the frame was not made for."""
    if tuple(images_BCHW.shape[-2:]) != size:
        raise BackboneError(
            "the learned border was made for another image size",
            given=f"{images_BCHW.shape[-2]}x{images_BCHW.shape[-1]} pixels",
            allowed=f"{size[0]}x{size[1]}",
        )
