"""Links in folders from outside are found at any depth."""

import os
import subprocess
from pathlib import Path

import pytest

from remap.errors import RunError
from remap.io import links


def test_folders_of_more_levels_than_python_has_are_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,200 levels; the link is at the bottom."""
    monkeypatch.chdir(tmp_path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        links.require_no_links(tmp_path)
        os.symlink("/", "link")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RunError, match="is a link"):
            links.require_no_links(tmp_path)
    finally:
        os.chdir(tmp_path)
        subprocess.run(["rm", "-rf", "d"], check=True)  # Python's own way has as many levels as Python
