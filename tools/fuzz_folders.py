"""Fuzz recipes and task folders in one process, so that thousands take minutes.

    python tools/fuzz_folders.py --recipes 10000 --tasks 5000 --seed 0 [--figures measured.jsonl]

A recipe is a shipped one with values, keys, lines or bytes changed. A task folder has one of its two files changed:
bits flipped, bytes cut, added, moved or replaced, or made longer by a hole. Prints each traceback (an error that is not
a RemapError) and each silent load (a changed task that loads, or a recipe that does not survive its own writing). Exit
code 1 if there is any.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from remap.data.views import View
from remap.errors import RemapError
from remap.network import tuned
from remap.recipe import Recipe, catalogue, dump, strict_yaml, validate
from remap.recipe.schema import ModelSpec
from remap.runs.task import load_task, open_backbone, save_task

SCALARS = (
    "0",
    "-1",
    "1e400",
    ".nan",
    "null",
    "true",
    "9" * 30,
    '""',
    "'*'",
    "[]",
    "{}",
    "[[1]]",
    "kd",
    "lora+lora",
    "~",
    "é",
)


def changed_recipe(text: str, draw: random.Random) -> str:
    """Return the text of a recipe with one to four changes."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        kind = draw.randrange(7)
        if kind == 0:
            lines[at] = lines[at].partition(":")[0] + ": " + draw.choice(SCALARS)
        elif kind == 1:
            lines[at] = "  " * draw.randint(0, 3) + lines[at].strip()
        elif kind == 2:
            lines.insert(at, draw.choice(lines))
        elif kind == 3 and len(lines) > 1:
            del lines[at]
        elif lines[at]:
            place = draw.randrange(len(lines[at]))
            new = chr(draw.choice([*range(32, 127), 0, 9, 0x85, 0x2028, 0xD800, 0x1F600])) if kind > 4 else ""
            lines[at] = lines[at][:place] + new + lines[at][place + 1 :]
    return "\n".join(lines) + "\n"


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return other bytes: mostly one flipped bit, else a file of another length or with a part changed."""
    place, length = draw.randrange(len(data)), draw.randint(1, 64)
    noise = draw.randbytes(length)
    part = data[place : place + length]
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
        lambda: data[:place],
        lambda: data + noise,
        lambda: data + bytes(length),
        lambda: data[:place] + noise + data[place:],
        lambda: data[:place] + data[place + length :],
        lambda: data[:place] + noise + data[place + length :],
        lambda: data[:place] + part + data[place:],
        lambda: data[:place] + part[::-1] + data[place + length :],
    )
    return draw.choice(kinds if draw.random() < 0.5 else kinds[:1])()


def outcome(call: Callable[[], object]) -> str:
    """Return "loads" or "refused", or a traceback."""
    try:
        call()
    except RemapError as error:
        return "refused" if str(error) and error.exit_code == 2 else f"an error without a message: {error!r}"
    except Exception:
        return traceback.format_exc()
    return "loads"


def fuzz_recipes(count: int, seed: int) -> Counter[str]:
    """Return how many changed recipes were refused, are valid, or ended in each traceback."""
    draw, found = random.Random(seed), Counter[str]()
    texts = [catalogue.find(name).read_text() for name in catalogue.names()]
    for _ in range(count):
        text = changed_recipe(draw.choice(texts), draw)

        def read(text: str = text) -> None:
            value = strict_yaml.parse(text, "fuzz")
            recipe = validate(value if isinstance(value, dict) else {}, "fuzz")
            if Recipe.model_validate(strict_yaml.parse(dump(recipe), "again")) != recipe:
                raise AssertionError(f"does not survive its own writing: {text!r}")

        found[outcome(read)] += 1
    return found


def write_task(folder: Path) -> None:
    """Write a task of LoRA on the shipped student."""
    network = tuned(open_backbone(ModelSpec(model="mini_student"), 3), "lora", {})
    network.classes = ("a", "b", "c")
    size = network.preprocess.size
    save_task(folder, network, View(size, 1.0, "bicubic"), "lora", {})
    load_task(folder)


def fuzz_tasks(count: int, seed: int, folder: Path) -> Counter[str]:
    """Return how many changed task folders were refused, loaded in silence, or ended in each traceback."""
    draw, found = random.Random(seed), Counter[str]()
    write_task(folder)
    for number in range(count):
        path = folder / draw.choice(("task.json", "task.safetensors"))
        data = path.read_bytes()
        changed = changed_bytes(data, draw)
        path.write_bytes(changed)
        hole = 2 ** draw.randrange(40) if number % 100 == 99 else 0
        os.truncate(path, len(changed) + hole)
        if changed != data or hole:
            found[outcome(lambda: load_task(folder))] += 1
        path.write_bytes(data)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, help="append what docs/guarantees.md shows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipes = fuzz_recipes(arguments.recipes, arguments.seed)
        tasks = fuzz_tasks(arguments.tasks, arguments.seed, Path(folder) / "task")
    wrong = {text: count for text, count in (recipes + tasks).items() if text not in ("refused", "loads")}
    print(f"recipes: {recipes['refused']} refused, {recipes['loads']} valid of {recipes.total()}")
    print(f"task folders: {tasks['refused']} refused, {tasks['loads']} silent loads of {tasks.total()}")
    print(f"tracebacks: {sum(wrong.values())}", *wrong, sep="\n")
    if arguments.figures is not None:
        silent = {"what": "silent loads of changed task folders", "value": tasks["loads"], "of": tasks.total()}
        failed = {"what": "changed recipes and task folders, tracebacks", "value": sum(wrong.values())}
        rows = [silent, failed | {"of": recipes.total() + tasks.total()}]
        with open(arguments.figures, "a") as file:
            file.writelines(json.dumps({"test": "tools/fuzz_folders.py", **row}) + "\n" for row in rows)
    sys.exit(bool(wrong or tasks["loads"]))


if __name__ == "__main__":
    main()
