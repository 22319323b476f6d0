"""Each loss against a second formula, written here in numpy float64 from its paper, or against another project."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F
from torchdistill.losses.mid_level import DISTLoss

from remap.backbones.anatomy import Anatomy
from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.remapping.signals import Attention, Signals

Array = NDArray[np.float64]
CLASSES_OF_IMAGES = torch.tensor([0, 3, 1, 4, 2, 2])


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(x: Array) -> Array:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def row_kl(teacher: Array, student: Array) -> float:
    """Mean over rows of KL(teacher || student)."""
    t, s = (m.reshape(-1, teacher.shape[-1]) for m in (teacher, student))
    return float(np.mean([np.sum(a * (np.log(a) - np.log(b))) for a, b in zip(t, s, strict=True)]))


def value(name: str, pair: Pair, student: Signals, teacher: Signals, **options: Any) -> float:
    kind = LOSSES.load(name)
    term: LossTerm = kind(pair, kind.Config(**options))
    return term(student, term.target(teacher), Labels(CLASSES_OF_IMAGES[: len(student.logits_BC)])).item()


def feature_at_best(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """Zero where the student's feature equals the teacher's layer-normed one."""
    normed_BD = F.layer_norm(teacher.pooled_BD, teacher.pooled_BD.shape[-1:])
    return teacher, replace(teacher, pooled_BD=normed_BD), 0.0


# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {
    "ce": {"variants": [{"label_smoothing": 0.1}]},
    "dist": {"variants": [{"beta": 2.0, "gamma": 0.5, "tau": 4.0}]},
    "attention": {
        "variants": [{"layers": "uniform"}, {"layers": [[0, 2], [-1, -2]], "resize": "bicubic"}],
        "alike": {"layers": "uniform"},
    },
    "feature": {
        "variants": [{"projector": "orthogonal"}, {"loss": "cosine"}],
        "alike": {"projector": "none"},
        "at_best": feature_at_best,
    },
}


@pytest.fixture
def logits() -> tuple[Signals, Signals]:
    return Signals(2 * torch.randn(6, 5)), Signals(3 * torch.randn(6, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce(pair: Pair, logits: tuple[Signals, Signals], smoothing: float) -> None:
    # Source: -sum_c y_c log p_c with y = (1 - e) onehot + e / C (Szegedy et al. 2016), summed by hand.
    p = softmax(f64(logits[0].logits_BC))
    y = (1 - smoothing) * np.eye(5)[CLASSES_OF_IMAGES.numpy()] + smoothing / 5
    expected = -(y * np.log(p)).sum() / 6
    assert value("ce", pair, *logits, label_smoothing=smoothing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_by_explicit_sums(pair: Pair, logits: tuple[Signals, Signals], temperature: float) -> None:
    # Source: T^2 / B sum_b sum_c t_bc log(t_bc / s_bc) (Hinton et al. 2015), one addition at a time.
    s, t = (softmax(f64(one.logits_BC) / temperature) for one in logits)
    total = sum(t[b, c] * np.log(t[b, c] / s[b, c]) for b in range(6) for c in range(5))
    found = value("kd", pair, *logits, temperature=temperature)
    assert found == pytest.approx(total / 6 * temperature**2, rel=1e-5)


def test_kd_is_batchmean_times_squared_temperature(pair: Pair, logits: tuple[Signals, Signals]) -> None:
    # Source: PyTorch's kl_div on probabilities (not log-probabilities), "batchmean".
    s, t = (one.logits_BC / 3.0 for one in logits)
    expected = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean") * 9.0
    assert value("kd", pair, *logits, temperature=3.0) == pytest.approx(expected.item(), rel=1e-5)


def test_kd_is_timms(pair: Pair) -> None:
    # Source: timm's LogitDistillationTask, run on the same two networks and images.
    models = [timm.create_model("test_vit", num_classes=5, img_size=32, pretrained=False).eval() for _ in range(2)]
    for model in models:
        nn.init.normal_(model.head.weight, std=0.5)
    task = LogitDistillationTask(models[0], models[1], temperature=2.0, verbose=False).eval()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        theirs = task(images, CLASSES_OF_IMAGES)["kd_loss"].item()
        ours = value("kd", pair, Signals(models[0](images)), Signals(models[1](images)), temperature=2.0)
    assert theirs > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_dist(pair: Pair, logits: tuple[Signals, Signals], beta: float, gamma: float, tau: float) -> None:
    # Sources: numpy's Pearson correlation of rows and of columns; and torchdistill's loss called in its own way.
    s, t = (softmax(f64(one.logits_BC) / tau) for one in logits)
    across_classes = np.mean([1 - np.corrcoef(s[b], t[b])[0, 1] for b in range(6)])
    across_images = np.mean([1 - np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(5)])
    expected = tau**2 * (beta * across_classes + gamma * across_images)
    found = value("dist", pair, *logits, beta=beta, gamma=gamma, tau=tau)
    assert found == pytest.approx(expected, rel=1e-5)
    theirs = DISTLoss("head", "output", "classifier", "input", beta=beta, gamma=gamma, tau=tau)
    io = {"head": {"output": logits[0].logits_BC}}, {"classifier": {"input": logits[1].logits_BC}}
    assert found == pytest.approx(theirs(*io).item(), rel=1e-6)


def scores(network: Any, blocks: list[int], heads: int, tokens: int) -> Signals:
    """Random queries and keys of some blocks; S = ``tokens``, head width 4."""
    has_class = network.anatomy.has_class_token
    attention = {
        block: Attention(2 * torch.randn(2, heads, tokens, 4), torch.randn(2, heads, tokens, 4), has_class, (3, 3))
        for block in blocks
    }
    return Signals(torch.randn(2, 5), None, attention)


def numpy_map(signals: Signals, block: int) -> Array:
    one = signals.attention[block]
    return softmax(np.einsum("bhsd,bhtd->bhst", f64(one.q_BHSh), f64(one.k_BHSh)))


def test_attention_mean_over_heads_and_block_pairs(build_network: Any) -> None:
    # Source: softmax, mean over heads and KL row by row in numpy; uniform pairs of 2 and 3 blocks: 0-1 and 1-2.
    student, teacher = build_network(depth=2, num_heads=2), build_network(depth=3, num_heads=3)
    pair = Pair(student.anatomy, teacher.anatomy, 5)
    s, t = scores(student, [0, 1], 2, 10), scores(teacher, [1, 2], 3, 10)
    per_pair = [row_kl(numpy_map(t, b).mean(axis=1), numpy_map(s, a).mean(axis=1)) for a, b in ((0, 1), (1, 2))]
    assert value("attention", pair, s, t, layers="uniform") == pytest.approx(np.mean(per_pair), rel=1e-5)
    assert value("attention", pair, s, t) == pytest.approx(per_pair[1], rel=1e-5)


def test_attention_head_by_head(build_network: Any) -> None:
    # Source: as above, without the mean over heads.
    twin = build_network(depth=2, num_heads=3)
    pair = Pair(twin.anatomy, twin.anatomy, 5)
    s, t = scores(twin, [1], 3, 10), scores(twin, [0], 3, 10)
    found = value("attention", pair, s, t, heads="each", layers=[[-1, 0]])
    assert found == pytest.approx(row_kl(numpy_map(t, 0), numpy_map(s, 1)), rel=1e-5)


@pytest.mark.parametrize("families", [("plain", "layerscale_registers"), ("no_class_registers", "distilled")])
def test_attention_of_networks_with_registers(families: tuple[str, str], build_network: Any, maps_of_timm: Any) -> None:
    # Source: timm's own full maps; cut to the tokens both have, rows divided by their sums, KL; all in numpy.
    student, teacher = (build_network(family, seed=seed) for seed, family in enumerate(families))
    pair = Pair(student.anatomy, teacher.anatomy, 5)
    both = student.anatomy.has_class_token and teacher.anatomy.has_class_token

    def reference(network: Any) -> Array:
        anatomy: Anatomy = network.anatomy
        full = f64(maps_of_timm(network.model, anatomy, network.images)[-1])
        keep = [0] * both + list(range(anatomy.num_prefix_tokens, full.shape[-1]))
        cut = full[:, :, keep][..., keep]
        return (cut / cut.sum(axis=-1, keepdims=True)).mean(axis=1)

    term = LOSSES.load("attention")(pair, LOSSES.load("attention").Config())
    target = term.target(teacher.signals(term.teacher_needs()))
    found = term(student.signals(term.student_needs()), target, Labels(CLASSES_OF_IMAGES[:4])).item()
    assert found == pytest.approx(row_kl(reference(teacher), reference(student)), rel=1e-4)


def test_attention_target_is_on_the_students_grid(pair: Pair, teacher: Any) -> None:
    # Source: counting. 3 x 3 patches and a class token; the teacher has 4 x 4 and registers.
    term = LOSSES.load("attention")(pair, LOSSES.load("attention").Config())
    (target,) = term.target(teacher.signals(term.teacher_needs())).values()
    assert target.shape == (4, 10, 10)
    torch.testing.assert_close(target.sum(dim=-1), torch.ones(4, 10))


def test_attention_gradient_raises_what_the_student_neglects(pair: Pair) -> None:
    # Source: the KL of a softmax has the gradient s - t in its logits, however little the student gives a token.
    kind = LOSSES.load("attention")
    same = Pair(pair.student, replace(pair.student), 5)
    bias = torch.tensor([0.0, -120.0]).requires_grad_()  # a weight that float32 cannot hold
    q, k = torch.ones(1, 1, 2, 1), bias.reshape(1, 1, 2, 1)
    term = kind(same, kind.Config())
    student = Signals(torch.zeros(1, 5), None, {1: Attention(q, k, False, (1, 2))})
    target = {term.item("map", 1): torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])}
    term(student, target, Labels(CLASSES_OF_IMAGES[:1])).backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == pytest.approx([0.5, -0.5], rel=1e-6)


@pytest.mark.parametrize("projector", ["linear", "orthogonal"])
@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_feature(pair: Pair, projector: str, loss: str) -> None:
    # Source: layer norm, projection and both losses written out in numpy (Miles et al. 2024; Girshick 2015).
    kind = LOSSES.load("feature")
    term = kind(pair, kind.Config(projector=projector, loss=loss))
    student = Signals(torch.zeros(6, 5), 3 * torch.randn(6, 16))
    teacher = Signals(torch.zeros(6, 5), 5 + 2 * torch.randn(6, 24))
    t = f64(teacher.pooled_BD)
    t = (t - t.mean(axis=1, keepdims=True)) / np.sqrt(t.var(axis=1, keepdims=True) + 1e-5)
    s = f64(student.pooled_BD) @ f64(term.projector.weight).T
    gap = np.abs(s - t)
    cosine = (s * t).sum(axis=1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    expected = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean() if loss == "smooth_l1" else (1 - cosine).mean()
    assert term(student, term.target(teacher), Labels(CLASSES_OF_IMAGES)).item() == pytest.approx(expected, rel=1e-5)


def test_orthogonal_projector_keeps_lengths_while_training(pair: Pair) -> None:
    # Source: definition. W^T W = 1 for a matrix that widens, before and after steps of the optimiser.
    kind = LOSSES.load("feature")
    term = kind(pair, kind.Config(projector="orthogonal"))
    first = f64(term.projector.weight)
    optimiser = torch.optim.SGD(term.parameters(), lr=1.0)
    student, target = Signals(torch.zeros(6, 5), torch.randn(6, 16)), {"pooled": torch.randn(6, 24)}
    for _ in range(3):
        optimiser.zero_grad()
        term(student, target, Labels(CLASSES_OF_IMAGES)).backward()
        optimiser.step()
    last = f64(term.projector.weight)
    assert np.abs(last - first).max() > 1e-3
    np.testing.assert_allclose(last.T @ last, np.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "apart"),
    [({"ce": 1.0}, False), ({"kd": 1.0}, False), ({"ce": 1.0, "kd": 0.0}, False), ({"ce": 1.0, "kd": 1.0}, True)],
)
def test_both_classifiers_of_a_distilled_student_are_trained(
    pair: Pair, logits: tuple[Signals, Signals], weights: dict[str, float], apart: bool
) -> None:
    # Source: DeiT: labels and teacher have a classifier each, and the answer is their mean. Where only one of them
    # speaks, it speaks to the answer, which has a gradient to both.
    one_BC, other_BC = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    answer_BC = (one_BC + other_BC) / 2
    terms = {name: LOSSES.load(name)(pair, LOSSES.load(name).Config()) for name in weights}
    objective = Objective(terms, weights)
    labels = Labels(CLASSES_OF_IMAGES)
    total, parts = objective(Signals(answer_BC, head_logits=(one_BC, other_BC)), [objective.targets(logits[1])], labels)
    for name, found in parts.items():
        read_BC = {"ce": one_BC, "kd": other_BC}[name] if apart else answer_BC
        assert found.item() == pytest.approx(value(name, pair, Signals(read_BC), logits[1]), rel=1e-6)
    total.backward()
    assert one_BC.grad.abs().sum() > 0 and other_BC.grad.abs().sum() > 0
