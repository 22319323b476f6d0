"""Where a command makes its run directory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from remap.distributed.launch import accelerator, broadcast_str
from remap.io.paths import expanded
from remap.runs.run_dir import make_next


@contextlib.contextmanager
def run_path(output: str | Path | None, root: Path, stem: str) -> Iterator[Path]:
    """Yield the path of a new run directory, the same one in all processes: ``output``, or a free ``root/stem-001``.

    The folder of a free number is made at once, so that no other command takes it; when the block ends, it is removed
    if it is still empty.
    """
    if output is not None:
        yield expanded(output)
        return
    main = accelerator().is_main_process
    path = Path(broadcast_str(str(make_next(root, stem)) if main else ""))
    try:
        yield path
    finally:
        if main:
            with contextlib.suppress(OSError):  # it holds a run, or is gone
                path.rmdir()
