"""A run whose thread never finishes the third checkpoint: the tensors are there, the manifest is not."""

import json
import sys
import threading
import time
from pathlib import Path

from remap.engine import checkpoint_files
from remap.pipeline.run import start
from remap.recipe import resolve

words, settings, run, marker = json.loads(sys.argv[1])
write = checkpoint_files.write_bytes


def stuck(path: Path, data: bytes) -> None:
    if path.name == "000003.json":
        # Renamed, so that who waits for the file finds it written.
        written = Path(f"{marker}.part")
        written.write_text(threading.current_thread().name)
        written.replace(marker)
        time.sleep(1000)
    write(path, data)


checkpoint_files.write_bytes = stuck
start(resolve(words=words, settings=settings), run)
