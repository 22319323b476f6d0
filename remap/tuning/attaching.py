"""From a method's name and options to an attached method, combinations ("vpt_deep+lora") included."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from remap.backbones.anatomy import Anatomy
from remap.backbones.families import FAMILIES, PARTS
from remap.errors import BackboneError
from remap.tuning import CATEGORIES, METHODS, MethodEntry, combination_problems, config_of, rows_of
from remap.tuning.base import Attached, Method, Sample


def attach_method(model: nn.Module, anatomy: Anatomy, method: str, options: Mapping[str, Any]) -> Attached:
    """Attach a method, or several: each part sees the backbone as the parts before it left it.

    Args:
        options: The method's options; for a combination a mapping a part.

    Raises:
        UnknownName: No such method.
        pydantic.ValidationError: An option the method does not take.
        BackboneError: The method does not fit the backbone, or the parts do not fit each other.
    """
    rows = rows_of(method)
    for row in rows:
        require_fit(row, anatomy)
    if problems := combination_problems(method):
        raise BackboneError(f"{method} cannot be attached", given="; ".join(problems))
    config = config_of(method)(**options)
    restore = _restorer(model)
    try:
        if len(rows) == 1:
            return _one(model, anatomy, method, config)
        parts = {row.name: _one(model, anatomy, row.name, getattr(config, row.name)) for row in rows}
        return Combined(model, anatomy, parts)
    except Exception:
        restore()
        raise


def require_fit(row: MethodEntry, anatomy: Anatomy) -> None:
    """Refuse a method that makes no sense on a family.

    Raises:
        BackboneError: With the nearest method that fits.
    """
    if row.fits(anatomy.parts):
        return
    fitting = nearest(row, anatomy.family)
    family = FAMILIES.row(anatomy.family)
    raise BackboneError(
        f"{row.name} does not fit {family.summary} ({anatomy.family})",
        given=f"it needs {' and '.join(words for part, words in PARTS.items() if part in row.needs - anatomy.parts)}",
        do=f"take {' or '.join(fitting)}; `remap methods --families` shows what fits",
    )


def nearest(row: MethodEntry, family: str) -> list[str]:
    """Methods of the same category that fit a family, the closest row of the table first.

    Where those fit anything, one of the nearest category that fits because of what it changes comes besides.
    """
    parts = FAMILIES.row(family).parts
    same = [other for other in METHODS if other.category == row.category]
    place = same.index(row)
    fitting = [other for other in same if other.fits(parts)]
    fitting.sort(key=lambda other: (other.needs == frozenset(), abs(same.index(other) - place)))
    offered = fitting[:2]
    if not any(other.needs for other in offered):
        order = list(CATEGORIES)
        made_for = [other for other in METHODS if other.needs and other.fits(parts)]
        made_for.sort(key=lambda other: abs(order.index(other.category) - order.index(row.category)))
        offered = [*offered, *made_for[:1]]
    return [other.name for other in offered]


class Combined(Attached):
    """Several methods on one model, by name; what one of them knows, all of them together know."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, named: Mapping[str, Attached]) -> None:
        self.named, self.parts = dict(named), list(named.values())
        parts = self.parts
        super().__init__(
            model,
            anatomy,
            trainable=dict.fromkeys(name for part in parts for name in part.trainable),
            no_decay=dict.fromkeys(name for part in parts for name in part.no_decay),
            identity_at_init=all(part.identity_at_init for part in parts),
            extra_tokens=sum(part.extra_tokens for part in parts),
            tokens_from=max(part.tokens_from for part in parts),
            mergeable=all(part.mergeable for part in parts),
            tuned_modules=dict.fromkeys(path for part in parts for path in part.tuned_modules),
            added=[path for part in parts for path in part.added],
        )
        self.buffers = tuple(dict.fromkeys((*self.buffers, *(name for part in parts for name in part.buffers))))
        self.wants_sample = any(part.wants_sample for part in parts)
        # Each part numbers its own sites from 0: two of them would drop the same elements together.
        for site, module in enumerate(self._keyed):
            module.renumber(site)

    def prepare(self, sample: Sample) -> None:
        for part in self.parts:
            if part.wants_sample:
                part.prepare(sample)

    def after_step(self, step: int, total: int) -> None:
        for part in self.parts:
            part.after_step(step, total)

    def penalty(self) -> Tensor | None:
        penalties = [value for part in self.parts if (value := part.penalty()) is not None]
        return torch.stack(penalties).sum() if penalties else None

    def memory(self) -> dict[str, Tensor]:
        return {
            f"{index}.{key}": value for index, part in enumerate(self.parts) for key, value in part.memory().items()
        }

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        for index, part in enumerate(self.parts):
            prefix = f"{index}."
            part.recall({key.removeprefix(prefix): v for key, v in memory.items() if key.startswith(prefix)})

    def _copy_of_original(self) -> dict[str, Tensor]:
        return {}  # the parts have theirs

    def forget_original(self) -> None:
        for part in self.parts:
            part.forget_original()

    def _require_mergeable(self) -> None:
        if stay := [name for name, part in self.named.items() if not part.mergeable]:
            raise BackboneError(
                f"{' and '.join(stay)} cannot be folded into the backbone's weights",
                given="+".join(self.named),
                do="keep the task files: they reload the tuned model exactly",
            )

    def merge(self) -> nn.Module:
        self._require_mergeable()
        with torch.no_grad():
            for part in self.parts:
                part._check_fold()
            for part in sorted(self.parts, key=lambda part: part.fold_stage):
                part._fold()
        for part in reversed(self.parts):
            part._take_off()
        return self.model

    def detach(self) -> nn.Module:
        for part in self.parts:
            part._require_original()
        for part in reversed(self.parts):
            part.detach()
        return self.model


def _one(model: nn.Module, anatomy: Anatomy, name: str, config: BaseModel) -> Attached:
    cls: type[Method] = METHODS.load(name)
    return cls(config).attach(model, anatomy)


def _restorer(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model back as it is now, whatever was inserted, hooked or replaced since.

    Values of tensors are not kept: attaching changes none.
    """
    modules = [
        (module, type(module), {key: copy(value) if isinstance(value, dict) else value for key, value in own.items()})
        for module in model.modules()
        for own in (vars(module),)
    ]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, cls, before in modules:
            module.__class__ = cls
            own = vars(module)
            for key in [key for key in own if key not in before]:
                del own[key]
            for key, value in before.items():
                if isinstance(value, dict):  # in place: hooks' handles know these very dictionaries
                    own[key].clear()
                    own[key].update(value)
                else:
                    own[key] = value
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)

    return restore
