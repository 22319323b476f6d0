"""Where images come from: the digits, folders in all their layouts, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from remap.data.images import decode
from remap.data.shards import shards
from remap.data.sources import open_data
from remap.data.splits import ImageData, Split
from remap.data.stratify import stratified
from remap.errors import DataError

Tree = Callable[..., Path]


def opened(root: Path, val: Path | None = None, fraction: float = 0.2) -> ImageData:
    return open_data(str(root), None if val is None else str(val), fraction)


def greys(split: Split) -> list[int]:
    return [decode(split.read(i)).getpixel((0, 0))[0] for i in range(len(split))]


def refusal(root: Path, val: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        opened(root, val)
    return str(caught.value)


def folders(*parts: str, classes: str = "ab", images: int = 2) -> dict[str, int | bytes | None]:
    return {f"{part}/{name}/{i}.png": i for part in parts for name in classes for i in range(images)}


def test_digits_are_divided_in_proportion_without_overlap_and_always_the_same() -> None:
    """1,797 images and their labels are scikit-learn's; proportions by largest remainder differ by less than one."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    data, again = open_data("digits", None, 0.5), open_data("digits", None, 0.5)
    assert (len(data.train), len(data.val), data.test) == (1000, 797, None)
    assert data.classes == tuple("0123456789") and data.fingerprint() == again.fingerprint()
    numbers = [[int(name.removeprefix("digits/")) for name in split.names] for split in (data.train, data.val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(1797))
    for split, own in zip((data.train, data.val), numbers, strict=True):
        assert (split.labels == bundle.target[own]).all()
        assert np.abs(np.bincount(split.labels) - np.bincount(bundle.target) * len(split) / 1797).max() < 1
    pixels = np.asarray(decode(data.val.read(3)))[:, :, 0]
    assert pixels.tolist() == np.rint(bundle.images[numbers[1][3]] * 255 / 16).tolist()


def test_digits_take_no_second_source() -> None:
    with pytest.raises(DataError, match="their own test split"):
        open_data("digits", "elsewhere", 0.2)


@pytest.mark.parametrize(
    ("parts", "val", "test"),
    [
        (("train", "val"), "val", None),
        (("train", "test"), "test", None),
        (("train", "val", "test"), "val", "test"),
        (("training", "validation"), "validation", None),
        (("Train", "Valid", "Testing"), "Valid", "Testing"),
    ],
)
def test_a_source_with_splits(tree: Tree, parts: tuple[str, ...], val: str, test: str | None) -> None:
    data = opened(tree(folders(*parts)))
    assert data.classes == ("a", "b") and data.skipped == ()
    for split, name in ((data.train, parts[0]), (data.val, val), (data.test, test)):
        if name is None:
            assert split is None
            continue
        assert split.names == tuple(f"{name}/{c}/{i}.png" for c in "ab" for i in range(2))
        assert split.labels.tolist() == [0, 0, 1, 1] and greys(split) == [0, 1, 0, 1]


@pytest.mark.parametrize("root", [("train",), ()])
def test_one_folder_is_divided_in_proportion_and_always_the_same(tree: Tree, root: tuple[str, ...]) -> None:
    prefix = "train/" if root else ""
    counts = {"a": 10, "b": 20, "c": 5}
    files = {f"{prefix}{name}/{i}.png": i for name, count in counts.items() for i in range(count)}
    data, again = opened(tree(files)), opened(tree(files, "copy"))
    assert np.bincount(data.train.labels).tolist() == [8, 16, 4] and np.bincount(data.val.labels).tolist() == [2, 4, 1]
    assert sorted(data.train.names + data.val.names) == sorted(files)
    assert data.fingerprint() == again.fingerprint()
    assert all(
        data.classes[label] == name.split("/")[-2] for name, label in zip(data.val.names, data.val.labels, strict=True)
    )


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("counts", [(100, 2), (2, 2), (3, 50, 2), (7,) * 5])
def test_every_class_is_learned_from_and_checked(tree: Tree, counts: tuple[int, ...], fraction: float) -> None:
    files = {f"{label}/{i}.png": 0 for label, count in enumerate(counts) for i in range(count)}
    data = opened(tree(files), fraction=fraction)
    assert min(np.bincount(data.train.labels, minlength=len(counts))) >= 1
    assert min(np.bincount(data.val.labels, minlength=len(counts))) >= 1
    wanted = np.clip(round(sum(counts) * fraction), len(counts), sum(counts) - len(counts))
    assert len(data.val) == wanted


@pytest.mark.parametrize("first", [0, 1, 3, 50, 100, 102])
def test_the_divider_gives_exactly_what_is_asked(first: int) -> None:
    labels = np.asarray([0] * 60 + [2] * 40 + [3] * 2)
    left, right = stratified(labels, first)
    assert len(left) == first and sorted([*left, *right]) == list(range(102))


def test_a_second_source_to_evaluate_on(tree: Tree) -> None:
    train, plain, divided = (
        tree(folders("train", "val"), "one"),
        tree({"a/x.png": 7, "b/y.png": 8}, "two"),
        tree(folders("train", "test"), "three"),
    )
    data = opened(train, plain)
    assert data.train.names[0] == "train/a/0.png" and greys(data.val) == [7, 8]
    assert opened(plain, divided).val.names[0] == "test/a/0.png" and len(opened(plain, divided).train) == 2
    assert "no images to evaluate on" in refusal(train, tree(folders("train"), "four"))


def test_what_is_left_out_is_named_with_its_reason(tree: Tree) -> None:
    root = tree(
        folders("train", "val")
        | {"train/a/notes.txt": b"", "train/b/plain": b"", "train/loose.png": 0, "README.md": b"", "extra/a/1.png": 0}
        | {".DS_Store": b"", "train/.hidden/1.png": 0, "train/a/._0.png": b"", "__MACOSX/train/a/0.png": b""}
        | {"extra/info/x.txt": b""}
    )
    data = opened(root)
    assert len(data.train) == len(data.val) == 4
    assert dict(data.skipped) == {
        "README.md": ".md files are not read",
        "extra/a/1.png": "lies outside the class folders",
        "extra/info/x.txt": ".txt files are not read",
        "train/loose.png": "lies outside the class folders",
        "train/a/notes.txt": ".txt files are not read",
        "train/b/plain": "files without a suffix are not read",
        ".DS_Store": "hidden or made by the system",
        "train/a/._0.png": "hidden or made by the system",
        "train/.hidden/1.png": "in .hidden",
        "__MACOSX/train/a/0.png": "in __MACOSX",
    }


def test_sub_folders_and_capital_suffixes_belong_to_their_class(tree: Tree) -> None:
    data = opened(tree({"a/1.PNG": 1, "a/x/y/2.png": 2, "b/z/3.JpEg": 3, "b/4.png": 4}), fraction=0.5)
    assert sorted(data.train.names + data.val.names) == ["a/1.PNG", "a/x/y/2.png", "b/4.png", "b/z/3.JpEg"]
    assert np.bincount(data.train.labels).tolist() == np.bincount(data.val.labels).tolist() == [1, 1]


def test_a_class_may_be_missing_from_evaluation_but_not_from_training(tree: Tree) -> None:
    assert opened(tree(folders("train", classes="abc") | folders("val"), "one")).classes == ("a", "b", "c")
    text = refusal(tree(folders("train") | folders("val", classes="abc"), "two"))
    assert "classes in val that train lacks" in text and "given:   c" in text
    text = refusal(tree(folders("train", "val") | folders("test", classes="z"), "three"))
    assert "classes in test that train lacks" in text


REFUSED = {
    "empty": ({}, "no images in class folders"),
    "loose images": ({"1.png": 0, "2.png": 0}, "no images in class folders"),
    "one class": (folders("x", classes="a"), "at least two classes are needed"),
    "one class in train": (folders("train", "val", classes="a"), "at least two classes are needed"),
    "an empty class": (folders("train", "val") | {"train/c": None}, "a class folder holds no images\n  given:   c"),
    "an empty class, undivided": (
        {"a/1.png": 0, "b/1.png": 0, "c": None},
        "a class folder holds no images\n  given:   c",
    ),
    "a class of texts": ({"a/1.png": 0, "b/1.png": 0, "c/1.txt": b""}, "a class folder holds no images"),
    "a single image": ({"a/1.png": 0, "a/2.png": 0, "b/1.png": 0}, "a class needs two images at least"),
    "an empty train": (folders("val") | {"train/x.txt": b""}, "the train folder holds no images"),
    "no train": (folders("val", "test"), "there is no train folder"),
}


@pytest.mark.parametrize(("files", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(tree: Tree, files: dict[str, int | bytes | None], expected: str) -> None:
    assert expected in refusal(tree(files))


def test_no_such_place(tmp_path: Path) -> None:
    text = refusal(tmp_path / "nowhere")
    words = " ".join(text.split())
    assert (
        "no such data" in words
        and "digits, drawings, csv:, vtab:, parquet:, hf:, webdataset:, torchvision:, a" in words
    )
    hint = "relative paths start at the current folder"
    assert hint not in text and hint in refusal(Path("nowhere-at-all"))


def test_links_are_followed_once_and_never_round(tree: Tree) -> None:
    root, other = tree(folders("x", classes="ab"), "one") / "x", tree({"p/1.png": 1, "p/2.png": 2}, "two")
    (root / "a" / "loop").symlink_to(root)
    (root / "c").symlink_to(other / "p")
    data = opened(root)
    assert sorted(data.train.names + data.val.names) == sorted(
        f"{c}/{i}.png" for c, i in ["a0", "a1", "b0", "b1", "c1", "c2"]
    )


def test_names_that_are_no_text_can_be_hashed(tree: Tree) -> None:
    data = opened(tree({"a/\udce9.png": 1, "a/2.png": 2, "b/1.png": 1, "b/2.png": 1}))
    assert len(data.fingerprint()) == 64


def test_classes_without_images_to_evaluate_on(tree: Tree) -> None:
    """A table may have evaluation and test images of some classes alone; those of others cannot be judged by them."""
    rows = [f"{name}{i}.png,{name},train" for name in "abc" for i in range(2)]
    rows += ["v.png,a,val", "w.png,b,val", "t.png,a,test"]
    root = tree({row.split(",")[0]: number for number, row in enumerate(rows)})
    (root / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    assert open_data(str(root / "t.csv"), None, 0.5, only=["a", "b"]).test is not None
    data = open_data(str(root / "t.csv"), None, 0.5, only=["b", "c"])
    assert len(data.val) == 1 and data.test is None
    with pytest.raises(DataError, match="no images to evaluate on of these classes"):
        open_data(str(root / "t.csv"), None, 0.5, only=["c"], known_classes=["a", "c"])


def test_classes_are_named_in_any_unicode_form(tree: Callable[..., Path]) -> None:
    """A Mac writes é of a folder as e and an accent (NFD), a keyboard as one letter (NFC)."""
    folder, typed = "cafe\u0301", "caf\u00e9"
    root = tree({f"{name}/{i}.png": 10 * i for i in range(4) for name in (folder, "bar", "inn")})
    data = open_data(str(root), None, 0.5, only=[typed, "bar"])
    assert data.classes == ("bar", folder) and set(data.train.labels) == {0, 1}
    with pytest.raises(DataError, match="there are no such classes"):
        open_data(str(root), None, 0.5, only=["cafe", "bar"])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        # As datasets wrote until 2023, with a hash.
        (("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "test-00000-of-00001-b0f1.parquet"), ("train", "test")),
        (("train-000.tar.gz", "val-000.TAR.GZ"), ("train", "val")),
        # The hub's own conversions, and those of timm's organisation there.
        (("default/train/0000.parquet", "default/validation/0000.parquet"), ("train", "validation")),
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), ("train", "validation")),
        (("train-0.tar", "unsupervised-0.tar"), ("train", "unsupervised")),
        (("train-0.tar", "train_small-0.tar", "test-0.tar"), ("train", "train_small", "test")),
        (("train-test-0.tar", "birds-0.tar"), (None, None)),
    ],
)
def test_the_split_of_a_shard_is_in_its_name_or_its_folder(
    names: tuple[str, ...], splits: tuple[str | None, ...], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {shard.path: shard.split for shard in shards(str(tmp_path), (".tar", ".tar.gz", ".parquet"))}
    assert [found[tmp_path / name] for name in names] == list(splits)
