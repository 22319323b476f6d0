"""A file of predictions that is written while they are made, survives a kill, and is complete once it has its name.

Each process appends whole rows to a part in FILE.parts; at the end the parts are merged into FILE. A killed command
continues from its parts when it is given again: a row that was cut off is dropped, images with rows are skipped. A part
is compared with the images even when it was finished, since what failed may have been the merging.
"""

import fcntl
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from remap.errors import DiskFull, RunError, naming
from remap.io import atomic_write
from remap.io.checked_json import parse_json, read_run_json
from remap.io.disk_space import FULL, MAKE_ROOM
from remap.io.names import plain
from remap.prediction.formats import require_writable, write_rows
from remap.prediction.inputs import Inputs, Item
from remap.prediction.predictions import Prediction

LOOK_EVERY_S = 0.2
SETTINGS = "settings.json"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a command that continues another one has otherwise."""
    for name in sorted({*before, *now}):
        first, second = ("not given" if one.get(name) is None else one[name] for one in (before, now))
        if first != second and name == "tasks":
            yield "another run than before, or its files have changed"
        elif first != second:
            yield f"{name} was {first}, now {second}"


class PredictionFile:
    """The parts of one file, one for each process, and the file they become.

    Args:
        settings: What decides the rows; parts of other settings are not continued.
        process, processes: Number of this process, and how many share the images.
        alone: Let no other command write the same parts until ``close``.

    Attributes:
        left_out: What the other processes alone have left out, by reason; known once the parts are merged.

    Raises:
        RunError: The file is there already, its ending is unknown, its parts are of other settings, or another command
            writes them.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], process: int = 0, processes: int = 1, *, alone: bool = False
    ) -> None:
        require_writable(path)
        self.path, self.process, self.processes = path, process, processes
        self.settings = {**settings, "processes": processes}
        if processes > 1:
            self.settings["parts"] = "by turns"  # earlier versions wrote no empty lines
        self.left_out: Counter[str] = Counter()
        self._open = ExitStack()
        self.rows_an_image = max(1, len(settings["tasks"]))
        self.folder = path.with_name(f"{path.name}.parts")
        if os.path.lexists(path):
            raise RunError(f"{path} is there already", do="remove it, or choose another --output")
        noted = self.folder / SETTINGS
        if process == 0 and not noted.is_file():
            with naming(path, self.folder):
                atomic_write.make_folder(self.folder)
            with _writing(path):
                # Of two commands that start at once one writes it, and both lock that same file.
                atomic_write.create_file(noted, atomic_write.json_text(self.settings).encode())
        if process == 0 and (before := read_run_json(noted)) != self.settings:
            raise RunError(
                f"{self.folder} holds rows of another command",
                given="; ".join(_differences(before if isinstance(before, dict) else {}, self.settings)),
                do="give the same options to continue, remove that folder, or choose another --output",
            )
        if process == 0:  # before the other processes begin
            if alone:
                self._hold(noted)
            for number in range(processes):
                if self._done(number).exists():
                    os.replace(self._done(number), self._part(number))

    def _hold(self, noted: Path) -> None:
        """Lock the parts: two commands would write over each other's rows."""
        file = open(noted, "r+b")  # noqa: SIM115 - some network drives lock only what may be written
        self._open.callback(file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunError(
                f"another process is writing {self.path}; nothing of it was touched",
                do="wait for it, or choose another --output",
            ) from None
        except OSError:  # a file system without locks
            pass
        else:
            self._open.callback(self._forget_nothing)

    def _forget_nothing(self) -> None:
        """Remove a part without a row: commands with other options could not continue it. The lock is still held."""
        if self.processes == 1 and not any(_size_of(path) for path in (self._part(0), self._done(0))):
            for own in (self._part(0), self._done(0), self._left_out(0), self.folder / SETTINGS):
                own.unlink(missing_ok=True)
            with suppress(OSError):  # holds a file that is not ours, or is merged and gone
                self.folder.rmdir()

    def close(self) -> None:
        """Let another command continue, or start again where no row was written yet."""
        self._open.close()

    def predict(self, inputs: Inputs, rows_of: Callable[[Iterator[Item]], Iterator[list[Prediction]]]) -> None:
        """Write the rows of this process's share of the images that have none yet.

        Rows of one turn of ``inputs.share`` stand together; an empty line ends each.

        Args:
            rows_of: Makes the rows of each image from items.
        """
        part, turns = self._part(self.process), deque[int]()
        share = inputs.share(self.process, self.processes)

        def items() -> Iterator[Item]:
            for turn, item in share:
                turns.append(turn)
                yield item

        with _writing(self.path):
            part.touch()
            with open(part, "r+b") as file:
                turn = self._skip(file, share)
                for rows in rows_of(items()):
                    before, turn = turn, turns.popleft()
                    file.write(b"\n" * (turn - before))
                    file.writelines(atomic_write.utf8_json(row.to_dict()) + b"\n" for row in rows)
                    file.flush()
                os.fsync(file.fileno())
            left_out = atomic_write.json_text(dict(inputs.left_out_here))
            atomic_write.replace_file(self._left_out(self.process), left_out.encode())
            os.replace(part, self._done(self.process))

    def merge(self, classes: dict[str, Sequence[str]]) -> tuple[int, int]:
        """Wait for all parts, and put them together in the order of the images.

        Args:
            classes: By task, for what a Parquet file says of itself.

        Returns:
            Number of images, and of those that could not be read.
        """
        parts = [self._done(process) for process in range(self.processes)]
        while not all(part.exists() for part in parts):  # the launcher ends this process where another one failed
            time.sleep(LOOK_EVERY_S)
        counts = [0, 0]
        temporary = self.folder / f"merged{self.path.suffix}"
        with _writing(self.path):
            write_rows(temporary, self._merged(parts, counts), self.settings, classes)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            left_out = [self._left_out(process) for process in range(self.processes)]
            for path in left_out[1:]:
                self.left_out.update(read_run_json(path))
            for own in (*parts, *left_out, self.folder / SETTINGS):
                own.unlink()
            atomic_write.remove_temporary_files(self.folder)
            with suppress(OSError):  # holds a file that is not ours
                self.folder.rmdir()
        return counts[0], counts[1]

    def _part(self, process: int) -> Path:
        return self.folder / f"{process}.part"

    def _done(self, process: int) -> Path:
        return self.folder / f"{process}.jsonl"

    def _left_out(self, process: int) -> Path:
        return self.folder / f"{process}.left_out.json"

    def _skip(self, file: BinaryIO, share: Iterator[tuple[int, Item]]) -> int:
        """Take the images that have rows off ``share``, cut off incomplete rows, and return the turn of the last."""
        turn = 0
        while True:
            start, now = file.tell(), turn
            while (line := file.readline()) == b"\n":
                now += 1
            lines = [line, *(file.readline() for _ in range(self.rows_an_image - 1))]
            if not all(line.endswith(b"\n") for line in lines):
                file.seek(start)
                file.truncate()
                return turn
            (turn, item), before = next(share, (now, None)), _row(lines[0])["path"]
            if item is None or (turn, item.path) != (now, before):
                raise RunError(
                    f"the images are not those that {self.folder} was begun with",
                    given=f"{plain(item.path) if item else 'fewer'}, where {plain(before)} was",
                    do="name the same images to continue, remove that folder, or choose another --output",
                )

    def _merged(self, parts: Sequence[Path], counts: list[int]) -> Iterator[bytes]:
        with ExitStack() as stack:
            files = [stack.enter_context(open(part, "rb")) for part in parts]
            while files:
                for file in tuple(files):  # one turn of each
                    while (line := file.readline()) not in (b"", b"\n"):
                        counts[0] += 1
                        counts[1] += bool(_row(line)["error"])
                        yield from (line, *(file.readline() for _ in range(self.rows_an_image - 1)))
                    if not line:
                        files.remove(file)


def _size_of(path: Path) -> int:
    """Return the bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _row(line: bytes) -> dict[str, Any]:
    try:
        return dict(parse_json(line))
    except (ValueError, TypeError) as error:
        raise RunError("a row of the file that is continued is damaged", given=str(error)[:200]) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses into errors for the user."""
    try:
        yield
    except OSError as error:
        kept = "rows written so far stay; the same command continues"
        if error.errno in FULL:
            raise DiskFull(f"cannot write {path}: {error.strerror}", do=f"{MAKE_ROOM}; {kept}") from error
        raise RunError(f"cannot write {path}: {error.strerror}", do=f"choose another --output; {kept}") from error
