"""Every method, exported to ONNX and .pt2 from a tiny vision transformer, against the network itself at batch 1 and 7.

    python benchmarks/export_every_method.py [--only NAME,NAME]

Writes docs/export.jsonl, one line a method: differences of the logits, or the error, and the seconds it took.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "tuning")]

from conftest import SMALL  # noqa: E402
from tiny_models import tiny_models  # noqa: E402

from remap.backbones.anatomy import anatomy_of  # noqa: E402
from remap.backbones.families import FAMILIES  # noqa: E402
from remap.tuning import METHODS  # noqa: E402
from remap.tuning.attaching import attach_method  # noqa: E402
from remap.tuning.base import Sample  # noqa: E402

TINY = tiny_models("methods")
MODELS = ("siglip", "resnet_bottleneck", "swin")


def tuned(method: str) -> tuple[Any, str]:
    torch.manual_seed(0)
    variant = next(v for v in MODELS if METHODS.row(method).fits(FAMILIES.row(TINY[v].family).parts))
    model = TINY[variant].build(5, **({"depth": 1} if variant == "siglip" else {})).eval()
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    attached = attach_method(model, anatomy_of(model), method, SMALL.get(method, {}))
    if attached.wants_sample:
        attached.prepare(Sample(lambda: iter([(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)]), 5))
    with torch.no_grad():
        for name in attached.trainable:
            model.get_parameter(name).add_(0.05 * torch.randn_like(model.get_parameter(name)))
    return model.eval().requires_grad_(False), variant


def measure(method: str) -> dict[str, Any]:
    started = time.perf_counter()
    model, variant = tuned(method)
    example, found = (torch.randn(2, 3, 32, 32),), {"method": method, "model": variant}
    batches = [torch.randn(size, 3, 32, 32) for size in (1, 7)]
    expected = [model(batch) for batch in batches]
    try:
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(model, example, dynamic_shapes=sizes)
        run = program.module()
        found["pt2"] = max(float((run(b) - e).abs().max()) for b, e in zip(batches, expected, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            graph = torch.onnx.export(program, dynamo=True, opset_version=18, input_names=["images"], verbose=False)
            graph.save(path, external_data=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            answers = [torch.from_numpy(session.run(None, {"images": b.numpy()})[0]) for b in batches]
        found["onnx"] = max(float((a - e).abs().max()) for a, e in zip(answers, expected, strict=True))
    except Exception as error:  # the table says which
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(METHODS.names))
    names = parser.parse_args().only.split(",")
    warnings.simplefilter("ignore")
    lines = []
    for method in names:
        lines.append(measure(method))
        print(json.dumps(lines[-1]), flush=True)
        (ROOT / "docs" / "export.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
