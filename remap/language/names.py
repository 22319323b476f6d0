"""Where a vision-language model is: ``clip:NAME``, and the folder of its files."""

import os
from pathlib import Path

from remap.backbones.hub import out_of_reach
from remap.backbones.names import PAIR
from remap.errors import UnknownName, WeightsError
from remap.io.paths import expanded
from remap.io.versions import install_command
from remap.registry import did_you_mean

MINI = "clip:mini"
# Of the shipped pair.
MINI_FOLDER = Path(__file__).parent / "mini"
CONFIGS = ("open_clip_config.json", "config.json")
_WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
# No pickles, and no code.
_FILES = (*CONFIGS, *_WEIGHTS, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def pair_folder(word: str) -> Path:
    """Return the folder of a vision-language model; one of the hub is downloaded into the hub's own cache.

    Args:
        word: ``clip:mini``, ``clip:local-dir:FOLDER``, ``clip:OWNER/REPOSITORY`` of the hub, ``clip:NAME[.TAG]`` with
            a name and a tag of open_clip.

    Raises:
        UnknownName: open_clip has no such model or tag.
        WeightsError: The files are neither here nor to be had.
    """
    name = word.removeprefix(PAIR)
    if word == MINI:
        return _checked(MINI_FOLDER, word)
    if name.startswith("local-dir:"):
        return _checked(expanded(name.removeprefix("local-dir:")), word)
    if "/" not in name:
        return _snapshot(_repository(name), word)
    return _snapshot(name.removeprefix("hf-hub:"), word)


def _checked(folder: Path, word: str) -> Path:
    if not any((folder / config).is_file() for config in CONFIGS):
        raise WeightsError(
            f"{folder} is not a folder of a vision-language model",
            given=f"{word}; {' and '.join(CONFIGS)} are missing",
            do="name a folder of open_clip or transformers: its config, safetensors and tokenizer.json",
        )
    return folder


def _repository(name: str) -> str:
    """Return the repository of a model of open_clip."""
    try:
        import open_clip
    except ImportError as error:
        raise WeightsError(
            f"{PAIR}{name} is a name of open_clip, which is not installed",
            allowed=f"{MINI}, {PAIR}local-dir:FOLDER, {PAIR}OWNER/REPOSITORY",
            do=install_command("clip"),
        ) from error
    model, _, tag = name.partition(".")
    known = open_clip.list_models()
    if model not in known:
        raise UnknownName(
            f"unknown vision-language model '{PAIR}{name}'{did_you_mean(model, known)}",
            allowed=f"{MINI}, {PAIR}local-dir:FOLDER, {PAIR}OWNER/REPOSITORY, or a name of open_clip",
        )
    tags = {one: open_clip.get_pretrained_cfg(model, one) for one in open_clip.list_pretrained_tags_by_model(model)}
    hubs = {one: str(config["hf_hub"]) for one, config in tags.items() if config.get("hf_hub")}
    if not hubs or (tag and tag not in hubs):
        raise UnknownName(f"'{PAIR}{name}' has no weights on the hub", allowed=[f"{model}.{one}" for one in hubs])
    return "/".join(hubs[tag or next(iter(hubs))].split("/")[:2])


def _snapshot(repository: str, word: str) -> Path:
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            found = Path(snapshot_download(repository, allow_patterns=list(_FILES), local_files_only=offline))
        except Exception as error:  # no network, offline by setting, no such or a gated repository
            if not offline:
                raise out_of_reach(f"{PAIR}{repository}", error) from error
            continue
        if any(os.path.lexists(found / weights) for weights in _WEIGHTS):
            return _checked(found, word)
    raise WeightsError(
        f"{repository} has no weights in safetensors files", given=word, do="take another repository or tag"
    )
