"""Names of a classifier's outputs: those its weights bring, or ImageNet's where their number says so."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset


def label_names(config: Mapping[str, Any], given: Sequence[str], outputs: int) -> tuple[tuple[str, ...], str | None]:
    """Return the names of the outputs, and a note where they are an assumption; no names where nothing tells.

    A name may hold synonyms, separated by commas.

    Args:
        config: timm's pretrained_cfg of the model.
        given: Names that the weights or their folder bring.
    """
    if len(given) == outputs:
        return tuple(given), None
    names, more = config.get("label_names") or (), config.get("label_descriptions") or {}
    if len(names) == outputs:
        return tuple(f"{name}, {more[name]}" if name in more else str(name) for name in names), None
    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset is None or not outputs:
        return (), None
    info = ImageNetInfo(subset)
    named = tuple(f"{synset}, {info.label_name_to_description(synset)}" for synset in info.label_names())
    return named, f"its {outputs:,} outputs are taken for the classes of {subset}"
