"""Write docs/methods.md and docs/remapping.md from the tables in the code: `python tools/reference_pages.py`."""

from pathlib import Path

from remap.backbones.families import FAMILIES
from remap.recipe.option_listing import options_of, rows_of_config, shown
from remap.registry import BUILT_IN
from remap.remapping import LOSSES
from remap.remapping.architecture import ARCHITECTURES
from remap.remapping.weights import INITS
from remap.tuning import CATEGORIES, METHODS

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """# Tuning methods

Written by `tools/reference_pages.py` from the code. `remap methods` prints the same.

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

A cell is yes if the family has the components that the method needs. Every yes is tested by the conformance suite in
`tests/tuning` on a tiny model of each variant of the family; every - is an error that names a method that fits.
"""


REMAPPING = """# Remapping: what a student gets from its teacher

Written by `tools/reference_pages.py` from the code. `remap losses`, `remap losses NAME` and `remap remappings` print
the same; [distilling.md](distilling.md) is the guide.

Category 5 of the survey: knowledge (losses), weights (how the student starts) and architecture (what the student is).
All of it combines with every tuning method. Options of a loss are given as `--set losses.NAME.OPTION=VALUE`. *Weight*
is the default in the objective; every term is a mean over the images of a batch in float32, and only the objective
applies weights.
"""

KINDS = {
    "labels": "Knowledge: labels",
    "logits": "Knowledge: logits",
    "attention": "Knowledge: attention",
    "features": "Knowledge: features and tokens",
}


def remapping() -> str:
    """Return the page of losses, initialisations and architectures."""
    parts = [REMAPPING]
    for category, title in KINDS.items():
        rows = [row for row in LOSSES if row.category == category and row.origin == BUILT_IN]
        parts.append(f"\n## {title}\n")
        parts.append("| loss | what it is | reads | where the models differ | mixed images | weight | paper |")
        parts.append("|---|---|---|---|---|---|---|")
        for row in rows:
            name = f"`{row.name}`" + (" (*)" if row.over_batch else "")
            cells = [name, row.summary, row.needs, row.mismatch, row.mixed, f"{row.weight:g}", _paper(row.paper)]
            parts.append(_line(cells))
        listed = (f"- `{row.name}`:{_listed(rows_of_config(row.load().Config))}" for row in rows)
        parts.append("\n" + "\n".join(listed))
    parts.append(
        "\n(*) compares the images of a batch with each other; each process sees its own part of the batch only."
    )
    for title, table in (("Weights", INITS), ("Architecture", ARCHITECTURES)):
        parts.append(f"\n## {title}\n")
        parts.append("| name | what it is | needs | where the models differ | paper |\n|---|---|---|---|---|")
        parts += [_line([f"`{row.name}`", row.summary, row.needs, row.mismatch, _paper(row.paper)]) for row in table]
    return "\n".join(parts) + "\n"


def methods() -> str:
    """Return the page of methods."""
    parts = [HEAD]
    for category, title in CATEGORIES.items():
        parts.append(f"\n## {title}\n")
        parts.append(
            "| method | what is trained | trained | on ViT-B/16 | merges | lr | paper |\n|---|---|---|---|---|---|---|"
        )
        rows = [row for row in METHODS if row.category == category and row.origin == BUILT_IN]
        for row in rows:
            count = "-" if row.vit_base is None else f"{row.vit_base:,}"
            merges = "yes" if row.mergeable else "no"
            cells = [f"`{row.name}`", row.summary, row.trains.replace("*", "·"), count, merges, f"{row.lr:g}"]
            parts.append(_line([*cells, _paper(row.paper)]))
        parts.append("\n" + "\n".join(f"- `{row.name}`:{_options(row.name)}" for row in rows))
    parts.append(SUPPORT)
    parts.append(f"{_line(['method', *FAMILIES.names])}\n|---|{'---|' * len(FAMILIES.names)}")
    for row in (row for row in METHODS if row.origin == BUILT_IN):
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
    return _listed(options_of(method))


def _listed(options: list[dict]) -> str:
    if not options:
        return " no options"
    return "".join(f"\n  - `{o['name']}={shown(o['default'])}`{_explained(o)}" for o in options)


def _explained(option: dict) -> str:
    """The words it takes, and a line on it where its class has one."""
    allowed = ", ".join(map(str, option["allowed"] or ()))
    words = f" ({'list of ' if option['type'].startswith('list') else ''}{allowed})" if allowed else ""
    return words + (f": {option['about']}" if option["about"] else "")


PAGES = {"methods.md": methods, "remapping.md": remapping}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
