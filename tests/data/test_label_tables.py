"""Labels in a CSV or TSV: which files and columns it means, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from remap.data import CLASSES, MULTILABEL
from remap.data.image_files import counted
from remap.data.images import decode
from remap.data.rows import labels_of
from remap.data.sources import open_data, open_unlabeled, read_all
from remap.data.splits import Split
from remap.errors import DataError

Tree = Callable[..., Path]
# The grey of an image is 10 times its number; odd ones are bees.
IMAGES: dict[str, int | bytes | None] = {f"images/{i}.png": 10 * i for i in range(8)}
LABELS = [(f"images/{i}.png", "bee" if i % 2 else "ant") for i in range(8)]


def table(root: Path, text: str, name: str = "labels.csv") -> str:
    (root / name).write_bytes(text.encode())
    return str(root / name)


def rows(header: str, separator: str = ",", prefix: str = "images/", suffix: str = ".png", end: str = "\n") -> str:
    lines = [(path.replace("images/", prefix).replace(".png", suffix), label) for path, label in LABELS]
    return end.join([header] * bool(header) + [separator.join(line) for line in lines]) + end


def pairs(*splits: Split) -> set[tuple[int, int]]:
    return {(decode(s.read(i)).getpixel((0, 0))[0], int(s.labels[i])) for s in splits for i in range(len(s))}


WRITTEN = {
    "comma": rows("file,label"),
    "semicolon and Windows line ends": rows("filename;class", ";", end="\r\n"),
    "tab, and a mark of the byte order": "\ufeff" + rows("Image\tCategory", "\t"),
    "no header": rows(""),
    "names without folder": rows("path,label", prefix=""),
    "names without folder and suffix, as Kaggle's": rows("id,label", prefix="", suffix=""),
    "backslashes": rows("file,label", prefix="images\\"),
    "from the current folder, as find writes": rows("file,label", prefix="./images/"),
    "from the current folder, with backslashes": rows("file,label", prefix=".\\images\\\\"),
    "more columns, quoted": "n,label,file\n"
    + "".join(f'{i},"{label}","{path}"\n' for i, (path, label) in enumerate(LABELS)),
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=list(WRITTEN))
def test_tables_as_people_write_them(tree: Tree, text: str) -> None:
    """Eight images, a quarter held out; the labels are those of the numbers."""
    word = table(tree(IMAGES), text)
    data = open_data(word, None, 0.25)
    assert (data.classes, len(data.train), len(data.val)) == (("ant", "bee"), 6, 2)
    assert pairs(data.train, data.val) == {(10 * i, i % 2) for i in range(8)}
    assert pairs(read_all(word, ("ant", "bee"))[0]) == pairs(data.train, data.val)


@pytest.mark.parametrize("prefix", ["caf\u00e9/\u00e9", "\u00e9"], ids=["with its folder", "the name alone"])
def test_names_of_files_may_be_of_another_unicode_form(tree: Tree, prefix: str) -> None:
    """A Mac writes é of a file as e and an accent (NFD), the table has it as one letter (NFC)."""
    root = tree({f"cafe\u0301/e\u0301{i}.png": 10 * i for i in range(8)})
    word = table(root, "file,label\n" + "".join(f"{prefix}{i}.png,{'ab'[i % 2]}\n" for i in range(8)))
    data = open_data(word, None, 0.25)
    assert pairs(data.train, data.val) == {(10 * i, i % 2) for i in range(8)}


@pytest.mark.parametrize("task", [CLASSES, MULTILABEL])
def test_a_file_that_a_table_repeats_counts_once(tree: Tree, task: str) -> None:
    """Under whichever of its names; in two splits it is in both, which is said by its content."""
    lines = [f"{path},{label},{'train' if n < 6 else 'val'}" for n, (path, label) in enumerate(LABELS)]
    again = ["images/1.png,bee,train", "1.png,bee,train", "images/7.png,bee,val", "images/0.png,ant,val"]
    word = table(tree(IMAGES), "\n".join(["file,label,split", *lines, *again]))
    data = open_data(f"csv:{word},separator=;", None, 0.25, task=task)
    assert (len(data.train), len(data.val)) == (6, 3)
    assert counted(data.skipped) == "3 (in a row above already)"


def test_a_tsv_has_tabs_and_labels_may_hold_commas(tree: Tree) -> None:
    text = "".join(f"images/{i}.png\t{'bee, small' if i % 2 else 'ant, red'}\n" for i in range(8))
    data = open_data(table(tree(IMAGES), text, "labels.tsv"), None, 0.25)
    assert data.classes == ("ant, red", "bee, small") and (len(data.train), len(data.val)) == (6, 2)


def test_spaces_around_a_split_do_not_count(tree: Tree) -> None:
    lines = [f"{path}, {label}, {'val' if i > 5 else 'train'}" for i, (path, label) in enumerate(LABELS)]
    word = table(tree(IMAGES), "\n".join(["file,label,split", *lines]))
    assert len(open_data(f"csv:{word},split=train", None, 0.5).everything) == 6


def test_class_folders_of_a_level_are_evaluated_on_a_table(tree: Tree) -> None:
    """The level is that of the folders; a table has none."""
    root = tree({f"deep/{name}/{i}.png": i for name in ("x/ant", "y/bee") for i in range(4)} | IMAGES)
    text = "".join(f"{path},{'y/bee' if label == 'bee' else 'x/ant'}\n" for path, label in LABELS)
    word = table(root, f"file,label\n{text}")
    data = open_data(str(root / "deep"), word, 0.5, depth=2)
    assert data.classes == ("x/ant", "y/bee") and (len(data.train), len(data.val)) == (8, 8)
    assert len(read_all(word, data.classes, 2)[0]) == 8


def test_a_column_of_splits_and_a_second_table(tree: Tree) -> None:
    root = tree(IMAGES)
    lines = [
        f"{path},{label},{split}"
        for (path, label), split in zip(LABELS, ["train"] * 4 + ["valid"] * 2 + ["test", "-"], strict=True)
    ]
    data = open_data(
        table(
            root,
            "\n".join(["file,label,split", *lines, "", "images/0.gif,ant,train", "images/1.png,,train", ",ant,train"]),
        ),
        None,
        0.2,
    )
    assert pairs(data.train) == {(0, 0), (10, 1), (20, 0), (30, 1)} and pairs(data.val) == {(40, 0), (50, 1)}
    assert data.test is not None and pairs(data.test) == {(60, 0)}
    assert (
        counted(data.skipped)
        == "1 (in no split), 1 (.gif files are not read), 1 (without a label), 1 (no file is named)"
    )
    one, two = table(root, rows("file,label"), "one.csv"), table(root, "file\tlabel\nimages/7.png\tbee\n", "two.tsv")
    assert pairs(open_data(one, two, 0.2).val) == {(70, 1)}


REFUSED = {
    "unknown columns": ("a,b,c\n1,2,3\n", "the columns of the table are not known\n  given:   {0}: a, b, c"),
    "no labels": ("file,age\nimages/1.png,3\nimages/2.png,3\n", "the columns of the table are not known"),
    "empty": ("", "the columns of the table are not known"),
    "only a header": ("file,label\n", "there are no labelled images to learn from"),
    "ragged": ("file,label\nimages/1.png,a,b\n", "line 2 of {0} has 3 cells, not 2"),
    "two labels": ("file,label\nimages/1.png,a\nimages/1.png,b\n", "a file has two labels"),
    "above": ("file,label\n../x.png,a\nimages/1.png,b\n", "leads out of the table's folder"),
    "several labels": ("file,labels\nimages/1.png,a;b\n", "a column of several labels needs a separator"),
    "absolute": ("file,label\n/etc/x.png,a\nimages/1.png,b\n", "leads out of the table's folder"),
    "one class": ("file,label\nimages/1.png,a\nimages/2.png,a\n", "at least two classes are needed"),
    "stray quotes": ('file,label\n"images/1.png"x,a\n', "cannot read {0}"),
    "control characters": ("file,label\nimages/1.png,a\x1b[2J\nimages/2.png,b\n", "a class name has"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=list(REFUSED))
def test_tables_that_are_refused(tree: Tree, text: str, expected: str) -> None:
    word = table(tree(IMAGES), text)
    with pytest.raises(DataError) as caught:
        open_data(word, None, 0.25)
    assert expected.format(word) in str(caught.value)


def test_a_file_that_is_missing_is_an_unreadable_image(tree: Tree) -> None:
    word = table(tree(IMAGES), rows("file,label") + "gone.png,ant\n")
    data = open_data(word, None, 0.25)
    (index,) = [i for i, name in enumerate(data.train.names + data.val.names) if name == "gone.png"]
    with pytest.raises(OSError):
        data.train.joined(data.val).read(index)


def test_tables_are_utf_8_and_have_no_levels(tree: Tree) -> None:
    root = tree(IMAGES)
    (root / "utf16.csv").write_bytes(rows("file,label").encode("utf-16"))
    with pytest.raises(DataError, match="a CSV or TSV in UTF-8"):
        open_data(str(root / "utf16.csv"), None, 0.25)
    for word in (table(root, rows("file,label")), "digits"):
        with pytest.raises(DataError, match="data.depth is for folders"):
            open_data(word, None, 0.25, depth=2)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("labels.csv", "if labels.csv holds the labels, name it: --data {0}/labels.csv"),
        ("train.tsv", "if train.tsv holds the labels, name it: --data {0}/train.tsv"),
        ("metadata.jsonl", "if metadata.jsonl holds the labels, convert it to a CSV and name that"),
        ("x.parquet", "if these are Parquet files of images, write parquet: before it: --data parquet:{0}"),
        ("a.tar", "if these are WebDataset shards, write webdataset: before it: --data webdataset:{0}"),
    ],
)
@pytest.mark.parametrize("folder", ["images/", ""])
def test_a_folder_of_images_beside_a_table_says_what_to_do(tree: Tree, name: str, advice: str, folder: str) -> None:
    root = tree({f"{folder}{i}.png": i for i in range(4)} | {name: b""})
    with pytest.raises(DataError) as caught:
        open_data(str(root), None, 0.25)
    assert advice.format(root) in str(caught.value)


def test_images_of_a_table_are_not_learned_from_without_labels(tree: Tree) -> None:
    root = tree(IMAGES | {"other/1.png": 3})
    word = table(root, rows("file,label"))
    for folder, expected in ((root, "holds the labelled ones"), (root / "images", "holds images to evaluate on")):
        with pytest.raises(DataError, match=expected):
            open_data(word, None, 0.25, str(folder))
    assert len(open_data(word, None, 0.25, str(root / "other")).unlabeled or ()) == 1


def test_the_columns_and_the_folder_may_be_named(tree: Tree, tmp_path: Path) -> None:
    """A table elsewhere, with paths from the images' folder, absolute ones in it, and a usual name not meant."""
    root = tree(IMAGES)
    (tmp_path / "lists").mkdir()
    cells = [(f"{root}/{path}" if i % 3 else path, label) for i, (path, label) in enumerate(LABELS)]
    lines = [f"x,{path},{label},{'test' if i > 5 else 'train'}" for i, (path, label) in enumerate(cells)]
    word = table(tmp_path / "lists", "\n".join(["label,where,kind,part", *lines]))
    options = f",path=where,label=Kind,folder={root}"
    data = open_data(f"csv:{word}{options}", None, 0.25)
    assert pairs(data.train, data.val) == {(10 * i, i % 2) for i in range(8)} and data.classes == ("ant", "bee")
    data = open_data(f"csv:{word}{options},split_column=part", None, 0.25)
    assert pairs(data.val) == {(60, 0), (70, 1)} and len(data.train) == 6
    data = open_data(f"csv:{word}{options},split_column=part,split=train", None, 0.34)
    assert (len(data.train), len(data.val)) == (4, 2)
    for wrong, expected in (
        (",lable=kind", "the source 'csv' has no option 'lable'; did you mean 'label'?"),
        (",path=where,label=none", "allowed: a column of labels: none"),
        (f"{options},split_column=part,split=extra", "no such split"),
        (options.partition(",folder")[0], "leads out of the table's folder"),
    ):
        with pytest.raises(DataError, match=expected.replace("?", r"\?")):
            open_data(f"csv:{word}{wrong}", None, 0.25)


def test_several_labels_are_parsed_and_refused(tree: Tree) -> None:
    """One label each is read; two in a cell are not learned."""
    assert labels_of(" a ; b;;", ";") == ("a", "b") and labels_of("a;b", None) == ("a;b",) and labels_of(" ", ";") == ()
    root = tree(IMAGES)
    word = table(root, rows("file,labels"))
    data = open_data(f"csv:{word},separator=;", None, 0.25)
    assert pairs(data.train, data.val) == {(10 * i, i % 2) for i in range(8)}
    word = table(root, "file,tags\nimages/0.png,ant\nimages/1.png,ant bee\n")
    with pytest.raises(DataError, match=r"several labels; one is learned\n  given:   images/1.png: ant, bee"):
        open_data(f"csv:{word},separator= ", None, 0.25)


def test_lists_without_header_are_read_by_their_last_word(tree: Tree) -> None:
    root = tree({f"my images/{i}.png": 10 * i for i in range(8)})
    word = table(root, "".join(f"my images/{i}.png {i % 2}\n" for i in range(8)), "train.txt")
    data = open_data(word, None, 0.25)
    assert data.classes == ("0", "1") and pairs(data.train, data.val) == {(10 * i, i % 2) for i in range(8)}


def test_images_of_a_table_are_used_without_labels_too(tree: Tree) -> None:
    root = tree(IMAGES)
    word = table(root, "file\n" + "".join(f"images/{i}.png\n" for i in (3, 1, 3)))
    split, _ = open_unlabeled(word)
    assert split.names == ("labels.csv/images/3.png", "labels.csv/images/1.png") and set(split.labels) == {-1}
    assert split.read(0) == (root / "images/3.png").read_bytes()


def test_a_missing_file_is_not_another_of_its_name(tree: Tree) -> None:
    """train/1.jpg is not there, and test/1.jpg is another picture."""
    root = tree({f"train/{i}.png": i for i in range(2, 8)} | {"test/1.png": 1})
    lines = ["file,label", *(f"train/{i}.png,{'ab'[i % 2]}" for i in range(1, 8))]
    data = open_data(table(root, "\n".join(lines)), None, 0.25)
    names = {*data.train.names, *data.val.names}
    assert "train/1.png" in names and not any(name.startswith("test/") for name in names)


def test_a_name_of_several_files_is_said_and_its_folder_tells_them_apart(tree: Tree) -> None:
    """As of CIFAR-10 at Kaggle: train/1.png and test/1.png, and a table of the ids of the training images."""
    root = tree({f"{part}/{i}.png": i + at for part, at in (("all/train", 0), ("all/test", 100)) for i in range(4)})
    ids = "id,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(4))
    for text in (ids, ids.replace(",a", ".png,a")):
        with pytest.raises(DataError, match=r"fits several files\n.*: all/test/\d.png, all/train/\d.png\n.*folder="):
            open_data(table(root, text), None, 0.5)
    named = "file,label\n" + "".join(f"train/{i}.png,{'ab'[i % 2]}\n" for i in range(4))
    for word in (f"csv:{table(root, ids)},folder={root}/all/train", table(root, named, "named.csv")):
        data = open_data(word, None, 0.5)
        assert pairs(data.train, data.val) == {(i, i % 2) for i in range(4)}


def test_a_table_without_labels_may_not_list_images_to_evaluate_on(tree: Tree) -> None:
    root = tree(IMAGES | {"other/1.png": 3})
    word = table(root, rows("file,label"))
    val = open_data(word, None, 0.25).val.names[0]
    for listed in ([val], ["other/1.png", val]):
        (root / "more.csv").write_text("\n".join(["file", *listed]))
        with pytest.raises(DataError, match="holds images to evaluate on"):
            open_data(word, None, 0.25, f"csv:{root / 'more.csv'}")
    (root / "more.csv").write_text("file\nother/1.png")
    assert len(open_data(word, None, 0.25, f"csv:{root / 'more.csv'}").unlabeled or ()) == 1


def test_an_option_without_a_value_is_refused(tree: Tree) -> None:
    word = table(tree(IMAGES), rows("file,label"))
    with pytest.raises(DataError, match="the option 'separator' has no value"):
        open_data(f"csv:{word.removeprefix('csv:')},separator=", None, 0.25)
