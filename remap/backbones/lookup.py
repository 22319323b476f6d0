"""Look a model's name up in timm, the table of families and model folders, without building the model."""

import os
from pathlib import Path

import timm

from remap.backbones import mini  # noqa: F401 - registers the embedded pair with timm
from remap.backbones.families import FAMILIES
from remap.backbones.model_source import CONFIGS, describe
from remap.backbones.names import SHORT_NAMES, resolve_name
from remap.errors import UnknownName, WeightsError
from remap.io.checked_json import read_json
from remap.io.names import plain
from remap.io.paths import expanded
from remap.registry import did_you_mean


def require_known(word: str, name: str) -> None:
    """Find a mistake in a model's name.

    Args:
        word: As it was given.
        name: What it resolves to.

    Raises:
        UnknownName: timm has no such model, or no weights with this tag.
        WeightsError: A ``local-dir:`` folder is not a model folder.
    """
    if ":" in name or "/" in name or os.sep in name:
        if not name.startswith(("local-dir:", "hf-hub:", "hf_hub:")):
            raise UnknownName(
                f"no such model or run directory: {word}",
                allowed="a timm name, short name, local-dir:FOLDER, hf-hub:NAME, clip:NAME, a file or a run directory",
            )
        folder = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not any((folder / config).is_file() for config in CONFIGS):
            if not folder.exists():
                do = "check the path; a run needs the folder that its student was tuned on where it was"
                raise WeightsError(f"there is no folder {plain(str(folder))}", given=plain(word), do=do)
            raise WeightsError(
                f"{folder} is not a model folder of timm, transformers or open_clip",
                given="config.json is missing",
                do="see timm's save_for_hf, or docs/weights.md",
            )
        return
    if not timm.is_model(name):
        if os.path.lexists(expanded(word)):
            raise UnknownName(
                f"unknown model '{word}'",
                given="a folder without recipe.yaml" if os.path.isdir(expanded(word)) else "a file",
                do="name a folder of timm, transformers or open_clip as local-dir:FOLDER, a file of weights"
                " (docs/weights.md), or a run directory",
            )
        if word in ("self", "ema"):
            raise UnknownName(f"'{word}' is made of the student, and can only be its teacher", do="name a student")
        known = [*SHORT_NAMES, *timm.list_models()]
        raise UnknownName(
            f"unknown model '{word}'{did_you_mean(word.partition('.')[0], known)}",
            allowed=f"{', '.join(SHORT_NAMES)}, or a name of timm (timm.list_models('vit*'))",
            do="`remap models` lists them",
        )
    tag = name.partition(".")[2]
    tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0] + "*")]
    if tag and tag not in tags:
        raise UnknownName(f"model '{name.partition('.')[0]}' has no weights tagged '{tag}'", allowed=tags)


def family_of_name(word: str) -> str | None:
    """Return the family of a model, or None where the name does not tell.

    A few unusual variants in the module of a family are read by the last one instead, as building them shows.

    Args:
        word: A short name, a timm name or tag, or a ``local-dir:`` folder.
    """
    name = resolve_name(word)
    if name.startswith("local-dir:"):
        name = _architecture(expanded(name.removeprefix("local-dir:")))
    elif ":" in name:
        name = name.rpartition("/")[2]  # repositories of timm are called after their model
    if not timm.is_model(name):
        return None
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return next((row.name for row in FAMILIES if module in row.modules), FAMILIES.names[-1])


def _architecture(folder: Path) -> str:
    try:
        found = describe(f"local-dir:{folder}").architecture
        return found if ":" not in found else str(read_json(folder / CONFIGS[0]).get("architecture", ""))
    except (WeightsError, ValueError, AttributeError):
        return ""  # building it will say what is wrong
