"""Images without labels: where they come from, which labels are kept, and what the student then learns from."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from remap.data import views as views_module
from remap.data.composed_sources import JoinedSource
from remap.data.images import decode, decode_channels
from remap.data.sources import open_data, open_unlabeled
from remap.data.splits import Split
from remap.data.stratify import stratified
from remap.data.views import View, ViewSource
from remap.errors import DataError
from remap.pipeline.data_views import DataViews
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.recipe.schema import DataSpec

Tree = Callable[..., Path]
VIEW = View(4, 1.0, "bicubic")
LABELED: dict[str, int | bytes] = {f"{s}/{c}/{i}.png": 10 * i for s in ("train", "val") for c in "ab" for i in range(4)}
LOOSE: dict[str, int | bytes] = {"z.png": 101, "a/1.png": 102, "train/deep/er/2.PNG": 103, "val/b/3.png": 104}


def opened(root: Path, bench: SharedResources | None = None, **options: object) -> DataViews:
    spec = DataSpec(source=str(root), workers=2, **options)
    return (bench or SharedResources()).open(spec, VIEW, Silent())


def greys(source: ViewSource) -> list[int]:
    return source.batch(range(len(source.split)))[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_any_folders_are_walked_and_mean_nothing(tree: Tree, tar: Tree, kind: str) -> None:
    files = LOOSE | {"notes.txt": b"", ".hidden/1.png": 1, "a/._1.png": b"", "__MACOSX/2.png": 2}
    root = tree(files, "loose") if kind == "folder" else tar(files, "loose.tar")
    split, skipped = open_unlabeled(str(root))
    assert sorted(split.names) == sorted(f"{root.name}/{name}" for name in LOOSE)
    assert split.labels.tolist() == [-1] * 4 and split.labels.dtype == np.int64
    for name, index in zip(split.names, range(4), strict=True):
        assert decode(split.read(index)).getpixel((0, 0))[0] == LOOSE[name.removeprefix(f"{root.name}/")]
    assert dict(skipped) == {
        f"{root.name}/notes.txt": ".txt files are not read",
        f"{root.name}/.hidden/1.png": "in .hidden",
        f"{root.name}/__MACOSX/2.png": "in __MACOSX",
        f"{root.name}/a/._1.png": "hidden or made by the system",
    }


def test_no_images_and_no_place_are_refused(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images to learn from without labels"):
        open_unlabeled(str(tree({"a/notes.txt": b"", ".x.png": 0})))
    with pytest.raises(DataError, match="no such data") as caught:
        open_unlabeled(str(tmp_path / "nowhere"))
    assert "a tar or zip of one" in " ".join(str(caught.value).split())


def test_a_folder_that_holds_the_labelled_images_is_refused(tree: Tree) -> None:
    """Its evaluation images would be learned from; its training folder alone, or one beside it, would not."""
    root, other = tree(LABELED, "one"), tree(LOOSE, "two")
    for outer in (root, root.parent, root / "train" / ".."):
        with pytest.raises(DataError, match="holds the labelled ones"):
            open_data(str(root), None, 0.2, str(outer))
    with pytest.raises(DataError, match="holds the labelled ones"):
        open_data(str(root), str(other), 0.2, str(other))
    for inner, source, val in ((root / "val", root, None), (other / "val", root, other)):
        with pytest.raises(DataError, match="holds images to evaluate on"):
            open_data(str(source), val and str(val), 0.2, str(inner))
    assert len(open_data(str(root), None, 0.2, str(root / "train")).unlabeled) == 8
    assert len(open_data(str(root), None, 0.2, str(other)).unlabeled) == 4
    train, val = root / "train", root / "val"
    assert len(open_data(str(train), str(val), 0.2, str(train)).unlabeled) == 8, "they have a folder of their own"


def test_a_folder_around_the_labelled_images_hides_none(tree: Tree, tmp_path: Path) -> None:
    """Names of labelled images begin inside of it."""
    root = tree({f"photos/{name}": content for name, content in LABELED.items()}, "one")
    inside, other = root / "photos", str(tree(LOOSE, "two"))
    with pytest.raises(DataError, match="holds the labelled ones"):
        open_data(str(root), None, 0.2, str(inside))
    table = tmp_path / "list.csv"
    table.write_text("".join(f"{path.relative_to(tmp_path)},a\n" for path in sorted((inside / "val").rglob("*.png"))))
    for unlabeled in (str(inside / "val"), f"csv:{table}"):
        with pytest.raises(DataError, match="holds images to evaluate on"):
            open_data(str(root), None, 0.2, unlabeled)
    assert len(open_data(str(root), None, 0.2, str(inside / "train")).unlabeled) == 8
    assert len(open_data(str(root), None, 0.2, other).unlabeled) == 4


@pytest.mark.parametrize(
    ("counts", "kept", "expected"),
    [
        ([60, 30, 10], 10, [6, 3, 1]),
        ([60, 30, 10], 20, [12, 6, 2]),
        ([96, 2, 2], 3, [1, 1, 1]),
        ([96, 2, 2], 10, [8, 1, 1]),
        ([5, 1, 1], 6, [4, 1, 1]),
        ([3, 3, 1], 7, [3, 3, 1]),
    ],
)
def test_labels_are_kept_in_proportion(counts: list[int], kept: int, expected: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    chosen, rest = stratified(labels, kept)
    assert np.bincount(labels[chosen]).tolist() == expected
    assert sorted([*chosen, *rest]) == list(range(len(labels)))


def test_every_class_keeps_a_label_whatever_the_counts() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        counts = random.integers(1, 12, random.integers(2, 30))
        labels = np.repeat(np.arange(len(counts)), counts)
        for kept in {len(counts), len(labels) - 1, len(labels), int(random.integers(len(counts), len(labels) + 1))}:
            if kept >= len(counts):
                found = np.bincount(labels[stratified(labels, kept)[0]], minlength=len(counts))
                assert found.min() >= 1 and found.sum() == kept and (found <= counts).all()


def test_few_labels_of_the_digits() -> None:
    """The other training images stay, without labels; evaluation is the same; any seed keeps the same labels."""
    whole, few = open_data("digits", None, 0.5), open_data("digits", None, 0.2, labels=100)
    assert (len(few.train), len(few.unlabeled), few.val.names) == (100, 900, whole.val.names)
    assert sorted(few.train.names + few.unlabeled.names) == sorted(whole.train.names)
    label_of = dict(zip(whole.train.names, whole.train.labels.tolist(), strict=True))
    assert few.train.labels.tolist() == [label_of[name] for name in few.train.names]
    share = np.bincount(whole.train.labels) / 10
    assert np.abs(np.bincount(few.train.labels) - share).max() < 1 and set(few.unlabeled.labels.tolist()) == {-1}
    assert few.fingerprint() == open_data("digits", None, 0.2, labels=100).fingerprint() != whole.fingerprint()
    assert "labels of 100 of 1000 training images" in few.split_rule
    assert decode(few.unlabeled.read(7)) == decode(whole.train.read(whole.train.names.index(few.unlabeled.names[7])))


@pytest.mark.parametrize(("labels", "fits"), [(9, False), (10, True), (1000, True), (1001, False)])
def test_labels_are_at_least_the_classes_and_at_most_the_images(labels: int, fits: bool) -> None:
    if fits:
        data = open_data("digits", None, 0.2, labels=labels)
        assert len(data.train) == labels and (data.unlabeled is None) == (labels == 1000)
        return
    with pytest.raises(DataError) as caught:
        open_data("digits", None, 0.2, labels=labels)
    assert f"data.labels={labels}" in str(caught.value) and "10 (classes) to 1000" in str(caught.value)


def test_the_fingerprint_knows_the_images_without_labels(tree: Tree) -> None:
    root, one = tree(LABELED), tree(LOOSE, "loose")
    prints = [open_data(str(root), None, 0.2, source).fingerprint() for source in (None, str(one))]
    (one / "more.png").write_bytes((one / "z.png").read_bytes())
    prints.append(open_data(str(root), None, 0.2, str(one)).fingerprint())
    assert len(set(prints)) == 3


def test_without_anything_else_the_lessons_are_the_labelled_images(tree: Tree) -> None:
    views = opened(tree(LABELED))
    assert views.training_source is views.train and views.unlabeled is None and views.labeled_share == 1.0


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_lessons_are_the_labelled_images_and_then_the_others(tree: Tree, memory_gib: float) -> None:
    root, loose = tree(LABELED), tree(LOOSE, "loose")
    views = opened(root, unlabeled=str(loose), memory_gib=memory_gib)
    assert views.training_source.split.labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    assert greys(views.training_source) == [0, 10, 20, 30, 0, 10, 20, 30, 102, 103, 104, 101]
    assert views.labeled_share == 8 / 12 and greys(views.train) == greys(views.training_source)[:8]
    assert views.digest() != opened(root).digest()
    only = opened(root, unlabeled=str(loose), unlabeled_only=True, memory_gib=memory_gib)
    assert (
        only.training_source is only.unlabeled
        and only.labeled_share == 0.0
        and greys(only.training_source) == [102, 103, 104, 101]
    )
    assert greys(only.train) == greys(views.train), "a teacher's head is still fitted on the labelled ones"


def test_few_labels_and_a_folder_go_together(tree: Tree) -> None:
    views = opened(tree(LABELED), labels=3, unlabeled=str(tree(LOOSE, "loose")))
    assert (len(views.train.split), len(views.unlabeled.split), len(views.training_source.split)) == (3, 9, 12)
    assert views.labeled_share == 3 / 12
    assert sorted(greys(views.training_source)) == sorted([0, 10, 20, 30] * 2 + [101, 102, 103, 104])


def test_only_images_without_labels_need_some(tree: Tree) -> None:
    with pytest.raises(DataError, match="no image without a label to learn from"):
        opened(tree(LABELED), labels=8, unlabeled_only=True)


def test_each_choice_is_its_own_answer(tree: Tree) -> None:
    root, bench, loose = tree(LABELED), SharedResources(), str(tree(LOOSE, "loose"))
    kinds = [{}, {"labels": 2}, {"labels": 3}, {"unlabeled": loose}, {"unlabeled": loose, "unlabeled_only": True}]
    found = [opened(root, bench, **kind) for kind in kinds]
    assert len({id(views) for views in found}) == 5
    assert all(opened(root, bench, **kind) is views for kind, views in zip(kinds, found, strict=True))


def test_nothing_is_decoded_twice(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 training, 8 evaluation and 4 more images are 20 readings, however they are looked at afterwards."""
    calls: list[int] = []
    monkeypatch.setattr(
        views_module, "decode_channels", lambda content, how: calls.append(1) or decode_channels(content, how)
    )
    views = opened(tree(LABELED), unlabeled=str(tree(LOOSE, "loose")))
    assert len(calls) == 20
    for source in (views.train, views.training_source, views.unlabeled):
        greys(source)
    assert len(calls) == 20 and views.training_source.cached_bytes == 12 * 3 * 16


def test_the_memory_budget_serves_the_labelled_images_first(tree: Tree) -> None:
    """An image takes 48 bytes: 8 fit, the 4 others do not any more; then the 4, and no evaluation images."""
    root, loose = tree(LABELED), str(tree(LOOSE, "loose"))
    for room, expected in ((8 * 48, (384, 0, 0)), (12 * 48, (384, 192, 0)), (20 * 48, (384, 192, 384))):
        views = opened(root, unlabeled=loose, memory_gib=room / 2**30)
        assert (views.train.cached_bytes, views.unlabeled.cached_bytes, views.val.cached_bytes) == expected
        assert views.training_source.cached_bytes == sum(expected[:2])
        assert greys(views.training_source)[8:] == [102, 103, 104, 101]


def test_unreadable_ones_are_counted_named_and_left_out(tree: Tree) -> None:
    root, loose = tree(LABELED), tree(LOOSE | {"bad.png": b"x"}, "loose")
    views = opened(root, unlabeled=str(loose), max_bad=0.2)
    assert views.skipped == (("loose/bad.png", "not an image"),) and len(views.training_source.split) == 12
    with pytest.raises(DataError, match="1 of 5 images without labels cannot be read"):
        opened(root, unlabeled=str(loose), max_bad=0.19)
    late = opened(root, unlabeled=str(loose), max_bad=0.19, memory_gib=0.0)
    late.require_few_bad(0.19)
    assert late.digest() != views.digest()
    _, good = late.training_source.batch(range(13))
    assert len(good) == 12 and late.training_source.bad_names() == [("loose/bad.png", "not an image")]
    with pytest.raises(DataError, match="1 of 5 images without labels cannot be read"):
        late.require_few_bad(0.19)


def test_what_lessons_find_unreadable_counts_for_the_labelled_ones(tree: Tree) -> None:
    root = tree(LABELED | {"train/a/1.png": b"x"})
    views = opened(root, unlabeled=str(tree(LOOSE, "loose")), memory_gib=0.0)
    views.training_source.batch(range(12))
    with pytest.raises(DataError, match="1 of 8 training images cannot be read"):
        views.require_few_bad(0.1)


@pytest.mark.parametrize("memory", [1e9, 0.0])
def test_two_joined_sources_are_one_source_of_both(
    noise: Callable[..., ViewSource], memory: float, tmp_path: Path
) -> None:
    first, second = noise(5, bad=(3,), memory=memory), noise(7, bad=(0, 6), memory=memory, seed=1)
    joined = JoinedSource(first, second)
    one = ViewSource(first.split.joined(second.split), first.view, memory_bytes=memory, workers=2)
    for source in (joined, one):
        source.load(Silent(), "images")
    everything = list(range(12))
    for indices in (everything, everything[::-1], [9, 0, 9, 3, 5, 1], [4, 2], [6, 11], [5], [3], [], [3, 5]):
        (left, good_left), (right, good_right) = joined.batch(indices), one.batch(indices)
        assert good_left.tolist() == good_right.tolist() == [i for i in indices if i not in (3, 5, 11)]
        assert torch.equal(left, right) and left.dtype == torch.uint8 and good_left.dtype == np.int64
    assert joined.bad == one.bad and joined.bad_names() == one.bad_names()
    assert (joined.nbytes, joined.cached_bytes) == (one.nbytes, one.cached_bytes)
    left, right = joined.without_bad(), one.without_bad()
    assert left.split.names == right.split.names and left.split.labels.tolist() == right.split.labels.tolist()
    assert torch.equal(left.batch(range(9))[0], right.batch(range(9))[0]) and left.without_bad() is left
    assert joined.digests([11, 0, 4, 5]) == one.digests([11, 0, 4, 5])


def test_digests_are_those_of_the_files(tree: Tree) -> None:
    """BLAKE2b of each file's bytes by hashlib; a file that is gone has one of its own, and nothing is read twice."""
    root = tree({"a.png": 1, "b.png": 2, "c.png": b"no image", "d.png": 1, "gone.png": 3, "also.png": 3})
    names, read = ("a.png", "b.png", "c.png", "d.png", "gone.png", "also.png"), []
    split = Split(names, np.zeros(6, dtype=np.int64), lambda i: read.append(i) or (root / names[i]).read_bytes())
    for name in names[4:]:
        (root / name).unlink()
    source = ViewSource(split, VIEW, memory_bytes=0, workers=2)
    expected = [hashlib.blake2b((root / name).read_bytes(), digest_size=16).digest() for name in names[:4]]
    assert source.digests([2, 0, 2]) == [expected[2], expected[0], expected[2]]
    found = source.digests(np.arange(6))
    assert found[:4] == expected and found[0] == found[3] and len(set(found)) == 5
    assert sorted(read) == list(range(6)) and source.bad == {} and source.digests([]) == []
