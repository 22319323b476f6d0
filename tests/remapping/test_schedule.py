"""Scheduled weights and temperatures against their closed forms."""

import math
from typing import Any

import pytest

from remap.errors import RecipeError
from remap.pipeline.objective import build_objective
from remap.recipe import dump, load, resolve
from remap.remapping.objective import Pair
from remap.remapping.schedule import Schedule


def test_a_warm_up_is_linear_and_a_cosine_ends_where_it_says() -> None:
    """DKD: min(t / 20, 1); a cosine from 1 to e is e + (1 - e) (1 + cos(pi x)) / 2, x from 0 to 1 after the warm-up."""
    factors = [Schedule(warmup_epochs=2.0).factor(update, 5, 4) for update in range(20)]
    assert factors == pytest.approx([min((update + 1) / 10, 1.0) for update in range(20)])
    schedule = Schedule(warmup_epochs=1.0, start=0.5, decay="cosine", end=0.2)
    assert schedule.factor(0, 5, 4) == pytest.approx(0.6)
    for update in range(5, 20):
        wanted = 0.2 + 0.8 * (1 + math.cos(math.pi * (update - 5) / 14)) / 2
        assert schedule.factor(update, 5, 4) == pytest.approx(wanted)
    assert schedule.factor(19, 5, 4) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([{"name": "kd", "temperature_schedule": {"warmup_epochs": 1}}], "a temperature cannot be 0"),
        ([{"name": "kd", "temperature": 1.0, "scale": "torchtune", "temperature_schedule": {}}], "has no temperature"),
        (["kd", {"name": "feature", "temperature_schedule": {}}], "feature has no temperature"),
        (
            [{"name": "attention_cls", "temperature": 5.0, "temperature_schedule": {}}],
            "attention_cls has no temperature",
        ),
        ([{"name": "gram", "loss": "mse", "temperature_schedule": {}}], "gram has no temperature"),
        ([{"name": "kd", "weight_schedule": {"end": 0.5}}], "set decay: cosine"),
        ([{"name": "kd", "weight_schedule": {"warmup": 1}}], "unknown key"),
    ],
)
def test_a_schedule_that_would_do_nothing_is_refused(losses: list[Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        resolve(words={"teacher": "a", "losses": losses})


@pytest.mark.parametrize(
    ("loss", "at_two"),
    [
        ({"name": "dkd", "temperature": 4.0}, 2.0),
        ({"name": "mlkd", "temperatures": [2.0, 6.0]}, 1.0),
        ({"name": "dist", "tau": 3.0}, 1.5),
        ({"name": "logit_std", "of": "nkd"}, 1.0),
        ({"name": "logit_std", "of": "dist", "options": {"tau": 8.0}}, 4.0),
    ],
)
def test_temperatures_of_every_kind_follow(loss: dict[str, Any], at_two: float, tmp_path: Any) -> None:
    """Written and read again; halfway up a warm-up from 0.25 over 3 updates the factor is 0.5 at the first."""
    schedule = {
        "weight_schedule": {"warmup_epochs": 1.0},
        "temperature_schedule": {"warmup_epochs": 1.0, "start": 0.25},
    }
    recipe = resolve(words={"teacher": "a", "losses": [{**loss, **schedule}]})
    (tmp_path / "recipe.yaml").write_text(dump(recipe.written_out()))
    recipe = load(tmp_path / "recipe.yaml")
    objective = build_objective(recipe, [Pair(None, None, 2)])
    objective.set_progress(0, 3, 2)
    name = loss["name"]
    weight = recipe.losses[0].weight
    assert objective.scheduled() == pytest.approx({f"{name}.weight": weight / 3, f"{name}.temperature": at_two})
    objective.set_progress(5, 3, 2)
    assert objective.scheduled() == pytest.approx({f"{name}.weight": weight, f"{name}.temperature": 2 * at_two})


def test_recipes_without_schedules_are_written_as_before() -> None:
    assert resolve(words={"teacher": "a", "losses": "kd"}).losses[0].model_dump() == {"name": "kd", "weight": 1.0}
