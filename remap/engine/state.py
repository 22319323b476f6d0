"""The counters of a training, which a checkpoint stores, and what they have to satisfy when a file is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError

from remap.errors import RunError
from remap.recipe.schema import Recipe

# Strict: "1" and True are not numbers. Above 2**53 not every reader of JSON reads a counter exactly.
Count = Annotated[int, Strict(), Field(ge=0, lt=2**53)]
Number = Annotated[float, Strict()]


@dataclass
class State:
    """How far training has come. ``step`` counts steps done in ``epoch``; sums are over those steps.

    Attributes:
        digest: What this belongs to, see ``digest_of``.
        history: One record for each finished epoch.
        loss_sums: Sum of each loss over the steps of this epoch, as exact floats.
        seconds: Training time so far.
        counted: Steps of this epoch in ``loss_sums``: all but the skipped ones.
        accumulation: Micro-batches per step on each process, as many as memory has needed so far.
        lr_factor: What the learning rate is multiplied by after non-finite steps.
        recoveries: Non-finite steps that are not forgotten.
        last_fault: Updates up to the last non-finite step, that one included; 0 for none.
        outrun_fault: The same, where the rate was halved then and the next step could be begun before; else 0.
        skipped: Non-finite steps over the whole run.
        teacher_shares: By its number, the share of its weight that a teacher has left which the student has overtaken.
        overtaken: After which epoch that was first so, by the same numbers; 0 is before training.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    digest: str
    epoch: Count = 0
    step: Count = 0
    seconds: Annotated[Number, Field(ge=0)] = 0.0
    loss_sums: dict[str, Number] = field(default_factory=dict)
    history: list[dict[str, Count | Number]] = field(default_factory=list)
    counted: Count = 0
    accumulation: Annotated[Count, Field(ge=1)] = 1
    lr_factor: Annotated[Number, Field(ge=0)] = 1.0
    recoveries: Count = 0
    last_fault: Count = 0
    outrun_fault: Count = 0
    skipped: Count = 0
    teacher_shares: dict[str, Annotated[Number, Field(ge=0, le=1)]] = field(default_factory=dict)
    overtaken: dict[str, Count] = field(default_factory=dict)

    def count(self, losses: Mapping[str, float]) -> None:
        """Add the losses of one step to those of the epoch."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value
        self.counted += 1


_STATE = TypeAdapter(State)


def digest_of(recipe: Recipe, images: str, weights: str) -> str:
    """Return what a checkpoint belongs to: digests of recipe, images and the models' weights, joined by pluses."""
    # Without the paths of images, which may be moved: their digest says whether they are the same.
    return f"{recipe.digest(places=False)}+{images}+{weights}"


def parse_state(content: object) -> State:
    """Return a state of a file from anywhere, checked.

    Raises:
        ValueError: What is wrong with it.
    """
    try:
        state = _STATE.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]  # one is enough to know that the file is damaged
        raise ValueError(f"state {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    # The epoch decides where training continues, the history is what the run reports: they have to agree.
    epochs = [record.get("epoch") for record in state.history]
    if len(epochs) != state.epoch or epochs != list(range(1, len(epochs) + 1)):
        raise ValueError("history is not one record for each finished epoch")
    return state


def require_within_plan(folder: Path, state: State, epochs: int, steps: int) -> None:
    """Check that a run of so many epochs and steps per epoch can have written a state.

    Raises:
        RunError: It cannot: such a state would end the training before it is done, or never.
    """
    done = state.epoch * steps + state.step
    if done > epochs * steps or not state.counted <= state.step <= steps or not 0 < state.lr_factor <= 1:
        raise RunError(
            f"the newest checkpoint in {folder} does not belong to this run",
            given=f"epoch {state.epoch}, step {state.step} ({state.counted} counted), rate x {state.lr_factor:g}",
            allowed=f"up to {epochs} epochs of {steps} steps, rate x 1 or less",
            do="start the run again in another --output",
        )
