"""The drawings that `clip:mini` learns from, and the held-out ones that ship as the data source `drawings`.

python tools/mini_drawings.py SETS        # writes remap/data/drawings/; SETS holds emoji.tar
"""

import csv
import fnmatch
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from remap.data.drawings import ACROSS, FOLDER, SIDE

CLASSES = Path(__file__).with_name("drawing_classes.txt")
HELD_OUT_VENDOR, OTHER_VENDOR = "noto", "fluent"


def classes_of(names: list[str]) -> dict[str, str]:
    """The class of each name that has one."""
    lines = [line.split(":") for line in CLASSES.read_text().splitlines() if not line.startswith("#")]
    patterns = [(kind, word.strip()) for kind, words in lines for word in words.split(",")]
    found = {}
    for name in names:
        kinds = [kind for kind, pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        if kinds:
            found[name] = kinds[0]
    return found


def splits_of(classes: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names to learn from and held-out names, with their class: by a hash's order a third, at most 16, is held out."""
    train: dict[str, str] = {}
    test: dict[str, str] = {}
    for kind in sorted(set(classes.values())):
        names = [name for name in classes if classes[name] == kind]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        held = min(len(names) // 3, 16)
        test |= dict.fromkeys(names[:held], kind)
        train |= dict.fromkeys(names[held : held + 24], kind)
    return train, test


def read_rows(tar: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """The captions and the encoded images of an archive."""
    with tarfile.open(tar) as archive:
        files = {member.name.removeprefix("./"): archive.extractfile(member) for member in archive if member.isfile()}
        content = {name: file.read() for name, file in files.items() if file is not None}
    return list(csv.DictReader(io.StringIO(content["captions.csv"].decode()))), content


def pixels(encoded: bytes, size: int) -> np.ndarray:
    """RGB of an image, uint8 (size, size, 3)."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def main() -> None:
    rows, content = read_rows(Path(sys.argv[1], "emoji.tar"))
    train, test = splits_of(classes_of([row["caption"] for row in rows]))
    listed = []
    for split, names, vendor in (
        ("train", train, HELD_OUT_VENDOR),
        ("test", test, HELD_OUT_VENDOR),
        ("fluent", test, OTHER_VENDOR),
    ):
        listed += [
            (row["path"], split, names[row["caption"]])
            for row in rows
            if row["vendor"] == vendor and row["caption"] in names
        ]
    sheet = np.full((-(-len(listed) // ACROSS) * SIDE, ACROSS * SIDE, 3), 255, np.uint8)
    for index, (path, _, _) in enumerate(listed):
        top, left = SIDE * (index // ACROSS), SIDE * (index % ACROSS)
        # 32 levels of each colour: half as large, and hardly to be seen.
        sheet[top : top + SIDE, left : left + SIDE] = np.rint(
            np.rint(pixels(content[path], SIDE) * (31 / 255)) * (255 / 31)
        )
    FOLDER.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(FOLDER / "drawings.webp", lossless=True, quality=100, method=4)
    table = [[Path(path).stem, split, kind] for path, split, kind in listed]
    (FOLDER / "drawings.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")


if __name__ == "__main__":
    main()
