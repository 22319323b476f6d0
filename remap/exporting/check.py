"""Whether what was written answers as the student does, and how large and how fast it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from remap.engine.timing import Timer
from remap.errors import RunError
from remap.exporting.format import Answer, ExportOptions
from remap.exporting.task_source import SourceImages, TaskSource
from remap.network import Runner

# Of float32 on another kernel, where logits are about 1; larger logits differ in proportion.
TOLERANCE = 1e-4
BATCHES = (1, 7, 64)
# Forward passes of one image to warm up, and to take the median of.
WARM_UP, TIMED = 3, 15


@dataclass(frozen=True)
class Comparison:
    """The student and its export on the same images.

    Attributes:
        images: What they were, in words.
        same_labels: Images to which both give the same class, of ``count``.
        difference: The largest, of logits or probabilities.
        allowed: The largest that passes.
        bytes, seconds: Of the student (its complete network) and of the export; seconds for one image on one thread.
    """

    images: str
    count: int
    same_labels: int
    difference: float
    allowed: float
    bytes: tuple[int, int]
    seconds: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def student_answer(source: TaskSource, options: ExportOptions) -> Answer:
    """Return what the student itself answers, by the code that evaluated it."""
    runner = Runner(source.tuned).eval()

    @torch.no_grad()
    def answer(views_BCHW: Tensor) -> Tensor:
        logits_BC = runner(views_BCHW).logits_BC.float()
        return source.tuned.probabilities(logits_BC) if options.softmax else logits_BC

    return answer


def in_batches(answer: Answer, views_NCHW: Tensor) -> Tensor:
    """Return answers (N, classes), in batches of the largest size."""
    return torch.cat([answer(batch) for batch in views_NCHW.split(BATCHES[-1])])


def compare(
    student: Answer, exported: Answer, images: SourceImages, sizes: tuple[int, int], cut: float | None = None
) -> Comparison:
    """Compare on all images, at each size of a batch.

    Args:
        sizes: Bytes of both.
        cut: An answer of it or more names a class; None where the likeliest class is the answer.
    """
    views = images.views_NCHW
    expected_NK = in_batches(student, views)
    found = [exported(views[:size]) for size in BATCHES[:-1]] + [in_batches(exported, views)]
    differences = torch.cat([(one - expected_NK[: len(one)]).abs().flatten() for one in found])
    difference = float(differences.max())  # torch's, which keeps not-a-number where Python's max may lose it
    allowed = TOLERANCE * max(1.0, float(expected_NK.abs().max()))
    same = min(len(views) - _others(one, expected_NK[: len(one)], cut, allowed) for one in found)
    with one_thread():
        seconds = (seconds_of(student, views[:1]), seconds_of(exported, views[:1]))
    return Comparison(images.what, len(views), same, difference, allowed, sizes, seconds)


def _others(one_BK: Tensor, expected_BK: Tensor, cut: float | None, allowed: float) -> int:
    """Return how many images get another class, or another set.

    What is as near to the cut as allowed may be in either; of two classes as near to each other, either may be first.
    """
    if cut is None:
        top_B1, chosen_B1 = expected_BK.amax(1, keepdim=True), one_BK.argmax(1, keepdim=True)
        return int((top_B1 - expected_BK.gather(1, chosen_B1) > 2 * allowed).sum())  # both answers may be off
    clear_BK = (expected_BK - cut).abs() > allowed
    return int((((one_BK >= cut) != (expected_BK >= cut)) & clear_BK).any(dim=1).sum())


def require_equal(found: Comparison, name: str) -> None:
    """Refuse an export that answers otherwise than the student.

    Raises:
        RunError: How far they are apart.
    """
    if found.same_labels < found.count or not found.difference <= found.allowed:
        raise RunError(
            f"the {name} export answers otherwise than the student; it was removed",
            given=f"{found.count - found.same_labels} of {found.count} labels differ, and answers by up to "
            f"{found.difference:.1e}; checked on {found.images}",
            allowed=f"no other label, and a difference of {found.allowed:.1e}",
            do="export to another format, and report this with the recipe of the run",
        )


def seconds_of(answer: Answer, views_BCHW: Tensor) -> float:
    """Return the median time of a batch, on the CPU."""
    times = []
    for _ in range(WARM_UP + TIMED):
        with Timer(views_BCHW.device) as timer:
            answer(views_BCHW)
        times.append(timer.seconds)
    return median(times[WARM_UP:])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, as onnxruntime does here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a network's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def bytes_below(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
