"""What classes are called: classes, templates and descriptions, from options and files."""

import json
from pathlib import Path
from typing import Any

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from remap.errors import DataError, RecipeError
from remap.language.words import class_words, descriptions_of, entries, templates_of, texts_of, words_of
from remap.recipe import resolve_distill
from remap.recipe.resolution import dump, load

WORDS = {"ant": ("ant",), "hat": ("hat", "cap"), "n01": ("bee, a small one",)}


def test_classes_are_read_from_options_and_files_alike(tmp_path: Path) -> None:
    listed = ["ant", "hat|cap", "n01: bee, a small one"]
    text, mapping, array = (tmp_path / name for name in ("classes.txt", "classes.json", "listed.json"))
    array.write_text(json.dumps(listed))
    assert class_words(str(array)) == WORDS
    text.write_text("\n".join([*listed, ""]))
    mapping.write_text(json.dumps({"ant": "ant", "hat": ["hat", "cap"], "n01": "bee, a small one"}))
    assert class_words(listed) == class_words(str(text)) == class_words(str(mapping)) == WORDS
    assert class_words(entries(WORDS)) == WORDS
    assert words_of(("n01", "hat", "ant"), listed) == {name: WORDS[name] for name in ("n01", "hat", "ant")}
    assert words_of(("a_bee", "hat"), None) == {"a_bee": ("a bee",), "hat": ("hat",)}


def test_names_and_words_may_hold_what_divides_them(tmp_path: Path) -> None:
    words = {"n01: a bee": ("bee",), "b": ("x|y", "z: w"), '{"c': ("é",), "d": ("d",)}
    (tmp_path / "classes.json").write_text(json.dumps(words))
    written = entries(words)
    assert written[3] == "d: d" and class_words(written) == class_words(str(tmp_path / "classes.json")) == words
    with pytest.raises(DataError, match="holds the control character"):
        class_words(['{"a": ["b\\u0000"]}', "b"])


def test_texts_are_words_in_templates_and_descriptions(tmp_path: Path) -> None:
    """CLIP's 80 are those of open_clip, each called with the word."""
    file = tmp_path / "templates.txt"
    file.write_text("a {} on a table\nthe {}\n")
    described = tmp_path / "descriptions.json"
    described.write_text(json.dumps({"hat": ["it is worn"]}))
    texts = texts_of({"hat": ("hat", "cap")}, templates_of(str(file)), descriptions_of(str(described), ["hat"]))
    assert texts == (("a hat on a table", "the hat", "a cap on a table", "the cap", "it is worn"),)
    assert texts_of({"a": ("ant",)}, templates_of("one"), {}) == (("a photo of a ant.",),)
    (eighty,) = texts_of({"a": ("ant",)}, templates_of("clip"), {})
    assert list(eighty) == [template("ant") for template in OPENAI_IMAGENET_TEMPLATES] and len(eighty) == 80


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["ant"], "at least two classes"),
        (["ant", "ant|x"], "is given twice"),
        (["ant", " | "], "has no word"),
        (["ant", "b\x00e"], "control character"),
        ("missing.txt", "cannot read .*missing.txt"),
    ],
)
def test_classes_are_refused_in_a_sentence(given: list[str] | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_words(given)


def test_words_of_other_classes_and_templates_without_a_word_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="for other classes than the data has"):
        words_of(("ant", "bee"), ["ant", "wasp"])
    (tmp_path / "t.txt").write_text("a photo")
    with pytest.raises(DataError, match="has not one {}"):
        templates_of(str(tmp_path / "t.txt"))
    (tmp_path / "d.json").write_text('["hat", "hat", "ant"]')
    with pytest.raises(DataError, match="is given twice"):
        class_words(str(tmp_path / "d.json"))
    for wrong in ('["ant"]', '{"ant": null}', '{"ant": [1]}', '{"ant": {"a": "b"}}'):
        (tmp_path / "d.json").write_text(wrong)
        with pytest.raises(DataError, match="not a mapping of classes to a text"):
            descriptions_of(str(tmp_path / "d.json"), ["ant"])
    (tmp_path / "d.json").write_text('{"wasp": "it stings"}')
    with pytest.raises(DataError, match="are of other classes"):
        descriptions_of(str(tmp_path / "d.json"), ["ant"])


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ({"data": "D", "classes": "a,b"}, [], "no vision-language model reads them"),
        (
            {"unlabeled": "U", "classes": "a,b", "templates": "clip"},
            ["teacher.prepare=none"],
            "no vision-language model",
        ),
        ({"unlabeled": "U", "classes": "a,b"}, [], "teacher.prepare: there are no labelled images"),
        (
            {"unlabeled": "U", "classes": "a,b", "teacher": "clip:mini", "losses": "ce"},
            [],
            "learns from images without",
        ),
        (
            {"unlabeled": "U", "classes": "a,b", "teacher": "clip:mini"},
            ["data.only=a"],
            "data.only: there are no labelled images",
        ),
        ({"data": "D", "teacher": "clip:mini"}, ["teacher.prepare=none"], "brings no classifier"),
        ({"data": "D", "teacher": "vit_tiny"}, ["teacher.prepare=words"], "reads no words"),
        (
            {"unlabeled": "U", "val_data": "V", "teacher": "clip:mini"},
            [],
            "data.val_source: there are no labelled images",
        ),
    ],
)
def test_what_nothing_reads_is_refused(words: dict[str, Any], settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_distill(None, words, settings)


def test_a_recipe_says_what_was_chosen(tmp_path: Path) -> None:
    """Files of words may change, or be on another machine: the run's recipe has what they said."""
    files = {name: tmp_path / name for name in ("classes.txt", "templates.txt", "descriptions.json")}
    files["classes.txt"].write_text("ant\nhat|cap\n")
    files["templates.txt"].write_text("a {}\nthe {}\n")
    files["descriptions.json"].write_text('{"hat": "it is worn"}')
    words = {
        "unlabeled": "U", "teacher": "clip:mini", "method": "lora", "classes": str(files["classes.txt"]),
        "templates": str(files["templates.txt"]),
    }  # fmt: skip
    recipe = resolve_distill(None, words, [f"data.descriptions={files['descriptions.json']}"])
    assert (recipe.teachers[0].prepare, [loss.name for loss in recipe.losses]) == ("words", ["kd"])
    assert recipe.data.unlabeled_only and not recipe.label_free
    written = recipe.written_out()
    assert written.data.classes == ("ant: ant", "hat: hat|cap")
    assert written.data.templates == ("a {}", "the {}") and written.data.descriptions == {"hat": ("it is worn",)}
    digest = recipe.digest()
    for file in files.values():
        file.unlink()
    (tmp_path / "recipe.yaml").write_text(dump(written))
    again = load(tmp_path / "recipe.yaml")
    assert again == written == again.written_out() and again.digest() == digest


def test_many_words_stay_in_their_file(tmp_path: Path) -> None:
    """A recipe that lists 600 classes with two sentences each is longer than its reader takes, and could not resume."""
    classes, file = [f"c{number}" for number in range(600)], tmp_path / "descriptions.json"
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    file.write_text(json.dumps({name: ["it is red", "it is small"] for name in classes}))
    words = {"unlabeled": "U", "teacher": "clip:mini", "method": "lora", "classes": str(tmp_path / "classes.txt")}
    recipe = resolve_distill(None, words, [f"data.descriptions={file}"])
    written = recipe.written_out()
    assert written.data.classes == tuple(f"{name}: {name}" for name in classes)
    assert written.data.descriptions == str(file)
    (tmp_path / "recipe.yaml").write_text(dump(written))
    again, digest = load(tmp_path / "recipe.yaml"), recipe.digest()
    assert again == written and again.digest() == digest
    file.write_text(json.dumps({name: ["it is red", "it is large"] for name in classes}))
    assert again.digest() != digest, "what the file says counts"
