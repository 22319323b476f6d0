"""The command line, with methods that train one thing more, which no forward pass uses."""

import os
from collections.abc import Mapping
from typing import Any

from remap_cli.main import main

if "RANK" in os.environ:
    from dataclasses import replace

    from torch import nn, zeros

    from remap.tuning.attached import Attached
    from remap.tuning.base import Attachment

    begin = Attached.__init__

    def begin_with_a_spare(
        attached: Attached, model: nn.Module, anatomy: Any, methods: Mapping[str, Attachment]
    ) -> None:
        begin(attached, model, anatomy, methods)
        first, *others = methods
        spare = replace(methods[first], trainable=[*attached.trainable, "remap_spare"])
        model.remap_spare = nn.Parameter(zeros(3))
        begin(attached, model, anatomy, {first: spare, **{name: methods[name] for name in others}})

    Attached.__init__ = begin_with_a_spare
main()
