"""What a run says of its method and losses: their names, with the options that are not their defaults."""

from collections.abc import Iterable, Mapping
from typing import Any

from remap.recipe.named import LossSpec
from remap.recipe.option_listing import shown
from remap.remapping import LOSSES


def losses_in_words(losses: Iterable[LossSpec], times: str = "x") -> str:
    """Return losses and weights: "ce x 0.1, kd x 1 (temperature 2)". Imports the losses, and so torch."""
    return ", ".join(behind(f"{loss.name} {times} {loss.weight:g}", _changed(loss)) for loss in losses)


def behind(name: str, options: Mapping[str, Any]) -> str:
    """Return a name and options: "lora (rank 4, targets [q, v])"; without any, the name."""
    return f"{name} ({_pairs(options)})" if options else name


def _changed(loss: LossSpec) -> dict[str, Any]:
    """Return the options that are not the loss's own defaults, and its schedules."""
    schedules = loss.model_dump(include={"weight_schedule", "temperature_schedule"}, exclude_defaults=True)
    if loss.name not in LOSSES:  # of an old comparison
        return loss.options | schedules
    config = LOSSES.load(loss.name).Config
    defaults, given = (config(**options).model_dump(mode="json") for options in ({}, loss.options))
    return {name: value for name, value in given.items() if value != defaults[name]} | schedules


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_in_words(value)}" for name, value in options.items())


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{_pairs(value)}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_in_words, value))}]"
    return f"{value:g}" if isinstance(value, float) else shown(value)
