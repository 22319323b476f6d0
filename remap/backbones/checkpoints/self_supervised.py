"""The encoder in the official checkpoints of MAE and MoCo v3."""

from torch import Tensor

from remap.errors import WeightsError


def encoder_of(tensors: dict[str, Tensor], preset: str, where: str) -> dict[str, Tensor]:
    """Return the encoder of a self-supervised checkpoint, under timm's names and without what only pre-training needs.

    MAE (He et al. 2021, arXiv 2111.06377): decoder and mask token go, and the final norm too, because the classifier
    gets its own norm behind the pooling. MoCo v3 (Chen et al. 2021, arXiv 2104.02057): the encoder that was
    trained is taken in preference to its running average, as in the official evaluation; a checkpoint of that
    evaluation, which has neither prefix, is read too. Projector, predictor and linear head go.

    Raises:
        WeightsError: Nothing of an encoder is left.
    """
    dropped: tuple[str, ...]
    if preset == "mae":
        dropped, found = ("decoder", "mask_token", "norm.", "head."), tensors
    else:
        dropped = ("head.", "predictor.")
        prefixes = ("base_encoder.", "momentum_encoder.", "")
        bare = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
        prefix = next(prefix for prefix in prefixes if any(key.startswith(prefix) for key in bare))
        found = {key.removeprefix(prefix): tensor for key, tensor in bare.items() if key.startswith(prefix)}
    encoder = {key: tensor for key, tensor in found.items() if not key.startswith(dropped)}
    if "patch_embed.proj.weight" not in encoder:
        raise WeightsError(
            f"{where} holds no encoder of {preset}", given=f"keys such as {', '.join(list(tensors)[:3])}"
        )
    return encoder
