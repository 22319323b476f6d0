"""Students that compute side by side: the rows, their order and their bits are those of one after the other."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from remap.prediction import predictions as module
from remap.prediction.inputs import Inputs
from remap.prediction.lanes import LEAST_IMAGES, lanes, most_lanes
from remap.prediction.predict import open_students
from remap.prediction.predictions import Prediction, Wanted, predictions

COUNT = 3 * LEAST_IMAGES + 5


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than a batch, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    (folder / "007.png").write_bytes(b"not an image")
    return folder


@pytest.mark.parametrize(
    "methods",
    [("linear",), ("lora",), ("vpt_deep",), ("l2p",), ("lora", "ssf", "linear", "vpt_deep")],
    ids="+".join,
)
def test_rows_are_those_of_one_after_the_other(
    two_threads: None,
    make_task: Callable[..., Any],
    many: Path,
    monkeypatch: pytest.MonkeyPatch,
    methods: tuple[str, ...],
) -> None:
    """Several tasks share one backbone, also in the copies."""
    students = open_students({name: make_task(name, name, tuple("abcd")) for name in methods}, "cpu")
    wanted, computing = Wanted(batch_size=2 * LEAST_IMAGES, probabilities=True, embeddings=True), set[str]()
    rows = module._Answers.rows

    def noted(self: Any, batch: Any) -> list[list[Prediction]]:
        computing.add(threading.current_thread().name)
        return list(rows(self, batch))

    monkeypatch.setattr(module._Answers, "rows", noted)
    found = list(predictions(students, Inputs([many]), wanted))
    assert len(computing) == 2 and torch.get_num_threads() == 2
    monkeypatch.setattr(module, "most_lanes", lambda *_: 1)
    assert found == list(predictions(students, Inputs([many]), wanted))
    assert [Path(row[0].path).name for row in found] == [f"{index:03d}.png" for index in range(COUNT)]
    assert [row[0].error for row in found if row[0].error] == ["not an image"]


def test_copies_share_their_tensors_and_nothing_else(two_threads: None, make_task: Callable[..., Any]) -> None:
    students = open_students({name: make_task(name, name) for name in ("lora", "linear")}, "cpu")
    with lanes(students, 2) as (first, second):
        assert first is students and torch.get_num_threads() == 1
        for name in students:
            ours, theirs = (dict(one[name].model.named_parameters()) for one in (first, second))
            assert ours.keys() == theirs.keys() and all(theirs[key] is value for key, value in ours.items())
            assert not {*map(id, first[name].model.modules())} & {*map(id, second[name].model.modules())}
    assert torch.get_num_threads() == 2


def test_an_error_of_one_ends_all(
    two_threads: None, make_task: Callable[..., Any], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = open_students({"": make_task("one", "linear")}, "cpu")

    def broken(*_: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(module._Answers, "rows", broken)
    with pytest.raises(ValueError, match="broken"):
        list(predictions(students, Inputs([many]), Wanted(batch_size=2 * LEAST_IMAGES)))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("batch", "threads", "count"),
    [(64, 2, 2), (64, 16, 4), (16, 2, 1), (31, 2, 1), (32, 2, 2), (1, 8, 1), (64, 1, 1)],
)
def test_passes_have_so_many_images_that_they_pay(
    two_threads: None, make_task: Callable[..., Any], batch: int, threads: int, count: int
) -> None:
    torch.set_num_threads(threads)
    assert most_lanes(open_students({"": make_task("one", "linear")}, "cpu"), batch) == count


def test_few_images_need_no_copy(
    two_threads: None, make_task: Callable[..., Any], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remap.prediction.lanes._copy", lambda *_: pytest.fail("copied"))
    students, files = open_students({"": make_task("one", "linear")}, "cpu"), sorted(many.iterdir())[:LEAST_IMAGES]
    assert len(list(predictions(students, Inputs(files), Wanted(batch_size=2 * LEAST_IMAGES)))) == LEAST_IMAGES
