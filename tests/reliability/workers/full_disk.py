"""For tests/reliability/test_checkpoints.py: a disk of 2 MB that fills up and turns read-only; prints what was said.

Where no file system can be mounted, a limit on the size of files stands in, and a place that nobody can write.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from remap.engine.checkpoint import load_checkpoint, save_checkpoint, snapshot
from remap.engine.state import State
from remap.errors import RunError
from remap.io import disk_space
from remap.pipeline.run import resume, start
from remap.recipe import resolve

mounts, place, data, student, teacher = sys.argv[1] == "mount", Path(sys.argv[2]), *sys.argv[3:]
DIGEST = "abc"
torch.set_num_threads(1)
said: dict[str, object] = {"mounted": mounts}
place.mkdir()
if mounts:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=True)


class Watch:
    """Counts steps and keeps what is said; fills the disk during one step."""

    def __init__(self, full_at: int = 0) -> None:
        self.steps, self.said, self.full_at, self.filled = 0, list[str](), full_at, contextlib.ExitStack()

    def say(self, text: str) -> None:
        self.said.append(text)
        if "no checkpoint was written" in text:  # by a thread, while training continued
            self.filled.close()

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator["Watch"]:
        yield self

    def advance(self, amount: int = 1, **values: float) -> None:
        stepped = bool(values and amount)
        self.steps += stepped
        if stepped and self.steps == self.full_at:
            self.filled.enter_context(full(leave=0))


@contextmanager
def full(leave: int) -> Iterator[None]:
    """Room for ``leave`` bytes only."""
    if mounts:
        ballast = place / "ballast"
        ballast.write_bytes(b"\0" * (shutil.disk_usage(place).free - leave))
        yield
        ballast.unlink()
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (leave, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def error_of(*arguments: object, call: object = start, **words: object) -> list[str]:
    """The class and the text of the error that a call gives."""
    try:
        call(*arguments, **words)
    except RunError as error:
        return [type(error).__name__, str(error), str(error.exit_code)]
    return []


def trained(value: float) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    parameters = {"weight": torch.nn.Parameter(torch.full((100, 1000), value))}
    return parameters, torch.optim.AdamW(parameters.values(), fused=True)


# A save that finds no room in its midst: 0.4 MB, with room for 0.2.
folder = place / "checkpoint"
for step in (1, 2):
    save_checkpoint(folder, State(DIGEST, step=step), snapshot(*trained(float(step))))
with full(leave=200_000):
    free = shutil.disk_usage(place).free
    said["save"] = error_of(folder, State(DIGEST, step=3), snapshot(*trained(3.0)), call=save_checkpoint)
    said["path"], said["free"] = str(folder / "000003.safetensors"), free
    said["left"] = sorted(os.listdir(folder))
    parameters, optimizer = trained(0.0)
    state, *_ = load_checkpoint(folder, DIGEST, parameters, optimizer, print)
    said["loaded"], said["weights"] = state.step, sorted(set(parameters["weight"].flatten().tolist()))
save_checkpoint(folder, State(DIGEST, step=3), snapshot(*trained(3.0)))
said["bytes"] = (folder / "000003.safetensors").stat().st_size
said["later"] = load_checkpoint(folder, DIGEST, parameters, optimizer, print)[0].step
shutil.rmtree(folder)

# A run that loses the room for one checkpoint, and its twin.
words = {"data": data, "student": student, "teacher": teacher, "method": "full"}
settings = ("data.workers=1", "train.epochs=2", "train.batch_size=8", "train.checkpoint_seconds=0")
recipe = resolve(words=words, settings=settings)
twin = start(recipe, place.parent / "twin")
watch = Watch(full_at=4)
tuned = start(recipe, place / "run", watch)
said["steps"], said["warnings"] = watch.steps, [text for text in watch.said if "no checkpoint was written" in text]
said["difference"] = max(
    float((tuned.student.trained[name] - tensor).detach().abs().max()) for name, tensor in twin.student.trained.items()
)
generation = max((place / "run" / "checkpoint").glob("*.safetensors")).stat().st_size
shutil.rmtree(place / "run")

# A run that will not fit is refused before its first step: there is room for two of its three generations.
watch = Watch()
if mounts:
    with full(leave=2 * generation):
        said["preflight"] = error_of(recipe, place / "run", watch)
else:
    said["preflight"] = error_of(
        place / "run", 2 * shutil.disk_usage(place).free, "the run", call=disk_space.require_space
    )
said["preflight_steps"] = watch.steps

# A place that cannot be written is refused before a model is built.
(place / "empty").mkdir()
watch = Watch()
if mounts:
    start(recipe, place / "stopped")
    (place / "stopped" / "summary.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    said["read_only"] = [error_of(recipe, place / name, watch) for name in ("new", "empty")]
    said["read_only"].append(error_of(place / "stopped", watch, call=resume))
else:
    said["read_only"] = [error_of(recipe, Path("/proc/remap-run"), watch)]
said["read_only_steps"], said["read_only_said"] = watch.steps, watch.said
print(json.dumps(said))
