"""E2VPT (Han et al. 2023, arXiv 2307.13770): prompt tokens, key-value prompts inside attention, and pruning.

Letters: B batch, p prompts, D width, L depth, H heads, h head width, n key-value prompts, s segments of a prompt.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionBlock, module_at
from remap.backbones.families.key_values import extend_attention
from remap.registry import LATER
from remap.tuning.base import NO_HOOKS, Attachment, Edits, Method, Options, TrainingHooks
from remap.tuning.dropout import SampleDropout
from remap.tuning.prompt.prompts import PromptOptions, weight_like
from remap.tuning.prompt.sequence_prompts import Prompts, attach_prompts

_KV = "remap_key_values"
SEGMENTS = 16


class E2VPT(Method):
    """Every block gets p prompt tokens and n key-value prompts: L*(p + n)*D parameters.

    The key-value prompts of a block are one tensor (H, n, h), which stands in front of the keys and of the values
    (equation 5). They are behind norms and rotation of the queries and keys, and have no position bias.
    """

    class Config(Options):
        """Pruning is off by default: the paper searches the shares for each task.

        A segment is a sixteenth of the width: neighbouring channels, or every 16th channel as in the authors' code.
        Pruning takes as many segments of each token that stays (section 3.3), or the least of all of them together.
        After pruning, prompts start again from their first values.
        """

        num_prompts: int = Field(default=10, ge=1, description="Prompt tokens per block.")
        num_kv: int = Field(default=5, ge=1, description="Key-value prompts per block.")
        dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout probability on both kinds of prompts.")
        prune_tokens: float = Field(
            default=0.0, ge=0.0, lt=1.0, description="Share of tokens to prune, the same in all blocks."
        )
        prune_segments: float = Field(
            default=0.0, ge=0.0, lt=1.0, description="Share of the remaining tokens' segments to prune."
        )
        segments: Annotated[Literal["neighbours", "interleaved"], LATER] = Field(
            default="neighbours", description="Channels of a segment: neighbours, or every 16th (the authors' code)."
        )
        quota: Annotated[Literal["token", "all"], LATER] = Field(
            default="token", description="Prune the same share of segments in each token, or over all tokens together."
        )
        prune_at: float = Field(default=0.5, gt=0.0, lt=1.0, description="Share of training before the pruning.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config = self.config
        prunes = config.prune_tokens > 0.0 or config.prune_segments > 0.0
        like, kind = weight_like(model, anatomy), PrunedPrompts if prunes else Prompts
        plain = PromptOptions.model_validate({"num_prompts": config.num_prompts, "dropout": config.dropout})
        prompts = kind(anatomy, plain, range(anatomy.depth), anatomy.depth, like)
        if isinstance(prompts, PrunedPrompts):
            prompts.interleaved = config.segments == "interleaved"
        edits = Edits(model)
        attach_prompts(edits, anatomy, prompts)
        for index, block in enumerate(anatomy.attention_blocks):
            # The dropout of the prompt tokens has the sites from 0 to L - 1.
            key_values = KeyValues(block, config.num_kv, config.dropout, anatomy.depth + index, like)
            edits.insert(f"{block.attn}.{_KV}", key_values)
            edits.undo_by(extend_attention(module_at(model, block.attn), key_values.forward))
        parameters = edits.parameters()
        return Attachment(
            edits,
            no_decay=parameters,
            identity_at_init=False,
            extra_tokens=config.num_prompts,
            hooks=Pruning(prompts, parameters, config) if isinstance(prompts, PrunedPrompts) else NO_HOOKS,
        )


class KeyValues(nn.Module):
    """The key-value prompts of one block. Dropout draws one mask for their use as keys and as values."""

    def __init__(self, block: AttentionBlock, count: int, dropout: float, site: int, like: Tensor) -> None:
        super().__init__()
        shape = (block.heads, count, block.head_dim)
        self.key_values = nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype))
        nn.init.kaiming_uniform_(self.key_values)
        self.dropout = SampleDropout(dropout, site)

    def forward(self, k_BHTh: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, n, h) for a batch with these keys of tokens."""
        own_BHnh = self.dropout(self.key_values.expand(k_BHTh.shape[0], -1, -1, -1))
        return own_BHnh, own_BHnh


class PrunedPrompts(Prompts):
    """Prompts times two masks, one for tokens (p) and one for their segments (p, s), which all blocks share."""

    token_mask: Tensor
    segment_mask: Tensor
    interleaved = False

    def __init__(self, anatomy: Anatomy, config: PromptOptions, own: range, sets: int, like: Tensor) -> None:
        super().__init__(anatomy, config, own, sets, like)
        self.register_buffer("token_mask", torch.ones_like(self.prompts[0, :, 0]))
        self.register_buffer("segment_mask", torch.ones_like(self.prompts[0, :, :1]).repeat(1, SEGMENTS))

    def tokens(self, index: int) -> Tensor:
        kept_pD = self.token_mask[:, None] * self.segment_mask[:, self.segment_of_channel()]
        return super().tokens(index) * kept_pD

    def segment_of_channel(self) -> Tensor:
        """Return (D,), which of the segments a channel belongs to."""
        width = self.prompts.shape[-1]
        channels = torch.arange(width, device=self.prompts.device)
        return channels % SEGMENTS if self.interleaved else channels * SEGMENTS // width


class Pruning(TrainingHooks):
    """Scores tokens and segments until it is time to prune, then prunes and rewinds.

    A mask m of ones makes no difference to the loss, and its gradient says how much its entry matters: the importance
    is the mean over the steps of |dL/dm| (equations 7 and 8). As m multiplies the prompts, dL/dm is the sum of
    gradient times value over what the entry covers.

    Rewinding resets what this method trains. The classifier and the optimiser's moments go on: they are not the
    method's.
    """

    def __init__(self, prompts: PrunedPrompts, parameters: Mapping[str, nn.Parameter], config: E2VPT.Config) -> None:
        self.prompts, self.parameters, self.config = prompts, dict(parameters), config
        self.start_session()
        self._segment_score = torch.zeros_like(prompts.segment_mask)
        self._token_score = torch.zeros_like(prompts.token_mask)

    def start_session(self) -> None:
        """Rewind to what the parameters are now: as they were drawn, or what the run that is extended has learned."""
        self._first = {name: p.detach().clone() for name, p in self.parameters.items()}
        # The optimiser has moved the prompts by the time the gradient is looked at.
        self._before = self.prompts.prompts.detach().clone()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        last = max(1, round(self.config.prune_at * total)) - 1
        if step > last:
            return
        self._follow()
        prompts = self.prompts.prompts
        if prompts.grad is not None:
            of_channels_pD = (prompts.grad * self._before).sum(0)
            segments_ps = torch.zeros_like(self._segment_score)
            segments_ps.index_add_(1, self.prompts.segment_of_channel(), of_channels_pD)
            self._segment_score += segments_ps.abs()
            self._token_score += segments_ps.sum(1).abs()
        if step == last:
            self._prune()
        self._before.copy_(prompts)

    def _follow(self) -> None:
        """Follow the model, which may have been moved or converted since it was attached to."""
        like = self.prompts.prompts
        self._first = {name: value.to(like) for name, value in self._first.items()}
        self._before, self._segment_score, self._token_score = (
            value.to(like) for value in (self._before, self._segment_score, self._token_score)
        )

    def _prune(self) -> None:
        tokens, segments = self.prompts.token_mask, self.prompts.segment_mask
        gone = int(self.config.prune_tokens * tokens.numel())
        tokens[self._token_score.argsort(stable=True)[:gone]] = 0.0
        # Segments compete within a token, or among all tokens that stay.
        kept = tokens.nonzero()[:, 0]
        scores = self._segment_score[kept].view(len(kept) if self.config.quota == "token" else 1, -1)
        gone = int(self.config.prune_segments * scores.shape[1])
        left = torch.ones_like(scores).scatter_(1, scores.argsort(dim=1, stable=True)[:, :gone], 0.0)
        segments[kept] = left.view(len(kept), SEGMENTS)
        for name, parameter in self.parameters.items():
            parameter.copy_(self._first[name])

    def memory(self) -> dict[str, Tensor]:
        first = {f"first.{name}": value for name, value in self._first.items()}
        scores = {"before": self._before, "token_score": self._token_score, "segment_score": self._segment_score}
        return {**first, **scores}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        for name, value in self.memory().items():
            value.copy_(memory[name])
