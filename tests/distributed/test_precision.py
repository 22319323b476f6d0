"""Which precision "auto" is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from remap.distributed import launch
from remap.pipeline import doctor


@pytest.mark.parametrize(("bf16", "word"), [(False, "fp32"), (True, "bf16")])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, bf16: bool, word: str) -> None:
    monkeypatch.setattr(launch, "cpu_multiplies_bf16", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.use_bf16("auto", torch.device("cpu")) is bf16
    assert [launch.use_bf16(chosen, torch.device("cpu")) for chosen in ("fp32", "bf16")] == [False, True]
    (row,) = (row for row in doctor.examine()["checks"] if row["what"] == "precision 'auto'")
    assert row["found"].startswith(f"{word}: the processor has")


def test_the_check_agrees_with_the_flags_that_the_kernel_lists(native_bf16: Callable[[], bool]) -> None:
    listed = Path("/proc/cpuinfo")
    if not listed.is_file():
        pytest.skip("not Linux")
    assert native_bf16() == bool({"avx512_bf16", "amx_tile"} & set(listed.read_text().split()))
