"""MMRL: tokens of one learned space in the upper blocks of both towers (Guo and Gu 2025, arXiv 2503.08497).

Letters: B images, C classes, K tokens, R width of the learned space, D widths of the towers, E dimensions that images
and texts share.
"""

from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.anatomy import Anatomy, module_at
from remap.backbones.projected_head import exact_linear
from remap.errors import BackboneError
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.prompt.maple import ImagePrompts, attach_both
from remap.tuning.prompt.promptsrc import BesideFrozen
from remap.tuning.weights import registered
from remap.tuning.words import WordHead, at_least_float32, tower_for, zero_shot


class MMRL(Method):
    """K tokens a block from ``first`` on, linear maps of one space (K, R): K*R + sum of (R + 1)*D + D*E parameters.

    An image has two features: that of the class token, and the mean of what the last block and the final norm make of
    its K tokens, through a projection of its own that trains and starts from the model's. With logits z and z' of the
    two the loss is share * L(z) + (1 - share) * L(z') (equations 11 and 12), and the distances 1 - cos of the class
    features and of the text features to the frozen model's, times ``strength`` (equations 13 and 14). The answer is
    share * z + (1 - share) * z', for every class; the paper answers with z alone where classes were not trained.

    L is a loss on the logits at a temperature of 1 (ce, kd). It is made of that of the answer a by the gap
    share * lse(z) + (1 - share) * lse(z') - lse(a), lse the log of the sum of exponentials, which is exact where the
    weights of such losses sum to 1.
    """

    class Config(Options):
        num_tokens: int = Field(default=5, ge=1, description="Tokens of a block, in either tower.")
        width: int = Field(default=512, ge=1, description="Width of the learned space.")
        first: int = Field(default=5, ge=0, description="First block with tokens, from 0; at most the last one.")
        share: float = Field(default=0.7, ge=0.0, le=1.0, description="Share alpha of the class token's logits.")
        strength: float = Field(default=1.0, ge=0.0, description="Weight of the distances to the frozen model.")

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        config, edits = self.config, Edits(model)
        words = Space(model, anatomy, config)
        prompts = SpaceTokens(model, anatomy, config, words)
        hooks = TwoFeatures(model, anatomy, words, prompts, config)
        hooks.watch(edits, anatomy)
        edits.after(anatomy.classifier_heads[0], partial(_answer, prompts, words))
        return replace(attach_both(edits, anatomy, words, prompts), hooks=hooks, tokens_from=prompts.own.start)


class Space(WordHead):
    """The learned space, and its maps into the text tower, whose texts are the first of each class."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, config: MMRL.Config) -> None:
        super().__init__(model, anatomy, "mmrl")
        side = self.language.side.config
        self.first = min(config.first, side.depth - 1)
        self.space = nn.Parameter(torch.empty(config.num_tokens, config.width))
        nn.init.normal_(self.space, std=0.02)
        self.maps = nn.ModuleList(nn.Linear(config.width, side.width) for _ in range(self.first, side.depth))
        self.start = 1

    def texts(self) -> Tensor:
        texts = [texts[0] for texts in self.language.texts]
        if not texts:
            raise BackboneError("the words of the classes are not known, so no text can be trained")
        tower, ids_CL = tower_for(self.language, self.space), self.language.ids(texts)
        self.start = int(bool((ids_CL[:, 0] == self.language.tokenizer([""])[0, 0]).all()))
        ids_CL = ids_CL.to(self.space.device)
        ends_C = tower.ends(ids_CL)
        # What is read lies behind the tokens, except the start token itself.
        ends_C = ends_C + len(self.space) * (ends_C >= self.start)
        return tower.encode(tower.embed(ids_CL), ends_C, self.before_block)

    def before_block(self, index: int, tokens_NLD: Tensor) -> Tensor:
        """Put the tokens behind the start token, in the place of those of the block before."""
        if index < self.first:
            return tokens_NLD
        own_KD = self.maps[index - self.first](self.space).to(tokens_NLD.dtype)
        rest = self.start + (len(self.space) if index > self.first else 0)
        own_NKD = own_KD.expand(tokens_NLD.shape[0], -1, -1)
        return torch.cat([tokens_NLD[:, : self.start], own_NKD, tokens_NLD[:, rest:]], dim=1)


class SpaceTokens(ImagePrompts):
    """The maps into the image tower, and the feature that comes of the tokens."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, config: MMRL.Config, words: Space) -> None:
        first = min(config.first, anatomy.depth - 1)
        super().__init__(model, anatomy, config.num_tokens, anatomy.depth, first=first)
        del self.prompts
        self._norms = ()  # these tokens enter inside block 0, not in front of its norm
        self.share, self._words = config.share, (words,)
        self.maps = nn.ModuleList(nn.Linear(config.width, block.width) for block in anatomy.blocks[first:])
        head = module_at(model, anatomy.classifier_heads[0].rpartition(".")[0])
        self.proj = nn.Linear(anatomy.width, words.head.in_features, bias=False)
        weight = getattr(head.proj, "weight", None)  # of a model without a projection both widths are one
        with torch.no_grad():
            self.proj.weight.copy_(torch.eye(*self.proj.weight.shape) if weight is None else weight)
        self._final = () if anatomy.final_norm is None else (module_at(model, anatomy.final_norm),)
        self.outputs_BKD: Tensor | None = None
        self.other_BC: Tensor | None = None

    def raw(self, index: int) -> Tensor:
        return self.maps[index - self.own.start](self._words[0].space)

    def take_out(self, index: int, block: nn.Module, args: tuple, output_BTD: Tensor) -> Tensor | None:
        if index == self.depth - 1 and not self.idle:
            self.outputs_BKD = output_BTD[:, self.prefix : self.prefix + self.length]
        return super().take_out(index, block, args, output_BTD)

    def unit(self) -> Tensor:
        """Return the unit features (B, E) of the tokens."""
        assert self.outputs_BKD is not None, "the blocks have not run"
        x_BKD, self.outputs_BKD = self.outputs_BKD, None
        for norm in self._final:
            x_BKD = norm.forward(x_BKD)
        return F.normalize(at_least_float32(self.proj(x_BKD.mean(dim=1))), dim=-1)


class TwoFeatures(BesideFrozen):
    """The distances to the frozen model, and the gap between the losses of two features and that of their answer."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, words: Space, prompts: SpaceTokens, config: MMRL.Config
    ) -> None:
        super().__init__(model, anatomy, words, prompts)
        self.tokens, self.config = prompts, config

    def penalty(self) -> Tensor | None:
        t_CE, strength, share = self.words.unit_now(), self.config.strength, self.config.share
        total = strength * (1.0 - (t_CE * zero_shot(self.words.language, t_CE)).sum(dim=-1).mean())
        images, other_BC = self.taken(t_CE), self.tokens.other_BC
        if images is None or other_BC is None:
            return total
        self.tokens.other_BC = None
        first_BC = self.words.language.scale * images[0] @ t_CE.mT + self.words.language.bias
        other_BC = other_BC.to(first_BC.dtype)
        answer_BC = share * first_BC + (1.0 - share) * other_BC
        gap_B = share * first_BC.logsumexp(1) + (1.0 - share) * other_BC.logsumexp(1) - answer_BC.logsumexp(1)
        return total + strength * (1.0 - (images[0] * images[1]).sum(dim=-1).mean()) + gap_B.mean()


def _answer(prompts: SpaceTokens, words: Space, _head: nn.Module, _args: tuple, logits_BC: Tensor) -> Tensor:
    """Forward hook of the classifier."""
    stored_CE = registered(words.head, "weight")
    weight_CE = stored_CE if words.unit_CE is None else (words.language.scale * words.unit_CE).to(stored_CE.dtype)
    other_BC = exact_linear(prompts.unit(), weight_CE, words.head.bias)
    prompts.other_BC = other_BC if words.learns else None
    return prompts.share * logits_BC + (1.0 - prompts.share) * other_BC
