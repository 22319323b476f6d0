"""The task folders of tests/tasks serve here too."""

from pathlib import Path
from runpy import run_path

make_task = run_path(str(Path(__file__).parents[1] / "tasks" / "conftest.py"))["make_task"]
