"""The tables: lazy, closed, and helpful about a misspelt name."""

import pytest

from remap.errors import RecipeError, UnknownName
from remap.pipeline.comparison_cells import chosen_methods
from remap.recipe import resolve
from remap.registry import Entry, Registry, did_you_mean, nearest
from remap.remapping import LOSSES
from remap.tuning import CATEGORIES, METHODS, method_problems


def row(name: str, target: str = "no.such.module:Nothing") -> Entry:
    return Entry(name=name, target=target, category="c", summary="s", paper="p")


def test_listing_imports_nothing_and_loading_does() -> None:
    table = Registry("method", "methods", [row("later"), row("pair", "fractions:Fraction")])
    assert [entry.name for entry in table] == ["later", "pair"] == list(table.names)
    assert table.load("pair")(1, 2) == 0.5
    with pytest.raises(ModuleNotFoundError):
        table.load("later")


def test_a_name_cannot_stand_in_the_table_twice() -> None:
    with pytest.raises(ValueError, match="'a' is in the table twice"):
        Registry("method", "methods", [row("a"), row("a")])


@pytest.mark.parametrize(("word", "meant"), [("lroa", "lora"), ("roda", "road"), ("ls", "ls")])
def test_two_letters_that_were_swapped_are_the_likeliest_slip(word: str, meant: str) -> None:
    assert nearest(word, ["lora", "road", "ls"]) == meant


@pytest.mark.parametrize(("word", "nearest"), [("vpt_dep", "; did you mean 'vpt_deep'?"), ("zzzz", "")])
def test_unknown_name_says_the_nearest_or_all_names_and_the_command(word: str, nearest: str) -> None:
    with pytest.raises(UnknownName) as caught:
        METHODS.row(word)
    text = " ".join(str(caught.value).split())  # the list breaks between names
    assert f"unknown method '{word}'{nearest}" in text and "`remap methods`" in text
    assert (", ".join(METHODS.names) in text) == (not nearest)
    assert caught.value.exit_code == 2


def test_all_unknown_names_are_one_error_and_the_table_is_listed_once() -> None:
    with pytest.raises(UnknownName) as caught:
        chosen_methods("vpt_dep,xyz,zzzz+lora,promt")
    meant = "'vpt_dep' (did you mean 'vpt_deep'?), 'xyz', 'zzzz', 'promt' (did you mean 'prompt'?)"
    assert caught.value.what == f"unknown methods {meant}" and caught.value.allowed is None
    with pytest.raises(UnknownName) as far:
        chosen_methods("xyz,zzzz")
    assert str(far.value).count("vpt_deep,") == 1 and far.value.what == "unknown methods 'xyz', 'zzzz'"
    with pytest.raises(UnknownName, match=r"unknown remappings 'subclon' \(did you mean 'subclone'\?\), 'xyz'"):
        chosen_methods("full@subclon,lora@xyz")
    for word in ("xyz+zzzz", "xyz,zzzz", "xyz+lora,zzzz"):
        (line,) = method_problems("method.name", word)
        assert line.startswith("method.name: unknown methods 'xyz', 'zzzz' (allowed: ") and line.count("vpt_deep,") == 1
    (line,) = method_problems("method.name", "lora,")
    assert line.startswith("method.name: unknown method 'lora,'; did you mean 'lora'?")
    with pytest.raises(RecipeError) as losses:
        resolve(words={"losses": "ce,xyz,kdd"})
    (line,) = losses.value.problems
    assert line.startswith("losses[1].name, losses[2].name: unknown losses 'xyz', 'kdd' (did you mean 'kd'?)")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("vpt_shalow", "vpt_shallow"),
        ("VPT_DEEP", "vpt_deep"),
        ("Bitfit", "bitfit"),
        ("KD", None),
        ("xyz", None),
        ("zzzz", None),
    ],
)
def test_nearest_is_blind_to_case_and_silent_about_strangers(word: str, expected: str | None) -> None:
    assert nearest(word, METHODS.names) == expected
    assert did_you_mean(word, METHODS.names) == (f"; did you mean '{expected}'?" if expected else "")


def test_short_loss_names_are_found_in_capitals() -> None:
    assert nearest("KD", LOSSES.names) == "kd"


@pytest.mark.parametrize("table", [METHODS, LOSSES], ids=["methods", "losses"])
def test_every_row_can_be_loaded_and_is_filled_in(table: Registry) -> None:
    for entry in table:
        assert table.load(entry.name).Config.model_config["extra"] == "forbid"
        assert entry.summary and entry.paper and entry.target.startswith("remap.")


def test_method_categories_are_those_of_the_survey() -> None:
    """Yu et al., arXiv 2305.06061: fine-tuning, prompt, adapter and parameter tuning (remapping has its own table)."""
    assert list(CATEGORIES) == ["fine-tuning", "prompt", "adapter", "parameter", "remapping"]
    assert {entry.category for entry in METHODS} <= set(CATEGORIES)
