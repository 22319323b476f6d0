"""The command line, with methods that train one thing more, which no forward pass uses."""

import os
from collections.abc import Iterable
from typing import Any

from remap_cli.main import main

if "RANK" in os.environ:
    from torch import nn, zeros

    from remap.tuning.base import Attached

    begin = Attached.__init__

    def begin_with_a_spare(
        attached: Attached, model: nn.Module, anatomy: Any, *, trainable: Iterable[str], **more: Any
    ) -> None:
        model.remap_spare = nn.Parameter(zeros(3))
        begin(attached, model, anatomy, trainable=[*trainable, "remap_spare"], **more)

    Attached.__init__ = begin_with_a_spare
main()
