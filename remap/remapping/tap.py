"""Run a network and record the signals that losses read.

Letters: B batch, C classes, D width, N patches, P prefix tokens (class, distillation, registers).
"""

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy, AttentionScores, module_at, watch_attention
from remap.backbones.families.base import family_of
from remap.backbones.typed import as_timm
from remap.errors import BackboneError
from remap.remapping.signals import Attention, Needs, Signals, Tokens
from remap.tuning.finetuning.dual_head import HEADS
from remap.tuning.seam import Seam


class Tap:
    """Runs a network and records what ``needs`` names, through hooks that leave with ``close``.

    Attention of a chosen block is rebuilt from what the block itself made of its input, so the block and all others
    keep the fused kernel. Pooled features are what the classifier's linear layer is given.

    Args:
        extra_tokens: Prompt tokens between prefix and patches inside the blocks (``Attached.extra_tokens``).
        seam: Where the network's frozen beginning ends, if it has one (``Attached.seam``).
        tokens_from: The first block that has the extra tokens (``Attached.tokens_from``).

    Raises:
        BackboneError: Attention is wanted of a backbone without attention over the whole image.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        needs: Needs,
        extra_tokens: int = 0,
        seam: Seam | None = None,
        tokens_from: int = 0,
    ) -> None:
        self.model, self.anatomy, self.needs, self.seam = model, anatomy, needs, seam
        self.extra_tokens, self.tokens_from = extra_tokens, tokens_from
        self._scores: dict[int, AttentionScores] = {}
        self._tokens: dict[int, Tensor] = {}
        self._pooled: dict[str, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._running = False
        self._handles = [
            handle
            for index in sorted(needs.attention | needs.values)
            for handle in watch_attention(model, anatomy, index, self._keeper(index), values=index in needs.values)
        ]
        # Of stages the outputs are returned; behind the last one, where a norm may be, stands that stage itself.
        self._stages = sorted({min(index, anatomy.depth - 1) for index in needs.tokens}) if anatomy.in_stages else []
        self._handles += [
            module_at(model, anatomy.blocks[index].block).register_forward_hook(self._token_keeper(index))
            for index in sorted(needs.tokens - {anatomy.depth})
            if not anatomy.in_stages
        ]
        self._several = len(anatomy.classifier_heads) > 1 and anatomy.averaged_heads
        if needs.pooled or self._several:
            self._handles += [
                module_at(model, path).register_forward_hook(self._head_keeper(path))
                for path in anatomy.classifier_heads
            ]

    def _keeper(self, index: int) -> Callable[[AttentionScores], None]:
        def keep(scores: AttentionScores) -> None:
            # Gradient checkpointing runs the block again in the backward pass; what it makes then is not recorded.
            if self._running:
                self._scores[index] = scores

        return keep

    def _token_keeper(self, index: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def keep(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if self._running:
                self._tokens[index] = output

        return keep

    def _head_keeper(self, path: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def keep(_module: nn.Module, args: tuple, output: Tensor) -> None:
            if self._running:
                self._pooled[path], self._logits[path] = args[0], output

        return keep

    def __call__(self, images_BCHW: Tensor | None, kept: Mapping[str, Tensor] | None = None) -> Signals:
        """Forward normalised images; logits and pooled features come from the model's own head path.

        Args:
            kept: What the seam's stem gave for these images; only the rest is run then.
        """
        self._running = True
        try:
            if kept is None:
                assert images_BCHW is not None  # they may be left out for the rest alone
                features = self._features(images_BCHW)
                logits = as_timm(self.model).forward_head(features)
            else:
                assert self.seam is not None
                logits = self.seam.rest(kept, images_BCHW, whole_blocks=bool(self.needs.blocks))
            return Signals(
                logits,
                self._mean_pooled() if self.needs.pooled else None,
                {index: self._attention(index) for index in sorted(self.needs.attention | self.needs.values)},
                {index: self._tokens_at(index) for index in sorted(self.needs.tokens)},
                self._head_logits() if self._several else getattr(logits, HEADS, ()),
            )
        finally:
            self._running = False
            for kept_now in (self._scores, self._tokens, self._pooled, self._logits):
                kept_now.clear()

    def _features(self, images_BCHW: Tensor) -> Tensor:
        depth = self.anatomy.depth
        if self._stages:
            features, maps = family_of(self.anatomy).stage_outputs(self.model, images_BCHW, self._stages)
            self._tokens.update(zip(self._stages, maps, strict=True))
            if depth in self.needs.tokens:
                self._tokens[depth] = maps[-1]
            return features
        features = as_timm(self.model).forward_features(images_BCHW)
        if depth in self.needs.tokens:
            self._tokens[depth] = features
        return features

    def _head_logits(self) -> tuple[Tensor, ...]:
        """Return the logits of each classifier of an averaged answer: one a token, or one a loss (``dual_head``)."""
        heads = [self._logits[path] for path in self.anatomy.classifier_heads]
        pairs = [getattr(mixed_BC, HEADS) for mixed_BC in heads if hasattr(mixed_BC, HEADS)]
        # Each token has both classifiers then, and what they answer to one loss is averaged as their mixtures are.
        return (
            tuple(torch.stack(of_loss).mean(dim=0) for of_loss in zip(*pairs, strict=True)) if pairs else tuple(heads)
        )

    def _mean_pooled(self) -> Tensor:
        """Return what the classifier is given; with two heads (distilled DeiT), the mean of both.

        Classifiers of branches or stages have features of their own, which are joined as timm does. Those that
        classify tokens have none.
        """
        inputs = [self._pooled[path] for path in self.anatomy.classifier_heads]
        inputs = [x.flatten(1) for x in inputs if x.shape[2:].numel() == 1]
        if not self.anatomy.averaged_heads:
            return torch.cat(inputs, dim=1)
        return inputs[0] if len(inputs) == 1 else torch.stack(inputs).mean(dim=0)

    def _attention(self, index: int) -> Attention:
        scores = self._scores[index]
        extra = self.extra_tokens if index >= self.tokens_from else 0
        grid = self.anatomy.blocks[index].grid
        expected = self.anatomy.num_prefix_tokens + extra + grid[0] * grid[1]
        if scores.k_BHTh.shape[2] != expected:
            # Cutting by position would silently take the wrong tokens.
            raise BackboneError(
                "the tokens inside a block are not those the attention loss expects",
                given=f"{scores.k_BHTh.shape[2]} tokens in block {index}",
                allowed=f"{expected}: prefix {self.anatomy.num_prefix_tokens}, prompts {extra}, "
                f"patches {grid[0] * grid[1]}",
                do="use images of the backbone's own size, without patch dropout",
            )
        q, k, bias = self._shared(scores.q_BHTh, extra), self._shared(scores.k_BHTh, extra), scores.bias_HTT
        if bias is not None:
            bias = self._shared(self._shared(bias, extra), extra, dim=-1)
        v = None if scores.v_BHTh is None else self._shared(scores.v_BHTh, extra)
        return Attention(q, k, self.anatomy.has_class_token, grid, bias, v)

    def _tokens_at(self, index: int) -> Tokens:
        x, anatomy = self._tokens[index], self.anatomy
        if "sequence" not in anatomy.parts:
            block = anatomy.blocks[min(index, anatomy.depth - 1)]
            map_BhwD = x if block.channels_last else x.movedim(1, -1)
            patches = map_BhwD.flatten(1, 2)
            return Tokens(patches, patches[:, :0], (map_BhwD.shape[1], map_BhwD.shape[2]), False)
        prefix, expected = anatomy.num_prefix_tokens, anatomy.num_prefix_tokens + anatomy.num_patches
        # Prompts are taken off again behind the last block, or in front of the next one.
        extra = x.shape[1] - expected
        if extra not in (0, self.extra_tokens):
            raise BackboneError(
                "the tokens behind a block are not those the loss expects",
                given=f"{x.shape[1]} tokens behind block {index}",
                allowed=f"{expected}, or {expected + self.extra_tokens} with prompts",
                do="use images of the backbone's own size, without patch dropout",
            )
        return Tokens(x[:, prefix + extra :], x[:, :prefix], anatomy.grid, anatomy.has_class_token)

    def _shared(self, x: Tensor, extra: int, dim: int = -2) -> Tensor:
        """Keep the class token and the patches of a full token sequence in dimension ``dim``."""
        first_patch = self.anatomy.num_prefix_tokens + extra
        patches = x.narrow(dim, first_patch, x.shape[dim] - first_patch)
        if not self.anatomy.has_class_token:
            return patches
        if first_patch == 1:
            return x
        return torch.cat([x.narrow(dim, 0, 1), patches], dim=dim)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
