"""Turn pre-training runs into the shipped bf16 weights and rows of their model card.

    python tools/ship_mini.py CIFAR10_TEST_TAR [student=RUN] [teacher=RUN] [conv=RUN] [distilled=RUN]

The accuracy in the card is measured on the shipped file itself, after rounding to bf16. Rows of others stay.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file

from remap.backbones.mini import WEIGHTS, fold_norms
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.data.sources import read_all
from remap.data.views import View, ViewSource
from remap.progress import Silent
from remap.recipe import Recipe
from remap.recipe.paths import is_run
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task

# Role -> the name in timm, and the file.
NAMES = {
    "student": ("vit_mini_student_patch4_32.cifar10", "vit_mini_student_patch4_32"),
    "teacher": ("vit_mini_teacher_patch4_32.cifar10", "vit_mini_teacher_patch4_32"),
    "conv": ("vit_mini_conv_patch4_32.cifar10", "vit_mini_conv_patch4_32"),
    "distilled": ("vit_mini_student_patch4_32.cifar10_distilled", "vit_mini_student_patch4_32.distilled"),
}


def ship(role: str, run: Path, test: str) -> str:
    """Write one weights file.

    Returns:
        Its row of the model card.
    """
    network, _ = load_task(run)
    (name, file), stages = NAMES[role], _stages(run)
    path = WEIGHTS / f"{file}.safetensors"
    state = network.model.state_dict()
    state = fold_norms(state) if role == "conv" else state
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, path)
    size, count = path.stat().st_size, sum(v.numel() for v in load_file(path).values())
    shape = f"width {network.anatomy.width}, {network.anatomy.depth} blocks, {network.anatomy.heads} heads"
    accuracy = measure(name, test, network.classes or ())
    epochs = " + ".join(str(recipe.train.epochs) for recipe in stages)
    seeds = ", ".join(str(recipe.seed) for recipe in stages)
    recipes = ", ".join(f"`{recipe.name.replace('-', '_')}`" for recipe in stages)
    return f"| `{name}` | {shape} | {count:,} | {size / 1e6:.2f} MB | {epochs} | {seeds} | {accuracy:.2%} | {recipes} |"


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


CARD = """# Model card: the embedded mini networks

Small vision transformers (32x32 pixels, patches of 4x4, class token), pre-trained on CIFAR-10 by `remap tune` itself,
so that the whole tool runs without a download: the pair `mini_student` and `mini_teacher`, which are plain,
`mini_conv`, whose patches come from four convolutions, and `mini_distilled`, the student once more, distilled from
`mini_conv` by `remap distill`. They are small on purpose and stand in for nothing else.

| timm name | shape | parameters with head | file (bf16) | epochs | seed | CIFAR-10 test accuracy | recipe |
|---|---|---|---|---|---|---|---|
{rows}

- **Data**: CIFAR-10 (Krizhevsky 2009), 50,000 training images; the accuracy is of the last epoch on the 10,000 test
  images, measured on the shipped file after rounding to bf16. No choice was made on the test images.
- **Command**: `remap tune --recipe pretrain_mini_student --data CIFAR10_TRAIN --val-data CIFAR10_TEST` (each a folder
  or tar of class folders), likewise `pretrain_mini_teacher` and `pretrain_mini_conv`, then `pretrain_mini_teacher_2
  --student FIRST_RUN` and `pretrain_mini_conv_2 --student FIRST_RUN`, and `remap distill --recipe
  pretrain_mini_distilled` with the same data; then `python tools/ship_mini.py CIFAR10_TEST student=RUN teacher=RUN
  conv=RUN distilled=RUN`, which also folds the batch norms of `mini_conv` into its convolutions.
- **Input**: RGB, pixels scaled to [0, 1], mean and std 0.5; bicubic resizing.
- **Limits**: they know ten kinds of small pictures. Use them to try the tool and to test; for work there are
  `vit_small` and `vit_large`. Knowing CIFAR-10 better does not make `mini_conv` a better teacher of all pictures: with
  a probed head and at most 1,000 labels (seed 1) it has 49.2 % on clothes, where `mini_teacher` has 42.2 %, and 74.0 %
  on Fashion-MNIST (70.7), but 64.7 % on ants and bees (67.3), 58.7 % on emoji (64.5) and 93.1 % on digits (94.5). In
  the first run of the README (digits, seed 0) it has 95.9 % and its student 97.4 %, `mini_teacher` 94.5 % and 97.1 %.
- **Licence**: Apache-2.0, as the rest of the package.
"""


def main() -> None:
    test, *runs = sys.argv[1:]
    card = WEIGHTS / "README.md"
    rows = {line.split("`")[1]: line for line in card.read_text().splitlines() if line.startswith("| `vit_mini_")}
    for role, run in (one.split("=", 1) for one in runs):
        rows[NAMES[role][0]] = ship(role, Path(run), test)
    card.write_text(CARD.format(rows="\n".join(rows.values())))
    print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
