"""``--to task``: remap's own files of a task, copied byte for byte, as they were sealed."""

from pathlib import Path
from typing import Any

from remap.exporting import snippets
from remap.exporting.format import Answer, ExportOptions, Format
from remap.exporting.task_source import TaskSource
from remap.io import atomic_write
from remap.io.checked_read import read_regular
from remap.network import Runner
from remap.runs.run_records import STUDENT_MODEL
from remap.runs.task import load_task


class TaskFolder(Format):
    """``task/``, and ``student_model/`` where the student was cut from its teacher: what ``load_student`` opens."""

    def write(self, source: TaskSource, folder: Path, options: ExportOptions) -> dict[str, Any]:
        copied, cut = {source.folder: folder / "task"}, source.folder.resolve().parent / STUDENT_MODEL
        # One that was cut before the run lies elsewhere, and is named by its path as any other model folder.
        if source.meta.backbone.model.endswith(f"/{STUDENT_MODEL}") and cut.is_dir():
            copied[cut] = folder / STUDENT_MODEL
        for old, new in copied.items():
            atomic_write.make_folder(new)
            for file in sorted(path for path in old.iterdir() if path.is_file() and not path.is_symlink()):
                atomic_write.write_bytes(new / file.name, read_regular(file, file.stat().st_size))
        return {}

    def open(self, source: TaskSource, folder: Path, options: ExportOptions) -> Answer:
        network, _ = load_task(folder)
        runner = Runner(network).eval()
        return lambda views_BCHW: runner(views_BCHW).logits_BC.detach()

    def usage(self, source: TaskSource, options: ExportOptions) -> str:
        return snippets.task(source)
