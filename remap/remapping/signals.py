"""What one forward pass produced, for teacher and student alike.

Letters: B batch, C classes, D width, H heads, h head width, S the shared token set {class, patches}, N patches,
P prefix tokens (class, distillation, registers).
"""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


def float32_region(tensor: Tensor) -> torch.autocast:
    """Switch autocast off for the device of ``tensor``: it would run matrix products of float32 tensors in bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class Needs:
    """What a set of losses wants from one network; logits are always there.

    Attributes:
        attention: Blocks whose queries and keys are wanted, counted from 0.
        values: Those of them whose values are wanted too.
        tokens: Blocks whose output tokens are wanted; the number of blocks stands for those behind the final norm.
    """

    pooled: bool = False
    attention: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.pooled or other.pooled,
            self.attention | other.attention,
            self.values | other.values,
            self.tokens | other.tokens,
        )

    @property
    def blocks(self) -> frozenset[int]:
        """Every block that is looked into."""
        return self.attention | self.values | self.tokens


@dataclass(frozen=True)
class Attention:
    """Scores of one block over the shared tokens {class, patches}: prompts and registers are cut.

    ``q_BHSh`` carries the scale 1/sqrt(h); ``bias_BHSS`` is added to the scores and broadcasts over the batch (a
    relative position bias); ``v_BHSh`` is there where it was requested. Cutting rows and columns before the softmax
    re-normalises each row over the tokens that stay, exactly as dividing the full map's cut row by its sum would.
    """

    q_BHSh: Tensor
    k_BHSh: Tensor
    has_class_token: bool
    grid: tuple[int, int]
    bias_BHSS: Tensor | None = None
    v_BHSh: Tensor | None = None

    def scores_BHSS(self) -> Tensor:
        """Return what the softmax is taken of, in float32, also under autocast."""
        with float32_region(self.q_BHSh):
            # Contiguous: of strided rows the product rounds by an image's place in the batch, and an image's scores
            # must be the same whether they are computed for a cache or in a step.
            scores = self.q_BHSh.float().contiguous() @ self.k_BHSh.float().contiguous().mT
            return scores if self.bias_BHSS is None else scores + self.bias_BHSS.float()

    def map_BHSS(self) -> Tensor:
        """Return attention probabilities in float32, also under autocast; rows sum to 1."""
        return self.scores_BHSS().softmax(dim=-1)


@dataclass(frozen=True)
class Tokens:
    """Tokens at one place: the patches row by row, and apart from them the prefix; prompts are cut.

    ``prefix_BPD`` holds the class token first, if there is one, then a distillation token, then registers.
    """

    patches_BND: Tensor
    prefix_BPD: Tensor
    grid: tuple[int, int]
    has_class_token: bool


Part = TypeVar("Part", Attention, Tokens)


@dataclass(frozen=True)
class Signals:
    """Outputs of one forward pass. A field that was not requested is None or absent.

    ``logits_BC`` is what the network answers; with two classifiers (distilled DeiT) that is their mean, and
    ``head_logits`` has those of the class token and of the distillation token, or of the two of ``dual_head``
    (of both, those of ``dual_head``, averaged over the tokens).
    """

    logits_BC: Tensor
    pooled_BD: Tensor | None = None
    attention: dict[int, Attention] = field(default_factory=dict)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    head_logits: tuple[Tensor, ...] = ()

    def leaves(self) -> "Signals":
        """Return the same values as leaves of new graphs."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_()

        def fresh(part: Part) -> Part:
            tensors: dict[str, Any] = {k: leaf(v) for k, v in vars(part).items() if isinstance(v, Tensor)}
            return replace(part, **tensors)

        return Signals(
            leaf(self.logits_BC),
            None if self.pooled_BD is None else leaf(self.pooled_BD),
            {index: fresh(part) for index, part in self.attention.items()},
            {index: fresh(part) for index, part in self.tokens.items()},
            tuple(leaf(logits) for logits in self.head_logits),
        )
