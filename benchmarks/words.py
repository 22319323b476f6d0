"""Vision-language tuning by the protocols of its papers, on the embedded pair and drawings, or on your own images.

Run: python benchmarks/words.py PROTOCOL --results DIR [--methods coop,maple] [--seeds 3] [--minutes 10]

- labels: no label, then 1, 4 and 16 a class, for a student that `clip:mini` teaches (images of ``drawings:train``).
- few_shot: 1, 2, 4, 8 and 16 labelled images a class, seed s taking draw s (Zhou et al. 2022, arXiv 2109.01134).
- base_to_new: 16 images of each class of the first half; accuracy on both halves, and their harmonic mean (2203.05557);
  for promptkd, as in its paper, the training images of all classes without labels.
- domains: 16 a class of all classes; the same test names as another vendor draws them (``drawings:fluent``).
- cross: the same, on the classes of other sets (--on ants-bees.tar,cifar10-test.tar), whose images it never sees.

A method answers for new classes through their words: what it trained is attached to the same model with the new words.
A classifier that trains is left out: the zero-shot one reads the tuned features. Methods with other numbers for each
class (`taskres`, `tip_adapter`) have no such answer, and the table shows -. No choice is made on the test images: all
settings are fixed beforehand, the last epoch is the result. A cell that ended is one JSON file, and not run again;
one that was killed continues. All methods have a first seed before any has a second; the table is of what is there.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from remap.backbones.build import Backbone
from remap.data.sources import find_source, open_data
from remap.data.splits import ImageData, Split
from remap.data.views import View, ViewSource
from remap.distributed.launch import accelerator
from remap.engine.evaluation_pass import evaluate
from remap.errors import RemapError
from remap.network import Network, tuned
from remap.pipeline.class_words import write_words
from remap.pipeline.evaluate_run import evaluate_run
from remap.pipeline.run import resume, start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe import resolve
from remap.recipe.schema import DataSpec, ModelSpec
from remap.runs.run_dir import RunDir
from remap.runs.task import open_backbone
from remap.runs.task_file import folder_of, read_meta, read_tensors
from remap.tuning import METHODS

SHOTS = {"labels": (0, 1, 4, 16), "few_shot": (1, 2, 4, 8, 16), "base_to_new": (16,), "domains": (16,), "cross": (16,)}
ROWS = (
    *("linear", "bitfit", "lora", "vpt_deep", "coop", "cocoop", "kgcoop", "prograd", "tcp", "maple", "promptsrc"),
    *("mmrl", "clip_adapter", "tip_adapter", "tip_adapter:free", "taskres", "clip_lora", "promptkd", "lora:clip_kd"),
)
# What trains numbers for each class beside the classifier, which mean nothing for other classes.
PER_CLASS = ("taskres", "tip_adapter")
# What a method on words keeps of the classes that it was trained on.
WORDS = ("remap_words.name_ids", "remap_promptkd.weight", "remap_promptkd.bias")
# Rows with options and settings of their own; what is behind the colon names one of several rows of a method.
VARIANTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "promptkd": ({"teacher": "clip:mini", "losses": "kd"}, ["losses.kd.temperature=1"]),
    "tip_adapter:free": ({}, ["train.fit=none"]),
    "lora:clip_kd": ({"teacher": "clip:mini", "losses": "ce,kd,clip_feature,affinity"}, []),
}
# Of its 16 vectors the paper of these protocols leaves coop 4, which start from words (2203.05557, section 4).
FEWER = ("base_to_new", "domains", "cross")
SETTINGS = ("train.batch_size=32", "train.epochs=10", "train.eval_every=1000")
DATA = "drawings"


def accuracy(network: Network, split: Split, view: View) -> float:
    """Accuracy on a split, without augmentation."""
    images = ViewSource(split, view, memory_bytes=2**30)
    images.load(Silent(), "test images")
    return evaluate(network, images, accelerator(), batch_size=100, bf16=False, progress=Silent(), what="test").accuracy


def network_of(backbone: Backbone, classes: Sequence[str], data: DataSpec, method: str, options: dict) -> Network:
    """A vision-language model with the words of some classes, and a method on it."""
    write_words(backbone, data, classes, Silent())
    network = tuned(backbone, method, options)
    network.classes = tuple(classes)
    network.model.eval()
    return network


def reworded(run: Path, classes: Sequence[str], data: DataSpec) -> tuple[Network, View]:
    """The tuned model of a run for other classes, and its view of images."""
    folder = folder_of(run)
    meta = read_meta(folder)
    spec = ModelSpec(model=meta.backbone.model, image_size=meta.backbone.image_size)
    backbone = open_backbone(spec, len(classes))
    network = network_of(backbone, classes, data, meta.method.name, meta.method.options)
    trained = {k: v for k, v in read_tensors(folder, meta).items() if not network.anatomy.is_head(k)}
    words = {k: v for k, v in network.attached.state().items() if k in WORDS}  # of the new classes
    network.attached.load(trained | words)
    network.model.train()
    network.model.eval()  # a method that writes the classifier does it now
    return network, meta.view


class Protocol:
    """What one protocol runs and how it is judged."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.shared = options, SharedResources()
        self.results: Path = options.results
        self.words = DataSpec(templates=options.templates)

    def file(self, method: str, shots: int, seed: int) -> Path:
        """Where the figures of one run are, once it has ended."""
        return self.results / f"{self.options.protocol}-{method.replace(':', '_')}-{shots}-{seed}.json"

    def cell(self, method: str, shots: int, seed: int) -> None:
        """One run, unless it has ended before; an error costs this cell only."""
        done, started = self.file(method, shots, seed), time.perf_counter()
        if done.exists():
            return
        folder = self.results / "runs" / done.stem
        try:
            found = getattr(self, self.options.protocol)(method, shots, seed, folder)
        except RemapError as error:
            print(done.stem, error, flush=True)
            return
        done.write_text(json.dumps(found))
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{done.stem} {found}, {time.perf_counter() - started:.0f} s", flush=True)

    def run(self, method: str, shots: int, seed: int, folder: Path, *settings: str, **words: Any) -> dict[str, Any]:
        """Train, or resume, and return the summary."""
        if (folder / "recipe.yaml").exists():
            run_dir = RunDir.open(folder)
            return run_dir.summary() if run_dir.is_done else dict(resume(folder).summary)
        own, needed = VARIANTS.get(method, ({}, []))
        words = {
            "data": DATA,
            "method": method.partition(":")[0],
            "student": "clip:mini",
            "losses": "ce",
            "seed": seed,
            **own,
            **words,
        }
        few = [f"data.per_class={shots}", f"data.per_class_seed={seed}"] if shots else []
        if method == "coop" and self.options.protocol in FEWER:
            few += ["method.num_context=4", "method.words=a photo of a"]
        given = [*SETTINGS, *needed, *few, f"data.templates={self.options.templates}", *settings, *self.options.set]
        recipe = resolve(None, words, given)
        return dict(start(recipe, folder, Silent(), self.shared).summary)

    def labels(self, method: str, shots: int, seed: int, folder: Path) -> dict[str, float | None]:
        """A student of clip:mini, with and without labels, and its teacher."""
        taught = {"teacher": "clip:mini", "student": self.options.student}
        if shots:
            found = self.run(method, shots, seed, folder, losses="ce,kd", unlabeled=f"{DATA}:train", **taught)
        else:
            found = self.without_labels(method, seed, folder, losses="kd", **taught)
        return {"student": found["student"]["accuracy"], "teacher": found["teacher"]["accuracy"]}

    def without_labels(self, method: str, seed: int, folder: Path, **words: Any) -> dict[str, Any]:
        """All training images, none of their labels."""
        classes = ",".join(open_data(DATA, None, 0.2).classes)
        images = {"data": None, "unlabeled": f"{DATA}:train", "val_data": f"{DATA}:test", "classes": classes}
        return self.run(method, 0, seed, folder, **images, **words)

    def few_shot(self, method: str, shots: int, seed: int, folder: Path) -> dict[str, float | None]:
        """All classes, few images."""
        return {"test": self.run(method, shots, seed, folder)["student"]["accuracy"]}

    def base_to_new(self, method: str, shots: int, seed: int, folder: Path) -> dict[str, float | None]:
        """Half of the classes, then the others by their words."""
        halves = {name: open_data(DATA, None, 0.2, subset=name) for name in ("base", "new")}
        if method == "promptkd":
            self.without_labels(method, seed, folder)
            found = {name: self.by_words(folder, data.classes, data.val) for name, data in halves.items()}
            return found | harmonic(found)
        base = self.run(method, shots, seed, folder, "data.subset=base")["student"]["accuracy"]
        found = {"base": base, "new": self.by_words(folder, halves["new"].classes, halves["new"].val)}
        return found | harmonic(found)

    def domains(self, method: str, shots: int, seed: int, folder: Path) -> dict[str, float | None]:
        """The same classes, drawn by others."""
        found = {"source": self.run(method, shots, seed, folder)["student"]["accuracy"]}
        return found | {"fluent": evaluate_run(folder, f"{DATA}:fluent", False, Silent())["accuracy"]}

    def cross(self, method: str, shots: int, seed: int, folder: Path) -> dict[str, float | None]:
        """Other sets by the words of their classes."""
        found: dict[str, float | None] = {"source": self.run(method, shots, seed, folder)["student"]["accuracy"]}
        for word in self.options.on:
            data = find_source(word).open(word, None, 0.5)
            found[Path(word).stem] = self.by_words(folder, data.classes, to_judge(data))
        return found

    def by_words(self, run: Path, classes: Sequence[str], split: Split) -> float | None:
        """Accuracy of a run's model on classes that it was not tuned for; None where it cannot answer."""
        if read_meta(folder_of(run)).method.name in PER_CLASS:
            return None
        network, view = reworded(run, classes, self.words)
        return accuracy(network, split, view)

    def zero_shot(self) -> dict[str, float | None]:
        """The model as it is."""
        parts: dict[str, tuple[str, str | None]] = {
            "base_to_new": {"base": (DATA, "base"), "new": (DATA, "new")},
            "domains": {"source": (DATA, None), "fluent": (f"{DATA}:fluent", None)},
            "cross": {"source": (DATA, None), **{Path(word).stem: (word, None) for word in self.options.on}},
        }.get(self.options.protocol, {"test": (DATA, None)})
        found: dict[str, float | None] = {}
        for title, (word, subset) in parts.items():
            data = open_data(word, None, 0.5, subset=subset)
            backbone = open_backbone(ModelSpec(model="clip:mini"), len(data.classes))
            network = network_of(backbone, data.classes, self.words, "linear", {})
            spec = network.preprocess
            split = data.everything if word == f"{DATA}:fluent" else to_judge(data)
            found[title] = accuracy(network, split, View(spec.size, spec.crop_pct, spec.interpolation))
        return found | harmonic(found)


def to_judge(data: ImageData) -> Split:
    """The test images of a set."""
    return data.val if data.test is None else data.test


def harmonic(found: dict[str, float | None]) -> dict[str, float | None]:
    """The harmonic mean of both halves, where they are there."""
    base, new = found.get("base"), found.get("new")
    if "base" not in found:
        return {}
    return {"H": 2 * base * new / (base + new) if base and new else None}


def shown(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    known = [100 * value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def main() -> None:
    """Run what is missing, and print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("protocol", choices=list(SHOTS))
    words.add_argument("--results", type=Path, required=True)
    words.add_argument("--methods", default=",".join(name for name in ROWS if name.partition(":")[0] in METHODS.names))
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--shots", default="", help="of those of the protocol")
    words.add_argument("--student", default="clip:mini", help="of labels")
    words.add_argument("--templates", default="one")
    words.add_argument("--on", default="", help="other sets, of cross")
    words.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    words.add_argument("--set", action="append", default=[], help="further settings, as train.epochs=20")
    options = words.parse_args()
    options.on = [word for word in options.on.split(",") if word]
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(options)
    shots = [int(one) for one in options.shots.split(",") if one] or list(SHOTS[options.protocol])
    pairs = [(method, count) for method in options.methods.split(",") for count in shots]
    end = time.monotonic() + 60 * options.minutes
    for seed in range(options.seeds):
        for method, count in pairs:
            if time.monotonic() < end:
                protocol.cell(method, count, seed)
    rows = {} if options.protocol == "labels" else {("zero-shot", ""): [protocol.zero_shot()]}
    for method, count in pairs:
        files = [protocol.file(method, count, seed) for seed in range(options.seeds)]
        rows[method, count] = [json.loads(file.read_text()) for file in files if file.exists()]
    columns = list(next((cells[0] for cells in rows.values() if cells), {}))
    print(f"| method | labels a class | {' | '.join(columns)} | seeds |\n|---|{'---:|' * (len(columns) + 2)}")
    for (method, count), cells in rows.items():
        figures = " | ".join(shown([cell[key] for cell in cells]) for key in columns)
        print(f"| {method} | {count} | {figures} | {len(cells)} |")


if __name__ == "__main__":
    main()
