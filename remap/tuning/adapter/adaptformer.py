"""AdaptFormer (Chen et al. 2022, arXiv 2205.13535): a bottleneck in parallel to every MLP.

Letters: B batch, T tokens, D width, r bottleneck.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy
from remap.tuning.adapter.bottleneck import Beside, Bottleneck, insert_adapter
from remap.tuning.base import Attachment, Edits, Method, Options


class AdaptFormer(Method):
    """x + ls2(mlp(norm2(x))) + s * up(dropout(relu(down(x)))), equations 3 and 4: L*(2*D*r + r + D) parameters.

    x is taken before norm2, and the sum stands outside LayerScale and drop-path, as in the official code: a
    LayerScale of 1e-5 would otherwise leave the adapter close to dead.
    """

    class Config(Options):
        """Defaults are those of the official code; a layer norm adds 2*D parameters per block."""

        bottleneck: int = Field(default=64, ge=1, description="Width of the bottleneck.")
        scale: float = Field(default=0.1, gt=0.0, description="Factor on the adapter's output.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability in the bottleneck.")
        layernorm: Literal["none", "in", "out"] = Field(
            default="none", description="Layer norm of the input or the scaled output."
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        edits = Edits(model)
        for site, block in enumerate(anatomy.attention_blocks):
            adapter = ParallelBottleneck(block.width, self.config, site)
            insert_adapter(edits, block, "remap_adaptformer", adapter)
            edits.before(block.norm2, adapter.keep_input)
            edits.after(block.mlp_branch_end, adapter.add_to_branch)
        return Attachment(edits)


class ParallelBottleneck(Beside, Bottleneck):
    """The adapter of one block, (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, config: AdaptFormer.Config, site: int) -> None:
        super().__init__(width, config.bottleneck, F.relu, config.dropout, site)
        self.scale, self.layernorm = config.scale, config.layernorm
        self.norm = nn.Identity() if config.layernorm == "none" else nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.layernorm == "in":
            x_BTD = self.norm(x_BTD)
        out_BTD = super().forward(x_BTD) * self.scale
        return self.norm(out_BTD) if self.layernorm == "out" else out_BTD
