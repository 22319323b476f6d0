"""Losses on logits against a second formula in numpy float64 written from their papers, timm, torchdistill and DeiT."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from timm.models.deit import VisionTransformerDistilled
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F
from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss

from remap.backbones.anatomy import anatomy_of
from remap.recipe.problems import lines_of
from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.remapping.signals import Signals
from remap.remapping.tap import Tap

Array = NDArray[np.float64]
BATCH, CLASSES = 6, 5
CLASSES_B = torch.tensor([0, 3, 1, 4, 2, 2])
LABELS = Labels(CLASSES_B)
LABEL_FREE = ("kd", "hard", "mlkd", "dist", "logit_std", "affinity")
LABEL_BOUND = (("dkd", {}), ("nkd", {}), ("logit_std", {"of": "dkd"}), ("logit_std", {"of": "nkd"}))


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(x: Array) -> Array:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def kl(t: Array, s: Array) -> Array:
    """KL(t || s) of each row."""
    return (t * (np.log(t) - np.log(s))).sum(axis=-1)


def term_of(name: str, pair: Pair, **options: Any) -> LossTerm:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))


def loss(name: str, pair: Pair, given: tuple[Signals, Signals], labels: Labels = LABELS, **options: Any) -> Tensor:
    term = term_of(name, pair, **options)
    return term(given[0], term.target(given[1]), labels)


def entropy(p_BC: Tensor) -> float:
    return -torch.special.xlogy(p_BC, p_BC).sum(dim=1).mean().item()


def kd_at_best(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """On torchtune's scale it is a cross-entropy, which at the target itself is the target's entropy."""
    torchtune = term.config.scale == "torchtune"
    return teacher, teacher, entropy(teacher.logits_BC.double().softmax(dim=1)) if torchtune else 0.0


def hard_at_best(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    classes = teacher.logits_BC.shape[1]
    wanted = F.one_hot(teacher.logits_BC.argmax(dim=1), classes).double()
    wanted = wanted + term.config.label_smoothing * (1 / classes - wanted)
    return teacher, replace(teacher, logits_BC=wanted.clamp_min(1e-30).log().float()), entropy(wanted)


def nkd_at_best(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """Sure of the label, and otherwise as the teacher."""
    logits_BC, temperature = teacher.logits_BC.double(), term.config.temperature
    label = F.one_hot(labels.classes_B, logits_BC.shape[1])
    others = (logits_BC / temperature - 1e9 * label).softmax(dim=1)
    student = replace(teacher, logits_BC=(logits_BC + 1e4 * label).float())
    return teacher, student, term.config.gamma * temperature**2 * entropy(others)


def affinity_at_best(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """The teacher's own entropies, of each image over classes and of each class over images."""
    logits_BC = teacher.logits_BC.double() / term.config.temperature
    over_images = entropy(logits_BC.mT.softmax(dim=1))
    return teacher, teacher, entropy(logits_BC.softmax(dim=1)) + term.config.text_to_image * over_images


# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {
    "kd": {
        "variants": [
            {"temperature": 1.0},
            {"scale": "deit"},
            {"scale": "torchdistill"},
            {"scale": "torchtune", "temperature": 1.0},
        ],
        "at_best": kd_at_best,
    },
    "hard": {"variants": [{"label_smoothing": 0.1}], "at_best": hard_at_best},
    "dkd": {"variants": [{"alpha": 0.5, "beta": 0.5, "temperature": 1.0}]},
    "nkd": {"variants": [{"gamma": 1.5, "temperature": 2.0}], "at_best": nkd_at_best},
    "mlkd": {"variants": [{"temperatures": [1.0, 4.0], "instance": 0.5, "batch": 2.0}]},
    "affinity": {"variants": [{"temperature": 2.0, "text_to_image": 0.5}], "at_best": affinity_at_best},
    "logit_std": {"variants": [{"of": "dkd"}, {"of": "dist"}, {"of": "mlkd", "options": {"temperatures": [3.0]}}]},
}


@pytest.fixture
def logits() -> tuple[Signals, Signals]:
    return Signals(2 * torch.randn(BATCH, CLASSES)), Signals(3 * torch.randn(BATCH, CLASSES))


@pytest.fixture
def arrays(logits: tuple[Signals, Signals]) -> tuple[Array, Array]:
    return f64(logits[0].logits_BC), f64(logits[1].logits_BC)


def io(logits: tuple[Signals, Signals]) -> tuple[dict, dict]:
    """What torchdistill's hooks would have collected."""
    return {"head": {"output": logits[0].logits_BC}}, {"head": {"output": logits[1].logits_BC}}


# kd and its scales


@pytest.mark.parametrize("scale", ["remap", "timm"])
def test_kd_is_timms_task(pair: Pair, scale: str) -> None:
    # Source: timm's LogitDistillationTask, run on the same two networks and images.
    models = [timm.create_model("test_vit", num_classes=5, img_size=32, pretrained=False).eval() for _ in range(2)]
    for model in models:
        nn.init.normal_(model.head.weight, std=0.5)
    task = LogitDistillationTask(models[0], models[1], temperature=3.0, verbose=False).eval()
    images = torch.randn(BATCH, 3, 32, 32)
    with torch.no_grad():
        theirs = task(images, CLASSES_B)["kd_loss"].item()
        given = Signals(models[0](images)), Signals(models[1](images))
    assert theirs > 1e-3
    assert loss("kd", pair, given, temperature=3.0, scale=scale).item() == pytest.approx(theirs, rel=1e-6)


def test_kd_is_torchdistills_with_and_without_targets(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # Source: torchdistill's KDLoss called in its own way. Without targets or alpha it drops T^2 and its beta.
    where = ("head", "output", "head", "output")
    raw = loss("kd", pair, logits, temperature=4.0, scale="torchdistill").item()
    weighted = KDLoss(*where, temperature=4.0, alpha=0.5, beta=0.7)
    assert raw == pytest.approx(weighted(*io(logits)).item(), rel=1e-6)
    without_alpha = KDLoss(*where, temperature=4.0, alpha=0.0, beta=0.7)
    assert raw == pytest.approx(without_alpha(*io(logits), CLASSES_B).item(), rel=1e-6)
    ce, kd = loss("ce", pair, logits).item(), loss("kd", pair, logits, temperature=4.0, scale="timm").item()
    assert 0.5 * ce + 0.7 * kd == pytest.approx(weighted(*io(logits), CLASSES_B).item(), rel=1e-6)
    assert kd == pytest.approx(16 * raw, rel=1e-6)


def test_kd_on_the_scale_of_deit(pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array]) -> None:
    # Source: DeiT's formula, sum over all B * C elements times T^2 / (B * C), in numpy.
    s, t = (softmax(x / 3.0) for x in arrays)
    expected = kl(t, s).sum() * 9.0 / (BATCH * CLASSES)
    assert loss("kd", pair, logits, temperature=3.0, scale="deit").item() == pytest.approx(expected, rel=1e-6)


def test_kd_on_the_scale_of_torchtune(pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array]) -> None:
    # Source: -sum p_t log p_s, mean over rows, in numpy; its gradient is that of the divergence at T = 1.
    s, t = (softmax(x) for x in arrays)
    student, teacher = replace(logits[0], logits_BC=logits[0].logits_BC.requires_grad_()), logits[1]
    found = loss("kd", pair, (student, teacher), temperature=1.0, scale="torchtune")
    assert found.item() == pytest.approx(-(t * np.log(s)).sum(axis=1).mean(), rel=1e-6)
    (ours,) = torch.autograd.grad(found, student.logits_BC)
    (of_kl,) = torch.autograd.grad(loss("kd", pair, (student, teacher), temperature=1.0), student.logits_BC)
    torch.testing.assert_close(ours, of_kl, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard(pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array], smoothing: float) -> None:
    # Source: -sum y log p with y = (1 - e) onehot(argmax of the teacher) + e / C, in numpy.
    y = (1 - smoothing) * np.eye(CLASSES)[arrays[1].argmax(axis=1)] + smoothing / CLASSES
    expected = -(y * np.log(softmax(arrays[0]))).sum(axis=1).mean()
    assert loss("hard", pair, logits, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-6)


# dkd, nkd


def dkd_parts(arrays: tuple[Array, Array], temperature: float) -> tuple[Array, Array, Array]:
    """TCKD and NCKD of each image, and the teacher's probability of its class (Zhao et al. 2022)."""
    rows, y = np.arange(BATCH), CLASSES_B.numpy()
    s, t = (softmax(x / temperature) for x in arrays)
    binary = [np.stack([p[rows, y], 1 - p[rows, y]], axis=1) for p in (s, t)]
    others = [np.stack([np.delete(row, c) for row, c in zip(p, y, strict=True)]) for p in (s, t)]
    others = [p / p.sum(axis=1, keepdims=True) for p in others]
    return kl(binary[1], binary[0]), kl(others[1], others[0]), t[rows, y]


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 0.0, 1.0), (0.0, 2.0, 2.0)])
def test_dkd(
    pair: Pair,
    logits: tuple[Signals, Signals],
    arrays: tuple[Array, Array],
    alpha: float,
    beta: float,
    temperature: float,
) -> None:
    # Source: both divergences from probabilities, one class deleted from each row, in numpy.
    of_class, of_others, _ = dkd_parts(arrays, temperature)
    expected = (alpha * of_class + beta * of_others).mean() * temperature**2
    found = loss("dkd", pair, logits, alpha=alpha, beta=beta, temperature=temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_dkd_taken_together_again_is_kd(
    pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array]
) -> None:
    # Source: KD = TCKD + (1 - p_y) NCKD, an identity of the paper; image by image, since the factor is the image's.
    *_, of_class = dkd_parts(arrays, 4.0)
    for row in range(BATCH):
        one = tuple(replace(signals, logits_BC=signals.logits_BC[row : row + 1]) for signals in logits)
        label = Labels(CLASSES_B[row : row + 1])
        parts = loss("dkd", pair, one, label, beta=float(1 - of_class[row]))
        assert parts.item() == pytest.approx(loss("kd", pair, one).item(), rel=1e-5, abs=1e-6)


def test_two_classes_have_no_other_classes(pair: Pair) -> None:
    # Source: with one class left, its share is 1 for both networks; KL(1 || 1) = 0, and CE(1, 1) = 0.
    two = Signals(torch.randn(4, 2)), Signals(torch.randn(4, 2))
    labels = Labels(torch.tensor([0, 1, 1, 0]))
    assert loss("dkd", pair, two, labels, alpha=0.0).item() == 0.0
    assert loss("dkd", pair, two, labels).item() == pytest.approx(loss("kd", pair, two).item(), rel=1e-5)
    one_part = [loss("nkd", pair, two, labels, gamma=gamma).item() for gamma in (0.0, 3.0)]
    assert one_part[0] == one_part[1] > 0.0


@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.5, 2.0)])
def test_nkd(
    pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array], gamma: float, temperature: float
) -> None:
    # Source: -t_y log s_y - gamma T^2 sum N(t) log N(s), one class deleted from each row, in numpy.
    rows, y = np.arange(BATCH), CLASSES_B.numpy()
    s, t = (softmax(x)[rows, y] for x in arrays)
    s_others, t_others = (
        softmax(np.stack([np.delete(row, c) for row, c in zip(x, y, strict=True)]) / temperature) for x in arrays
    )
    of_others = -(t_others * np.log(s_others)).sum(axis=1)
    expected = (-t * np.log(s) + gamma * temperature**2 * of_others).mean()
    assert loss("nkd", pair, logits, gamma=gamma, temperature=temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "options"), LABEL_BOUND)
def test_a_class_that_the_teacher_does_not_know(
    pair: Pair, logits: tuple[Signals, Signals], name: str, options: dict[str, Any]
) -> None:
    # Source: the loss among the three classes that the teacher knows, with its argmax written out for the others.
    student, teacher = logits[0], replace(logits[1], logits_BC=logits[1].logits_BC[:, :3])
    written = torch.where(CLASSES_B < 3, CLASSES_B, teacher.logits_BC.argmax(dim=1))
    found = loss(name, pair, (student, teacher), **options)
    both = (replace(student, logits_BC=student.logits_BC[:, :3]), teacher)
    assert found.item() == loss(name, pair, both, Labels(written), **options).item()


@pytest.mark.parametrize(("name", "options"), LABEL_BOUND)
def test_one_class_of_mixed_and_unlabelled_images(
    pair: Pair, logits: tuple[Signals, Signals], name: str, options: dict[str, Any]
) -> None:
    # Source: the loss with the six classes written out: larger share, or the teacher's argmax where that is unknown.
    classes = torch.tensor([0, -1, 1, -1, 2, 4])
    other = torch.tensor([1, 3, -1, -1, 0, 2])
    share = torch.tensor([0.7, 0.4, 0.9, 0.6, 0.1, 0.5])
    guess = logits[1].logits_BC.argmax(dim=1)
    written = Labels(torch.tensor([0, 3, 1, int(guess[3]), 0, 4]))
    found = loss(name, pair, logits, Labels(classes, other, share, labeled=0.5), **options)
    assert found.item() == loss(name, pair, logits, written, **options).item()
    plain = loss(name, pair, logits, Labels(torch.where(classes < 0, guess, classes)), **options)
    assert loss(name, pair, logits, Labels(classes, labeled=0.5), **options).item() == plain.item()
    assert plain.item() != pytest.approx(found.item())


@pytest.mark.parametrize("name", LABEL_FREE)
def test_label_free_losses_do_not_read_labels(pair: Pair, logits: tuple[Signals, Signals], name: str) -> None:
    # Source: the same loss with other labels, with mixed ones, and with none.
    mixed = Labels(CLASSES_B, CLASSES_B.flip(0), torch.full((BATCH,), 0.3))
    values = [loss(name, pair, logits, labels).item() for labels in (LABELS, mixed, Labels(torch.full((BATCH,), -1)))]
    assert values[0] == values[1] == values[2]


# mlkd


def test_mlkd(pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array]) -> None:
    # Source: KL T^2, ||G_t - G_s||^2 / B and ||M_t - M_s||^2 / C, entry by entry in numpy; mean over temperatures.
    expected = []
    for temperature in (1.0, 4.0):
        s, t = (softmax(x / temperature) for x in arrays)
        of_batch = sum((t[a] @ t[b] - s[a] @ s[b]) ** 2 for a in range(BATCH) for b in range(BATCH)) / BATCH
        pairs_of_classes = ((c, d) for c in range(CLASSES) for d in range(CLASSES))
        of_classes = sum((t[:, c] @ t[:, d] - s[:, c] @ s[:, d]) ** 2 for c, d in pairs_of_classes) / CLASSES
        expected.append(0.5 * kl(t, s).mean() * temperature**2 + 2.0 * of_batch + 3.0 * of_classes)
    options = {"temperatures": [1.0, 4.0], "instance": 0.5, "batch": 2.0, "classes": 3.0}
    assert loss("mlkd", pair, logits, **options).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_mlkd_of_one_level_is_kd(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # Source: the definition; without the Gram matrices only the divergence is left.
    found = loss("mlkd", pair, logits, temperatures=[4.0], batch=0.0, classes=0.0).item()
    assert found == pytest.approx(loss("kd", pair, logits, temperature=4.0).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["kd", "hard", "mlkd", "dist", "logit_std"])
def test_order_of_images_and_of_classes_does_not_matter(pair: Pair, logits: tuple[Signals, Signals], name: str) -> None:
    # Source: the same loss on rows and columns permuted alike in both networks.
    rows, columns = torch.randperm(BATCH), torch.randperm(CLASSES)
    moved = tuple(replace(one, logits_BC=one.logits_BC[rows][:, columns]) for one in logits)
    assert loss(name, pair, moved).item() == pytest.approx(loss(name, pair, logits).item(), rel=1e-5)


# affinity


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.5)])
def test_affinity(
    pair: Pair, logits: tuple[Signals, Signals], arrays: tuple[Array, Array], temperature: float, weight: float
) -> None:
    # Source: TinyCLIP's equations 1 to 3 in numpy, sums written out: -sum t log s over classes, and over images.
    s, t = (x / temperature for x in arrays)
    over_classes = -(softmax(t) * np.log(softmax(s))).sum() / BATCH
    over_images = -(softmax(t.T) * np.log(softmax(s.T))).sum() / CLASSES
    found = loss("affinity", pair, logits, temperature=temperature, text_to_image=weight).item()
    assert found == pytest.approx(over_classes + weight * over_images, rel=1e-6)


# logit_std


def z_scores(x: Array) -> Array:
    return (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-7)


def test_logit_std_is_torchdistills(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # Source: torchdistill's LogitStdKDLoss called in its own way, with the weights that its documentation gives.
    theirs = LogitStdKDLoss("head", "output", "head", "output", temperature=2.0, alpha=0.5, beta=9)
    weight = LOSSES.row("logit_std").weight
    ours = 0.5 * loss("ce", pair, logits) + weight * loss("logit_std", pair, logits)
    assert ours.item() == pytest.approx(theirs(*io(logits), CLASSES_B).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("of", "options", "written"),
    [
        ("kd", {}, {"temperature": 2.0}),
        ("kd", {"temperature": 3, "scale": "deit"}, {"temperature": 3.0, "scale": "deit"}),
        ("dkd", {"beta": 2.0}, {"beta": 2.0, "temperature": 2.0}),
        ("nkd", {}, {"temperature": 2.0}),
        ("dist", {}, {"tau": 2.0}),
        ("mlkd", {"batch": 0.5}, {"batch": 0.5}),
    ],
)
def test_logit_std_of_each_loss(
    pair: Pair,
    logits: tuple[Signals, Signals],
    arrays: tuple[Array, Array],
    of: str,
    options: dict[str, Any],
    written: dict[str, Any],
) -> None:
    # Source: the loss itself on z-scores made in numpy, with the temperature of 2 written out.
    ready = tuple(Signals(torch.from_numpy(z_scores(x)).float()) for x in arrays)
    found = loss("logit_std", pair, logits, of=of, options=options).item()
    assert found == pytest.approx(loss(of, pair, ready, **written).item(), rel=1e-5)


def test_logit_std_forgives_shift_and_scale(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # Source: a z-score does not change when an image's logits are shifted and stretched.
    shift, stretch = torch.randn(BATCH, 1), torch.rand(BATCH, 1) + 0.5
    twin = Signals(shift + stretch * logits[1].logits_BC), logits[1]
    assert loss("logit_std", pair, twin).item() == pytest.approx(0.0, abs=1e-6)
    assert loss("kd", pair, twin).item() > 1e-3


def test_logit_std_of_equal_logits_is_finite(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # A classifier that starts from zeros answers every class alike: no spread to divide by.
    student = torch.zeros(BATCH, CLASSES, requires_grad=True)
    found = loss("logit_std", pair, (Signals(student), logits[1]))
    found.backward()
    assert torch.isfinite(found) and student.grad is not None and torch.isfinite(student.grad).all()


def test_logit_std_says_all_its_options() -> None:
    # Source: the default of each class, written out; reading them back changes nothing.
    config = LOSSES.load("logit_std").Config
    written = config(of="dist", options={"gamma": 2}).model_dump(mode="json")
    assert written == {"of": "dist", "options": {"beta": 1.0, "gamma": 2.0, "tau": 2.0}}
    assert config(**written) == config(of="dist", options={"gamma": 2})


WRONG = [
    ("kd", {"temperature": 0.0}, "temperature: should be greater than 0, got 0.0"),
    (
        "kd",
        {"scale": "tim"},
        "scale: 'tim' is not one of remap, timm, deit, torchdistill, torchtune; did you mean 'timm'?",
    ),
    ("kd", {"scale": "torchtune"}, "scale torchtune has no temperature; set it to 1 instead of 4"),
    ("hard", {"label_smoothing": 1.0}, "label_smoothing: should be less than 1"),
    ("dkd", {"beta": -1.0}, "beta: should be greater than or equal to 0"),
    ("dkd", {"temperature": 0.0}, "temperature: should be greater than 0"),
    ("nkd", {"gamma": -0.5}, "gamma: should be greater than or equal to 0"),
    ("nkd", {"temperature": -1.0}, "temperature: should be greater than 0"),
    ("mlkd", {"temperatures": []}, "temperatures: tuple should have at least 1 item"),
    ("mlkd", {"temperatures": [2.0, 0.0]}, "temperatures[1]: should be greater than 0"),
    ("mlkd", {"classes": -1.0}, "classes: should be greater than or equal to 0"),
    ("logit_std", {"of": "ce"}, "of: 'ce' is not one of kd, dkd, nkd, dist, mlkd"),
    (
        "logit_std",
        {"options": {"temperatur": 2}},
        "options: kd has no option 'temperatur'; did you mean 'temperature'?",
    ),
    ("logit_std", {"of": "dkd", "options": {"beta": -1}}, "options.beta: should be greater than or equal to 0, got -1"),
    ("logit_std", {"options": {"scale": "torchtune"}}, "options: scale torchtune has no temperature"),
]


@pytest.mark.parametrize(("name", "options", "line"), WRONG)
def test_wrong_options_are_one_clear_line(name: str, options: dict[str, Any], line: str) -> None:
    config = LOSSES.load(name).Config
    with pytest.raises(ValidationError) as caught:
        config(**options)
    (found,) = lines_of(caught.value, config, "losses[0]")
    assert line in found and found.startswith("losses[0]")


@pytest.mark.parametrize("name", ["kd", "hard", "dkd", "nkd", "mlkd", "logit_std", "affinity"])
def test_extreme_bfloat16_logits_under_autocast(pair: Pair, name: str) -> None:
    # Source: the same numbers in float32 without autocast; both must be finite and agree.
    values, grads = [], []
    given = 1e4 * torch.randn(BATCH, CLASSES).sign(), 1e4 * torch.randn(BATCH, CLASSES).sign()
    for dtype in (torch.bfloat16, torch.float32):
        student = given[0].to(torch.bfloat16).to(dtype).requires_grad_()
        teacher = Signals(given[1].to(torch.bfloat16).to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = loss(name, pair, (Signals(student), teacher))
        found.backward()
        assert student.grad is not None and torch.isfinite(student.grad).all()
        values.append(found.item())
        grads.append(student.grad.float())
    assert np.isfinite(values[0]) and values[0] == pytest.approx(values[1], rel=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)


# DeiT's distillation token


@pytest.fixture
def distilled() -> VisionTransformerDistilled:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    model = VisionTransformerDistilled(**sizes).eval()
    for head in (model.head, model.head_dist):
        nn.init.normal_(head.weight)
    # timm's task reads how images are normalised from here; teacher and student alike, so that nothing is changed.
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@pytest.mark.parametrize(
    ("name", "learns"),
    [("ce", "head"), ("kd", "head_dist"), ("hard", "head_dist"), ("dkd", "head_dist"), ("nkd", "head_dist")]
    + [("mlkd", "head_dist"), ("logit_std", "head_dist"), ("dist", "head_dist")],
)
def test_each_head_learns_from_its_own_side(distilled: Any, logits: tuple, name: str, learns: str) -> None:
    # Source: Touvron et al. 2021: the class token learns from labels, the distillation token from the teacher.
    anatomy = anatomy_of(distilled)
    term = term_of(name, Pair(anatomy, anatomy, CLASSES))
    with Tap(distilled, anatomy, term.student_needs()) as tap:
        student = tap(torch.randn(BATCH, 3, 16, 16))
    term(student, term.target(logits[1]), LABELS).backward()
    assert term.classifier == ("labels" if learns == "head" else "teacher")
    for head in ("head", "head_dist"):
        grad = distilled.get_submodule(head).weight.grad
        assert bool(grad is not None and grad.abs().sum() > 0) == (head == learns)


@pytest.mark.parametrize(("kind", "term"), [("hard", "hard"), ("soft", "kd")])
def test_deits_loss_is_half_and_half(distilled: Any, kind: str, term: str) -> None:
    # Sources: 0.5 CE(class token, label) + 0.5 CE(distillation token, argmax of the teacher), written out (DeiT); and
    # timm's TokenDistillationTask with these weights on the same two networks.
    teacher = timm.create_model("test_vit", num_classes=CLASSES, img_size=16, pretrained=False).eval()
    nn.init.normal_(teacher.head.weight, std=0.5)
    teacher.pretrained_cfg = distilled.pretrained_cfg
    images = torch.randn(BATCH, 3, 16, 16)
    anatomy = anatomy_of(distilled)
    options = {"temperature": 3.0} if kind == "soft" else {}
    pair = Pair(anatomy, anatomy_of(teacher), CLASSES)
    objective = Objective({"ce": term_of("ce", pair), term: term_of(term, pair, **options)}, {"ce": 0.5, term: 0.5})
    with torch.no_grad(), Tap(distilled, anatomy, objective.student_needs()) as tap:
        given = Signals(teacher(images))
        ours = objective(tap(images), [objective.targets(given)], LABELS)[0].item()
    task = TokenDistillationTask(
        distilled,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_type=kind,
        task_loss_weight=0.5,
        distill_loss_weight=0.5,
        temperature=3.0,
        verbose=False,
    ).eval()
    distilled.set_distilled_training(True)
    distilled.training = True  # timm gives both answers in training only
    with torch.no_grad():
        theirs = task(images, CLASSES_B)["loss"].item()
        answers = distilled(images)
    if kind == "hard":
        written = F.cross_entropy(answers[0], CLASSES_B) + F.cross_entropy(answers[1], given.logits_BC.argmax(dim=1))
        assert ours == pytest.approx(0.5 * written.item(), rel=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-6)
