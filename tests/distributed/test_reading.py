"""What two processes read together is what one reads alone, and each of them reads a part."""

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

WORKER = Path(__file__).parent / "workers" / "reading.py"


def test_two_processes_read_each_a_part(tmp_path: Path, fork_command: Callable[..., Any]) -> None:
    """Expected values: what each process reads by itself, in the worker."""
    for number in range(3):
        path = tmp_path / "shards" / f"train-{number}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz" if number == 1 else "w") as tar:
            for index in range(3):
                image = BytesIO()
                Image.new("L", (8, 8), 30 * number + 10 * index).save(image, "PNG")
                broken = (number, index) == (2, 1)
                for kind, content in (("png", b"text" if broken else image.getvalue()), ("cls", b"%d" % (index % 2))):
                    member = tarfile.TarInfo(f"k\udcff{index}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    fork_command(str(WORKER), str(tmp_path / "shards"), count=2).end()
