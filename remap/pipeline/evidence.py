"""What a report shows of the images, gathered while networks and images are at hand: answers, pictures, attention."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from remap.data.views import ViewSource
from remap.distributed.sharding import is_sharded
from remap.engine.evaluation import Evaluation
from remap.engine.multilabel import SetEvaluation
from remap.errors import BackboneError, Interrupted, RemapError, RunError
from remap.io import atomic_write
from remap.io.names import plain
from remap.network import Network, Runner
from remap.pipeline.components import RunComponents
from remap.progress import Progress
from remap.remapping.signals import Attention, Needs
from remap.runs.answers import PICTURES, Answers, Evidence, Overlays

# Pictures of a report, and their longer side in pixels.
WORST, LOOKED_INTO, SIDE = 12, 6, 168
# The colour scale of attention, from none to most: inferno of matplotlib at even steps.
SCALE = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def write_evidence(components: RunComponents, run: Path, found: Evaluation | None, progress: Progress) -> None:
    """Write answers.json and the pictures of a run with a classifier; a full disk does not end the run."""
    if found is None:
        return
    source, evaluation = components.views.val, None
    if components.teachers:
        evaluation = components.teachers[0].evaluation
    right = np.flatnonzero(found.right_of(source.split.labels))
    # -1 is no answer: the image could not be read.
    wrong = np.setdiff1d(np.flatnonzero(found.predictions_N >= 0), right)
    # stable: of equal losses the first images, so that a repeat shows the same ones.
    worst = wrong[np.argsort(-found.losses_N[wrong], kind="stable")][:WORST]
    examples = right[np.linspace(0, len(right) - 1, min(len(right), LOOKED_INTO // 2)).astype(int)]
    try:
        atomic_write.make_folder(run / PICTURES)
        with progress.wait("gathering what the report shows"):
            shown = [index for index in worst.tolist() if _write_picture(source, index, run / PICTURES)]
            chosen = [*shown[: LOOKED_INTO // 2], *examples.tolist()]
            overlays = _write_attention(components, source, chosen, run / PICTURES)
        Evidence(
            classes=[plain(name) for name in components.views.data.classes],
            names=[plain(name) for name in source.split.names],
            labels=_sets(source.split.labels == 1) if source.split.labels.ndim == 2 else source.split.labels.tolist(),
            student=_answers(found),
            teacher=_answers(evaluation) if evaluation is not None else None,
            worst=shown,
            attention=overlays,
        ).write(run)
    except RunError as error:
        progress.say(f"the report of this run will show no images: {error.what}")


def _sets(has_NC: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(has_C).tolist() for has_C in has_NC]


def _answers(found: Evaluation) -> Answers:
    if isinstance(found, SetEvaluation):
        from scipy.special import expit  # loads slowly

        named, sure_NC = _sets(found.named_NC), expit(found.scores_NC.astype(np.float64)).round(5)
        return Answers(
            predictions=named,
            confidences=[sure_C[classes].tolist() for sure_C, classes in zip(sure_NC, named, strict=True)],
            losses=found.losses_N.round(4).tolist(),
            precision=found.precision_C,
            draws=found.draws_K.round(6).tolist(),
        )
    return Answers(
        predictions=found.predictions_N.tolist(),
        confidences=found.confidences_N.round(5).tolist(),
        losses=found.losses_N.round(4).tolist(),
    )


def _write_picture(source: ViewSource, index: int, folder: Path) -> bool:
    """Write the view of one image; return whether it could be read."""
    views, _ = source.batch([index])
    if len(views):
        _write(folder / f"image-{index}.jpg", _picture(views[0]))
    return bool(len(views))


def _picture(view_CHW: Tensor) -> np.ndarray:
    """Return RGB (H, W, 3): the first three channels, or the first one as grey."""
    channels = view_CHW[:3] if len(view_CHW) >= 3 else view_CHW[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).contiguous().numpy()


def _write(path: Path, pixels_HW3: np.ndarray) -> None:
    image, file = Image.fromarray(pixels_HW3), io.BytesIO()
    factor = SIDE / max(image.size)
    # Of a very long and thin picture at least one pixel stays.
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
    atomic_write.write_bytes(path, file.getvalue())


@torch.no_grad()
def _write_attention(components: RunComponents, source: ViewSource, chosen: Sequence[int], folder: Path) -> Overlays:
    """Write where each network looks in the blocks of the last pair that a loss compares, or in its last block."""
    networks = {"student": components.student}
    if components.teachers:
        networks["teacher"] = components.teachers[0].network
    # Only the main process is here, and a pass of a sharded network needs all of them.
    if any(map(is_sharded, networks.values())):
        return Overlays(missing="the weights are divided over several processes")
    images, readable = source.batch(chosen)
    pairs = [
        term.blocks[-1] for term in components.objective.terms_of(0) if term.blocks and term.teacher_needs().attention
    ]
    maps: dict[str, Tensor] = {}
    blocks: dict[str, int] = {}
    missing = "" if len(readable) else "no image could be read"
    for side, (name, network) in enumerate(networks.items()):
        blocks[name] = pairs[0][side] if pairs else network.anatomy.depth - 1
        try:
            if len(readable):
                maps[name] = _attention(network, images, blocks[name], bf16=components.bf16)
        except Interrupted:
            raise
        except RemapError as error:
            # What one network cannot show does not hide the other.
            missing = f"{name}: {error.what}"
    if not maps:
        return Overlays(missing=missing)
    # One scale for all, which a single bright patch must not darken.
    most = float(torch.cat([rows.flatten() for rows in maps.values()]).quantile(0.995))
    for name, rows_Bhw in maps.items():
        for index, view, map_hw in zip(readable.tolist(), images, rows_Bhw, strict=True):
            _write(folder / f"attention-{index}-{name}.jpg", _overlay(_picture(view), map_hw.numpy() / most))
    for index in readable.tolist():
        _write_picture(source, index, folder)
    drawn = {name: blocks[name] for name in maps}
    return Overlays(images=readable.tolist(), blocks=drawn, most=most, missing=missing)


def _attention(network: Network, images_BCHW: Tensor, block: int, *, bf16: bool) -> Tensor:
    """Return how much each patch is attended to (B, h, w), mean over heads, as a multiple of even attention.

    Read from the class token, or without one as the mean over all patches; prompts and registers are cut.
    """
    network.model.eval()
    runner = Runner(network, Needs(attention=frozenset({block})), bf16=bf16)
    try:
        device = next(network.model.parameters()).device
        found: Attention = runner(images_BCHW.to(device)).attention[block]
    finally:
        runner.tap.close()  # or its hooks would stay in the network
    rows_BSS = found.map_BHSS().mean(dim=1).cpu()
    rows_BN = rows_BSS[:, 0, 1:] if found.has_class_token else rows_BSS.mean(dim=1)
    # The class token, and what was cut, took shares of the attention: patches alone sum to 1 again.
    rows_BN = rows_BN / rows_BN.sum(dim=1, keepdim=True)
    if not rows_BN.isfinite().all():  # nor where nothing but what was cut is attended to: 0 / 0
        raise BackboneError(f"the attention in block {block} is not a finite number everywhere")
    return rows_BN.unflatten(1, found.grid) * rows_BN.shape[1]


def _overlay(picture_HW3: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """Return the picture in grey under the colours of a map from 0 to 1."""
    height, width, _ = picture_HW3.shape
    smooth = Image.fromarray(map_hw.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    at_HW, steps = np.clip(np.asarray(smooth), 0, 1), np.linspace(0, 1, len(SCALE))
    colours_HW3 = np.stack([np.interp(at_HW, steps, SCALE[:, channel]) for channel in range(3)], axis=-1)
    grey_HW1 = picture_HW3.mean(axis=-1, keepdims=True)
    return (0.35 * grey_HW1 + 0.65 * colours_HW3).astype(np.uint8)
