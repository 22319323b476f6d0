"""Write docs/guarantees.md: what is promised, which tests hold it, and what they measured.

    pytest -m guarantee --figures measured.jsonl    # what the tests measure
    python tools/soak.py --figures measured.jsonl   # the long soak
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
SOAK = "tools/soak.py"
PAGE, FIGURES = ROOT / "docs" / "guarantees.md", ROOT / "docs" / "guarantees.jsonl"


@dataclass(frozen=True)
class Row:
    """A promise. Its tests are those marked ``@pytest.mark.guarantee(number)``."""

    number: int
    title: str
    promise: str


ROWS = (
    Row(
        1,
        "An interrupted run goes on to the same bits",
        "Stop a run after any step, inside an epoch or between two, and `--resume` it: every later loss and every"
        " trained weight equals that of a run that was never stopped. That holds with dropout, drop-path, augmentation,"
        " mixing, gradient accumulation, an average of the weights as a teacher, kept teacher outputs, and any number"
        " of data workers.",
    ),
    Row(
        2,
        "Every image once an epoch",
        "A resumed epoch neither repeats nor leaves out an image, with one process and with two.",
    ),
    Row(
        3,
        "The number of processes is not part of the result",
        "One process and two see the same images in the same order for the same global batch; losses agree to the"
        " rounding of sums, also when a run is resumed with another number of processes.",
    ),
    Row(
        4,
        "A killed save costs nothing",
        "Whenever a process is killed while it saves, the newest complete checkpoint loads and the run goes on from"
        " it; half-written files are removed at the next start.",
    ),
    Row(
        5,
        "SIGTERM, Ctrl-C and the file `stop` save first",
        "In training and in evaluation, a signal to the whole process group leaves a checkpoint at most one step old"
        " and the command to go on with. Before the first step, as while a teacher's head is fitted, there is nothing"
        " to save; the command starts that part again. The exit code is 143 (SIGTERM, the file `stop` in the run"
        " directory) or 130 (Ctrl-C). A second signal leaves at once.",
    ),
    Row(
        6,
        "A signal to one process stops all of them",
        "All processes leave together with one checkpoint that all agree on; none is left waiting for another.",
    ),
    Row(
        7,
        "A full disk destroys nothing",
        "Free space is looked at before training. On a disk that fills up later the earlier checkpoint is as it was. A"
        " save in the course of training is left out and said so, and the run goes on; the tuned student waits for"
        " room; a save that has to be, as at the start or before leaving, ends the run with a message that names the"
        " file, what it needs and what is free.",
    ),
    Row(
        8,
        "Numbers that are not finite go nowhere",
        "A NaN or an infinity in a loss, a gradient, a teacher's output or a pixel is seen in the step it appears in."
        " That step is not done and nothing of it is written. Training goes on without it, then with a lower learning"
        " rate, and then stops with the batch kept for inspection.",
    ),
    Row(
        9,
        "Out of memory is not the end",
        "A step that does not fit is done again in half the size and twice the number of parts, at most three times,"
        " by all processes together; the global batch and the result stay.",
    ),
    Row(
        10,
        "A saved task gives the same logits back",
        "For every method, on backbones with a head, with running statistics and with weights that several layers"
        " share. The file holds what was trained and little more: at most 1.1 times those bytes and 64 KiB.",
    ),
    Row(
        11,
        "Folding is exact, or refused",
        "A method that can be folded into plain weights gives the tuned logits within 1e-4 in float32. The others say"
        " that they cannot be.",
    ),
    Row(
        12,
        "Many tasks share one backbone",
        "Twenty tasks load one after another, in any order, into one process or one network: each gives the logits it"
        " had alone, and the frozen weights are untouched. One batch with images of several tasks is not built yet.",
    ),
    Row(
        13,
        "What does not belong is refused by name",
        "Another backbone, a truncated file, a single flipped bit, another tool's folder: each has its own message.",
    ),
    Row(
        14,
        "Nothing that a file says is run",
        "Checkpoints, task files, recipes, archives, lists and images from strangers: nothing in them is executed and"
        " nothing is written outside the output folder. The source holds no pickle, eval, exec or unsafe loader.",
    ),
    Row(
        15,
        "A misspelt recipe is refused and put right",
        "Every key with one wrong letter, every value of a wrong type, every key in a wrong section is refused with"
        " one message, and the right key is among the suggestions.",
    ),
    Row(
        16,
        "Broken images are counted",
        "In training an unreadable image is left out, counted and listed; in evaluation it stops the command unless it"
        " is left out on purpose. Unusual images (CMYK, 16 bit, turned by EXIF) are read as they are meant.",
    ),
    Row(
        17,
        "A parameter that cannot learn is named before the first step",
        "Frozen backbones, teachers and several processes need no search for unused parameters; a trained parameter"
        " that gets no gradient is an error that names it.",
    ),
    Row(
        18,
        "Sharded training is the same training",
        "With FSDP2, every method's losses over three steps equal those of one process within 1e-6; task files and"
        " checkpoints are complete, and evaluation counts the same images. Measured in float64: in float32 AdamW turns"
        " the rounding of gradients that are zero by nature (biases of keys) into steps, and weights may differ more.",
    ),
    Row(
        19,
        "Evaluation counts every image once",
        "On one, two and three processes, for any number of images, counts are exact and metrics equal; `remap eval`"
        " repeats the figure that training ended with. An export to ONNX does not exist yet and is not compared.",
    ),
    Row(
        20,
        "The command line answers at once",
        "`--help` of every command takes less than half a second and imports no torch. `remap doctor` needs no GPU, no"
        " network and no token. Shells get completion. Commands and flags change on purpose only.",
    ),
)
BESIDES = (
    Row(
        21,
        "Soak",
        "Short runs of varied recipes, one after another, with SIGKILL, SIGTERM and Ctrl-C at random moments, resumes"
        " and evaluations in between (`python tools/soak.py --runs 200 --seed 0`; a short one is part of the tests). At"
        " the end there is no stray file, no process left, no growing memory, and every run that was interrupted equals"
        " its undisturbed twin in every byte of its task file.",
    ),
    Row(
        22,
        "What is frozen is proven to be untouched",
        "A run lists what it trains at its start, and at its end the hash over all the rest, unchanged, stands in"
        " `summary.json`. If one frozen number differs, the run fails and saves no student.",
    ),
    Row(
        23,
        "A run can be repeated",
        "The same recipe and seed give the same bytes on one machine, whatever the number of data workers. `remap"
        " repeat RUN` does a run again, compares everything it left, and names each difference and what of the"
        " machine and of the images is different.",
    ),
    Row(
        24,
        "A dead process ends the others",
        "With several processes, one that is killed, fails or falls silent ends all of them within the timeout, and"
        " the error that is shown is its own.",
    ),
    Row(
        25,
        "Clocks, data threads and files may misbehave",
        "A jump of the clock changes nothing. A data thread that dies ends the run, which goes on from its checkpoint."
        " Images that vanish during a run are counted and named.",
    ),
)

HEAD = """# What we guarantee
"""

FIGURES_ARE = (
    "Written by `tools/guarantees.py`: the promises stand there, the tests are those marked with a promise's number,"
    " and the figures are what those tests measured{where}. A promise without a test does not stand here. Run them with"
    " `pytest -m guarantee`; [SECURITY.md](../SECURITY.md) says what is promised about hostile files."
)

AND_BESIDES = """
## And besides

Marked with the numbers from 21 on.
"""

LIMITS = """
## What is not guaranteed

- **Equal bits on other machines.** They are promised on one machine with the same versions, number of threads and
  kind of device. Other processors, GPUs and versions of PyTorch round differently; `environment.json` in the run
  directory says what a run was made with.
- **Equal bits for another number of processes.** Sums are taken in another order, so float32 results agree to about
  1e-5 (promise 3). Batch statistics and losses that compare the images of a batch see a process's own part of it,
  which the run says at its start.
- **GPUs.** The tests above run on the CPU, with gloo between processes. NCCL, mixed precision and real exhaustion of
  GPU memory are not part of them.
- **SIGKILL and power cuts between two saves.** What was done since the last checkpoint is done again; nothing else is
  lost. A checkpoint is taken at the end of every epoch and every `train.checkpoint_seconds`.
- **Disks that lie.** A save is flushed and renamed; a disk or network file system that reports data as written and
  loses it is noticed by its SHA-256, not undone.
- **Files you chose to trust.** Weights are numbers and are never run, but a model that was trained to mislead will.
- **Small files for methods with frozen random bases.** `vera` and `randlora` keep their bases in the task file, so
  that it does not depend on a random generator; the bound of promise 10 counts them.
- **One batch of several tasks.** Tasks are switched, not mixed (promise 12).
- **Several machines, DeepSpeed.** Not part of the tests.
"""


def marked() -> dict[int, list[str]]:
    """Tests by the number of their promise, as path::name, read from the marks in the source."""
    found: dict[int, list[str]] = {}
    for test, numbers in tests().items():
        for number in numbers:
            found.setdefault(number, []).append(test)
    return found


def tests() -> dict[str, tuple[int, ...]]:
    """Every test as path::name, with the numbers it is marked with."""
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
    """One line for each test and quantity: counts are summed, of sizes the largest is kept."""
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
    """In words, those of several tests under one name together."""
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
    """The whole page from the lines of docs/guarantees.jsonl."""
    lines = list(lines)
    environment = next((found for line in lines if "python" in (found := json.loads(line))), None)
    figures = added_up(lines)
    where = "" if environment is None else f" ({', '.join(f'{name} {what}' for name, what in environment.items())})"
    parts = [HEAD, _filled(FIGURES_ARE.format(where=where))]
    holding = marked()
    for row in ROWS:
        parts += [
            f"\n## {row.number}. {row.title}\n",
            _filled(row.promise),
            "",
            *_evidence(holding.get(row.number, []), figures),
        ]
    parts.append(AND_BESIDES)
    for row in BESIDES:
        names = [*holding.get(row.number, []), *((SOAK,) if row.title == "Soak" else ())]
        parts += [f"\n### {row.title}\n", _filled(row.promise), "", *_evidence(names, figures)]
    return "\n".join(parts) + "\n" + LIMITS


def _evidence(names: list[str], figures: list[dict[str, Any]]) -> list[str]:
    texts = shown(figure for figure in figures if figure["test"] in names)
    return [*(f"- {text}" for text in texts), *_tests(names)]


def _tests(names: list[str]) -> list[str]:
    links = [f"[{name}](../{name.partition('::')[0]})" for name in names]
    return ["", _filled(f"Held by {', '.join(links)}.")] if links else []


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def environment() -> dict[str, str]:
    """What the figures were measured with; nothing private."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "accelerate")}
    return {"python": platform.python_version(), **versions, "cores": str(os.cpu_count())}


def main(files: list[str]) -> None:
    if files:
        lines = [line for file in files for line in Path(file).read_text().splitlines()]
        kept = [json.dumps(environment()), *(json.dumps(figure) for figure in added_up(lines))]
        FIGURES.write_text("\n".join(kept) + "\n", encoding="utf-8")
    PAGE.write_text(page(FIGURES.read_text(encoding="utf-8").splitlines()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
