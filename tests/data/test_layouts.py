"""Folders as people have them: splits under other names, wrapping folders, leftovers of systems, deeper classes.

Expected classes and counts are what lies in the folders, counted by hand.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remap.data import image_files as image_files_module
from remap.data.folder_layout import split_named
from remap.data.image_files import counted
from remap.data.sources import open_data, open_unlabeled, read_all
from remap.data.splits import ImageData
from remap.errors import DataError
from remap.prediction.inputs import Inputs

Tree = Callable[..., Path]
Files = dict[str, int | bytes | None]


def images(*folders: str, count: int = 4) -> Files:
    return {f"{folder}/{i}.png": 10 * number + i for number, folder in enumerate(folders) for i in range(count)}


def opened(root: Path, depth: int | None = None) -> ImageData:
    return open_data(str(root), None, 0.25, depth=depth)


def refusal(root: Path, depth: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        opened(root, depth)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("training_set", "test_set"),
        ("train_images", "test_images"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("images_train", "images_val"),
        ("Train set", "Valid set"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("my-training-data", "holdout"),
        ("trainset/images", "testset/images"),
        ("data/train/train", "data/validation/validation"),
    ],
)
def test_splits_under_their_usual_names(tree: Tree, train: str, val: str) -> None:
    data = opened(tree(images(f"{train}/cat", f"{train}/dog") | images(f"{val}/cat", f"{val}/dog", count=3)))
    assert (data.classes, len(data.train), len(data.val)) == (("cat", "dog"), 8, 6)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and not data.skipped


@pytest.mark.parametrize(
    "name", ["constrain", "trainer", "valley", "contest", "train1", "set", "images", "devil", "TR"]
)
def test_other_names_are_not_splits(name: str) -> None:
    assert split_named(name) is None


@pytest.mark.parametrize(
    "classes",
    [("bus", "car", "train"), ("car", "test", "train"), ("Train", "bus"), ("cat", "val"), ("bus", "training")],
)
def test_a_folder_that_holds_images_is_a_class_whatever_its_name(tree: Tree, classes: tuple[str, ...]) -> None:
    data = opened(tree(images(*classes)))
    assert (data.classes, len(data.train) + len(data.val)) == (tuple(sorted(classes)), 4 * len(classes))


UNCLEAR: dict[str, Files] = {
    "a class called train with sub-folders": images("bus", "car", "train/steam", "train/electric"),
    "a train folder without class folders": images("train", "test"),
    "a train folder alone without class folders": images("train", count=3),
    "the test folder beside the training classes": images("cat", "dog", "test/cat", "test/dog"),
    "a flat train folder beside a val of class folders": images("train", "val/cat", "val/dog"),
}


@pytest.mark.parametrize("files", UNCLEAR.values(), ids=list(UNCLEAR))
def test_what_may_be_a_split_or_a_class_is_refused_with_both_readings(tree: Tree, files: Files) -> None:
    text = refusal(tree(files))
    assert "may be a split, or a class of that name" in text and "if it is a class, rename it" in text
    assert "train" in text or "test" in text


@pytest.mark.parametrize("other", ["crossval", "query", "images2"])
def test_the_same_class_folders_beside_train_may_be_a_split(tree: Tree, other: str) -> None:
    """Where there is something to evaluate on they are what else there is, such as masks."""
    train, beside = images("train/cat", "train/dog"), images(f"{other}/cat", f"{other}/dog", count=2)
    root = tree(train | beside, "one")
    assert f"--data {root}/train --val-data {root}/{other}; if not, move it elsewhere" in refusal(root)
    data = opened(tree(train | beside | images("val/cat", "val/dog"), "two"))
    assert (len(data.train), len(data.val), counted(data.skipped)) == (8, 8, "4 (lies outside the class folders)")


def test_a_flat_val_folder_is_not_passed_over(tree: Tree) -> None:
    """As ImageNet's, whose labels are in a table. Test images without labels are usual, and left out."""
    train = images("train/a", "train/b")
    text = refusal(tree(train | images("val"), "one"))
    assert "evaluate on holds no images in class folders" in text and "4 (lies outside the class folders)" in text
    data = opened(tree(train | images("test"), "two"))
    assert (len(data.train), len(data.val), counted(data.skipped)) == (6, 2, "4 (lies outside the class folders)")


BESIDE: dict[str, Files] = {
    "of a Mac": {".DS_Store": b"", "__MACOSX/photos/ant/._0.png": b""},
    "of Windows": {
        "Thumbs.db": b"",
        "desktop.ini": b"",
        "$RECYCLE.BIN/S-1/1.png": 1,
        "System Volume Information/x": b"",
    },
    "of a data set": {"README.md": b"", "LICENSE": b"", "labels.csv": b"", "logo.png": 1},
    "of a drive": {"lost+found": None, "@eaDir/cover.png/SYNOPHOTO_THUMB_M.jpg": 1, "#recycle/ant/0.png": 1},
}


@pytest.mark.parametrize("wrapping", ["photos", "a/photos", "dataset/b/c"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=list(BESIDE))
def test_what_lies_beside_a_wrapping_folder_is_left_out(tree: Tree, wrapping: str, beside: Files) -> None:
    inner = images(f"{wrapping}/ant", f"{wrapping}/bee")
    data = opened(tree(inner | beside))
    assert (data.classes, len(data.train), len(data.val)) == (("ant", "bee"), 6, 2)
    assert len(data.skipped) == sum(content is not None for content in beside.values())


def test_annotations_beside_the_images_are_left_out(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUB-200 and Oxford pets: images/ beside folders of texts; a folder of another name may be a class."""
    files = images("images/ant", "images/bee") | {"annotations/xmls/1.xml": b"", "parts/parts.txt": b""}
    assert opened(tree(files)).classes == ("ant", "bee")
    monkeypatch.setattr(image_files_module, "HEIC", False)
    text = refusal(tree(images("ant/x", "ant/y") | {"bee/1.HEIC": b"", "bee/2.HEIC": b""}, "two"))
    assert "a class folder holds no images\n  given:   bee (2 (.HEIC files need pillow-heif" in text


MADE_BY = ["@eaDir", "$RECYCLE.BIN", "lost+found", ".ipynb_checkpoints", "__MACOSX", "#recycle", "@Recycle"]


@pytest.mark.parametrize("folder", [*MADE_BY, "System Volume Information", ".thumbnails", "Thumbs", "_thumbs"])
def test_leftovers_are_neither_classes_nor_images_anywhere(tree: Tree, folder: str) -> None:
    """One rule for training, evaluation, images without labels and prediction; all of them count what is left out."""
    good = images("ant", "bee")
    root = tree(good | {f"{folder}/1.png": 90, f"ant/{folder}/0.png/thumb.jpg": 91, f"bee/{folder}/x": b""})
    data = opened(root)
    assert (data.classes, len(data.train) + len(data.val)) == (("ant", "bee"), 8)
    split, left_out = read_all(str(root), ("ant", "bee"))
    unlabeled, more = open_unlabeled(str(root))
    inputs = Inputs([root])
    assert len(split) == len(unlabeled) == len(list(inputs)) == 8
    assert {counted(one) for one in (data.skipped, left_out, more)} == {f"3 (in {folder})"}
    assert inputs.left_out_text == f"left out 3 other files: in {folder}"


@pytest.mark.parametrize("kind", [".gif", ".jfif", ".dcm", ".jp2", ".svg", ".zip", ".pdf", ""])
def test_a_class_of_files_that_are_not_read_says_which(tree: Tree, kind: str) -> None:
    files = {f"ant/{i}{kind}": b"" for i in range(3)}
    reason = f"3 ({kind} files are not read)" if kind else "3 (files without a suffix are not read)"
    text = refusal(tree(files | images("bee", "cat"), "one"))
    assert f"a class folder holds no images\n  given:   ant ({reason})" in text
    text = refusal(tree({f"{name}/{i}{kind}": b"" for name in "abc" for i in range(1)}, "all"))
    assert "no images in class folders" in text and reason in text
    text = refusal(tree(images("train/a", "train/b") | {f"val/a/{i}{kind}": b"" for i in range(3)}, "val"))
    assert "evaluate on holds no images" in text and reason in text
    with pytest.raises(DataError) as caught:
        list(Inputs([tree(files, "new")]))
    assert reason in str(caught.value)


DEEP = images("a/ant", "a/asp", "b/bee", "c/cat", "c/cow")


@pytest.mark.parametrize(
    ("files", "level", "named"),
    [
        (DEEP, 2, "a/ant, a/asp, b/bee"),
        ({f"all/{path}": grey for path, grey in DEEP.items()}, 2, "a/ant, a/asp, b/bee"),
        ({f"train/{path}": grey for path, grey in DEEP.items()}, 2, "a/ant, a/asp, b/bee"),
        (images("x/a/1", "x/a/2", "y/b/1", "y/c/1"), 3, "x/a/1, x/a/2, y/b/1"),
    ],
)
def test_classes_that_may_lie_deeper_are_refused_with_the_level(
    tree: Tree, files: Files, level: int, named: str
) -> None:
    text = refusal(root := tree(files))
    assert f"the classes may lie {level} levels deep" in text and f"for {named} ... as classes" in text
    assert f"--set data.depth={level}" in text and "--set data.depth=1" in text
    said = refusal(root, level + 2)
    assert f"{len(files)} images, {level} folders deep" in said and f"add --set data.depth={level} in place of" in said
    deep, top = opened(root, level), opened(root, 1)
    assert len(deep.classes) == len(files) // 4 and ", ".join(deep.classes).startswith(named)
    assert sorted({name.split("/")[0] for name in deep.classes}) == list(top.classes)
    assert len(deep.train) + len(deep.val) == len(top.train) + len(top.val) == len(files)
    assert np.bincount(deep.val.labels).tolist() == [1] * len(deep.classes)


def test_images_above_the_level_are_counted(tree: Tree) -> None:
    data = opened(tree(DEEP | {"a/loose.png": 1}), 2)
    assert data.skipped == (("a/loose.png", "lies outside the class folders"),)
    assert opened(tree(DEEP | {"a/loose.png": 1})).classes == (
        "a",
        "b",
        "c",
    )  # a class with images, and its sub-folders


@pytest.mark.parametrize("names", [("part1", "part2"), ("fold_a", "fold_b"), ("lab", "field")])
def test_folders_that_hold_the_same_folders_may_be_splits(tree: Tree, names: tuple[str, str]) -> None:
    text = refusal(tree(images(*(f"{part}/{name}" for part in names for name in ("cat", "dog")))))
    first, second = sorted(names)
    assert "if these are splits, name them: --data" in text and f"{first} --val-data" in text and text.endswith(second)


def test_three_folders_of_the_same_folders_are_not_called_splits(tree: Tree) -> None:
    text = refusal(tree(images(*(f"{part}/{name}" for part in ("x", "y", "z") for name in ("cat", "dog")))))
    assert "data.depth=2" in text and "if these are splits" not in text


def test_a_command_that_is_advised_can_be_pasted(tree: Tree) -> None:
    text = refusal(tree(images(*(f"{part}/{name}" for part in ("part 1", "part 2") for name in ("cat", "dog")))))
    words = shlex.split(text.partition("name them: ")[2])
    assert [word.rpartition("/")[2] for word in words] == ["--data", "part 1", "--val-data", "part 2"]


@pytest.mark.parametrize("name", ["caf\u00e9", "\ud55c\uad6d", "\u304c\u304e", "\u00c5ngstr\u00f6m"])
def test_names_composed_and_decomposed_are_one_class(tree: Tree, name: str) -> None:
    """The two forms by the standard library's NFD; the class is shown as it is in the training folder."""
    from unicodedata import normalize

    composed, apart = name, normalize("NFD", name)
    assert composed != apart
    for train, val in ((composed, apart), (apart, composed)):
        root = tree(
            images("train/ant", f"train/{train}") | images("eval/ant", f"eval/{val}", count=2), f"x{len(train)}"
        )
        data = opened(root)
        assert data.classes == tuple(sorted(("ant", train))) and (len(data.train), len(data.val)) == (8, 4)
        assert len(read_all(str(root), ("ant", val))[0]) == 12
    data = open_data(str(tree(images("ant", composed), "one")), str(tree(images("ant", apart), "two")), 0.2)
    assert data.classes == ("ant", composed) and np.bincount(data.val.labels).tolist() == [4, 4]
    data = opened(tree(images("ant", composed, apart), "both"))
    assert len(data.classes) == 2 and len(data.train) + len(data.val) == 12


@pytest.mark.parametrize("other", ["Sea Lion", "sea\u00a0lion", "SEA LION"])
def test_names_that_differ_in_capitals_or_spaces_are_told_apart(tree: Tree, other: str) -> None:
    text = refusal(tree(images("train/ant", "train/sea lion") | images("val/ant", f"val/{other}")))
    assert f"{ascii(other)} and 'sea lion' differ in capitals or in characters that look alike" in text
    with pytest.raises(DataError, match="look alike"):
        read_all(str(tree(images("ant", other), "two")), ("ant", "sea lion"))
