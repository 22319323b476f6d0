"""What a family of backbones has to say about its models, and what several families share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from timm.data import resolve_data_config
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, AttentionScores, Projection, plain_class
from remap.errors import BackboneError

Undo = Callable[[], None]


class Family(ABC):
    """One family of timm models. Never instantiated: a model is passed to every function.

    The families are the only place that spells timm's attribute names.
    """

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether every part of ``model`` is as this family knows it; unusual variants are not."""

    @classmethod
    @abstractmethod
    def read(cls, model: nn.Module) -> Anatomy:
        """The anatomy of a model that matches. Changes nothing."""

    @classmethod
    @abstractmethod
    def rest_of_forward(cls, model: nn.Module, anatomy: Anatomy, index: int, x: Tensor) -> Tensor:
        """From the input of block ``index`` to what ``forward_features`` returns.

        Args:
            index: 0 to depth; depth means behind the last block, so that only the final norm is left.
            x: In the layout of the block's input: (B, T, D), (B, H, W, D) or (B, D, H, W).
        """

    @classmethod
    def size_arguments(cls, model: nn.Module, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` for square images of another size.

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

    @classmethod
    def admit_tokens(cls, model: nn.Module, anatomy: Anatomy, count: int) -> Undo:
        """Make all blocks accept ``count`` tokens between the prefix and the patches; the caller inserts them.

        The change is part of the model's state without being in its state dict: a deep copy has it too. Calls add
        up, and each undo takes back its own.

        Raises:
            BackboneError: The blocks have no single sequence of tokens.
        """
        raise _no_sequence(anatomy, "take more tokens", "use a method without prompt tokens")

    @classmethod
    def watch_attention(
        cls,
        model: nn.Module,
        anatomy: Anatomy,
        index: int,
        keep: Callable[[AttentionScores], None],
        *,
        values: bool = False,
    ) -> list[RemovableHandle]:
        """Call ``keep`` with the scores of block ``index`` in every forward, whichever attention kernel runs.

        Args:
            values: Give the values too. Models that never call their qkv layer then make them a second time.

        Returns:
            The hooks, to be removed by the caller.

        Raises:
            BackboneError: There is no attention over the whole image.
        """
        raise _no_sequence(
            anatomy, "show attention", "leave attention out: use losses such as ce, kd or feature (--losses ce,kd)"
        )


def _no_sequence(anatomy: Anatomy, what: str, do: str) -> BackboneError:
    return BackboneError(
        f"a backbone of the family '{anatomy.family}' cannot {what}: it has no attention over the whole image",
        allowed="families with one sequence of tokens: plain, rotary and relative-position vision transformers",
        do=do,
    )


def require_size(model: nn.Module, image_size: int, fits: Callable[[int], bool], rule: str) -> None:
    """Refuse a size of images that a timm model cannot have, and name the nearest ones that it can.

    Raises:
        BackboneError: It does not fit.
    """
    if fits(image_size):
        return
    below = next((size for size in range(image_size - 1, 0, -1) if fits(size)), None)
    above = next(size for size in count(image_size + 1) if fits(size))
    raise BackboneError(
        f"{model.pretrained_cfg['architecture']} takes no images of {image_size} x {image_size} pixels: {rule}",
        given=f"image_size: {image_size}",
        allowed=f"the nearest are {below} and {above}" if below else f"{above} and more",
    )


def linear(model: nn.Module, path: str, rows: slice | None = None, *, called: bool = True) -> Projection:
    """The projection made by a linear layer (or convolution), or by some of its rows."""
    layer = model.get_submodule(path)
    rows = rows or slice(0, layer.weight.shape[0])
    bias = f"{path}.bias" if layer.bias is not None else None
    return Projection(path, rows.start, rows.stop, called, bias, rows.start if bias else 0)


def fused_qkv(model: nn.Module, attn: str) -> dict[str, Projection]:
    """q, k and v of an attention module whose ``qkv`` layer makes all three.

    Some attention modules own the biases and hand them to ``F.linear`` with the layer's weight: the layer itself is
    never called then, unless they add the biases separately.
    """
    attention = model.get_submodule(attn)
    width = attention.qkv.weight.shape[0] // 3
    rows = {word: slice(i * width, (i + 1) * width) for i, word in enumerate("qkv")}
    if getattr(attention, "q_bias", None) is None:
        return {word: linear(model, f"{attn}.qkv", rows[word]) for word in rows}
    called = attention.qkv_bias_separate
    return {
        word: Projection(f"{attn}.qkv", rows[word].start, rows[word].stop, called, f"{attn}.{word}_bias")
        for word in rows
    }


def watch_values(attention: nn.Module, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Call ``keep`` with an attention module's values (B, H, T, h) in every forward, before its query and key norms.

    Where the module reads its qkv layer's weight instead of calling the layer, they are made here from the same
    weight and bias, as the queries and keys in BEiT are.
    """

    def heads(v_BTE: Tensor) -> None:
        keep(v_BTE.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))

    if attention.qkv is None:
        return [attention.v_proj.register_forward_hook(lambda module, args, v_BTE: heads(v_BTE))]
    owned_bias = getattr(attention, "v_bias", None) is not None
    if owned_bias and not attention.qkv_bias_separate:

        def begins(module: nn.Module, args: tuple) -> None:
            bias = attention.v_bias
            heads(F.linear(args[0], attention.qkv.weight[-bias.numel() :], bias))

        return [attention.register_forward_pre_hook(begins)]

    def qkv_ready(module: nn.Module, args: tuple, qkv_BTE: Tensor) -> None:
        v_BTE = qkv_BTE[..., -(qkv_BTE.shape[-1] // 3) :]
        # timm adds separate biases in place, behind this hook; the sum must not see them twice.
        heads(v_BTE + attention.v_bias if owned_bias else v_BTE)

    return [attention.qkv.register_forward_hook(qkv_ready)]


def mlp_projections(model: nn.Module, mlp: str) -> dict[str, Projection]:
    """fc1 and fc2 of an MLP, and fc1_gate where its hidden units are multiplied by act(gate)."""
    module = model.get_submodule(mlp)
    found = {"fc2": linear(model, f"{mlp}.fc2")}
    if isinstance(module, SwiGLU):
        return {"fc1": linear(model, f"{mlp}.fc1_x"), "fc1_gate": linear(model, f"{mlp}.fc1_g"), **found}
    if isinstance(module, GluMlp):
        half = module.fc1.weight.shape[0] // 2
        halves = (slice(0, half), slice(half, 2 * half))
        value, gate = halves if module.gate_last else halves[::-1]
        return {
            "fc1": linear(model, f"{mlp}.fc1", value),
            "fc1_gate": linear(model, f"{mlp}.fc1", gate),
            **found,
        }
    return {"fc1": linear(model, f"{mlp}.fc1"), **found}


MLPS = (Mlp, GluMlp, SwiGLU)


def exactly(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes itself: a subclass may compute something else."""
    return plain_class(module) in kinds


def real(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Those of the paths that lead to a module other than Identity."""
    found = []
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if module is not None and not isinstance(module, nn.Identity):
            found.append(path)
    return tuple(found)


def tensor_path(model: nn.Module, path: str) -> str | None:
    """``path`` where there is a tensor of that name, else None."""
    parent, _, name = path.rpartition(".")
    try:
        return path if getattr(model.get_submodule(parent), name, None) is not None else None
    except AttributeError:
        return None


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """Blocks one after the other, with gradient checkpointing where the model has it switched on."""
    for block in blocks:
        x = checkpoint(block, x) if checkpointing else block(x)
    return x


def configured_image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images in a model's timm configuration, for models that take any size."""
    return pair(resolve_data_config({}, model=model)["input_size"][-2:])


def size_of_convolutions(model: nn.Module, image_size: int) -> dict[str, Any]:
    """``Family.size_arguments`` of models that take any size: none, but something must be left for the last stage."""
    stride = model.feature_info[-1]["reduction"]
    require_size(model, image_size, lambda size: size >= stride, f"its last stage is {stride} times smaller")
    return {}
