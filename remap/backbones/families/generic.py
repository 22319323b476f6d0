"""Any other network of timm, read through timm's own interface and by watching one forward pass.

Letters: B batch, D channels of a stage, h and w its rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families.base import Family
from remap.backbones.families.reading import configured_image_size
from remap.backbones.families.stages import stage_blocks
from remap.backbones.families.watching import Layer, deepest, unfit_size, watched
from remap.backbones.projected_head import ProjectedHead
from remap.backbones.typed import as_timm
from remap.errors import BackboneError


class Generic(Family[nn.Module]):
    """Any network with timm's ``forward_intermediates``; its blocks are the stages whose outputs that returns.

    What cannot be read from timm's interface is measured: one image of the meta device goes through, which computes
    nothing. Layers whose call is not seen there, and all that are more than a product with a matrix, count as not
    called: methods then change their weights, which works however a network reads them.
    """

    name = "generic"
    no_attention = "it has no attention over the whole image, or none that is known exactly"

    def matches(self, model: nn.Module) -> bool:
        return all(callable(getattr(model, name, None)) for name in ("forward_intermediates", "get_classifier"))

    def read(self, model: nn.Module) -> Anatomy:
        image = configured_image_size(model)
        heads, averaged = _classifiers(model)
        seen = watched(model, heads, image)
        blocks = stage_blocks(model, heads, seen)
        return Anatomy(
            family=self.name,
            width=(seen.features[0] if averaged else sum(seen.features)) or as_timm(model).num_features,
            depth=len(blocks),
            image_size=image,
            patch_size=(round(image[0] / blocks[0].grid[0]), round(image[1] / blocks[0].grid[1])),
            grid=blocks[-1].grid,
            input_module=deepest(seen.takes_image),
            embedding_norms=(),
            final_norm=None,
            classifier_heads=tuple(heads),
            averaged_heads=averaged,
            blocks=blocks,
        )

    def size_arguments(self, model: nn.Module, anatomy: Anatomy, image_size: int) -> dict[str, Any]:
        # Some architectures are built for a size, some take any, and a few accept the argument and ignore it.
        architecture, problem = as_timm(model).pretrained_cfg["architecture"], ""
        candidates: list[dict[str, Any]] = [{"img_size": image_size}, {}]
        for arguments in candidates:
            try:
                with torch.device("meta"):
                    other = timm.create_model(architecture, pretrained=False, **arguments)
                self.require_size(other, anatomy, (image_size, image_size))
            except (TypeError, BackboneError) as error:
                problem = problem or ("" if isinstance(error, TypeError) else str(error.given or error.what))
                continue
            return arguments
        raise unfit_size(architecture, (image_size, image_size), problem)

    def require_size(self, model: nn.Module, anatomy: Anatomy, size: tuple[int, int]) -> None:
        watched(model, _classifiers(model)[0], size)

    def rest_of_forward(self, model: nn.Module, index: int, x: Tensor) -> Tensor:
        raise NotImplementedError("a network that is read by its stages cannot be entered at one")

    def stage_outputs(self, model: nn.Module, images_BCHW: Tensor, stages: Sequence[int]) -> tuple[Any, list[Tensor]]:
        interface: Any = model
        # Hiera stops behind the last of these stages unless it is told not to, and has no features for a classifier.
        return interface.forward_intermediates(images_BCHW, indices=list(stages), output_fmt="NCHW", stop_early=False)


def _classifiers(model: nn.Module) -> tuple[list[str], bool]:
    """Return the paths of the classifiers, and whether the logits are their mean over features of one width.

    timm averages the two classifiers of distilled models. Lists of classifiers, one for every branch or stage, read
    features of their own and may be weighted.

    Raises:
        BackboneError: There is none, and none can be made.
    """
    found: Any = model.get_classifier()  # type: ignore[operator] # see matches
    tops = list(found) if isinstance(found, (tuple, list)) else [found]
    if not all(isinstance(top, nn.Module) for top in tops) or not hasattr(model, "reset_classifier"):
        raise BackboneError(
            f"{type(model).__name__} is a network without a classifier, and timm cannot give it one",
            do="choose another network; `remap models WORD` lists them",
        )
    lists = any(isinstance(top, nn.ModuleList) for top in tops)
    modules = [m for top in tops for part in (top if isinstance(top, nn.ModuleList) else (top,)) for m in _layers(part)]
    paths = {id(module): path for path, module in model.named_modules()}
    heads = [paths[id(module)] for module in modules]
    named = as_timm(model).pretrained_cfg.get("classifier") or ()
    # A classifier of the tokens next to that of the pooled features (VOLO) is in the configuration alone.
    beside = [path for path in ((named,) if isinstance(named, str) else named) if path in paths.values()]
    beside = [path for path in beside if not f"{path}.".startswith(tuple(f"{head}." for head in heads))]
    return [*heads, *beside], not lists and not beside


def _layers(classifier: nn.Module) -> list[nn.Module]:
    """Return the layers of a classifier that is a pooling or a norm and such layers; else, and if it has none, itself.

    A hidden layer begins anew with the classifier, and is a part of it. Behind a projection it stands as a whole.
    """
    layers = [module for module in classifier.modules() if isinstance(module, Layer)]
    one_size = len({layer.weight.shape[0] for layer in layers}) == 1
    return [*layers] if one_size and not isinstance(classifier, ProjectedHead) else [classifier]
