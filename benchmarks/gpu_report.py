"""Put what on_gpu.sh has left in its folder into gpu.json and a Markdown table, gpu.md.

Run: python benchmarks/gpu_report.py FOLDER
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"python": platform.python_version(), "packages": _packages()}
    for name in ("environment.txt", "tests.txt", "kernels.txt", "skipped.txt"):
        path = folder / name
        found[path.stem] = path.read_text(errors="replace").splitlines()[-40:] if path.is_file() else []
    for name in ("steps", "slice"):
        path = folder / f"{name}.json"
        found[name] = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else None
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "gpu.md").write_text(table(found["steps"]) if found["steps"] else "no step was measured\n")
    print((folder / "gpu.md").read_text())


def _packages() -> dict[str, str]:
    from remap.io.versions import package_versions

    return package_versions()


def table(steps: dict[str, Any]) -> str:
    setting = steps["setting"]
    lines = [
        f"Pair {setting['pair']}, batch {setting['batch']}, {setting['precision']}, on: {steps['card']}. MFU is of "
        f"{(steps['peak_bf16'] or 0) / 1e12:g} TFLOP/s (0: a card that is not in the table).",
        "",
        "| method | side | step | images/s | MFU | peak memory (above the weights) | first run |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in steps["rows"]:
        if "skipped" in row:
            lines.append(f"| `{row['method']}` | {row['side']} | skipped: {row['skipped']} | | | | |")
            continue
        low, high = (1000 * one for one in row["range"])
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB ({row['peak_bytes_above_weights'] / 2**30:.2f})"
        step = f"{1000 * row['seconds']:.1f} ms ({low:.1f} to {high:.1f})"
        cells = (step, f"{row['images_per_second']:,.0f}", mfu, memory, f"{row['first_run_seconds']:.1f} s")
        lines.append(f"| `{row['method']}` | {row['side']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
