"""Side-tuning (Zhang et al. 2020, arXiv 1912.13503): a small network beside the frozen one, blended by one scalar.

Letters: B batch, D width of the backbone's features, F of the side network's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.feature_network import side_network
from remap.backbones.typed import input_channels
from remap.errors import BackboneError
from remap.registry import MAY_BE_PATH
from remap.tuning.base import Attachment, Edits, Method, Options
from remap.tuning.finetuning.mlp import require_one_feature
from remap.tuning.seam import FeatureSeam


class SideTune(Method):
    """y = a * base(x) + (1 - a) * P side(x), a = sigmoid(alpha): side network + F*D + 1 parameters.

    x is the image as the backbone gets it. The side network trains whole, its batch statistics included; P has no
    bias; alpha starts at 0, so both halves count alike. The sum stands where the classifier reads; in distilled
    models both classifiers' features are blended with the same side features.
    """

    class Config(Options):
        side: Annotated[str, MAY_BE_PATH] = Field(
            default="lcnet_075", min_length=1, description="Name of the side network in timm."
        )
        side_weights: Annotated[str, MAY_BE_PATH] = Field(
            default="none", description='"none" (random), "pretrained" or a .safetensors file.'
        )

    config: Config

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Attachment:
        require_one_feature(anatomy, "sidetune")
        channels = input_channels(model)
        network, width = side_network(self.config.side, self.config.side_weights, anatomy.image_size, channels)
        like = next(model.parameters())
        edits = Edits(model)
        side = edits.insert("remap_sidetune", SideNetwork(network, width, anatomy.feature_width), like)
        edits.before(anatomy.input_module, side.keep_image)
        for path in anatomy.classifier_heads:
            last = path == anatomy.classifier_heads[-1]
            edits.before(path, partial(side.blend, last))
        return Attachment(edits, identity_at_init=False, seam=SideSeam(model, anatomy, side))


class SideNetwork(nn.Module):
    """Side network, projection and blend, with the hooks that bring the image in and the sum out."""

    def __init__(self, network: nn.Module, features: int, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.network = network
        self.proj = nn.Linear(features, width, bias=False)
        self.image_BCHW: Tensor | None = None
        self._side_BD: Tensor | None = None

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if self.training and len(image_BCHW) == 1:  # one image has no batch statistics: those of training so far
            self.network.eval()
            features_BF = self.network(image_BCHW)
            self.network.train()
        else:
            features_BF = self.network(image_BCHW)
        return self.proj(features_BF)

    def keep_image(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the module that takes the image."""
        self.image_BCHW, self._side_BD = args[0], None

    def blend(self, last: bool, head: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of a linear layer of the classifier; ``last`` says that no other one follows."""
        if self._side_BD is None:
            if self.image_BCHW is None:
                raise BackboneError("side-tuning has no image for these features", do="call forward_features first")
            self._side_BD = self(self.image_BCHW)
        side_BD = self._side_BD
        if last:
            self.image_BCHW = self._side_BD = None
        a = self.alpha.sigmoid()
        return (a * args[0] + (1 - a) * side_BD.view_as(args[0]), *args[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "image_BCHW": None, "_side_BD": None}


class SideSeam(FeatureSeam):
    """The backbone's features are kept; the side network reads the images."""

    reads_images = True

    def __init__(self, model: nn.Module, anatomy: Anatomy, side: SideNetwork) -> None:
        super().__init__(model, anatomy)
        self.side = side

    def stem(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        try:
            return super().stem(images_BCHW)
        finally:
            self.side.image_BCHW = None

    def rest(self, kept: Mapping[str, Tensor], images_BCHW: Tensor | None, *, whole_blocks: bool) -> Tensor:
        self.side.keep_image(self.side, (images_BCHW,))
        return super().rest(kept, images_BCHW, whole_blocks=whole_blocks)
