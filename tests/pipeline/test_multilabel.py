"""Runs that learn several classes an image: tiny ones, from the command line to an exported file."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from typer.testing import CliRunner

import remap
from remap.data import METRIC
from remap.errors import Interrupted, RecipeError, RunError, TrainingError
from remap.pipeline.commands import evaluate
from remap.pipeline.extend import situation
from remap.pipeline.logistic import fit_each_class
from remap.pipeline.recommend import recommend
from remap.pipeline.run import Result, resume, start
from remap.pipeline.run_differences import compare
from remap.pipeline.session_protocol import compare_sessions
from remap.pipeline.teachers import load_teacher
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.recipe.schema import DataSpec, TeacherSpec
from remap.report.compare_report import report_comparison
from remap.runs.answers import read_evidence
from remap.runs.interval import Measured
from remap.runs.run_dir import RunDir
from remap.runs.task_file import read_meta
from remap_cli.app import app

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def words(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """40 images of noise in which any of three channels are raised, and a table of which."""
    root, draws = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    with open(root / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "labels"])
        for number in range(40):
            has = draws.random(3) < 0.4
            pixels = draws.integers(0, 120, (16, 16, 3)) + 110 * has
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
            table.writerow([f"{number}.png", "|".join(np.array(COLOURS[::-1])[has])])
    return tiny.words(data=f"csv:{root}/labels.csv,separator=|")


@pytest.fixture(scope="module")
def recipe(tiny: Any, words: dict[str, Any]) -> Callable[..., Recipe]:
    def make(*settings: str, **more: object) -> Recipe:
        return resolve(words={**words, **more}, settings=[*tiny.SETTINGS, "task=multilabel", *settings])

    return make


@pytest.fixture(scope="module")
def done(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Result:
    made = recipe("train.keep=best", "data.mixup=0.4", losses="ce,kd,feature", method="lora")
    return start(made, tmp_path_factory.mktemp("multilabel") / "run")


def test_a_run_says_map_and_its_student_repeats_it(done: Result, tmp_path: Path) -> None:
    """Source of mAP: scikit-learn, on the probabilities of the predictions."""
    student = done.summary["student"]
    assert done.summary["metric"] == done.summary["choice"]["metric"] == "mAP"
    assert student["accuracy"] == student["metrics"]["mAP"] and done.summary["teacher"]["accuracy"] > 0.9
    records = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all({"mAP", "val_bce"} <= record.keys() and "accuracy" not in record for record in records)
    meta = read_meta(done.run_dir / "task")
    assert (meta.task, meta.format) == ("multilabel", 2), "versions that do not know the task refuse its format"

    found = evaluate(done.run_dir)
    assert (found["accuracy"], found["correct"]) == (student["accuracy"], student["correct"])
    assert 0.0 <= found["interval"][0] <= found["interval"][1] <= 1.0
    assert "mAP" in {check["what"] for check in compare(RunDir(done.run_dir), RunDir(done.run_dir))["checks"]}
    evidence = read_evidence(done.run_dir)
    assert evidence is not None
    folder = Path(done.summary["data"]["source"].split(":", 1)[1].split("/labels.csv")[0])
    paths = [folder / name for name in evidence.names]
    rows = list(remap.predict(done.run_dir, paths, threshold=0.0, probabilities=True, device="cpu"))
    scores_NC = np.array([row.probabilities for row in rows])
    sets_NC = np.array([[int(c in labels) for c in range(3)] for labels in evidence.labels])  # type: ignore[operator]
    expected = [average_precision_score(sets_NC[:, c], scores_NC[:, c]) for c in range(3)]
    assert student["accuracy"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert [one["accuracy"] for one in found["classes"]] == pytest.approx(expected, abs=1e-6)
    assert all(len(row.top) == 3 for row in rows), "all classes are as likely as 0"
    for row in remap.predict(done.run_dir, paths, device="cpu"):
        assert all(p >= 0.5 for _, p in row.top)


def test_cached_outputs_train_the_student_of_an_online_teacher(
    recipe: Callable[..., Recipe], tmp_path: Path, largest_difference: Callable[..., float]
) -> None:
    cached, online = (
        start(recipe(f"teacher.cache={how}", losses="ce,kd,attention"), tmp_path / how) for how in ("memory", "off")
    )
    assert largest_difference(cached.student.trained, online.student.trained) == 0.0


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    watch: Callable[..., Any],
    largest_difference: Callable[..., float],
) -> None:
    balanced = "train.class_weight_power=0.5"
    made = recipe("data.cutmix=1.0", "data.labels=20", balanced, losses="ce,kd", method="lora")
    complete = start(made, tmp_path / "complete")

    def stop(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start(made, tmp_path / "stopped", watch(stop))
    resumed = resume(tmp_path / "stopped")
    assert largest_difference(complete.student.trained, resumed.student.trained) == 0.0
    assert resumed.summary["student"]["accuracy"] == complete.summary["student"]["accuracy"]


def test_from_the_command_line_to_a_report_and_a_program(done: Result, tmp_path: Path) -> None:
    image = next(iter(Path(done.summary["data"]["source"].split(":", 1)[1].split("/labels.csv")[0]).glob("*.png")))
    run = str(done.run_dir)

    def call(*arguments: str, code: int = 0) -> str:
        found = CliRunner().invoke(app, list(arguments))
        assert found.exit_code == code, found.output + repr(found.exception)
        return found.output

    assert "average precision" in call("eval", run) and "mean average precision" in call("eval", run)
    rows = json.loads(call("predict", run, str(image), "--top", "2", "--json"))
    assert len(rows[0]["top"]) == 2
    call("predict", run, str(image), "--threshold", "0", "--output", str(tmp_path / "rows.csv"))
    (row,) = csv.DictReader((tmp_path / "rows.csv").open())
    assert len(json.loads(row["top"])) == 3
    call("export", run, "--to", "torch", "--softmax", "--output", str(tmp_path / "program"))
    record = json.loads((tmp_path / "program" / "export.json").read_text())
    assert (record["task"], record["activation"], record["metric"]) == ("multilabel", "sigmoid", "mAP")
    program = torch.export.load(tmp_path / "program" / "model.pt2").module()
    answers = program(torch.zeros(2, 3, 16, 16))
    student = remap.load_student(run, "cpu")
    black = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    assert not torch.allclose(answers.sum(dim=1), torch.ones(2)), "each class is a yes or no of its own"
    assert "[0]) if one >= 0.5" in (tmp_path / "program" / "README.md").read_text()
    assert {name for name, _ in student.predict_all([black], 0.0)[0]} == set(COLOURS)
    call("report", run)
    page = (done.run_dir / "report.html").read_text()
    low, high = done.summary["student"]["interval"]
    assert f"({100 * low:.1f}-{100 * high:.1f}) on 8 evaluation images, with the 95% interval" in page
    assert "bootstrap over images" in page
    assert "Mean average precision" in page and "confusion" not in page and "usual mistake" not in page


def test_a_comparison_names_the_metric(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from remap.pipeline.compare import compare as tabulated

    table = tabulated(recipe(losses="ce,kd"), ["linear"], 1, tmp_path / "table", Silent())
    (row,) = table["rows"]
    found, cells = (
        row["difference"]["to_alone"],
        [tmp_path / "table" / f"linear-{side}-s0" for side in ("teacher", "alone")],
    )
    taught, alone = (np.array(json.loads((cell / "answers.json").read_text())["student"]["draws"]) for cell in cells)
    assert found["mean"] == pytest.approx(row["gain"])
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(taught - alone, (2.5, 97.5)), abs=1e-9)
    assert ": mAP in %" in (tmp_path / "table" / "compare.md").read_text()
    report_comparison(tmp_path / "table", pngs=False)
    page = (tmp_path / "table" / "report.html").read_text()
    assert "has the best mAP of" in page and "ccura" not in page.split("</style>")[1]


def test_a_head_is_fitted_for_each_class_against_the_rest() -> None:
    """Against scikit-learn's own regression of one class; a class that no image has is never likely."""
    from sklearn.linear_model import LogisticRegression

    draws = np.random.default_rng(0)
    x_ND = draws.standard_normal((60, 4))
    sets_NC = np.stack([x_ND[:, 0] + 0.3 * draws.standard_normal(60) > 0, x_ND[:, 1] > 1, np.zeros(60, bool)], axis=1)
    found = fit_each_class(x_ND, sets_NC.astype(np.int8))
    weight_CD, bias_C = found.rows(3)
    scaled = (x_ND - x_ND.mean(0)) / (x_ND.std(0) + 1e-6)
    model = LogisticRegression(C=found.strength, max_iter=500).fit(scaled, sets_NC[:, 0])
    assert x_ND @ weight_CD[0] + bias_C[0] == pytest.approx(model.decision_function(scaled), abs=1e-4)
    assert not weight_CD[2].any() and bias_C[2] < -10


def test_a_weak_teacher_is_refused_by_its_map(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remap.pipeline.computed_once.measured", lambda found: Measured(0.3, 0.2, 0.4))
    with pytest.raises(
        TrainingError, match=r"mAP on 8 evaluation images is 30.0% \(20.0-40.0\): not clearly above chance \(a ranking"
    ):
        start(recipe(losses="ce,kd"), tmp_path / "run")


REFUSED = {
    "losses": (("losses=[ce,dkd,crd]",), "losses: dkd, crd cannot learn several classes .*takes ce, kd, "),
    "torchdistill": (("losses=[ce,{name: torchdistill, loss: PKTLoss, signal: logits}]",), "torchdistill cannot learn"),
    "scale": (("losses=[{name: kd, scale: deit}]",), r"losses\[0\].scale: is for one class"),
    "method": (("method=gps",), "method: gps is for one class an image"),
    "means": (("method=ease",), "method: ease is for one class an image"),
    "mixture": (("method=lora+dual_head",), "method: dual_head is for one class an image"),
    "words": (("data.templates=clip",), "data.classes, data.templates, data.descriptions: is for one class"),
    "draws": (("train.class_weight_power=1", "train.class_weight_by=sampling"), "class_weight_by: is for one class"),
    "metric": (("train.keep=best", "train.metric=top5"), r"top5 is not a metric of task multilabel \(allowed: mAP, "),
    "fit": (("train.fit=ridge", "losses=[ce]"), "train.fit: is for one class an image"),
    "top_k": (("teacher.top_k=2",), "teacher.top_k: is for one class an image"),
    "unknown": (("task=several",), "data.task: .*multilabel"),
    "twice": (("data.task=classes",), "task is 'multilabel', and data.task 'classes'"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_for_one_class_is_refused(
    recipe: Callable[..., Recipe], settings: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe(*settings)


def test_one_class_an_image_has_no_map(tiny: Any) -> None:
    with pytest.raises(RecipeError, match="mAP is not a metric of task classes"):
        tiny.recipe("train.keep=best", "train.metric=mAP")
    assert tiny.recipe("task=classes").digest() == tiny.recipe().digest()
    assert set(METRIC) == {"classes", "multilabel"}


def test_commands_for_one_class_say_so(done: Result, recipe: Callable[..., Recipe], tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="answers with any number of classes"):
        situation(done.run_dir, DataSpec(source=tiny.data))
    with pytest.raises(RunError, match="adapting to another domain is for students of one class"):
        remap.adapt(done.run_dir, tiny.data, output=tmp_path / "adapted")
    with pytest.raises(RunError, match="tent is for students of one class"):
        next(iter(remap.predict(done.run_dir, tiny.data, adapt="tent", device="cpu")))
    with pytest.raises(RunError, match="--int8.* is for students of one class"):
        remap.load_student(done.run_dir, "cpu").export("onnx", tmp_path / "int8", int8="dynamic")
    with pytest.raises(RecipeError, match="methods are ranked for one class an image"):
        recommend(recipe(), ["linear"], tmp_path / "ranked", Silent())
    with pytest.raises(RecipeError, match="sessions are learned for one class an image"):
        compare_sessions(recipe(), "2", ["linear"], ["lwf"], 1, tmp_path / "sessions", Silent())
    with pytest.raises(RunError, match="was tuned for task multilabel, and this recipe is of task classes"):
        start(tiny.recipe(teacher=str(done.run_dir), losses="ce,kd"), tmp_path / "taught")
    spec, student = TeacherSpec(model=str(done.run_dir), prepare="none"), done.student
    with pytest.raises(RunError, match="was tuned for task multilabel"):  # of the first classes alone
        load_teacher(spec, tiny.recipe(), (*COLOURS, "yellow"), student, Silent())  # type: ignore[arg-type]
