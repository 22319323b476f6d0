"""A folder of tasks: each is what was added, byte for byte, and the backbone is there once."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from remap.errors import RunError, UnknownName
from remap.pipeline.student_api import load_student
from remap.tasks.multi_task import MultiTask
from remap.tasks.shelf import Shelf

MakeTask = Callable[..., Path]
TASKS = {"birds": ("lora", ("a", "b")), "cars": ("vpt_deep", ("x", "y", "z")), "leaves": ("linear", ("p", "q"))}


@pytest.fixture
def shelf(make_task: MakeTask, tmp_path: Path) -> Path:
    for name, (method, classes) in TASKS.items():
        Shelf.with_task(tmp_path / "shelf", name, make_task(name, method, classes))
    return tmp_path / "shelf"


def test_tasks_answer_from_the_shelf_as_they_did_before(shelf: Path, tmp_path: Path, tiny: object) -> None:
    """Expected: each task folder by itself, on the backbone it was tuned on."""
    views = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    multi = Shelf(shelf).open("cpu")
    for name in TASKS:
        assert (shelf / "tasks" / name / "task.json").read_bytes() == (tmp_path / name / "task.json").read_bytes()
        expected = load_student(tmp_path / name, "cpu").logits_of_views(views)
        assert torch.equal(multi.student(name).logits_of_views(views), expected)
    assert multi.current == "birds"


def _open_clip(tmp_path: Path, _tiny: Any) -> str:
    """A folder of open_clip, which has no config.json."""
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    tower = timm.create_model("vit_base_patch16_clip_224", num_classes=0, **shape)
    (tmp_path / "model").mkdir()
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(tensors, tmp_path / "model/open_clip_model.safetensors")
    vision = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16, "mlp_ratio": 2.0}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}, "preprocess_cfg": {}}
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{tmp_path / 'model'}"


def _cut(tmp_path: Path, tiny: Any) -> str:
    """The folder of a student that was cut for its run, which lies beside the task."""
    shutil.copytree(tiny.student.removeprefix("local-dir:"), tmp_path / "run/student_model")
    return f"local-dir:{tmp_path / 'run/student_model'}"


@pytest.mark.parametrize("model", [_open_clip, _cut, lambda *_: "clip:mini"], ids=["open_clip", "cut", "pair"])
def test_backbones_of_any_source_are_put_on_a_shelf(
    model: Callable[..., str], make_task: MakeTask, tiny: Any, tmp_path: Path
) -> None:
    """Expected: the task by itself. The run is moved in between, with the student in it."""
    make_task("run/task", "lora", ("a", "b"), model(tmp_path, tiny))
    run = (tmp_path / "run").rename(tmp_path / "moved")
    student = load_student(run / "task", "cpu")
    views = torch.randint(0, 256, (2, *student.view.shape), dtype=torch.uint8)
    shelf = Shelf.with_task(tmp_path / "shelf", "one", run / "task")
    assert [row.problem for row in shelf.verify()] == ["", ""]
    for multi in (shelf.open("cpu"), MultiTask(None, {"one": run / "task"}, "cpu")):
        assert torch.equal(multi.student("one").logits_of_views(views), student.logits_of_views(views))


def test_the_shelf_is_no_larger_than_backbone_and_tasks(shelf: Path, tmp_path: Path) -> None:
    """At most the backbone, and 1.1 times what each task trains; JSON apart, which tiny tasks outweigh."""
    weights = (shelf / "backbone" / "model.safetensors").stat().st_size
    tasks = sum((tmp_path / name / "task.safetensors").stat().st_size for name in TASKS)
    every = sum(path.stat().st_size for path in shelf.rglob("*") if path.is_file() and path.suffix != ".json")
    assert every == weights + tasks


def test_the_current_task_is_kept(shelf: Path) -> None:
    Shelf(shelf).switch("cars")
    assert Shelf(shelf).current == "cars" and Shelf(shelf).open("cpu").current == "cars"
    assert [(row.name, row.method, row.classes, row.current) for row in Shelf(shelf).rows()] == [
        (name, method, len(classes), name == "cars") for name, (method, classes) in TASKS.items()
    ]
    with pytest.raises(UnknownName, match="there is no task 'boats'"):
        Shelf(shelf).switch("boats")


def test_another_task_changes_no_file_of_an_earlier_one(shelf: Path, make_task: MakeTask) -> None:
    before = {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file() and path.name != "shelf.json"}
    Shelf.with_task(shelf, "more", make_task("more", "full"))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert [row.problem for row in Shelf(shelf).verify()] == [""] * 5


def test_of_several_tasks_none_is_added_where_one_cannot_be(make_task: MakeTask, tiny: object, tmp_path: Path) -> None:
    good, other = make_task("good", "lora"), make_task("other", "lora", model=tiny.teacher)  # type: ignore[attr-defined]
    for wrong in ({"other": other}, {"two words": good}, {"absent": tmp_path / "absent"}):
        with pytest.raises(RunError):
            Shelf.with_tasks(tmp_path / "new", {"good": good, **wrong})
        assert not (tmp_path / "new").exists()
    Shelf.with_tasks(tmp_path / "new", {"one": good, "two": good})
    with pytest.raises(RunError, match="has a task two already"):
        Shelf.with_tasks(tmp_path / "new", {"three": good, "two": good})
    assert Shelf(tmp_path / "new").names == ["one", "two"]


@pytest.mark.parametrize("file", ["tasks/cars/task.safetensors", "tasks/cars/task.json", "backbone/model.safetensors"])
def test_a_changed_byte_is_found(shelf: Path, file: str) -> None:
    data = bytearray((shelf / file).read_bytes())
    data[-9] ^= 1
    (shelf / file).write_bytes(data)
    wrong = {row.name: row.problem for row in Shelf(shelf).verify() if row.problem}
    assert list(wrong) == ["cars" if "cars" in file else "(backbone)"], wrong


def test_what_others_add_meanwhile_stays(shelf: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adds a task while another has just begun to: that one waits, and writes what both have added."""
    one, two = make_task("one", "linear"), make_task("two", "linear")
    before, waiting = Shelf(shelf), threading.Thread(target=Shelf.with_task, args=(shelf, "two", two))
    store = Shelf._add

    def slow(self: Shelf, name: str, folder: Path) -> None:
        if name == "one":
            waiting.start()
            waiting.join(0.5)
        store(self, name, folder)

    monkeypatch.setattr(Shelf, "_add", slow)
    Shelf.with_task(shelf, "one", one)
    waiting.join()
    before.switch("cars")
    assert Shelf(shelf).names == [*TASKS, "one", "two"] and Shelf(shelf).current == "cars"
    assert not [row.problem for row in Shelf(shelf).verify() if row.problem]


def test_a_shelf_whose_making_was_stopped_is_made_by_the_same_command(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the weights, which may take minutes, and shelf.json."""
    birds = make_task("birds", "lora")
    with monkeypatch.context() as patch:
        patch.setattr("remap.tasks.shelf._write_content", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Shelf.with_task(tmp_path / "shelf", "birds", birds)
    assert [path.name for path in (tmp_path / "shelf" / "backbone").glob("*.safetensors")] == ["model.safetensors"]
    assert not [row.problem for row in Shelf.with_task(tmp_path / "shelf", "birds", birds).verify() if row.problem]


def test_what_does_not_belong_is_refused(shelf: Path, make_task: MakeTask, tiny: object, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has a task cars already"):
        Shelf.with_task(shelf, "cars", make_task("again", "lora"))
    with pytest.raises(RunError, match="tuned on another backbone"):
        Shelf.with_task(shelf, "other", make_task("other", "lora", model=tiny.teacher))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="cannot have this name"):
        Shelf.with_task(shelf, "../up", make_task("up", "lora"))
    with pytest.raises(RunError, match="cannot have this name"):
        Shelf.with_task(tmp_path / "new", "two words", make_task("words", "lora"))
    assert not (tmp_path / "new").exists(), "nothing is made for a task that is refused"
    for runs in ({"Cars": make_task("capital", "lora")}, {name: tmp_path / "cars" for name in ("new", "New")}):
        with pytest.raises(RunError, match="two tasks of .* cannot have such names"):
            Shelf.with_tasks(shelf, runs)
    (tmp_path / "mine" / "backbone").mkdir(parents=True)
    (tmp_path / "mine" / "backbone" / "model.safetensors").write_text("mine")
    with pytest.raises(RunError, match="holds weights of something else"):
        Shelf.with_task(tmp_path / "mine", "birds", make_task("birds2", "lora"))
    with pytest.raises(RunError, match=r"not a shelf of tasks: shelf.json: No such file"):
        Shelf(tmp_path / "absent")
    content = json.loads((shelf / "shelf.json").read_text())
    (shelf / "shelf.json").write_text(json.dumps({**content, "current": "leaves"}))
    with pytest.raises(RunError, match="does not fit its own SHA-256"):
        Shelf(shelf)


def test_a_task_is_removed_and_its_name_is_free(shelf: Path, make_task: MakeTask) -> None:
    """The others answer as before; the first of them becomes the current one."""
    views = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    before = Shelf(shelf).open("cpu").student("cars").logits_of_views(views)
    found = Shelf(shelf)
    with pytest.raises(UnknownName, match="there is no task 'trees'"):
        found.remove("trees")
    found.remove("birds")
    assert not (shelf / "tasks" / "birds").exists() and Shelf(shelf).names == ["cars", "leaves"]
    assert Shelf(shelf).current == "cars" and not [row for row in found.verify() if row.problem]
    assert torch.equal(Shelf(shelf).open("cpu").student("cars").logits_of_views(views), before)
    Shelf.with_task(shelf, "birds", make_task("again", "lora", ("a", "b")))
    for name in TASKS:
        Shelf(shelf).remove(name)
    assert Shelf(shelf).current is None and Shelf(shelf).names == []


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_nothing_is_added_to_a_shelf_without_its_backbone(shelf: Path, make_task: MakeTask, damage: str) -> None:
    weights = shelf / "backbone" / "model.safetensors"
    weights.unlink() if damage == "gone" else weights.write_bytes(weights.read_bytes()[:1000])
    task = make_task("new", "lora", ("a", "b"))
    for use in (lambda: Shelf.with_task(shelf, "new", task), Shelf(shelf).open, Shelf(shelf).open_current):
        with pytest.raises(RunError, match=r"is damaged: backbone/model.safetensors: [\s\S]*\n  do: "):
            use()
    first, *others = Shelf(shelf).rows()
    assert first.name == "(backbone)" and first.problem and not [row for row in others if row.problem]
    assert not (shelf / "tasks" / "new").exists()


def test_a_missing_task_says_how_to_put_it_back(shelf: Path, make_task: MakeTask) -> None:
    shutil.rmtree(shelf / "tasks" / "birds")
    for use in (Shelf(shelf).open, lambda: Shelf(shelf).current_folder):
        with pytest.raises(RunError, match=r"tasks/birds/task.json is missing\n  do: .* remove SHELF birds"):
            use()
    Shelf(shelf).remove("birds")  # as it says
    Shelf.with_task(shelf, "birds", make_task("again", "lora", ("a", "b")))
    assert not [row for row in Shelf(shelf).verify() if row.problem]


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 1}'])
def test_a_changed_list_of_tasks_is_damage_and_no_missing_shelf(shelf: Path, make_task: MakeTask, content: str) -> None:
    (shelf / "shelf.json").write_text(content)
    for use in (lambda: Shelf(shelf), lambda: Shelf.with_task(shelf, "new", make_task("new", "lora", ("a", "b")))):
        with pytest.raises(RunError, match="is damaged: shelf.json was changed, or is not complete"):
            use()
