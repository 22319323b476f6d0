"""8-bit ONNX by onnxruntime's quantiser, and the gate that an int8 file has to pass."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from remap.errors import RunError
from remap.exporting.check import in_batches, student_answer
from remap.exporting.format import Answer, ExportOptions
from remap.exporting.int8_training import CLIPPED, int8_student
from remap.exporting.onnx_file import write_graph
from remap.exporting.program import outside
from remap.exporting.task_source import SourceImages, TaskSource
from remap.progress import Progress

# Training images that ranges of activations are taken from.
CALIBRATION_IMAGES = 256
# What is meant where the options are left out: passes of qat, and points of accuracy that 8 bits may cost.
QAT_EPOCHS, MAX_DROP = 3, 1.0
# Layers with weights: they are what is large and slow. Norms, softmax and sums stay in float32, where accuracy is lost.
QUANTISED = ["Conv", "Gemm", "MatMul"]


def quantise(source: TaskSource, file: Path, options: ExportOptions, progress: Progress) -> None:
    """Replace a float ONNX file by its int8 version: weights per output channel, activations per tensor."""
    if options.int8 == "qat":
        student = int8_student(source, options.int8_epochs or QAT_EPOCHS, progress)
        write_graph(source, file, options, student)
    with progress.wait("quantising to 8 bits"):
        _quantise_file(source, file, options)


def _quantise_file(source: TaskSource, file: Path, options: ExportOptions) -> None:
    import onnx  # an extra, as the next two
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    common: dict[str, Any] = {"op_types_to_quantize": QUANTISED, "per_channel": True, "weight_type": QuantType.QInt8}
    with _quiet(), TemporaryDirectory(dir=file.parent) as folder:
        ready = Path(folder) / "ready.onnx"
        metadata = onnx.load(file, load_external_data=False).metadata_props
        quant_pre_process(file, ready, skip_symbolic_shape=True)
        common["nodes_to_exclude"] = _float_nodes(onnx.load(ready).graph)
        if options.int8 == "dynamic":
            quantize_dynamic(ready, file, **common)
        else:
            calibration = _Calibration(
                outside(source.meta.preprocess, options, source.training_images(CALIBRATION_IMAGES))
            )
            # Signed: processors without VNNI add products of unsigned with signed bytes in 16 bits, which overflow.
            # Percentiles, as in ``RoundedInput``: the outliers of a transformer would otherwise take the range.
            quantize_static(
                ready,
                file,
                calibration,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile,
                # Products stay in float32, as sums do; a convolution's output is rounded, or its kernel would be slow.
                extra_options={
                    "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                    "CalibPercentile": 100 * (1 - CLIPPED),
                    # One image at a time becomes part of the histograms; else all activations of all are held at once.
                    "CalibStridedMinMax": 1,
                },
                **common,
            )
        model = onnx.load(file)
        del model.metadata_props[:]
        model.metadata_props.extend(metadata)
        onnx.save(model, file)


def _float_nodes(graph: Any) -> list[str]:
    """Return products that stay in float32: of two activations, and of the first and last layer (``inner_layers``)."""
    weights = {one.name for one in graph.initializer if not one.name.startswith("prepare.")}  # that resizes
    products = [node for node in graph.node if node.op_type in QUANTISED]
    layers = [node.name for node in products if node.input[1] in weights]
    of_two = (node.name for node in products if node.input[1] not in weights)
    # The dynamic quantiser makes a MatMul of a Gemm, under that name.
    return [*layers[:1], *layers[-1:], *(f"{last}_MatMul" for last in layers[-1:]), *of_two]


class _Calibration:
    """Feeds images to the quantiser, one by one: batches have to be of one size."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Feed these images next."""
        self._batches: Iterator[Tensor] = iter(self._images[start_index:end_index].split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}

    def __iter__(self) -> "_Calibration":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if (found := self.get_next()) is None:
            raise StopIteration
        return found


@dataclass(frozen=True)
class Int8Report:
    """What int8 costs on labelled images.

    Attributes:
        agreement: Share of images with the same answer.
        accuracy: Of float32 and of int8.
        worst_class: The class that loses most beyond one image, and by how many percentage points its accuracy drops.
    """

    images: int
    agreement: float
    accuracy: tuple[float, float]
    worst_class: tuple[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_labels(images: SourceImages) -> NDArray[np.int64]:
    """Return the labels of the images that int8 is judged by.

    Raises:
        RunError: They have none.
    """
    if images.labels_N is None:
        raise RunError("int8 is checked on labelled images of the run", given=images.what, do="bring them back")
    return images.labels_N


def require_gate(source: TaskSource, exported: Answer, images: SourceImages, options: ExportOptions) -> Int8Report:
    """Compare int8 with the student on labelled images.

    ``options.max_drop`` holds for all images together and for each class; of a class one image more may be lost, since
    a single one is more than a point of a small class.

    Raises:
        RunError: There are no labelled images, or too much accuracy is lost.
    """
    labels_N, max_drop = require_labels(images), MAX_DROP if options.max_drop is None else options.max_drop
    answers = student_answer(source, options), exported
    before_N, after_N = (in_batches(one, images.views_NCHW).argmax(1).numpy() for one in answers)
    accuracy = (float((before_N == labels_N).mean()), float((after_N == labels_N).mean()))
    drops = []
    for label, name in enumerate(source.meta.classes):
        of_class = labels_N == label
        if of_class.any():
            lost = int((before_N == label)[of_class].sum()) - int((after_N == label)[of_class].sum())
            drops.append((100.0 * lost / of_class.sum(), 100.0 * (lost - 1) / of_class.sum(), name))
    # A class of one image that is lost must not hide a larger one that loses many.
    worst, beyond, name = max(drops, key=lambda one: (one[1], one[0]))
    report = Int8Report(len(labels_N), float((before_N == after_N).mean()), accuracy, (name, float(worst)))
    drop = 100.0 * int((before_N == labels_N).sum() - (after_N == labels_N).sum()) / len(labels_N)
    if drop > max_drop or beyond > max_drop:
        raise RunError(
            "int8 costs more accuracy than --max-drop allows; the export was removed",
            given=f"{accuracy[0]:.2%} -> {accuracy[1]:.2%} of {len(labels_N)} images, {report.agreement:.1%} of the"
            f" answers the same; class {name} loses {worst:.1f} points",
            allowed=f"{max_drop:g} points, over all and of each class (where one image more may go)",
            do="try --int8 qat (or more --int8-epochs), or --max-drop",
        )
    return report


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the quantiser logs and prints about its own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
