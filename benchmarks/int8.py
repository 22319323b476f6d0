"""What 8 bits cost and save: float32 ONNX beside int8 dynamic, static and quantisation-aware, on finished runs.

Run: python benchmarks/int8.py RUN... [--images 2000] [--epochs 3] [--batch 1] [--repeats 60] [--keep DIR]

Accuracy is that of the run's test images (validation images where there are none), at most ``--images`` of them. Size
is that of the file, latency the median of onnxruntime on one thread of the CPU; the files of a run take turns, one
call each, so that other work on the machine falls on all alike.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from torch import Tensor

from remap.engine.timing import Timer
from remap.exporting.check import in_batches
from remap.exporting.export import export_student
from remap.exporting.format import Answer, ExportOptions
from remap.exporting.int8 import quantise
from remap.exporting.onnx_file import answer_of
from remap.exporting.task_source import TaskSource
from remap.progress import Silent

KINDS = {"float32": None, "int8 dynamic": "dynamic", "int8 static": "static", "int8 quantisation-aware": "qat"}


def latencies(answers: dict[str, Answer], views: Tensor, repeats: int) -> dict[str, float]:
    """Return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in answers}
    for _ in range(repeats):
        for name, answer in answers.items():
            with Timer(views.device) as timer:
                answer(views)
            times[name].append(timer.seconds)
    return {name: median(found[repeats // 10 :]) for name, found in times.items()}


def table(run: Path, chosen: argparse.Namespace, folder: Path) -> None:
    """Print the rows of one run."""
    source = TaskSource(run)
    images = source.images(chosen.images)
    assert images.labels_N is not None, images.what
    answers, sizes, labels = {}, {}, {}
    float32 = export_student(run, "onnx", folder / run.name).file
    for name, kind in KINDS.items():
        file = float32
        if kind is not None:  # without the gate: the table shows what it would refuse
            file = float32.with_name(f"{kind}.onnx")
            shutil.copy(float32, file)
            quantise(source, file, ExportOptions(int8=kind, int8_epochs=chosen.epochs), Silent())
        answers[name] = answer_of(source.meta.preprocess, file, ExportOptions())
        sizes[name] = file.stat().st_size
        labels[name] = in_batches(answers[name], images.views_NCHW).argmax(1).numpy()
        print(f"{name}: {(labels[name] == images.labels_N).mean():.2%}", file=sys.stderr, flush=True)
    seconds = latencies(answers, images.views_NCHW[: chosen.batch], chosen.repeats)
    seed = source.run.recipe().seed if source.run is not None else "unknown"
    print(f"\n{run.name} (seed {seed}): {images.what}; batch {chosen.batch}, 1 thread\n")
    print(
        "| | accuracy | answers as float32 | size | of float32 | latency | of float32 |\n|---|---|---|---|---|---|---|"
    )
    for name in KINDS:
        accuracy, same = (labels[name] == images.labels_N).mean(), (labels[name] == labels["float32"]).mean()
        size, time = sizes[name], seconds[name]
        print(
            f"| {name} | {accuracy:.2%} | {same:.1%} | {size / 1e6:.2f} MB | {size / sizes['float32']:.2f} "
            f"| {time * 1000:.2f} ms | {time / seconds['float32']:.2f} |",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", nargs="+", type=Path)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--repeats", type=int, default=60)
    options.add_argument("--keep", type=Path, help="where the files are left")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for run in chosen.runs:
            table(run, chosen, chosen.keep or Path(folder))


if __name__ == "__main__":
    main()
