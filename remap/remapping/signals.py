"""What one forward pass produced, for teacher and student alike.

Letters: B batch, C classes, D width, H heads, h head width, S the shared token set {class, patches}.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, module_at, queries_and_keys
from remap.errors import BackboneError


def float32_region(tensor: Tensor) -> torch.autocast:
    """Switch autocast off for the device of ``tensor``: it would run matrix products of float32 tensors in bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class Needs:
    """What a set of losses wants from one network: block indices count from 0; logits are always there."""

    pooled: bool = False
    attention: frozenset[int] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.pooled or other.pooled, self.attention | other.attention)


@dataclass(frozen=True)
class Attention:
    """Scores of one block over the shared tokens {class, patches}: prompts and registers are cut.

    ``q_BHSh`` carries the scale 1/sqrt(h). Cutting rows and columns before the softmax re-normalises each row over
    the tokens that stay, exactly as dividing the full map's cut row by its sum would.
    """

    q_BHSh: Tensor
    k_BHSh: Tensor
    has_class_token: bool
    grid: tuple[int, int]

    def map_BHSS(self) -> Tensor:
        """Attention probabilities in float32, also under autocast; rows sum to 1."""
        with float32_region(self.q_BHSh):
            scores = self.q_BHSh.float() @ self.k_BHSh.float().mT
            return scores.softmax(dim=-1)


@dataclass(frozen=True)
class Signals:
    """Outputs of one forward pass. A field that was not asked for is None or absent."""

    logits_BC: Tensor
    pooled_BD: Tensor | None = None
    attention: dict[int, Attention] = field(default_factory=dict)


class Tap:
    """Runs a network and records what ``needs`` names, through hooks that leave with ``close``.

    Attention of a chosen block is recomputed from the output of its qkv layer, so the block itself and all others
    keep the fused kernel.

    Args:
        extra_tokens: Prompt tokens between prefix and patches inside the blocks (``Attached.extra_tokens``).
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, needs: Needs, extra_tokens: int = 0) -> None:
        self.model, self.anatomy, self.needs, self.extra_tokens = model, anatomy, needs, extra_tokens
        self._qkv: dict[int, Tensor] = {}
        self._running = False
        self._handles = [
            module_at(model, anatomy.blocks[index].qkv).register_forward_hook(self._keeper(index))
            for index in sorted(needs.attention)
        ]

    def _keeper(self, index: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
            # Gradient checkpointing runs the block again in the backward pass; what it makes then is not ours to hold.
            if self._running:
                self._qkv[index] = output

        return keep

    def __call__(self, images_BCHW: Tensor) -> Signals:
        """Forward normalised images; logits and pooled features come from the model's own head path."""
        self._running = True
        try:
            tokens = self.model.forward_features(images_BCHW)
            pooled = self.model.forward_head(tokens, pre_logits=True) if self.needs.pooled else None
            logits = self.model.forward_head(tokens)
            attention = {index: self._attention(index) for index in sorted(self.needs.attention)}
            return Signals(logits, pooled, attention)
        finally:
            self._running = False
            self._qkv.clear()

    def _attention(self, index: int) -> Attention:
        qkv = self._qkv[index]
        expected = self.anatomy.num_prefix_tokens + self.extra_tokens + self.anatomy.num_patches
        if qkv.shape[1] != expected:
            # Cutting by position would silently take the wrong tokens.
            raise BackboneError(
                "the tokens inside a block are not those the attention loss expects",
                given=f"{qkv.shape[1]} tokens in block {index}",
                allowed=f"{expected}: prefix {self.anatomy.num_prefix_tokens}, prompts {self.extra_tokens}, "
                f"patches {self.anatomy.num_patches}",
                do="use images of the backbone's own size, without patch dropout",
            )
        q, k = queries_and_keys(self.model, self.anatomy.blocks[index], qkv)
        q, k = self._shared(q), self._shared(k)
        return Attention(q, k, self.anatomy.has_class_token, self.anatomy.grid)

    def _shared(self, x_BHTh: Tensor) -> Tensor:
        """Keep the class token and the patches of a full token sequence."""
        first_patch = self.anatomy.num_prefix_tokens + self.extra_tokens
        patches = x_BHTh[:, :, first_patch:]
        if not self.anatomy.has_class_token:
            return patches
        if first_patch == 1:
            return x_BHTh
        return torch.cat([x_BHTh[:, :, :1], patches], dim=2)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
