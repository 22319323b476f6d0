"""A layout: how one library names the tensors of a model, as a table of patterns that become timm's names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remap.errors import WeightsError

Tensors = dict[str, Tensor]
Rules = tuple[tuple[str, str | None], ...]


def expression(pattern: str) -> str:
    """Return a regular expression for keys: ``@`` is a number, ``*`` weight or bias, and ``~`` anything."""
    words: dict[str, str | int | None] = {".": r"\.", "@": r"(\d+)", "*": "(?P<kind>weight|bias)", "~": ".+"}
    return pattern.translate(str.maketrans(words))


def rules(*rows: tuple[str, str | None]) -> Rules:
    """Return rows as regular expressions; in a name, ``$`` is what ``*`` was."""
    return tuple((expression(key), None if name is None else name.replace("$", r"\g<kind>")) for key, name in rows)


@dataclass(frozen=True)
class Layout:
    """One library's names of one kind of model.

    Attributes:
        name: As messages call it.
        mark: Key that no other layout has, as ``expression`` reads it.
        rules: (expression, name in timm); the first that matches a complete key counts. A name that ends in ``#0``,
            ``#1`` ... is a part of one tensor: parts are joined along the first axis. None leaves a key out.
        finish: What is not a matter of names, given and returning timm's tensors.
        overlay: Entries of timm's pretrained_cfg that hold for these weights whatever model is named.
    """

    name: str
    mark: str
    rules: Rules
    finish: Callable[[Tensors], Tensors] = lambda tensors: tensors
    overlay: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, tensors: Tensors) -> bool:
        """Return whether these tensors are named so."""
        return any(re.fullmatch(expression(self.mark), key) for key in tensors)

    def convert(self, tensors: Tensors) -> Tensors:
        """Return the tensors under timm's names.

        Raises:
            WeightsError: A tensor is one that no rule knows, or has a shape that its rule cannot take.
        """
        found: Tensors = {}
        for key, tensor in tensors.items():
            name = self._name(key)
            if name is not None:
                found[name] = tensor
        try:
            return self.finish(_joined(found))
        except (RuntimeError, IndexError, KeyError) as error:
            raise WeightsError(f"the tensors do not have the shapes of {self.name}", given=str(error)[:200]) from error

    def _name(self, key: str) -> str | None:
        for pattern, name in self.rules:
            match = re.fullmatch(pattern, key)
            if match:
                return match.expand(name) if name is not None else None
        raise WeightsError(
            f"a tensor that {self.name} does not have",
            given=key[:100],
            do="name the model by its timm architecture and give the weights under timm's names",
        )


@dataclass(frozen=True)
class Described:
    """What a configuration says of a model, in timm's words.

    Attributes:
        architecture: Name of timm.
        arguments: Of timm's constructor.
        config: Entries of timm's pretrained_cfg: input, normalisation, classes.
        labels: Names of the classifier's outputs; empty where it does not say.
        eps: Of normalisation layers that differ from timm's, by the start of their path.
        library: Whose configuration it is.
        notes: What a user should know.
    """

    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    eps: Mapping[str, float] = field(default_factory=dict)
    library: str = "timm"
    notes: tuple[str, ...] = ()


def _joined(tensors: Tensors) -> Tensors:
    """Join parts; of a bias of queries, keys and values without keys, timm has two tensors of their own."""
    whole = {name: tensor for name, tensor in tensors.items() if "#" not in name}
    parts: dict[str, dict[int, Tensor]] = {}
    for name in tensors.keys() - whole.keys():
        stem, _, number = name.partition("#")
        parts.setdefault(stem, {})[int(number)] = tensors[name]
    for stem, found in parts.items():
        if stem.endswith(".qkv.bias") and sorted(found) == [0, 2]:
            path = stem.removesuffix("qkv.bias")
            whole |= {f"{path}q_bias": found[0], f"{path}v_bias": found[2]}
        else:
            whole[stem] = torch.cat([found[number] for number in sorted(found)])
    return whole
