"""Changes of a prepared classifier that a recipe asks for: its temperature, and how even its answers are."""

import numpy as np

from remap.data.views import ViewSource
from remap.network import Network
from remap.pipeline.balancing import balance
from remap.pipeline.calibration import calibrate
from remap.progress import Progress
from remap.recipe.schema import TeacherSpec


def adjust_logits(
    network: Network,
    spec: TeacherSpec,
    title: str,
    source: ViewSource,
    held_out: ViewSource,
    batch_size: int,
    progress: Progress,
) -> np.ndarray | None:
    """Change a prepared classifier as the recipe says, in place, and say how.

    Args:
        title: How messages call the teacher.
        source: The images that its answers are balanced on.
        held_out: Labelled images that it was not prepared on, for its temperature.

    Returns:
        Its logits (N, C) on the images that it was balanced on, which nothing has to compute again; else None.
    """
    if spec.calibrate:  # where it brought its head, on images that it may have seen
        temperature = calibrate(network, held_out, batch_size, progress)
        how = f"on {len(held_out.split)} training images: temperature {temperature:.2f}"
        progress.say(f"{title} is calibrated {how}")
    if not spec.balance:
        return None
    how, logits_NC = balance(network, source, spec.balance, batch_size, progress)
    progress.say(f"{title} is balanced {how}")
    return logits_NC
