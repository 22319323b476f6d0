"""Read layers, norms and attention blocks of timm's modules: what the families' ``read`` is made of."""

from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, TypeGuard, TypeVar

from timm.data import resolve_data_config
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import checkpoint
from torch import Tensor, nn

from remap.backbones.anatomy import AttentionBlock, Projection, plain_class
from remap.backbones.families.base import Undo, require_size
from remap.backbones.typed import as_timm, layer_at

MLPS = (Mlp, GluMlp, SwiGLU)
T = TypeVar("T")


def linear(model: nn.Module, path: str, rows: slice | None = None, *, called: bool = True) -> Projection:
    """Return the projection made by a linear layer (or convolution), or by some of its rows."""
    layer = layer_at(model, path)
    rows = rows or slice(0, layer.weight.shape[0])
    bias = f"{path}.bias" if layer.bias is not None else None
    return Projection(path, rows.start, rows.stop, called, bias, rows.start if bias else 0)


def qkv_projections(model: nn.Module, attn: str) -> dict[str, Projection]:
    """Return q, k and v of an attention module, made by one layer or by three.

    Some attention modules own the biases and hand them to ``F.linear`` with the layer's weight: the layer itself is
    never called then, unless they add the biases separately.
    """
    attention: Any = model.get_submodule(attn)
    if attention.qkv is None:
        return {word: linear(model, f"{attn}.{word}_proj") for word in "qkv"}
    width = attention.qkv.weight.shape[0] // 3
    rows = {word: slice(i * width, (i + 1) * width) for i, word in enumerate("qkv")}
    if getattr(attention, "q_bias", None) is None:
        return {word: linear(model, f"{attn}.qkv", rows[word]) for word in rows}
    called = attention.qkv_bias_separate
    return {
        word: Projection(f"{attn}.qkv", part.start, part.stop, called, f"{attn}.{word}_bias")
        for word, part in rows.items()
    }


def mlp_projections(model: nn.Module, mlp: str) -> dict[str, Projection]:
    """Return fc1 and fc2 of an MLP, and fc1_gate where its hidden units are multiplied by act(gate)."""
    module = model.get_submodule(mlp)
    fc2 = linear(model, f"{mlp}.fc2")
    if isinstance(module, SwiGLU):
        return {"fc1": linear(model, f"{mlp}.fc1_x"), "fc1_gate": linear(model, f"{mlp}.fc1_g"), "fc2": fc2}
    if isinstance(module, GluMlp):
        half = layer_at(model, f"{mlp}.fc1").weight.shape[0] // 2
        halves = (slice(0, half), slice(half, 2 * half))
        value, gate = halves if module.gate_last else halves[::-1]
        fc1 = {"fc1": linear(model, f"{mlp}.fc1", value), "fc1_gate": linear(model, f"{mlp}.fc1", gate)}
        return {**fc1, "fc2": fc2}
    return {"fc1": linear(model, f"{mlp}.fc1"), "fc2": fc2}


def attention_block(
    model: nn.Module, block: str, *, width: int, grid: tuple[int, int], stage: int = 0, plain_scores: bool = False
) -> AttentionBlock:
    """Return a transformer block of timm at ``block``; absent norms and scales are left out."""
    mlp = mlp_projections(model, f"{block}.mlp")
    projections = {**qkv_projections(model, f"{block}.attn"), "o": linear(model, f"{block}.attn.proj"), **mlp}
    heads = getattr(model.get_submodule(f"{block}.attn"), "num_heads")  # noqa: B009 - of several classes
    norms = ("norm1", "attn.q_norm", "attn.k_norm", "attn.norm", "norm2", "mlp.norm")
    scales = [
        next((path for name in names if (path := tensor_path(model, f"{block}.{name}"))), None)
        for names in (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
    ]
    return AttentionBlock(
        block=block,
        width=width,
        grid=grid,
        stage=stage,
        norms=real(model, (f"{block}.{norm}" for norm in norms)),
        projections=projections,
        norm1=f"{block}.norm1",
        attn=f"{block}.attn",
        heads=heads,
        head_dim=(projections["q"].stop - projections["q"].start) // heads,
        attn_branch_end=f"{block}.drop_path1",
        attn_scale=scales[0],
        norm2=f"{block}.norm2",
        mlp=f"{block}.mlp",
        mlp_hidden=mlp["fc1"].stop - mlp["fc1"].start,
        mlp_branch_end=f"{block}.drop_path2",
        mlp_scale=scales[1],
        plain_scores=plain_scores,
    )


def exactly(module: nn.Module | None, *kinds: type[T]) -> TypeGuard[T]:
    """Return whether a module is of one of these classes itself: a subclass may compute something else."""
    return module is not None and plain_class(module) in kinds


def real(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of the paths that lead to a module other than Identity."""
    found = []
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if module is not None and not isinstance(module, nn.Identity):
            found.append(path)
    return tuple(found)


def norm_paths(model: nn.Module) -> set[str]:
    """Return the paths of the norms that own a weight or a bias.

    Modules that only hold norms do not, and blocks without norms (``NormFreeBlock``) own a gain at most.
    """
    return {
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and {"weight", "bias"} & {name for name, _ in module.named_parameters(recurse=False)}
    }


def tensor_path(model: nn.Module, path: str) -> str | None:
    """Return ``path`` where there is a tensor of that name, else None."""
    parent, _, name = path.rpartition(".")
    try:
        return path if getattr(model.get_submodule(parent), name, None) is not None else None
    except AttributeError:
        return None


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """Run blocks one after the other, with gradient checkpointing where the model has it switched on."""
    for block in blocks:
        x = checkpoint(block, x) if checkpointing else block(x)
    return x


def rest_of_stages(stages: Iterable[nn.Module], index: int, x: Tensor) -> Tensor:
    """Run a hierarchical model from the input of block ``index``, counted over all stages, to its last stage's output.

    A stage is entered with its downsampling done: its first block takes what ``downsample`` gave.
    """
    entered = False
    for stage in stages:
        blocks: Any = stage.blocks  # a Sequential, or in SwinV2 a ModuleList
        if entered:
            x = stage(x)
        elif index < len(blocks):
            x = run_blocks(blocks[index:], x, bool(stage.grad_checkpointing))
            entered = True
        else:
            index -= len(blocks)
    return x


def configured_image_size(model: nn.Module) -> tuple[int, int]:
    """Return height and width of the images in a model's timm configuration, for models that take any size."""
    return pair(resolve_data_config({}, model=model)["input_size"][-2:])


def size_of_convolutions(model: nn.Module, image_size: int) -> dict[str, Any]:
    """Check an image size for a model that takes any, and return no arguments: one position must be left at the end."""
    stride = int(as_timm(model).feature_info[-1]["reduction"])
    require_size(model, image_size, lambda size: size >= stride, f"its last stage is {stride} times smaller")
    return {}


def admit_into_bias(modules: Iterable[nn.Module], method: str, roomy: Callable[[Any], Tensor], count: int) -> Undo:
    """Give modules that make a relative position bias room for ``count`` more tokens.

    Each gets an instance method in place of its class's. ``copy.deepcopy`` binds the copy's method to the copy,
    and neither parameters nor module names change. Calls add up, and each undo takes back its own.

    Args:
        roomy: From such a module to its larger bias; ``admitted_tokens`` tells by how much.
    """
    modules = list(modules)

    def admit(count: int) -> None:
        for module in modules:
            room = module.__dict__.pop("admitted_tokens", 0) + count
            module.__dict__.pop(method, None)
            if room:
                module.__dict__.update({"admitted_tokens": room, method: MethodType(roomy, module)})

    admit(count)
    return lambda: admit(-count)


def admitted_tokens(module: nn.Module) -> int:
    """Return the number of tokens that ``admit_into_bias`` made room for."""
    return module.__dict__["admitted_tokens"]
