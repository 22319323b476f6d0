"""Write docs/guarantees.md: each guarantee, its tests, and what they measured.

    pytest -m guarantee --figures measured.jsonl    # what the tests measure
    python tools/soak.py --figures measured.jsonl   # the long soak
    python tools/fuzz_folders.py --figures measured.jsonl
    python tools/guarantees.py measured.jsonl       # docs/guarantees.jsonl (the figures added up) and the page

Without a file the page is written anew from docs/guarantees.jsonl.
"""

import ast
import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOAK, FUZZ = "tools/soak.py", "tools/fuzz_folders.py"
PAGE, FIGURES = ROOT / "docs" / "guarantees.md", ROOT / "docs" / "guarantees.jsonl"


@dataclass(frozen=True)
class Row:
    """A guarantee. Its tests are those marked ``@pytest.mark.guarantee(number)``."""

    number: int
    title: str
    text: str


ROWS = (
    Row(
        1,
        "A resumed run gives the same bits",
        "Stop a run after any step, within an epoch or between two, and `--resume` it: every later loss and every"
        " trained weight equals that of a run that was not stopped. This holds with dropout, drop-path, augmentation,"
        " mixing, gradient accumulation, a running average of the weights as a teacher, cached teacher outputs, and any"
        " number of data workers.",
    ),
    Row(
        2,
        "Each image once per epoch",
        "A resumed epoch neither repeats nor omits an image, with one process and with two.",
    ),
    Row(
        3,
        "The result does not depend on the number of processes",
        "One process and two see the same images in the same order for the same global batch. Losses agree up to the"
        " rounding of sums, also when a run is resumed with another number of processes.",
    ),
    Row(
        4,
        "A process killed during a save loses nothing",
        "Whenever a process is killed while it saves, the newest complete checkpoint loads and the run resumes from it."
        " Incomplete files are removed at the next start.",
    ),
    Row(
        5,
        "SIGTERM, Ctrl-C and the file `stop` save first",
        "In training and in evaluation, a signal to the process group saves a checkpoint that is at most one step old"
        " and prints the command to resume. Before the first step, for instance while a teacher's head is trained,"
        " there is nothing to save, and the command repeats that part. The exit code is 143 (SIGTERM, or the file"
        " `stop` in the run directory) or 130 (Ctrl-C). A second signal ends the run at once.",
    ),
    Row(
        6,
        "A signal to one process stops all of them",
        "All processes exit together, after saving one checkpoint; none is left waiting for another.",
    ),
    Row(
        7,
        "A full disk destroys nothing",
        "Free space is checked before training. If the disk fills up later, the earlier checkpoint is unchanged. A"
        " periodic save that does not fit is skipped with a message, and training continues; the tuned student is"
        " written as soon as there is room. A save that cannot be skipped (at the start, before exiting) ends the run"
        " with a message that names the file, the space it needs and the space that is free.",
    ),
    Row(
        8,
        "Values that are not finite are not used",
        "A NaN or an infinity in a loss, a gradient, a teacher's output or a pixel is detected in the step where it"
        " appears. That step is skipped and nothing of it is saved. Training continues without it, then with a lower"
        " learning rate, and then stops and saves the batch for inspection.",
    ),
    Row(
        9,
        "Out of memory does not end a run",
        "A step that does not fit into memory is repeated with micro-batches of half the size, twice as many, at most"
        " three times, by all processes together. The global batch and the result stay the same.",
    ),
    Row(
        10,
        "A saved task gives the same logits",
        "For every method, on backbones with a head, with running statistics and with weights that several layers"
        " share. The file holds the trained tensors and little more: at most 1.1 times their bytes plus 64 KiB.",
    ),
    Row(
        11,
        "Merging is exact, or refused",
        "A method that can be merged into plain weights gives the tuned logits within 1e-4 in float32. The other"
        " methods report that they cannot be merged.",
    ),
    Row(
        12,
        "Many tasks share one backbone",
        "Twenty tasks load one after another, in any order, into one process or one network: each gives the logits that"
        " it gives alone, and the frozen weights do not change. One batch may mix images of several tasks: each image"
        " gets the logits of its task alone, within 1e-5.",
    ),
    Row(
        13,
        "Files that do not fit are refused by name",
        "Another backbone, a truncated file, a single flipped bit, a folder of another tool: each has its own message.",
    ),
    Row(
        14,
        "Nothing in a file is executed",
        "Checkpoints, task files, recipes, archives, lists and images from strangers: nothing in them is executed, and"
        " nothing is written outside the output folder. The source has no pickle, eval, exec or unsafe loader.",
    ),
    Row(
        15,
        "A misspelt recipe is refused with a suggestion",
        "Every key with one wrong letter, every value of a wrong type and every key in a wrong section is refused with"
        " one message, which names the right key for at least 95 % of them.",
    ),
    Row(
        16,
        "Unreadable images are counted",
        "In training an unreadable image is skipped, counted and listed. In evaluation it stops the command unless"
        " `--skip-bad` is given. Unusual images (CMYK, 16 bit, rotated by EXIF) are read correctly.",
    ),
    Row(
        17,
        "A parameter that cannot learn is named before the first step",
        "Frozen backbones, teachers and several processes need no search for unused parameters. A trained parameter"
        " without a gradient is an error that names it.",
    ),
    Row(
        18,
        "Sharded training gives the same result",
        "With FSDP2, the losses of every method over three steps equal those of one process within 1e-6; task files and"
        " checkpoints are complete, and evaluation counts the same images. Measured in float64: in float32, AdamW turns"
        " the rounding of gradients that are exactly zero in theory (biases of keys) into steps, so weights may differ"
        " more.",
    ),
    Row(
        19,
        "Evaluation counts each image once",
        "On one, two and three processes, for any number of images, counts are exact and metrics equal; `remap eval`"
        " gives the figure that training ended with. Exported files have [a check](export.md#the-check) of their own.",
    ),
    Row(
        20,
        "The command line is fast",
        "`--help` of every command imports no torch; its time below is that of the machine that made this page."
        " `remap doctor` needs no GPU, no"
        " network and no token. Shells have completion. Commands and flags change on purpose only.",
    ),
)
BESIDES = (
    Row(
        21,
        "Soak",
        "Short runs of varied recipes, one after another, with SIGKILL, SIGTERM and Ctrl-C at random moments, resumes"
        " and evaluations in between (`python tools/soak.py --runs 200 --seed 0`; a short one is part of the tests). At"
        " the end there are no stray files, no leaked processes and no growth of memory, and every interrupted run"
        " equals the same run without interruptions in every byte of its task file.",
    ),
    Row(
        22,
        "Frozen weights are proven unchanged",
        "A run lists the trained parameters at its start. At its end, the hash of all other weights is compared and"
        " written to `summary.json`. If one frozen number differs, the run fails and saves no student.",
    ),
    Row(
        23,
        "A run can be repeated",
        "The same recipe and seed give the same bytes on one machine, for any number of data workers. `remap repeat"
        " RUN` runs the recipe again, compares all results, and names each difference, and the differences of the"
        " machine and of the images.",
    ),
    Row(
        24,
        "A dead process ends the others",
        "With several processes, one that is killed or fails ends all of them, one that stops responding after"
        " `REMAP_TIMEOUT` and the 30 seconds that the launcher gives the others to save, and its error is the one that"
        " is shown.",
    ),
    Row(
        25,
        "Clocks, data threads and files may fail",
        "A jump of the clock changes nothing. A data thread that dies ends the run, which resumes from its checkpoint."
        " Images that vanish during a run are counted and named.",
    ),
    Row(
        26,
        "Changed files are refused",
        "Recipes and task folders with random changes (`python tools/fuzz_folders.py --recipes 10000 --tasks 5000`; a"
        " short one is part of the tests): a recipe is refused or valid, a task folder with any flipped bit or of"
        " another length is refused, and neither ends in a traceback.",
    ),
)

HEAD = """# What we guarantee
"""

FIGURES_ARE = (
    "Written by `tools/guarantees.py`, which has the text of each guarantee. Its tests are those marked with its"
    " number, and the figures are what those tests measured{where}. Every guarantee here has a test. Run them with"
    " `pytest -m guarantee`; [SECURITY.md](../SECURITY.md) lists the guarantees about hostile files."
)

AND_BESIDES = """
## Further guarantees

Marked with the numbers from 21 on.
"""

LIMITS = """
## What is not guaranteed

- **Equal bits on other machines.** They are guaranteed on one machine with the same versions, number of threads and
  kind of device. Other processors, GPUs and versions of PyTorch round differently; `environment.json` in the run
  directory records what a run was made with.
- **Equal bits for another number of processes.** Sums are taken in another order, so float32 results agree to about
  1e-5 (guarantee 3). Batch statistics are those of each process's own part of the batch, and so is the dropout or
  drop-path that a tuned backbone was itself built with; the run reports this at its start.
- **GPUs.** The tests above run on the CPU, with gloo between processes. NCCL, mixed precision and real exhaustion of
  GPU memory are not part of them.
- **SIGKILL and power cuts between two saves.** The steps since the last checkpoint are repeated; nothing else is lost.
  One is begun every `train.checkpoint_seconds` (60) between two steps, and after the last epoch; a thread writes it
  while training continues. So at most that time is lost, and what one step, one evaluation and one write take.
- **Disks that lose data.** A save is flushed and renamed. If a disk or network file system reports data as written and
  loses it, the SHA-256 shows it; the data cannot be recovered.
- **Files you chose to trust.** Weights are numbers and are never executed, but a model trained to mislead will.
- **Small files for methods with frozen random bases.** `vera` and `randlora` store their bases in the task file, so
  that it does not depend on a random generator; the bound of guarantee 10 counts them.
- **Several machines, DeepSpeed.** Not part of the tests.
"""


def marked() -> dict[int, list[str]]:
    """Return tests by the number of their guarantee, as path::name, read from the marks in the source."""
    found: dict[int, list[str]] = {}
    for test, numbers in tests().items():
        for number in numbers:
            found.setdefault(number, []).append(test)
    return found


def tests() -> dict[str, tuple[int, ...]]:
    """Return every test as path::name, with the numbers it is marked with."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        whole = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets)
        ]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                found[name] = tuple(number for part in (*whole, *node.decorator_list) for number in _numbers(part))
    return found


def _numbers(node: ast.AST) -> Iterator[int]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.guarantee":
            yield from (argument.value for argument in call.args if isinstance(argument, ast.Constant))


def added_up(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return one line for each test and quantity: the sum of counts, the largest of sizes."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        new = json.loads(line)
        if "test" not in new:
            continue
        key = (new["test"], new["what"])
        found[key] = _together(found[key], new) if key in found else new
    return [found[key] for key in sorted(found)]


def _together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    if one["of"] is None:
        return {**one, "value": max(one["value"], other["value"])}
    return {**one, "value": one["value"] + other["value"], "of": one["of"] + other["of"]}


def shown(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of the page, figures of one name and several tests together."""
    by_name: dict[str, dict[str, Any]] = {}
    for figure in figures:
        name = figure["what"]
        by_name[name] = _together(by_name[name], figure) if name in by_name else figure
    return [
        f"{name}: {_number(figure['value'])}" if figure["of"] is None else _count(name, figure)
        for name, figure in sorted(by_name.items(), key=lambda item: item[1]["of"] is None)  # counts first
    ]


def _count(name: str, figure: dict[str, Any]) -> str:
    return f"{_number(figure['value'])} of {_number(figure['of'])} {name}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def page(lines: Iterable[str]) -> str:
    """Return the page from the lines of docs/guarantees.jsonl.

    Raises:
        ValueError: A figure is of a test that is not there (it was renamed or removed), or the long soak is missing.
    """
    lines = list(lines)
    environment = next((found for line in lines if "python" in (found := json.loads(line))), None)
    figures = added_up(lines)
    measured, holding = {figure["test"] for figure in figures}, marked()
    there = {SOAK, FUZZ, *(name for names in holding.values() for name in names)}
    if not measured <= there or SOAK not in measured:
        raise ValueError(f"figures of tests that are not there or not marked: {sorted(measured - there) or 'no soak'}")
    where = "" if environment is None else f" ({', '.join(f'{name} {what}' for name, what in environment.items())})"
    parts = [HEAD, _filled(FIGURES_ARE.format(where=where))]
    for row in ROWS:
        parts += [
            f"\n## {row.number}. {row.title}\n",
            _filled(row.text),
            "",
            *_evidence(holding.get(row.number, []), figures),
        ]
    parts.append(AND_BESIDES)
    for row in BESIDES:
        names = [*holding.get(row.number, []), *{21: (SOAK,), 26: (FUZZ,)}.get(row.number, ())]
        parts += [f"\n### {row.title}\n", _filled(row.text), "", *_evidence(names, figures)]
    return "\n".join(parts) + "\n" + LIMITS


def broken(figures: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts that do not hold: less than all, or any of what must never happen (tracebacks, files written).

    Of suggestions for a misspelt key, 95 % must hold the right one (the criterion of guarantee 15).
    """
    never = ("tracebacks", "executed", "wrote", "hung", "unescaped", "silent", "followed")
    wrong = []
    for figure in figures:
        value, of, what = figure["value"], figure["of"], figure["what"]
        if of is None:
            continue
        if "named" in what:
            holds = value >= 0.95 * of
        else:
            holds = value == (0 if any(word in what for word in never) else of)
        if not holds:
            wrong.append(figure)
    return wrong


def _evidence(names: list[str], figures: list[dict[str, Any]]) -> list[str]:
    texts = shown(figure for figure in figures if figure["test"] in names)
    return [*(f"- {text}" for text in texts), *_tests(names)]


def _tests(names: list[str]) -> list[str]:
    links = [f"[{name}](../{name.partition('::')[0]})" for name in names]
    return ["", _filled(f"Held by {', '.join(links)}.")] if links else []


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def environment() -> dict[str, str]:
    """Return what the figures were measured with; nothing private."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "accelerate")}
    return {"python": platform.python_version(), **versions, "cores": str(os.cpu_count())}


def main(files: list[str]) -> None:
    """Write the page, and the figures if there are new ones."""
    if files:
        lines = [line for file in files for line in Path(file).read_text().splitlines()]
        figures = added_up(lines)
        if broken(figures):
            sys.exit(f"not written, these guarantees do not hold: {broken(figures)}")
        text = "\n".join([json.dumps(environment()), *map(json.dumps, figures)])
        FIGURES.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(FIGURES.read_text(encoding="utf-8").splitlines()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
