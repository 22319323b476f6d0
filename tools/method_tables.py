"""Write docs/methods.md from the table of methods and their options: `python tools/method_tables.py`."""

from pathlib import Path

from remap.backbones.families import FAMILIES
from remap.options import options_of, shown
from remap.tuning import CATEGORIES, METHODS

TARGET = Path(__file__).parents[1] / "docs" / "methods.md"

HEAD = """# Tuning methods

Written by `tools/method_tables.py` from the code. `remap methods` shows the same on the command line.

*Trained* counts parameters besides the classifier head: as a formula, and on ViT-B/16 at 224 pixels with default
options. L depth, D width, H MLP width, p prompts, r bottleneck or rank. *Merges*: with default options, the tuned model
can be saved as plain timm weights. *lr*: default for AdamW at batch size 64 and width 128; wider backbones get
lr · 128 / width ([how they were chosen](defaults.md)).

Options are given as `--set method.OPTION=VALUE`; of a combination (`--method vpt_deep+lora`) as
`--set method.lora.rank=4`. `remap methods NAME` shows those of one method with their limits. `targets` is a list of
layers of a block, such as `[q, v]`: q, k, v and o are the projections of attention, fc1 and fc2 the layers of the MLP.
"""

COLUMNS = ["method", "what is trained", "trained", "on ViT-B/16", "merges", "lr", "paper"]

SUPPORT = """
## What fits what

A cell says yes if the family has the parts that the method asks for; every yes is a run of the conformance suite in
`tests/tuning` on a tiny model of each variant of the family, and every - is refused with a method that fits.
"""


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    for category, title in CATEGORIES.items():
        parts.append(f"\n## {title}\n")
        parts.append(
            "| method | what is trained | trained | on ViT-B/16 | merges | lr | paper |\n|---|---|---|---|---|---|---|"
        )
        rows = [row for row in METHODS if row.category == category]
        for row in rows:
            count = "-" if row.vit_base is None else f"{row.vit_base:,}"
            merges = "yes" if row.mergeable else "no"
            cells = [f"`{row.name}`", row.summary, row.trains.replace("*", "·"), count, merges, f"{row.lr:g}"]
            parts.append(_line([*cells, _paper(row.paper)]))
        parts.append("\n" + "\n".join(f"- `{row.name}`:{_options(row.name)}" for row in rows))
    parts.append(SUPPORT)
    parts.append(f"{_line(['method', *FAMILIES.names])}\n|---|{'---|' * len(FAMILIES.names)}")
    for row in METHODS:
        cells = ["yes" if row.fits(family.parts) else "-" for family in FAMILIES]
        parts.append(_line([f"`{row.name}`", *cells]))
    parts.append("\n" + "\n".join(f"- {row.name}: {row.summary} ({row.examples})" for row in FAMILIES))
    return "\n".join(parts) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _paper(paper: str) -> str:
    words, _, number = paper.rpartition("arXiv ")
    return f"{words.rstrip(', ')}, [{number}](https://arxiv.org/abs/{number})" if words else paper


def _options(method: str) -> str:
    options = options_of(method)
    if not options:
        return " no options"
    return "".join(f"\n  - `{o['name']}={shown(o['default'])}`{_explained(o)}" for o in options)


def _explained(option: dict) -> str:
    """The words it takes, and a line on it where its class has one."""
    allowed = ", ".join(map(str, option["allowed"] or ()))
    words = f" ({'list of ' if option['type'].startswith('list') else ''}{allowed})" if allowed else ""
    return words + (f": {option['about']}" if option["about"] else "")


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(f"wrote {TARGET}")
