"""Write docs/first_steps.ipynb: the embedded default, cell by cell, with what the cells really gave.

Run ``python tools/first_steps.py``: about two minutes. It needs no Jupyter, as a notebook is a JSON file.
``tests/test_docs.py`` checks that the cells of the file are those below.
"""

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"
# Words first, then code: what a cell ends with is shown, and what it draws.
CELLS = [
    """# First steps

A small vision transformer learns scanned digits from a larger one. 200 of the 1,000 training digits have a label: the
teacher is tuned on those, and the student learns from its outputs for all 1,000, while 2.5 % of its parameters are
trained. All that is needed is in the package. Written by `tools/first_steps.py`; the outputs are those of a real
run on one CPU core, shortened to three epochs of the student.""",
    """import remap

result = remap.distill({"data": "digits", "epochs": 3}, settings=["teacher.epochs=20", "train.eval_every=3"])
summary = result.summary
print("teacher", f"{summary['teacher']['accuracy']:.1%}")
print("student", f"{summary['student']['accuracy']:.1%}")""",
    """The method of the embedded default is `hira`: each weight of queries, keys and values is multiplied by 1 plus an
element of a low-rank matrix. These matrices and the classifier were trained, all else stayed frozen.""",
    """import json

sorted(path.name for path in result.run_dir.iterdir())""",
    """## The curve""",
    """import matplotlib.pyplot as plt

epochs = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
figure, axis = plt.subplots(figsize=(4, 2.2), layout="constrained")
axis.plot([epoch["epoch"] for epoch in epochs], [epoch["loss"] for epoch in epochs], marker="o")
axis.set(xlabel="epoch", ylabel="loss", xticks=[epoch["epoch"] for epoch in epochs])
figure""",
    """## Predict with the student

`load_student` reads the run's task folder: tuned parameters, classifier, class names and preprocessing. The frozen
network is named there, and checked by its hash.""",
    """import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

student = remap.load_student(result.run_dir)
images = [Image.fromarray(np.uint8(digit * 255 / 16)) for digit in load_digits().images[-6:]]
figure, axes = plt.subplots(1, 6, figsize=(5, 1.2), layout="constrained")
for axis, image, (name, probability) in zip(axes, images, student.predict(images), strict=True):
    axis.imshow(image, cmap="gray")
    axis.set_title(f"{name} ({probability:.0%})", fontsize=9)
    axis.axis("off")
figure""",
    """## A method on any model of timm

`attach` puts a method into a model that you have: all of it is frozen but what the method trains, and `detach` gives
the model back.""",
    """import timm

attached = remap.attach(timm.create_model("vit_tiny_patch16_224", num_classes=10), "lora", rank=4)
print(len(attached.trainable), "tensors are trained:", attached.trainable[0], "...")""",
    """## Onwards

[Your own photographs](start.md), [choosing a method](choosing.md), [shipping it to a device](export.md).""",
]


def is_code(position: int) -> bool:
    """Cells of words are followed by a cell of code; the first and the last are words."""
    return position % 2 == 1


def run(code: str, names: dict[str, Any]) -> list[dict]:
    """Run a cell, and return its outputs as a notebook has them."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None
    outputs: list[dict] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        data: dict[str, Any] = {"text/plain": lines(repr(value))}
        if hasattr(value, "savefig"):
            file = io.BytesIO()
            value.savefig(file, format="png", dpi=100, metadata={"Software": None})
            data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def lines(text: str) -> list[str]:
    """Return text as a notebook stores it."""
    return text.splitlines(keepends=True)


def notebook() -> dict:
    """Run all cells, and return the notebook."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict] = []
    for position, text in enumerate(CELLS):
        cell: dict[str, Any] = {"id": f"cell-{position}", "metadata": {}, "source": lines(text)}
        if is_code(position):
            outputs = run(text, names)
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = position // 2 + 1
            cell |= {"cell_type": "code", "execution_count": position // 2 + 1, "outputs": outputs}
        else:
            cell["cell_type"] = "markdown"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    page, here = PAGE.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"
        os.chdir(here)
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")
