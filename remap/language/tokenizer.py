"""Texts to token ids: tokenizer.json of the tokenizers library, or CLIP's byte pairs, which open_clip brings."""

import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remap.errors import WeightsError
from remap.io.checked_json import read_json
from remap.io.checked_read import read_regular
from remap.io.names import plain
from remap.io.versions import install_command
from remap.language.configs import CLIP_VOCABULARY, TextSide

# SigLIP 2's has 34 MB, for 256,000 tokens.
MOST_TOKENIZER_BYTES = 2**27
FILE, OPTIONS = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """Texts to ids (N, L), cut to the context and filled up to it.

    Args:
        folder: Of the model: tokenizer.json, and tokenizer_config.json for the token that fills up.

    Raises:
        WeightsError: There is no tokenizer.
    """

    def __init__(self, folder: Path, side: TextSide) -> None:
        self.side, self.context = side, side.config.context
        self.path = path = folder / FILE
        self._clip: Any = None
        if not path.is_file():
            self._clip = _clips_own(folder, side)
            return
        from tokenizers import Tokenizer as Library

        with _readable(path):
            self._library = Library.from_str(read_regular(path, MOST_TOKENIZER_BYTES).decode())
            self._library.no_padding()
            self._library.enable_truncation(self.context)
        self.pad = 0 if side.pads_with_zero else self._special(folder, "pad_token", 0)
        # CLIPA's text towers have never seen BERT's separator.
        self.sep = self._special(folder, "sep_token", "[SEP]") if side.strips_sep else None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (N, L), int64.

        Raises:
            WeightsError: The text tower lacks one of the tokens or positions, or the file's rules break on a text.
        """
        cleaned = [clean(text, self.side.clean) for text in texts]
        if self._clip is not None:
            return self._clip(cleaned, self.context)
        ids_NL = torch.full((len(texts), self.context), self.pad)
        with _readable(self.path):
            rows = [found.ids for found in self._library.encode_batch(cleaned)]
        if (longest := max(map(len, rows), default=0)) > self.context:
            given = f"{longest} tokens, and a context of {self.context}"
            raise WeightsError("the tokenizer is that of another text tower", given=given)
        for row_L, found in zip(ids_NL, rows, strict=True):
            row_L[: len(found)] = torch.tensor(found)
        if self.sep is not None:
            ids_NL[ids_NL == self.sep] = 0
        if len(texts) and not 0 <= (most := int(ids_NL.max())) < self.side.config.vocab:
            given = f"token {most:,}, and embeddings of {self.side.config.vocab:,}"
            raise WeightsError("the tokenizer is that of another text tower", given=given)
        return ids_NL

    def _special(self, folder: Path, key: str, default: int | str) -> int:
        """Return the id of a token that tokenizer_config.json names."""
        word = tokenizer_options(folder).get(key)
        word = word.get("content") if isinstance(word, dict) else word
        if not isinstance(word, str):
            if isinstance(default, int):
                return default
            word = default
        found = self._library.token_to_id(word)
        if found is None:
            raise WeightsError(f"{folder / FILE} has no token {plain(word)[:40]}, the {key} of {OPTIONS}")
        return int(found)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of a library in Rust into one: the file may come from anybody, and a panic is not an ``Exception``.

    Raises:
        WeightsError: There was an error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise WeightsError(f"cannot read {path}: {plain(str(error))[:200]}") from error


def tokenizer_options(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; empty where there is none.

    Raises:
        WeightsError: It is not a mapping.
    """
    path = folder / OPTIONS
    if not path.is_file():
        return {}
    try:
        values = read_json(path, MOST_TOKENIZER_BYTES)
    except ValueError as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"cannot read {path}: it is not a mapping")
    return values


def clean(text: str, how: str) -> str:
    """Return a text with single spaces, as open_clip's function of this name cleans it."""
    if how == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


def _clips_own(folder: Path, side: TextSide) -> Any:
    if side.config.vocab != CLIP_VOCABULARY:
        raise WeightsError(f"{folder} has no {FILE}", do="copy the tokenizer's files beside the weights")
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        do = f"{install_command('clip')}, or copy tokenizer.json beside the weights"
        raise WeightsError(f"{folder} has no {FILE}, and open_clip is not installed", do=do) from error
    return SimpleTokenizer(context_length=side.config.context)
