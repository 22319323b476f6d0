"""A comparison over sessions, and the memory of old images. Herding by hand is the rule of iCaRL in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remap.data.memory import Memory, open_memory, read_memory
from remap.errors import DataError, MissingData, RecipeError, RunError
from remap.pipeline import session_protocol
from remap.pipeline.choose_memory import choose_memory, herding
from remap.pipeline.extend import extend
from remap.pipeline.run import start
from remap.pipeline.session_protocol import compare_sessions
from remap.pipeline.session_split import groups_of
from remap.pipeline.sessions import sessions_of
from remap.progress import Silent
from remap.recipe.schema import DataSpec


@pytest.fixture(scope="module")
def first(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sessions") / "first"
    start(tiny.recipe("data.only=blue,green", "train.epochs=1", method="linear", teacher=None, losses="ce"), path)
    return path


def test_herding_is_the_greedy_rule() -> None:
    features = np.random.default_rng(1).normal(size=(12, 3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(4):
        left = [index for index in range(12) if index not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(unit.mean(0) - unit[[*chosen, i]].mean(0))))
    assert herding(features, 4).tolist() == chosen
    assert sorted(herding(features, 99)) == list(range(12))


def test_a_memory_is_carried_on_and_its_images_stay_where_they_are(first: Path, tiny: Any, tmp_path: Path) -> None:
    red = DataSpec(source=tiny.data, only=("red",))
    settings = ["train.epochs=1"]
    found = extend(first, red, how="lwf", memory=2, choose="random", settings=settings, output=tmp_path / "two")
    assert found.summary["data"]["train_images"] == 8 + 2 * 2
    file = tmp_path / "two.memory.json"
    before = read_memory(file)
    split = open_memory(file, ("blue", "green", "red"))
    assert sorted(split.labels) == [0, 0, 1, 1] and all(name.startswith("train/") for name in split.names)
    after = choose_memory(sessions_of(tmp_path / "two"), 2, "herding", Silent())
    assert after.parts[: len(before.parts)] == before.parts and after.classes == {"blue", "green", "red"}
    assert sum(len(part.images) for part in after.at_most(1).parts) == 3


def test_images_that_changed_or_are_gone_are_refused(first: Path, tmp_path: Path) -> None:
    memory = choose_memory(sessions_of(first), 1, "random", Silent())
    part = memory.parts[0]

    def changed(**update: str) -> Path:
        images = (part.images[0].model_copy(update=update), *part.images[1:])
        Memory(parts=(part.model_copy(update={"images": images}),)).write(tmp_path / "m.json")
        return tmp_path / "m.json"

    with pytest.raises(DataError, match="has changed"):
        open_memory(changed(sha256="0" * 64), ("blue", "green"))
    with pytest.raises(MissingData, match="any more"):
        open_memory(changed(name="train/blue/gone.png"), ("blue", "green"))
    path = changed()
    path.write_text(path.read_text().replace("blue", "bleu"))
    with pytest.raises(DataError, match="not a memory"):
        read_memory(path)


def test_sessions_are_even_or_as_they_are_named() -> None:
    assert groups_of("2", "abcde") == [["a", "b"], ["c", "d", "e"]]
    assert groups_of("b,a/c", "abc") == [["b", "a"], ["c"]]
    for wrong in ("3", "1", "a,b", "a/b,c", "a,b/d", ""):
        with pytest.raises(RecipeError, match="--sessions"):
            groups_of(wrong, "abc")


def test_ways_under_one_protocol(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe("train.epochs=1", "train.keep=best", "data.augment=light", method="linear")
    arguments = (recipe, "blue,green/red", ["linear"], ["prototypes", "joint"], 2, tmp_path, Silent())
    table = compare_sessions(*arguments)
    rows = {row["way"]: row for row in table["rows"]}
    summary = json.loads((tmp_path / "linear" / "seed-1" / "prototypes" / "2" / "summary.json").read_text())
    assert rows["prototypes"]["overall"]["values"][1] == summary["sessions"]["overall"]
    assert rows["joint"]["forgetting"] is None and rows["joint"]["overall"]["low"] is not None
    assert summary["seed"] == 1 and "prototypes" in (tmp_path / "sessions.md").read_text()
    monkeypatch.setattr(session_protocol, "start", None)  # what is finished is not run again
    assert compare_sessions(*arguments)["rows"] == table["rows"]
    for word in ("joint:3", "ease:3", "lwf:bias", "lwf:3:4", "lwf:0:bias"):
        with pytest.raises(RecipeError, match=word):
            compare_sessions(*arguments[:3], [word], *arguments[4:])
    with pytest.raises(RecipeError, match="extended by itself alone"):
        compare_sessions(*arguments[:2], ["ease"], ["lwf"], *arguments[4:])
    with pytest.raises(RecipeError, match="domains is for a new look"):
        compare_sessions(*arguments[:3], ["domains"], *arguments[4:])
    with pytest.raises(RecipeError, match="method ease changes the classifier"):  # and keep=best judges the one before
        compare_sessions(*arguments[:3], ["ease"], *arguments[4:])
    other = tiny.recipe("train.epochs=2", "train.keep=best", "data.augment=light", method="linear")
    with pytest.raises(RunError, match="made with other settings"):
        compare_sessions(other, *arguments[1:])
    with pytest.raises(RunError, match="made with other settings"):
        compare_sessions(recipe, "blue,red/green", *arguments[2:])


@pytest.mark.parametrize(
    ("method", "ways", "why"),
    [
        ("taskres", ["lwf", "joint"], "taskres holds tensors of each class .*or the way lwf"),
        ("coop", ["lwf", "ranpac"], "random features do not go with coop .*or the way ranpac"),
    ],
)
def test_a_method_that_no_way_extends_is_refused_before_its_first_session(
    tiny: Any, tmp_path: Path, method: str, ways: list[str], why: str
) -> None:
    recipe = tiny.recipe("train.epochs=1", method="linear")
    with pytest.raises(RecipeError, match=why):
        compare_sessions(recipe, "blue,green/red", [method], ways, 1, tmp_path, Silent())
    assert not [*tmp_path.iterdir()]


def test_folders_are_sessions_with_a_look_of_their_own(tiny: Any, tmp_path: Path) -> None:
    for look in ("day", "night"):
        for label in ("blue", "red"):
            for part in ("train", "val"):
                folder = tmp_path / "looks" / look / label
                folder.mkdir(parents=True, exist_ok=True)
                for path in (Path(tiny.data) / part / label).iterdir():
                    shutil.copy(path, folder / f"{part}-{path.name}")
    (tmp_path / "looks" / ".cache").mkdir()  # of a tool, and not a session
    data = f"data.source={tmp_path / 'looks'}"
    recipe = tiny.recipe(data, "data.val_fraction=0.3", "train.epochs=1", method="linear", teacher=None, losses="ce")
    arguments = (recipe, "folders", ["linear"], ["domains", "joint"], 1, tmp_path / "out", Silent())
    table = compare_sessions(*arguments)
    rows = {(row["method"], row["way"]): row for row in table["rows"]}
    assert table["sessions"] == [["day"], ["night"]] and set(rows) == {("linear", "joint"), ("domains", "domains")}
    (matrix,) = rows["domains", "domains"]["accuracy"]
    assert [len(row) for row in matrix] == [2, 2]
    assert rows["domains", "domains"]["forward_transfer"]["mean"] == matrix[0][1]
    first = json.loads((tmp_path / "out" / "domains" / "seed-0" / "first" / "summary.json").read_text())
    joint = json.loads((tmp_path / "out" / "linear" / "seed-0" / "joint" / "summary.json").read_text())
    images = [run["data"]["train_images"] + run["data"]["val_images"] for run in (first, joint)]
    assert images[1] == 2 * images[0]
    # Of the classes of each look, and judged by the images that the sessions are judged by.
    counts = [{name: run["data"][name] for name in ("classes", "val_images")} for run in (first, joint)]
    assert counts[1] == {"classes": 2, "val_images": 2 * counts[0]["val_images"]}
    with pytest.raises(RecipeError, match="ease is for new classes"):
        compare_sessions(*arguments[:3], ["ease"], *arguments[4:])
    with pytest.raises(RecipeError, match="lwf:3:bias corrects the bias of new classes"):
        compare_sessions(*arguments[:3], ["lwf:3:bias"], *arguments[4:])
    with pytest.raises(RecipeError, match="a folder of two or more"):
        compare_sessions(tiny.recipe("data.source=digits"), *arguments[1:])
