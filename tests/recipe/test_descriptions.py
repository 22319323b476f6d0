"""Every option says what it is, and listings and docs show exactly that."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from remap.recipe import Recipe
from remap.recipe.option_listing import notes_of, rows_of_config
from remap.recipe.schema import (
    DataSpec,
    InitSpec,
    LossSpec,
    MethodSpec,
    ModelSpec,
    ShrinkSpec,
    StudentSpec,
    TeacherSpec,
    TrainSpec,
)
from remap.remapping import LOSSES
from remap.remapping.weights import INITS
from remap.tuning import METHODS

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = [
    Recipe, DataSpec, ModelSpec, TeacherSpec, StudentSpec, ShrinkSpec, InitSpec, MethodSpec, LossSpec, TrainSpec,
]  # fmt: skip
CONFIGS: dict[str, type[BaseModel]] = {
    **{section.__name__: section for section in SECTIONS},
    **{f"{table.kind} {row.name}": row.load().Config for table in (METHODS, LOSSES, INITS) for row in table},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_described_in_one_short_sentence(name: str) -> None:
    for option, field in CONFIGS[name].model_fields.items():
        text = field.description or ""
        assert text.endswith(".") and len(text) < 200 and "``" not in text and "\n" not in text, option


_CATEGORY_PAGES = [f"{kind}-tuning.md" for kind in ("fine", "prompt", "adapter", "parameter")] + ["remapping.md"]


@pytest.mark.parametrize(("table", "pages"), [(METHODS, _CATEGORY_PAGES), (LOSSES, ["losses.md"])])
def test_the_docs_show_the_descriptions(table: Any, pages: list[str]) -> None:
    lines = [line for page in pages for line in (DOCS / page).read_text(encoding="utf-8").splitlines()]
    for row in table:
        for option, field in row.load().Config.model_fields.items():
            assert any(
                line.lstrip().startswith(f"- `{option}=") and line.endswith(f": {field.description}") for line in lines
            ), (row.name, option)


def test_notes_are_what_the_class_says_of_no_option_in_particular() -> None:
    assert notes_of("e2vpt").startswith("Pruning is off by default")
    assert notes_of("dora").startswith("A fused q, k, v layer is one layer"), "its options' base class says so"
    assert notes_of("vpt_deep") == notes_of("full") == "", "'Options.' says nothing"
    assert notes_of("vpt_deep+lora") == f"lora: {notes_of('lora')}"


def test_a_row_has_the_kind_default_and_limits_of_the_field() -> None:
    rows = {row["name"]: row for row in rows_of_config(METHODS.load("lora").Config)}
    assert (rows["rank"]["type"], rows["rank"]["default"], rows["rank"]["limits"]) == ("whole number", 8, ">= 1")
    assert rows["targets"]["allowed"] == ["q", "k", "v", "o", "fc1", "fc2", "linear", "conv"]
    assert (rows["alpha"]["type"], rows["alpha"]["default"]) == ("number or null", None)
