"""The stages of on_gpu.sh with tiny models, in one process: importing PyTorch takes longer than all of them.

Run: python benchmarks/gpu_smoke.py FOLDER
"""

import runpy
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
TINY = ("train.epochs=1", "train.batch_size=8", "train.warmup_epochs=0", "train.precision=fp32")


def main() -> None:
    folder = Path(sys.argv[1])
    for split, count in (("train", 16), ("test", 4)):
        for index in range(count):
            path = folder / "drawn" / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 8 * index, np.uint8)).save(path)
    run("kernels.py", "--tokens=65", "--repeats=1", "--seconds=0.001")
    run("gpu_step.py", f"--json={folder / 'steps.json'}", "--smoke", "--methods=lora")
    images = (f"--data={folder / 'drawn/train'}", f"--val-data={folder / 'drawn/test'}")
    settings = (f"--set={setting}" for setting in TINY)
    # Stopped after a second, then continued to its end.
    for seconds in (1, 60):
        slice_of = (f"--recipe={HERE / 'stronger_mini_teacher.yaml'}", f"--run={folder / 'teacher'}", *images)
        run("gpu_slice.py", *slice_of, f"--seconds={seconds}", f"--json={folder / 'slice.json'}", *settings)


def run(script: str, *arguments: str) -> None:
    print("==", script, *arguments, flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(str(HERE / script), run_name="__main__")


if __name__ == "__main__":
    main()
