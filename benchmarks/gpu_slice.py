"""Train a recipe for some seconds: begin it, or continue its newest checkpoint; stop with all of it saved.

Run: python benchmarks/gpu_slice.py --recipe FILE --run FOLDER --data TRAIN --val-data TEST --seconds 240 [--set ...]
"""

import argparse
import contextlib
import json
import threading
import time
from pathlib import Path

from remap.errors import Interrupted
from remap.pipeline.run import resume, start
from remap.progress import Silent
from remap.recipe import resolve
from remap.runs.run_dir import RunDir


class Printed(Silent):
    def say(self, text: str) -> None:
        print(text, flush=True)


def stop_after(run_dir: RunDir, seconds: float, ended: threading.Event) -> None:
    """Ask the run to save its state and end; again and again, since one that only begins removes the file."""
    while not ended.wait(seconds):
        with contextlib.suppress(OSError):
            run_dir.stop.touch()
        seconds = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("recipe", "run", "data", "val-data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run_dir, began = RunDir(Path(options.run)), time.monotonic()
    ended_already = threading.Event()
    threading.Thread(target=stop_after, args=(run_dir, options.seconds, ended_already), daemon=True).start()
    try:
        if (run_dir.path / "recipe.yaml").is_file():
            recipe = run_dir.recipe()
            places = {"source": str(Path(options.data).resolve()), "val_source": str(Path(options.val_data).resolve())}
            # The images may lie elsewhere on this machine; their contents decide.
            run_dir.settle(recipe.model_copy(update={"data": recipe.data.model_copy(update=places)}))
            resume(run_dir.path, Printed())
        else:
            words = {"data": options.data, "val_data": options.val_data}
            start(resolve(options.recipe, words, options.set), run_dir.path, Printed())
        ended = "trained to the end"
    except Interrupted as error:
        ended = error.what
    finally:
        ended_already.set()
        run_dir.stop.unlink(missing_ok=True)
    metrics = run_dir.metrics() if (run_dir.path / "metrics.jsonl").is_file() else []
    accuracies = [record["accuracy"] for record in metrics if "accuracy" in record]
    found = {"ended": ended, "epochs": len(metrics), "accuracies": accuracies, "seconds": time.monotonic() - began}
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
