"""Visual Query Tuning (Tu et al. 2023, arXiv 2212.03220): learned queries read the frozen blocks for the classifier.

Letters: B batch, T tokens, p queries a block, D width, L depth, C classes, H heads, h head width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.block_reader import BlockReader, apart, leaving
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.dropout import SampleDropout
from remap.tuning.prompt.prompts import patch_bound
from remap.tuning.seam import FeatureSeam

_PATH = "remap_vqt"


class VQT(Method):
    """p queries a block: L*p*D parameters, and L*p*D more inputs of the classifier.

    In block l the queries z join the queries of the tokens, not their keys and values (equations 5 to 7), so the
    tokens stay what they are; what the rest of the block makes of z is its output z'_l. The classifier reads the
    concatenation of the pooled feature and z'_1 ... z'_L (p*D numbers each), each divided by its length.

    The classifier's weight keeps its path and shape. Its columns for z'_1 ... z'_L are a linear layer inside the
    classifier's module, so they belong to the head: C*L*p*D weights that are not counted as the method's. The
    paper's group lasso on them, which chooses features afterwards, is left out.

    Queries have no position in the image: rotary models leave them unrotated, relative position biases are 0 for them.
    """

    class Config(Options):
        num_prompts: int = Field(default=1, ge=1, description="Queries per block.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability on the queries.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        like = next(model.parameters())
        edits = Edits(model)
        queries = edits.insert(_PATH, Queries(model, anatomy, self.config), like)
        for index, paths in enumerate(anatomy.attention_blocks):
            edits.before(paths.attn, partial(queries.ask, index), with_kwargs=True)
        for path in anatomy.classifier_heads:
            head = module_at(model, path)
            if not isinstance(head, nn.Linear):  # a model without classifier
                continue
            columns = nn.Linear(queries.prompts.numel(), head.out_features, bias=False)
            nn.init.trunc_normal_(columns.weight, std=0.02)
            edits.insert(f"{path}.{_PATH}", columns, head.weight)
            edits.before(path, queries.normalise)
            edits.after(path, partial(queries.add_logits, path == anatomy.classifier_heads[-1]))
        names, seam = [f"{_PATH}.prompts"], QuerySeam(model, anatomy, queries)
        return Attachment(edits, trainable=names, no_decay=names, identity_at_init=False, seam=seam)


class Queries(nn.Module):
    """The queries of all blocks, and the hooks that ask with them and hand the answers to the classifier."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, config: VQT.Config) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(anatomy.depth, config.num_prompts, anatomy.width))
        self.dropouts = nn.ModuleList(SampleDropout(config.dropout, site) for site in range(anatomy.depth))
        bound = patch_bound(anatomy, anatomy.width)
        nn.init.uniform_(self.prompts, -bound, bound)
        # Not the tuple's modules but what holds them: they stay the backbone's own.
        self.readers = tuple(BlockReader(model, paths) for paths in anatomy.attention_blocks)
        self.answers: dict[int, Tensor] = {}
        self.kept: dict[str, Tensor] | None = None

    def ask(self, index: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention of block ``index``."""
        tokens_BTD, reader = args[0], self.readers[index]
        keys_BHTh = reader.keys(tokens_BTD, kwargs.get("rope"))
        if self.kept is None:
            self.answers[index] = self(index, tokens_BTD, keys_BHTh)
            return
        self.kept[f"tokens.{index}"] = tokens_BTD
        if keys_BHTh is not None:
            self.kept[f"keys.{index}"] = keys_BHTh

    def forward(self, index: int, tokens_BTD: Tensor, keys_BHTh: Tensor | None, *, alone: bool = False) -> Tensor:
        """Return (B, p*D) of length 1; inside the forward pass of block ``index``, if not ``alone``."""
        reader = self.readers[index]
        prompts_BpD = self.prompts[index].to(tokens_BTD.dtype).expand(tokens_BTD.shape[0], -1, -1)
        prompts_BpD = self.dropouts[index](prompts_BpD)
        if alone:
            answers_BpD = apart(reader.whole, reader.block, prompts_BpD, tokens_BTD, keys_BHTh)
        else:
            answers_BpD = reader.block(prompts_BpD, tokens_BTD, keys_BHTh)
            leaving(reader.whole, answers_BpD, prompts_BpD)
        return F.normalize(answers_BpD.flatten(1), dim=-1)

    def normalise(self, head: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of a linear layer of the classifier."""
        return (F.normalize(args[0], dim=-1), *args[1:])

    def add_logits(self, last: bool, head: nn.Module, args: tuple, logits_BC: Tensor) -> Tensor:
        """Forward hook of a linear layer of the classifier; ``last`` says that no other one follows."""
        if not self.answers:
            raise BackboneError("the queries have not read these features", do="call forward_features first")
        answers = [self.answers[index] for index in range(len(self.readers))]
        if last:
            self.answers = {}
        return logits_BC + getattr(head, _PATH)(torch.cat(answers, dim=-1))

    def __getstate__(self) -> dict[str, Any]:
        # A block that gradient checkpointing ran again leaves answers behind, which can be neither copied nor saved.
        return {**self.__dict__, "answers": {}, "kept": None}


class QuerySeam(FeatureSeam):
    """Kept are the pooled feature and, of every block, the tokens that its attention reads, behind norm1.

    Where keys are turned or normalised they are kept too. The rest is the queries' way through the blocks.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, queries: Queries) -> None:
        super().__init__(model, anatomy)
        self.queries = queries

    @torch.no_grad()
    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        self.queries.kept = kept
        try:
            return {**super().stem(images_BCHW), **kept}
        finally:
            self.queries.kept = None

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        self.queries.answers = {
            index: self.queries(index, kept[f"tokens.{index}"], kept.get(f"keys.{index}"), alone=True)
            for index in range(self.anatomy.depth)
        }
        return super().rest(kept, images_BCHW, whole_blocks=whole_blocks)
