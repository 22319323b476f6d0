"""Write the pages of methods, losses and models from the tables in the code, and python.md from docstrings.

Run `python tools/reference_pages.py`, which also writes the drawings.
"""

import inspect
import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import drawings
import timm
from explained import LEGEND, escaped, loss_section, method_section, paper

import remap
from remap.backbones.families import FAMILIES, signals_of
from remap.recipe.option_listing import TABLE, described, rows_of_config, shown
from remap.recipe.schema import DataSpec, Recipe, StudentSpec, TeacherSpec, TrainSpec
from remap.registry import BUILT_IN
from remap.remapping import LOSSES
from remap.remapping.architecture import ARCHITECTURES
from remap.remapping.weights import INITS
from remap.tuning import CATEGORIES, METHODS, MethodEntry

DOCS = Path(__file__).parents[1] / "docs"

HEAD = """# Tuning methods

Written by `tools/reference_pages.py` from the code. `remap methods` prints the same.

*Trained* counts parameters besides the classifier head: as a formula, and on ViT-B/16 at 224 pixels with default
options. L depth, D width, H MLP width, p prompts, r bottleneck or rank. *Merges*: with default options, the tuned model
can be saved as plain timm weights. *lr*: default for AdamW at batch size 64 and width 128; wider backbones get
lr · 128 / width ([how they were chosen](defaults.md)).

A method's name leads to its formula and options, and for most to a drawing.
"""

METHOD_TABLE = (
    "| method | what is trained | trained | on ViT-B/16 | merges | lr | paper |\n|---|---|---|---|---|---|---|"
)

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

LOSS_PAGE = f"""# Losses, one by one

Written by `tools/reference_pages.py` from the code. [remapping.md](remapping.md) has them side by side,
[distilling.md](distilling.md) is the guide. Options are given as `--set losses.NAME.OPTION=VALUE`.

{LEGEND}
"""

FIELDS = """# Every field of a recipe

Written by `tools/reference_pages.py` from the code; `remap recipes show NAME --resolved` prints a recipe with all of
them. On the command line a field is `--set SECTION.FIELD=VALUE`. Options of a method are [with the method](methods.md),
those of a loss [with the loss](losses.md).
"""

METHOD_PAGE = f"""# {{}}

Written by `tools/reference_pages.py` from the code. [methods.md](methods.md) has all methods side by side.

Options are given as `--set method.OPTION=VALUE`; of a combination (`--method vpt_deep+lora`) as
`--set method.lora.rank=4`. `remap methods NAME` shows those of one method with their limits. `targets` is a list of
layers of a block, such as `[q, v]`: q, k, v and o are the projections of attention, fc1 and fc2 the layers of the MLP.

{LEGEND} The classifier is trained by every method, and is not counted.
"""

# The page that explains the methods of a category.
WHERE = {
    "fine-tuning": "fine-tuning.md",
    "prompt": "prompt-tuning.md",
    "adapter": "adapter-tuning.md",
    "parameter": "parameter-tuning.md",
    "remapping": "remapping.md",
}

KINDS = {
    "labels": "Knowledge: labels",
    "logits": "Knowledge: logits",
    "attention": "Knowledge: attention",
    "features": "Knowledge: features and tokens",
    "domains": "Knowledge: another domain",
}


JOINT = """
## Teacher and student together

`teacher.joint=true` with `--method slad` trains the teacher along with the student (SLAD, Bensaid et al. 2026,
[2605.29726](https://arxiv.org/abs/2605.29726)); `--recipe slad` is an example. Only the abstract was known when this
was written: both networks have low-rank adapters, which are shared and trained jointly. How they do so is ours:

- The change of a layer is alpha / rank * B M A. A and B have the widths of their network; the core M (rank x rank) of
  a block of the student is the same tensor as that of the teacher's block at the same relative depth.
- The teacher starts with a fitted head (`teacher.prepare`); its adapters and head learn from the labels by
  cross-entropy. The student's losses read the teacher's outputs of the same step and send no gradient back, so that
  only the cores get gradients from both sides. Rate and weight decay are the student's.
- The teacher's outputs change in every step, so they are never cached. The summary has its accuracy at the end; nothing
  else of the tuned teacher is stored. Its own weights are not changed.
- Both must have the same layers for the targets (two sizes of one family), and `train.parallel=fsdp2` is refused.
"""

MODELS = """# Models

Written by `tools/reference_pages.py` from the code and from `docs/models.jsonl`, which
`python benchmarks/every_architecture.py --output docs/models.jsonl` measures.

Any model of timm can be a teacher or a student under its own name. Families that are read exactly teach with all that
losses can read, and take every method that makes sense for them ([what fits what](methods.md#what-fits-what)). All
other networks, and unusual variants of the exact families, are read by their stages ("generic"):

- They teach logits, pooled features, and tokens: the map of a stage, as `forward_intermediates` of timm gives it, whose
  grid is resized to the student's. "Behind the final norm" (`layers: last`) stands the output of the last stage.
- Of these, Hiera and TinyViT teach attention: that of the last block of a stage, where it goes over the whole image.
  These are Hiera's last two stages, and TinyViT's at the image size that it was made for or a smaller one. The default
  objective leaves it out; `--losses ce,kd,attention` takes it. All others say why there is none.
- Blocks are stages: `partial` trains the last ones, with all that is behind them, by timm's own groups of layers.
- `targets` are `linear` (linear layers and 1x1 convolutions, the default where there are some) and `conv` (all other
  convolutions, whose kernels count as matrices of c_out x c_in * k * k). Layers below 16 channels are left out. ResNet
  has the same words for the convolutions of its branches, ConvNeXt `conv` for its depthwise ones.
- The running statistics of batch norms follow the training images where a method trains the complete module (`full`,
  `partial`), and are saved with the task; all other methods leave them as they are.
- `image_size` is passed on where the architecture is built for a size.

`remap models --support NAME` says what a model can teach and which methods fit it, with the reason for each that does
not; `remap models WORD` lists models.
"""


PYTHON = """# Python

Written by `tools/reference_pages.py` from the docstrings.

```python
import remap

result = remap.distill({"data": "photos", "teacher": "vit_large", "student": "vit_small", "method": "vpt_deep"})
print(result.summary["student"]["accuracy"], result.run_dir)
print(remap.load_student(result.run_dir).predict(["photo.jpg"]))
```

`import remap` imports no torch; the first use of a name below does. Every function raises `remap.RemapError` for what a
user can mend; its attributes `what`, `given`, `allowed` and `do` say what was wrong, what was given, what is allowed
and what to do. A value of a wrong Python type is a `TypeError`, as in any library. The library prints nothing itself:
functions that take `progress` report to it, an object with `say(text)` and
`wait(what, total)`, a context manager whose value has `advance(amount, **values)`
(`remap.progress.Progress`).
[tracking.md](tracking.md) shows callbacks after steps and epochs, and the losses in a training loop of your own.
"""
# In the order in which one meets them.
NAMES = (
    *("distill", "tune", "extend", "adapt", "evaluate", "predict", "recommend", "compare", "find_lr", "shrink"),
    *("load_student", "attach", "losses", "register"),
)
CLASSES = ("Result", "Callback", "Student", "MultiTask", "Shelf")


def python() -> str:
    """Return the page of the Python API."""
    parts = [PYTHON]
    for name in (*NAMES, *CLASSES):
        item = getattr(remap, name)
        parts.append(f"\n## remap.{name}\n\n{_described(name, item)}")
        if name in CLASSES:
            members = {key: value for key, value in vars(item).items() if not key.startswith("_")}
            for key, member in members.items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function):
                    parts.append(f"\n### {name}.{key}\n\n{_described(key, function)}")
    return "\n".join(parts) + "\n"


def _described(name: str, item: object) -> str:
    text = str(inspect.signature(item))  # type: ignore[arg-type]
    signature = re.sub(r"<remap.progress.Silent object at 0x\w+>", "Silent()", text)
    signature = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", signature)
    words = f"\n\n{inspect.cleandoc(item.__doc__)}" if item.__doc__ else ""
    return f"```text\n{name}{signature}{words}\n```"


def models() -> str:
    """Return the page of models."""
    records = [json.loads(line) for line in (DOCS / "models.jsonl").read_text(encoding="utf-8").splitlines()]
    taught = sum(not record["teaches"] for record in records)
    learnt = sum(not record["teaches"] and not record["learns"] for record in records)
    fitting = {row.name: sum(method.fits(row.parts) for method in METHODS) for row in FAMILIES}
    parts = [MODELS, "## Families\n", "| read as | what it is | teaches | methods | models |\n|---|---|---|---|---|"]
    for row in FAMILIES:
        teaches = ", ".join(signals_of(row.parts))
        parts.append(_line([row.name, row.summary, teaches, str(fitting[row.name]), escaped(row.examples)]))
    parts.append("\n## Measured\n")
    parts.append(
        f"The smallest model of each of {len(records)} modules of timm, with random weights and where it is large with "
        f"the arguments named behind it: {taught} teach (logits "
        "equal to timm's own forward, features and the tokens of every stage in the shapes that are promised), and "
        f"{learnt} learn: `linear`, `full`, `norm` and `lora` train a step, and reload to equal logits.\n"
    )
    parts.append(
        "| module of timm | model | pixels | read as | teaches | does not learn by |\n|---|---|---|---|---|---|"
    )
    for record in sorted(records, key=lambda record: record["module"]):
        family = record["family"] or "-"
        teaches = f"no: {record['teaches']}" if record["teaches"] else ", ".join(signals_of(FAMILIES.row(family).parts))
        problems = "; ".join(f"{method}: {problem}" for method, problem in record["learns"].items()) or "-"
        model = ", ".join([f"`{record['model']}`", *(f"{k} {v}" for k, v in record.get("arguments", {}).items())])
        cells = [record["module"], model, str(record["pixels"]), family, teaches, problems]
        parts.append(_line([cell.replace("|", "/") for cell in cells]))
    if missing := sorted(set(timm.list_modules()) - {record["module"] for record in records}):
        parts.append(f"\nNot measured yet, being large: {', '.join(missing)}.")
    return "\n".join(parts) + "\n"


def remapping() -> str:
    """Return the page of losses, initialisations and architectures."""
    parts = [REMAPPING]
    for category, title in KINDS.items():
        rows = [row for row in LOSSES if row.category == category and row.origin == BUILT_IN]
        parts.append(f"\n## {title}\n")
        parts.append("| loss | what it is | reads | where the models differ | mixed images | weight | paper |")
        parts.append("|---|---|---|---|---|---|---|")
        for row in rows:
            name = f"[`{row.name}`](losses.md#{row.name})" + (" (*)" if row.over_batch else "")
            cells = [name, row.summary, row.needs, row.mismatch, row.mixed, f"{row.weight:g}", paper(row.paper)]
            parts.append(_line(cells))
    parts.append("\n(*) compares all images of a batch with each other, across processes and micro-batches.")
    for title, table in (("Weights", INITS), ("Architecture", ARCHITECTURES)):
        parts.append(f"\n## {title}\n")
        parts.append("| name | what it is | needs | where the models differ | paper |\n|---|---|---|---|---|")
        parts += [_line([f"`{row.name}`", row.summary, row.needs, row.mismatch, paper(row.paper)]) for row in table]
    parts.append("\n## Tuning methods of this category")
    parts += [method_section(row) for row in METHODS if row.category == "remapping" and row.origin == BUILT_IN]
    parts.append(JOINT)
    return "\n".join(parts) + "\n"


def losses() -> str:
    """Return the page that explains each loss."""
    parts = [LOSS_PAGE]
    for category, title in KINDS.items():
        parts.append(f"\n## {title.partition(': ')[2].capitalize()}")
        parts += [loss_section(row) for row in LOSSES if row.category == category and row.origin == BUILT_IN]
    return "\n".join(parts) + "\n"


def recipe_fields() -> str:
    """Return the page of all fields of a recipe."""
    sections = {"data": DataSpec, "teacher": TeacherSpec, "student": StudentSpec, "train": TrainSpec}
    parts = [FIELDS]
    for title, config in {"At the top": Recipe, **sections}.items():
        parts.append(f"\n## {title}\n\n| field | what it is | default | values |\n|---|---|---|---|")
        for row in rows_of_config(config):
            values = ", ".join(map(str, row["allowed"] or ())) or row["limits"] or "-"
            plain = row["default"] is None or isinstance(row["default"], (str, int, float))
            cells = [f"`{row['name']}`", row["about"], f"`{shown(row['default'])}`" if plain else "-", values]
            parts.append(_line([cell.replace("|", "/") for cell in cells]))
    return "\n".join(parts) + "\n"


def category_page(category: str) -> Callable[[], str]:
    """Return what makes the page that explains each method of a category."""

    def page() -> str:
        rows = [row for row in METHODS if row.category == category and row.origin == BUILT_IN]
        return "\n".join([METHOD_PAGE.format(CATEGORIES[category].capitalize()), *map(method_section, rows)]) + "\n"

    return page


def methods() -> str:
    """Return the page of methods."""
    parts = [HEAD]
    for category, title in CATEGORIES.items():
        parts.append(f"\n## {title}\n")
        rows = [row for row in METHODS if row.category == category and row.origin == BUILT_IN]
        for kind, members in groupby(rows, key=lambda row: row.kind):
            parts.append((f"\n### {kind}\n\n" if kind else "") + METHOD_TABLE)
            parts += map(_method_line, members)
    parts.append(SUPPORT)
    parts.append(f"{_line(['method', *FAMILIES.names])}\n|---|{'---|' * len(FAMILIES.names)}")
    for row in (row for row in METHODS if row.origin == BUILT_IN):
        cells = ["yes" if row.fits(family.parts) else "-" for family in FAMILIES]
        parts.append(_line([f"`{row.name}`", *cells]))
    parts.append("\n" + "\n".join(f"- {row.name}: {row.summary} ({escaped(row.examples)})" for row in FAMILIES))
    return "\n".join(parts) + "\n"


def options() -> str:
    """Return what listings need of the classes of options, for ``remap/recipe/options.json``."""
    rows = ((table.kind, row) for table in (METHODS, LOSSES, INITS) for row in table if row.origin == BUILT_IN)
    lines = [f'"{kind} {row.name}": {json.dumps(described(row.load().Config))}' for kind, row in rows]
    return "{{\n{}\n}}\n".format(",\n".join(lines))


def _method_line(row: MethodEntry) -> str:
    count = "-" if row.vit_base is None else f"{row.vit_base:,}"
    name, merges = f"[`{row.name}`]({WHERE[row.category]}#{row.name})", "yes" if row.mergeable else "no"
    trains = row.trains.replace("*", "·")
    return _line([name, row.summary, trains, count, merges, f"{row.lr:g}", paper(row.paper)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


PAGES = {
    "methods.md": methods,
    "remapping.md": remapping,
    "losses.md": losses,
    "models.md": models,
    "python.md": python,
    "recipe-fields.md": recipe_fields,
}
PAGES |= {name: category_page(category) for category, name in WHERE.items() if name not in PAGES}

if __name__ == "__main__":
    TABLE.write_text(options(), encoding="utf-8")  # first: pages read it
    drawings.write()
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
