"""Teacher outputs in memory that one process of several has computed, for the others: by files in a common folder."""

import fcntl
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save

from remap.cache.teacher_cache import InMemory
from remap.errors import RunError
from remap.io import atomic_write
from remap.io.tensor_files import read_safetensors

FOLDER = "shared-outputs"


class SharedOutputs(dict[tuple, Any]):
    """``SharedResources.targets`` of a process: a key is there as soon as any process has computed it.

    Who asks first for what is not there computes it; the others wait until it is stored, or until that process ends.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._lock: IO[bytes] | None = None

    def __contains__(self, key: object) -> bool:
        self.release()
        if super().__contains__(key):
            return True
        path = self._path(key)
        with suppress(OSError, RunError):  # a file system without locks or room: each process computes them
            atomic_write.make_folder(self._folder)
            self._lock = open(path.with_suffix(".lock"), "ab")  # noqa: SIM115 - held until the outputs are stored
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if not path.is_file():
            return False
        assert isinstance(key, tuple)
        super().__setitem__(key, InMemory.of_tensors(read_safetensors(path)))
        self.release()
        return True

    def __setitem__(self, key: tuple, value: InMemory) -> None:
        super().__setitem__(key, value)
        try:
            with suppress(RunError):  # a full disk: each process computes them
                atomic_write.write_bytes(self._path(key), save(value.tensors()))
        finally:
            self.release()

    def release(self) -> None:
        """Let another process compute what this one was about to."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _path(self, key: object) -> Path:
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
