"""Learned words beside those of the classes: context vectors, and what builds the texts around them.

Letters: C classes, L positions of a text, M context vectors, D width of the text tower, E dimensions that images and
texts share; x any leading dimensions.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.errors import BackboneError
from remap.language.pair import Language
from remap.tuning.base import Options
from remap.tuning.words import WordHead, tower_for

Position = Literal["end", "middle", "front"]


class ContextOptions(Options):
    """Options of learned context."""

    num_context: int | None = Field(
        default=None,
        ge=1,
        description="Context vectors; null is 16, or a quarter of the text tower's positions where that is less.",
    )
    words: str | None = Field(
        default=None,
        description="Words that they start from, behind zeros where the words are fewer; null is N(0, 0.02^2).",
    )


class Sentences(nn.Module):
    """Embeddings of the classes' texts, with room for M context vectors.

    Args:
        ids_CL: Token ids as ``ids_of_names`` gives them.
        count: Context vectors M.
        position: Where the class name stands among them: behind ("end"), before ("front") or in the "middle".
        between: Tokens in front of each name, which stay with it.
    """

    tokens: Tensor
    order: Tensor
    rows: Tensor
    ends: Tensor

    def __init__(
        self, language: Language, ids_CL: Tensor, count: int, position: Position = "end", between: int = 0
    ) -> None:
        super().__init__()
        tower, context, empty_L = language.tower, ids_CL.shape[1], language.tokenizer([""])[0]
        self.start = _start(ids_CL, empty_L)
        # Only where the name is not last its length counts, and is asked for: a task does not know the names.
        names = ids_CL if position == "end" else language.tokenizer(language.names)
        lengths = [between + _filled(ids_L) - _filled(empty_L) for ids_L in names]
        order_CL = torch.tensor([self._order(context, count, position, length) for length in lengths])
        moves = language.side.config.pool == "end"
        ends_C = tower.ends(ids_CL) + (count if moves else 0)
        # Behind the last end token stands nothing that a text sees which only looks back.
        length = int(ends_C.max()) + 1 if moves and language.side.config.causal else context
        device = tower.positions.device
        self.register_buffer("tokens", tower.embed(ids_CL.to(device)).detach())
        self.register_buffer("order", order_CL[:, :length].to(device))
        self.register_buffer("rows", torch.arange(len(ids_CL), device=device)[:, None])
        self.register_buffer("ends", ends_C.to(device))

    def _order(self, context: int, count: int, position: Position, name: int) -> list[int]:
        """Return for each position of a text which of its own tokens stands there, or behind them which vector."""
        own, learned, begin, end = list(range(context)), list(range(context, context + count)), self.start, self.start
        end += name
        before, after = {"end": (count, 0), "front": (0, count), "middle": (count // 2, count - count // 2)}[position]
        placed = [*own[:begin], *learned[:before], *own[begin:end], *learned[count - after :], *own[end:]]
        return placed[:context]

    def forward(self, context_xMD: Tensor) -> Tensor:
        """Return embeddings (x, C, L, D) with the same context (x, 1, M, D) in all classes, or (x, C, M, D)."""
        lead = context_xMD.shape[:-3]
        tokens = self.tokens.to(context_xMD).expand(*lead, -1, -1, -1)
        context = context_xMD.expand(*lead, len(self.tokens), -1, -1)
        return torch.cat([tokens, context], dim=-2)[..., self.rows, self.order, :]


def ids_of_names(language: Language, count: int, between: Sequence[int] = ()) -> Tensor:
    """Return token ids (C, L) of "NAME." of each class, filled up to the context of the text tower.

    Args:
        between: Ids of tokens in front of each name.

    Raises:
        BackboneError: A name is not known, or with M = ``count`` context vectors longer than the text tower takes.
    """
    if not language.names:
        raise BackboneError(
            "the words of the classes are not known, so no text can be trained",
            do="train with data of named classes, or give --classes",
        )
    ids_CL = language.tokenizer([f"{name}." for name in language.names])
    room = ids_CL.shape[1] - count - len(between)
    # Not always to be seen by what fills up: that may be the end token itself (CLIP's files of transformers).
    by_end = language.side.config.pool == "end"
    lengths = (language.tower.ends(ids_CL) + 1).tolist() if by_end else [_filled(ids_L) for ids_L in ids_CL]
    too_long = [name for name, length in zip(language.names, lengths, strict=True) if length > room]
    if too_long:
        raise BackboneError(
            f"the text tower reads {ids_CL.shape[1]} tokens, too few for {count} context vectors and a class's name",
            given=too_long[0],
            do="take fewer context vectors (method.num_context) or shorter words",
        )
    start, fixed = _start(ids_CL, language.tokenizer([""])[0]), ids_CL.new_tensor(between).expand(len(ids_CL), -1)
    return torch.cat([ids_CL[:, :start], fixed, ids_CL[:, start : ids_CL.shape[1] - len(between)]], dim=1)


def _start(ids_NL: Tensor, empty_L: Tensor) -> int:
    """Return 1 where texts have a start token, the one that an empty text begins with as well, or 0."""
    return int(bool((ids_NL[:, 0] == empty_L[0]).all()))


def _filled(ids_L: Tensor) -> int:
    """Return the number of tokens in front of those that only fill up."""
    return len(ids_L) - int((ids_L.flip(0) == ids_L[-1]).int().cumprod(0).sum())


class Context(WordHead):
    """The context vectors (M, D) of all classes, or (C, M, D) with one set a class.

    Args:
        sets: Whether each class has vectors of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        method: str,
        config: ContextOptions,
        *,
        position: Position = "end",
        sets: bool = False,
    ) -> None:
        super().__init__(model, anatomy, method)
        side = self.language.side.config
        # 16: Zhou et al. 2022; in a short text so many leave no room for a name.
        self.count, self.position, width = config.num_context or min(16, side.context // 4), position, side.width
        lead = (self.head.out_features,) if sets else ()
        self.context = nn.Parameter(torch.empty(*lead, self.count, width))
        nn.init.normal_(self.context, std=0.02)
        words = config.words if self.language.names else None  # a task brings its own
        self.between = [] if words is None else self._start_from(words)
        self._sentences: Sentences | None = None

    @torch.no_grad()
    def _start_from(self, words: str) -> list[int]:
        """Let the vectors be the first tokens of some words, behind zeros where there are fewer (ProGrad's code).

        Returns:
            The ids of the words' other tokens, which stay between context and name (MaPLe's code).
        """
        ids_1L, empty_L = self.language.tokenizer([words]), self.language.tokenizer([""])[0]
        start = _start(ids_1L, empty_L)
        ids_n = ids_1L[0, start : start + _filled(ids_1L[0]) - _filled(empty_L)]
        table_VD = self.language.tower.token_embedding.weight
        found_nD = table_VD[ids_n[: self.count].to(table_VD.device)]
        self.context.zero_()[..., self.count - len(found_nD) :, :] = found_nD.to(self.context)
        return ids_n[self.count :].tolist()

    @property
    def sentences(self) -> Sentences:
        """The texts of the classes, built when they are first needed: a task that only predicts needs none."""
        if self._sentences is None:
            # Past nn.Module: buffers that are made late would change what a model consists of.
            between = len(self.between)
            self.__dict__["_sentences"] = Sentences(self.language, self.ids(), self.count, self.position, between)
        return self.__dict__["_sentences"].to(self.context.device)

    def ids(self) -> Tensor:
        """Return token ids (C, L) of the classes' names, and of the words in front of them that stay."""
        return ids_of_names(self.language, self.count, self.between)

    def encode(self, context_xMD: Tensor) -> Tensor:
        """Return features (N, E) of texts with a context, N of them in the order of ``Sentences.forward``."""
        tower = tower_for(self.language, self.context)
        tokens = self.sentences(context_xMD)
        ends_N = self.sentences.ends.expand(tokens.shape[:-2]).flatten()
        return tower.encode(tokens.flatten(0, -3), ends_N + self.inserted(), self.before_block)

    def texts(self) -> Tensor:
        return self.encode(self.context if self.context.ndim == 3 else self.context[None])

    def before_block(self, index: int, tokens_NLD: Tensor) -> Tensor:
        """Return what block ``index`` of the text tower is given."""
        return tokens_NLD

    def inserted(self) -> int:
        """Return how many tokens ``before_block`` adds in front of the texts' end."""
        return 0

    def replaced(self, tokens_NLD: Tensor, prompts: Tensor) -> Tensor:
        """Return tokens with prompts (p, D) or (N, p, D) in the place of those behind the start token."""
        start, count = self.sentences.start, prompts.shape[-2]
        prompts_NpD = prompts.to(tokens_NLD.dtype).expand(tokens_NLD.shape[0], -1, -1)
        return torch.cat([tokens_NLD[:, :start], prompts_NpD, tokens_NLD[:, start + count :]], dim=1)


class DeepContext(Context):
    """Context vectors of several blocks: those of block 0 are the texts' own, each later one replaces them by its own.

    Attributes:
        deep: (depth - 1, M, D).
    """

    deep: Tensor

    def __init__(self, model: nn.Module, anatomy: Anatomy, method: str, config: ContextOptions, depth: int) -> None:
        super().__init__(model, anatomy, method, config)
        deep = torch.empty(depth - 1, *self.context.shape)
        if depth > 1:
            self.deep = nn.Parameter(nn.init.normal_(deep, std=0.02))
        else:  # no parameter: what is trained must get a gradient
            self.register_buffer("deep", deep, persistent=False)

    def of_block(self, index: int) -> Tensor:
        """Return (M, D)."""
        return self.deep[index - 1] if index else self.context

    def before_block(self, index: int, tokens_NLD: Tensor) -> Tensor:
        return self.replaced(tokens_NLD, self.deep[index - 1]) if 1 <= index <= len(self.deep) else tokens_NLD
