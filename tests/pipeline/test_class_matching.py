"""A teacher's own classes meet those of the data: expected logits are written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from remap.backbones.build import Backbone, build
from remap.data.splits import Split
from remap.errors import BackboneError
from remap.network import tuned
from remap.pipeline.adjusting import balance, calibrate
from remap.pipeline.class_matching import match_classes
from remap.pipeline.components import build_components
from remap.pipeline.shared import SharedResources
from remap.progress import Silent

NAME = "vit_mini_student_patch4_32"


def _teacher(folder: Path, outputs: int, labels: tuple[str, ...] = ()) -> Backbone:
    """A model folder whose classifier gives 0, 1, 2 ... for every image."""
    model = timm.create_model(NAME, num_classes=outputs)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.arange(outputs).float()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": NAME, "num_classes": outputs, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (folder / "config.json").write_text(json.dumps({**config, "label_names": labels} if labels else config))
    return build(f"local-dir:{folder}", "pretrained", 3, keep_head=True)


class Blank:
    """Three black images."""

    split = Split(("",) * 3, np.zeros(3, dtype=np.int64), lambda index: b"")

    def batch(self, indices: Any) -> tuple[torch.Tensor, np.ndarray]:
        return torch.zeros(len(indices), 3, 32, 32, dtype=torch.uint8), np.asarray(indices)


def _logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model.eval()(torch.zeros(1, 3, 32, 32))[0]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (("0", "1", "2", "10"), ("0", "1", "10", "2"), [0, 1, 3, 2]),  # natural and lexical order
        (("Ant", "honey_bee", "CAT"), ("cat", "ant", "Honey bee"), [2, 0, 1]),
        (
            ("tench, Tinca tinca", "goldfish", "n01484850, white shark"),
            ("goldfish", "tinca tinca", "white shark"),
            [1, 0, 2],
        ),
        (("crane, bird", "crane"), ("crane",), [1]),  # a complete name counts before a synonym
        (("caf\u00e9", "tea"), ("cafe\u0301",), [0]),
    ],
)
def test_classes_are_matched_by_name(
    labels: tuple[str, ...], classes: tuple[str, ...], expected: list[float], tmp_path: Path
) -> None:
    backbone = _teacher(tmp_path, len(labels), labels)
    assert "by name" in match_classes(backbone, classes, None)
    torch.testing.assert_close(_logits(backbone), torch.tensor(expected).float(), check_dtype=False)
    assert backbone.model.num_classes == backbone.model.head.out_features == len(classes)


def test_imagenets_names_are_known_by_their_number(tmp_path: Path) -> None:
    """Outputs 0, 1 and 207 of ImageNet-1k: tench, goldfish, golden retriever (its published class index)."""
    backbone = _teacher(tmp_path, 1000)
    assert any("imagenet-1k" in note for note in backbone.notes)
    match_classes(backbone, ("golden_retriever", "tench", "n01443537"), None)
    assert _logits(backbone).tolist() == [207.0, 0.0, 1.0]


def test_a_file_says_which_is_which_and_several_add_up(tmp_path: Path) -> None:
    """Expected in float64: log of the sum of the members' exponentials."""
    backbone = _teacher(tmp_path, 6, ("a", "b", "c", "d", "e", "f"))
    (tmp_path / "map.yaml").write_text("cat: [a, c, 4]\nDog: f\n")
    assert "map.yaml" in match_classes(backbone, ("dog", "cat"), str(tmp_path / "map.yaml"))
    expected = torch.tensor([[5.0], [0.0]], dtype=torch.float64)
    expected[1] = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64).exp().sum().log()
    torch.testing.assert_close(_logits(backbone).double(), expected.flatten(), rtol=1e-6, atol=1e-6)
    network, source = tuned(backbone, "linear", {}), Blank()
    balance(network, source, 0.5, 8, Silent())  # type: ignore[arg-type]
    balanced = expected.flatten() - 0.5 * expected.flatten().log_softmax(0)
    torch.testing.assert_close(_logits(backbone).double(), balanced, rtol=1e-6, atol=1e-6)
    with pytest.raises(BackboneError, match="whose classes are groups of others"):
        calibrate(network, source, 8, Silent())  # type: ignore[arg-type]
    assert "sizes=(1, 3)" in repr(backbone.model)  # part of the fingerprint of cached outputs


@pytest.mark.parametrize(
    ("labels", "classes", "text", "says"),
    [
        (("ant", "bee"), ("ant", "wasp"), None, "has no wasp"),
        (("crane", "crane"), ("crane",), None, "has several called crane"),
        ((), ("a", "b"), None, "3 outputs without names, the data has 2"),
        (("ant", "bee", "cat"), ("x",), "x: [ant, cow]", "has no cow"),
        (("ant", "bee", "cat"), ("x", "y"), "x: ant", "does not say what y is"),
        ((), ("x",), "x: 3", "has no 3"),
    ],
)
def test_a_mismatch_shows_both_lists(
    labels: tuple[str, ...], classes: tuple[str, ...], text: str | None, says: str, tmp_path: Path
) -> None:
    backbone = _teacher(tmp_path, len(labels) or 3, labels)
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(BackboneError, match=says) as caught:
        match_classes(backbone, classes, None if text is None else str(tmp_path / "map.yaml"))
    if text is None:
        assert "teacher.classes=FILE" in str(caught.value) and classes[0] in str(caught.value)


def test_without_names_the_order_is_an_assumption_that_is_said(tmp_path: Path) -> None:
    backbone = _teacher(tmp_path, 3)
    assert "taken in the order of the classes here (x, y, z)" in match_classes(backbone, ("x", "y", "z"), None)
    assert _logits(backbone).tolist() == [0.0, 1.0, 2.0]


def test_a_run_matches_its_teacher_and_says_so(tiny: Any, tmp_path: Path, watch: Any) -> None:
    _teacher(tmp_path, 4, ("Red", "grey", "blue", "green"))
    remarks = watch(lambda done: None)
    recipe = tiny.recipe("teacher.prepare=none", teacher=f"local-dir:{tmp_path}", losses="ce,kd", method="linear")
    teacher = build_components(recipe, None, remarks, SharedResources()).teachers[0]
    assert teacher.network.head["head.bias"].tolist() == [2.0, 3.0, 0.0]  # blue, green, red
    assert any("4 classes are matched with the 3 of the data by name" in line for line in remarks.said)


def test_the_embedded_pair_knows_its_classes() -> None:
    built = build("mini_teacher", "pretrained", 10, keep_head=True)
    match_classes(built, ("ship", "cat"), None)
    assert built.model.head.weight.shape[0] == 2
    with pytest.raises(BackboneError, match="has no 0"):
        match_classes(build("mini_teacher", "pretrained", 10, keep_head=True), tuple("0123456789"), None)


def test_numbers_without_names_are_matched_as_numbers(tmp_path: Path) -> None:
    """Classes are sorted as text, "10" before "2"; output k of the teacher is class k all the same."""
    backbone = _teacher(tmp_path, 11)
    classes = tuple(sorted(map(str, range(11))))
    assert "by number" in match_classes(backbone, classes, None)
    assert _logits(backbone).tolist() == [float(name) for name in classes]
