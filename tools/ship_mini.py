"""Turn the two pre-training runs into the shipped bf16 weights and their model card.

    python tools/ship_mini.py STUDENT_RUN TEACHER_RUN CIFAR10_TEST_TAR

The accuracy in the card is measured on the shipped file itself, after rounding to bf16.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file

from remap.backbones.mini import WEIGHTS
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.data.sources import read_all
from remap.data.views import View, ViewSource
from remap.progress import Silent
from remap.recipe import Recipe
from remap.recipe.paths import is_run
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task

NAMES = {"student": "vit_mini_student_patch4_32", "teacher": "vit_mini_teacher_patch4_32"}


def ship(role: str, run: Path, test: str) -> str:
    """Write one weights file.

    Returns:
        Its row of the model card.
    """
    network, _ = load_task(run)
    name, stages = NAMES[role], _stages(run)
    path = WEIGHTS / f"{name}.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in network.model.state_dict().items()}, path)
    size, count = path.stat().st_size, sum(v.numel() for v in load_file(path).values())
    shape = f"width {network.anatomy.width}, {network.anatomy.depth} blocks, {network.anatomy.heads} heads"
    accuracy = measure(name, test, network.classes or ())
    epochs = " + ".join(str(recipe.train.epochs) for recipe in stages)
    seeds = ", ".join(str(recipe.seed) for recipe in stages)
    recipes = ", ".join(f"`{recipe.name.replace('-', '_')}`" for recipe in stages)
    return (
        f"| `{name}.cifar10` | {shape} | {count:,} | {size / 1e6:.2f} MB | {epochs} | {seeds} "
        f"| {accuracy:.2%} | {recipes} |"
    )


def _stages(run: Path) -> list[Recipe]:
    """The recipes that made a run, the first one first: a later one starts from an earlier run's weights."""
    recipe = RunDir.open(run).recipe()
    earlier = _stages(Path(recipe.student.model)) if is_run(recipe.student.model) else []
    return [*earlier, recipe]


@torch.no_grad()
def measure(name: str, test: str, classes: tuple[str, ...]) -> float:
    """Accuracy of the shipped file through timm's own loader, in float32."""
    model = timm.create_model(name, pretrained=True).eval()
    spec = PreprocessSpec.of(model)
    split, _ = read_all(test, classes)
    source = ViewSource(split, View(spec.size, spec.crop_pct, spec.interpolation), memory_bytes=2e9)
    source.load(Silent(), "test images")
    preprocess, right = Preprocess(spec), 0
    for start in range(0, len(source.split), 500):
        images, indices = source.batch(np.arange(start, min(start + 500, len(source.split))))
        right += int((model(preprocess(images)).argmax(1).numpy() == source.split.labels[indices]).sum())
    return right / len(source.split)


CARD = """# Model card: the embedded mini pair

Two plain vision transformers (32x32 pixels, patch 4, class token), pre-trained on CIFAR-10 by `remap tune` itself, so
that the whole tool runs without a download. They are small on purpose and stand in for nothing else.

| timm name | shape | parameters with head | file (bf16) | epochs | seed | CIFAR-10 test accuracy | recipe |
|---|---|---|---|---|---|---|---|
{rows}

- **Data**: CIFAR-10 (Krizhevsky 2009), 50,000 training images; the accuracy is of the last epoch on the 10,000 test
  images, measured on the shipped file after rounding to bf16. No choice was made on the test images.
- **Command**: `remap tune --recipe pretrain_mini_student --data CIFAR10_TRAIN --val-data CIFAR10_TEST` (each a folder
  or tar of class folders), likewise `pretrain_mini_teacher`, then `pretrain_mini_teacher_2 --student FIRST_RUN`; then
  `python tools/ship_mini.py STUDENT_RUN TEACHER_RUN CIFAR10_TEST`.
- **Input**: RGB, pixels scaled to [0, 1], mean and std 0.5; bicubic resizing.
- **Limits**: they know ten kinds of small pictures. Use them to try the tool and to test; for work there are
  `vit_small` and `vit_large`.
- **Licence**: Apache-2.0, as the rest of the package.
"""


def main() -> None:
    student, teacher, test = sys.argv[1:]
    rows = [ship("student", Path(student), test), ship("teacher", Path(teacher), test)]
    (WEIGHTS / "README.md").write_text(CARD.format(rows="\n".join(rows)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
