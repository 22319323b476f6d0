"""Adapter interface to a family of timm models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, ClassVar, Generic

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionBlock, AttentionScores
from remap.backbones.families import FAMILIES
from remap.backbones.typed import M, as_timm
from remap.errors import BackboneError

Undo = Callable[[], None]
KeepScores = Callable[[AttentionScores], None]


class Family(ABC, Generic[M]):
    """One family of timm models, of the class ``M``. It has no state: a model is passed to every function.

    The families are the only place that spells timm's attribute names.

    Attributes:
        name: Of its row in the table.
        no_attention: Why there is nothing to show, or to take more tokens, of most families.
    """

    name: ClassVar[str]
    no_attention: ClassVar[str] = "it has no attention over the whole image"

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Return whether every part of ``model`` is as this family knows it; unusual variants are not."""

    @abstractmethod
    def read(self, model: M) -> Anatomy:
        """Return the anatomy of a model that matches. Changes nothing."""

    @abstractmethod
    def rest_of_forward(self, model: M, index: int, x: Tensor) -> Tensor:
        """Run a model from the input of block ``index`` to what ``forward_features`` returns.

        Args:
            index: 0 to depth; depth means behind the last block, so that only the final norm is left.
            x: In the layout of the block's input: (B, T, D), (B, H, W, D) or (B, D, H, W).
        """

    def size_arguments(self, model: M, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        """Return the arguments of ``timm.create_model`` for square images of another size.

        Args:
            model: The model at its own size; one on the meta device will do.
            image_size: Height and width in pixels.

        Raises:
            BackboneError: The model cannot have this size.
        """
        height, width = anatomy.patch_size
        rule = f"its patches are {height} x {width}, and only whole ones fit"
        require_size(model, image_size, lambda size: size % height == 0 and size % width == 0, rule)
        return {"img_size": image_size}

    def require_size(self, model: M, anatomy: Anatomy, size: tuple[int, int]) -> None:
        """Refuse a height and width in pixels that a model, as it is built, cannot take; others take any.

        Raises:
            BackboneError: It cannot.
        """

    def stage_outputs(self, model: M, images_BCHW: Tensor, stages: Sequence[int]) -> tuple[Any, list[Tensor]]:
        """Return what ``forward_features`` makes of images, and the maps (B, D, h, w) of some stages.

        For families whose blocks are such stages (``StageBlock``).
        """
        raise NotImplementedError(f"the blocks of {type(self).__name__} are modules, whose outputs hooks see")

    def shape_arguments(self, anatomy: Anatomy, depth: int, width: int, heads: int, mlp: int) -> dict[str, object]:
        """Return the arguments of timm's constructor that make a smaller shape; the rest is the architecture's."""
        return {"depth": depth}

    def remove_blocks(self, model: M, indices: Sequence[int]) -> None:
        """Take blocks out of a model, in place; with no indices only check that it can be done.

        Raises:
            BackboneError: The blocks are not one list of equal, independent ones.
        """
        raise BackboneError(
            f"blocks of the family '{self.name}' cannot be taken out",
            given=type(model).__name__,
            allowed="networks with one list of equal blocks: vit, eva, beit",
        )

    def unprunable(self, model: M) -> str | None:
        """Return why heads, MLP units and channels of a model cannot be cut, or None."""
        return f"its family is '{self.name}'"

    def set_heads(self, model: M, block: AttentionBlock, heads: int, head_dim: int) -> None:
        """Tell the attention of a block, whose layers were cut, its new numbers of heads and dimensions."""
        raise NotImplementedError(f"{type(self).__name__} is not prunable")

    def set_width(self, model: M, width: int) -> None:
        """Tell a model, whose layers were cut, its new number of channels."""
        raise NotImplementedError(f"{type(self).__name__} is not prunable")

    def admit_tokens(self, model: M, count: int, first: int = 0) -> Undo:
        """Make blocks accept ``count`` tokens between the prefix and the patches; the caller inserts them.

        The change is part of the model's state without being in its state dict: a deep copy has it too. Calls add
        up, and each undo takes back its own.

        Args:
            first: The first block that gets them; those before it keep their sequence.

        Raises:
            BackboneError: The blocks have no single sequence of tokens, or can only take more tokens together.
        """
        raise self._no_sequence("take more tokens", "use a method without prompt tokens")

    def watch_attention(self, model: M, index: int, keep: KeepScores, *, values: bool = False) -> list[RemovableHandle]:
        """Call ``keep`` with the scores of block ``index`` in every forward, whichever attention kernel runs.

        Args:
            values: Give the values too. Models that never call their qkv layer then make them a second time.

        Returns:
            The hooks, to be removed by the caller.

        Raises:
            BackboneError: There is no attention over the whole image.
        """
        raise self._no_sequence(
            "show attention", "leave attention out: use losses such as ce, kd or feature (--losses ce,kd)"
        )

    def _no_sequence(self, what: str, do: str) -> BackboneError:
        return BackboneError(
            f"a backbone of the family '{self.name}' cannot {what}: {self.no_attention}",
            allowed="families with one sequence of tokens: plain, rotary and relative-position vision transformers",
            do=do,
        )


def family_of(anatomy: Anatomy) -> Family[Any]:
    """Return the family that read an anatomy."""
    return FAMILIES.load(anatomy.family)()


def require_size(model: nn.Module, image_size: int, fits: Callable[[int], bool], rule: str) -> None:
    """Refuse a size of images that a timm model cannot have, and name the nearest ones that it can.

    Raises:
        BackboneError: It does not fit.
    """
    if fits(image_size):
        return
    below = next((size for size in range(image_size - 1, 0, -1) if fits(size)), None)
    above = next(size for size in count(image_size + 1) if fits(size))
    architecture = as_timm(model).pretrained_cfg["architecture"]
    raise BackboneError(
        f"{architecture} takes no images of {image_size} x {image_size} pixels: {rule}",
        given=f"image_size: {image_size}",
        allowed=f"the nearest are {below} and {above}" if below else f"{above} and more",
    )
