"""What every row of the table of losses must do. Options beyond the defaults are listed in VARIANTS."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remap.errors import BackboneError
from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.remapping.signals import Signals

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ce": [{"label_smoothing": 0.1}],
    "kd": [
        {"temperature": 1.0},
        {"scale": "deit"},
        {"scale": "torchdistill"},
        {"scale": "torchtune", "temperature": 1.0},
    ],
    "hard": [{"label_smoothing": 0.1}],
    "dkd": [{"alpha": 0.5, "beta": 0.5, "temperature": 1.0}],
    "nkd": [{"gamma": 1.5, "temperature": 2.0}],
    "mlkd": [{"temperatures": [1.0, 4.0], "instance": 0.5, "batch": 2.0}],
    "logit_std": [{"of": "dkd"}, {"of": "dist"}, {"of": "mlkd", "options": {"temperatures": [3.0]}}],
    "dist": [{"beta": 2.0, "gamma": 0.5, "tau": 4.0}],
    "attention": [{"layers": "uniform"}, {"layers": [[0, 2], [-1, -2]], "resize": "bicubic"}],
    "attention_cls": [{"heads": "mean", "layers": "uniform"}, {"heads": "mean", "temperature": 2.0}],
    "attention_scores": [{"layers": "uniform", "resize": "bicubic"}],
    "relations": [{"relations": ["v"], "relation_heads": 8}, {"relations": ["q", "k"], "layers": "uniform"}],
    "feature": [{"projector": "orthogonal"}, {"loss": "cosine"}],
    "tokens": [
        {"layers": "uniform", "loss": "cosine", "prefix": "class"},
        {"layers": [[0, 2], [-1, -2]], "projector": "orthogonal", "prefix": "all"},
    ],
    "gram": [{"loss": "mse", "layers": "uniform"}, {"temperature": 0.5, "layers": [[0, 1]]}],
    "vitkd": [{"shallow": 1, "mask": 0.3, "generation": 1.0}],
    "mgd": [{"mask": 0.65}],
    "fitnet": [{"layers": [[0, 2], [1, 0]]}],
    "rkd": [{"distance": 0.0}, {"angle": 0.0}],
    "pkt": [{"self_similarity": True}],
    "crd": [{"width": 8, "temperature": 0.5}],
    "torchdistill": [
        {"loss": "PKTLoss"},
        {"loss": "DISTLoss", "signal": "logits", "options": {"tau": 2.0}},
        {"loss": "SKDInstanceLoss", "signal": "logits", "options": {"mode": "code"}},
        {"loss": "ATLoss", "signal": "tokens", "options": {"mode": "paper"}},
    ],
}
CASES = [(row.name, options) for row in LOSSES for options in ({}, *VARIANTS.get(row.name, []))]
LABELS = Labels(torch.tensor([0, 3, 1, 4]))
# Cross-entropy measures the distance to the labels, and stays positive however well the student copies the teacher.
WITHOUT_TEACHER = {"ce"}
# Options under which a network and its twin are compared like with like: every block with itself, no projection.
LIKE_WITH_LIKE: dict[str, dict[str, Any]] = {
    "attention": {"layers": "uniform"},
    "attention_cls": {"layers": "uniform"},
    "attention_scores": {"layers": "uniform"},
    "relations": {"layers": "uniform"},
    "feature": {"projector": "none"},
    "tokens": {"projector": "none", "layers": "uniform"},
    "gram": {"layers": "uniform"},
    "fitnet": {"layers": [[0, 0], [2, 2]]},
}


def lowest(name: str, options: dict[str, Any], teacher_BC: Tensor) -> tuple[Tensor, float] | None:
    """For losses whose minimum is not 0: the student's logits that reach it, and its value in closed form."""

    def entropy(p_BC: Tensor) -> float:
        return -torch.special.xlogy(p_BC, p_BC).sum(dim=1).mean().item()

    teacher_BC = teacher_BC.double()
    if options.get("scale") == "torchtune":  # cross-entropy is least at the target itself: there it is its entropy
        return teacher_BC.float(), entropy(teacher_BC.softmax(dim=1))
    if name == "hard":
        wanted = F.one_hot(teacher_BC.argmax(dim=1), 5).double()
        wanted = wanted + options.get("label_smoothing", 0.0) * (0.2 - wanted)
        return wanted.clamp_min(1e-30).log().float(), entropy(wanted)
    if name == "nkd":  # sure of the label, and otherwise as the teacher
        label = F.one_hot(LABELS.classes_B, 5)
        temperature = options.get("temperature", 1.0)
        others = (teacher_BC / temperature - 1e9 * label).softmax(dim=1)
        return (teacher_BC + 1e4 * label).float(), options.get("gamma", 1.0) * temperature**2 * entropy(others)
    return None


def layer_normed(signals: Signals) -> Signals:
    """Features and tokens as the terms with a layer-normed target want them."""

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    tokens = {
        index: replace(one, patches_BND=normed(one.patches_BND), prefix_BPD=normed(one.prefix_BPD))
        for index, one in signals.tokens.items()
    }
    return replace(signals, pooled_BD=None if signals.pooled_BD is None else normed(signals.pooled_BD), tokens=tokens)


@torch.no_grad()
def settle(name: str, term: Any, signals: Signals) -> tuple[Signals, float]:
    """For terms with learned parts: set them so that the minimum can be reached; the twins' signals, and its value.

    Linear maps become identities. A generator sees masked tokens only, so that it reaches zero where the teacher's
    tokens are one constant: its last bias. Contrast is least where the B images are as far apart as can be, at
    cosines of -1 / (B - 1).
    """
    for module in term.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.eye_(module.weight)
            torch.nn.init.zeros_(module.bias)
    if name in ("vitkd", "mgd"):
        last = max(signals.tokens)
        constant_D = signals.tokens[last].patches_BND[0, 0]
        term.generator[2].weight.zero_()
        term.generator[2].bias.copy_(constant_D)
        tokens = replace(signals.tokens[last], patches_BND=constant_D.expand_as(signals.tokens[last].patches_BND))
        return replace(signals, tokens={**signals.tokens, last: tokens}), 0.0
    if name == "crd":
        simplex_BD = (torch.eye(4) - 0.25) @ torch.eye(4, 24)
        apart = (1.0 + 1.0 / 3.0) / term.config.temperature
        return replace(signals, pooled_BD=simplex_BD), 2.0 * math.log1p(3.0 * math.exp(-apart))
    return signals, 0.0


each_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])


def make(name: str, options: dict[str, Any], pair: Pair) -> LossTerm:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))


def objective_of(name: str, options: dict[str, Any], pair: Pair) -> Objective:
    return Objective({name: make(name, options, pair)}, {name: 1.0})


def leaves(signals: Signals) -> list[Tensor]:
    attention = [x for one in signals.attention.values() for x in (one.q_BHSh, one.k_BHSh, one.v_BHSh)]
    tokens = [x for one in signals.tokens.values() for x in (one.patches_BND, one.prefix_BPD)]
    parts = (signals.logits_BC, signals.pooled_BD, *attention, *tokens)
    return [tensor for tensor in parts if tensor is not None]


def extreme(signals: Signals) -> Signals:
    """The same shapes as fresh leaves: logits, scores, features and tokens of about +-10,000."""

    def fresh(tensor: Tensor | None, size: float) -> Tensor | None:
        return None if tensor is None else (size * torch.randn_like(tensor).sign()).requires_grad_()

    attention = {
        index: replace(
            one, q_BHSh=fresh(one.q_BHSh, 60.0), k_BHSh=fresh(one.k_BHSh, 60.0), v_BHSh=fresh(one.v_BHSh, 1e4)
        )
        for index, one in signals.attention.items()
    }
    tokens = {
        index: replace(one, patches_BND=fresh(one.patches_BND, 1e4), prefix_BPD=fresh(one.prefix_BPD, 1e4))
        for index, one in signals.tokens.items()
    }
    return Signals(fresh(signals.logits_BC, 1e4), fresh(signals.pooled_BD, 1e4), attention, tokens)


def test_variants_name_rows_of_the_table() -> None:
    assert set(VARIANTS) <= set(LOSSES.names)
    assert {row.name for row in LOSSES if not row.load().uses_teacher} == WITHOUT_TEACHER


@each_loss
def test_finite_scalar_and_gradient(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    objective = objective_of(name, options, pair)
    targets = objective.targets(teacher.signals(objective.teacher_needs()))
    total, parts = objective(student.signals(objective.student_needs()), [targets], LABELS)
    assert total.shape == () and total.dtype == torch.float32 and set(parts) == {name}
    assert total.item() > 0.0 and not parts[name].requires_grad
    total.backward()
    moved = [p for p in student.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    for parameter in objective.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@each_loss
def test_minimum_is_reached_when_the_student_is_the_teacher(name: str, options: dict, build_network: Any) -> None:
    # Source of the numbers: a divergence of a thing from itself is 0, one minus its correlation with itself is 0; for
    # cross-entropies that are not 0 at best, ``lowest``.
    twin = build_network(depth=3)
    pair = Pair(twin.anatomy, twin.anatomy, 5)
    if name in WITHOUT_TEACHER:
        assert not LOSSES.load(name).uses_teacher
        return
    objective = objective_of(name, {**options, **LIKE_WITH_LIKE.get(name, {})}, pair)
    teacher = twin.signals(objective.teacher_needs())
    student, minimum = teacher, 0.0
    if name in ("feature", "tokens"):  # zero is where the student's feature equals the teacher's layer-normed one
        student = layer_normed(teacher)
    if name in ("fitnet", "vitkd", "mgd", "crd"):
        teacher, minimum = settle(name, objective.terms[name], teacher)
        student = teacher
    if (at_best := lowest(name, options, teacher.logits_BC)) is not None:
        student, minimum = replace(teacher, logits_BC=at_best[0]), at_best[1]
    total, _ = objective(student, [objective.targets(teacher)], LABELS)
    assert abs(total.item() - minimum) < 2e-6 * max(1.0, minimum)


@each_loss
def test_no_gradient_reaches_the_teacher(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    teacher.model.requires_grad_(True)  # a forward pass with a graph: the objective itself has to cut it
    objective = objective_of(name, options, pair)
    targets = objective.targets(teacher.signals(objective.teacher_needs()))
    assert not any(value.requires_grad for value in targets.values())
    total, _ = objective(student.signals(objective.student_needs()), [targets], LABELS)
    total.backward()
    assert all(p.grad is None for p in teacher.model.parameters())


@each_loss
def test_term_alone_cuts_the_teacher(name: str, options: dict, pair: Pair, teacher: Any) -> None:
    teacher.model.requires_grad_(True)
    term = make(name, options, pair)
    target = term.target(teacher.signals(term.teacher_needs()))
    assert not any(value.requires_grad for value in target.values())


@each_loss
def test_finite_with_extreme_signals(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    objective = objective_of(name, options, pair)
    targets = objective.targets(extreme(teacher.signals(objective.teacher_needs())))
    signals = extreme(student.signals(objective.student_needs()))
    total, _ = objective(signals, [targets], LABELS)
    assert torch.isfinite(total)
    total.backward()
    grads = [x.grad for x in leaves(signals) if x.grad is not None]
    grads += [p.grad for p in objective.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)


@each_loss
def test_float32_under_bfloat16_autocast(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    # Source of the number: the same signals without autocast. Terms compute in float32, so the two agree exactly.
    objective = objective_of(name, options, pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = teacher.signals(objective.teacher_needs())
        targets = objective.targets(given)
        signals = student.signals(objective.student_needs())
        assert signals.logits_BC.dtype == torch.bfloat16
        torch.manual_seed(3)  # of random masks
        total, _ = objective(signals, [targets], LABELS)
    assert total.dtype == torch.float32 and all(value.dtype == torch.float32 for value in targets.values())
    total.backward()
    grads = [p.grad for p in (*student.model.parameters(), *objective.parameters()) if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)
    torch.manual_seed(3)
    without, _ = objective(signals, [objective.targets(given)], LABELS)
    assert total.item() == pytest.approx(without.item(), rel=1e-6)


@each_loss
def test_targets_belong_to_images(name: str, options: dict, pair: Pair, teacher: Any) -> None:
    objective = objective_of(name, options, pair)
    needs = objective.teacher_needs()
    whole = objective.targets(teacher.signals(needs))
    halves = [objective.targets(teacher.signals(needs, rows)) for rows in (slice(0, 2), slice(2, 4))]
    assert bool(whole) == objective.uses_teacher
    for key, value in whole.items():
        assert value.shape[0] == len(teacher.images)
        torch.testing.assert_close(torch.cat([half[key] for half in halves]), value, rtol=1e-6, atol=1e-6)


@each_loss
def test_half_precision_targets_are_accepted(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    # A cache may keep float16. Source of the bound: its relative spacing is 2^-11, and losses are smooth.
    objective = objective_of(name, options, pair)
    targets = objective.targets(teacher.signals(objective.teacher_needs()))
    signals = student.signals(objective.student_needs())
    torch.manual_seed(3)  # of random masks
    exact, _ = objective(signals, [targets], LABELS)
    torch.manual_seed(3)
    rounded, _ = objective(signals, [{key: value.half() for key, value in targets.items()}], LABELS)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_same_seed_same_projectors(pair: Pair) -> None:
    for name, options in CASES:
        states = []
        for _ in range(2):
            torch.manual_seed(7)
            states.append(make(name, options, pair).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_total_is_the_weighted_sum(pair: Pair, student: Any, teacher: Any) -> None:
    # Source of the number: each term run alone by hand, weighted and added in Python floats.
    weights = {row.name: 0.5 + 0.7 * index for index, row in enumerate(LOSSES)}
    terms = {row.name: make(row.name, {}, pair) for row in LOSSES}
    objective = Objective(terms, weights)
    seen_teacher = teacher.signals(objective.teacher_needs())
    seen_student = student.signals(objective.student_needs())
    torch.manual_seed(3)  # of random masks
    total, parts = objective(seen_student, [objective.targets(seen_teacher)], LABELS)
    torch.manual_seed(3)
    alone = {name: term(seen_student, term.target(seen_teacher), LABELS).item() for name, term in terms.items()}
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(alone)
    assert total.item() == pytest.approx(sum(weights[name] * alone[name] for name in terms), rel=1e-5)


@pytest.mark.parametrize("name", ["attention", "feature"])
def test_a_missing_teacher_is_a_clear_error(name: str, student: Any) -> None:
    with pytest.raises(BackboneError, match="needs a teacher"):
        make(name, {}, Pair(student.anatomy, None, 5))


def test_each_head_needs_equal_heads(pair: Pair) -> None:
    with pytest.raises(BackboneError, match="student 2, teacher 3"):
        make("attention", {"heads": "each"}, pair)


def test_no_projector_needs_equal_widths(pair: Pair) -> None:
    with pytest.raises(BackboneError, match="student 16, teacher 24"):
        make("feature", {"projector": "none"}, pair)
