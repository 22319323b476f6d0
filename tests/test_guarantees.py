"""The page of guarantees: each has its tests, each test it names is there, each figure is of one of them."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "guarantees.py"))
ROWS, BESIDES = TOOL["ROWS"], TOOL["BESIDES"]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.compile(r"\btests/[a-z0-9_/]+\.py(?:::\w+)?")


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """All tests, as path::name."""
    return set(TOOL["tests"]())


def test_the_page_is_up_to_date() -> None:
    lines = (ROOT / "docs" / "guarantees.jsonl").read_text().splitlines()
    assert PAGE.read_text() == TOOL["page"](lines), "run `python tools/guarantees.py`"


def test_guarantees_are_numbered_in_order() -> None:
    assert [row.number for row in (*ROWS, *BESIDES)] == list(range(1, len(ROWS) + len(BESIDES) + 1))


def test_every_guarantee_has_a_test_and_every_mark_a_guarantee() -> None:
    """Source: the marks in the tests."""
    assert set(TOOL["marked"]()) == {row.number for row in (*ROWS, *BESIDES)}


def test_a_figure_of_a_test_that_is_not_there_is_refused() -> None:
    line = json.dumps({"test": "tests/test_gone.py::test_gone", "what": "runs finished", "value": 1, "of": 1})
    with pytest.raises(ValueError, match="tests/test_gone.py::test_gone"):
        TOOL["page"]([line])


@pytest.mark.parametrize(
    ("what", "value", "of", "holds"),
    [
        ("runs finished", 3, 3, True),
        ("runs finished", 2, 3, False),
        ("recipes fuzzed, tracebacks", 0, 300, True),
        ("recipes fuzzed, tracebacks", 1, 300, False),
        ("misspelt keys whose right one was named", 95, 100, True),
        ("misspelt keys whose right one was named", 94, 100, False),
        ("largest difference", 0.5, None, True),
    ],
)
def test_figures_that_break_a_guarantee_are_not_written(what: str, value: float, of: int | None, holds: bool) -> None:
    assert (TOOL["broken"]([{"test": "a", "what": what, "value": value, "of": of}]) == []) == holds


@pytest.mark.parametrize(
    "name",
    ["SECURITY.md", "README.md", "tests/not_quick.txt", *sorted(f"docs/{p.name}" for p in PAGE.parent.glob("*.md"))],
)
def test_tests_that_a_page_names_exist(tests: set[str], name: str) -> None:
    known = tests | {test.partition("::")[0] for test in tests}
    named = set(NAMED.findall((ROOT / name).read_text()))
    assert named <= known, f"{name} names {sorted(named - known)}"
    assert named or name not in ("SECURITY.md", "docs/guarantees.md")


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text())
    assert links and all((PAGE.parent / link).exists() for link in links)


def test_counts_are_added_and_the_largest_size_counts() -> None:
    """By hand: 3 + 4 of 3 + 5; the larger of 0.5 and 0.25."""
    lines = [
        {"test": "a", "what": "kept", "value": 3, "of": 3},
        {"test": "a", "what": "size", "value": 0.5, "of": None},
        {"test": "a", "what": "kept", "value": 4, "of": 5},
        {"test": "a", "what": "size", "value": 0.25, "of": None},
    ]
    figures = TOOL["added_up"](map(json.dumps, lines))
    assert TOOL["shown"](figures) == ["7 of 8 kept", "size: 0.5"]
