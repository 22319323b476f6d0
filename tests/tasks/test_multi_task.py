"""Tasks on one backbone answer as each does alone, whatever else is in the batch."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from remap.backbones.build import state_hash
from remap.errors import DataError, RunError, UnknownName
from remap.pipeline.student_api import load_student
from remap.tasks.multi_task import MultiTask

MakeTask = Callable[..., Path]
# Names with method and options; those in ALONE change more than hooks can on rows.
METHODS = {
    "linear": ("linear", {}),
    "lora": ("lora", {"rank": 2}),
    "deep": ("vpt_deep", {"num_prompts": 3}),
    "deeper": ("vpt_deep", {"num_prompts": 5}),
    "adapter": ("adaptformer", {}),
    "ssf": ("ssf", {}),
    "both": ("lora+adapter_plus", {}),
    "shallow": ("vpt_shallow", {"num_prompts": 2}),
    "bias": ("bitfit", {}),
    "boft": ("hra", {}),
    "maps": ("attention_copy", {}),
}
ALONE = {"shallow", "bias", "boft", "maps"}


def images(count: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 16, 16), generator=draws, dtype=torch.uint8) for _ in range(count)]


@pytest.mark.guarantee(12)
@pytest.mark.filterwarnings("ignore:.*is not sealed")
def test_a_mixed_batch_gives_each_image_its_own_tasks_logits(make_task: MakeTask) -> None:
    """Expected: the task alone, loaded by itself with a backbone of its own (within 1e-5)."""
    paths = {
        name: make_task(name, method, tuple("abcdefgh"[: 2 + number % 3]), **options)
        for number, (name, (method, options)) in enumerate(METHODS.items())
    }
    multi = MultiTask(None, paths, device="cpu")
    assert set(multi.alone) == ALONE, multi.alone
    views, names = images(25), [name for _ in range(3) for name in METHODS][:25]
    found = multi.logits_of_views(views, names)
    for name, path in paths.items():
        rows = [index for index, one in enumerate(names) if one == name]
        expected = load_student(path, "cpu").logits_of_views(torch.stack([views[row] for row in rows]))
        for row, logits in zip(rows, expected, strict=True):
            assert torch.allclose(found[row], logits, rtol=1e-5, atol=1e-5), name
    with pytest.raises(RunError, match="each image needs a task"):
        multi.logits_of_views(views, names[1:])
    with pytest.raises(DataError, match="these are not views of this student"):
        multi.logits_of_views([views[0] / 255], names[:1])
    with pytest.raises(DataError, match="one image is given, where a list is read"):
        multi.predict("a.jpg")
    switched = multi.switch("lora")
    assert multi.current == "lora" and switched.classes == multi.students["lora"].classes


def test_the_frozen_weights_are_in_memory_once(make_task: MakeTask) -> None:
    multi = MultiTask(None, {"one": make_task("one", "lora"), "two": make_task("two", "norm")}, device="cpu")
    one, two = (dict(multi.students[name].model.named_parameters()) for name in ("one", "two"))
    assert one["blocks.0.attn.qkv.weight"] is two["blocks.0.attn.qkv.weight"]
    assert one["blocks.0.norm1.weight"] is not two["blocks.0.norm1.weight"]
    assert one["head.weight"] is not two["head.weight"]


def test_another_task_changes_no_earlier_one(make_task: MakeTask) -> None:
    multi = MultiTask(None, {"one": make_task("one", "bitfit")}, device="cpu")
    before, views = state_hash(multi.students["one"].model, multi._backbone.anatomy), torch.stack(images(3))
    logits, frozen = multi.student("one").logits_of_views(views), multi._backbone.identity.sha256
    for method in ("full", "lora", "vpt_deep", "boft", "pissa"):
        multi.add(method, make_task(method, method))
    assert torch.equal(multi.student("one").logits_of_views(views), logits)
    assert state_hash(multi.students["one"].model, multi._backbone.anatomy) == before
    assert state_hash(multi._backbone.model, multi._backbone.anatomy) == frozen


def test_switching_takes_less_than_10_ms(make_task: MakeTask) -> None:
    multi = MultiTask(None, {name: make_task(name, "lora") for name in ("one", "two")}, device="cpu")
    begun = time.perf_counter()
    for index in range(100):
        multi.switch(("one", "two")[index % 2])
    assert (time.perf_counter() - begun) / 100 < 0.01


def test_predicting_uses_the_task_that_is_named(make_task: MakeTask) -> None:
    multi = MultiTask(None, {"one": make_task("one", "linear"), "two": make_task("two", "lora", ("x", "y"))}, "cpu")
    from PIL import Image

    picture = Image.fromarray(np.full((20, 20, 3), 90, np.uint8))
    (one, _), (two, _) = multi.predict([picture, picture], ["one", "two"])
    assert one in "abc" and two in "xy"
    assert multi.predict([picture], "two") == multi.predict([picture, picture], ["one", "two"])[1:]
    with pytest.raises(UnknownName, match="there is no task 'three'"):
        multi.predict([picture], "three")


def test_a_task_of_another_backbone_is_refused(make_task: MakeTask, tiny: object) -> None:
    multi = MultiTask(None, {"one": make_task("one", "linear")}, "cpu")
    with pytest.raises(RunError, match="was tuned on another backbone than the tasks before it"):
        multi.add("two", make_task("two", "linear", model=tiny.teacher))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="there is a task one already"):
        multi.add("one", make_task("one", "lora"))
