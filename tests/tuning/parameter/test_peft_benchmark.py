"""benchmarks/methods.py sets a method against peft's own: both sides have to be the same function, and learn alike."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[3] / "benchmarks" / "methods.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = spec_from_file_location("benchmark_of_methods", FILE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # A tiny one of the same kind: 16 patches.
    module.VIT.update(img_size=16, embed_dim=32, depth=1, num_heads=2)
    return module


# Those whose peft configuration depends on the layers, and those with random places, which peft holds in plain dicts.
@pytest.mark.parametrize("name", ["fourierft", "ia3", "vblora", "c3a", "waveft", "shira", "hira"])
def test_a_step_is_that_of_peft(benchmark: ModuleType, name: str) -> None:
    """Source: peft's own model on the same layers, with the same values."""
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16, generator=draws), torch.arange(4)
    ours, theirs = benchmark.pair_of(name, "fp32", images, labels)  # asserts equal answers
    for _ in range(2):
        assert ours(images, labels) == pytest.approx(theirs(images, labels), rel=1e-4)
