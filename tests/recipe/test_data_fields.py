"""Images without labels, few labels, views and mixing in a recipe: what is refused, and what goes without a teacher."""

from typing import Any

import pytest

from remap.data.augmentation import PRESETS
from remap.errors import RecipeError
from remap.pipeline.comparison_cells import comparison_cells
from remap.recipe import Recipe, resolve, validate
from remap.recipe.schema import DataSpec
from remap.remapping import LOSSES


def problems(**values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        validate(values, "here")
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"data": {"source": "photos", "unlabeled": "more"}}, "data.unlabeled"),
        ({"data": {"source": "photos", "unlabeled": "more"}, "teacher": "a", "losses": "ce"}, "data.unlabeled"),
        ({"data": {"labels": 50, "unlabeled_only": True}, "teacher": "a", "losses": "ce"}, "data.unlabeled_only"),
    ],
)
def test_images_without_labels_need_a_loss_that_reads_none(values: dict[str, Any], place: str) -> None:
    (line,) = problems(**values)
    assert line.startswith(f"{place}: nothing would be learned from the images without labels") and "kd" in line
    assert validate({**values, "teacher": "a", "losses": "ce,kd"}, "here").data.model_dump().items() >= (
        values["data"].items()
    )


def test_the_classifier_is_trained_by_what_counts() -> None:
    """Labels teach nothing on images without any, and a weight of 0 nothing at all."""
    unlabeled = {"data": {"labels": 50, "unlabeled_only": True}, "teacher": "a"}
    (line,) = problems(**unlabeled, losses="ce,feature")
    assert line.startswith("data.unlabeled_only: none of the losses trains the classifier without labels")
    assert validate({**unlabeled, "losses": "feature,kd"}, "here")
    (line,) = problems(teacher="a", losses="ce:0,feature")
    assert line.startswith("losses: none of them trains the classifier")


def test_few_labels_alone_are_a_task_of_their_own() -> None:
    """The student without a teacher that few labels are compared with."""
    assert validate({"data": {"labels": 50}}, "here").needs_labels


def test_only_images_without_labels_must_come_from_somewhere() -> None:
    (line,) = problems(data={"unlabeled_only": True}, teacher="a")
    assert line == "data.unlabeled_only: all images have labels (set data.unlabeled or data.labels)"


@pytest.mark.parametrize("source", [None, "photos"])
def test_class_means_need_labelled_images(source: str | None) -> None:
    """They are taken after the last step, when all steps would be lost."""
    data = {"source": source, "unlabeled": "more", "unlabeled_only": True}
    lines = problems(data=data, teacher="a", losses="feature", method="ease")
    assert any(line.startswith("method: ease answers by class means of labelled images") for line in lines)


def test_views_without_augmentation_are_one() -> None:
    (line,) = problems(data={"views": 4})
    assert line.startswith("data.views: without augmentation an image has one view only")
    assert validate({"data": {"views": 4, "augment": "shift"}}, "here")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"flip": 0.5}, "data.flip: nothing is augmented"),
        ({"augment": "custom"}, "data.augment: every operation of custom is off"),
        ({"augment": "light", "crop": {"scale": [1, 1], "ratio": [1, 1]}}, "data.augment: every operation of light is"),
        ({"augment": "strong", "trivial_augment": True}, "data.trivial_augment: RandAugment is on as well"),
        ({"augment": "custom", "crop": {"scale": [0.9, 0.5]}}, "data.crop.scale: should be two numbers, the smaller"),
        ({"augment": "custom", "jitter": {"hue": 0.6}}, "data.jitter.hue: should be less than or equal to 0.5"),
    ],
)
def test_operations_that_would_do_nothing_or_cannot_be_are_refused(data: dict[str, Any], says: str) -> None:
    (line,) = problems(data=data)
    assert line.startswith(says)


def test_operations_count_and_not_the_words_for_them() -> None:
    """A recipe of version 0.1 keeps its hash; one that spells a preset out is the same recipe."""
    light = PRESETS["light"].crop.model_dump()
    same = [
        ({"augment": "none"}, {}),
        ({"augment": "shift_flip"}, {"augment": "custom", "shift": 0.125, "flip": 0.5}),
        ({"augment": "light"}, {"augment": "custom", "crop": light}),
        (
            {"augment": "light"},
            {"augment": "strong", "crop": light, "rand_augment": {"ops": 0}, "erasing": {"chance": 0}},
        ),
    ]
    digests = set()
    for left, right in same:
        one, other = (validate({"data": data}, "here").digest() for data in (left, right))
        assert one == other
        digests.add(one)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"teacher": {"model": "ema", "cache": "disk"}}, "the running average of the student changes"),
        ({"teacher": {"model": "a", "cache": "memory"}, "data": {"cutmix": 1.0}}, "mixed images are new"),
        ({"teacher": {"model": "a", "cache": "disk"}, "data": {"augment": "shift"}}, "views are new in every epoch"),
    ],
)
def test_outputs_that_change_are_not_cached(values: dict[str, Any], why: str) -> None:
    """Known from the recipe alone, so nobody waits for a teacher to be prepared first."""
    (line,) = problems(**values)
    assert line.startswith(f"teacher.cache: nothing can be cached, since {why}")


@pytest.mark.parametrize(
    "field", [{"views": 0}, {"mixup": -0.1}, {"cutmix": -1}, {"mix_probability": 1.1}, {"labels": 0}], ids=str
)
def test_numbers_out_of_range_are_refused(field: dict[str, Any]) -> None:
    (name,) = field
    assert any(line.startswith(f"data.{name}: should be") for line in problems(data=field))


@pytest.mark.parametrize("losses", ["ce", "ce:2"])
def test_a_recipe_knows_whether_all_its_losses_read_labels(losses: str) -> None:
    assert Recipe.model_validate({"losses": losses}).needs_labels
    for row in LOSSES:
        other = Recipe.model_validate({"teacher": "a", "losses": f"{losses},{row.name}"})
        assert other.needs_labels == (row.category == "labels")


def test_mixing_is_on_when_either_way_is() -> None:
    cases = [{}, {"mix_probability": 0.5}, {"mixup": 0.2}, {"cutmix": 1}, {"mixup": 0.2, "cutmix": 1}]
    assert [DataSpec(**case).mixes for case in cases] == [False, False, True, True, True]


def test_the_word_sets_the_folder_and_the_rest_goes_by_its_place() -> None:
    settings = ["data.mixup=0.2", "data.augment=shift", "data.views=3"]
    recipe = resolve(words={"teacher": "a", "data": "photos", "unlabeled": "more"}, settings=settings)
    assert (recipe.data.unlabeled, recipe.data.mixup, recipe.data.views) == ("more", 0.2, 3)
    assert recipe.data.labeled_part() == recipe.data.model_copy(update={"unlabeled": None})


def test_a_comparison_gives_images_without_labels_to_the_teacher_alone() -> None:
    """A saved cell is read again, so each one must be a valid recipe by itself; few labels are the same for both."""
    recipe = resolve(
        words={"teacher": "a", "data": "photos", "unlabeled": "more"},
        settings=["data.unlabeled_only=true", "data.labels=9"],
    )
    cells = comparison_cells(recipe, ["vpt_deep", "linear"], 2)
    for cell in cells:
        spec = cell.recipe.data
        assert (spec.unlabeled, spec.unlabeled_only) == (("more", True) if cell.with_teacher else (None, False))
        assert spec.labels == 9
        validate(cell.recipe.model_dump(mode="json"), cell.name)
