"""torchdistill's losses by name: the right ones run as they are, the wrong ones are not inherited.

A test of a refusal shows what the class computes beside what it should; it fails when torchdistill mends it, and the
refusal can go then.
"""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from torchdistill.losses import mid_level

from remap.recipe import Recipe
from remap.recipe.checks import option_problems
from remap.remapping import LOSSES
from remap.remapping.knowledge.torchdistill_bridge import BRIDGED, REFUSED
from remap.remapping.labels import Labels
from remap.remapping.objective import Pair
from remap.remapping.signals import Signals, Tokens

LABELS = Labels(torch.tensor([0, 3, 1, 4, 3, 2]))
BOTH = ("s", "output", "t", "output")


# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {
    "torchdistill": {
        "variants": [
            {"loss": "PKTLoss"},
            {"loss": "DISTLoss", "signal": "logits", "options": {"tau": 2.0}},
            {"loss": "SKDInstanceLoss", "signal": "logits", "options": {"mode": "code"}},
            {"loss": "ATLoss", "signal": "tokens", "options": {"mode": "paper"}},
        ],
    }
}


def make(name: str, pair: Pair, **options: Any) -> Any:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))


def run(term: Any, student: Signals, teacher: Signals) -> float:
    return term(student, term.target(teacher), LABELS).item()


def io(student: torch.Tensor, teacher: torch.Tensor) -> tuple[dict, dict]:
    return {"s": {"output": student}}, {"t": {"output": teacher}}


@pytest.fixture
def both() -> tuple[Signals, Signals]:
    return Signals(2 * torch.randn(6, 5), torch.randn(6, 16)), Signals(3 * torch.randn(6, 5), torch.randn(6, 24))


def test_every_class_is_run_or_refused() -> None:
    # Source: torchdistill's module itself.
    classes = {
        name for name, kind in inspect.getmembers(mid_level, inspect.isclass) if kind.__module__ == mid_level.__name__
    }
    wrappers = {"SimpleLossWrapper", "DictLossWrapper"}  # of any loss; they compute nothing themselves
    assert set(BRIDGED) | set(REFUSED) == classes - wrappers
    assert not set(BRIDGED) & set(REFUSED)


@pytest.mark.parametrize(
    ("loss", "signal", "options", "theirs"),
    [
        ("DISTLoss", "logits", {"tau": 2.0, "beta": 0.5}, lambda: mid_level.DISTLoss(*BOTH, tau=2.0, beta=0.5)),
        ("SKDInstanceLoss", "logits", {}, lambda: mid_level.SKDInstanceLoss(*BOTH)),
        ("SKDInstanceLoss", "logits", {"mode": "code"}, lambda: mid_level.SKDInstanceLoss(*BOTH, mode="code")),
        ("PKTLoss", "pooled", {}, lambda: mid_level.PKTLoss(*BOTH)),
        ("PKTLoss", "logits", {"eps": 1e-5}, lambda: mid_level.PKTLoss(*BOTH, eps=1e-5)),
        ("RKDLoss", "pooled", {"angle_factor": 0.5}, lambda: mid_level.RKDLoss("s", "t", 1.0, 0.5, "mean")),
        ("RKDLoss", "logits", {"reduction": "sum"}, lambda: mid_level.RKDLoss("s", "t", 1.0, 2.0, "sum")),
    ],
)
def test_runs_the_class_itself(
    pair: Pair, both: tuple[Signals, Signals], loss: str, signal: str, options: dict, theirs: Any
) -> None:
    # Source: the class called in its own way.
    term = make("torchdistill", pair, loss=loss, signal=signal, options=options)
    given = [one.logits_BC if signal == "logits" else one.pooled_BD for one in both]
    assert run(term, *both) == pytest.approx(theirs()(*io(*given)).item(), rel=1e-6)
    assert set(term.target(both[1])) == {signal}


@pytest.mark.parametrize("name", ["DISTLoss", "SKDInstanceLoss"])
def test_a_teacher_of_the_first_classes_is_compared_on_those(
    name: str, pair: Pair, both: tuple[Signals, Signals]
) -> None:
    student, teacher = (Signals(signals.logits_BC[:, :3]) for signals in both)
    term = make("torchdistill", pair, loss=name, signal="logits")
    assert run(term, both[0], teacher) == run(term, student, teacher)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_at_is_given_maps(pair: Pair, mode: str) -> None:
    # Source: Zagoruyko and Komodakis 2017, in numpy: energy of each place, over its length; "paper": the length of
    # the difference, mean over images; "code": its mean square.
    term = make("torchdistill", pair, loss="ATLoss", signal="tokens", options={"mode": mode})
    assert term.blocks == ((1, 2),)
    s = Tokens(torch.randn(4, 9, 16), torch.zeros(4, 1, 16), (3, 3), True)
    wanted = torch.randn(4, 9, 24)
    energy = [(one.double().numpy() ** 2).sum(axis=-1) for one in (s.patches_BND, wanted)]
    ours, theirs = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in energy)
    gap = ours - theirs
    expected = np.linalg.norm(gap, axis=1).mean() if mode == "paper" else (gap**2).mean()
    found = term(Signals(torch.zeros(4, 5), tokens={1: s}), {"patches2 3x3": wanted}, LABELS)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_at_of_tokens_would_sum_over_tokens() -> None:
    # Why ATLoss is given maps: of (B, N, D) its "map" has D places, and widths that differ cannot be compared.
    tokens = torch.randn(4, 9, 16)
    assert mid_level.ATLoss.attention_transfer(tokens).shape == (4, 16)
    assert mid_level.ATLoss.attention_transfer(tokens.mT.unflatten(2, (3, 3))).shape == (4, 9)
    pairs = {"only": {"student": {"path": "s", "io": "output"}, "teacher": {"path": "t", "io": "output"}}}
    with pytest.raises(RuntimeError):
        mid_level.ATLoss(pairs)(*io(tokens, torch.randn(4, 9, 24)))


def test_rkd_of_one_image_is_zero(pair: Pair) -> None:
    # torchdistill takes the mean of no distances: not a number. The last batch of an epoch may hold one image.
    s, t = torch.randn(1, 16), torch.randn(1, 24)
    assert torch.isnan(mid_level.RKDLoss("s", "t", 1.0, 2.0, "mean")(*io(s, t)))
    term = make("torchdistill", pair)
    assert term(Signals(torch.zeros(1, 5), s), {"pooled": t}, LABELS).item() == 0.0


# --- what is not inherited --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValidationError, match="is not run here") as error:
        LOSSES.load("torchdistill").Config(loss=name)
    assert REFUSED[name] in str(error.value) and "RKDLoss" in str(error.value)


@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
def test_kd_leaves_out_the_squared_temperature(name: str, pair: Pair, both: tuple[Signals, Signals]) -> None:
    # Source: Hinton et al. 2015: the gradient keeps its size over temperatures only with the factor T^2. Without
    # labels' part the class drops it and beta alike; our kd has it.
    s, t = (one.logits_BC for one in both)
    kind = getattr(mid_level, name)
    with pytest.raises(TypeError):
        kind(*BOTH, temperature=4.0)
    plain, weighted = (kind(*BOTH, temperature=4.0, beta=beta)(*io(s, t)).item() for beta in (1.0, 7.0))
    assert plain == weighted
    if name == "LogitStdKDLoss":
        s, t = ((x - x.mean(dim=1, keepdim=True)) / (1e-7 + x.std(dim=1, keepdim=True)) for x in (s, t))
    ours = run(make("kd", pair, temperature=4.0), Signals(s), Signals(t))
    assert ours == pytest.approx(16.0 * plain, rel=1e-5)


def test_spkd_divides_by_the_sum_of_magnitudes(pair: Pair, both: tuple[Signals, Signals]) -> None:
    # Source: numpy with either norm; Eq. 2 of Tung and Mori 2019 has the Euclidean one.
    grams = [one.pooled_BD.double().numpy() @ one.pooled_BD.double().numpy().T for one in both]

    def by(order: int) -> float:
        s, t = (gram / np.linalg.norm(gram, ord=order, axis=1, keepdims=True) for gram in grams)
        return float(((s - t) ** 2).sum() / 36)

    theirs = mid_level.SPKDLoss("s", "t", "batchmean")(*io(both[0].pooled_BD, both[1].pooled_BD)).item()
    assert theirs == pytest.approx(by(1), rel=1e-5)
    assert run(make("spkd", pair), *both) == pytest.approx(by(2), rel=1e-5)
    assert by(2) > 2.0 * by(1)


def test_distplus_rewards_what_it_should_punish() -> None:
    # Source: the sign. Equal maps must not cost more than opposite ones.
    logits, maps = torch.randn(4, 5), torch.randn(4, 6, 3, 3)
    loss = mid_level.DISTPlusLoss("l", "output", "l", "output", "m", "output", "m", "output")

    def value(student_maps: torch.Tensor) -> float:
        student, teacher = ({"l": {"output": logits}, "m": {"output": one}} for one in (student_maps, maps))
        return loss(student, teacher).item()

    assert value(maps) == pytest.approx(1.0, abs=1e-4)
    assert loss.channel_relation(-maps, maps).item() == pytest.approx(-1.0, abs=1e-4)


def test_crd_cannot_draw() -> None:
    with pytest.raises(AttributeError, match="prob"):
        mid_level.CRDLoss("s", "e", "t", 8, 10, 4, 10).draw(3)


def test_skd_direction_has_no_gradient_at_its_minimum() -> None:
    # Source: the derivative of a root at 0; the teacher "self" starts there.
    logits = torch.randn(4, 5)
    student = logits.clone().requires_grad_()
    mid_level.SKDDirectionLoss(*BOTH)(*io(student, logits)).backward()
    assert torch.isnan(student.grad).any()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "RKDLoss", "options": {"gamma": 1.0}},
            "no option 'gamma' .allowed: dist_factor, angle_factor, red",
        ),
        ({"loss": "RKDLoss", "options": {"student_output_path": "head"}}, "no option 'student_output_path'"),
        ({"loss": "ATLoss", "signal": "pooled"}, "ATLoss cannot read signal 'pooled' .allowed: tokens"),
        ({"loss": "DISTLoss"}, "DISTLoss cannot read signal 'pooled' .allowed: logits"),
        ({"loss": "PKTLoss", "signal": "tokens"}, "allowed: pooled, logits"),
        ({"loss": "RKDLoss", "options": {"reduction": "none"}}, "does not run with options reduction: none"),
        ({"loss": "RKDLoss", "options": {"reduction": "avg"}}, "does not run with options reduction: avg"),
        ({"loss": "ATLoss", "signal": "tokens", "options": {"mode": "x"}}, "does not run with options mode: x"),
        ({"loss": "DISTLoss", "signal": "logits", "options": {"tau": 0.0}}, "no finite number"),
        ({"loss": "DISTLoss", "signal": "logits", "options": {"tau": "warm"}}, "does not run"),
        ({"loss": "PKTLos"}, "Input should be 'ATLoss', 'DISTLoss'"),
    ],
)
def test_wrong_options_are_found_early(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LOSSES.load("torchdistill").Config(**options)


def recipe(**options: Any) -> Recipe:
    return Recipe(teacher="vit_mini_teacher_patch4_32", losses=({"name": "ce"}, {"name": "torchdistill", **options}))


def test_a_recipe_holds_it() -> None:
    made = recipe(loss="DISTLoss", signal="logits", options={"tau": 2.0}, weight=0.5)
    assert option_problems(made) == []
    again = Recipe.model_validate_json(made.written_out().model_dump_json())
    assert again.losses[1].options == {"loss": "DISTLoss", "signal": "logits", "options": {"tau": 2.0}}
    (problem,) = option_problems(recipe(loss="SPKDLoss"))
    assert problem.startswith("losses[1].loss: torchdistill's SPKDLoss is not run here") and "use spkd" in problem
    (problem,) = option_problems(recipe(options={"tau": 2.0}))
    assert "RKDLoss has no option 'tau'" in problem


def test_logits_of_a_distilled_student_are_those_of_its_token(pair: Pair, both: tuple[Signals, Signals]) -> None:
    # Source: DeiT: the distillation token answers to the teacher.
    heads = torch.randn(6, 5), both[0].logits_BC
    student = Signals(torch.stack(heads).mean(dim=0), head_logits=heads)
    term = make("torchdistill", pair, loss="SKDInstanceLoss", signal="logits", options={"temperature": 1.0})
    p, q = (F.log_softmax(one, dim=1).double() for one in (both[1].logits_BC, heads[1]))
    assert run(term, student, both[1]) == pytest.approx((p.exp() * (p - q)).sum(dim=1).mean().item(), rel=1e-5)
