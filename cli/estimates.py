"""The tables of ``--dry-run``."""

from typing import Any

from remap_cli import view


def show(found: dict[str, Any]) -> None:
    """Print what a dry run found."""
    models = [["teacher", found["teacher"]], ["student", found["student"]]]
    view.table(
        "Models",
        ["", "model", "weights", "pixels", "backbone", "head"],
        [
            [
                role,
                m["model"],
                m["weights"],
                m["input_size"],
                view.count(m["backbone_parameters"]),
                view.count(m["head_parameters"]),
            ]
            for role, m in models
            if m is not None
        ],
        right=(3, 4, 5),
    )
    total = found["student"]["backbone_parameters"] + sum(
        row["parameters"] for row in found["trainable"] if row["part"] == "head"
    )
    total += found["student"]["added_parameters"]
    rows = [
        [
            row["part"],
            row["tensors"],
            ", ".join(row["shapes"]),
            f"{row['parameters']:,}",
            f"{row['parameters'] / total:.2%}",
        ]
        for row in found["trainable"]
    ]
    view.table(
        "Trained parameters", ["part", "tensors", "shapes", "parameters", "share"], rows, right=(1, 3, 4), wrap=(2,)
    )
    guess, data = found["estimate"], found["data"]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in found["losses"].items())
    view.table(
        f"One batch of {data['source']} ({data['train_images']} training, {data['val_images']} evaluation images, "
        f"{data['classes']} classes) on {found['device']} in {found['precision']}",
        ["estimate", "value"],
        [
            ["losses of the batch", losses],
            ["learning rate", f"{found['learning_rate']:.3g}"],
            ["time", f"{view.duration(guess['seconds'])} ({guess['steps']:,} steps of {guess['step_seconds']:.3g} s)"],
            ["preparing the teacher", f"{view.duration(guess['preparing_seconds'])} of it"],
            ["memory", f"{view.size(guess['memory_bytes'])} (activations {view.size(guess['activation_bytes'])})"],
            ["teacher outputs kept", view.size(guess["cache_bytes"])],
            ["frozen features kept", view.size(guess["features_bytes"])],
            ["disk", f"{view.size(guess['disk_bytes'])} (of it to keep: {view.size(guess['task_bytes'])})"],
        ],
        wrap=(1,),
    )
    view.line("Nothing was trained or written.")
