"""Equal shapes: every initialisation is a copy of the backbone, and never of the classifier."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from remap.remapping.weights import INITS


@pytest.mark.parametrize("init", INITS.names)
def test_equal_shapes_give_the_teacher(
    init: str, sequence: str, build: Callable, initialise: Callable, features: Callable, images: Tensor
) -> None:
    """Source: the teacher's own tensors and features."""
    teacher, student = build(sequence, 0), build(sequence, 1)
    head = {name: p.clone() for name, p in student.model.named_parameters() if student.anatomy.is_head(name)}
    assert not torch.equal(features(student.model, images), features(teacher.model, images))
    report = initialise(init, teacher, student)
    for name, tensor in teacher.model.state_dict().items():
        mine = student.model.state_dict()[name]
        assert torch.equal(mine, head.get(name, tensor)), name
    assert torch.equal(features(student.model, images), features(teacher.model, images))
    assert report.blocks == (0, 1, 2)
    assert not (report.kept or report.neutral or report.left)


def test_the_teacher_is_only_read(sequence: str, build: Callable, initialise: Callable) -> None:
    teacher = build(sequence)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    for init in ("weight_selection", "net2net"):
        student = build(sequence, 1)
        initialise(init, teacher, student)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())


def test_the_table_is_whole() -> None:
    for row in INITS:
        cls = row.load()
        assert cls.name == row.name and not cls.__abstractmethods__
        assert row.category == "weights" and row.needs and row.mismatch
