"""Every method as ONNX, as a program of torch.export and, where it can be merged, as a timm folder.

Run: python benchmarks/every_export.py [--methods lora,vpt_deep] [--formats onnx,torch,timm]

Each method is attached to a tiny vision transformer (to a tiny ResNet where it changes convolutions, to ``clip:mini``
where it needs words), and what it trains is moved away from its initial values. The check of ``remap export`` itself
decides: 71 random images in batches of 1, 7 and 64, every label equal, logits within 1e-4 (of the largest logit, where
that is above 1).
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch

from remap.backbones.families import FAMILIES
from remap.backbones.model_folder import save_model_folder
from remap.data.views import View
from remap.errors import RemapError
from remap.exporting.export import export_student
from remap.network import tuned
from remap.pipeline.class_words import write_words
from remap.progress import Silent
from remap.recipe.schema import DataSpec, ModelSpec
from remap.runs.task import open_backbone, save_task
from remap.tuning import METHODS
from remap.tuning.base import Sample

MODELS = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    ),
    "resnet": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
}
CLASSES = ("a", "b", "c", "d", "e")
# Where the default does not fit a network of this size.
OPTIONS: dict[str, dict[str, object]] = {
    "fact_tt": {"rank": 4},
    "fact_tk": {"rank": 4},
    "sidetune": {"side": "test_resnet"},
    "adalora": {"rank": 4, "initial_rank": 6},
    "lst": {"reduction": 4},
    "gralora": {"rank": 4, "alpha": 4},
    "randlora": {"rank": 4, "alpha": 4},
    "fourierft": {"coefficients": 40},
    "waveft": {"coefficients": 40, "scale": 5.0},
    "vblora": {"rank": 2, "vectors": 6, "length": 8},
    "c3a": {"block_size": 8},
    "psoft": {"rank": 4},
    "tinylora": {"numbers": 5, "tying": 1.0},
    "unilora": {"rank": 2, "numbers": 30},
}


def write_task(folder: Path, method: str) -> None:
    """Write a task folder of a method that has moved, on the model beside it that the method fits."""
    torch.manual_seed(1)
    fitting = (name for name in MODELS if METHODS.row(method).fits(FAMILIES.row(name).parts))
    if name := next(fitting, None):
        backbone = open_backbone(ModelSpec(model=f"local-dir:{folder.with_name(name)}", image_size=32), len(CLASSES))
    else:  # it needs words
        backbone = open_backbone(ModelSpec(model="clip:mini"), len(CLASSES))
        write_words(backbone, DataSpec(), CLASSES, Silent())
    network = tuned(backbone, method, OPTIONS.get(method, {}))
    if network.attached.wants_sample:
        batches = [(torch.randn(5, 3, 32, 32), torch.arange(5)) for _ in range(2)]
        network.attached.prepare(Sample(lambda: iter(batches), len(CLASSES)))
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.classes = CLASSES
    save_task(folder, network, View(network.preprocess.size, 1.0, "bicubic"), method, OPTIONS.get(method, {}))


def outcome(task: Path, to: str, folder: Path) -> str:
    """Return the largest difference of logits, or why there is no export."""
    try:
        if not task.exists():
            write_task(task, task.name)
        comparison = export_student(task, to, folder).comparison
    except RemapError as error:
        return f"refused: {error.what}"
    except Exception as error:  # whatever an exporter raises is a line of the table
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    assert comparison is not None
    return f"{comparison.difference:.1e}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--methods", default=",".join(METHODS.names))
    options.add_argument("--formats", default="onnx,torch,timm")
    chosen = options.parse_args()
    formats = chosen.formats.split(",")
    passed = dict.fromkeys(formats, 0)
    tried = dict.fromkeys(formats, 0)
    print(f"| method | {' | '.join(formats)} |\n|---|{'---|' * len(formats)}")
    with tempfile.TemporaryDirectory() as root:
        for name, (architecture, shape) in MODELS.items():
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=7, **shape).eval()
            save_model_folder(model, Path(root, name), shape)
        for method in chosen.methods.split(","):
            task = Path(root, method)
            cells = []
            for to in formats:
                if to == "timm" and not METHODS.row(method).mergeable:
                    cells.append("")
                    continue
                cells.append(outcome(task, to, Path(root, f"{method}.{to}")))
                tried[to] += 1
                passed[to] += cells[-1][0].isdigit()
            print(f"| `{method}` | {' | '.join(cells)} |", flush=True)
    print("; ".join(f"{to}: {passed[to]} of {tried[to]}" for to in formats))


if __name__ == "__main__":
    main()
