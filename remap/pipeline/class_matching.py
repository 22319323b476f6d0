"""Match a teacher's own classes with those of the data: by name, or by a file that says which is which."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remap.backbones.build import PREPARE, Backbone
from remap.backbones.typed import as_timm
from remap.errors import BackboneError
from remap.io.checked_json import read_json
from remap.io.paths import expanded
from remap.recipe.strict_yaml import read_mapping

# Class names that a message shows of each list.
_SHOWN = 8
_DO = f"say which is which: --set teacher.classes=FILE (YAML: our class: its class, or a list), or {PREPARE}"


class GroupedClassifier(nn.Linear):
    """A classifier whose outputs are groups of another's: the logit of a group is the log of its summed exponentials.

    The softmax of a group is then the sum of its members' softmax values, apart from what no group has.
    """

    def __init__(self, classifier: nn.Linear, groups: Sequence[Sequence[int]]) -> None:
        # Rows of one group lie side by side, so that ``forward`` can split the logits by the sizes of the groups.
        rows = [row for group in groups for row in group]
        super().__init__(classifier.in_features, len(rows), classifier.bias is not None)
        self.sizes = tuple(map(len, groups))
        with torch.no_grad():
            self.weight.copy_(classifier.weight[rows])
            if classifier.bias is not None:
                self.bias.copy_(classifier.bias[rows])

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of the groups, (..., C)."""
        members = super().forward(features).split(self.sizes, dim=-1)
        return torch.stack([group.logsumexp(dim=-1) for group in members], dim=-1)  # large logits do not overflow

    # Part of the fingerprint of cached outputs: other groups give other logits.
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sizes={self.sizes}"


def match_classes(backbone: Backbone, classes: Sequence[str], file: str | None) -> str:
    """Order, choose or sum the outputs of a backbone's own classifier so that they are those of the data.

    Args:
        backbone: With the classifier that came with its weights; changed in place.
        classes: Of the data, in its order.
        file: YAML or JSON that maps each class of the data to one of the teacher's (by name, or by number from 0), or
            to a list of them, whose probabilities add up; None for the names alone.

    Returns:
        A sentence on what was matched with what.

    Raises:
        BackboneError: The classes cannot be matched; shows both lists.
    """
    outputs = int(as_timm(backbone.model).num_classes)
    names = backbone.labels
    if file is not None:
        groups = _of_file(backbone, classes, file, outputs)
    elif names:
        groups = [(row,) for row in _by_name(backbone, classes)]
    elif sorted(classes) == sorted(map(str, range(outputs))):  # "10" comes before "2" here
        groups = [(int(name),) for name in classes]
    elif outputs == len(classes):
        # Nothing tells whether the order is right, and a wrong one teaches wrong classes: the assumption is reported.
        return (
            f"the outputs of {backbone.identity.model} have no names: they are taken in the order of the classes here"
            f" ({_some(classes)}); teacher.classes=FILE says otherwise"
        )
    else:
        raise BackboneError(
            f"the classifier of {backbone.identity.model} has {outputs:,} outputs without names, the data has"
            f" {len(classes):,} classes",
            given=_some(classes),
            do=_DO,
        )
    if any(outputs <= row for group in groups for row in group):
        raise BackboneError(f"teacher.classes names an output above {outputs - 1:,}", given=file, do=_DO)
    _take(backbone, groups)
    how = f"by {file}" if file is not None else "by name" if names else "by number"
    return f"the teacher's {outputs:,} classes are matched with the {len(classes):,} of the data {how}"


def _by_name(backbone: Backbone, classes: Sequence[str]) -> list[int]:
    index = _index(backbone.labels)
    found = [index.get(_plain(name), []) for name in classes]
    missing = [name for name, rows in zip(classes, found, strict=True) if not rows]
    several = [name for name, rows in zip(classes, found, strict=True) if len(rows) > 1]
    if missing or several:
        raise _mismatch(backbone, classes, missing or several, "has no" if missing else "has several called")
    return [rows[0] for rows in found]


def _of_file(backbone: Backbone, classes: Sequence[str], file: str, outputs: int) -> list[tuple[int, ...]]:
    path = expanded(file)
    try:
        values: Any = read_json(path) if path.suffix == ".json" else read_mapping(path)
    except ValueError as error:
        raise BackboneError(f"cannot read teacher.classes {path}: {error}") from error
    ours = {_plain(str(key)): value for key, value in values.items()} if isinstance(values, dict) else {}
    # 0 is the number of an output; an empty text, an empty list and null name none.
    missing = [name for name in classes if not ours.get(_plain(name)) and ours.get(_plain(name)) != 0]
    if missing:
        raise BackboneError(f"{file} does not say what {_some(missing)} is for the teacher", given=_some(list(ours)))
    index = _index(backbone.labels)
    groups = []
    for name in classes:
        wanted = ours[_plain(name)]
        rows: list[int] = []
        for one in wanted if isinstance(wanted, list) else [wanted]:
            # By ``type``: YAML's true is an int too, and no number of an output.
            found = [one] if type(one) is int and 0 <= one < outputs else index.get(_plain(str(one)), [])
            if len(found) != 1:
                raise _mismatch(backbone, classes, [str(one)], "has several called" if found else "has no")
            rows += found
        groups.append(tuple(dict.fromkeys(rows)))  # a class named twice adds up once
    return groups


def _take(backbone: Backbone, groups: Sequence[Sequence[int]]) -> None:
    """Put in classifiers with these outputs; several of one group need a linear one of its own."""
    model, paths = backbone.model, backbone.anatomy.classifier_heads
    grouped = any(len(group) > 1 for group in groups)
    rows = [row for group in groups for row in group]
    for path in paths:
        head = model.get_submodule(path)
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise BackboneError(f"the classifier of {backbone.identity.model} is not one layer", do=PREPARE)
        if grouped and (len(paths) > 1 or not isinstance(head, nn.Linear)):
            raise BackboneError(
                f"several classes of {backbone.identity.model} cannot be one: its classifier is not one linear layer",
                do="name one class for each of ours, or " + PREPARE,
            )
        if grouped:
            assert isinstance(head, nn.Linear)
            model.set_submodule(path, GroupedClassifier(head, groups))
            continue
        head.weight = nn.Parameter(head.weight.detach()[rows].clone())
        if head.bias is not None:
            head.bias = nn.Parameter(head.bias.detach()[rows].clone())
        setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(rows))
    model.num_classes = len(groups)  # type: ignore[assignment]  # a plain attribute of timm's models


def _index(names: Sequence[str]) -> dict[str, list[int]]:
    """Return outputs by name; a complete name counts before one of several synonyms."""
    complete, parts = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for row, name in enumerate(names):
        complete[_plain(name)].append(row)
        for part in {_plain(part) for part in name.split(",")} - {_plain(name)}:
            parts[part].append(row)
    return {**parts, **complete}


def _plain(name: str) -> str:
    """Return a name without differences of case, spaces, underscores, hyphens and Unicode form."""
    # NFC: macOS may store the names of folders decomposed, files of labels are mostly composed.
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())


def _mismatch(backbone: Backbone, classes: Sequence[str], wrong: Sequence[str], what: str) -> BackboneError:
    return BackboneError(
        f"the names of the classes differ: the classifier of {backbone.identity.model} {what} {_some(wrong)}",
        given=f"data: {_some(classes)}; teacher: {_some(backbone.labels) or 'no names (label_names)'}",
        do=_DO,
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(name[:40] for name in names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
