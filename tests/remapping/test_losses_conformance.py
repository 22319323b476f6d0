"""What every row of the table of losses must do.

What the suite must know of a loss besides its row stands in the file that tests its formula, as
``CONFORMANCE = {"NAME": {...}}``; all keys are optional:

- base: options of every case;
- variants: options beyond the defaults that the suite runs too;
- alike: options under which a network and its copy are compared like with like (each block with itself, no projection);
- at_best(term, teacher, labels) -> (teacher, student, minimum): signals at which the loss is least, and its value there
  in closed form; by default the student's signals are the teacher's, and the value is 0.
"""

import runpy
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import computing_on_gpu, move, on_gpu
from torch import Tensor

from remap.errors import BackboneError
from remap.remapping import LOSSES
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.remapping.signals import Signals

KNOWN: dict[str, dict[str, Any]] = {
    name: facts
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if path != Path(__file__) and "\nCONFORMANCE" in path.read_text(encoding="utf-8")
    for name, facts in runpy.run_path(str(path))["CONFORMANCE"].items()
}
CASES = [(row.name, options) for row in LOSSES for options in ({}, *KNOWN.get(row.name, {}).get("variants", ()))]
LABELS = Labels(torch.tensor([0, 3, 1, 4]))
TWO_DOMAINS = Labels(torch.tensor([0, -1, 1, -1]), labeled=0.5)
# Losses that compare no student with a teacher that it could equal.
ALONE = ("labels", "domains")
each_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])


def make(name: str, options: dict[str, Any], pair: Pair) -> LossTerm:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**{**KNOWN.get(name, {}).get("base", {}), **options}))


def labels_of(name: str) -> Labels:
    return TWO_DOMAINS if LOSSES.row(name).category == "domains" else LABELS


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


def test_facts_are_of_rows_of_the_table() -> None:
    assert set(KNOWN) <= set(LOSSES.names)
    assert {key for facts in KNOWN.values() for key in facts} <= {"base", "variants", "alike", "at_best"}


def test_only_losses_on_labels_have_no_teacher() -> None:
    for row in LOSSES:
        assert row.load().uses_teacher == (row.category not in ALONE or row.of_average)


def rows_of(signals: Signals, rows: slice) -> Signals:
    """A part of a batch, with the strides that a network would have given it."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.shape[0] == len(signals.logits_BC) else value
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{name: cut(one) for name, one in vars(value).items()})
        return {key: cut(one) for key, one in value.items()} if isinstance(value, dict) else value

    return replace(signals, **{name: cut(value) for name, value in vars(signals).items()})


@each_loss
@torch.no_grad()
def test_an_image_has_the_same_items_in_every_batch(name: str, options: dict, pair: Pair, teacher: Any) -> None:
    # Source: what a cache promises, to the last bit. One image alone is where a matrix product rounds otherwise.
    objective = objective_of(name, options, pair)
    if not objective.uses_teacher:
        return
    signals = teacher.signals(objective.teacher_needs())
    together = objective.targets(signals)
    for rows in (slice(0, 1), slice(1, 4)):
        for item, value in objective.targets(rows_of(signals, rows)).items():
            assert torch.equal(value, together[item][rows])


@each_loss
def test_finite_scalar_and_gradient(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    objective = objective_of(name, options, pair)
    targets = objective.targets(teacher.signals(objective.teacher_needs()))
    total, parts = objective(student.signals(objective.student_needs()), [targets], labels_of(name))
    assert total.shape == () and total.dtype == torch.float32 and set(parts) == {name}
    assert (total.item() < 0.0 if name == "infomax" else total.item() > 0.0) and not parts[name].requires_grad
    total.backward()
    moved = [p for p in student.model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved
    for parameter in objective.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if LOSSES.row(case[0]).category not in ALONE])
def test_minimum_is_reached_when_the_student_is_the_teacher(name: str, options: dict, build_network: Any) -> None:
    # Source of the numbers: a divergence of a thing from itself is 0, one minus its correlation with itself is 0; for
    # losses that are not 0 at best, a closed form (``at_best``).
    network = build_network(depth=3)
    facts = KNOWN.get(name, {})
    objective = objective_of(name, {**options, **facts.get("alike", {})}, Pair(network.anatomy, network.anatomy, 5))
    teacher = student = network.signals(objective.teacher_needs())
    minimum = 0.0
    if "at_best" in facts:
        teacher, student, minimum = facts["at_best"](objective.terms[name], teacher, LABELS)
    total, _ = objective(student, [objective.targets(teacher)], LABELS)
    assert abs(total.item() - minimum) < 2e-6 * max(1.0, minimum)


@each_loss
def test_no_gradient_reaches_the_teacher(name: str, options: dict, pair: Pair, student: Any, teacher: Any) -> None:
    teacher.model.requires_grad_(True)  # a forward pass with a graph: the objective itself has to cut it
    objective = objective_of(name, options, pair)
    targets = objective.targets(teacher.signals(objective.teacher_needs()))
    assert not any(value.requires_grad for value in targets.values())
    total, _ = objective(student.signals(objective.student_needs()), [targets], labels_of(name))
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
    total, _ = objective(signals, [targets], labels_of(name))
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
        total, _ = objective(signals, [targets], labels_of(name))
    assert total.dtype == torch.float32 and all(value.dtype == torch.float32 for value in targets.values())
    total.backward()
    grads = [p.grad for p in (*student.model.parameters(), *objective.parameters()) if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)
    torch.manual_seed(3)
    without, _ = objective(signals, [objective.targets(given)], labels_of(name))
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
    exact, _ = objective(signals, [targets], labels_of(name))
    torch.manual_seed(3)
    rounded, _ = objective(signals, [{key: value.half() for key, value in targets.items()}], labels_of(name))
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


@each_loss
def test_it_stays_on_the_device_of_its_networks(
    name: str, options: dict, pair: Pair, student: Any, teacher: Any
) -> None:
    """Source: PyTorch's fake tensors, which refuse operations between a GPU and the CPU."""
    objective, labels = objective_of(name, options, pair), labels_of(name)
    labels = replace(labels, classes_B=on_gpu(labels.classes_B))
    move(student.model, teacher.model, objective)
    for network in (student, teacher):
        network.images = on_gpu(network.images)
    with computing_on_gpu():
        targets = objective.targets(teacher.signals(objective.teacher_needs()))
        total, parts = objective(student.signals(objective.student_needs()), [targets], labels)
        assert {tensor.device.type for tensor in (total, *parts.values(), *targets.values())} == {"cuda"}


def test_a_tensor_on_the_cpu_is_found() -> None:
    with pytest.raises(RuntimeError, match="same device|different devices"), computing_on_gpu():
        on_gpu(torch.zeros(3)) + torch.ones(3)
