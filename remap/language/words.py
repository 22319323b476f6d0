"""What classes are called: words, templates and descriptions, from options and files. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remap.errors import DataError
from remap.io.checked_json import parse_json
from remap.io.checked_read import read_regular
from remap.io.names import name_problem, plain
from remap.io.paths import LONGEST_PATH, expanded
from remap.io.versions import install_command

# A template of CLIP, and the word for its 80 (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
ONE, CLIP = ("one", "a photo of a {}."), "clip"
MOST_BYTES = 2**26
# Texts, lists of them counted too, and letters as JSON that a recipe holds of these files. More stay in the files.
MOST_TEXTS, MOST_LETTERS = 1_500, 100_000


def split_classes(value: Any) -> Any:
    """Read "ant,bee" as two classes, and a list as a tuple; a text without a comma names a file.

    Raises:
        ValueError: There are fewer than two classes.
    """
    if isinstance(value, str) and '{"' in value:  # JSON has commas of its own
        raise ValueError("names and words in JSON are read from a file alone, with one class a line")
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, (list, tuple)):
        if len(value) < 2:
            raise ValueError("should be two classes or more, or a file of them")
        return tuple(value)
    return value


def class_words(given: Sequence[str] | str) -> dict[str, tuple[str, ...]]:
    """Return the words of each class, by its name, in order.

    Args:
        given: Classes, or a file of them (a line each, or JSON: a list, or name: word or list). A class is
            "hat|cap", whose name is its first word, "NAME: hat|cap", or for any name and words JSON: {"NAME": ["hat"]}.

    Raises:
        DataError: The file cannot be read, a name is given twice or is none, or there are fewer than two.
    """
    found: dict[str, tuple[str, ...]] = {}
    for number, entry in enumerate(_listed(given) if isinstance(given, str) else given, 1):
        name, words = _parts(entry)
        unfit = next(filter(None, map(name_problem, (name, *words))), None)
        if not words or not name or unfit or name in found:
            why = f"holds {unfit}" if unfit else "is given twice" if name in found else "has no word"
            shown = plain(entry)[:80] or f"class {number} is empty"
            raise DataError(f"a class {why}", given=shown, allowed="ant, hat|cap, or NAME: hat|cap")
        found[name] = words
    if len(found) < 2:
        raise DataError(
            "at least two classes are needed", given=", ".join(found) or "none", do='--classes "ant,bee", or a file'
        )
    return found


def _parts(entry: str) -> tuple[str, tuple[str, ...]]:
    """Return the name and the words of a class."""
    if entry.startswith('{"'):
        several = _mapping(entry[:80], _parsed(entry[:80], entry))
        if len(several) == 1:
            return next(iter(several.items()))
    name, colon, rest = entry.partition(": ")
    words = tuple(word for part in (rest if colon else entry).split("|") if (word := part.strip()))
    return name.strip() if colon else words[0] if words else "", words


def entries(words: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return what ``class_words`` reads back; in JSON where a name or a word holds what divides them."""

    def entry(name: str, several: tuple[str, ...]) -> str:
        plainly = f"{name}: {'|'.join(several)}"
        divides = plainly.startswith('{"') or _parts(plainly) != (name, several)
        return json.dumps({name: several}, ensure_ascii=False) if divides else plainly

    return tuple(entry(name, tuple(several)) for name, several in words.items())


def words_of(classes: Sequence[str], given: Sequence[str] | str | None) -> dict[str, tuple[str, ...]]:
    """Return the words of the classes of a run, in their order; the names of data are words, "_" is a space.

    Args:
        given: As for ``class_words``; None where the names say it.

    Raises:
        DataError: They are for other classes.
    """
    if given is None:
        return {name: (name.replace("_", " "),) for name in classes}
    found = class_words(given)
    if set(found) != set(classes):
        missing, unknown = [name for name in classes if name not in found], [n for n in found if n not in classes]
        raise DataError(
            "the words are for other classes than the data has",
            given="; ".join(
                f"{what}: {', '.join(map(plain, some[:8]))}"
                for what, some in (("without words", missing), ("not in the data", unknown))
                if some
            ),
            do='write "NAME: word|word" with the names of the data',
        )
    return {name: found[name] for name in classes}


def templates_of(word: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates, in which {} stands for a word.

    Args:
        word: "one", "clip", a file of a template a line, or its lines.

    Raises:
        DataError: The file cannot be read, or a line has no {}.
    """
    if word == ONE[0]:
        return (ONE[1],)
    if word == CLIP:
        try:
            from open_clip import OPENAI_IMAGENET_TEMPLATES
        except ImportError as error:
            raise DataError("the 80 templates of CLIP come with open_clip", do=install_command("clip")) from error
        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    lines = tuple(line for line in (_text(word).splitlines() if isinstance(word, str) else word) if line.strip())
    wrong = next((line for line in lines if line.count("{}") != 1), None)
    if not lines or wrong is not None:
        where = word if isinstance(word, str) else "data.templates"
        raise DataError(f"a template of {where} has not one {{}}", given=plain(wrong or "no line")[:80], allowed=ONE[1])
    return lines


def described(given: str | Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Return sentences on classes, by name.

    Args:
        given: A file: JSON of class: sentence, or a list of them; or what it says; None for none.

    Raises:
        DataError: The file cannot be read.
    """
    if isinstance(given, str):
        return _mapping(given, _json(given))
    return {name: tuple(several) for name, several in (given or {}).items()}


def descriptions_of(
    given: str | Mapping[str, Sequence[str]] | None, classes: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return what ``described`` does.

    Raises:
        DataError: It cannot be read, or is about other classes.
    """
    found = described(given)
    strange = [name for name in found if name not in classes]
    if strange:
        raise DataError(
            "data.descriptions are of other classes", given=plain(", ".join(strange[:8])), allowed=list(classes)[:20]
        )
    blank = [name for name, texts in found.items() if not all(text.strip() for text in texts)]
    if blank:  # the feature of an empty text would count in the mean of the class
        raise DataError("a description is empty", given=plain(", ".join(blank[:8])), do="write it, or leave it out")
    return found


def read_words(
    classes: Sequence[str] | str | None,
    templates: Sequence[str] | str,
    descriptions: Mapping[str, Sequence[str]] | str | None,
) -> dict[str, Any]:
    """Return what classes in a file, templates and descriptions say, by field, where there are any.

    Raises:
        DataError: A file cannot be read.
    """
    found: dict[str, Any] = {"classes": entries(class_words(classes))} if isinstance(classes, str) else {}
    if templates not in (ONE[0], CLIP):
        found["templates"] = templates_of(templates)
    if descriptions is not None:
        found["descriptions"] = described(descriptions)
    return found


def that_fit(words: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``read_words``, one after the other, that leave room in a recipe: its reader has bounds."""
    kept: dict[str, Any] = {}
    texts: list[str] = []
    for field, said in words.items():
        each = [one for name in said for one in (name, "", *said[name])] if isinstance(said, Mapping) else said
        more = [*texts, *each]
        few = len(more) <= MOST_TEXTS and len(json.dumps(more)) <= MOST_LETTERS
        if few and max(map(len, more), default=0) <= LONGEST_PATH:
            kept[field], texts = said, more
    return kept


def texts_of(
    words: Mapping[str, Sequence[str]], templates: Sequence[str], descriptions: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Return the texts of each class: every word in every template, and its descriptions."""
    return tuple(
        (*(template.replace("{}", word) for word in several for template in templates), *descriptions.get(name, ()))
        for name, several in words.items()
    )


def _listed(file: str) -> Sequence[str]:
    if expanded(file).suffix != ".json":
        text = _text(file, do='check the path; classes themselves are given with commas: --classes "ant,bee"')
        return [line.strip() for line in text.splitlines() if line.strip()]
    values = _json(file)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    return entries(_mapping(file, values))


def _json(file: str) -> Any:
    return _parsed(file, _text(file))


def _parsed(file: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"cannot read {file}: {plain(str(error))}") from error


def _mapping(file: str, values: Any) -> dict[str, tuple[str, ...]]:
    """Return one text or several of each class, by its name."""
    if isinstance(values, dict):
        found = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in values.items()}
        if all(isinstance(text, str) for several in found.values() for text in several):
            return found
    raise DataError(f"cannot read {file}: it is not a mapping of classes to a text each, or a list of texts")


def _text(file: str, do: str = "check the path") -> str:
    path: Path = expanded(file)
    try:
        return read_regular(path, MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is not text in UTF-8"
        raise DataError(f"cannot read {plain(str(path))}: {reason}", do=do) from error
