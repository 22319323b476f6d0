"""The line of an epoch."""

from remap.pipeline.epoch_recorder import epoch_line


def test_an_epoch_in_one_line() -> None:
    """Losses without their schedules, the best epoch so far, and the seconds since the one before."""
    history = [
        {
            "epoch": 1,
            "loss": 3.0,
            "ce": 1.0,
            "kd": 2.0,
            "kd.weight": 0.5,
            "accuracy": 0.9,
            "val_ce": 1.0,
            "seconds": 4.0,
        },
        {
            "epoch": 2,
            "loss": 2.0,
            "ce": 0.5,
            "kd": 1.5,
            "kd.weight": 1.0,
            "accuracy": 0.8,
            "val_ce": 1.1,
            "seconds": 7.5,
        },
    ]
    assert epoch_line(history[:1], 2) == "epoch 1/2: loss 3 (ce 1, kd 2), accuracy 90.0%, best 90.0%, 4.0 s"
    assert epoch_line(history, 2) == "epoch 2/2: loss 2 (ce 0.5, kd 1.5), accuracy 80.0%, best 90.0% (epoch 1), 3.5 s"
    assert epoch_line([{"epoch": 1, "loss": 3.0, "tokens": 3.0, "seconds": 1.0}], 1) == "epoch 1/1: loss 3, 1.0 s"
    assert epoch_line([{"epoch": 1, "seconds": 1.0}], 2) == "epoch 1/2: 1.0 s"  # every step was skipped
