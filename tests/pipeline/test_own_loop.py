"""The losses in a training loop of one's own: the ten lines of docs/tracking.md."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

import remap

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tracking.md"
ARGUMENTS = {"img_size": 16, "patch_size": 8, "num_classes": 3, "num_heads": 2}


def _pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    make = timm.create_model
    student = make("vit_tiny_patch16_224", depth=2, embed_dim=16, **ARGUMENTS)
    return student, make("vit_tiny_patch16_224", depth=3, embed_dim=24, **ARGUMENTS)


def test_the_sum_is_that_of_the_formulas() -> None:
    """ce + 0.5 kd + pooled features, with the models' own forward: kd is T^2 KL (Hinton et al. 2015, eq. 4 and 2.1)."""
    student, teacher = _pair()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 2, 1, 1])
    losses = remap.losses(["ce", {"name": "kd", "weight": 0.5, "temperature": 2.0}], student.eval(), teacher)
    total, terms = losses(images, labels)
    ours, theirs = student(images).double(), teacher(images).double()
    ce = F.cross_entropy(ours, labels)
    kd = 4 * F.kl_div((ours / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean")
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["kd"].item() == pytest.approx(kd.item(), rel=1e-3)  # small: of nearly equal outputs, in float32
    assert total.item() == pytest.approx((ce + 0.5 * kd).item(), rel=1e-5)
    total.backward()
    assert not any(p.requires_grad for p in teacher.parameters()) and not list(losses.parameters())
    assert all(p.grad is not None for p in student.parameters())
    losses.close()
    assert not [1 for model in (student, teacher) for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_an_image_without_a_label_counts_in_the_teacher_s_losses_alone() -> None:
    """Expected: ce of the two labelled images, kd of all four; of a batch without any label, ce is nothing."""
    student, teacher = _pair()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, -1, 1, -1])
    losses = remap.losses("ce,kd", student.eval(), teacher)
    of_labels = F.cross_entropy(student(images[::2]).double(), labels[::2])
    total, terms = losses(images, labels)
    assert terms["ce"].item() == pytest.approx(of_labels.item(), rel=1e-5)
    assert terms["kd"].item() == losses(images, torch.tensor([0, 2, 1, 1]))[1]["kd"].item() > 0
    assert total.item() == pytest.approx((terms["ce"] + terms["kd"]).item(), rel=1e-6)
    total, terms = losses(images, torch.full((4,), -1))
    assert terms["ce"].item() == 0 and total.isfinite()
    losses.close()


def test_the_ten_lines_of_the_docs_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as they stand there, on tiny models: the loss falls, only prompts, head and projector change."""
    (lines,) = re.findall(r"```python\n(import timm.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 13  # ten, and the imports
    student, teacher = _pair()
    frozen = student.blocks[0].attn.qkv.weight.clone()
    models = iter([teacher, student])
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: next(models))
    images, labels = torch.randn(8, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    seen = []

    def loader() -> object:
        for _ in range(20):
            yield images, labels
            seen.append(names["loss"].item())

    names = {"loader": loader()}
    exec(lines, names)
    assert len(seen) == 20 and seen[-1] < 0.9 * seen[0]
    assert torch.equal(student.blocks[0].attn.qkv.weight, frozen)


def test_a_teacher_must_be_another_network_with_the_same_classes() -> None:
    """The student's own would be frozen with the teacher; of other classes, class 1 is compared with class 1."""
    student, teacher = _pair()
    tuned = remap.attach(student, "bitfit")
    trained = [p.requires_grad for p in student.parameters()]
    with pytest.raises(remap.RemapError, match="it shares weights with the student"):
        remap.losses("ce,kd", tuned, student)
    assert [p.requires_grad for p in student.parameters()] == trained and any(trained)
    for classes in (2, 5):
        teacher.reset_classifier(classes)
        with pytest.raises(remap.RemapError, match=f"kd: compares the answers of 3 classes with those of {classes}"):
            remap.losses("ce,kd", tuned, teacher)
    remap.losses("ce,feature", tuned, teacher).close()  # which reads no answers


def test_labels_that_are_none_are_refused() -> None:
    student, _ = _pair()
    losses, images = remap.losses("ce", student), torch.randn(4, 3, 16, 16)
    for labels in (None, torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(remap.RemapError, match="labels are not one class"):
            losses(images, labels)  # type: ignore[arg-type]
    with pytest.raises(remap.RemapError, match="a label is not one of the student's 3 classes"):
        losses(images, torch.tensor([0, 1, 2, 3]))


def test_what_does_not_fit_is_refused() -> None:
    student, teacher = _pair()
    with pytest.raises(remap.RemapError, match="at least one loss is needed"):
        remap.losses("", student)
    with pytest.raises(remap.RemapError, match="cee"):
        remap.losses("cee", student, teacher)
    with pytest.raises(remap.RemapError, match="temprature"):
        remap.losses([{"name": "kd", "temprature": 2.0}], student, teacher)
    with pytest.raises(remap.RemapError, match="kd: a teacher is missing"):
        remap.losses("ce,kd", student)
