"""Methods on vision-language students in complete runs: with labels, with a teacher, and with neither label."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pairs import Pair, transformers_clip, transformers_siglip

from remap.errors import RecipeError
from remap.pipeline.run import resume, start
from remap.recipe import resolve, resolve_distill
from remap.runs.task import load_task


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return transformers_clip(tmp_path_factory.mktemp("pairs") / "clip")


CASES = [
    ("coop", "labels", ("method.num_context=4",)),
    ("prograd", "labels", ("method.num_context=4", "train.accumulation=2")),
    ("tip_adapter", "labels", ("method.shots=4",)),
    ("cocoop", "teacher", ("method.words=null",)),
    ("clip_lora", "teacher", ("train.keep=best",)),
    ("taskres", "unlabeled", ("train.ema=0.5",)),
    ("maple", "unlabeled", ()),
    ("mmrl", "labels", ("method.first=1",)),
    ("promptkd", "unlabeled", ("losses.kd.temperature=1",)),
    ("promptsrc", "teacher", ("data.augment=shift",)),
]


@pytest.mark.parametrize(("method", "by", "settings"), CASES, ids=[case[0] for case in CASES])
def test_a_run_and_its_task(
    tiny: Any, pair: Pair, tmp_path: Path, method: str, by: str, settings: tuple[str, ...]
) -> None:
    settings = (
        ("train.epochs=1", "teacher.allow_weak=true", *settings) if by != "labels" else ("train.epochs=1", *settings)
    )
    if by == "unlabeled":
        words = {"student": pair.word, "teacher": pair.word, "unlabeled": f"{tiny.data}/train", "method": method}
        words["classes"] = "green,red|hat,blue"
        recipe = resolve_distill(None, words, [*tiny.SETTINGS, *settings])
    else:
        kind = {"losses": "ce"} if by == "labels" else {"losses": "ce,kd,affinity", "teacher": pair.word}
        words = {"data": tiny.data, "student": pair.word, "method": method, **kind}
        recipe = resolve(words=words, settings=[*tiny.SETTINGS, *settings])
    result = start(recipe, tmp_path / "run")
    assert not [name for name in result.summary["trainables"] if name.startswith("head.")]
    loaded, _ = load_task(tmp_path / "run")
    images = torch.randn(3, 3, 32, 32)
    model = result.student.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(images), model(images))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of another space: 32 dimensions."""
    return transformers_siglip(tmp_path_factory.mktemp("pairs") / "siglip")


@pytest.mark.parametrize("by", ["logits unread", "a run"])
def test_promptkd_answers_in_the_words_of_its_teacher(
    tiny: Any, pair: Pair, other: Pair, tmp_path: Path, by: str
) -> None:
    """Expected: the classifier of the teacher itself, zero-shot, or as it was tuned."""
    settings = (*tiny.SETTINGS, "train.epochs=1")
    theirs = {"data": tiny.data, "student": other.word, "losses": "ce"}
    if by == "a run":
        source = resolve(words={**theirs, "method": "coop"}, settings=[*settings, "method.num_context=4"])
    else:
        source = resolve(words={**theirs, "method": "linear"}, settings=[*settings, "train.fit=none"])
    head = start(source, tmp_path / "teacher").student.head
    words = {"data": tiny.data, "student": pair.word, "method": "promptkd", "losses": "ce,clip_feature"}
    words["teacher"] = str(tmp_path / "teacher") if by == "a run" else other.word
    student = start(
        resolve(words=words, settings=[*settings, "method.width=32", "teacher.allow_weak=true"]), tmp_path / "run"
    ).student
    taken = student.model.get_submodule("remap_promptkd")
    for name in ("weight", "bias"):
        (wanted,) = (tensor for key, tensor in head.items() if key.endswith(name))
        torch.testing.assert_close(getattr(taken, name), wanted.detach(), rtol=1e-5, atol=1e-5)


def test_promptkd_says_where_the_words_are_its_own(tiny: Any, pair: Pair, tmp_path: Path, watch: Any) -> None:
    """Steps have trained a constant for each class of the teacher, which no words have."""
    settings, progress = (*tiny.SETTINGS, "train.epochs=1"), watch(lambda step: None)
    data = {"data": tiny.data, "student": pair.word}
    start(resolve(words={**data, "method": "linear", "losses": "ce"}, settings=settings), tmp_path / "teacher")
    zero = start(
        resolve(words={**data, "method": "linear", "losses": "ce"}, settings=[*settings, "train.fit=none"]),
        tmp_path / "zero",
    ).student.head
    words = {**data, "method": "promptkd", "losses": "ce,clip_feature", "teacher": str(tmp_path / "teacher")}
    student = start(resolve(words=words, settings=settings), tmp_path / "run", progress).student
    assert [line for line in progress.said if line.startswith("promptkd answers in the student's own words")]
    (wanted,) = (tensor for key, tensor in zero.items() if key.endswith("weight"))
    taken = student.model.get_submodule("remap_promptkd").weight
    torch.testing.assert_close(taken, wanted.detach(), rtol=1e-5, atol=1e-5)


def test_a_run_whose_results_are_lost_has_the_words_it_learned(tiny: Any, pair: Pair, tmp_path: Path) -> None:
    """Without images to evaluate on, nothing but the end of training writes the words into the classifier."""
    words = {"student": pair.word, "teacher": pair.word, "unlabeled": f"{tiny.data}/train", "method": "coop"}
    settings = [*tiny.SETTINGS, "train.epochs=1", "teacher.allow_weak=true"]
    start(resolve_distill(None, {**words, "classes": "green,red|hat,blue"}, settings), tmp_path / "run")
    task = tmp_path / "run" / "task" / "task.safetensors"
    before = task.read_bytes()
    task.unlink()
    resume(tmp_path / "run")
    assert task.read_bytes() == before


def test_nothing_is_trained_where_the_words_are_enough(tiny: Any, pair: Pair, tmp_path: Path) -> None:
    """The zero-shot model itself, which the accuracy before training is of, and the training-free Tip-Adapter."""
    settings, data = [*tiny.SETTINGS, "train.fit=none"], {"data": tiny.data, "student": pair.word, "losses": "ce"}
    plain = start(resolve(words={**data, "method": "linear"}, settings=settings), tmp_path / "plain")
    student = plain.summary["student"]
    assert student["accuracy"] == student["initial_accuracy"]
    words = {"unlabeled": f"{tiny.data}/train", "classes": "green,red|hat,blue", "val_data": f"{tiny.data}/val"}
    of_words = start(
        resolve(words={**words, "student": pair.word, "method": "linear", "losses": "ce"}, settings=settings),
        tmp_path / "words",
    )
    assert of_words.summary["data"]["labeled_images"] == 0 and of_words.summary["student"]["accuracy"] is not None
    words = {**data, "method": "tip_adapter"}
    votes = start(resolve(words=words, settings=[*settings, "method.shots=2"]), tmp_path / "votes").student
    assert torch.equal(votes.model.get_submodule("remap_tip_adapter").counted, torch.ones(3, 2))
    loaded, _ = load_task(tmp_path / "votes")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = loaded.model.eval()(images)
        assert torch.equal(logits, votes.model.eval()(images))
        assert not torch.allclose(logits, plain.student.model.eval()(images))
    with pytest.raises(RecipeError, match=r"train.fit: none leaves local-dir:.* a random classifier"):
        resolve(words={**data, "student": tiny.student, "method": "linear"}, settings=settings)
    with pytest.raises(RecipeError, match="train.fit: none learns nothing"):
        resolve(words={**words, "teacher": pair.word, "losses": "ce,kd"}, settings=settings)


def test_compare_takes_a_kind() -> None:
    from remap.pipeline.comparison_cells import chosen_methods

    assert chosen_methods("2c") == ["maple", "promptsrc", "mmrl", "promptkd"]
    assert "coop" in chosen_methods("2b") and "coop" not in chosen_methods("prompt")
