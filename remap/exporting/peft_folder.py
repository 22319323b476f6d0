"""``--to peft``: an adapter folder of Hugging Face PEFT, for methods that PEFT has too; the classifier is in it."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import module_at
from remap.backbones.model_folder import is_known_to_timm, opened_by_timm, registering_module
from remap.backbones.names import is_weights_file
from remap.backbones.projected_head import HEAD_OF_A_PAIR, projected_head
from remap.backbones.typed import M
from remap.errors import RunError
from remap.exporting import FORMATS, snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.task_source import TaskSource
from remap.exporting.timm_folder import answer_of
from remap.io.atomic_write import readable_as
from remap.network import Network
from remap.runs.task import open_backbone
from remap.tuning import METHODS
from remap.tuning.layers import layers_of
from remap.tuning.parameter.hira import ElementwiseProduct
from remap.tuning.parameter.lora import LowRank
from remap.tuning.parameter.peft_rows import PeftEntry, PeftLayer
from remap.tuning.weights import registered

# The tensors of one layer of PEFT, by the names that PEFT gives them.
State = dict[str, Tensor]


class PeftFolder(Format):
    """adapter_config.json and adapter_model.safetensors, for ``PeftModel.from_pretrained(timm model, FOLDER)``."""

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        network = source.network()
        config: Any
        of_network = OWN.get(source.meta.method.name)
        config, states = of_network(network) if of_network else _of_row(source, network)
        config.modules_to_save = list(network.anatomy.classifier_heads)
        model: Any = peft.get_peft_model(_base(source), config)
        model.peft_config["default"].base_model_name_or_path = source.meta.backbone.model  # peft takes timm's: None
        layers = model.base_model.model
        with torch.no_grad():
            for path, state in states.items():
                _put(layers.get_submodule(path), state)
            for path in network.anatomy.classifier_heads:
                saved = layers.get_submodule(path).modules_to_save["default"]
                saved.load_state_dict(network.model.get_submodule(path).state_dict())
        model.save_pretrained(str(folder), save_embedding_layers=False)
        readable_as(folder / "adapter_config.json", folder / "adapter_model.safetensors")
        return {}

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        return answer_of(source, peft.PeftModel.from_pretrained(_base(source), str(folder)).eval())

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        arguments, above = _arguments_of_timm(source), ""
        if not _opens_with(source, arguments):
            return ""  # by remap alone: Python for the card would answer from other weights
        if (overlay := arguments.get("pretrained_cfg_overlay")) is not None:
            name = Path(overlay["file"]).name
            arguments["pretrained_cfg_overlay"] = {**overlay, "file": name}
            above = f"# Put {name}, the base model's weights, into this folder: the table names its SHA-256.\n"
        if not is_known_to_timm(source.tuned.model):
            above += f"import {registering_module(source.tuned.model)}  # timm itself does not have the base model\n"
        return snippets.peft_adapter(source, arguments, above)


def _base(source: TaskSource) -> nn.Module:
    """Return the backbone as it was before tuning, with a new classifier.

    Raises:
        RunError: Its weights are in the task alone, so no name leads to them; or timm does not build it.
    """
    spec = source.meta.backbone
    if projected_head(source.tuned.model) is not None:
        what = "an adapter of PEFT is put on a model of timm, and this is the image tower of a vision-language model"
        raise source.refusal(what, f"{spec.model}: {HEAD_OF_A_PAIR}")
    if spec.weights == "none":
        raise RunError("an adapter of PEFT names its base model, and this one's weights were random", given=spec.model)
    return open_backbone(spec.to_open(), len(source.meta.classes)).model.eval()


def _arguments_of_timm(source: TaskSource) -> dict[str, Any]:
    """Return with which arguments timm may open the base model as remap does."""
    spec = source.meta.backbone
    arguments: dict[str, Any] = {"pretrained": True, "num_classes": len(source.meta.classes)}
    if spec.image_size is not None:
        arguments["img_size"] = spec.image_size
    if is_weights_file(spec.weights):
        # An empty source keeps timm from preferring what it finds in a folder or on the hub.
        arguments["pretrained_cfg_overlay"] = {"file": spec.weights, "source": "", "custom_load": False}
    return arguments


def _opens_with(source: TaskSource, arguments: dict[str, Any]) -> bool:
    """Return whether timm opens the same base model: of files it reads fewer layouts."""
    model, heads = opened_by_timm(source.meta.backbone.model, arguments), tuple(source.tuned.anatomy.classifier_heads)
    theirs = {} if model is None else model.state_dict()
    ours = {name: tensor for name, tensor in _base(source).state_dict().items() if not name.startswith(heads)}
    return all(name in theirs and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _put(layer: nn.Module, state: State) -> None:
    own: State = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name, tensor in state.items():
        own[name].copy_(tensor.view_as(own[name]))


def _of_lora(network: Network) -> tuple[peft.PeftConfig, dict[str, State]]:
    """Return remap's LoRA in PEFT's terms: the ranks of the projections that one layer makes stand side by side."""
    changes = _changes(network, "remap_lora", LowRank)
    ranks = {path: len(change.down) for path, change in changes.items()}
    config = peft.LoraConfig(
        target_modules=list(changes),
        r=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern={path: change.scale * ranks[path] for path, change in changes.items()},
    )
    states = {
        path: {"lora_A.default.weight": change.down, "lora_B.default.weight": change.up_rows().T / change.scale}
        for path, change in changes.items()
    }
    return config, states


def _of_hira(network: Network) -> tuple[peft.PeftConfig, dict[str, State]]:
    """Return remap's HiRA in PEFT's terms; its tensors have PEFT's names."""
    changes = _changes(network, "remap_hira", ElementwiseProduct)
    rank = len(next(iter(changes.values())).hira_A["default"])
    config = peft.HiraConfig(target_modules=list(changes), r=rank)
    return config, {path: change.state_dict() for path, change in changes.items()}


def _changes(network: Network, name: str, kind: type[M]) -> dict[str, M]:
    """Return the modules that a method inserted under this name, by the path of the layer that each changes."""
    return {
        path.removesuffix(f".{name}"): module
        for path, module in network.model.named_modules()
        if isinstance(module, kind) and path.endswith(f".{name}")
    }


def _of_row(source: TaskSource, network: Network) -> tuple[peft.PeftConfig, dict[str, State]]:
    """Return what a method of ``peft_rows.py`` holds, layer by layer.

    Raises:
        RunError: PEFT does not have the method.
    """
    spec = source.meta.method
    row = METHODS.row(spec.name) if "+" not in spec.name else None
    if not isinstance(row, PeftEntry):
        others = [one.name for one in FORMATS if one.name != "peft" and (source.mergeable or not one.folded)]
        raise RunError(f"{spec.name} is not a method of PEFT", allowed=f"--to {', '.join(others[:4])}")
    kind = row.load()
    method = kind(kind.Config(**spec.options))
    layers = {}
    for layer in layers_of(network.anatomy, method.config.targets, row.default_targets):
        outputs, inputs = registered(module_at(network.model, layer.path), "weight").shape[:2]
        layers[layer.path] = PeftLayer(layer.words, outputs, inputs)
    name = f"remap_{row.name}"
    common = network.model.get_submodule(name).state_dict() if row.shared else {}
    states = {path: {**network.model.get_submodule(f"{path}.{name}").state_dict(), **common} for path in layers}
    return method.peft_config(layers), states


# Methods of PEFT that remap has written itself.
OWN = {"lora": _of_lora, "hira": _of_hira}
