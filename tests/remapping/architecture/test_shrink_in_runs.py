"""A student cut from its teacher in a recipe, a run and on the command line."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from remap.errors import RecipeError, RemapError, RunError
from remap.pipeline import dry_run, run
from remap.pipeline.compare import compare
from remap.pipeline.shrink_student import cut, take_out_skipped
from remap.progress import Silent
from remap.recipe import Recipe, resolve
from remap.recipe.resolution import dump, validate
from remap.recipe.strict_yaml import parse
from remap.runs.task import load_task
from remap_cli.app import app

pytestmark = pytest.mark.slow

WORD = "shrink(teacher, depth=2, width=12, mlp=20)"


def test_the_short_form_and_the_mapping_are_one_recipe(tmp_path: Path) -> None:
    short = resolve(words={"teacher": "mini_teacher", "student": "shrink(teacher,width=128 , depth=2)"})
    long = validate({"teacher": "mini_teacher", "student": {"shrink": {"depth": 2, "width": 128}}}, "here")
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: mini_teacher\nstudent: shrink(teacher, depth=2, width=128)\n")
    assert short.student == long.student == resolve(str(file)).student
    assert short.student.model == "shrink(teacher, depth=2, width=128)"
    assert short.digest() == long.model_copy(update={"losses": short.losses}).digest()
    assert validate(parse(dump(short), "x"), "x") == short
    assert short.written_out().written_out().student == short.student


MISTAKES = [
    ({"student": "shrink(teacher, depth=2)"}, "no teacher to shrink"),
    ({"student": "shrink(teacher, dept=2)", "teacher": "mini_teacher"}, "did you mean 'depth'"),
    ({"student": "shrink(teacher)", "teacher": "mini_teacher"}, "nothing is to be cut"),
    ({"student": "shrink(depth=2)", "teacher": "mini_teacher"}, "cannot be read"),
    ({"student": "shrink(teacher, depth=2", "teacher": "mini_teacher"}, "cannot be read"),
    ({"student": "shrink(teacher, depth=2, depth=3)", "teacher": "mini_teacher"}, "given twice"),
    ({"student": "shrink(teacher, depth=__import__)", "teacher": "mini_teacher"}, "should be a whole number"),
    ({"student": "shrink(teacher, depth=0)", "teacher": "mini_teacher"}, "greater than or equal to 1"),
    ({"student": "shrink(teacher, depth=2, importance=size)", "teacher": "mini_teacher"}, "not one of taylor"),
    ({"student": "shrink(teacher, width=100, heads=3)", "teacher": "mini_teacher"}, "not a multiple of heads 3"),
    ({"student": "shrink(teacher, depth=2, importance=magnitude)", "teacher": "mini_teacher"}, "chooses nothing"),
    ({"student": "shrink(teacher, mlp=64, blocks=uniform)", "teacher": "mini_teacher"}, "no block is removed"),
    ({"student": "shrink(teacher, depth=2)", "teacher": "self"}, "made of the student"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_in_the_words_is_one_problem(words: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(words=words, check_options=False)
    assert len([p for p in caught.value.problems if p.startswith("student")]) == 1


def test_model_and_shrink_exclude_each_other() -> None:
    for model in ("mini_student", "shrink(teacher, depth=3)"):
        with pytest.raises(RecipeError, match="exclude each other"):
            validate({"teacher": "mini_teacher", "student": {"model": model, "shrink": {"depth": 2}}}, "here")


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, run.Result]:
    recipe = tiny.recipe("train.epochs=1", student=WORD, method="lora")
    return recipe, run.start(recipe, tmp_path_factory.mktemp("runs") / "run")


def test_a_run_trains_the_student_it_has_cut(finished: tuple[Recipe, run.Result]) -> None:
    """The tiny teacher is 24 wide with 2 heads and 3 blocks; its head dimension of 12 leaves one head."""
    recipe, result = finished
    folder = result.run_dir / "student_model"
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert (len(alone.blocks), alone.embed_dim, alone.blocks[0].attn.num_heads) == (2, 12, 1)
    assert alone.blocks[0].mlp.fc1.out_features == 20
    assert result.summary["student"]["model"] == f"local-dir:{folder}"
    assert json.loads((result.run_dir / "task" / "task.json").read_text())["backbone"]["model"] == f"local-dir:{folder}"
    student, _ = load_task(result.run_dir)
    assert torch.equal(student.model.state_dict()["pos_embed"], load_file(folder / "model.safetensors")["pos_embed"])
    assert not list(result.run_dir.glob(".*")), "nothing half-made is left"


def test_a_run_that_was_moved_takes_its_student_along(
    finished: tuple[Recipe, run.Result], largest_difference: Callable[..., float], tmp_path: Path
) -> None:
    shutil.copytree(finished[1].run_dir, tmp_path / "copy")
    with hidden(finished[1].run_dir):
        student, _ = load_task(tmp_path / "copy")
    assert largest_difference(student.model.state_dict(), finished[1].student.model.state_dict()) == 0.0


@contextmanager
def hidden(folder: Path) -> Iterator[None]:
    away = folder.rename(folder.with_name("away"))
    yield
    away.rename(folder)


def test_a_comparison_asks_for_a_student_of_its_own(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="without the teacher"):
        compare(tiny.recipe(student=WORD), ["lora"], 1, tmp_path / "compare", Silent())
    assert not (tmp_path / "compare").exists()


def test_a_resumed_run_finds_its_student(
    finished: tuple[Recipe, run.Result], largest_difference: Callable[..., float], tmp_path: Path
) -> None:
    """It goes on with the folder that is there, to the same bits as the run that had to make it."""
    recipe, result = finished
    again = run.start(recipe, tmp_path / "again")
    before = (tmp_path / "again" / "student_model" / "model.safetensors").stat().st_mtime_ns
    for name in ("status.json", "summary.json", "metrics.jsonl", "task", "checkpoint"):
        path = tmp_path / "again" / name
        for file in [*path.glob("**/*"), path] if path.is_dir() else [path]:
            if file.is_file():
                file.unlink()
    (tmp_path / "again" / "status.json").write_text('{"status": "stopped", "message": "", "time": ""}')
    resumed = run.resume(tmp_path / "again")
    assert (tmp_path / "again" / "student_model" / "model.safetensors").stat().st_mtime_ns == before
    states = [dict(r.student.model.state_dict()) for r in (result, again, resumed)]
    assert largest_difference(states[0], states[1]) == largest_difference(states[0], states[2]) == 0.0


def test_a_dry_run_leaves_nothing(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = dry_run.estimate(tiny.recipe(student=WORD), Silent())
    assert found["student"]["model"] == WORD and not list(tmp_path.iterdir())


def test_a_larger_student_than_the_teacher_is_said_by_the_run(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RemapError, match="cannot have more than its teacher"):
        run.start(tiny.recipe(student="shrink(teacher, depth=9)"), tmp_path / "run")
    assert not (tmp_path / "run" / "student_model").exists()


def test_the_command_writes_a_student_for_the_next_one(tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "small"
    done = CliRunner().invoke(
        app, ["shrink", tiny.teacher, "--depth=2", "--width=12", f"--data={tiny.data}", f"--output={output}", "--json"]
    )
    found = json.loads(done.stdout)
    assert (found["after"]["depth"], found["after"]["width"], len(found["kept"])) == (2, 12, 2)
    result = run.start(tiny.recipe("train.epochs=1", student=f"local-dir:{output}"), tmp_path / "run")
    assert result.summary["student"]["model"] == f"local-dir:{output}"


def test_images_decide_nothing_where_nothing_is_measured(tiny: Any, tmp_path: Path) -> None:
    """Magnitude and even distances: the data are not even opened."""
    recipe = resolve(
        words={
            "teacher": tiny.teacher,
            "student": "shrink(teacher,depth=2,width=12,importance=magnitude,blocks=uniform)",
        }
    )
    data = recipe.data.model_copy(update={"source": str(tmp_path / "nowhere")})
    found = cut(recipe.teacher, recipe.student.shrink, data, tmp_path / "out")
    assert found.kept == (0, 2) and found.changes == ()


def test_a_run_of_skip_gives_what_remains(tiny: Any, tmp_path: Path) -> None:
    """A price that nothing outweighs: one block closes in favour of the other. What is written computes the same."""
    recipe = tiny.recipe("method.cost=100.0", "train.lr=0.3", "train.epochs=1", "train.warmup_epochs=0", method="skip")
    result = run.start(recipe, tmp_path / "run")
    gates = [p.item() for name, p in result.student.model.named_parameters() if name.endswith(".gate")]
    assert len(gates) == 2 and max(gates) > 2 * min(gates)
    kept, openness = take_out_skipped(result.run_dir, tmp_path / "rest", min(gates) - 1e-6 if min(gates) else -1.0)
    assert openness == pytest.approx(gates) and kept == [0, 1]
    rest = timm.create_model(f"local-dir:{tmp_path / 'rest'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(rest(images), result.student.model.eval()(images), rtol=1e-4, atol=1e-5)
    assert tuple(rest.pretrained_cfg["label_names"]) == result.student.classes


def test_the_weights_of_both_are_those_of_the_teacher() -> None:
    """--weights is for teacher and student, and a student that is cut from its teacher has its weights."""
    recipe = resolve(words={"student": "shrink(teacher, depth=2)", "teacher": "mini_teacher", "weights": "none"})
    assert recipe.teacher is not None and recipe.teacher.weights == "none"
    assert recipe.student.weights == "pretrained"
