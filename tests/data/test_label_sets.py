"""Several labels an image: what each source gives, how images are divided, and what is refused."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remap.data.sources import open_data
from remap.data.splits import ImageData, Split
from remap.data.stratify import few_of_each, stratified
from remap.errors import DataError

# Labels of ten images; one has none.
SETS = ["ant", "ant;bee", "bee", "ant;bee;cat", "", "cat", "ant", "bee;cat", "ant;cat", "bee"]
NAMES = ("ant", "bee", "cat")


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for number in range(len(SETS)):
        (root / f"{number}.png").write_bytes(picture(number))
    return root


def open_sets(word: object, val: object = None) -> ImageData:
    return open_data(str(word), None if val is None else str(val), 0.3, task="multilabel")


def found(data: ImageData) -> dict[int, str]:
    """Labels by the image's number, which its red channel tells."""
    pairs = {}
    for split in (data.train, data.val):
        for index, labels_C in enumerate(split.labels):
            red = Image.open(io.BytesIO(split.read(index))).getpixel((0, 0))[0]
            pairs[red // 10] = ";".join(np.array(data.classes)[labels_C == 1])
    return pairs


def by_table(folder: Path) -> str:
    rows = "".join(f"{number}.png,{labels}\n" for number, labels in enumerate(SETS))
    (folder / "one.csv").write_text(f"file,labels\n{rows}")
    return f"csv:{folder}/one.csv,separator=;"


def by_columns(folder: Path) -> str:
    rows = [f"{n}.png,{','.join(str(int(name in labels)) for name in NAMES)}" for n, labels in enumerate(SETS)]
    (folder / "many.csv").write_text("\n".join(["file,ant,bee,cat", *rows]))
    return str(folder / "many.csv")


def by_parquet(folder: Path) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    feature = {"_type": "List", "feature": {"_type": "ClassLabel", "names": list(NAMES)}}
    info = json.dumps({"info": {"features": {"labels": feature}}})
    numbers = [[NAMES.index(name) for name in labels.split(";") if name] for labels in SETS]
    table = pa.table({"image": [picture(n) for n in range(len(SETS))], "labels": numbers})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), folder / "sets.parquet")
    return str(folder / "sets.parquet")


def by_shards(folder: Path) -> str:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number, labels in enumerate(SETS):
            content = json.dumps({"labels": [name for name in labels.split(";") if name]}).encode()
            for name, data in ((f"{number}.png", picture(number)), (f"{number}.json", content)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"webdataset:{folder}/shard.tar"


@pytest.mark.parametrize("write", [by_table, by_columns, by_parquet, by_shards])
def test_every_source_gives_the_same_sets(write: Callable[[Path], str], folder: Path) -> None:
    """Images without a class are images, too; three of ten are held out."""
    data = open_sets(write(folder))
    assert data.classes == NAMES and found(data) == dict(enumerate(SETS))
    assert (len(data.train), len(data.val), data.train.labels.shape) == (7, 3, (7, 3))
    assert data.train.labels.any(axis=0).all()


def test_data_sets_of_hugging_face_give_lists_of_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lists = [[name for name in labels.split(";") if name] for labels in SETS]
    features = datasets.Features(image=datasets.Image(), labels=datasets.Sequence(datasets.Value("string")))
    images = [{"bytes": picture(n), "path": None} for n in range(len(SETS))]
    datasets.Dataset.from_dict({"image": images, "labels": lists}, features).save_to_disk(str(tmp_path / "saved"))
    assert found(open_sets(tmp_path / "saved")) == dict(enumerate(SETS))


def test_images_of_another_table_are_evaluated_on(folder: Path) -> None:
    by_table(folder)
    (folder / "val.csv").write_text("file,labels\n0.png,cat\n1.png,\n")
    word = f"csv:{folder}/one.csv,separator=;"
    assert open_sets(word, f"csv:{folder}/val.csv,separator=;").val.labels.tolist() == [[0, 0, 1], [0, 0, 0]]
    (folder / "val.csv").write_text("file,labels\n0.png,dog\n")
    with pytest.raises(DataError, match=r"classes the task does not know\n  given:   dog"):
        open_sets(word, f"csv:{folder}/val.csv,separator=;")


def test_test_images_without_any_label_are_not_evaluated_on(folder: Path) -> None:
    """As those of a contest: every mAP on them would be 0. Single images without a class count."""

    def word(split: str) -> str:
        rows = [f"{n}.png,{labels if n < 7 else ''},{'train' if n < 7 else split}" for n, labels in enumerate(SETS)]
        (folder / "contest.csv").write_text("\n".join(["file,labels,split", *rows]))
        return f"csv:{folder}/contest.csv,separator=;"

    data = open_sets(word("test"))
    assert len(data.train) + len(data.val) == 7 and data.test is None and "held out" in data.split_rule
    assert [reason for _, reason in data.skipped] == ["without a label"] * 3
    with pytest.raises(DataError, match="no image to evaluate on has a class"):
        open_sets(word("val"))


def test_a_part_of_the_labels_and_few_of_each_class(folder: Path) -> None:
    data = open_sets(by_table(folder))
    some = data.with_labels(4)
    assert some.unlabeled is not None and some.unlabeled.labels.tolist() == [[-1] * 3] * 3
    assert (some.train.labels.sum(axis=0) >= 1).all()
    few = data.with_per_class(1).train
    assert (few.labels.sum(axis=0) >= 1).all() and len(few) <= 4, "one image at least of each class, none beyond"


def test_sides_have_their_sizes_and_their_share_of_each_class() -> None:
    """Of many images of independent classes, each side has its share of each class to one image or two."""
    draws = np.random.default_rng(0)
    labels_NC = (draws.random((1000, 5)) < (0.5, 0.2, 0.1, 0.02, 0.004)).astype(np.int8)
    for first in (100, 800):
        left, right = stratified(labels_NC, first)
        assert len(left) == first and sorted([*left, *right]) == list(range(1000))
        wanted_C = np.maximum(labels_NC.sum(axis=0) * first / 1000, 1.0)
        assert np.abs(labels_NC[left].sum(axis=0) - wanted_C).max() <= 2
    assert np.array_equal(stratified(labels_NC, 100)[0], stratified(labels_NC, 100)[0])


def test_few_of_one_class_an_image_are_those_of_each_class() -> None:
    labels_N = np.array([0, 1, 1, 0, 2, 1])
    assert sorted(labels_N[few_of_each(labels_N, 2, 7)]) == [0, 0, 1, 1, 2]


def test_few_images_without_a_class_are_taken_too() -> None:
    """By hand: two images have class 0, four have none, and none has class 1."""
    labels_NC = np.array([[1, 0], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0]], np.int8)
    assert labels_NC[few_of_each(labels_NC, 1, 3)].sum(axis=1).tolist().count(0) == 1
    assert labels_NC[few_of_each(labels_NC, 3, 3)].sum(axis=1).tolist().count(0) == 3
    assert few_of_each(labels_NC, 4, 3).tolist() == list(range(6))


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    """Two files of equal bytes and other labels."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(picture(number // 2))
    rows = "".join(f"{number}.png,{SETS[number]}\n" for number in range(10))
    (tmp_path / "labels.csv").write_text(f"file,labels\n{rows}")
    data = open_sets(f"csv:{tmp_path}/labels.csv,separator=;")

    def contents(split: Split) -> set[bytes]:
        return {split.read(index) for index in range(len(split))}

    assert contents(data.train).isdisjoint(contents(data.val)) and len(data.train) + len(data.val) == 10


REFUSED = {
    "no separator": ("file,labels\n0.png,ant\n", "", "a column of several labels needs a separator"),
    "not 0 or 1": ("file,ant,size\n0.png,1,640\n", "", r"other than 0 and 1\n  given:   line 2, column size: 640"),
    "no such column": ("file,ant,bee\n0.png,1,0\n", ",label=ant|dog", r"no such columns\n  given:   dog"),
    "two rows": ("file,labels\n0.png,ant\n0.png,bee\n", ",separator=;", "a file stands in several rows"),
    "one class": ("file,labels\n0.png,ant\n1.png,ant\n", ",separator=;", "at least two classes are needed"),
    "control characters": ("file,labels\n0.png,a\x1b[2J;b\n", ",separator=;", "a class name has"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "options", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_tables_that_are_refused(folder: Path, text: str, options: str, expected: str) -> None:
    (folder / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=expected):
        open_sets(f"csv:{folder}/bad.csv{options}")


def test_the_task_is_never_guessed(folder: Path) -> None:
    """Several labels without the task, and the task with images of one class each; each message names the field."""
    with pytest.raises(DataError, match=r"several labels; one is learned(.|\n)*--set task=multilabel"):
        open_data(by_table(folder), None, 0.3)
    with pytest.raises(DataError, match="--set task=multilabel"):
        open_data(by_columns(folder), None, 0.3)
    for word in ("digits", "drawings", str(folder)):
        with pytest.raises(DataError, match="one class each, and task: multilabel"):
            open_sets(word)
