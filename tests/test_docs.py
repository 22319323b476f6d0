"""The generated pages are what the code says now."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_methods_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "method_tables.py"))
    assert (ROOT / "docs" / "methods.md").read_text() == tool["text"](), "run `python tools/method_tables.py`"
