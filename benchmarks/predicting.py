"""Memory and restarts of `remap predict --output` over many images, and what 20 tasks on one backbone cost.

python benchmarks/predicting.py files --images 20000     RSS every 2,000 images; SIGKILL and resume
python benchmarks/predicting.py tasks --count 20         disk, switching, mixed batches, on random ViT-S weights
python benchmarks/predicting.py speed --folder photos --against ../main     with another checkout, in turns
python benchmarks/predicting.py lanes --folder photos --run runs/digits-hira-001     passes side by side, and one alone
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from remap.data.views import View
from remap.network import tuned
from remap.pipeline.student_api import load_student
from remap.prediction import predictions as module
from remap.prediction.inputs import Inputs
from remap.prediction.predict import open_students
from remap.recipe.schema import ModelSpec
from remap.runs.task import open_backbone, save_task
from remap.tasks.shelf import Shelf

METHODS = ("lora", "vpt_deep", "adaptformer", "ssf", "linear")


def task(folder: Path, model: str, method: str, classes: int) -> Path:
    """Write a task folder with random trained tensors."""
    network = tuned(open_backbone(ModelSpec(model=model), classes), method, {})
    with torch.no_grad():
        for parameter in network.trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.classes = tuple(f"class {index}" for index in range(classes))
    save_task(folder, network, View(network.preprocess.size, 0.9, "bicubic"), method, {})
    return folder


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def files(images: int) -> None:
    """Predict the same few pictures again and again by a list; kill the command on the way, then give it again."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run = task(root / "run", "mini_student", "linear", 10)
        for index in range(100):
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{index}.png")
        (root / "list.txt").write_text("".join(f"{root}/{index % 100}.png\n" for index in range(images)))
        words = [sys.executable, "-m", "remap_cli", "predict", str(run), "--list", str(root / "list.txt")]
        words += ["--output", str(root / "rows.jsonl")]
        part, seen, killed = root / "rows.jsonl.parts" / "0.part", 0, False
        command = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        while command.poll() is None:
            time.sleep(0.2)
            rows = part.read_bytes().count(b"\n") if part.exists() else 0
            if rows >= seen + images // 10:
                seen = rows
                print(f"{rows:,} rows: {resident_mb(command.pid):.0f} MB", flush=True)
            if not killed and rows > images * 0.55:
                os.kill(command.pid, signal.SIGKILL)
                command.wait()
                print(f"killed at {rows:,} rows, {part.stat().st_size:,} bytes", flush=True)
                killed, command = True, subprocess.Popen(words, stderr=subprocess.DEVNULL)
        rows = [json.loads(line)["path"] for line in (root / "rows.jsonl").read_text().splitlines()]
        expected = (root / "list.txt").read_text().splitlines()
        print(f"exit code {command.returncode}; rows equal to the list: {rows == expected}")


def tasks(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = timm.create_model("vit_small_patch16_224", num_classes=0)
        (root / "vit").mkdir()
        save_file(model.state_dict(), str(root / "vit" / "model.safetensors"))
        config = {"architecture": "vit_small_patch16_224", "num_classes": 0, "pretrained_cfg": model.pretrained_cfg}
        (root / "vit" / "config.json").write_text(json.dumps(config))
        trained = 0
        for index in range(count):
            folder = task(root / f"t{index}", f"local-dir:{root}/vit", METHODS[index % len(METHODS)], 10 + index)
            trained += (folder / "task.safetensors").stat().st_size
            Shelf.with_task(root / "shelf", f"t{index}", folder)
        every = sum(path.stat().st_size for path in (root / "shelf").rglob("*") if path.is_file())
        weights = (root / "shelf" / "backbone" / "model.safetensors").stat().st_size
        print(f"disk {every:,} bytes; backbone {weights:,} + 1.1 x {trained:,} = {weights + 1.1 * trained:,.0f}")
        begun = time.perf_counter()
        multi = Shelf(root / "shelf").open("cpu")
        print(f"opened {count} tasks in {time.perf_counter() - begun:.1f} s; alone: {multi.alone}")
        longest = 0.0
        for index in range(200):
            begun = time.perf_counter()
            multi.switch(f"t{index % count}")
            longest = max(longest, time.perf_counter() - begun)
        print(f"switching: {longest * 1e3:.4f} ms at most")
        views = list(torch.randint(0, 256, (2 * count, 3, 224, 224), dtype=torch.uint8))
        names = [f"t{index % count}" for index in range(2 * count)]
        begun = time.perf_counter()
        mixed = multi.logits_of_views(views, names)
        seconds, difference = time.perf_counter() - begun, 0.0
        begun = time.perf_counter()
        for index in range(count):
            solo = load_student(root / f"t{index}", "cpu").logits_of_views(
                torch.stack([views[index], views[index + count]])
            )
            for row, logits in zip((index, index + count), solo, strict=True):
                difference = max(difference, float((mixed[row] - logits).abs().max() / logits.abs().max().clamp(min=1)))
        print(f"mixed batch of {2 * count}: {seconds:.2f} s in one pass; largest difference to solo {difference:.1e}")


def command(checkout: Path, words: list[str], places: Path) -> tuple[float, float]:
    """Run `remap` of a checkout; return seconds on the wall and of the processor."""
    place = places / checkout.absolute().as_posix().strip("/").replace("/", "-")
    if not place.is_dir():
        place.mkdir(parents=True)
        for package, folder in (("remap_cli", "cli"), ("remap_recipes", "recipes")):
            (place / package).symlink_to(checkout.absolute() / folder)
    environment = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{checkout.absolute()}"}
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "remap_cli", *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - started, processor


def speed(folder: Path, against: Path, images: int, methods: list[str], repeats: int) -> None:
    """Predict a folder of images with the command of this checkout and of another one, in turns.

    Both read a run that the other one made. What one image takes is start-up, and is taken off.
    """
    print("| method | images | wall there | wall here | here / there: wall (range, pairs) | processor (range, pairs) |")
    print("|---|---|---|---|---|---|")
    sides = (against, Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        words = sorted(map(str, folder.iterdir()))[:images]
        (root / "images").mkdir()
        for word in words:
            os.link(word, root / "images" / Path(word).name)
        for method in methods:
            short = ["--set", "train.epochs=1", "--set", "teacher.epochs=1", "--output", str(root / method)]
            command(against, ["distill", "--method", method, *short], root / "places")
            found: list[list[tuple[float, float]]] = [[], []]
            for _ in range(repeats):
                for side, checkout in zip(found, sides, strict=True):
                    one, all_ = (
                        command(checkout, ["predict", str(root / method), what, "--json"], root / "places")
                        for what in (words[0], str(root / "images"))
                    )
                    side.append((all_[0] - one[0], all_[1] - one[1]))
            walls = [f"{median(wall for wall, _ in side):.1f} s" for side in found]
            ratios = [[new[clock] / old[clock] for old, new in zip(*found, strict=True)] for clock in (0, 1)]
            shown = [f"{median(one):.2f} ({min(one):.2f} to {max(one):.2f}, {len(one)})" for one in ratios]
            print(f"| `{method}` | {images:,} | {' | '.join(walls)} | {' | '.join(shown)} |", flush=True)


def lanes(run: Path, folder: Path, images: int, repeats: int) -> None:
    """Predict by forward passes side by side, each with a share of the cores, and by one at a time, in turns."""
    students, files, most = open_students(run, "cpu"), Inputs(sorted(folder.iterdir())[:images]), module.most_lanes
    found: list[list[tuple[float, float]]] = [[], []]
    rows: list[list[object]] = [[], []]
    for _ in range(repeats):
        for side, count in enumerate((lambda *_: 1, most)):
            module.most_lanes = count
            wall, used = time.perf_counter(), time.process_time()
            rows[side] = list(module.predictions(students, files, module.Wanted()))
            found[side].append((time.perf_counter() - wall, time.process_time() - used))
    ratios = [[new[clock] / old[clock] for old, new in zip(*found, strict=True)] for clock in (0, 1)]
    shown = [f"{median(one):.2f} ({min(one):.2f} to {max(one):.2f}, {len(one)})" for one in ratios]
    print(f"{len(rows[0]):,} images, {torch.get_num_threads()} threads; side by side / one: wall {shown[0]},", end=" ")
    print(f"processor {shown[1]}; {'equal' if rows[0] == rows[1] else 'other'} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["files", "tasks", "speed", "lanes"])
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--methods", default="vpt_deep,lora,linear")
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.folder, given.against, given.images, given.methods.split(","), given.repeats)
    elif given.what == "lanes":
        lanes(given.run, given.folder, given.images, given.repeats)
    else:
        files(given.images) if given.what == "files" else tasks(given.count)
