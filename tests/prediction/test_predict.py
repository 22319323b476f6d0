"""Rows are what the student says of each image, in every format, from any number of processes, and after a kill."""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import remap
from remap.data.thread_pool import map_ahead, threads
from remap.distributed import launch
from remap.errors import DataError, RecipeError, RunError
from remap.pipeline import student_api
from remap.pipeline.student_api import load_student
from remap.prediction.formats import write_rows
from remap.prediction.inputs import Inputs
from remap.prediction.output import PredictionFile
from remap.prediction.predict import open_students, predict_to_file
from remap.prediction.predictions import Prediction, Wanted, predictions
from remap.progress import Silent

MakeTask = Callable[..., Path]
BROKEN = "07.png"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images, one of them broken."""
    draws = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(11):
        pixels = draws.integers(0, 256, (18, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index:02d}.png")
    (tmp_path / "photos" / BROKEN).write_bytes(b"text")
    return tmp_path / "photos"


def test_a_student_takes_any_number_of_images(
    make_task: MakeTask, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected: one image at a time."""
    (photos / BROKEN).unlink()
    student, files = load_student(make_task("one", "lora", tuple("abcd")), "cpu"), sorted(photos.iterdir())
    sizes: list[int] = []
    student._runner.register_forward_hook(lambda runner, inputs, signals: sizes.append(len(inputs[0])))
    monkeypatch.setattr(student_api, "AT_ONCE", 4)
    found = student.predict(files)
    assert sizes == [4, 4, 2]
    assert [(name, pytest.approx(p, abs=1e-5)) for name, p in found] == [student.predict([one])[0] for one in files]
    assert student.predict([]) == student.predict_all([]) == []


def test_one_image_is_no_list_and_a_device_has_to_be_here(make_task: MakeTask, photos: Path) -> None:
    run = make_task("one", "lora", tuple("abcd"))
    student, (file, *_) = load_student(run, "cpu"), sorted(photos.iterdir())
    for one in (file, str(file), file.read_bytes(), Image.new("RGB", (8, 8))):
        with pytest.raises(DataError, match="one image is given, where a list is read"):
            student.predict(one)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images are not a list"):
        student.predict(None)  # type: ignore[arg-type]
    for wrong in (np.zeros((8, 8, 3), np.uint8), None):
        with pytest.raises(DataError, match="images are of another kind"):
            student.predict([wrong])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="threshold: should be a number from 0 to 1, got 7"):
        student.predict_all([file], threshold=7)
    assert student.predict(one for one in (file,)) == student.predict([file])  # type: ignore[arg-type]
    views = torch.from_numpy(student.pixels(file))[None]
    for wrong in (views / 255, views[0], views[:, :, 1:], views.numpy()):
        with pytest.raises(DataError, match="these are not views of this student"):
            student.logits_of_views(wrong)
    with pytest.raises(RunError, match="cannot compute on banana: "):
        load_student(run, "banana")
    with pytest.raises(RunError, match="cannot compute on cuda:77: "):
        list(remap.predict(run, photos, device="cuda:77"))


def test_python_iterates_over_what_the_student_says(make_task: MakeTask, photos: Path) -> None:
    """Expected: the student's own forward and softmax, image by image; pooled features by timm's forward_head."""
    run = make_task("one", "lora", tuple("abcd"))
    student = load_student(run, "cpu")
    rows = list(remap.predict(run, photos, top=9, probabilities=True, embeddings=True, batch_size=4, device="cpu"))
    assert [Path(row.path).name for row in rows] == [f"{index:02d}.png" for index in range(11)]
    assert [row.error for row in rows if row.error] == ["not an image"] and not rows[7].top
    for row in rows[:7] + rows[8:]:
        expected = student.logits([row.path]).softmax(-1)[0]
        assert row.probabilities == pytest.approx(expected.tolist(), abs=1e-6)
        assert sorted(row.indices) == [0, 1, 2, 3] and [name for name, _ in row.top] == ["abcd"[i] for i in row.indices]
        assert [p for _, p in row.top] == sorted((row.probabilities or ()), reverse=True)
        logits = student.network.model.head(torch.tensor(row.embedding))
        assert logits.softmax(-1).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_answer_that_is_not_finite_is_an_error_in_its_row(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    """NaN is not a number of JSON; the other rows are written."""
    run, file = make_task("one", "linear"), tmp_path / "rows.jsonl"
    student = load_student(run, "cpu")

    def rows_of(items: Iterator[Any]) -> Iterator[list[Prediction]]:
        for number, rows in enumerate(predictions({"": student}, items, Wanted(top=1, batch_size=1))):
            with torch.no_grad():
                student.network.model.head.bias.fill_(torch.nan if number == 1 else 0.0)
            yield rows

    output = PredictionFile(file, {"tasks": {"": "x"}, "top": 1, "probabilities": False, "embeddings": False})
    output.predict(Inputs([photos]), rows_of)
    assert output.merge({"": student.classes}) == (11, 2)
    errors = [json.loads(line)["error"] for line in file.read_text().splitlines()]
    assert errors[2] == "the network's answer is not finite" and errors.count(None) == 9


def test_two_commands_do_not_write_one_file(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    run, path = make_task("one", "linear"), tmp_path / "rows.jsonl"
    wanted, said = Wanted(top=1, precision="fp32"), []

    class Second(Silent):
        def wait(self, *_: Any) -> Any:
            with pytest.raises(RunError, match=r"another process is writing .*rows\.jsonl") as caught:
                predict_to_file(run, Inputs([photos]), path, wanted, Silent())
            said.append(caught.value)
            return Silent().wait("predicting")

    assert predict_to_file(run, Inputs([photos]), path, wanted, Second()) == (11, 1)
    assert len(said) == 1 and len(path.read_text().splitlines()) == 11


def test_precision_is_chosen_by_the_device_or_by_name(
    make_task: MakeTask, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected: PyTorch's autocast around the student's own forward."""
    run = make_task("one", "linear")

    def first(precision: str | None = None) -> list[float]:
        row = next(iter(remap.predict(run, photos, probabilities=True, precision=precision, device="cpu")))
        return list(row.probabilities or ())

    student, image = load_student(run, "cpu"), photos / "00.png"
    in_fp32 = student.logits([image]).softmax(-1)[0].tolist()
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = student.logits([image]).float().softmax(-1)[0].tolist()
    assert in_fp32 != pytest.approx(in_bf16, abs=1e-6)
    assert first("fp32") == first("auto") == first() == pytest.approx(in_fp32, abs=1e-6)
    monkeypatch.setattr(launch, "cpu_multiplies_bf16", lambda: True)
    assert first("fp32") == pytest.approx(in_fp32, abs=1e-6)
    assert first() == first("auto") == first("bf16") == pytest.approx(in_bf16, abs=2e-3)
    assert first() != pytest.approx(in_fp32, abs=1e-6)
    with pytest.raises(RecipeError, match="precision: 'half' is not one"):
        first("half")


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"batch_size": -1}, {"top": 0}, {"top": -1}, {"top": 2.5}])
def test_numbers_are_those_of_the_command(make_task: MakeTask, photos: Path, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(RecipeError, match=f"{name}: should be a whole number of 1 or more, got {option[name]}"):
        list(remap.predict(make_task("one", "linear"), photos, **option))


def test_a_threshold_is_for_any_number_of_classes(make_task: MakeTask, photos: Path) -> None:
    """Its refusal leaves nothing behind that the next command would not continue."""
    run, path = make_task("one", "linear"), photos.parent / "rows.jsonl"
    with pytest.raises(RecipeError, match="this run has one class an image"):
        predict_to_file(run, Inputs([photos]), path, Wanted(threshold=0.3), Silent())
    assert predict_to_file(run, Inputs([photos]), path, Wanted(), Silent()) == (11, 1)
    several = make_task("several", "linear", task="multilabel")
    (row, *_) = remap.predict(several, photos, threshold=0.0, device="cpu")
    expected = load_student(several, "cpu").logits([row.path]).sigmoid()[0]
    assert [p for _, p in row.top] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)


def test_several_tasks_answer_in_one_pass(make_task: MakeTask, photos: Path) -> None:
    """Expected: each run alone. The first two share the frozen backbone's features; copied maps give others."""
    runs = {
        "one": make_task("one", "linear"),
        "two": make_task("two", "mlp", ("x", "y")),
        "v": make_task("v", "vpt_deep"),
        "maps": make_task("maps", "attention_copy"),
    }
    together = list(remap.predict(runs, photos, top=3, device="cpu"))
    assert [row.task for row in together[:4]] == list(runs) and len(together) == 44
    for name, run in runs.items():
        alone = remap.predict(run, photos, top=3, device="cpu")
        for row, expected in zip([row for row in together if row.task == name], alone, strict=True):
            assert (row.path, row.error, row.indices) == (expected.path, expected.error, expected.indices)
            assert [p for _, p in row.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_holds_the_rows(make_task: MakeTask, photos: Path, tmp_path: Path, kind: str) -> None:
    run, path = make_task("one", "linear", ("a", "b, c")), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="an extra")
    expected = [row.to_dict() for row in remap.predict(run, photos, top=2, probabilities=True, device="cpu")]
    counts = predict_to_file(run, Inputs([photos]), path, Wanted(2, True, batch_size=4), Silent())
    assert counts == (11, 1) and not (tmp_path / f"rows.{kind}.parts").exists()
    if kind == "jsonl":
        assert [json.loads(line) for line in path.read_text().splitlines()] == json.loads(json.dumps(expected))
        return
    if kind == "csv":
        with open(path, newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        rows = [{**row, "top": json.loads(row["top"])} for row in rows]
    else:
        table = parquet.read_table(path)
        rows = table.to_pylist()
        assert json.loads(table.schema.metadata[b"classes"]) == {"": ["a", "b, c"]}
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    assert [row["class"] or None for row in rows] == [
        row["top"][0]["class"] if row["top"] else None for row in expected
    ]
    assert [one["index"] for one in rows[0]["top"]] == [one["index"] for one in expected[0]["top"]]
    assert rows[7]["error"] == "not an image" and not rows[0]["error"]


def test_a_killed_command_continues(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    """As SIGKILL leaves it: whole rows and half of one. Expected: the bytes of a file that was written in one go."""
    runs = {"one": make_task("one", "linear"), "two": make_task("two", "lora")}
    wanted, computed = Wanted(batch_size=2), []
    predict_to_file(runs, Inputs([photos]), tmp_path / "whole.jsonl", wanted, Silent())
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    path, settings = tmp_path / "rows.jsonl", {"tasks": {"one": "", "two": ""}}
    students = open_students(runs, "cpu")

    def rows_of(items: Iterator[Any]) -> Iterator[Any]:
        for rows in predictions(students, items, wanted):
            computed.append(rows[0].path)
            yield rows

    for cut in (lines[0][:9], b"".join(lines[:5]) + lines[5][:-1], b"".join(lines[:9])):
        file = PredictionFile(path, settings)
        (file.folder / "0.part").write_bytes(cut)
        computed.clear()
        file.predict(Inputs([photos]), rows_of)
        assert len(computed) == 11 - cut.count(b"\n") // 2
        assert file.merge({}) == (11, 1)
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        path.unlink()


def test_parts_of_other_commands_are_not_continued(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    run, path = make_task("one", "linear"), tmp_path / "rows.jsonl"
    items = Inputs([photos])
    file = PredictionFile(path, {"tasks": {"": "x"}, "top": 1})
    rows = predictions(open_students(run, "cpu"), items, Wanted())
    with open(file.folder / "0.part", "w") as part:
        part.writelines(json.dumps(one.to_dict()) + "\n" for image in islice(rows, 3) for one in image)
    for settings, says in (
        ({"tasks": {"": "x"}, "top": 2}, "top was 1, now 2"),
        ({"tasks": {"": "y"}}, "another run than before, or its files have changed; top was 1, now not given"),
    ):
        with pytest.raises(RunError, match="holds rows of another command") as caught:
            PredictionFile(path, settings)
        assert caught.value.given == says
    noted = (file.folder / "settings.json").read_text()
    (file.folder / "settings.json").write_text("[]")
    with pytest.raises(RunError, match="holds rows of another command"):
        PredictionFile(path, {"tasks": {"": "x"}, "top": 1})
    (file.folder / "settings.json").write_text(noted)
    for words in ([photos / "00.png"], [photos / "02.png", photos]):
        with pytest.raises(RunError, match="the images are not those"):
            file.predict(Inputs(words), lambda items: iter(()))
    path.touch()
    with pytest.raises(RunError, match="is there already"):
        PredictionFile(path, {"tasks": {"": "x"}, "top": 1})
    with pytest.raises(RunError, match=r"allowed: .*\.jsonl"):
        PredictionFile(tmp_path / "rows.txt", {"tasks": {}})


def test_a_command_that_read_no_image_leaves_nothing(make_task: MakeTask, photos: Path, tmp_path: Path) -> None:
    """It would otherwise be "rows of another command" for the next one, which names images and other options."""
    run, path = make_task("one", "linear"), tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="no images there"):
        predict_to_file(run, Inputs([str(photos / "*.jpg")]), path, Wanted(), Silent())
    assert not (tmp_path / "rows.jsonl.parts").exists()
    assert predict_to_file(run, Inputs([photos]), path, Wanted(top=2), Silent()) == (11, 1)
    assert not (tmp_path / "rows.jsonl.parts").exists()


@pytest.mark.parametrize("processes", [2, 3, 12])
def test_the_parts_of_several_processes_are_merged(
    photos: Path, make_task: MakeTask, tmp_path: Path, processes: int
) -> None:
    """Expected: the file of one process; a batch of another size may round differently."""
    students = open_students(make_task("one", "linear"), "cpu")
    make = partial(PredictionFile, settings={"tasks": {"": "x"}, "top": 1})
    results = []
    for count in (1, processes):
        files = [make(tmp_path / f"{count}.jsonl", process=process, processes=count) for process in range(count)]
        for file in reversed(files):
            file.predict(Inputs([photos]), lambda items: predictions(students, items, Wanted()))
        assert files[0].merge({}) == (11, 1)
        results.append([json.loads(line) for line in (tmp_path / f"{count}.jsonl").read_text().splitlines()])
    for one, other in zip(*results, strict=True):
        assert (one["path"], one["error"]) == (other["path"], other["error"])
        assert [(b["class"], pytest.approx(b["probability"], abs=1e-6)) for b in one["top"]] == [
            (b["class"], b["probability"]) for b in other["top"]
        ]


def test_parts_that_hold_whole_shards_are_merged_in_order(tmp_path: Path) -> None:
    """Also of a process that was killed between any two bytes. Expected: the order of the shards."""
    (tmp_path / "shards").mkdir()
    for number, count in enumerate((1, 0, 3, 2, 0, 1, 2)):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for name in (*(f"{i}.png" for i in range(count)), "other.gif"):
                tar.addfile(tarfile.TarInfo(name))
    word, path = f"webdataset:{tmp_path}/shards", tmp_path / "rows.jsonl"
    expected = [item.path for item in Inputs([word])]
    make = partial(PredictionFile, path, {"tasks": {"one": "x", "two": "y"}, "top": 1}, processes=2)

    def run(process: int) -> PredictionFile:
        file = make(process=process)
        file.predict(
            Inputs([word]), lambda items: ([Prediction(item.path, task=t) for t in ("one", "two")] for item in items)
        )
        return file

    whole = (run(0).folder / "0.jsonl").read_bytes()
    for cut in (0, 9, *(at for at, byte in enumerate(whole) if byte == ord("\n"))):
        first = make(process=0)  # takes back what is done
        (first.folder / "0.part").write_bytes(whole[:cut])
        run(0)
        assert (first.folder / "0.jsonl").read_bytes() == whole
    run(1)
    assert first.merge({}) == (9, 0) and first.left_out == {".gif files are not read": 3}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["path"], row["task"]) for row in rows] == [(one, task) for one in expected for task in ("one", "two")]


def test_no_more_images_wait_than_are_decoded_ahead() -> None:
    taken: list[int] = []
    with threads(2) as pool:
        found = map_ahead(pool, str, (taken.append(i) or i for i in range(100)), 5)  # type: ignore[func-returns-value]
        assert list(islice(found, 3)) == [(0, "0"), (1, "1"), (2, "2")] and len(taken) == 7
        assert [item for item, _ in found] == list(range(3, 100))


def test_a_finished_part_is_compared_with_the_images_too(photos: Path, tmp_path: Path) -> None:
    """As a full disk leaves it, when the parts could not be merged."""
    make = partial(PredictionFile, tmp_path / "rows.jsonl", {"tasks": {"": "x"}, "top": 1})
    make().predict(Inputs([photos]), lambda items: ([Prediction(item.path)] for item in items))
    with pytest.raises(RunError, match="the images are not those"):
        make().predict(Inputs([photos / "01.png"]), lambda items: iter(()))
    again = make()
    again.predict(Inputs([photos]), lambda items: iter([] if not list(items) else [[]]))
    (tmp_path / "rows.jsonl.parts" / "notes.txt").write_text("of a user")
    assert again.merge({}) == (11, 0)
    assert [file.name for file in (tmp_path / "rows.jsonl.parts").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_names_that_are_not_text_are_written_as_escapes(tmp_path: Path, kind: str) -> None:
    """A folder's name need not be UTF-8: its bytes come as half characters, which no encoder takes."""
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="an extra")
    line = json.dumps(Prediction("a\udcff.png", (("b\udcff", 1.0),), indices=(0,)).to_dict()).encode()
    settings = {"tasks": {"": "x"}, "top": 2, "probabilities": False, "embeddings": False}
    write_rows(tmp_path / f"rows.{kind}", [line], settings, {"": ["b\udcff"]})
    if kind == "csv":
        with open(tmp_path / "rows.csv", newline="") as file:
            row: dict[str, Any] = next(csv.DictReader(file))
    else:
        row = parquet.read_table(tmp_path / "rows.parquet").to_pylist()[0]
    assert (row["path"], row["class"]) == (r"a\udcff.png", r"b\udcff")


def test_rows_hold_letters_as_they_are(photos: Path, tmp_path: Path) -> None:
    """As RFC 8259 allows; only a stray byte of a name, which UTF-8 has no form for, is an escape."""
    file = PredictionFile(tmp_path / "rows.jsonl", {"tasks": {"": "x"}, "top": 1})
    name = "\u65e5\u672c\udcff"
    file.predict(
        Inputs([photos]), lambda items: ([Prediction(item.path, ((name, 1.0),), indices=(0,))] for item in items)
    )
    assert file.merge({}) == (11, 0)
    first = (tmp_path / "rows.jsonl").read_bytes().splitlines()[0]
    assert "\u65e5\u672c".encode() + rb"\udcff" in first and json.loads(first)["top"][0]["class"] == name
