"""Build any timm network as a feature extractor, such as the side network of side-tuning."""

import timm
import torch
from torch import nn

from remap.backbones.build import require_at_hand
from remap.backbones.loading import create
from remap.backbones.names import resolve_name
from remap.errors import BackboneError, UnknownName
from remap.registry import did_you_mean


def side_network(word: str, weights: str, image_size: tuple[int, int], channels: int) -> tuple[nn.Module, int]:
    """Build a network without classifier, on the CPU; return it and the width F of its features (B, F).

    Args:
        word: Any name of timm, convolutional ones included; not only the families that can be backbones.
        weights: "pretrained", "none" or a file.
        image_size: Height and width of the images it will see.
        channels: Of these images; timm adapts weights that were made for others.

    Raises:
        UnknownName: timm has no such model.
        WeightsError: The weights cannot be had or do not fit.
        BackboneError: The network cannot be built, or gives no feature vector for images of this size.
    """
    if ":" not in word and not timm.is_model(word.partition(".")[0]):
        raise UnknownName(
            f"timm has no network '{word}'{did_you_mean(word.partition('.')[0], timm.list_models())}",
            allowed="any name of timm; small networks are lcnet_*, mobilenetv3_*, efficientnet_lite*, resnet18",
            do="lcnet_075 is the default",
        )
    require_at_hand(word, weights)
    name = resolve_name(word)
    network = create(name, weights, {"num_classes": 0, "in_chans": channels}).model
    try:
        with torch.no_grad():
            features = network.eval()(torch.zeros(1, channels, *image_size))
        width = features.shape[1]
        assert features.shape == (1, width)
    except Exception as error:  # networks of timm refuse a size in many ways
        raise BackboneError(
            f"'{word}' gives no feature vector for images of {image_size[0]} x {image_size[1]} pixels",
            given=" ".join(str(error).split())[:200] or type(error).__name__,
            do="convolutional networks such as lcnet_075 take any size",
        ) from error
    return network, width
