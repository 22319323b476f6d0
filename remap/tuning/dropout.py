"""Dropout whose masks belong to the image, not to the process: equal on any number of ranks and after a restart."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SampleDropout(nn.Module):
    """Dropout keyed by sample.

    The training loop sets ``keys_B`` (one int64 a row, drawn from seed, epoch and image index) before a step; the
    mask of a row is then a pure function of its key and of ``site``. Without keys it is ordinary dropout.

    Args:
        p: Probability of dropping an element.
        site: Number that tells this module's masks from those of its siblings.
    """

    offset: Tensor

    def __init__(self, p: float, site: int = 0) -> None:
        super().__init__()
        self.p, self.site = p, site
        # A tensor, so that compiled code for one block serves all of them.
        self.register_buffer("offset", site_offset(site), persistent=False)
        self.keys_B: Tensor | None = None

    def renumber(self, site: int) -> None:
        """Give the module another site."""
        self.site = site
        self.offset.copy_(site_offset(site))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.keys_B is None:
            return F.dropout(x, self.p)
        keep = keep_mask(self.keys_B, x[0].numel(), self.p, self.offset)
        return x * keep.view_as(x).to(x.dtype) / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"


def drawn_rate(module: nn.Module) -> float:
    """Return the rate of a backbone's own dropout or drop-path, whose masks are drawn for all rows at once; else 0."""
    return float(getattr(module, "p" if isinstance(module, nn.Dropout) else "drop_prob", 0.0) or 0.0)


def site_offset(site: int) -> Tensor:
    """Return the int32 scalar by which a site's masks differ from those of others."""
    return torch.tensor(_wrap(site * 0x9E3779B1), dtype=torch.int32)


def keep_mask(keys_B: Tensor, elements: int, p: float, offset: Tensor) -> Tensor:
    """Return (B, elements) booleans, True with probability 1 - p: a 32-bit integer hash of (key, offset, element)."""
    high, low = (keys_B >> 32).to(torch.int32), keys_B.to(torch.int32)
    rows = _mix(low ^ _mix(high + offset))
    columns = torch.arange(elements, device=keys_B.device, dtype=torch.int32) * _wrap(0x9E3779B1)
    hashed = _mix(rows[:, None] + columns)
    return (hashed & 0xFFFFFF) >= int(p * 0x1000000)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3 (Appleby, public domain) on int32; shifts are made logical by masking."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _wrap(0x85EBCA6B)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _wrap(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _wrap(value: int) -> int:
    """Return the int32 with the same bits as ``value`` modulo 2^32."""
    return (value + 0x80000000) % 0x100000000 - 0x80000000
