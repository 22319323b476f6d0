"""What MkDocs does to the files of docs/: adds pages from outside it, and the Python API from the docstrings.

The same files are read on GitHub, so they link to ``../CONTRIBUTING.md`` and ``../tests/...`` and hold docstrings as
text. Here links to added pages lead to these, links to other files of the repository become the file's name, a
section of python.md becomes what mkdocstrings makes of the same docstring, and a notebook becomes a page.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ADDED = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "remap/backbones/weights/README.md",
         "remap/language/mini/README.md", "remap/data/drawings/README.md")  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for name in ADDED:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        files.append(File.generated(config, f"{notebook.stem}.md", content=_page(json.loads(notebook.read_text()))))
    return files


def _page(notebook: dict) -> str:
    """Return a notebook as Markdown, with its outputs."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if png := data.get("image/png"):
                parts.append(f'<img alt="Output of the cell above" src="data:image/png;base64,{png}">')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Return the page with links that this site has, and the sections of python.md for mkdocstrings."""
    name = page.file.src_uri
    if name == "python.md":
        markdown = re.sub(r"^## (remap\.\w+)\n\n```text\n.*?(?=^## |\Z)", r"::: \1\n\n", markdown, flags=re.M | re.S)
    # The path in the repository, from which the links of the file are meant.
    folder = posixpath.dirname(name if name in ADDED else f"docs/{name}")

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        target = posixpath.normpath(posixpath.join(folder, path))
        here = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))
        if files.get_file_from_path(here):
            return f"{words}({posixpath.relpath(here, posixpath.dirname(name) or '.')}{anchor})"
        if (ROOT / target).exists():
            return f"{words[1:-1]}" if "`" in words else f"`{words[1:-1]}`"
        return found[0]

    return re.sub(r"(?<!!)(\[[^\]\n]+\])\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)
