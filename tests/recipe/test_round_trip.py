"""What is written reads back equal; what means the same has the same digest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remap.data.augmentation import Augmentation
from remap.recipe import Recipe, catalogue, dump, load, resolve
from remap.recipe.schema import TrainSpec, is_idle
from remap.remapping import LOSSES
from remap.tuning import METHODS

_RECIPES = (Path(__file__).resolve().parents[2] / "recipes").rglob("*.yaml")
SHIPPED = sorted(path for path in _RECIPES if path.parent.name != catalogue.SUITES)
# Fields that cannot change what a run learns: its name, when it looks and saves, and how many hands and how much room
# it has.
SILENT = [
    "name=other",
    "train.eval_every=7",
    "train.checkpoint_seconds=1",
    "train.processes=2",
    "train.parallel=fsdp2",
    "train.track=tensorboard",
    "data.workers=3",
    "data.memory_gib=0.5",
]


def test_the_catalogue_is_the_folder() -> None:
    root = catalogue.folder()
    assert SHIPPED and [root / f"{name}.yaml" for name in catalogue.names()] == SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_explained_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    name = path.relative_to(catalogue.folder()).with_suffix("").as_posix()
    recipe = resolve(name, check_options=True)
    assert len(catalogue.summary(name)) > 20 and path.read_text(encoding="utf-8").startswith("# ")
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    again = load(tmp_path / "recipe.yaml")
    assert again == recipe and dump(again) == dump(recipe) and again.digest() == recipe.digest()


@pytest.mark.parametrize(
    "word", ["1e5", "010", "08", "off", "a b", "ä", "~", "data: x", "'", " ", "caf\udce9"], ids=ascii
)
def test_any_path_survives_the_round_trip(tmp_path: Path, word: str) -> None:
    recipe = Recipe.model_validate({"data": {"source": word}, "student": {"model": word}})
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(tmp_path / "recipe.yaml") == recipe


def test_every_method_and_loss_survives_with_its_options(tmp_path: Path) -> None:
    losses = [{"name": row.name, **row.load().Config().model_dump(mode="json")} for row in LOSSES]
    for row in METHODS:
        method = {"name": row.name, **row.load().Config().model_dump(mode="json")}
        fitting = [loss for loss in losses if not is_idle(loss["name"], row.name)]
        data = {"target": "b", "augment": "light"}
        recipe = Recipe.model_validate({"teacher": "a", "method": method, "losses": fitting, "data": data})
        (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        assert load(tmp_path / "recipe.yaml") == recipe


def digest(**values: Any) -> str:
    return Recipe.model_validate(values).digest()


SAME = {
    "words for mappings": (
        {"teacher": "a", "student": "b", "method": "vpt_deep", "losses": "ce,kd:0.5"},
        {
            "losses": [{"name": "ce"}, {"weight": 0.5, "name": "kd"}],
            "method": {"name": "vpt_deep"},
            "student": {"model": "b"},
            "teacher": {"model": "a"},
        },
    ),
    "defaults written out": ({}, {"seed": 0, "losses": "ce", "train": {"epochs": 30}, "data": {"augment": "none"}}),
    "whole numbers for fractions": ({"train": {"lr": 1, "clip_norm": 1}}, {"train": {"lr": 1.0}}),
    "the objective's default": ({"teacher": "a"}, {"teacher": "a", "losses": "ce:1,kd:1,attention:1"}),
    # Defaults of VPT-deep (Jia et al. 2022, official configuration) and of the table.
    "the method's defaults": ({"method": "vpt_deep"}, {"method": {"name": "vpt_deep", "dropout": 0.1}}),
    "the method's learning rate": ({"method": "full"}, {"method": "full", "train": {"base_lr": 3e-4}}),
    "an option as a whole number": (
        {"losses": [{"name": "ce", "label_smoothing": 0}]},
        {"losses": [{"name": "ce", "label_smoothing": 0.0}]},
    ),
}


@pytest.mark.parametrize(("left", "right"), SAME.values(), ids=list(SAME))
def test_recipes_that_mean_the_same_have_one_digest(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert digest(**left) == digest(**right)


# Source: the digests that version 0.1 at commit ea074a7 computed for the same recipes. A run whose digest changes
# cannot be resumed, nor can a comparison reuse its cells. The method is spelled out: the default was vpt_deep then.
RECORDED = {
    "c3792f060b173e56": {"method": "vpt_deep"},
    "23443628102a5590": {"name": "two", "method": "vpt_deep", "teacher": ["a", {"model": "b", "weight": 2}]},
    "e6637e10b4c85516": {"method": "vpt_deep", "teacher": ["a", "b"], "more_teachers": ["ema"]},
    "ba1b634a085d4d26": {
        "teacher": {"model": "a", "prepare": "full", "epochs": 2},
        "student": "vit_tiny",
        "method": "vpt_deep",
    },
    "ca8a498481aa8a7a": {
        "teacher": "a",
        "method": {"name": "vpt_deep+lora", "lora": {"rank": 4}},
        "losses": ["ce", {"name": "kd", "weight": 0.5, "temperature": 2}],
    },
    "8b1e7fe3413dd244": {
        "teacher": "vit_base",
        "student": "shrink(teacher, depth=6, width=384)",
        "method": "vpt_deep",
    },
}


@pytest.mark.parametrize(("recorded", "values"), RECORDED.items(), ids=list(RECORDED))
def test_digests_of_earlier_versions_hold(recorded: str, values: dict[str, Any]) -> None:
    assert digest(**values) == recorded


def test_options_added_later_leave_the_digest_at_their_defaults() -> None:
    """Source: digests that commit 2d6e479 computed, for each method, loss and initialisation it had.

    Options were added to some of them since (``LATER``): normalize, hidden, masked, quota, segments.
    """
    losses = ["ce", "kd"]
    recipes: dict[str, Callable[[str], dict[str, Any]]] = {
        "method": lambda name: {"method": name, "losses": ["ce"]},
        "loss": lambda name: {
            "teacher": "mini_teacher",
            "method": "vpt_deep",
            "losses": list(dict.fromkeys(["ce", name])),
        },
        "init": lambda name: {"teacher": "mini_teacher", "student": {"init": name}, "method": "lora", "losses": losses},
    }
    recorded = json.loads((Path(__file__).parent / "recorded_digests.json").read_text())
    for kind, digests in recorded.items():
        assert {name: digest(**recipes[kind](name)) for name in digests} == digests


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        ({"losses": [{"name": "tokens"}]}, {"losses": [{"name": "tokens", "normalize": "phi_s"}]}),
        ({"losses": [{"name": "mgd"}]}, {"losses": [{"name": "mgd", "masked": "channels", "mask": 0.5}]}),
        ({"method": {"name": "e2vpt"}}, {"method": {"name": "e2vpt", "quota": "all"}}),
        ({"method": {"name": "e2vpt+lora"}}, {"method": {"name": "e2vpt+lora", "e2vpt": {"quota": "all"}}}),
        ({"data": {"alpha": "white"}}, {"data": {"alpha": "black"}}),
        ({"data": {"depth": 1}}, {"data": {"depth": 2}}),
    ],
)
def test_options_added_later_count_elsewhere(plain: dict[str, Any], other: dict[str, Any]) -> None:
    assert digest(teacher="a", **plain) != digest(teacher="a", **other)


def test_several_teachers_are_written_as_earlier_versions_read_them(tmp_path: Path) -> None:
    """A mapping for one and a list for several under ``teacher``, and no key they do not know."""
    for words, kind in ((None, type(None)), ("a", dict), ("a,b:0.5", list)):
        recipe = resolve(words={"teacher": words})
        written = recipe.model_dump(mode="json")
        assert isinstance(written["teacher"], kind) and not {"teachers", "more_teachers"} & set(written)
        (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        assert load(tmp_path / "recipe.yaml") == recipe


def test_a_misspelt_field_of_a_copy_is_an_error() -> None:
    with pytest.raises(AssertionError, match="teacher"):
        Recipe().model_copy(update={"teacher": None})


@pytest.mark.parametrize("setting", SILENT)
def test_fields_that_decide_nothing_leave_the_digest(setting: str) -> None:
    assert resolve(settings=[setting]).digest() == Recipe().digest()


def test_the_places_of_images_count_only_where_they_are_asked_for() -> None:
    there = resolve(settings=["data.source=/there", "data.val_source=/val"])
    assert there.digest() != Recipe().digest() and there.digest(places=False) == Recipe().digest(places=False)
    assert resolve(settings=["seed=1"]).digest(places=False) != Recipe().digest(places=False)


def test_every_other_field_changes_the_digest() -> None:
    base = Recipe.model_validate({"teacher": "a"})
    other: dict[type, Any] = {str: "other", int: 77, float: 0.77}
    seen = {base.digest()}
    for section in ("data", "teacher", "student", "train"):
        for name, value in getattr(base, section).model_dump().items():
            if any(setting.startswith(f"{section}.{name}=") for setting in SILENT) or name in (
                "init",
                "shrink",
                "shard",
                "augment",  # and its operations: test_data_fields.py
                *Augmentation.model_fields,
            ):
                continue
            changed = (
                not value
                if isinstance(value, bool)
                else {"templates": ("a {}",), "descriptions": {"one": ("it is one",)}}[name]
                if name in ("templates", "descriptions")  # written out as what the files say
                else other[type(value)]
                if value is not None
                else "other"
                if name in ("val_source", "unlabeled", "target", "memory", "extends")
                or (section, name) == ("teacher", "classes")
                else ("one", "other")
                if name in ("classes", "known_classes", "only")
                else [0.0, 5.0]
                if name == "value_range"
                else 5
            )
            spec = getattr(base, section).model_copy(update={name: changed})
            update = {"teachers": (spec,)} if section == "teacher" else {section: spec}
            found = base.model_copy(update=update).digest()
            assert found not in seen, f"{section}.{name}"
            seen.add(found)
    inits = ({"student": {"init": init}} for init in ("layers", "subclone", {"name": "layers", "which": "last"}))
    shrunk = ({"student": f"shrink(teacher, {option})"} for option in ("depth=2", "width=64", "depth=2, images=8"))
    words = ({"seed": 1}, {"method": "bitfit"}, {"losses": "ce:2"}, {"losses": "ce,kd,attention:2"})
    for values in (*words, *inits, *shrunk):
        found = digest(**{"teacher": "a", **values})
        assert found not in seen
        seen.add(found)
    assert len(seen) > len(TrainSpec.model_fields) + 10


def test_the_learning_rate_is_the_methods_unless_given() -> None:
    for row in METHODS:
        assert resolve(words={"method": row.name}).learning_rate(128) == row.lr
        assert resolve(words={"method": row.name}).learning_rate(512) == row.lr / 4
        assert resolve(words={"method": row.name, "lr": 0.5}).learning_rate(768) == 0.5
    assert resolve(words={"method": "vpt_deep+lora"}).learning_rate(128) == METHODS.row("lora").lr, "the smaller one"
    assert resolve(settings=["train.base_lr=0.2"]).learning_rate(256) == 0.1
