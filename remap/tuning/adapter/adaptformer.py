"""AdaptFormer (Chen et al. 2022, arXiv 2205.13535): a bottleneck in parallel to every MLP.

Letters: B batch, T tokens, D width, r bottleneck.
"""

import math
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from remap.backbones.anatomy import Anatomy, BlockPaths, module_at
from remap.tuning.base import Attached, Method, Options, insert_module
from remap.tuning.dropout import SampleDropout

_NAME = "adaptformer"


class AdaptFormer(Method):
    """x + ls2(mlp(norm2(x))) + s * up(dropout(relu(down(x)))), equations 3 and 4: L*(2*D*r + r + D) parameters.

    x is taken before norm2, and the sum stands outside LayerScale and drop-path, as in the official code: a
    LayerScale of 1e-5 would otherwise leave the adapter close to dead.
    """

    class Config(Options):
        """Official defaults; ``layernorm`` normalises the adapter's input, or its scaled output (2*D more a block)."""

        bottleneck: int = Field(default=64, ge=1)
        scale: float = Field(default=0.1, gt=0.0)
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
        layernorm: Literal["none", "in", "out"] = "none"

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attached:
        handles: list[RemovableHandle] = []
        for site, paths in enumerate(anatomy.blocks):
            handles += self._attach_block(model, paths, anatomy.width, site)
        added = [f"{paths.block}.{_NAME}" for paths in anatomy.blocks]
        prefixes = tuple(f"{path}." for path in added)
        names = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
        return Attached(
            model,
            anatomy,
            trainable=names,
            no_decay=[name for name, p in names.items() if p.ndim <= 1],
            added=added,
            handles=handles,
        )

    def _attach_block(self, model: nn.Module, paths: BlockPaths, width: int, site: int) -> list[RemovableHandle]:
        like = module_at(model, paths.fc1).weight
        adapter = ParallelBottleneck(width, self.config, site).to(device=like.device, dtype=like.dtype)
        insert_module(model, f"{paths.block}.{_NAME}", adapter)
        return [
            module_at(model, paths.norm2).register_forward_pre_hook(adapter.keep_input),
            module_at(model, paths.mlp_branch_end).register_forward_hook(adapter.add_to_branch),
        ]


class ParallelBottleneck(nn.Module):
    """The adapter of one block and its two hooks.

    ``keep_input`` runs in front of norm2 and ``add_to_branch`` after the MLP branch of the same block, so what is
    kept lives within one block's forward, also when gradient checkpointing runs the block again. The hooks are
    bound methods, which ``copy.deepcopy`` binds to the copied module.
    """

    def __init__(self, width: int, config: AdaptFormer.Config, site: int) -> None:
        super().__init__()
        self.scale, self.layernorm = config.scale, config.layernorm
        self.norm = nn.Identity() if config.layernorm == "none" else nn.LayerNorm(width)
        self.down = nn.Linear(width, config.bottleneck)
        self.dropout = SampleDropout(config.dropout, site)
        self.up = nn.Linear(config.bottleneck, width)
        self._kept_BTD: Tensor | None = None
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.layernorm == "in":
            x_BTD = self.norm(x_BTD)
        hidden_BTr = self.dropout(F.relu(self.down(x_BTD)))
        out_BTD = self.up(hidden_BTr) * self.scale
        return self.norm(out_BTD) if self.layernorm == "out" else out_BTD

    def keep_input(self, norm2: nn.Module, args: tuple) -> None:
        """Forward pre-hook of norm2."""
        self._kept_BTD = args[0]

    def add_to_branch(self, branch_end: nn.Module, args: tuple, output_BTD: Tensor) -> Tensor:
        """Forward hook of the MLP branch's last module."""
        # Let go before running: checkpointing may leave the adapter early, by an exception of its own.
        kept_BTD, self._kept_BTD = self._kept_BTD, None
        return output_BTD + self(kept_BTD)

    def __getstate__(self) -> dict[str, Any]:
        # A forward that was broken off leaves an activation behind, which can be neither copied nor saved.
        return {**self.__dict__, "_kept_BTD": None}
