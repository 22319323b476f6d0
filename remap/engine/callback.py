"""One's own Python in a run: called after steps, after epochs and at the end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator

from remap.data import metric_in
from remap.distributed.interrupts import never_held
from remap.errors import is_at_once


class Callback(Protocol):
    """What a run calls, on its main process alone. Every method does nothing: override those you need.

    An exception in one of them ends the run: the state is saved, the run counts as stopped and can be resumed, and the
    exception is raised.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Follow a step of training.

        Args:
            step: Its number over the whole run, from 1.
            values: ``loss`` and each of its terms, ``accuracy`` (or ``mAP``) of the newest evaluation and the ``best``
                so far, ``lr``, ``images/s``, ``left`` (seconds) and ``memory`` (bytes at the peak); empty for a step
                that was skipped since a number was not finite.
        """

    def on_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        """Follow an epoch, after its evaluation.

        Args:
            step: The number of the last step.
            record: The line of metrics.jsonl: ``epoch``, mean losses, ``accuracy`` and ``val_ce`` (or ``mAP`` and
                ``val_bce``) where it was evaluated, ``seconds``.
        """

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """Follow the end of the run.

        Args:
            summary: The content of summary.json; None where the run was stopped or failed.
        """


def raised_in(accelerator: Accelerator, call: Callable[..., None], *arguments: Any) -> Exception | None:
    """Call on the main process; return what was raised, since all processes save the state before it is raised.

    Raises:
        Interrupted: A second signal came meanwhile, which waits for nothing.
    """
    try:
        if accelerator.is_main_process:
            with never_held():
                call(*arguments)
    except Exception as error:
        if is_at_once(error):
            raise
        return error
    return None


def newest_and_best(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracy (or mAP) of the newest epoch that was evaluated and the best so far; nothing without one."""
    measured = [(name, epoch[name]) for epoch in history if (name := metric_in(epoch)) is not None]
    return {measured[-1][0]: measured[-1][1], "best": max(value for _, value in measured)} if measured else {}
