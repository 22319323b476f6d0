"""Which family a model belongs to, told from its name without building it."""

from pathlib import Path

import timm

from remap.backbones import mini  # noqa: F401 - registers the embedded pair with timm
from remap.backbones.build import resolve_name
from remap.io.checked_read import expanded, read_json

# The modules of timm that the families read, and the embedded pair's. A few unusual variants in them are refused when
# they are built.
_MODULES = {
    "vision_transformer": "vit",
    "vision_transformer_hybrid": "vit",
    "deit": "vit",
    "mini": "vit",
    "eva": "eva",
    "beit": "beit",
    "swin_transformer": "swin",
    "convnext": "convnext",
    "resnet": "resnet",
}


def family_of_name(word: str) -> str | None:
    """The family of a short name, a timm name or tag, or a ``local-dir:`` folder; None where the name does not tell."""
    name = resolve_name(word)
    if name.startswith("local-dir:"):
        name = _architecture(expanded(name.removeprefix("local-dir:")))
    elif ":" in name:
        name = name.rpartition("/")[2]  # repositories of timm are called after their model
    if not timm.is_model(name):
        return None
    return _MODULES.get(timm.models.model_entrypoint(name).__module__.rpartition(".")[2])


def _architecture(folder: Path) -> str:
    try:
        return str(read_json(folder / "config.json").get("architecture", ""))
    except (ValueError, AttributeError):
        return ""  # whoever builds it says what is wrong
