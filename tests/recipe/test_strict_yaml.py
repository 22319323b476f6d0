"""Strict YAML: numbers and words as YAML 1.2 reads them, and nothing that is more than data."""

import json
from pathlib import Path
from typing import Any

import pytest

from remap.errors import RecipeError
from remap.recipe import strict_yaml


def parse(text: str) -> Any:
    return strict_yaml.parse(text, "here")


def problem(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.where == "here" and len(caught.value.problems) == 1
    return caught.value.problems[0]


# YAML 1.2.2, section 10.3.2 (core schema): numbers in base ten, true/false/null, anything else is a word. What the
# core schema has beyond a recipe's needs (0o14, 0x3A, .inf, .nan) stays a word here, and so fails as a number.
PLAIN = {
    "3e-4": 3e-4, "1e5": 1e5, "-1": -1, "+1": 1, ".5": 0.5, "-.5": -0.5, "1.": 1.0, "12e03": 12000.0, "0.": 0.0,
    "010": 10, "0": 0, "-0.0": -0.0, "1.5E+2": 150.0,
    "true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None,
    "off": "off", "on": "on", "yes": "yes", "no": "no", "y": "y", "Off": "Off",
    "1_000": "1_000", "0x10": "0x10", "1:30": "1:30", "2020-01-01": "2020-01-01", "1e": "1e", "1e5.5": "1e5.5",
    ".nan": ".nan", "-.inf": "-.inf", "=": "=", "<<": "<<", "e5": "e5", ".": ".", "+": "+", "'1'": "1", '"off"': "off",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), PLAIN.items(), ids=list(PLAIN))
def test_plain_scalars(text: str, value: Any) -> None:
    for found in (parse(text), *([parse(f"a: {text}")["a"], parse(f"[{text}]")[0]] if text else [])):
        assert found == value and type(found) is type(value)


def test_structures() -> None:
    text = "a: {b: [1, two, {c: null}]}  # comment\nd:\n  - x\n  - y: 1\n"
    assert parse(text) == {"a": {"b": [1, "two", {"c": None}]}, "d": ["x", {"y": 1}]}


REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3, column 1: key 'a' is given twice",
    "a: {b: 1, b: 1}": "line 1, column 11: key 'b' is given twice",
    "a: 1\n'a': 2": "line 2, column 1: key 'a' is given twice",
    "a: &x 1": "line 1, column 4: anchors (&name) are not allowed",
    "&x a: 1": "line 1, column 1: anchors (&name) are not allowed",
    "a: [1]\nb: *a": "line 2, column 4: aliases (*name) are not allowed",
    "1: a": "line 1, column 1: key 1 is not a word",
    "true: a": "line 1, column 1: key True is not a word",
    "? [a]\n: 1": "line 1, column 3: key ['a'] is not a word",
    "a: 1e400": "line 1, column 4: the number is too large",
    f"a: {'9' * 4000}": "line 1, column 4: the number is too large",
    "a: 1\n---\nb: 2": "line 2, column 1: but found another document",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items(), ids=[text[:12] for text in REFUSED])
def test_refusals_name_the_line(text: str, expected: str) -> None:
    assert problem(text) == expected


@pytest.mark.parametrize("tag", ["!import_call", "!join", "!!bool", "!!int", "!!binary", "!!set", "!!timestamp", "!"])
def test_no_tag_is_read(tag: str) -> None:
    assert problem(f"a: {tag} x") == "line 1, column 4: tags (!name) are not allowed"


def test_a_tag_that_would_run_code_runs_none(tmp_path: Path) -> None:
    """The payload that PyYAML's unsafe loader runs (its CVE-2020-14343 family)."""
    mark = tmp_path / "made"
    for text in (f"!!python/object/apply:os.mkdir ['{mark}']", f"!!python/object/new:os.mkdir ['{mark}']"):
        assert "tags (!name) are not allowed" in problem(text)
    assert not mark.exists()


@pytest.mark.parametrize("text", ["{a: 1", "a: 'x", "a: @b", "\t", "a: b: c", "\x00", "- a\nb: 1", "%YAML 9.9\n---\na"])
def test_broken_yaml_is_one_problem(text: str) -> None:
    assert problem(text)


@pytest.mark.parametrize("text", ["[" * 20_000, "{a: " * 20_000, "- " * 400, "[" * 40 + "]" * 40])
def test_deep_nesting_is_refused_early(text: str) -> None:
    assert f"more than {strict_yaml.MAX_DEPTH} levels deep" in problem(text)


def test_nesting_up_to_the_limit_is_read() -> None:
    depth = strict_yaml.MAX_DEPTH
    assert str(parse("[" * depth + "]" * depth)).count("[") == depth


def read(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "my.yaml"
    path.write_bytes(data)
    return strict_yaml.read_mapping(path)


def test_empty_files_and_byte_order_marks(tmp_path: Path) -> None:
    assert read(tmp_path, b"") == {} == read(tmp_path, b"# nothing yet\n")
    assert read(tmp_path, b"\xef\xbb\xbfname: \xc3\xa4\r\nseed: 1\r\n") == {"name": "ä", "seed": 1}


BROKEN_FILES = {
    "no mapping": (b"- a\n- b", "should be a mapping of keys, got list"),
    "a word": (b"digits", "should be a mapping of keys, got str"),
    "latin-1": (b"name: \xe4", "is not UTF-8 text"),
    "utf-16": ("name: a".encode("utf-16"), "is not UTF-8 text"),
    "large": (b"#" * 256_001, "is larger than 256,000 bytes"),
    "large in wide letters": ("ä".encode() * 150_000, "is larger than 256,000 bytes"),
    "tag": (b"a: 1\nb: !x 2", "line 2, column 4: tags (!name) are not allowed"),
}


@pytest.mark.parametrize(("data", "expected"), BROKEN_FILES.values(), ids=list(BROKEN_FILES))
def test_a_broken_file_is_named(tmp_path: Path, data: bytes, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path / 'my.yaml'}: 1 problem\n  - {expected}")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        strict_yaml.read_mapping(tmp_path)


WORDS = [
    *PLAIN,
    "1e5",
    "08",
    "3e-4",
    "a: b",
    "# x",
    " x ",
    "a\nb",
    "",
    "'",
    "ä 蟻",
    "null",
    "!x",
    "&x",
    "*x",
    "\x85",
    "1." * 60,
]


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_word_comes_back_as_the_same_word(word: str) -> None:
    assert parse(strict_yaml.dump({"a": word, "b": [word]})) == {"a": word, "b": [word]}


@pytest.mark.parametrize("value", [1e-5, 1e22, 5e-324, 1.7976931348623157e308, 0.1, -0.0, 10, -7, 2**63, True, None])
def test_a_number_comes_back_as_the_same_number(value: Any) -> None:
    found = parse(strict_yaml.dump({"a": value}))["a"]
    assert repr(found) == repr(value)


def test_names_of_classes_count_a_tenth() -> None:
    """A thousand classes extended by a thousand; other values in their lists, and other lists, count in full."""
    names = [f"class {n}" for n in range(2_000)]
    recipe = {"data": {"known_classes": names, "only": names[1_000:]}}
    assert parse(strict_yaml.dump(recipe)) == recipe
    most = {"data": {"only": ["b"] * 19_950}}  # two mappings and two keys, and the list: 5 values
    assert parse(json.dumps(most)) == most
    nested = {"only": [[name] for name in names]}
    for value in ({"data": {"only": ["b"] * 19_951}}, {"losses": names}, nested, {"only": {"names": names}}):
        with pytest.raises(RecipeError, match="2,000 values"):
            parse(json.dumps(value))
        with pytest.raises(RecipeError, match="could not be read back"):
            strict_yaml.dump(value)


def test_words_that_other_readers_take_for_something_else_are_quoted() -> None:
    """YAML 1.1, which most readers still speak, has off and yes as booleans and 1:30 in base sixty."""
    for word in ("off", "yes", "1:30", "0x10", "2020-01-01"):
        assert strict_yaml.dump({"a": word}) == f"a: '{word}'\n"


@pytest.mark.parametrize("value", [["b"] * 1_997, [{"b": n} for n in range(665)], {f"k{n}": [n] for n in range(665)}])
def test_what_is_written_can_be_read(value: Any) -> None:
    """The writer counts as the reader does, and refuses what that would refuse."""
    assert parse(strict_yaml.dump({"a": value})) == {"a": value}
    more = [*value, *value[:2]] if isinstance(value, list) else value | {"more": [1, 2, 3]}
    with pytest.raises(RecipeError, match="2,000 values"):
        parse(json.dumps({"a": more}))
    with pytest.raises(RecipeError, match="could not be read back"):
        strict_yaml.dump({"a": more})
