"""The table of a comparison: its figures, its files, a SIGKILL on the way, a search, and a suite."""

import csv
import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import fork, wait

from remap.errors import DataError, RecipeError, RemapError, RunError
from remap.pipeline.compare import Plan, compare
from remap.pipeline.comparison_files import epochs_in_words
from remap.pipeline.comparison_folder import SEARCH, shared_teacher
from remap.pipeline.comparison_table import _answers, _difference, _dominates, _pairs, ppt
from remap.pipeline.suite import markdown, run_suite, summarize_suite
from remap.progress import Silent
from remap.recipe import Recipe
from remap.recipe.suite import Suite, load_suite
from remap.report.compare_report import report_comparison
from remap.runs.answers import Answers, Evidence, read_evidence
from remap.runs.interval import paired
from remap.runs.run_dir import RunDir

METHODS = ["full", "linear"]
# Times, and what the machine held.
MEASURED = {"seconds", "step_seconds", "peak_memory_bytes", "output"}


@pytest.fixture(scope="module")
def recipe(tiny: Any) -> Recipe:
    return tiny.recipe("train.checkpoint_seconds=0", "teacher.allow_weak=true", losses="ce,kd")


@pytest.fixture(scope="module")
def compared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "table"
    compare(recipe, METHODS, 2, folder, Silent())
    return folder


def unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: unmeasured(one) for key, one in value.items() if key not in MEASURED}
    return [unmeasured(one) for one in value] if isinstance(value, list) else value


def read(folder: Path, name: str = "compare.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def test_differences_are_over_the_same_images_and_seeds(compared: Path) -> None:
    """From the answers of each run, not from the table; labels are those of 9 images."""
    row = next(row for row in read(compared)["rows"] if row["method"] == "linear")

    def right(method: str, side: str) -> np.ndarray:
        found = [read_evidence(compared / f"{method}-{side}-s{seed}") for seed in (0, 1)]
        return np.array([np.equal(one.student.predictions, one.labels) for one in found if one is not None])

    assert right("linear", "teacher").shape == (2, 9)
    for key, first, second in (
        ("to_alone", right("linear", "teacher"), right("linear", "alone")),
        ("to_full", right("linear", "teacher"), right("full", "alone")),
        ("alone_to_full", right("linear", "alone"), right("full", "alone")),
    ):
        found = row["difference"][key]
        assert (found["mean"], found["low"], found["high"]) == pytest.approx(paired(first, second))
        assert found["distinguishable"] == (found["low"] > 0 or found["high"] < 0)
    assert row["gain"] == pytest.approx(row["difference"]["to_alone"]["mean"])
    rows = {row["name"]: row["difference"]["alone_to_full"] for row in read(compared)["rows"]}
    assert [name for name, found in rows.items() if found is None] == ["full"], "it does not differ from itself"


def test_agreement_and_the_surer_answer_of_two(compared: Path) -> None:
    """Counted one image at a time."""
    (pair,) = read(compared)["pairs"]
    same, surer, count = 0, 0, 0
    for seed in (0, 1):
        one, two = (read_evidence(compared / f"{method}-teacher-s{seed}") for method in METHODS)
        assert one is not None and two is not None
        for image, label in enumerate(one.labels):
            answers = one.student.predictions[image], two.student.predictions[image]
            first_is_surer = one.student.confidences[image] >= two.student.confidences[image]
            same, count = same + (answers[0] == answers[1]), count + 1
            surer += answers[0 if first_is_surer else 1] == label
    assert pair["methods"] == METHODS and pair["agreement"] == pytest.approx(same / count)
    best = max(row["teacher"]["mean"] for row in read(compared)["rows"])
    assert pair["ensemble_gain"] == pytest.approx(surer / count - best)


def test_the_trade_off_is_that_of_its_authors() -> None:
    """Rows of V-PETL Bench (Xin et al. 2024), fine-grained classes: VPT-deep, SSF and LoRA."""
    rows = {(0.8910, 850_000): 0.86, (0.9072, 390_000): 0.89, (0.8478, 770_000): 0.82}
    assert {key: round(ppt(*key), 2) for key in rows} == rows


def test_floating_point_operations_are_counted_as_by_hand(compared: Path) -> None:
    """A ViT of depth 2, width D 16 and MLP 32 on 4 patches of 8 x 8 x 3 and a class token, S = 5; two operations for
    each multiply-add: patches, then query, key and value, two products of attention, projection and MLP, then 3 logits.
    """
    s, d, h = 5, 16, 32
    by_hand = 4 * 192 * d + 2 * (s * d * 3 * d + 2 * s * s * d + s * d * d + 2 * s * d * h) + d * 3
    assert {row["flops"] for row in read(compared)["rows"]} == {2 * by_hand}


def test_the_front_holds_what_nothing_dominates() -> None:
    def row(parameters: int, mean: float) -> dict[str, Any]:
        return {"trainable_parameters": parameters, "teacher": {"mean": mean}}

    rows = [row(10, 0.8), row(20, 0.8), row(20, 0.9), row(30, 0.9), row(5, 0.1)]
    front = [not any(_dominates(other, one) for other in rows) for one in rows]
    assert front == [True, False, True, False, True]


def test_the_tables_are_files_of_four_kinds(compared: Path) -> None:
    table = read(compared)
    with open(compared / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["teacher_mean"]) for row in rows] == [row["teacher"]["mean"] for row in table["rows"]]
    assert float(rows[1]["difference_to_full_low"]) == table["rows"][1]["difference"]["to_full"]["low"]
    text, latex = (compared / "compare.md").read_text(), (compared / "compare.tex").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 2 and len({line.count("|") for line in lines}) == 1  # one category, two methods
    assert "full" in text and "not distinguishable" in text and "9 evaluation images" in text
    body = [line for line in latex.splitlines() if line.endswith("\\\\")]
    assert latex.count("\\begin{tabular}") == 1 and {line.count(" & ") for line in body} == {0, lines[0].count("|") - 2}
    assert all(char not in line.replace("\\%", "") for line in body for char in "%")


def test_killed_at_a_random_moment_the_table_is_the_same(
    recipe: Recipe, compared: Path, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    step = random.Random(os.urandom(8)).randrange(1, 8 * 6)  # of eight cells

    def die(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = tmp_path / "killed"
    killed = fork(partial(compare, recipe, METHODS, 2, folder, watch(die)), tmp_path / "errors")
    assert wait(killed, 200.0) == -signal.SIGKILL, (step, (tmp_path / "errors").read_text())
    assert not (folder / "compare.json").exists()
    compare(recipe, METHODS, 2, folder, Silent())
    assert unmeasured(read(folder)) == unmeasured(read(compared)), step


def test_a_folder_of_another_recipe_names_every_difference(compared: Path, tiny: Any) -> None:
    other = tiny.recipe(
        "train.checkpoint_seconds=0", "teacher.allow_weak=true", "train.weight_decay=0.5", losses="ce,kd"
    )
    with pytest.raises(RunError, match=r"given:   train\.weight_decay: 0\.5 now, 0\.0001 then\n"):
        compare(other, METHODS, 2, compared, Silent())


@pytest.mark.parametrize(
    ("settings", "words", "given"),
    [
        (("train.lr=0.5",), {}, "train.lr: 0.5 now, 0.01 then"),
        ((), {"seed": 5}, "seed: 5 now, 0 then"),
        ((), {"losses": "ce,kd:2"}, "losses: ce x 1, kd x 2 now, ce x 1, kd x 1 then"),
    ],
)
def test_what_the_cells_of_one_comparison_may_differ_in_is_named_too(
    compared: Path, tiny: Any, settings: tuple[str, ...], words: dict[str, Any], given: str
) -> None:
    common = ("train.checkpoint_seconds=0", "teacher.allow_weak=true")
    with pytest.raises(RunError, match=rf"given:   {given}\n"):
        compare(tiny.recipe(*common, *settings, **{"losses": "ce,kd", **words}), METHODS, 2, compared, Silent())


def test_every_cell_is_searched_alike_and_evaluation_images_decide_nothing(
    recipe: Recipe, tmp_path: Path, watch: Callable[..., Any]
) -> None:
    pytest.importorskip("optuna")
    full = recipe.model_copy(update={"teachers": (recipe.teachers[0].model_copy(update={"prepare": "full"}),)})
    spoken = watch(lambda step: None)
    compare(full, ["linear"], 1, tmp_path / "full", spoken, Plan(search="random:1"))
    tuning = [line for line in spoken.said if "tuning it" in line]
    assert tuning and not [line for line in tuning if line.startswith("search")]  # all trials share it
    found = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent(), Plan(search="random:2"))
    trials = sorted((tmp_path / "cmp" / SEARCH).glob("*/0*"))
    assert [path.parent.name for path in trials] == ["linear-alone"] * 2 + ["linear-teacher"] * 2
    assert {RunDir(path).recipe().data.held_out for path in trials} == {0.2}
    for group, values in found["search"].items():
        accuracies = [RunDir(path).summary()["student"]["accuracy"] for path in trials if path.parent.name == group]
        assert values["held_out_accuracy"] == max(accuracies)
        first = accuracies[0] == max(accuracies)  # the declared default is tried first, and wins a tie
        assert (values["learning_rate_factor"] == 1.0) is first
        chosen = RunDir(tmp_path / "cmp" / f"{group}-s0").recipe()
        assert chosen.train.lr == pytest.approx(0.01 * values["learning_rate_factor"])
        assert chosen.train.weight_decay == pytest.approx(values["weight_decay"])
    seen = watch(lambda step: None)
    again = compare(recipe, ["linear"], 1, tmp_path / "cmp", seen, Plan(search="random:2"))
    assert again == found and seen.steps == 0


@pytest.mark.parametrize(("epochs", "words"), [(1, "1 epoch"), (12, "12 epochs"), ("7 to 12", "7 to 12 epochs")])
def test_epochs_have_a_true_plural(epochs: int | str, words: str) -> None:
    assert epochs_in_words({"epochs": epochs}) == words


def test_epochs_by_labels_only_are_named_where_they_are_more(tiny: Any, tmp_path: Path) -> None:
    """24 images in batches of 8 are 3 steps; 8 of them with a label make a step an epoch, so 3 epochs."""
    settings = ("train.batch_size=8", "train.epochs=1", "data.labels=8", "teacher.allow_weak=true")
    table = compare(tiny.recipe(*settings, losses="ce,kd"), ["linear"], 1, tmp_path / "cmp", Silent())
    assert (table["rows"][0]["epochs"], table["rows"][0]["epochs_alone"]) == (1, 3)
    words = "1 epoch with the teacher, 3 epochs by labels only"
    assert epochs_in_words(table) == words and words in (tmp_path / "cmp" / "compare.md").read_text()
    text = report_comparison(tmp_path / "cmp", pngs=False).read_text()
    assert "epochs by labels only" in text


def test_minutes_are_measured_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2 s, 3 in an epoch: half a minute is 5 epochs."""
    cost = {"estimate": {"step_seconds": 2.0, "steps": 6}}
    monkeypatch.setattr("remap.pipeline.dry_run.estimate", lambda recipe, progress: cost)
    table = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent(), Plan(budget="minutes=0.5"))
    assert table["rows"][0]["epochs"] == 5 and table["budget"] == "minutes=0.5"
    monkeypatch.setattr("remap.pipeline.dry_run.estimate", None)
    assert compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent(), Plan(budget="minutes=0.5")) == table
    with pytest.raises(RunError, match="another budget"):
        compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent(), Plan(budget="minutes=1"))


def test_a_remapped_student_starts_from_the_teacher_in_both_cells(recipe: Recipe, tmp_path: Path) -> None:
    table = compare(recipe, ["full@weight_selection"], 1, tmp_path / "cmp", Silent())
    assert [row["category"] for row in table["rows"]] == ["5 remapping tuning"]
    cells = [RunDir(tmp_path / "cmp" / f"full@weight_selection-{side}-s0").summary() for side in ("alone", "teacher")]
    assert [list(cell["losses"]) for cell in cells] == [["ce"], ["ce", "kd"]]
    assert cells[0]["student"]["init"] == cells[1]["student"]["init"]
    with pytest.raises(RemapError):  # the teacher is wider
        compare(recipe, ["full@layers"], 1, tmp_path / "impossible", Silent())
    assert not (tmp_path / "impossible").exists()


def test_swept_images_have_a_teacher_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    table = compare(recipe, ["linear"], 1, tmp_path / "cmp", Silent(), Plan(sweeps=["data.per_class=4,8"]))
    assert [row["settings"] for row in table["rows"]] == [{"data.per_class": 4}, {"data.per_class": 8}]
    cells = [RunDir(tmp_path / "cmp" / f"linear-data.per_class={count}-teacher-s0") for count in (4, 8)]
    assert [cell.summary()["data"]["train_images"] for cell in cells] == [12, 24]
    teachers = {shared_teacher(cell) for cell in cells}
    assert len(teachers) == 2 and teachers == set((tmp_path / "cmp").glob("teacher*"))


def test_a_suite_is_one_comparison_for_each_set(recipe: Recipe, tiny: Any, tmp_path: Path) -> None:
    values = recipe.model_dump(mode="json", exclude={"name", "data"})
    sets = {name: {"data": {"source": "data", "workers": 1}, "train": 24, "val": 9, "classes": 3} for name in "ab"}
    suite = Suite(recipe=values, methods="linear", seeds=1, sets=sets)
    found = run_suite(suite, Path(tiny.data).parent, tmp_path / "suite", Silent(), settings=["train.epochs=1"])
    assert (tmp_path / "suite" / "b" / "compare.json").is_file() and (tmp_path / "suite" / "suite.md").is_file()
    (row,) = found["rows"]
    assert row["sets"]["a"] == row["sets"]["b"] and row["teacher"]["mean"] == row["sets"]["a"]["teacher"]
    wrong = suite.model_copy(update={"sets": {"a": suite.sets["a"].model_copy(update={"val": 10, "class_ids": True})}})
    with pytest.raises(DataError, match=r"val: 9, not 10; class ids: not the whole numbers from 0 to 2 \(blue, green"):
        run_suite(wrong, Path(tiny.data).parent, tmp_path / "wrong", Silent())
    with pytest.raises(RecipeError, match="--sets DIR"):
        run_suite(suite, None, tmp_path / "wrong", Silent())
    assert not (tmp_path / "wrong").exists()


def test_both_averages_of_a_suite() -> None:
    """By hand: groups of two sets and one; flat mean (1 + 2 + 6) / 3, mean of groups (1.5 + 6) / 2, in tenths."""

    def table(tenths: int) -> dict[str, Any]:
        gap = {"mean": 0.1 * tenths, "low": 0.1, "high": 0.2}
        sides = {side: {"mean": 0.1 * tenths} for side in ("alone", "teacher")}
        return {
            "images": 9,
            "seeds": [0],
            "rows": [{"name": "m", "category": "c", **sides, "difference": {"to_full": gap}}],
        }

    found = summarize_suite({"x": table(1), "y": table(2), "z": table(6)}, {"x": "g", "y": "g", "z": "h"})
    (row,) = found["rows"]
    assert row["teacher"]["mean"] == pytest.approx(0.3) and row["teacher"]["mean_of_groups"] == pytest.approx(0.375)
    # Student's t of 2 degrees of freedom is 4.3027; the standard deviation of 1, 2 and 6 is sqrt(7).
    half = 4.30265 * 0.1 * 7**0.5 / 3**0.5
    assert (row["to_full"]["low"], row["to_full"]["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-5)
    assert row["to_full"]["better"] == 3 and not row["to_full"]["distinguishable"]


def test_a_suite_without_a_method_on_every_set_says_so() -> None:
    sides = {side: {"mean": 0.5} for side in ("alone", "teacher")}
    tables = {
        name: {"images": 9, "seeds": [0], "rows": [{"name": method, "category": "c", **sides, "difference": {}}]}
        for name, method in (("x", "lora"), ("y", "ssf"))
    }
    found = summarize_suite(tables, {"x": "g", "y": "h"})
    assert not found["rows"] and "No method is on every set" in markdown(found)


def test_images_that_could_not_be_read_are_no_answers(tmp_path: Path) -> None:
    """Of four images two were read, which one method answers right and the other wrong: a difference of 1."""
    for name, said, sure in (("a", [0, 1, -1, -1], 0.9), ("b", [1, 0, -1, -1], 0.6)):
        answers = Answers(predictions=said, confidences=[sure, sure, -1, -1], losses=[1, 1, -1, -1])
        (tmp_path / name).mkdir()
        Evidence(classes=["x", "y"], names=list("1234"), labels=[0, 1, 0, 1], student=answers).write(tmp_path / name)
    one, two = (_answers([tmp_path / name]) for name in "ab")
    difference = _difference(one, two)
    assert difference is not None and difference["mean"] == 1.0
    (pair,) = _pairs([("a", one), ("b", two)])
    assert (pair["agreement"], pair["ensemble"]) == (0.0, 1.0)


def test_a_set_of_a_suite_has_sections_of_its_own() -> None:
    """CIFAR-10's classes are those of the pair: its teacher is probed there, and tuned on the other sets."""
    suite = load_suite("offline")
    found = {name: suite.recipe_of(name, Path("sets")).teachers[0] for name in suite.sets}
    assert {name for name, teacher in found.items() if teacher.prepare == "probe"} == {"cifar10"}
    assert found["cifar10"].epochs is None and found["digits"].epochs == 10  # in place of the section, not merged


def test_a_setting_takes_the_place_of_what_a_set_says_of_its_images() -> None:
    suite = load_suite("offline")
    assert suite.recipe_of("emoji", Path("sets")).data.per_class == 300
    assert suite.recipe_of("emoji", Path("sets"), settings=["data.per_class=20"]).data.per_class == 20
    with pytest.raises(RecipeError, match="data: each set of a suite has its own images"):
        suite.recipe_of("emoji", Path("sets"), settings=["data=digits"])
    with pytest.raises(RecipeError, match="data: should be a mapping"):
        Suite(recipe={"data": "digits"}, sets=suite.sets).recipe_of("emoji", Path("sets"))


@pytest.mark.parametrize("name", ["offline", "five_categories", "vtab1k", "fgvc", "fewshot11", "words"])
def test_shipped_suites_are_valid(name: str) -> None:
    """Sets: 7 + 4 + 8 of VTAB (Zhai et al. 2019), 5 of VPT (Jia et al. 2022), 11 and 15 of CoOp (Zhou et al. 2022)."""
    suite = load_suite(name)
    counts = {"offline": 6, "five_categories": 1, "vtab1k": 19, "fgvc": 5, "fewshot11": 11, "words": 15}
    assert len(suite.sets) == counts[name]
    for one in suite.sets:
        assert suite.recipe_of(one, Path("sets")).name == one
    groups = [one.group for one in suite.sets.values()]
    if name == "vtab1k":
        assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
