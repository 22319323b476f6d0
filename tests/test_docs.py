"""The generated pages, drawings, index and notebook are what the code says now."""

import json
import re
from pathlib import Path
from typing import Any

import drawings
import first_run
import first_steps
import llms
import pytest
import timm
from reference_pages import PAGES, options

import remap
from remap.backbones.families import FAMILIES
from remap.recipe.option_listing import TABLE
from remap.tuning import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_page_of_python_has_every_public_name() -> None:
    explained = re.findall(r"^## remap\.(\w+)$", (DOCS / "python.md").read_text(), flags=re.MULTILINE)
    assert {*explained, "RemapError", "__version__"} == set(remap.__all__)  # the errors are in the text above


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run `python tools/reference_pages.py`"


def test_the_options_that_listings_show_are_those_of_the_classes() -> None:
    assert TABLE.read_text(encoding="utf-8") == options(), "run `python tools/reference_pages.py`"


def test_the_pages_give_the_figures_of_the_first_run() -> None:
    assert not first_run.problems(json.loads(first_run.FIGURES.read_text()))


def test_the_drawings_are_up_to_date() -> None:
    there = {path.name: path.read_text() for path in drawings.FOLDER.glob("*.svg")}
    assert there == drawings.drawings(), "run `python tools/drawings.py`"


def test_the_index_is_up_to_date() -> None:
    assert (DOCS / "llms.txt").read_text() == llms.index(), "run `python tools/llms.py`"


def test_the_notebook_has_the_cells_of_its_script_and_real_outputs() -> None:
    cells = json.loads(first_steps.PAGE.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == first_steps.CELLS, "run `python tools/first_steps.py`"
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert all(outputs) and "error" not in {output["output_type"] for found in outputs for output in found}
    assert first_steps.PAGE.stat().st_size < 100_000


# Where a module is in the drawing; q, k and v are one layer of timm.
BOXES = {
    r"patch_embed|cls_token|pos_embed": "embed",
    r"blocks\.\d+\.norm1": "norm1",
    r"blocks\.\d+\.attn\.qkv|blocks\.\d+\.remap_\w+_[qv]$": "qkv",
    r"blocks\.\d+\.attn\.proj": "o",
    r"blocks\.\d+\.norm2": "norm2",
    r"blocks\.\d+\.mlp\.fc1": "fc1",
    r"blocks\.\d+\.mlp\.fc2": "fc2",
    r"norm\.": "norm",
}
# What is no change of a box, or is shared by several and stands beside them.
ELSEWHERE = r"remap_|blocks\.\d+\.(remap_|attn\.remap_)"


def _box(parameter: str) -> str:
    module = parameter if parameter in ("cls_token", "pos_embed") else parameter.rpartition(".")[0] + "."
    found = [box for path, box in BOXES.items() if re.match(path.replace("$", r"\."), module)]
    assert found or re.match(ELSEWHERE, parameter), parameter
    return found[0] if found else ""


def test_coloured_boxes_are_those_that_a_method_trains() -> None:
    """Source: the names of the parameters that are trained once a method of that kind is attached to a timm model."""
    fitting = [row for row in METHODS if row.vit_base is not None and row.fits(FAMILIES.row("vit").parts)]
    rows = {
        drawings.of_method(row): row for row in reversed(fitting) if drawings.of_method(row)
    }  # the first of each kind
    compared = 0
    for kind, row in rows.items():
        model: Any = timm.create_model("test_vit", num_classes=3)
        boxes = {_box(name) for name in remap.attach(model, row.name).trainable} - {""}
        drawing = drawings.KINDS[kind]
        coloured = {"qkv" if box in "qkv" else box for box in (*drawing.trained, *drawing.tags)}
        # Queries and key-value prompts are inputs of attention, and FacT's factors belong to the model.
        if kind not in ("e2vpt", "vqt", "delta_all"):
            assert coloured == boxes, kind
            compared += bool(boxes)
    assert compared >= 10
