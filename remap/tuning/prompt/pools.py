"""Pools of prompts of which each image gets its own, by keys that are compared with its frozen feature.

A query q is what the frozen network makes of an image: a first pass without prompts. So a model learns class after
class, and images of other sessions keep the prompts that they found (``remap extend``).

Letters: B batch, M prompts in the pool, l tokens of a prompt, N prompts of an image, D width, H heads, h head width.
"""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, AttentionBlock, module_at
from remap.backbones.families.key_values import extend_attention
from remap.backbones.typed import as_timm
from remap.tuning.base import Attachment, Edits, Method, Options, TrainingHooks
from remap.tuning.prompt.prompts import weight_like
from remap.tuning.weights import full_precision

POOL = "remap_pool"
# Tokens carry their queries from block to block under this attribute.
_QUERY = "remap_query"


class SessionOptions(Options):
    """Options of pools that give each session a part of its own."""

    sessions: int = Field(default=10, ge=2, description="Sessions that the pool is divided among.")
    session: int = Field(default=0, ge=0, description="Which of them is learned, from 0; `remap extend` counts on.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "SessionOptions":
        if self.session >= self.sessions:
            raise ValueError(f"session {self.session} is not one of {self.sessions} (start with more sessions)")
        return self


class L2P(Method):
    """Learning to Prompt (Wang et al. 2022, arXiv 2112.08654): the N of M prompts whose keys are nearest to the query.

    2*M*l*D parameters in each of the first blocks, and M*D of keys, which the loss pulls towards the queries that chose
    them (equation 5). As in the comparison of Smith et al. 2023 (arXiv 2211.13218, L2P++), prompts are keys and values
    in front of the tokens' own (prefix tuning), not tokens, and the classifier reads what the backbone's own reads.
    """

    class Config(Options):
        pool: int = Field(default=10, ge=2, description="Prompts in the pool.")
        length: int = Field(default=5, ge=1, description="Keys and values of a prompt, l.")
        num_blocks: int = Field(default=1, ge=1, description="First blocks, which have prompts.")
        top: int = Field(default=5, ge=1, description="Prompts that each image gets.")
        pull: float = Field(default=0.5, ge=0.0, description="Weight of the term that pulls keys towards queries.")

        @model_validator(mode="after")
        def _no_more_than_there_are(self) -> "L2P.Config":
            if self.top > self.pool:
                raise ValueError(f"top {self.top} is more than the {self.pool} prompts of the pool")
            return self

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, like, edits = self.config, weight_like(model, anatomy), Edits(model)
        query = Query(model, anatomy)
        keys = edits.insert(POOL, NearestKeys(anatomy.width, config, query), like)
        query.attach(edits, config.num_blocks)
        for block in anatomy.attention_blocks[: config.num_blocks]:
            extend(edits, block, Prefix(block, config.pool, config.length, keys), like)
        return attachment(edits, Pull(query, config.pull))


class DualPrompt(Method):
    """DualPrompt (Wang et al. 2022, arXiv 2204.04799): prompts for all sessions, then those of one session.

    Both are keys and values in front of the tokens' own (prefix tuning): 2*g*D parameters in each of the first blocks,
    then 2*l*D in each of the next for every session, and D of its key. In training a session has its own prompts and
    pulls its key towards its queries; an image that is answered gets those of the session with the nearest key.
    """

    class Config(SessionOptions):
        general: int = Field(default=5, ge=1, description="Keys and values for all sessions, g.")
        general_blocks: int = Field(default=2, ge=0, description="First blocks, which have these.")
        length: int = Field(default=20, ge=1, description="Keys and values of a session, l.")
        expert_blocks: int = Field(default=3, ge=1, description="Blocks behind them, which have those of a session.")
        pull: float = Field(default=1.0, ge=0.0, description="Weight of the term that pulls the key towards queries.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, blocks = self.config, anatomy.attention_blocks
        general = min(config.general_blocks, len(blocks) - 1)  # one block is left for prompts of a session
        like, edits, query = weight_like(model, anatomy), Edits(model), Query(model, anatomy)
        keys = edits.insert(POOL, SessionKeys(anatomy.width, config, query), like)
        query.attach(edits, general + config.expert_blocks)
        for index, block in enumerate(blocks[: general + config.expert_blocks]):
            sets, length = (1, config.general) if index < general else (config.sessions, config.length)
            extend(edits, block, Prefix(block, sets, length, keys), like)
        return attachment(edits, Pull(query, config.pull))


def extend(edits: Edits, block: AttentionBlock, prompts: nn.Module, like: Tensor) -> None:
    """Let a block attend to the keys and values that a module gives."""
    edits.insert(f"{block.attn}.{POOL}", prompts, like)
    edits.undo_by(extend_attention(module_at(edits.model, block.attn), prompts.forward))


def attachment(edits: Edits, hooks: TrainingHooks) -> Attachment:
    """Return what a pool says of itself: nothing of it decays."""
    return Attachment(edits, no_decay=edits.parameters(), identity_at_init=False, hooks=hooks)


class Query:
    """The frozen feature of each image of a batch, from a pass without prompts when the images enter.

    Queries go from block to block as an attribute of the tokens: a block that gradient checkpointing runs again, after
    any number of other passes, finds those of its own.

    Attributes:
        idle: Whether that pass is running, so that there are no prompts.
        features_BD: The queries of the block that runs.
        pulled: Mean distance 1 - cos of the newest queries to the keys that were chosen for them, a scalar.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy, self.idle = model, anatomy, False
        self.features_BD, self.pulled = torch.zeros(0), torch.zeros(())

    def attach(self, edits: Edits, blocks: int) -> None:
        """Ask for each batch, and let the first ``blocks`` know the answer."""
        edits.before(self.anatomy.input_module, self.ask)
        for block in self.anatomy.blocks[:blocks]:
            edits.before(block.block, self.recall)
            edits.after(block.block, self.hand_on)

    def ask(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the images."""
        if self.idle:
            return
        self.idle = True
        try:
            with torch.no_grad():
                features = as_timm(self.model).forward_features(args[0])
                self.features_BD = as_timm(self.model).forward_head(features, pre_logits=True)
        finally:
            self.idle = False

    def recall(self, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a block: the first one marks its input."""
        if self.idle:
            return
        known = getattr(args[0], _QUERY, None)
        if known is None:
            setattr(args[0], _QUERY, self.features_BD)
        else:
            self.features_BD = known

    def hand_on(self, block: nn.Module, args: tuple, output_BTD: Tensor) -> None:
        """Forward hook of a block."""
        if not self.idle:
            setattr(output_BTD, _QUERY, self.features_BD)

    def similarity(self, keys_MD: Tensor) -> Tensor:
        """Return the cosine of each query with each key (B, M), also under autocast in the precision of the keys."""
        with full_precision(keys_MD):
            return F.normalize(self.features_BD.to(keys_MD.dtype), dim=-1) @ F.normalize(keys_MD, dim=-1).T

    def __getstate__(self) -> dict[str, Any]:
        # What a forward pass leaves behind has a graph, which can be neither copied nor saved.
        return {**self.__dict__, "features_BD": torch.zeros(0), "pulled": torch.zeros(())}


class NearestKeys(nn.Module):
    """The keys of L2P's prompts, and which prompts an image gets."""

    def __init__(self, width: int, config: L2P.Config, query: Query) -> None:
        super().__init__()
        self.top, self.query = config.top, query
        self.keys = nn.Parameter(torch.empty(config.pool, width))
        nn.init.uniform_(self.keys, -1.0, 1.0)

    def of_images(self) -> Tensor:
        """Return the prompts of each image (B, N), those with the nearest keys, the nearest first."""
        near_BN, chosen_BN = self.query.similarity(self.keys).topk(self.top, dim=1)
        self.query.pulled = (1.0 - near_BN.float()).sum(1).mean()
        return chosen_BN


class SessionKeys(nn.Module):
    """The keys of DualPrompt's sessions, and which session an image belongs to."""

    def __init__(self, width: int, config: DualPrompt.Config, query: Query) -> None:
        super().__init__()
        self.session, self.query = config.session, query
        self.keys = nn.Parameter(torch.empty(config.sessions, width))
        nn.init.uniform_(self.keys, -1.0, 1.0)

    def of_images(self) -> Tensor:
        """Return the session of each image (B, 1): the one that is learned, or that of the nearest key so far."""
        near_BS = self.query.similarity(self.keys[: self.session + 1])
        self.query.pulled = (1.0 - near_BS[:, -1].float()).mean()
        nearest_B1 = near_BS.argmax(1, keepdim=True)
        return torch.full_like(nearest_B1, self.session) if self.training else nearest_B1


class Prefix(nn.Module):
    """Keys and values of one block: the same for all images, or those that keys choose for each."""

    def __init__(self, block: AttentionBlock, sets: int, length: int, keys: NearestKeys | SessionKeys) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(sets, 2, block.heads, length, block.head_dim))
        nn.init.uniform_(self.prompts, -1.0, 1.0)
        self._keys = (keys,)  # which the model holds already

    def forward(self, k_BHTh: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, N*l, h) for a batch with these keys of tokens."""
        (keys,) = self._keys
        if keys.query.idle:
            return k_BHTh[:, :, :0], k_BHTh[:, :, :0]
        if len(self.prompts) == 1:
            batch = k_BHTh.shape[0]  # len() would fix the batch of an exported program
            own = self.prompts[:, None].expand(batch, -1, -1, -1, -1, -1)
        else:
            own = self.prompts[keys.of_images()]
        own = own.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return own[0], own[1]


class Pull(TrainingHooks):
    """The term that pulls keys towards the queries that chose them."""

    def __init__(self, query: Query, weight: float) -> None:
        self.query, self.weight = query, weight

    def penalty(self) -> Tensor:
        return self.weight * self.query.pulled
