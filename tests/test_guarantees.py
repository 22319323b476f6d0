"""The page of guarantees: every promise has its tests, every test it names is there, every figure is theirs."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "guarantees.py"))
ROWS, BESIDES, SOAK = TOOL["ROWS"], TOOL["BESIDES"], TOOL["SOAK"]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.compile(r"\btests/[a-z0-9_/]+\.py(?:::\w+)?")


def test_the_page_is_up_to_date() -> None:
    lines = (ROOT / "docs" / "guarantees.jsonl").read_text().splitlines()
    assert PAGE.read_text() == TOOL["page"](lines), "run `python tools/guarantees.py`"


def test_the_page_has_the_twenty_promises_in_order() -> None:
    found = re.findall(r"^## (\d+)\. (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    assert found == [(str(row.number), row.title) for row in ROWS]
    assert [row.number for row in ROWS] == list(range(1, 21))


@pytest.mark.parametrize("row", [*ROWS, *BESIDES], ids=lambda row: str(row.number))
def test_every_promise_is_held_and_measured(row: object) -> None:
    """Source: the marks in the tests, and what those tests noted in the run the page was written from."""
    held = TOOL["marked"]().get(row.number, [])
    assert held, f"no test is marked guarantee({row.number})"
    figures = [json.loads(line) for line in (ROOT / "docs" / "guarantees.jsonl").read_text().splitlines()]
    own = [figure for figure in figures if figure.get("test") in held]
    assert own, f"no figure of {held}"
    counts = [figure for figure in own if figure["of"] is not None]
    assert [figure for figure in counts if not _kept(figure)] == []


def _kept(figure: dict) -> bool:
    """All of them, or none of what must never happen; of suggestions, 95 % (the criterion of promise 15)."""
    if "named" in figure["what"]:
        return figure["value"] >= 0.95 * figure["of"]
    never = any(word in figure["what"] for word in ("tracebacks", "executed", "wrote", "hung", "unescaped"))
    return figure["value"] == (0 if never else figure["of"])


def test_marks_are_those_of_the_page() -> None:
    assert set(TOOL["marked"]()) == {row.number for row in (*ROWS, *BESIDES)}


def test_figures_are_of_tests_that_are_there() -> None:
    lines = map(json.loads, (ROOT / "docs" / "guarantees.jsonl").read_text().splitlines())
    names = {line["test"] for line in lines if "test" in line}
    assert names - {SOAK} <= {name for name, numbers in TOOL["tests"]().items() if numbers}
    assert SOAK in names, "the long soak was not run"


@pytest.mark.parametrize(
    "name", ["SECURITY.md", "README.md", *sorted(f"docs/{p.name}" for p in PAGE.parent.glob("*.md"))]
)
def test_tests_that_a_page_names_exist(name: str) -> None:
    tests = set(TOOL["tests"]())
    known = tests | {test.partition("::")[0] for test in tests}
    named = set(NAMED.findall((ROOT / name).read_text()))
    assert named <= known, f"{name} names {sorted(named - known)}"
    assert named or name not in ("SECURITY.md", "docs/guarantees.md")


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text())
    assert links and all((PAGE.parent / link).exists() for link in links)


def test_counts_are_added_and_the_largest_size_is_kept() -> None:
    """By hand: 3 + 4 of 3 + 5; the larger of 0.5 and 0.25."""
    lines = [
        {"test": "a", "what": "kept", "value": 3, "of": 3},
        {"test": "a", "what": "size", "value": 0.5, "of": None},
        {"test": "a", "what": "kept", "value": 4, "of": 5},
        {"test": "a", "what": "size", "value": 0.25, "of": None},
    ]
    figures = TOOL["added_up"](map(json.dumps, lines))
    assert TOOL["shown"](figures) == ["7 of 8 kept", "size: 0.5"]
