"""Features of class texts on disk: each text of a vision-language model is encoded once.

<root>/<24 hex of the key>.safetensors      features (C, E)

The key is the text tower's tensors, the texts' tokens and the kind of device. Deleting the folder costs time alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from remap.backbones.build import add_tensors
from remap.io.atomic_write import replace_file
from remap.io.own_files import make_own_folder, read_own
from remap.language.pair import Language

# Of 100,000 classes and 1,024 dimensions.
MOST_BYTES = 2**29
_NAME = "features_CE"


def class_features(
    language: Language, texts: Sequence[Sequence[str]], root: Path, done: Callable[[int], None] = lambda _count: None
) -> Tensor:
    """Return what ``Language.class_features`` does, from the disk where it is known; equal bit for bit.

    A cache saves time: where it cannot be read or written, features are computed.
    """
    path = root / f"{_key(language, texts)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        features_CE = load(read_own(path, MOST_BYTES))[_NAME]
        if features_CE.shape[0] == len(texts) and bool(features_CE.isfinite().all()):
            return features_CE
    features_CE = language.class_features(texts, done)
    with suppress(OSError):
        make_own_folder(root)
        replace_file(path, save({_NAME: features_CE.contiguous()}))
    return features_CE


def _key(language: Language, texts: Sequence[Sequence[str]]) -> str:
    """Return the hash of all that decides the features."""
    sizes, device = [len(several) for several in texts], next(language.tower.parameters()).device.type
    digest = hashlib.sha256(repr((language.side, sizes, device)).encode())
    add_tensors(digest, language.tower.state_dict())
    add_tensors(digest, {"ids": language.tokenizer([text for several in texts for text in several])})
    return digest.hexdigest()[:24]
