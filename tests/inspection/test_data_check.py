"""What is wrong with images is found, and named with what to do."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remap.errors import DataError, RecipeError, RunError, WeightsError
from remap.inspection import suggest
from remap.inspection.contact_sheet import write_contact_sheet
from remap.inspection.data_check import Report, check_data
from remap.inspection.near_duplicates import SIDE, dhash, near_pairs
from remap.inspection.suggest import init_recipe
from remap.recipe import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with one of everything that is wrong."""
    root, draws = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def picture(name: str, size: tuple[int, int] = (48, 40)) -> Image.Image:
        blocks = draws.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
        return image

    for split, count in (("train", 12), ("val", 3)):
        for index in range(count):
            picture(f"{split}/ant/{index}.png")
        picture(f"{split}/bee/0.png")
    seen = picture("train/bee/seen.png")
    brighter = seen.point(lambda value: min(255, value + 4)).resize((60, 50))
    brighter.save(root / "val/bee/again.jpg", quality=90)
    (root / "val/ant/copy.png").write_bytes((root / "train/ant/3.png").read_bytes())
    (root / "train/bee/wrong.png").write_bytes((root / "train/ant/4.png").read_bytes())
    (root / "train/ant/broken.png").write_bytes(b"text")
    (root / "train/ant/photo.gif").write_bytes(b"GIF89a")
    picture("train/ant/long.png", (200, 40))
    picture("train/ant/tiny.png", (20, 20))
    Image.new("RGB", (40, 40), "white").save(root / "train/ant/blank.png")
    Image.fromarray(draws.integers(0, 4096, (40, 40), dtype=np.uint16)).save(root / "train/ant/deep.png")
    return root


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return check_data(str(folder))[0]


EXPECTED = {
    ("broken", "bad"): "train/ant/broken.png (not an image)",
    ("left_out", "note"): "train/ant/photo.gif (.gif files are not read)",
    ("small", "note"): "train/ant/tiny.png (20 x 20)",
    ("shape", "note"): "train/ant/long.png (200 x 40)",
    ("flat", "note"): "train/ant/blank.png",
    ("range", "note"): "train/ant/deep.png (uint16)",
    ("few", "note"): "bee (3)",
}


@pytest.mark.parametrize(("kind", "severity"), EXPECTED)
def test_one_of_each_kind_is_named(report: Report, kind: str, severity: str) -> None:
    (finding,) = [one for one in report.findings if one.kind == kind]
    assert finding.files == (EXPECTED[kind, severity],) and finding.severity == severity and finding.do


def test_copies_across_splits_come_first(report: Report) -> None:
    copies = [one for one in report.findings if one.kind in ("copies", "near_copies")]
    assert [(one.kind, one.severity, one.files) for one in copies] == [
        ("copies", "bad", ("train/ant/3.png = val/ant/copy.png",)),
        ("copies", "bad", ("train/ant/4.png = train/bee/wrong.png",)),
        ("near_copies", "bad", ("train/bee/seen.png = val/bee/again.jpg",)),
    ]
    assert "different splits" in copies[0].what and "different labels" in copies[1].what
    assert [one.severity for one in report.findings] == sorted(one.severity for one in report.findings)
    assert report.counts == {"train": {"ant": 17, "bee": 3}, "val": {"ant": 4, "bee": 2}}


def test_the_contact_sheet_loads_nothing_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    found, data = check_data(str(folder))
    write_contact_sheet(tmp_path / "new" / "page.html", found, data)  # as other commands do, it makes the folder
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8 + 3 and "http" not in page and "<script" not in page
    assert "broken.png (not an image)" in page and "near copies" in page


def _arrays(root: Path, suffix: str, channels: int) -> Path:
    """Two classes of six pictures of 10 bits in 16, all of them different."""
    draws = np.random.default_rng(0)
    for index in range(12):
        blocks = draws.integers(0, 1024, (6, 6, channels)).astype(np.uint16).repeat(8, 0).repeat(8, 1)
        file = root / ("ant", "bee")[index % 2] / f"{index}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, blocks) if suffix == ".npy" else Image.fromarray(blocks[:, :, 0]).save(file)
    return root


def test_a_sliver_is_on_the_contact_sheet(tmp_path: Path) -> None:
    """Scaled to the sheet it would be a third of a pixel high."""
    sizes = {"train/a/1.png": (900, 2), "train/b/1.png": (2, 900), "val/a/1.png": (40, 40), "val/b/1.png": (40, 40)}
    for name, size in sizes.items():
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "x" / name)
    write_contact_sheet(tmp_path / "page.html", *check_data(str(tmp_path / "x")))
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2


@pytest.mark.parametrize(("suffix", "channels", "kinds"), [(".png", 1, []), (".npy", 5, ["channels"])])
def test_pictures_are_looked_at_as_a_run_sees_them(
    suffix: str, channels: int, kinds: list[str], tmp_path: Path
) -> None:
    """By the type, 10 bits in 16 are within 4 of 255 greys: of one colour, and alike. Five channels are not damage."""
    report, data = check_data(str(_arrays(tmp_path / "images", suffix, channels)))
    assert [one.kind for one in report.findings] == ["range", *kinds, "few"]
    assert report.value_range is not None and f"{report.value_range[1]:g} for white" in report.findings[0].what
    assert report.sizes["smallest"] == (48, 48)
    write_contact_sheet(tmp_path / "page.html", report, data)
    pictures = re.findall(r"base64,([^\"]+)", (tmp_path / "page.html").read_text())
    assert len(pictures) == 10
    assert all(np.ptp(np.asarray(Image.open(io.BytesIO(base64.b64decode(one))))) > 100 for one in pictures)


def test_no_recipe_is_suggested_for_what_its_models_cannot_read(tmp_path: Path) -> None:
    images = _arrays(tmp_path / "images", ".npy", 5)
    with pytest.raises(DataError, match=r"none of the images .* can be read\n.*5 channels; the model takes 3"):
        init_recipe(str(images), tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_hash_is_that_of_neighbours_in_nine_by_eight_pixels() -> None:
    """By hand: a picture of 9 x 8 pixels that rises in the first row and falls in all others."""
    greys = np.tile(np.arange(90, 0, -10, dtype=np.uint8), (8, 1))
    greys[0] = greys[0, ::-1]
    assert dhash(Image.fromarray(greys)) == 0xFF << 56


def test_all_near_pairs_are_found() -> None:
    """Expected: every pair compared with every other."""
    draws = np.random.default_rng(1)
    hashes = draws.integers(0, 2**63, 60, dtype=np.uint64)
    for index in range(30):  # 1 to 5 bits apart from another
        flips = sum(1 << int(bit) for bit in draws.choice(64, 1 + index % 5, replace=False))
        hashes[index + 30] = np.uint64(int(hashes[index]) ^ flips)
    expected = [
        (i, j) for i in range(60) for j in range(i + 1, 60) if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 3
    ]
    greys = np.tile(np.arange(SIDE**2).astype(np.uint8), (60, 1))
    assert sorted(near_pairs(hashes, greys)) == expected and len(expected) == 18
    assert sorted(near_pairs(np.repeat(hashes[:3], 2), greys[:6])) == [(0, 1), (2, 3), (4, 5)]
    assert list(near_pairs(hashes[:0], greys[:0])) == []


def test_greys_confirm_what_hashes_find() -> None:
    """Expected: numpy's correlation of each pair, all of whose hashes are 2 bits apart."""
    draws = np.random.default_rng(4)
    scenes = draws.integers(60, 190, (3, SIDE**2))
    noise = draws.random((12, SIDE**2)) * np.tile([0, 6, 10, 40], 3)[:, None]
    greys = (scenes.repeat(4, 0) + noise).astype(np.uint8)
    alike = np.corrcoef(greys) >= 0.995
    expected = [(i, j) for i in range(12) for j in range(i + 1, 12) if alike[i, j]]
    assert 3 < len(expected) < 18, "some pairs of a scene, none of two"
    assert sorted(near_pairs(np.uint64(1) << np.arange(12, dtype=np.uint64), greys)) == expected


def test_frames_of_one_scene_are_paired_with_the_first_one() -> None:
    """Of 20,000 frames all pairs are 200 million, which no memory holds."""
    greys = np.tile(np.arange(SIDE**2).astype(np.uint8), (20_000, 1))
    assert list(near_pairs(np.zeros(20_000, np.uint64), greys)) == [(0, other) for other in range(1, 20_000)]


def test_small_pictures_of_one_kind_are_not_copies() -> None:
    """The 1,797 digits: thousands of pairs have nearly equal hashes."""
    assert [one.kind for one in check_data("digits")[0].findings] == ["small"]


def test_many_images_that_share_a_band_are_not_compared_with_each_other() -> None:
    """50,000 hashes with 16 equal bits, and one pair: by all pairs of a band a billion comparisons."""
    hashes = np.random.default_rng(2).integers(0, 2**48, 50_000, dtype=np.uint64) << np.uint64(16)
    hashes[77] = hashes[40_000] ^ np.uint64(0b111 << 20)
    greys = np.tile(np.arange(SIDE**2).astype(np.uint8), (50_000, 1))
    assert list(near_pairs(hashes, greys)) == [(77, 40_000)]


def test_a_recipe_to_begin_with_is_read_as_it_stands(folder: Path, tmp_path: Path) -> None:
    recipe = init_recipe(str(folder), tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert recipe == load(tmp_path / "recipe.yaml") and recipe.data.source == str(folder.resolve())
    assert (
        recipe.teachers[0].model == "mini_teacher" and recipe.student.model == "mini_student"
    )  # pictures of 48 pixels
    assert "2 classes, 20 training and 6 evaluation images" in text and "ant (17), bee (3)" in text
    assert all("#" in line for line in text.splitlines() if ": " in line and "source" not in line)
    with pytest.raises(RunError, match="is there already"):
        init_recipe(str(folder), tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == text


@pytest.mark.parametrize(("least", "way"), [(suggest.LEAST_TO_JUDGE, "probe"), (3, "auto")])
def test_ways_to_prepare_a_teacher_are_tried_where_each_class_has_images_to_judge_by(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int, way: str
) -> None:
    """Three images of a bee: a fifth held out may be all of a class, which a run would refuse."""
    monkeypatch.setattr(suggest, "LEAST_TO_JUDGE", least)
    assert init_recipe(str(folder), tmp_path / "recipe.yaml").teachers[0].prepare == way


def test_a_recipe_states_the_level_of_the_classes(tmp_path: Path) -> None:
    for name in ("ant/red", "ant/wood", "bee/honey"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (40, 40), 10 * index).save(tmp_path / "images" / name / f"{index}.png")
    with pytest.raises(DataError, match=r"remap data check and init: --depth"):
        init_recipe(str(tmp_path / "images"), tmp_path / "recipe.yaml")
    recipe = init_recipe(str(tmp_path / "images"), tmp_path / "recipe.yaml", depth=2)
    assert recipe.data.depth == 2 and "3 classes" in (tmp_path / "recipe.yaml").read_text()


def test_a_recipe_is_written_where_a_run_finds_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without .yaml `--recipe digits` would be the shipped recipe; the shell leaves the ~ of --output=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(RecipeError, match=r"a recipe's file ends in \.yaml"):
        init_recipe(str(folder), tmp_path / "digits")
    assert init_recipe(str(folder), Path("~/mine.yml")) == load(tmp_path / "home" / "mine.yml")
    assert not (tmp_path / "digits").exists()


def test_models_that_cannot_be_had_are_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., Any]
) -> None:
    def away(model: str, weights: str) -> None:
        raise WeightsError("out of reach")

    monkeypatch.setattr(suggest, "require_at_hand", away)
    progress = watch(lambda step: None)
    init_recipe(str(folder), tmp_path / "small.yaml", progress=progress)
    assert progress.said == [], "small pictures are what the embedded pair is for"
    monkeypatch.setattr(suggest, "SMALL", 8)
    recipe = init_recipe(str(folder), tmp_path / "recipe.yaml", progress=progress)
    assert recipe.student.model == "mini_student"
    (said,) = progress.said
    assert "cannot be downloaded now" in said and "embedded pair" in said


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Eight images with any number of labels; the last two are copies with different ones."""
    draws = np.random.default_rng(3)
    labels = ["ant", "ant;bee", "bee", "ant;bee", "ant", "bee", "ant", "ant;bee"]
    rows = ["path,labels,split"]
    for index, text in enumerate(labels):
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{text},{'val' if index in (4, 5) else 'train'}")
    (tmp_path / "7.png").write_bytes((tmp_path / "6.png").read_bytes())
    (tmp_path / "sets.csv").write_text("\n".join(rows))
    return f"csv:{tmp_path}/sets.csv,separator=;"


def test_images_of_several_labels_count_for_each(table: str, tmp_path: Path) -> None:
    """By hand: to learn from ant, ant;bee, bee, ant;bee, ant, ant;bee; to evaluate on ant and bee."""
    found, data = check_data(table, task="multilabel")
    assert found.counts == {"train": {"ant": 5, "bee": 4}, "val": {"ant": 1, "bee": 1}}
    (copies,) = [one for one in found.findings if one.kind == "copies"]
    assert copies.files == ("train/6.png = train/7.png",) and "different labels" in copies.what
    write_contact_sheet(tmp_path / "page.html", found, data)
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg;base64,") == 5 + 4
    with pytest.raises(DataError, match=r"remap data check and init: --multilabel"):
        check_data(table)


def test_a_recipe_for_several_labels_states_the_task(table: str, tmp_path: Path) -> None:
    recipe = init_recipe(table, tmp_path / "new" / "recipe.yaml", task="multilabel")
    assert recipe.data.multilabel and "ant (5), bee (4)" in (tmp_path / "new" / "recipe.yaml").read_text()
