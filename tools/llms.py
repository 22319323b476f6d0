"""Write docs/llms.txt, the index of the pages for those who read through an assistant, from the navigation of the site.

Run ``python tools/llms.py``. The form is that of https://llmstxt.org: a title, a sentence, and lists of links.
"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
HEAD = """# remap

> Distil a large vision transformer into a small one tuned by a parameter-efficient method, on your own images: a
> command line (`remap`) and a Python package of the same name. Methods and losses have one name everywhere: on the
> command line, in recipes, in Python.

Commands: `remap distill`, `tune`, `extend`, `adapt`, `recommend`, `compare`, `lr`, `shrink`, `init`, `eval`, `predict`,
`report`, `export`, `repeat`, `tasks`, `data check`, `methods`, `losses`, `remappings`, `models`, `recipes`, `cache`,
`doctor`. Each has `--help`, most have `--json`. `--dry-run` trains nothing. Errors have exit code 2 and say what is
allowed and what to do.
"""


def index() -> str:
    """Return the file."""
    parts = [HEAD]
    for section in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]:
        ((title, pages),) = section.items()
        if isinstance(pages, list):
            parts.append(f"\n## {title}\n")
            parts += [_entry(*next(iter(page.items()))) for page in pages]
    return "\n".join(parts) + "\n"


def _entry(title: str, path: str) -> str:
    """A page and its sections; those of the reference pages are methods and losses by name."""
    if path == "first_steps.md":
        return f"- [{title}](first_steps.ipynb): the embedded default, cell by cell"
    page = ROOT / "docs" / path
    page, address = (page, path) if page.is_file() else (ROOT / path, f"../{path}")
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    sections = re.findall(r"^##+ (.+)$" if "### `" in text else r"^## (.+)$", text, flags=re.M)
    return f"- [{title}]({address}): {', '.join(sections) or title}"


if __name__ == "__main__":
    (ROOT / "docs" / "llms.txt").write_text(index(), encoding="utf-8")
    print(index())
