"""Visual Prompt Tuning (Jia et al. 2022, arXiv 2203.12119): learned tokens beside the patches.

Letters: B batch, T tokens of the backbone (prefix and patches), P prefix tokens, p prompts, D width, L depth.
"""

import math
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, module_at
from remap.errors import BackboneError
from remap.tuning.base import Attached, Method, Options, insert_module
from remap.tuning.dropout import SampleDropout

_PATH = "remap_prompts"
# The output of block i carries its own prompt outputs to block i+1 under this attribute.
_CARRIED = "remap_prompt_outputs"


class VPTShallow(Method):
    """p prompts enter in front of block 0 and go through all blocks (equations 4 to 6): p*D parameters."""

    class Config(Options):
        """``dropout`` acts on the prompts, 0 in the official configuration for shallow prompts."""

        num_prompts: int = Field(default=10, ge=1)
        dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        return _attach(model, anatomy, 1, self.config.num_prompts, self.config.dropout)


class VPTDeep(Method):
    """Every block gets its own p prompts, those of the block before are dropped (equation 7): L*p*D parameters."""

    class Config(Options):
        """``dropout`` acts on the prompts, 0.1 in the official configuration for deep prompts."""

        num_prompts: int = Field(default=10, ge=1)
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0)

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        return _attach(model, anatomy, anatomy.depth, self.config.num_prompts, self.config.dropout)


class Prompts(nn.Module):
    """The prompts of a whole model and the two hooks every block gets.

    A prompt exists inside a block only: ``put_in`` adds the prompts to a block's input and ``take_out`` cuts them
    from its output, so pooling, the final norm and ``forward_intermediates`` see the tokens they always see.

    Shallow prompts cross from one block to the next as an attribute of the token tensor. That ties them to one
    forward pass: a block that gradient checkpointing runs again, after any number of other forward passes, gets
    the same input tensor and so the same prompts, and nothing stays behind in the model to be copied or saved.

    The hooks are partials of bound methods, which ``copy.deepcopy`` binds to the copied module.

    Args:
        layers: Blocks with prompts of their own, counted from the first: 1 or L.
    """

    def __init__(self, anatomy: Anatomy, layers: int, num_prompts: int, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.prefix, self.depth = anatomy.num_prefix_tokens, anatomy.depth
        self.prompts = nn.Parameter(torch.empty(layers, num_prompts, anatomy.width, device=device))
        self.dropouts = nn.ModuleList(SampleDropout(dropout, site) for site in range(layers))
        height, width = anatomy.patch_size
        # Xavier's bound for the patch embedding: prompts start out looking like patches (official code).
        bound = math.sqrt(6.0 / (3 * height * width + anatomy.width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def put_in(self, index: int, block: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of block ``index``: (B, T, D) becomes (B, T + p, D), prompts after the prefix."""
        tokens_BTD = args[0]
        if index < len(self.dropouts):
            own = self.prompts[index].to(tokens_BTD.dtype).expand(tokens_BTD.shape[0], -1, -1)
            prompts_BpD = self.dropouts[index](own)
        else:
            prompts_BpD = _carried(tokens_BTD, index)
        parts = [tokens_BTD[:, : self.prefix], prompts_BpD, tokens_BTD[:, self.prefix :]]
        return (torch.cat(parts, dim=1), *args[1:])

    def take_out(self, index: int, block: nn.Module, args: tuple, output_BTD: Tensor) -> Tensor:
        """Forward hook of block ``index``: cuts the prompts' outputs, and hands them on where the next wants them."""
        first_patch = self.prefix + self.prompts.shape[1]
        tokens_BTD = torch.cat([output_BTD[:, : self.prefix], output_BTD[:, first_patch:]], dim=1)
        if len(self.dropouts) <= index + 1 < self.depth:
            setattr(tokens_BTD, _CARRIED, output_BTD[:, self.prefix : first_patch])
        return tokens_BTD


def _attach(model: nn.Module, anatomy: Anatomy, layers: int, num_prompts: int, dropout: float) -> Attached:
    device = next(model.parameters()).device
    prompts = Prompts(anatomy, layers, num_prompts, dropout, device)
    insert_module(model, _PATH, prompts)
    handles: list[RemovableHandle] = []
    for index, paths in enumerate(anatomy.blocks):
        block = module_at(model, paths.block)
        handles.append(block.register_forward_pre_hook(partial(prompts.put_in, index)))
        handles.append(block.register_forward_hook(partial(prompts.take_out, index)))
    name = f"{_PATH}.prompts"
    return Attached(
        model,
        anatomy,
        trainable=[name],
        no_decay=[name],
        identity_at_init=False,
        extra_tokens=num_prompts,
        added=[_PATH],
        handles=handles,
    )


def _carried(tokens_BTD: Tensor, index: int) -> Tensor:
    prompts_BpD = getattr(tokens_BTD, _CARRIED, None)
    if prompts_BpD is None:
        raise BackboneError(
            f"the input of block {index} is not the output of block {index - 1}, so its prompts are lost",
            given="a tensor made by something between the two blocks, such as reentrant gradient checkpointing",
            do="use non-reentrant checkpointing (timm's default), or vpt_deep, whose blocks own their prompts",
        )
    return prompts_BpD
