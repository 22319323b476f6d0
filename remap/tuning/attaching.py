"""From a method's name and options to an attached method, combinations ("vpt_deep+lora") included."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from torch import nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families import FAMILIES, PARTS
from remap.errors import BackboneError
from remap.tuning import CATEGORIES, METHODS, MethodEntry, combination_problems, config_of, rows_of
from remap.tuning.attached import Attached


def attach_method(model: nn.Module, anatomy: Anatomy, method: str, options: Mapping[str, Any]) -> Attached:
    """Attach a method, or several: each sees the backbone as those before it left it.

    Args:
        options: The method's options; for a combination a mapping for each method.

    Raises:
        UnknownName: No such method.
        pydantic.ValidationError: An option the method does not take.
        BackboneError: The method does not fit the backbone, or the methods do not fit each other.
    """
    rows = rows_of(method)
    for row in rows:
        require_fit(row, anatomy)
    if problems := combination_problems(method):
        raise BackboneError(f"{method} cannot be attached", given="; ".join(problems))
    config = config_of(method)(**options)
    restore = _restorer(model)
    try:
        options_of = {rows[0].name: config} if len(rows) == 1 else {row.name: getattr(config, row.name) for row in rows}
        members = {name: METHODS.load(name)(chosen).attach(model, anatomy) for name, chosen in options_of.items()}
        return Attached(model, anatomy, members)
    except Exception:
        restore()
        raise


def require_fit(row: MethodEntry, anatomy: Anatomy) -> None:
    """Refuse a method that makes no sense on a family, or on a text tower.

    Raises:
        BackboneError: With the nearest method that fits.
    """
    if row.of_images and not anatomy.classifier_heads:
        raise BackboneError(
            f"{row.name} reads images or acts on their classifier",
            given="a text tower, which has neither",
            do="take a method of its blocks, such as lora, adaptformer or vpt_deep",
        )
    if row.fits(anatomy.parts):
        return
    fitting = nearest(row, anatomy.family)
    family = FAMILIES.row(anatomy.family)
    raise BackboneError(
        f"{row.name} does not fit {family.summary} ({anatomy.family})",
        given=needed(row, anatomy.parts),
        do=f"take {' or '.join(fitting)}; `remap methods --families` shows what fits",
    )


def needed(row: MethodEntry, parts: frozenset[str]) -> str:
    """Say what a method needs that a backbone with these parts lacks."""
    return f"it needs {' and '.join(words for part, words in PARTS.items() if part in row.needs - parts)}"


def nearest(row: MethodEntry, family: str) -> list[str]:
    """Return methods of the same category that fit a family, the closest row of the table first.

    Where those fit every family, one of the nearest category that fits because of what it changes is added.
    """
    parts = FAMILIES.row(family).parts
    same = [other for other in METHODS if other.category == row.category]
    position = same.index(row)
    fitting = [other for other in same if other.fits(parts)]
    fitting.sort(key=lambda other: (other.needs == frozenset(), abs(same.index(other) - position)))
    offered = fitting[:2]
    if not any(other.needs for other in offered):
        order = list(CATEGORIES)
        made_for = [other for other in METHODS if other.needs and other.fits(parts)]
        made_for.sort(key=lambda other: abs(order.index(other.category) - order.index(row.category)))
        offered = [*offered, *made_for[:1]]
    return [other.name for other in offered]


def _restorer(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the model back as it is now, without what was inserted, hooked or replaced since.

    Values of tensors are not copied: attaching changes none.
    """
    modules = [
        (
            module,
            type(module),
            {key: copy(value) if isinstance(value, dict) else value for key, value in attributes.items()},
        )
        for module in model.modules()
        for attributes in (vars(module),)
    ]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, cls, before in modules:
            module.__class__ = cls
            attributes = vars(module)
            for key in [key for key in attributes if key not in before]:
                del attributes[key]
            for key, value in before.items():
                if isinstance(value, dict):  # in place: hooks' handles know these very dictionaries
                    attributes[key].clear()
                    attributes[key].update(value)
                else:
                    attributes[key] = value
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)

    return restore
